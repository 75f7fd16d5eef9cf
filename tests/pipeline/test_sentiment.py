"""Labels through Bradley–Terry, and what cannot be a pair."""

import math

import pytest

from prefopt.pipeline.sentiment import Sample, label, preference, reward_of
from prefopt.trees import token_ids

PRAISED, BLAMED, NEITHER = " is superb.", " is dull.", " is slow."


def written(text: str, *, ended: bool = True) -> Sample:
    return Sample("The film about a sailor", token_ids([1]), token_ids([2, 3]), text, ended)


def test_preference_by_hand() -> None:
    assert preference(0.9, 0.6, scale=10) == pytest.approx(1 / (1 + math.exp(-3)))
    assert preference(0.6, 0.9, scale=10) == pytest.approx(1 / (1 + math.exp(3)))
    assert preference(0.4, 0.4, scale=10) == 0.5


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_labels_follow_bradley_terry(scale: float) -> None:
    # Rewards σ(1) and ½: the more favourable one wins with probability σ(scale · (σ(1) − ½)), whichever comes first.
    expected = 1 / (1 + math.exp(-scale * (1 / (1 + math.exp(-1)) - 0.5)))
    error = math.sqrt(expected * (1 - expected) / 5000)
    for order in ((PRAISED, NEITHER), (NEITHER, PRAISED)):
        pairs = label([tuple(map(written, order))] * 5000, scale=scale, seed=0).pairs
        assert len(pairs) == 5000
        frequency = sum(pair.chosen.text == PRAISED for pair in pairs) / 5000
        assert abs(frequency - expected) < 4 * error


def test_labels_are_right_as_often_as_said() -> None:
    labelled = label([(written(PRAISED), written(BLAMED))] * 1000, scale=1.0, seed=1)
    assert labelled.labels_right == sum(pair.chosen.text == PRAISED for pair in labelled.pairs) / 1000


def test_the_seed_fixes_the_labels() -> None:
    samples = [(written(PRAISED), written(BLAMED))] * 50
    first, again, other = ([pair.chosen.text for pair in label(samples, scale=1, seed=seed).pairs] for seed in (0, 0, 1))
    assert first == again != other


def test_what_cannot_be_a_pair_is_counted() -> None:
    labelled = label(
        [
            (written(PRAISED), written(BLAMED)),
            (written(PRAISED, ended=False), written(BLAMED)),
            (written(PRAISED), written(" \n")),
            (written(PRAISED), written(PRAISED)),
            (written(NEITHER), written(" is loud.")),
        ],
        scale=10,
        seed=0,
    )
    assert len(labelled.pairs) == 1
    assert labelled.dropped == {"unfinished or blank": 2, "twice the same text": 1, "the same true reward": 1}


def test_mean_reward_and_its_error() -> None:
    # Rewards σ(1), ½, σ(−1): mean ½; s = σ(1) − ½; error s/√3
    mean, error = reward_of([written(PRAISED), written(NEITHER), written(BLAMED)])
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx((1 / (1 + math.exp(-1)) - 0.5) / math.sqrt(3))
