"""What is made of measured blocks."""

import pytest
from bench.versus.figures import Block, loss_difference, quantile, ratio, speed, spread


def block(seconds: float, *, pairs: int = 8, tokens: int = 1000, flops: float = 6e9, rate: float = 1e9) -> Block:
    return Block(seconds, pairs, tokens, flops=flops, reference_flops=flops / 3, rate=rate)


def test_quantiles_lie_between_neighbours():
    assert quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert quantile([0.0, 10.0], 0.1) == 1.0
    assert quantile([7.0], 0.9) == 7.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]).low == 2.0


def test_speed_is_the_median_of_the_blocks():
    found = speed([block(2.0), block(4.0), block(8.0)], reference_per_pair=0.0, computes_reference=False)
    assert found.pairs_per_second == found.whole_pairs_per_second == 2.0
    assert found.tokens_per_second == 250.0
    assert found.share == pytest.approx(6e9 / 4 / 1e9)


def test_the_reference_pass_counts_by_its_share():
    found = speed([block(4.0)], reference_per_pair=0.5, computes_reference=True)
    assert found.pairs_per_second == 2.0
    assert found.whole_pairs_per_second == 8 / (4 + 8 * 0.5)
    assert found.share == pytest.approx((6e9 + 2e9) / 8 / 1e9)


def test_a_warm_cache_is_not_credited_with_the_reference():
    cold, warm = (speed([block(4.0)], reference_per_pair=0.0, computes_reference=credited).share for credited in (True, False))
    assert cold / warm == pytest.approx(4 / 3)


def test_a_ratio_compares_neighbouring_blocks():
    """The machine became twice as slow: each pair of neighbours still says 3."""
    found = ratio([block(3.0), block(6.0)], [block(1.0), block(2.0)])
    assert (found.median, found.low, found.high) == (3.0, 3.0, 3.0)


def test_a_ratio_is_per_token():
    assert ratio([block(3.0, tokens=3000)], [block(1.0, tokens=1000)]).median == pytest.approx(1.0)


def test_a_ratio_with_reference_adds_each_ones_own():
    found = ratio([block(8.0)], [block(1.0)], reference_per_pair=0.0, base_reference_per_pair=0.125)
    assert found.median == pytest.approx(8 / 2)


def test_losses_are_compared_step_by_step():
    found = loss_difference([0.7, 0.5, 0.4], [0.6, 0.5, 0.1])
    assert found["first"] == pytest.approx(0.1)
    assert found["largest"] == pytest.approx(0.3)
    assert (found["at_step"], found["steps"]) == (3, 3)
    assert loss_difference([], [0.1])["largest"] is None
