"""What every method must keep, or say why it need not: through the trainer's own step, on a small float64 model.

Every test runs over all of `cases.CASES`. What the table holds of the losses alone, without a model, stands beside it: swapped answers
(`test_swap.py`), weights of 0 (`test_nothing.py`), the ends and narrow numbers (`test_ends.py`).
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.cases import CASES, EVERY, WITH_OPTIONS, Case
from tests.training.test_step import gradients, pairs, trainer

from prefopt.methods.table import METHODS
from prefopt.models.reference import FrozenCopy
from prefopt.training.group.processes import Processes
from prefopt.training.loop import Trainer
from prefopt.trees import Completion, PromptTree


def equal(one: Any, other: Any) -> None:
    """Loss, metrics and sums of two steps."""
    assert one.loss == pytest.approx(other.loss, rel=1e-11)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-8, abs=1e-12)
    assert one.state_sums == pytest.approx(other.state_sums, rel=1e-9)


def same_gradients(one: Trainer, other: Trainer) -> None:
    torch.testing.assert_close(gradients(one), gradients(other), rtol=1e-8, atol=1e-12)


def test_every_method_and_every_setting_is_in_the_table():
    assert {case.name for case in CASES.values()} == {row.name for row in METHODS}
    for row in METHODS:
        tried = {setting for case in WITH_OPTIONS.values() if case.name == row.name for setting in case.settings}
        assert row.load().settings_class.model_fields.keys() == tried, row.name


@EVERY
def test_the_cut_changes_nothing(make_model, case: Case):
    trees = case.trees(8)
    state = case.state(trees)
    whole = trainer(make_model, case.method())
    result, norm = whole.step(trees, 0, state)
    assert norm > 1e-3
    most = max(sum(len(tree.prompt_ids) + len(one.ids) for one in tree.completions) for tree in trees)
    for max_tokens, sharing in ((most, "flat"), (4096, "plain"), (2 * most, "plain"), (4096, "fork"), (2 * most, "fork")):
        cut = trainer(make_model, case.method(), max_tokens=max_tokens, sharing=sharing)
        cut_result, _ = cut.step(trees, 0, state)
        same_gradients(cut, whole)
        equal(cut_result, result)


@EVERY
def test_order_and_weightless_examples_change_nothing(make_model, case: Case):
    trees = case.trees(10)
    state = case.state(trees)
    base, other = trainer(make_model, case.method()), trainer(make_model, case.method())
    result, _ = base.step(trees[:6], 0, state)
    other_result, _ = other.step([*(tree.with_weight(0.0) for tree in trees[6:]), *reversed(trees[:6])], 0, state)
    same_gradients(other, base)
    equal(other_result, result)


@EVERY
def test_weight_counts_like_repetition(make_model, case: Case):
    trees = [tree.with_weight(1.0) for tree in case.trees(5)]
    state = case.state(trees)
    twice, weighted = trainer(make_model, case.method()), trainer(make_model, case.method())
    result, _ = twice.step([trees[0], *trees], 0, state)
    weighted_result, _ = weighted.step([trees[0].with_weight(2.0), *trees[1:]], 0, state)
    same_gradients(weighted, twice)
    equal(weighted_result, result)


@EVERY
def test_processes_change_nothing(make_model, monkeypatch: pytest.MonkeyPatch, case: Case):
    """Each process's share, added up by hand: what `add_up` and the averaging of gradients do."""
    trees = case.trees(7)
    state = case.state(trees)
    whole = trainer(make_model, case.method())
    result, _ = whole.step(trees, 0, state)
    monkeypatch.setattr(Processes, "add_up", lambda self, values: values)
    shares = [trainer(make_model, case.method(), max_tokens=120, processes=Processes(rank, 2, torch.device("cpu"))) for rank in range(2)]
    parts = [share._statistics(trees) for share in shares]
    statistics = {name: sum(part[name] for part in parts) for name in parts[0]}
    monkeypatch.setattr(Trainer, "_statistics", lambda self, trees: statistics)
    results = [share.step(trees, 0, state)[0] for share in shares]
    torch.testing.assert_close(sum(gradients(share) for share in shares) / 2, gradients(whole), rtol=1e-8, atol=1e-12)
    assert sum(part.loss for part in results) == pytest.approx(result.loss, rel=1e-11)
    added = {name: sum(part.state_sums[name] for part in results) for name in result.state_sums}
    assert added == pytest.approx(result.state_sums, rel=1e-9)


