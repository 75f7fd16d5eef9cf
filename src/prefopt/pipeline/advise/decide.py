"""Rules applied to facts: what is advised, and the settings that come of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.config import check
from prefopt.methods.method import Method
from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.choices import epochs, eval_every, held_out
from prefopt.pipeline.advise.facts import Facts
from prefopt.pipeline.advise.rules import RULES, Rule, Topic, row_of
from prefopt.pipeline.advise.settings import AdviseSettings
from prefopt.pipeline.stages import plan_stages
from prefopt.training.assemble import settings_for
from prefopt.training.settings import RunSettings

CARRIED = ("eval_data", "data_format", "columns", "chat_template", "template_args", "text_as", "max_length", "too_long")
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
        return {"rule": rule.name, "because": self.because, "advice": rule.advice, "why": rule.why, "source": rule.said_by}


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from the facts.

    Attributes:
        better: what would be best, of methods that prefopt does not have yet.
        method: the row that decides; its method is None where no method will do.
        also: further rows about the method that hold.
        others: rows of the other topics that hold.
        config: settings for `prefopt train --config`; empty where there is nothing to train.
        reasons: setting -> why it is so.
        sweep: command that compares values of β, where the method has one.
        gpus: how many share the run.
    """

    better: tuple[Verdict, ...]
    method: Verdict
    also: tuple[Verdict, ...]
    others: tuple[Verdict, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
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
            "first": [verdict.to_dict() for verdict in self.of("first")],
            "settings": [verdict.to_dict() for verdict in self.of("settings")],
            "config": dict(self.config),
            "reasons": dict(self.reasons),
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
    others = tuple(verdict for verdict in held if verdict.rule.topic != "method")
    place = next(place for place, verdict in enumerate(on_method) if verdict.rule.method or not verdict.rule.methods)
    chosen = on_method[place]
    decision = Decision(tuple(on_method[:place]), chosen, tuple(on_method[place + 1 :]), others)
    if chosen.rule.method is None:  # nothing is run, so there is nothing to set
        return replace(decision, others=decision.of("first"))
    return with_config(settings, facts, decision, chosen.rule.method)


def with_config(settings: AdviseSettings, facts: Facts, decision: Decision, name: str) -> Decision:
    """The decision with its settings, each with the reason for it.

    Args:
        settings: what was given wins.
        facts: of which values are made.
        decision: the rules that hold.
        name: of the method.
    """
    method = method_of(name)
    fields = method.settings_class.model_fields
    values: dict[str, Any] = {"out": "runs/advised", "data": settings.data}
    values |= {key: getattr(settings, key) for key in CARRIED if key in settings.model_fields_set}
    values |= {"trust_remote_code": True} if settings.trust_remote_code else {}
    own: dict[str, Any] = dict(decision.method.rule.settings(facts))
    reasons = dict.fromkeys(own, decision.method.because)
    if "beta" in fields:
        least, most = method.usual["beta"]
        own = {"beta": fields["beta"].default, **own}
        reasons["beta"] = f"the method's default; usual is {least:g} to {most:g}"
    values["epochs"] = float(epochs(facts))
    reasons["epochs"] = "one pass; held-out figures say whether another pays"
    if fraction := settings.eval_fraction or held_out(facts):
        values["eval_fraction"] = fraction
    if fraction or facts.has_eval:
        values["eval_every_steps"] = eval_every(facts)
    if facts.model is None:
        reasons["lora_rank"] = "the run trains all weights; --model MODEL says whether they fit, or LoRA"
    for verdict in decision.of("settings"):
        if verdict.rule.sign in signs.ABOUT_WEIGHTS:
            reasons["lora_rank"] = f"{verdict.rule.then}: {verdict.because}"
        for key, value in verdict.rule.settings(facts).items():
            if key in settings.model_fields_set or (key in RunSettings.model_fields and value == RunSettings.model_fields[key].default):
                continue
            reasons.setdefault(key, verdict.because) if key == "lora_rank" else reasons.update({key: verdict.because})
            (own if key in fields else values)[key] = value
    stages = stages_of(decision, name)
    rates = {stage: learning_rate(facts, values, stage) for stage in stages}
    reasons["learning_rate"] = reason_of_rate(facts, method)
    under = {stage: {} if rates[stage] is None else {"learning_rate": rates[stage]} for stage in stages}
    under[name] = {**own, **under[name]}
    given = {"model": settings.model} if settings.model else {}
    if len(stages) > 1:
        reasons["stages"] = next(verdict.because for verdict in decision.of("first") if verdict.rule.sign is signs.is_untuned)
        config = {**given, "stages": stages, **values, **under}
    else:
        config = {"method": name, **given, **values, **under[name]}
    check_config(config)
    gpus = facts.model.way.gpus if facts.model is not None and facts.model.way is not None else 1
    sweep = "" if gpus > 1 or len(stages) > 1 or "beta" not in own else sweep_of(method, own["beta"])
    return replace(decision, config=config, reasons=reasons, sweep=sweep, gpus=gpus)


def method_of(name: str) -> type[Method]:
    """The method's class."""
    row = row_of(name)
    assert row is not None, name
    return row.load()


def stages_of(decision: Decision, name: str) -> list[str]:
    """The methods, one after the other: SFT first where the model has not had it."""
    is_untuned = any(verdict.rule.sign is signs.is_untuned for verdict in decision.of("first"))
    return ["sft", name] if is_untuned and name != "sft" else [name]


def learning_rate(facts: Facts, values: Mapping[str, Any], name: str) -> float | None:
    """The method's usual rate for this model; None where there is no model."""
    if facts.model is None:
        return None
    from prefopt.training.optimizer import usual_learning_rate  # loads torch, which a model has done already

    adapter = bool(values.get("lora_rank")) or facts.model.is_adapter
    return float(f"{usual_learning_rate(method_of(name).rates, facts.model.num_parameters, adapter=adapter):.6g}")


def reason_of_rate(facts: Facts, method: type[Method]) -> str:
    """Why the learning rate is what it is, or what the run will take."""
    if facts.model is not None:
        return "usual for the method, for an adapter or all weights, and for a model of this size"
    return f"the run takes {method.rates.full:g} for all weights, {method.rates.adapter:g} for LoRA; more below 1e9 weights"


def check_config(values: Mapping[str, Any]) -> None:
    """That `prefopt train --config` would take it.

    Raises:
        ConfigError: it would not.
    """
    whole = {"model": "MODEL", **values}
    if "stages" in values:
        plan_stages(whole, {})
    else:
        kind = settings_for(method_of(str(values["method"])))
        check(kind, {key: value for key, value in whole.items() if key != "method"}, source="what is advised")


def sweep_of(method: type[Method], beta: float) -> str:
    """The command that compares β with a third and with three times of it, within what is usual."""
    least, most = method.usual["beta"]
    values = sorted({float(f"{min(max(beta * factor, least), most):.2g}") for factor in (1 / 3, 1.0, 3.0)})
    return f"prefopt sweep beta={','.join(f'{value:g}' for value in values)}"


def config_path(settings: AdviseSettings) -> Path:
    """Where the settings are written, or would be."""
    return settings.write or Path("advice.yaml")
