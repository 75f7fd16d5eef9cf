"""Rules applied to facts: what is advised, and the settings that come of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.config import check
from prefopt.methods.method import Method
from prefopt.pipeline.advise.choices import epochs
from prefopt.pipeline.advise.facts import Facts
from prefopt.pipeline.advise.rules import ALWAYS, RULES, Rule, Topic, row_of
from prefopt.pipeline.advise.settings import AdviseSettings
from prefopt.pipeline.stages import plan_stages
from prefopt.training.assemble import settings_for
from prefopt.training.settings import RunSettings

PLACEHOLDER = "MODEL"

GIVEN = "as given"
"""The reason for what the user said."""

OF_TOKENS = ("data_format", "columns", "chat_template", "template_args", "text_as", "max_length", "too_long")
"""Settings of the data that training needs as they were given."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule that holds.

    Attributes:
        rule: which.
        because: the figures by which it holds.
    """

    rule: Rule
    because: str

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        rule = self.rule
        return {"rule": rule.name, "because": self.because, "advice": rule.advice, "why": rule.reason, "source": rule.said_by}


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from the facts.

    Attributes:
        better: what would be best, of methods that prefopt does not have yet.
        method: the row that decides; its method is None where no method will do.
        also: further rows about the method that hold.
        others: rows of the other topics that hold.
        config: settings for `prefopt train --config`; empty where there is nothing to train.
        reasons: setting -> why it is so, in a sentence.
        left: setting that is left to the run -> what the run will do.
        sweep: command that compares values of β, where the method has one.
        gpus: how many share the run.
    """

    better: tuple[Verdict, ...]
    method: Verdict
    also: tuple[Verdict, ...]
    others: tuple[Verdict, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    sweep: str = ""
    gpus: int = 1

    def of(self, topic: Topic) -> tuple[Verdict, ...]:
        """The rows of a topic that hold."""
        return tuple(verdict for verdict in self.others if verdict.rule.topic == topic)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "better": [verdict.to_dict() for verdict in self.better],
            "method": self.method.to_dict() | {"method": self.method.rule.method},
            "also": [verdict.to_dict() for verdict in self.also],
            **{topic: [verdict.to_dict() for verdict in self.of(topic)] for topic in ("before", "weights", "settings", "data")},
            "config": dict(self.config),
            "reasons": dict(self.reasons),
            "left": dict(self.left),
            "sweep": self.sweep,
            "gpus": self.gpus,
        }


def decide(settings: AdviseSettings, facts: Facts) -> Decision:
    """Every rule is asked; see `rules` for which of them decide.

    Raises:
        ConfigError: settings that were given (columns, max_length, ...) do not go together with what is advised.
    """
    held = [Verdict(rule, because) for rule in RULES if (because := rule.sign(facts))]
    on_method = [verdict for verdict in held if verdict.rule.topic == "method"]
    place = next(place for place, verdict in enumerate(on_method) if verdict.rule.method or not verdict.rule.methods)
    weights = next(([verdict] for verdict in held if verdict.rule.topic == "weights"), [])
    others = [verdict for verdict in held if verdict.rule.topic in ("before", "settings", "data")] + weights
    # Where two rows name one method for other reasons, the first says it.
    also = [verdict for verdict in on_method[place + 1 :] if verdict.rule.method != on_method[place].rule.method]
    decision = Decision(tuple(on_method[:place]), on_method[place], tuple(also), tuple(others))
    if decision.method.rule.method is None:  # nothing is run, so there is nothing to set
        return replace(decision, others=tuple(verdict for verdict in others if verdict.rule.topic == "data"))
    return _with_config(settings, facts, decision, decision.method.rule.method)


def _with_config(settings: AdviseSettings, facts: Facts, decision: Decision, name: str) -> Decision:
    kind = method_of(name)
    values: dict[str, Any] = {"out": "runs/advised", "data": settings.data}
    reasons: dict[str, str] = {}

    def take(found: Mapping[str, Any], why: str) -> None:
        for key, value in found.items():
            values[key] = value
            reasons[key] = why

    if settings.eval_data:
        values["eval_data"] = settings.eval_data
    take({key: getattr(settings, key) for key in OF_TOKENS if key in settings.model_fields_set}, GIVEN)
    if settings.trust_remote_code:
        take({"trust_remote_code": True}, GIVEN)
    own = dict(decision.method.rule.settings(facts))
    fields = kind.settings_class.model_fields
    if "beta" in fields and "beta" not in own:
        least, most = kind.usual["beta"]
        own = {"beta": fields["beta"].default, **own}
        reasons["beta"] = f"the method's own default; {least:g} to {most:g} is usual"
    take({key: value for key, value in own.items() if key != "beta"}, decision.method.because)
    stages = stages_of(facts, decision, name)
    shared = {key: value for key, value in ALWAYS(facts).items() if value}
    if settings.eval_fraction:
        shared["eval_fraction"] = settings.eval_fraction
    take(shared, "held-out figures say when it has been enough")
    take({"epochs": float(epochs(facts))}, "one pass to begin with: held-out figures say whether another pays")
    for verdict in decision.others:
        found = verdict.rule.settings(facts)
        news = {key: value for key, value in found.items() if key not in settings.model_fields_set and not is_default(key, value)}
        take(news, verdict.because)
    values = with_stages(facts, stages, values, own, reasons)
    values = {"model": settings.model, **values} if settings.model else values
    check_config({"model": PLACEHOLDER, **values})
    gpus = 1 if facts.model is None else next((way.gpus for way in facts.model.ways if way.name == facts.model.chosen), 1)
    sweep = "" if gpus > 1 or len(stages) > 1 or "beta" not in own else sweep_of(kind, own["beta"])
    return Decision(decision.better, decision.method, decision.also, decision.others, values, reasons, left_out(facts, kind), sweep, gpus)


