"""The data order: a function of seed and step."""

import numpy as np

from prefopt.training.order import DataOrder


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


def test_a_batch_may_be_larger_than_the_data():
    order = DataOrder(num_examples=3, batch_size=8, seed=0, max_steps=2)
    assert len(order.examples(0)) == len(order.examples(1)) == 8
    assert order.num_taken == 16


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
