"""What is compared: each method, in its forms that people choose between, with the settings among which one is chosen.

Every contender has trials along one axis: what moves it between the SFT model and the reward. For most that is β, at a learning
rate of `FASTER` times the method's own usual one for a model of this size (DPO's is then the quickstart's); for methods whose loss is
mostly a likelihood it is the rate itself, in multiples of the usual one. There are three trials, and more where the best of them was at
an end: the choice is to lie between two others. β of a sum of log-probabilities is an eighth to a half; where the loss reads means, of
answers of about thirty tokens, and where β is a distance to reach, the axis asks for log-ratios of the same size.

Left out: `robust`, `kto` and the others with every option that they share with DPO (`sft_weight`, `wpo`, ...), because an option does
there what it does here; a reference that is another model, LoRA and its kin, which are no methods; SFT with `score assistant`, because
reviews have one turn. Data with labels of their own (votes, thumbs of people) are tried in `real.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefopt.methods.method import Completions, Method
from prefopt.training.assemble import method_named
from prefopt.training.optimizer import usual_learning_rate

FASTER = 4.0
"""How much faster than usual all learn whose axis is not the rate. The quickstart's DPO has two epochs for what takes longer at 5e-5."""

PARAMETERS = 2_000_000
"""Of the quickstart's model, about; the usual rate depends on it."""

RATES = (0.25, 1.0, 4.0)
SUMS = (0.125, 0.25, 0.5)
TO_SMALLER_SUMS = (0.06, *SUMS)
TO_SMALL_SUMS = (0.015, 0.03, *TO_SMALLER_SUMS)


@dataclass(frozen=True, slots=True)
class Contender:
    """A method as it is run.

    Attributes:
        method: its name on the command line.
        axis: the setting that the trials vary; `learning_rate` is in multiples of the method's usual one.
        values: of it, rising.
        own: other settings.
    """

    method: str
    axis: str
    values: tuple[float, ...]
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> type[Method]:
        """The method's class."""
        return method_named(self.method)

    @property
    def completions(self) -> Completions:
        """The shape of data that it reads with its settings."""
        kind = self.kind
        of_method = {name: value for name, value in self.own.items() if name in kind.settings_class.model_fields}
        return kind.needs_with(kind.settings_class(**of_method)).completions

    @property
    def scores(self) -> bool:
        """Whether it trains a reward model, which writes nothing."""
        return self.kind.needs.model == "reward"

    def trials(self) -> tuple[dict[str, Any], ...]:
        """The settings of each trial, in the order of the axis."""
        usual = usual_learning_rate(self.kind.rates, PARAMETERS, adapter=False)
        if self.axis == "learning_rate":
            return tuple({"learning_rate": rounded(value * usual), **self.own} for value in self.values)
        return tuple({"learning_rate": rounded(FASTER * usual), **self.own, self.axis: value} for value in self.values)


def rounded(rate: float) -> float:
    """Three digits: 2e-4 rather than 0.00019999999999999998."""
    return float(f"{rate:.3g}")


CONTENDERS: dict[str, Contender] = {
    "sft": Contender("sft", "learning_rate", RATES),
    "dpo": Contender("dpo", "beta", SUMS),
    "dpo, smoothed": Contender("dpo", "beta", TO_SMALLER_SUMS, {"label_smoothing": 0.1}),
    "dpo, sft weight": Contender("dpo", "beta", SUMS, {"sft_weight": 0.2}),
    "dpo, wpo": Contender("dpo", "beta", SUMS, {"wpo": True}),
    "dpo, ld-alpha": Contender("dpo", "beta", TO_SMALLER_SUMS, {"ld_alpha": 0.5}),
    "dpo, js": Contender("dpo", "beta", (0.5, 1.0, 2.0, 4.0), {"f_divergence": "js"}),
    "dpo, forward-kl": Contender("dpo", "beta", TO_SMALLER_SUMS, {"f_divergence": "forward-kl"}),
    "dpo, alpha": Contender("dpo", "beta", (*SUMS, 1.0), {"f_divergence": "alpha", "f_alpha": 0.5}),
    # TR-DPO. A reference that comes along holds less, so that the same way takes a larger beta.
    "dpo, moving reference": Contender("dpo", "beta", (*SUMS, 1.0), {"sync_reference_every_steps": 40}),
    "dpo, plackett-luce": Contender("dpo", "beta", (*SUMS, 1.0), {"plackett_luce": True}),
    "dpo, all pairs": Contender("dpo", "beta", (*SUMS, 1.0), {"all_pairs": True}),
    "ipo": Contender("ipo", "beta", (0.25, 0.5, 1.0, 2.0, 4.0)),
    "ipo, sums": Contender("ipo", "beta", (0.03, 0.06, 0.12), {"reduction": "sum"}),
    "ipo + sft": Contender("ipo", "beta", (0.125, 0.25, 0.5, 1.0, 2.0, 4.0), {"mix": {"sft": 0.2}}),
    "kto": Contender("kto", "beta", TO_SMALLER_SUMS),
    "orpo": Contender("orpo", "learning_rate", RATES, {"odds_weight": 1.0}),
    "simpo": Contender("simpo", "learning_rate", (1.0, 2.0, 4.0)),
    "cpo": Contender("cpo", "beta", SUMS),
    "robust": Contender("robust", "beta", SUMS, {"label_smoothing": 0.1}),
    "hinge": Contender("hinge", "beta", SUMS),
    "ln-dpo": Contender("ln-dpo", "beta", (2.0, 4.0, 8.0, 16.0)),
    "rdpo": Contender("rdpo", "beta", SUMS),
    # At 5, which suits answers that differ in few words, it hardly moves here.
    "dpop": Contender("dpop", "penalty", (0.005, 0.02, 0.1, 0.5, 2.5), {"beta": 0.25}),
    "exo": Contender("exo", "beta", (*SUMS, 1.0)),
    "nca": Contender("nca", "beta", (0.00375, 0.0075, 0.015, 0.03, 0.06, 0.125)),
    "bco": Contender("bco", "beta", TO_SMALL_SUMS),
    "bco, thumbs": Contender("bco", "beta", TO_SMALL_SUMS, {"unpaired": True}),
    "sppo": Contender("sppo", "beta", (0.0015, 0.003, 0.006, 0.0125, 0.025, 0.05)),
    "apo-zero": Contender("apo-zero", "beta", (0.03, *TO_SMALLER_SUMS)),
    "apo-down": Contender("apo-down", "learning_rate", (0.125, *RATES)),
    "discopop": Contender("discopop", "beta", (0.25, 0.5, 1.0, 2.0)),
    "reward": Contender("reward", "learning_rate", RATES),
}
