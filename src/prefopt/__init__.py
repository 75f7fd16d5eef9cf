"""Preference optimization for language models: every method of the family, on one fast engine.

    prefopt.train("dpo", model="model", data="pairs.jsonl", out="runs/dpo")

`prefopt.losses` holds the methods' losses as pure functions, `prefopt.Policy` the engine around a
model, `prefopt.Scorer` a reward model that scores answers, `prefopt.Callback` the base of code that follows a run. They load torch
when they are first used, so that `import prefopt` and the command line's help do not.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Callback", "Policy", "Scorer", "__version__", "advise", "losses", "score", "sweep", "train"]

if TYPE_CHECKING:
    from pathlib import Path

    from prefopt import losses
    from prefopt.methods.method import Method
    from prefopt.models.policy import Policy
    from prefopt.pipeline.advise.run import Advice
    from prefopt.pipeline.score import Scorer
    from prefopt.pipeline.sweep.run import SweepResult
    from prefopt.training.record.callbacks import Callback
    from prefopt.training.run import RunResult


def train(method: "str | Method", *, callbacks: "Sequence[Callback]" = (), **settings: Any) -> "RunResult":
    """Train a model with a method; what `prefopt train` does.

    Args:
        method: a method's name, or a `Method` object of your own, which then brings its own settings.
        callbacks: code of your own that follows the run; see `prefopt.Callback`.
        settings: by the names of the command line's flags, with underscores: model, data, out, batch_size, ...

    Returns:
        Where the run and its model lie, and its final figures.

    Raises:
        ConfigError: names every setting that is unknown, missing or wrong.
        PrefoptError: the data, the model or the run cannot be used, and why.
    """
    from prefopt.config import check
    from prefopt.training.assemble import method_named, settings_around, settings_for

    kind = settings_for(method_named(method)) if isinstance(method, str) else settings_around(method.needs)
    checked = check(kind, settings, source="the settings given to prefopt.train")
    from prefopt.training.run import train as run  # after the check: it loads torch, which takes seconds

    return run(method, checked, callbacks=callbacks)


def sweep(method: str, over: "Mapping[str, Sequence[Any]]", *, callbacks: "Sequence[Callback]" = (), **settings: Any) -> "SweepResult":
    """Train with several values of settings, and compare the runs on the same held-out examples; what `prefopt sweep` does.

    Args:
        method: a method's name.
        over: name of a setting -> its values; of several settings, every combination is run.
        callbacks: code of your own that follows every run.
        settings: what all runs share, by the names of `train`; and `max_runs`, the most runs that a sweep may come to.

    Returns:
        Where the sweep and the page about it lie, the figures of its runs, and which is best.

    Raises:
        ConfigError: names every setting that is unknown, missing, wrong or cannot be swept.
        PrefoptError: the data or the model cannot be used, or runs failed, and why.
    """
    # By name: rooms below the pipeline import this module for its version, and must not lead to it.
    plan = import_module("prefopt.pipeline.sweep.plan").plan_sweep(method, over, settings, source="the settings given to prefopt.sweep")
    run = import_module("prefopt.pipeline.sweep.run").run_sweep  # after the check: it loads torch, which takes seconds
    result: SweepResult = run(plan, callbacks=callbacks)
    return result


def score(
    model: "str | Path | Scorer", prompt: "str | Sequence[Mapping[str, str]]", completions: "Sequence[str | Sequence[Mapping[str, str]]]"
) -> list[float]:
    """A reward model's scores of answers to a prompt, rendered as its run rendered them.

    Args:
        model: folder of a run, of a model or of an adapter, or a hub name, which is read each time; or `prefopt.Scorer.load(name)`, once.
        prompt: text, or the turns of a chat, each with `role` and `content`.
        completions: answers to it.

    Returns:
        One score each: higher is better, and only differences between answers to the same prompt mean something.

    Raises:
        ModelError: it cannot be found or read, or is no reward model.
        DataError: an answer is empty or does not fit, a turn is not as chats are, or there is no list of answers.
    """
    found: list[float] = import_module("prefopt.pipeline.score").score(model, prompt, completions)
    return found


def advise(data: "str | Sequence[str]", *, model: str | None = None, **settings: Any) -> "Advice":
    """Look at data, and at a model if one is given, and say which method, with which settings, and why; what `prefopt advise` does.

    Args:
        data: files, folders or hub names.
        model: folder or hub name of the model to train.
        settings: by the names of the command line's flags, with underscores: have, eval_data, columns, memory, write, ...

    Returns:
        What was found, the rules that hold, and settings for `train`.

    Raises:
        ConfigError: names every setting that is unknown or wrong.
        PrefoptError: the data or the model cannot be read, and why.
    """
    from prefopt.config import check

    given = {"data": data, **({} if model is None else {"model": model}), **settings}
    kind = import_module("prefopt.pipeline.advise.settings").AdviseSettings
    checked = check(kind, given, source="the settings given to prefopt.advise")
    found: Advice = import_module("prefopt.pipeline.advise.run").advise(checked)
    return found


def __getattr__(name: str) -> Any:
    if name == "Scorer":
        return import_module("prefopt.pipeline.score").Scorer
    if name == "losses":
        return import_module("prefopt.losses")
    if name == "Policy":
        return import_module("prefopt.models.policy").Policy
    if name == "Callback":
        return import_module("prefopt.training.record.callbacks").Callback
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
