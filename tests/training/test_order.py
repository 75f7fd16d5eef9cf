"""The data order: a function of seed and step."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.training.runs import Asks, figures, run

from prefopt.errors import ConfigError
from prefopt.training.order import DataOrder, Mix, _order_of


def test_an_epoch_sees_every_example_once():
    order = DataOrder(num_examples=10, batch_size=4, seed=0)
    assert order.num_steps == 3
    seen = np.concatenate([order.examples(step) for step in range(3)])
    assert sorted(seen) == list(range(10))
    assert [len(order.examples(step)) for step in range(3)] == [4, 4, 2]


def test_batches_straddle_epochs():
    order = DataOrder(num_examples=5, batch_size=4, seed=1, epochs=2)
    stream = np.concatenate([order.examples(step) for step in range(order.num_steps)])
    assert sorted(stream[:5]) == sorted(stream[5:]) == list(range(5))
    assert [order.epoch_after(step) for step in range(3)] == [0.8, 1.6, 2.0]


def test_an_epoch_is_drawn_once_however_many_steps_it_has():
    _order_of.cache_clear()
    order = DataOrder(num_examples=100, batch_size=7, seed=3, epochs=3)
    stream = np.concatenate([order.examples(step) for step in range(order.num_steps)])
    assert len(stream) == order.num_taken_before(order.num_steps) == 300
    assert _order_of.cache_info().misses == 3
    with pytest.raises(ValueError, match="read-only"):
        _order_of(100, 3, 2)[0] = 1


def test_a_batch_may_be_all_of_the_data_and_no_more():
    order = DataOrder(num_examples=3, batch_size=3, seed=0, max_steps=2)
    assert sorted(order.examples(0)) == sorted(order.examples(1)) == [0, 1, 2]
    assert order.num_taken == 6
    with pytest.raises(ValueError, match="a step of 4 examples is more than the 3 that there are"):
        DataOrder(num_examples=3, batch_size=4, seed=0)


def test_fractions_of_an_epoch():
    assert DataOrder(num_examples=100, batch_size=10, seed=0, epochs=0.25).num_taken == 25
    assert DataOrder(num_examples=100, batch_size=10, seed=0, epochs=0.25).num_steps == 3
    assert DataOrder(num_examples=3, batch_size=2, seed=0, epochs=0.01).num_steps == 1


def test_seed_decides():
    first, second, other = (DataOrder(50, 50, seed).examples(0).tolist() for seed in (3, 3, 4))
    assert first == second != other


def test_epochs_differ():
    order = DataOrder(num_examples=50, batch_size=50, seed=0, epochs=2)
    assert order.examples(0).tolist() != order.examples(1).tolist()


def test_epochs_without_end_are_a_number_of_steps():
    assert DataOrder(12, 4, seed=0, epochs=1e308).num_steps == 2**53 // 4


@pytest.mark.parametrize("steps", [{"epochs": 3}, {"max_steps": 3}], ids=["epochs", "steps"])
def test_a_run_takes_no_example_twice_in_a_step(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: dict[str, int]
):
    """A batch of a thousand on twelve pairs: steps of twelve, which is said, to the last digit those of `batch_size` 12."""
    taken: list[list[int]] = []
    examples = DataOrder.examples
    monkeypatch.setattr(DataOrder, "examples", lambda self, step: (found := examples(self, step), taken.append(sorted(found)))[0])
    narrator = Asks(lambda done: None)
    out = tmp_path / "large"
    run("dpo", model_folder(), pairs, out, batch_size=1000, narrator=narrator, **steps)
    assert "batch_size: 12, all examples that there are to train on (the settings say 1000)" in narrator.said
    assert any(line.startswith("dpo: 3 steps of 12, 3 epochs, ") for line in narrator.said)
    assert all(indices == list(range(12)) for indices in taken)
    assert json.loads((out / "manifest.json").read_text())["resolved"]["batch_size"] == 12
    run("dpo", model_folder(), pairs, tmp_path / "all", batch_size=12, **steps)
    assert figures(out) == figures(tmp_path / "all")
    assert len(figures(out)) == 3


def test_no_batch_takes_all_memory(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"batch_size: .*100000"):
        run("dpo", model_folder(), pairs, tmp_path / "run", batch_size=10**12)


def test_a_mix_takes_each_example_as_often_as_it_says_in_every_epoch():
    times = np.array([1.0] * 10 + [0.3] * 20 + [2.5] * 4)
    mix = Mix.of(times)
    assert mix.num_per_epoch == 10 + 6 + 10
    assert mix.times.tolist() == times.tolist()
    order = DataOrder(len(times), 7, seed=5, epochs=4, mix=mix)
    assert order.num_taken == 4 * 26
    taken = np.concatenate([order.examples(step) for step in range(order.num_steps)])
    epochs = taken.reshape(4, 26)
    for epoch in epochs:
        counts = np.bincount(epoch, minlength=len(times))
        assert counts[:10].tolist() == [1] * 10
        assert counts[10:30].max() == 1
        assert counts[10:30].sum() == 6
        assert sorted(counts[30:].tolist()) == [2, 2, 3, 3]
    assert len({tuple(sorted(epoch[(epoch >= 10) & (epoch < 30)])) for epoch in epochs}) > 1  # drawn anew
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order.epoch_after(order.num_steps - 1) == 4


def test_a_mix_depends_on_seed_and_step_alone():
    times = np.array([0.5] * 9 + [1.0] * 3)
    one, same, other = (DataOrder(12, 3, seed=seed, epochs=3, mix=Mix.of(times)) for seed in (1, 1, 2))
    steps = [one.examples(step).tolist() for step in range(one.num_steps)]
    assert [same.examples(step).tolist() for step in reversed(range(same.num_steps))] == steps[::-1]
    assert [other.examples(step).tolist() for step in range(other.num_steps)] != steps


def test_a_mix_of_ones_takes_each_once_and_one_of_almost_nothing_still_one():
    order = DataOrder(6, 6, seed=0, mix=Mix.of(np.ones(6)))
    assert sorted(order.examples(0).tolist()) == list(range(6))
    assert DataOrder(3, 1, seed=0, mix=Mix.of(np.full(3, 0.01))).examples(0).tolist() == [0]
    with pytest.raises(ValueError, match="more than the 2 that there are"):
        DataOrder(4, 3, seed=0, mix=Mix.of(np.full(4, 0.5)))
