"""A weight of 0 equals absent: every option at the value that takes it away, on every method and in every case that has it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.cases import WITH_OPTIONS, Case, pairs, thumbs
from tests.methods.made_up import POLICY, Found, MadeUp, found
from tests.training.test_step import demonstrations

from prefopt.methods.pair_method import PairMethod, pair_methods
from prefopt.methods.table import METHODS
from prefopt.trees import Completion, PromptTree

NOTHING: dict[str, float] = {"sft_weight": 0.0, "label_smoothing": 0.0, "ld_alpha": 1.0, "center_weight": 0.0}
"""Options that are absent by default, and the value at which they do nothing. `mix` is one too: all of its losses at 0."""

ELSEWHERE = {
    ("cpo", "sft_weight"): "is there by default: see `OWN_PART`",
    ("robust", "label_smoothing"): "is there by default: see `OWN_PART`",
    ("exo", "label_smoothing"): "must be above 0",
}
"""Options that are another matter for a method."""

NO_AMOUNT = {
    "beta": "0 is refused: nothing would be left of the loss",
    "all_pairs": "on or off; for rankings of two it equals absent, see below",
    "plackett_luce": "on or off; the same",
    "wpo": "on or off",
    "wpo_clamp": "on or off",
    "f_divergence": "which one; reverse-kl is absent",
    "f_alpha": "which one of a family",
    "sft_reduction": "how, not how much",
    "reduction": "how, not how much",
    "likelihood_of": "whose",
    "gamma_beta_ratio": "the same as gamma in another unit",
    "tau": "a width, above 0",
    "unpaired": "on or off",
    "shift_decay": "how long the past counts, above 0",
    "balance": "on or off",
    "margin_from_scores": "on or off; where all scores are the same it equals absent, see below",
}
"""Settings of which there is no 0, or which are no weight, and why."""


def weightless(case: Case) -> dict[str, Any]:
    """Every loss that can be mixed in, at weight 0."""
    has_reference = case.method().needs.reference
    names = [name for name, kind in pair_methods().items() if has_reference or not kind.needs.reference]
    return dict.fromkeys((*names, "sft"), 0.0)


def equal(one: Found, other: Found) -> None:
    torch.testing.assert_close(one.losses_B, other.losses_B, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=1e-12)
    num = min(len(one.gradient), len(other.gradient))  # a loss of a mix may have prompts scored, at weight 0
    torch.testing.assert_close(one.gradient[:num], other.gradient[:num], rtol=1e-12, atol=1e-12)
    assert not bool(one.gradient[num:].any() or other.gradient[num:].any())
    for name, values_B in one.output.metrics.items():
        torch.testing.assert_close(values_B, other.output.metrics[name], rtol=0, atol=0)


def rows() -> dict[str, tuple[Case, str]]:
    table = {}
    for name, case in WITH_OPTIONS.items():
        method = case.method()
        fields = type(method.settings).model_fields
        ranked, single = method.needs.completions == "ranked", method.needs.completions == "thumbs"
        for option in (*NOTHING, "mix"):
            if option not in fields or (case.name, option) in ELSEWHERE:
                continue
            if (option == "ld_alpha" and ranked) or (option == "mix" and single):
                continue  # refused: rankings have no shorter answer, thumbs are no pairs
            table[f"{option} of {name}"] = (case, option)
    return table


ROWS = rows()


@pytest.mark.parametrize(("case", "option"), ROWS.values(), ids=ROWS)
def test_weight_zero_equals_absent(case: Case, option: str):
    # What an option is told by goes with it.
    without = {name: value for name, value in case.settings.items() if name != option and (option, name) != ("sft_weight", "sft_reduction")}
    nothing = weightless(case) if option == "mix" else NOTHING[option]
    absent, at_nothing = replace(case, settings=without), replace(case, settings={**without, option: nothing})
    equal(found(absent, absent.trees(8)), found(at_nothing, at_nothing.trees(8)))


class Nobody(MadeUp):
    """A reference to whom everything is certain."""

    def tokens(self, tree: PromptTree, completion: Completion) -> np.ndarray:
        return np.zeros(completion.num_scored)


OWN_PART: dict[str, tuple[Case, Case, MadeUp | None]] = {
    "cpo without likelihood is dpo without a reference": (
        Case("cpo", {"beta": 0.3, "sft_weight": 0.0}),
        Case("dpo", {"beta": 0.3}),
        Nobody(0),
    ),
    "simpo without a margin is ln-dpo without a reference": (
        Case("simpo", {"beta": 3.0, "gamma": 0.0}),
        Case("ln-dpo", {"beta": 3.0}),
        Nobody(0),
    ),
    "robust without wrong labels is dpo": (Case("robust", {"beta": 0.3, "label_smoothing": 0.0}), Case("dpo", {"beta": 0.3}), None),
    "dpop without a penalty is dpo": (Case("dpop", {"beta": 0.3, "penalty": 0.0}), Case("dpo", {"beta": 0.3}), None),
    "rdpo without a weight of length is dpo": (Case("rdpo", {"beta": 0.3, "length_weight": 0.0}), Case("dpo", {"beta": 0.3}), None),
    "orpo without odds is sft": (Case("orpo", {"odds_weight": 0.0, "likelihood_of": "chosen"}), Case("sft", {}, demonstrations), None),
    "all pairs of two": (Case("dpo", {"sft_weight": 0.3, "all_pairs": True}), Case("dpo", {"sft_weight": 0.3}), None),
    "the order of two": (Case("dpo", {"sft_weight": 0.3, "plackett_luce": True}), Case("dpo", {"sft_weight": 0.3}), None),
    "scores of all pairs of two": (Case("reward", {"center_weight": 0.1, "all_pairs": True}), Case("reward", {"center_weight": 0.1}), None),
    "scores of the order of two": (
        Case("reward", {"center_weight": 0.1, "plackett_luce": True}),
        Case("reward", {"center_weight": 0.1}),
        None,
    ),
}
"""What is left of a method without what is its own: both sides, and the reference of the second, if it is another."""


@pytest.mark.parametrize(("case", "other", "reference"), OWN_PART.values(), ids=OWN_PART)
def test_without_its_own_part_a_method_is_a_known_one(case: Case, other: Case, reference: MadeUp | None):
    one = found(case, case.trees(8))
    two = found(other, other.trees(8), **({} if reference is None else {"reference": reference}))
    torch.testing.assert_close(one.losses_B, two.losses_B, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-12, atol=1e-12)
    if other.name != "sft":  # which reads one answer of two
        torch.testing.assert_close(one.gradient, two.gradient, rtol=1e-12, atol=1e-12)


def test_orpo_without_odds_is_the_likelihood_of_prompts_and_chosen_answers():
    case = Case("orpo", {"odds_weight": 0.0})
    trees = case.trees(6)
    told = [np.concatenate([POLICY.tokens(tree, tree.completions[0]), POLICY.prompt(tree)]) for tree in trees]
    assert all(len(one) == tree.completions[0].num_scored + len(tree.prompt_ids) - 1 for one, tree in zip(told, trees, strict=True))
    weights = [tree.weight for tree in trees]
    summed = sum(weight * one.sum() for weight, one in zip(weights, told, strict=True))
    counted = sum(weight * len(one) for weight, one in zip(weights, told, strict=True))
    assert found(case, trees).loss.item() == pytest.approx(-summed / counted, rel=1e-12)


@pytest.mark.parametrize(("without", "label"), [("desirable_weight", True), ("undesirable_weight", False)])
def test_kto_without_one_kind_leaves_the_other_as_it_was(without: str, label: bool):
    case = Case("kto", {"beta": 0.3}, thumbs)
    trees = case.trees(9)
    base, other = found(case, trees), found(replace(case, settings={"beta": 0.3, without: 0.0}), trees)
    counts = torch.tensor([tree.completions[0].label != label for tree in trees])
    assert 0 < int(counts.sum()) < len(trees)
    torch.testing.assert_close(other.losses_B, base.losses_B * counts, rtol=0, atol=0)


def test_margins_of_equal_scores_are_none():
    def scored(trees: Sequence[PromptTree]) -> list[PromptTree]:
        return [replace(tree, completions=tuple(replace(one, reward=2.5) for one in tree.completions)) for tree in trees]

    case = Case("reward", {"margin_from_scores": True}, lambda num: scored(pairs(num)))
    equal(found(case, case.trees(6)), found(Case("reward", {}), pairs(6)))


def test_every_setting_has_its_nothing_or_a_reason():
    own = {"gamma", "penalty", "length_weight", "odds_weight", "desirable_weight", "undesirable_weight"}
    settings = {name for row in METHODS for name in row.load().settings_class.model_fields}
    assert settings == NOTHING.keys() | {"mix"} | own | NO_AMOUNT.keys()
    for option in NOTHING:
        having = {row.name for row in METHODS if option in row.load().settings_class.model_fields}
        assert {case.name for case, given in ROWS.values() if given == option} == having - {
            name for name, given in ELSEWHERE if given == option
        }
    assert {case.name for case, option in ROWS.values() if option == "mix"} == {
        row.name for row in METHODS if issubclass(row.load(), PairMethod)
    }
