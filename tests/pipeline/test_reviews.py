"""The known reward by hand, and the generator's balance."""

import math
import random
from statistics import mean

import pytest

from prefopt.pipeline.reviews import ASPECTS, BLAME, NEUTRAL, PRAISE, REMARKS, count, prompts, true_reward, write_reviews


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0),
        ("The film about a sailor is slow.", 0),
        ("The film about a sailor is superb.", 1),
        (" is dull. The plot is thin and the ending is perfect. I left early.", 1 - 3),
        (" is SUPERB, superb and Superb.", 3),
        (" is superbly thinner than a dullard", 0),  # whole words only
        (" is freshfresh and not praised", 0),
        (" I loved every minute. I want my money\nback.", 1),  # a phrase counts only as it is written
    ],
)
def test_reward_is_the_logistic_of_praise_minus_blame(text: str, score: int) -> None:
    assert true_reward(text) == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-12)


def test_every_phrase_counts_once_for_its_side_alone() -> None:
    for phrases, expected in [
        (PRAISE + REMARKS["praise"], (1, 0)),
        (BLAME + REMARKS["blame"], (0, 1)),
        (NEUTRAL + REMARKS["neutral"] + ASPECTS + tuple(prompts()), (0, 0)),
    ]:
        for phrase in phrases:
            assert (count(phrase, "praise"), count(phrase, "blame")) == expected, phrase


def test_prompts_are_distinct_and_neutral() -> None:
    openings = prompts()
    assert len(openings) == len(set(openings)) > 1000
    assert {true_reward(opening) for opening in openings} == {0.5}
    assert not any(opening.endswith(" ") for opening in openings)


def test_reviews_average_one_half_and_take_both_sides() -> None:
    reviews = write_reviews(random.Random(0).choices(prompts(), k=4000), seed=1)
    rewards = [true_reward(review.prompt + review.completion) for review in reviews]
    # The standard deviation is 0.39, so the standard error of the mean is 0.006.
    assert mean(rewards) == pytest.approx(0.5, abs=0.03)
    assert mean(reward > 0.9 for reward in rewards) > 0.2
    assert mean(reward < 0.1 for reward in rewards) > 0.2


def test_reviews_vary_in_length_and_begin_with_a_space() -> None:
    reviews = write_reviews(prompts()[:500], seed=2)
    lengths = [len(review.completion.split()) for review in reviews]
    assert min(lengths) < 12 < 35 < max(lengths)
    assert all(review.completion.startswith(" is ") and review.completion.endswith(".") for review in reviews)
    assert len({review.completion for review in reviews}) > 490


def test_the_seed_fixes_the_reviews() -> None:
    openings = prompts()[:20]
    assert write_reviews(openings, seed=3) == write_reviews(openings, seed=3)
    assert write_reviews(openings, seed=3) != write_reviews(openings, seed=4)
