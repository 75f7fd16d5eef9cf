"""The walk: look at the data, ask the model, decide, and say it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.pipeline.advise.decide import Decision, decide
from prefopt.pipeline.advise.facts import Facts
from prefopt.pipeline.advise.look import look
from prefopt.pipeline.advise.page import WIDTH, check_place, commands, page, write
from prefopt.pipeline.advise.settings import AdviseSettings


@dataclass(frozen=True, slots=True)
class Advice:
    """What was found, and what follows from it.

    Attributes:
        settings: the question.
        facts: figures.
        decision: the rules that hold, and the settings that come of them.
        is_written: whether the settings are in the file that was named for them.
    """

    settings: AdviseSettings
    facts: Facts
    decision: Decision
    is_written: bool = False

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
        next_steps = commands(self.decision, path or Path("advice.yaml"), written=self.is_written, has_model=has_model)
        return page(self.facts, self.decision, width) + next_steps

    def write(self) -> "Advice":
        """Write the settings to the file that was named for them, if any was, and note that they are there.

        Raises:
            PrefoptError: it cannot be written, or there are none.
        """
        if self.settings.write is None:
            return self
        write(self.settings.write, self.decision)
        return replace(self, is_written=True)


def advise(settings: AdviseSettings) -> Advice:
    """Look at the data, and at the model if one is given, and say which method, with which settings, and why.

    Raises:
        PrefoptError: the data or the model cannot be read, or the settings cannot be written.
    """
    return find(settings).write()


def find(settings: AdviseSettings) -> Advice:
    """The advice, with nothing written yet: who prints it does so whether or not its settings can be written.

    Raises:
        PrefoptError: the data or the model cannot be read, or the file that was named has no place.
    """
    if settings.write is not None:
        check_place(settings.write)  # before all that takes long
    facts = look(settings)
    if settings.model is not None:
        from prefopt.pipeline.advise.ask import ask  # loads torch

        facts = ask(settings, facts, settings.model)
    return Advice(settings, facts, decide(settings, facts))
