"""Rules applied to facts: what is advised, and the settings that come of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.config import check
from prefopt.methods.method import Method
from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.choices import all_good, batch_size, default, epochs, eval_every, held_out
from prefopt.pipeline.advise.facts import Facts
from prefopt.pipeline.advise.rules import RULES, Rule, row_of
from prefopt.pipeline.advise.settings import AdviseSettings
from prefopt.pipeline.stages import plan_stages
from prefopt.training.assemble import settings_for
from prefopt.training.settings import RunSettings

CARRIED = (
    *("eval_data", "data_format", "columns", "chat_template", "template_args", "text_as", "max_length", "too_long"),
    *("device", "data_workers", "cache_dir"),
)
"""Settings that training needs as they were given."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule that holds.

    Attributes:
        rule: which.
        because: the figures by which it holds.
    """

    rule: Rule
    because: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from the facts.

    Attributes:
        better: what would be best, of methods that prefopt does not have yet.
        method: the row that decides; its method is None where no method will do.
        also: further rows about the method that hold.
        warnings, first, settings: rows of the other topics that hold.
        config: settings for `prefopt train --config`; empty where there is nothing to train.
        reasons: setting -> why it is so.
        sweep: command that compares values of β, where the method has one.
        gpus: how many share the run.
    """

    better: tuple[Verdict, ...]
    method: Verdict
    also: tuple[Verdict, ...]
    first: tuple[Verdict, ...]
    settings: tuple[Verdict, ...]
    warnings: tuple[Verdict, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    sweep: str = ""
    gpus: int = 1

    @property
    def obstacle(self) -> tuple[str, Rule] | None:
        """Why there are no settings, and the rule that says what to do; None: there are some."""
        if self.config:
            return None
        tight = next((each.rule for each in self.warnings if each.rule.sign is signs.is_nothing_fitting), None)
        return ("nothing that could be trained fits", tight) if tight else ("there is nothing to train yet", self.method.rule)


def decide(settings: AdviseSettings, facts: Facts) -> Decision:
    """Every rule is asked; see `rules` for which of them decide.

    Raises:
        ConfigError: settings that were given (columns, max_length, ...) do not go together with what is advised.
    """
    warnings, first, held, settled = (
        tuple(Verdict(rule, because) for rule in rules if (because := rule.sign(facts))) for rules in RULES.values()
    )
    place = next(place for place, verdict in enumerate(held) if verdict.rule.method or not verdict.rule.methods)
    # Without a method for what is judged the good answers beside it are there all the same.
    name = None if facts.kind == "prompts" else held[place].rule.method or ("sft" if facts.beside.sources else None)
    # What is below is of no use where nothing is trained, and DPO's kin where they have been ruled out.
    also = held[place + 1 :] if held[place].rule.method and not signs.needs_shaping(facts) else ()
    decision = Decision(held[:place], held[place], also, first, settled if name else (), warnings)
    return with_config(settings, facts, decision, name) if name and not signs.is_nothing_fitting(facts) else decision


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
    own, reasons = settings_of_method(facts, decision.method, method)
    whole = all_good(facts)
    facts = whole if name == "sft" else facts
    shared = shared_settings(settings, facts)
    for verdict in decision.settings:
        for key, value in verdict.rule.settings(facts).items():
            is_usual = key in RunSettings.model_fields and value == RunSettings.model_fields[key].default
            if not is_usual and key not in settings.model_fields_set:
                (own if key in fields else shared)[key] = value
                reasons[key] = verdict.because
        if verdict.rule.sign in signs.ABOUT_WEIGHTS:
            reasons["lora_rank"] = f"{verdict.rule.then}: {verdict.because}"
    beside, untuned = signs.are_beside(facts), signs.is_untuned(facts)
    stages = ["sft", name] if name != "sft" and (beside or untuned) else [name]
    under: dict[str, dict[str, Any]] = {stage: {**learning_rate(facts, shared, stage)} for stage in stages}
    under[name] = {**own, **under[name]}
    place: dict[str, Any] = {"model": settings.model} if settings.model else {}
    place |= {"data": settings.data, "out": "runs/advised"}
    if len(stages) > 1:
        own_pace = pace(whole, shared)
        under["sft"] = {**under["sft"], **own_pace}
        reasons |= dict.fromkeys((f"sft: {key}" for key in own_pace), f"{whole.per_epoch('good answers')}")
        if beside:
            under[name] = {"data": list(facts.data), **under[name]}
        config = {"stages": stages, **place, **shared, **under}
        reasons["stages"] = "the model had no SFT, as far as can be told" if untuned else beside
    else:
        config = {"method": name, **place, **under[name], **shared}
    check_config(config)
    gpus = facts.model.way.gpus if facts.model is not None and facts.model.way is not None else 1
    can_be_swept = gpus == 1 and len(stages) == 1 and "beta" in own and "eval_every_steps" in shared
    return replace(decision, config=config, reasons=reasons, sweep=sweep_of(method, own["beta"]) if can_be_swept else "", gpus=gpus)


def settings_of_method(facts: Facts, chosen: Verdict, method: type[Method]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the row that decides sets, and the method's β; and the reasons, those of what every run has among them."""
    own: dict[str, Any] = dict(chosen.rule.settings(facts))
    reasons = dict.fromkeys(own, chosen.because)
    if "beta" in method.settings_class.model_fields:
        least, most = method.usual["beta"]
        own = {"beta": method.settings_class.model_fields["beta"].default, **own}
        reasons["beta"] = f"the method's default; usual is {least:g} to {most:g}"
    reasons["learning_rate"] = "usual for the method, for an adapter or all weights, and for a model of this size"
    reasons["epochs"] = "one pass; held-out figures say whether another pays"
    if facts.model is None:
        rates = f"{method.rates.full:g} for all weights, {method.rates.adapter:g} for LoRA"
        reasons["learning_rate"] = f"the run takes {rates}; more below 1e9 weights"
        reasons["lora_rank"] = "the run trains all weights; --model MODEL says whether they fit, or LoRA"
    return own, reasons


def shared_settings(settings: AdviseSettings, facts: Facts) -> dict[str, Any]:
    """What every run has: epochs, what is held out, and what was given."""
    shared: dict[str, Any] = {"epochs": float(epochs(facts))}
    if fraction := held_out(facts):
        shared["eval_fraction"] = fraction
    if fraction or facts.has_eval:
        shared["eval_every_steps"] = eval_every(facts)
    given = {key: getattr(settings, key) for key in CARRIED if key in settings.model_fields_set}
    shared |= {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    return shared | ({"trust_remote_code": True} if settings.trust_remote_code else {})


def pace(facts: Facts, shared: Mapping[str, Any]) -> dict[str, Any]:
    """How long a stage on other data trains, and in which steps, where that differs from what the stages share."""
    own = {"epochs": float(epochs(facts)), "batch_size": batch_size(facts), "eval_every_steps": eval_every(facts)}
    usual = {"batch_size": default("batch_size"), **shared}
    return {name: value for name, value in own.items() if name in usual and value != usual[name]}


def method_of(name: str) -> type[Method]:
    """The method's class."""
    row = row_of(name)
    assert row is not None, name
    return row.load()


def learning_rate(facts: Facts, shared: Mapping[str, Any], name: str) -> dict[str, float]:
    """The method's usual rate for this model; none where there is no model."""
    if facts.model is None:
        return {}
    from prefopt.training.optimizer import usual_learning_rate  # loads torch, which a model has done already

    adapter = bool(shared.get("lora_rank")) or facts.model.is_adapter
    return {"learning_rate": float(f"{usual_learning_rate(method_of(name).rates, facts.model.num_parameters, adapter=adapter):.6g}")}


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
