"""Every architecture, run the way that was proved on it, against its plain Hugging Face forward."""

import re

import pytest
import torch
from tests.models.architectures import ARCHITECTURES, BOUND, LEVELS, PAGE, WINDOW, head_of, measure, page, plain_loss, row, tiny_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_runs_in_the_expected_way(name: str):
    measured = measure(name)
    expected = ARCHITECTURES[name]
    assert (measured.path.sharing, head_of(measured.path)) == (expected.way, expected.head), measured.sentence


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_equals_the_plain_forward(name: str):
    assert measure(name).loss < BOUND


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_of_every_parameter_equals_the_plain_forward(name: str):
    gradients = measure(name).gradients
    assert {parameter: difference for parameter, difference in gradients.items() if not difference < BOUND} == {}


def test_page_lists_these_architectures_and_says_how_they_run():
    text = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\w+) \|[^|]*\|[^|]*\| (< [^|]*?) \| (< [^|]*?) \|", text, re.MULTILINE)
    figures = {name: (loss, gradients) for name, loss, gradients in lines}
    assert list(figures) == list(ARCHITECTURES)
    for loss, gradients in figures.values():
        assert loss in [f"< {bound:.0e}" for bound in LEVELS["loss"]]
        assert gradients in [f"< {bound:.0e}" for bound in LEVELS["gradients"]]
    assert text == page([row(name, *figures[name]) for name in ARCHITECTURES])


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if "sliding window" in architecture.remark])
def test_rows_are_long_enough_for_the_window_to_matter(name: str):
    with torch.no_grad():
        near, far = (plain_loss(tiny_model(name, sliding_window=window)).item() for window in (WINDOW, 2 * WINDOW))
    assert abs(near - far) > 1e-4
