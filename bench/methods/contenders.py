"""What is compared: each method with the settings among which one is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Contender:
    """A method as it is run.

    Attributes:
        method: its name on the command line.
        trials: the settings among which one is chosen.
        ranked: whether it reads four ranked samples in place of pairs.
    """

    method: str
    trials: tuple[Mapping[str, Any], ...]
    ranked: bool = False


def trials(**settings: float | str | bool | tuple[float, ...]) -> tuple[Mapping[str, Any], ...]:
    """One for each value of the setting that has several, at the learning rate of the quickstart unless it is told."""
    fixed = {"learning_rate": 2e-4} | {name: value for name, value in settings.items() if not isinstance(value, tuple)}
    varied = [(name, value) for name, values in settings.items() if isinstance(values, tuple) for value in values]
    return tuple(fixed | {name: value} for name, value in varied) or (fixed,)


CONTENDERS: dict[str, Contender] = {
    "sft": Contender("sft", trials(learning_rate=(2e-4, 5e-4))),
    "dpo": Contender("dpo", trials(beta=(0.25, 0.5, 1.0))),
    "dpo, smoothed": Contender("dpo", trials(beta=(0.25, 0.5), label_smoothing=0.1)),
    "dpo, sft weight": Contender("dpo", trials(beta=(0.25, 0.5), sft_weight=0.2)),
    "dpo, wpo": Contender("dpo", trials(beta=(0.25, 0.5), wpo=True)),
    "dpo, ld-alpha": Contender("dpo", trials(beta=(0.25, 0.5), ld_alpha=0.5)),
    "dpo, js": Contender("dpo", trials(beta=(0.25, 0.5), f_divergence="js")),
    "dpo, moving reference": Contender("dpo", trials(beta=(0.5, 1.0), sync_reference_every_steps=40)),
    "dpo, plackett-luce": Contender("dpo", trials(beta=(0.25, 0.5), plackett_luce=True), ranked=True),
    "dpo, all pairs": Contender("dpo", trials(beta=(0.25, 0.5), all_pairs=True), ranked=True),
    "ipo": Contender("ipo", trials(beta=(1.0, 2.0, 4.0))),
    "kto": Contender("kto", trials(beta=(0.25, 0.5))),
    "orpo": Contender("orpo", trials(odds_weight=(0.5, 1.0))),
    "simpo": Contender("simpo", trials(beta=(2.5, 10.0))),
    "cpo": Contender("cpo", trials(beta=(0.1, 0.5))),
    "robust": Contender("robust", trials(beta=(0.25, 0.5), label_smoothing=0.1)),
    "hinge": Contender("hinge", trials(beta=(0.25, 0.5))),
    "ln-dpo": Contender("ln-dpo", trials(beta=(5.0, 10.0))),
    "rdpo": Contender("rdpo", trials(beta=(0.25, 0.5))),
    "dpop": Contender("dpop", trials(beta=(0.25, 0.5), penalty=5.0)),
    "exo": Contender("exo", trials(beta=(0.25, 0.5))),
    "nca": Contender("nca", trials(beta=(0.25, 0.5))),
    "bco": Contender("bco", trials(beta=(0.25, 0.5))),
    "sppo": Contender("sppo", trials(beta=(0.05, 0.1))),
    "apo-zero": Contender("apo-zero", trials(beta=(0.25, 0.5))),
    "apo-down": Contender("apo-down", trials(beta=(0.25, 0.5))),
    "discopop": Contender("discopop", trials(beta=(0.25, 0.5))),
}
