"""The reward model's own options: margins from the data, centring, rankings; and its numbers worked by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.logps import TokenLogps
from prefopt.errors import DataError
from prefopt.losses import centring_loss, plackett_luce_loss, reward_loss
from prefopt.methods.reward import Reward, RewardSettings
from prefopt.training.assemble import method_named, settings_for
from prefopt.trees import Completion, PromptTree, token_ids


def tree(*rewards: float | None, ranks: tuple[int, ...] | None = None) -> PromptTree:
    places = ranks or tuple(range(len(rewards)))
    completions = [
        Completion(token_ids([5 + place, 6]), rank=rank, reward=reward)
        for place, (rank, reward) in enumerate(zip(places, rewards, strict=True))
    ]
    return PromptTree(token_ids([1, 2, 3]), tuple(completions), row_id="file:1")


def given(batch: TreeBatch, scores: list[float]) -> tuple[TokenLogps, Tensor]:
    """What a reward model gives that scores the completions so, and 100 at every other token."""
    scores_C = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    scalar_T = torch.full((batch.num_tokens,), 100.0, dtype=torch.float64).index_put((batch.last_C,), scores_C)
    empty = torch.zeros(0, dtype=torch.float64)
    return TokenLogps(empty, torch.zeros_like(batch.lengths_C), torch.zeros_like(batch.prompt_lengths_B), 0, scalar_T=scalar_T), scores_C


def loss(trees: list[PromptTree], scores: list[float], **settings: Any) -> tuple[Any, Tensor]:
    batch = pack(trees, sharing="flat")
    logps, scores_C = given(batch, scores)
    return Reward(RewardSettings(**settings)).loss(logps, None, batch, statistics={}, state={}), scores_C


def total(output: Any) -> list[float]:
    return sum(term.weight * term.values_B for term in output.terms).tolist()


def test_scores_are_read_at_the_last_token():
    output, _ = loss([tree(None, None)], [1.5, 0.5])
    assert total(output) == pytest.approx([math.log1p(math.exp(-1.0))])
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 1.5,
            "rewards/rejected": 0.5,
            "rewards/margin": 1.0,
            "rewards/accuracy": 1.0,
            "scores/mean": 1.0,
            "scores/spread": 0.5,
        }
    )


def test_a_margin_is_the_difference_of_the_data_s_scores():
    output, _ = loss([tree(3.0, 1.5), tree(1.0, 1.0)], [2.0, 0.5, 0.3, 0.3], margin_from_scores=True)
    assert total(output) == pytest.approx([math.log(2), math.log(2)])  # 1.5 − 1.5, and 0 − 0
    assert output.metrics["rewards/margin"].tolist() == pytest.approx([1.5, 0.0])


def test_centring_adds_the_square_of_the_sum():
    plain, _ = loss([tree(None, None)], [1.5, -0.5])
    centred, _ = loss([tree(None, None)], [1.5, -0.5], center_weight=0.01)
    assert total(centred)[0] - total(plain)[0] == pytest.approx(0.01 * (1.5 - 0.5) ** 2)
    assert centring_loss(torch.tensor([1.5, -0.5]).mean()).item() == pytest.approx(1.0)


def test_centring_pulls_the_mean_to_zero_and_leaves_differences():
    output, scores_C = loss([tree(None, None)], [1.5, 0.5], center_weight=0.1)
    sum(term.weight * term.values_B.sum() for term in output.terms).backward()
    plain, plain_C = loss([tree(None, None)], [1.5, 0.5])
    plain.terms[0].values_B.sum().backward()
    assert (scores_C.grad - plain_C.grad).tolist() == pytest.approx([0.1 * 2 * 2.0] * 2)


def test_all_pairs_is_the_mean_over_pairs_of_different_rank():
    scores = [2.0, 1.0, -1.0]
    output, _ = loss([tree(None, None, None, ranks=(0, 1, 1))], scores, all_pairs=True)
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-3.0))) / 2
    assert total(output) == pytest.approx([expected])
    assert output.metrics["rewards/chosen"].tolist() == pytest.approx([2.0])
    assert output.metrics["scores/spread"].tolist() == pytest.approx([math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 3)])


def test_an_order_is_drawn_without_replacement():
    scores = [2.0, 1.0, -1.0]
    output, _ = loss([tree(None, None, None)], scores, plackett_luce=True)
    best = math.exp(2) / (math.exp(2) + math.exp(1) + math.exp(-1))
    second = math.exp(1) / (math.exp(1) + math.exp(-1))
    assert total(output) == pytest.approx([-math.log(best * second)])


def test_for_two_answers_an_order_is_a_pair():
    scores = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ranks = torch.tensor([[0, 1]]).expand(20, 2)
    order = plackett_luce_loss(scores, ranks, torch.ones_like(scores, dtype=torch.bool))
    torch.testing.assert_close(order, reward_loss(*scores.unbind(1)))


@pytest.mark.parametrize("settings", [{"all_pairs": True}, {"plackett_luce": True}])
def test_a_ranking_without_an_order_teaches_nothing(settings: dict[str, Any]):
    output, scores_C = loss([tree(None, None, None, ranks=(0, 0, 0))], [1.0, 2.0, 3.0], center_weight=1.0, **settings)
    assert total(output) == [0.0]
    sum(term.values_B.sum() for term in output.terms).backward()
    assert scores_C.grad.tolist() == [0.0, 0.0, 0.0]
    assert not any(bool(mask.any()) for mask in output.only.values())


def test_only_differences_matter():
    one, one_C = loss([tree(None, None)], [0.3, -0.2], label_smoothing=0.1)
    other, other_C = loss([tree(None, None)], [7.3, 6.8], label_smoothing=0.1)
    for output in (one, other):
        output.terms[0].values_B.sum().backward()
    assert total(one) == pytest.approx(total(other))
    assert one_C.grad.tolist() == pytest.approx(other_C.grad.tolist())
    assert one_C.grad.sum().item() == pytest.approx(0.0)


def test_a_margin_needs_scores():
    method = Reward(RewardSettings(margin_from_scores=True))
    assert list(method.arrange([tree(1.0, 0.0)], seed=0))
    with pytest.raises(DataError, match="file:1 brings no score of its answers"):
        method.arrange([tree(1.0, 0.0), tree(1.0, None)], seed=0)
    with pytest.raises(DataError, match="the better answer has the score 0 and the worse one 2"):
        method.arrange([tree(0.0, 2.0)], seed=0)


@pytest.mark.parametrize("other", ["all_pairs", "margin_from_scores"])
def test_an_order_is_no_pair(other: str):
    with pytest.raises(ValidationError, match=f"plackett_luce reads whole rankings, and {other} is about pairs"):
        RewardSettings(plackett_luce=True, **{other: True})


@pytest.mark.parametrize("name", ["reward", "dpo"])
@pytest.mark.parametrize("whole", ["all_pairs", "plackett_luce"])
def test_a_ranking_that_is_read_whole_is_not_cut_into_pairs(name: str, whole: str):
    kind = settings_for(method_named(name))
    with pytest.raises(ValidationError, match=f"pairs_of_ranks says which pairs are made of a ranking, and {whole} reads it whole"):
        kind(model="m", data=["d"], out="o", pairs_of_ranks="best", **{whole: True})
    assert kind(model="m", data=["d"], out="o", **{whole: True}).pairs_of_ranks == "all"


def test_single_answers_are_not_made_into_pairs():
    kind = settings_for(method_named("bco"))
    with pytest.raises(ValidationError, match="pairs_of_ranks says which pairs are made of a ranking, and unpaired reads single answers"):
        kind(model="m", data=["d"], out="o", pairs_of_ranks="best", unpaired=True)
    assert kind(model="m", data=["d"], out="o", unpaired=True).pairs_of_ranks == "all"
    assert kind(model="m", data=["d"], out="o", pairs_of_ranks="best").pairs_of_ranks == "best"


def test_rankings_are_asked_for_only_where_they_are_read():
    assert Reward(RewardSettings()).needs.completions == "pair"
    assert Reward(RewardSettings(all_pairs=True)).needs.completions == "ranked"
    assert Reward(RewardSettings(plackett_luce=True)).needs == replace(Reward.needs, completions="ranked")
    assert Reward.needs.model == "reward"
