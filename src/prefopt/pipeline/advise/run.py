"""The walk: look at the data, ask the model, decide, and say it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.pipeline.advise.decide import Decision, decide
from prefopt.pipeline.advise.facts import Facts
from prefopt.pipeline.advise.look import look
from prefopt.pipeline.advise.page import WIDTH, commands, page, write
from prefopt.pipeline.advise.settings import AdviseSettings


@dataclass(frozen=True, slots=True)
class Advice:
    """What was found, and what follows from it.

    Attributes:
        settings: the question.
        facts: figures.
        decision: the rules that hold, and the settings that come of them.
    """

    settings: AdviseSettings
    facts: Facts
    decision: Decision

    @property
    def method(self) -> str | None:
        """The method that is advised; None: no method will do yet."""
        return self.decision.method.rule.method

    @property
    def config(self) -> dict[str, Any]:
        """Settings for `prefopt train --config`; empty where there is nothing to train."""
        return dict(self.decision.config)

    def lines(self, width: int = WIDTH) -> list[str]:
        """All of it in words, in lines of that width; headings are those that are not indented."""
        path, has_model = self.settings.write, self.settings.model is not None
        next_steps = commands(self.decision, path or Path("advice.yaml"), written=path is not None, has_model=has_model)
        return page(self.facts, self.decision, width) + next_steps


def advise(settings: AdviseSettings) -> Advice:
    """Look at the data, and at the model if one is given, and say which method, with which settings, and why.

    Raises:
        PrefoptError: the data or the model cannot be read, or the settings cannot be written.
    """
    facts = look(settings)
    if settings.model is not None:
        from prefopt.pipeline.advise.ask import ask  # loads torch

        facts = ask(settings, facts, settings.model)
    decision = decide(settings, facts)
    if settings.write is not None:
        write(settings.write, decision)
    return Advice(settings, facts, decision)
