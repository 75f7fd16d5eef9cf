"""The methods as the tests of this folder run over them: each with settings that bring its parts into play, and the trees that it reads.

What is missing here is missing in every table of invariants: `test_every_method_and_every_setting_is_in_the_table` says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tests.training.test_step import demonstrations, draw, pairs

from prefopt.methods.method import Method
from prefopt.methods.pair_method import PairMethod
from prefopt.methods.table import METHODS
from prefopt.trees import Completion, PromptTree


def rankings(num: int, seed: int = 0) -> list[PromptTree]:
    """Two to five completions, some of one rank; one tree in which nothing can be compared."""
    rng = np.random.default_rng(seed)
    trees = []
    for place in range(num):
        count = int(rng.integers(2, 6))
        ranks = [0] * count if place == 2 else sorted(rng.integers(0, 3, count).tolist(), key=lambda _: rng.random())
        completions = tuple(Completion(draw(rng, int(rng.integers(1, 9))), rank=rank) for rank in ranks)
        trees.append(PromptTree(draw(rng, int(rng.integers(1, 12))), completions, weight=float(rng.choice([0.5, 1.0, 2.0]))))
    return trees


def thumbs(num: int) -> list[PromptTree]:
    return [
        replace(tree, completions=(replace(tree.completions[0], label=place % 3 != 1),)) for place, tree in enumerate(pairs(num, seed=5))
    ]


def scored_pairs(num: int) -> list[PromptTree]:
    """Pairs whose answers bring scores, the chosen one's higher by 0 to 2."""
    return [
        replace(
            tree, completions=tuple(replace(one, reward=1.0 + reward) for one, reward in zip(tree.completions, (place % 3, 0), strict=True))
        )
        for place, tree in enumerate(pairs(num))
    ]


@dataclass(frozen=True)
class Case:
    """A method with settings, and what it reads."""

    name: str
    settings: dict[str, Any]
    make_trees: Callable[[int], list[PromptTree]] = pairs

    def method(self, **others: Any) -> Method:
        kind = next(row for row in METHODS if row.name == self.name).load()
        return kind(kind.settings_class(**{**self.settings, **others}))

    def trees(self, num: int) -> list[PromptTree]:
        return list(self.method().arrange(self.make_trees(num), seed=1))

    def state(self, trees: list[PromptTree]) -> dict[str, float]:
        """A state in which a run may be, not the one in which all is 0."""
        method = self.method()
        state = method.state_from(trees)
        return {key: value if self.name == "kto" else SEEN_BEFORE[key.rpartition("/")[2]] for key, value in state.items()}


SEEN_BEFORE = {"up_reward": 0.4, "up_weight": 0.7, "down_reward": 1.0, "down_weight": 1.3}
"""What BCO, alone or in a mix, has seen in the steps before."""