@EVERY
def test_evaluation_gives_the_step_s_numbers(make_model, case: Case):
    trees = case.trees(6)
    state = case.state(trees)
    one = trainer(make_model, case.method(), max_tokens=200)
    found = one.evaluate(trees, state)
    assert all(parameter.grad is None for parameter in one.policy.parameters())
    result, _ = one.step(trees, 0, state)
    assert found.figures == pytest.approx({"loss": result.loss, **result.metrics})
    for name in result.metrics.keys() - {"z0"}:
        held = [(value, tree.weight) for value, tree in zip(found.examples[name], trees, strict=True) if not math.isnan(value)]
        assert sum(value * weight for value, weight in held) / sum(weight for _, weight in held) == pytest.approx(result.metrics[name])


@EVERY
def test_unscored_tokens_are_as_if_absent_from_the_loss(make_model, case: Case):
    """A masked token changes what is read after it, so it stands at the end."""
    if case.name == "reward":
        pytest.skip("its score is read at the last token, whether that is scored or not")
    trees = case.trees(5)
    state = case.state(trees)

    def with_tail(tree: PromptTree) -> PromptTree:
        def longer(one: Completion) -> Completion:
            ids = np.concatenate([one.ids, [7, 8, 9]]).astype(np.int32)
            return replace(one, ids=ids, scored=np.arange(len(ids)) < len(one.ids))

        return replace(tree, completions=tuple(map(longer, tree.completions)))

    base, masked = trainer(make_model, case.method()), trainer(make_model, case.method())
    result, _ = base.step(trees, 0, state)
    masked_result, _ = masked.step([with_tail(tree) for tree in trees], 0, state)
    same_gradients(masked, base)
    equal(masked_result, result)


@EVERY
def test_at_the_reference_it_is_finite_and_the_figures_are_zero(make_model, case: Case):
    trees = case.trees(6)
    one = trainer(make_model, case.method())
    same = replace(one, reference=FrozenCopy.of(one.policy)) if one.reference is not None else one
    result, norm = same.step(trees, 0, same.method.state_from(trees))
    assert math.isfinite(result.loss)
    assert math.isfinite(norm)
    if one.reference is not None:
        rewards = {name: value for name, value in result.metrics.items() if name.startswith("rewards/") and name != "rewards/accuracy"}
        assert rewards == pytest.approx(dict.fromkeys(rewards, 0.0), abs=1e-12)
        assert result.metrics["kl"] == pytest.approx(0, abs=1e-12)


WITHOUT_BETA = {"sft": "has no reward", "orpo": "odds_weight scales the reward of its metrics only", "reward": "has none"}


@EVERY
def test_beta_reaches_the_loss_and_the_rewards(make_model, case: Case):
    if case.name in WITHOUT_BETA:
        pytest.skip(WITHOUT_BETA[case.name])
    trees = case.trees(5)
    state = case.state(trees)
    found = [trainer(make_model, case.method(beta=beta)).evaluate(trees, state).figures for beta in (0.2, 0.4)]
    assert found[0]["loss"] != pytest.approx(found[1]["loss"], rel=1e-4)
    reward = "rewards/chosen" if "rewards/chosen" in found[0] else "rewards/desirable"
    assert found[1][reward] == pytest.approx(2 * found[0][reward])


@EVERY
def test_examples_of_weight_zero_only_give_no_gradient(make_model, case: Case):
    trees = [tree.with_weight(0.0) for tree in case.trees(3)]
    one = trainer(make_model, case.method())
    result, norm = one.step(trees, 0, case.state(trees))
    assert (result.loss, norm) == (0.0, 0.0)


@pytest.mark.parametrize(
    "name", sorted({"dpo", "robust", "hinge", "ln-dpo", "ipo", "exo", "discopop", "dpop", "rdpo", "simpo", "cpo", "reward"})
)
def test_swapping_chosen_and_rejected_negates_the_margin(make_model, name: str):
    trees = pairs(5)
    swapped = [replace(tree, completions=tree.completions[::-1]) for tree in trees]
    there, back = (trainer(make_model, Case(name, {}).method()).evaluate(one, {}).figures for one in (trees, swapped))
    assert there["rewards/margin"] == pytest.approx(-back["rewards/margin"])
    assert there["rewards/accuracy"] == pytest.approx(1 - back["rewards/accuracy"])
    assert there["rewards/chosen"] == pytest.approx(back["rewards/rejected"])