def is_default(name: str, value: object) -> bool:
    """Whether a run would do so anyway."""
    return name in RunSettings.model_fields and value == RunSettings.model_fields[name].default


def method_of(name: str) -> type[Method]:
    """The method's class."""
    row = row_of(name)
    assert row is not None, name
    return row.load()


def stages_of(facts: Facts, decision: Decision, name: str) -> list[str]:
    """The methods, one after the other: SFT first where the model has not had it."""
    untuned = any(verdict.rule.sign.__name__ == "is_untuned" for verdict in decision.of("before"))
    return ["sft", name] if untuned and method_of(name).needs.completions != "demonstration" else [name]


def with_stages(
    facts: Facts, stages: list[str], values: Mapping[str, Any], own: Mapping[str, Any], reasons: dict[str, str]
) -> dict[str, Any]:
    """The settings as the file has them: of one method, or of stages with what is a stage's own under its name.

    Args:
        facts: of the model, for the learning rate.
        stages: the methods.
        values: what all stages share, and settings of the last stage's method.
        own: settings of that method.
        reasons: gets those of the learning rates.
    """
    rates = {name: learning_rate(facts, values, name) for name in stages}
    apart = {key: value for key, value in values.items() if key not in own and (key != "balance")}
    last = {key: value for key, value in {**own, **values}.items() if key in own or key == "balance"}
    if rates[stages[-1]] is not None:
        reasons["learning_rate"] = "usual for the method, for an adapter or all weights, and for a model of this size"
    if len(stages) == 1:
        rate = {} if rates[stages[0]] is None else {"learning_rate": rates[stages[0]]}
        return {"method": stages[0], **apart, **last, **rate}
    reasons["stages"] = "the model has not had SFT on anything like this, as far as can be told"
    under = {name: {} if rates[name] is None else {"learning_rate": rates[name]} for name in stages}
    under[stages[-1]] = {**last, **under[stages[-1]]}
    return {"stages": stages, **apart, **{name: found for name, found in under.items() if found}}


def learning_rate(facts: Facts, values: Mapping[str, Any], name: str) -> float | None:
    """The method's usual rate for this model; None where there is no model."""
    if facts.model is None:
        return None
    from prefopt.training.optimizer import usual_learning_rate  # loads torch, which a model has done already

    adapter = bool(values.get("lora_rank")) or facts.model.is_adapter
    return float(f"{usual_learning_rate(method_of(name).rates, facts.model.num_parameters, adapter=adapter):.6g}")


def left_out(facts: Facts, kind: type[Method]) -> dict[str, str]:
    """What cannot be said without a model."""
    if facts.model is not None:
        return {}
    rates = f"the run takes {kind.rates.full:g} for all weights, {kind.rates.adapter:g} for an adapter, and more below 1e9 weights"
    return {"learning_rate": rates, "lora_rank": "the run trains all weights; give --model, and the memory is looked at"}


def check_config(values: Mapping[str, Any]) -> None:
    """That `prefopt train --config` would take it.

    Raises:
        ConfigError: it would not.
    """
    if "stages" in values:
        plan_stages(dict(values), {})
        return
    kind = settings_for(method_of(str(values["method"])))
    check(kind, {key: value for key, value in values.items() if key != "method"}, source="what is advised")


def sweep_of(kind: type[Method], beta: float) -> str:
    """The command that compares β with a third and with three times of it, within what is usual."""
    least, most = kind.usual["beta"]
    values = sorted({float(f"{min(max(beta * factor, least), most):.2g}") for factor in (1 / 3, 1.0, 3.0)})
    return f"prefopt sweep beta={','.join(f'{value:g}' for value in values)} --config "


def config_path(settings: AdviseSettings) -> Path:
    """Where the settings are written, or would be."""
    return settings.write or Path("advice.yaml")