CASES = {
    "sft": Case("sft", {}, demonstrations),
    "dpo": Case("dpo", {"beta": 0.3}),
    "cdpo": Case("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    "dpo with sft": Case("dpo", {"beta": 0.3, "sft_weight": 0.4}),
    "dpo with sft of means": Case("dpo", {"beta": 0.3, "sft_weight": 0.4, "sft_reduction": "mean"}),
    "dpo with wpo": Case("dpo", {"beta": 0.3, "wpo": True}),
    "dpo with wpo unclamped": Case("dpo", {"beta": 0.3, "wpo": True, "wpo_clamp": False}),
    "dpo with ld": Case("dpo", {"beta": 0.3, "ld_alpha": 0.3}),
    "dpo with forward kl": Case("dpo", {"beta": 0.3, "f_divergence": "forward-kl"}),
    "dpo with js": Case("dpo", {"beta": 0.3, "f_divergence": "js"}),
    "dpo with alpha": Case("dpo", {"beta": 0.3, "f_divergence": "alpha", "f_alpha": 0.4, "ld_alpha": 0.5}),
    "dpo on orders": Case("dpo", {"beta": 0.3, "plackett_luce": True, "sft_weight": 0.2}, rankings),
    "dpo on all pairs": Case("dpo", {"beta": 0.3, "all_pairs": True, "wpo": True}, rankings),
    "mix": Case(
        "dpo",
        {"mix": {"ipo": {"weight": 0.5, "beta": 0.7}, "bco": 0.3, "simpo": {"weight": 0.2, "wpo": True}, "orpo": 0.6, "sft": 0.1}},
    ),
    "mix on all pairs": Case("hinge", {"all_pairs": True, "mix": {"bco": 1.0, "sft": 0.5}}, rankings),
    "ipo": Case("ipo", {"beta": 0.3}),
    "ipo on all pairs": Case("ipo", {"beta": 0.3, "all_pairs": True, "sft_weight": 0.2, "sft_reduction": "sum"}, rankings),
    "ipo on sums": Case("ipo", {"beta": 0.3, "reduction": "sum"}),
    "kto": Case("kto", {"beta": 0.3, "desirable_weight": 1.5}, thumbs),
    "kto balanced": Case("kto", {"beta": 0.3, "balance": True}, thumbs),
    "orpo": Case("orpo", {"odds_weight": 0.5}),
    "orpo of the answer": Case("orpo", {"odds_weight": 0.5, "likelihood_of": "chosen"}),
    "orpo of means": Case("orpo", {"odds_weight": 0.5, "sft_reduction": "mean"}),
    "simpo": Case("simpo", {"label_smoothing": 0.1}),
    "cpo": Case("cpo", {"beta": 0.3}),
    "cpo of the paper": Case("cpo", {"beta": 0.3, "sft_reduction": "sum"}),
    "robust": Case("robust", {"beta": 0.3}),
    "hinge": Case("hinge", {"beta": 0.3}),
    "ln-dpo": Case("ln-dpo", {"beta": 3.0}),
    "rdpo": Case("rdpo", {"beta": 0.3, "length_weight": 0.1}),
    "dpop": Case("dpop", {"beta": 0.3, "penalty": 3.0}),
    "exo": Case("exo", {"beta": 0.3}),
    "nca": Case("nca", {"beta": 0.3}),
    "bco": Case("bco", {"beta": 0.3, "shift_decay": 0.9}),
    "bco on thumbs": Case("bco", {"beta": 0.3, "unpaired": True}, thumbs),
    "sppo": Case("sppo", {"beta": 0.3}),
    "apo-zero": Case("apo-zero", {"beta": 0.3}),
    "apo-down": Case("apo-down", {"beta": 0.3}),
    "discopop": Case("discopop", {"beta": 0.3}),
    "reward": Case("reward", {"center_weight": 0.05, "label_smoothing": 0.1}),
    "reward with margins": Case("reward", {"margin_from_scores": True}, scored_pairs),
    "reward on all pairs": Case("reward", {"all_pairs": True, "center_weight": 0.05}, rankings),
    "reward on orders": Case("reward", {"plackett_luce": True, "center_weight": 0.05}, rankings),
}
"""Through the trainer, on a model."""

OPTIONS: dict[str, tuple[dict[str, Any], Callable[[int], list[PromptTree]]]] = {
    "with another beta": ({"beta": 0.7}, pairs),
    "with smoothing": ({"label_smoothing": 0.15}, pairs),
    "with sft": ({"sft_weight": 0.4}, pairs),
    "with sft of means": ({"sft_weight": 0.4, "sft_reduction": "mean"}, pairs),
    "with sft of sums": ({"sft_weight": 0.4, "sft_reduction": "sum"}, pairs),
    "with wpo": ({"wpo": True}, pairs),
    "with wpo unclamped": ({"wpo": True, "wpo_clamp": False}, pairs),
    "with ld": ({"ld_alpha": 0.3}, pairs),
    "with ld and no tail": ({"ld_alpha": 0.0}, pairs),
    "with forward kl": ({"f_divergence": "forward-kl"}, pairs),
    "with js": ({"f_divergence": "js"}, pairs),
    "with alpha": ({"f_divergence": "alpha", "f_alpha": 0.6}, pairs),
    "on all pairs": ({"all_pairs": True}, rankings),
    "on all pairs with wpo and sft": ({"all_pairs": True, "wpo": True, "sft_weight": 0.4}, rankings),
    "on orders": ({"plackett_luce": True}, rankings),
    "on orders with forward kl": ({"plackett_luce": True, "f_divergence": "forward-kl"}, rankings),
    "with a mix": ({"mix": {"simpo": 0.5, "cpo": {"weight": 0.2, "wpo": True, "sft_reduction": "sum"}, "sft": 0.3}}, pairs),
    "on sums": ({"reduction": "sum"}, pairs),
    "with gamma": ({"gamma": 0.7}, pairs),
    "with a ratio": ({"gamma_beta_ratio": 0.3}, pairs),
    "with tau": ({"tau": 0.3}, pairs),
    "with a penalty": ({"penalty": 2.0}, pairs),
    "with a length weight": ({"length_weight": 0.2}, pairs),
    "with a decay": ({"shift_decay": 0.5}, pairs),
    "with an odds weight": ({"odds_weight": 0.7}, pairs),
    "with a weight of thumbs down": ({"undesirable_weight": 0.5}, thumbs),
    "centred": ({"center_weight": 0.1}, pairs),
}
"""Settings that are tried on every method that has them."""


def _with_options() -> dict[str, Case]:
    """The table, and every method with every option alone."""
    found = dict(CASES)
    for row in METHODS:
        fields = row.load().settings_class.model_fields.keys()
        for how, (given, trees) in OPTIONS.items():
            if given.keys() <= fields:
                found[f"{row.name} {how}"] = Case(row.name, given, thumbs if row.name == "kto" else trees)
        if issubclass(row.load(), PairMethod):
            found[f"{row.name} in a mix"] = Case("dpo", {"mix": {row.name: {"weight": 0.5}}})
            if "ld_alpha" in fields:
                found[f"{row.name} with ld in a mix"] = Case("dpo", {"mix": {row.name: {"ld_alpha": 0.3, "f_divergence": "js"}}})
    return found


WITH_OPTIONS = _with_options()
"""Without a model, where a case takes milliseconds."""

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EVERY_OPTION = pytest.mark.parametrize("case", WITH_OPTIONS.values(), ids=WITH_OPTIONS)
