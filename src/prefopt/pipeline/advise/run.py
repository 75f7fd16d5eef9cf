"""The walk: look at the data, ask the model, decide, and say it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefopt.pipeline.advise.decide import Decision, config_path, decide
from prefopt.pipeline.advise.facts import Facts
from prefopt.pipeline.advise.look import look
from prefopt.pipeline.advise.page import commands, page, write
from prefopt.pipeline.advise.settings import AdviseSettings


@dataclass(frozen=True, slots=True)
class Advice:
    """What was found, and what follows from it.

    Attributes:
        facts: figures.
        decision: the rules that hold, and the settings that come of them.
        lines: both in words.
    """

    facts: Facts
    decision: Decision
    lines: tuple[str, ...]

    @property
    def method(self) -> str | None:
        """The method that is advised; None: no method will do yet."""
        return self.decision.method.rule.method

    @property
    def config(self) -> dict[str, Any]:
        """Settings for `prefopt train --config`; empty where there is nothing to train."""
        return dict(self.decision.config)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"facts": self.facts.to_dict(), "advice": self.decision.to_dict()}


def advise(settings: AdviseSettings, say: Callable[[str], object] = lambda line: None) -> Advice:
    """Look at the data, and at the model if one is given, and say which method, with which settings, and why.

    Args:
        settings: the question.
        say: takes the answer, line by line.

    Raises:
        PrefoptError: the data or the model cannot be read, or the settings cannot be written.
    """
    facts = look(settings)
    if settings.model is not None:
        from prefopt.pipeline.advise.ask import ask  # loads torch

        facts = ask(settings, facts, settings.model)
    decision = decide(settings, facts)
    lines = page(facts, decision)
    lines += commands(decision, config_path(settings), written=settings.write is not None, has_model=settings.model is not None)
    advice = Advice(facts, decision, tuple(lines))
    if settings.write is not None:
        write(settings.write, decision)
    for line in [json.dumps(advice.to_dict(), ensure_ascii=False, indent=1)] if settings.json else lines:
        say(line)
    return advice
