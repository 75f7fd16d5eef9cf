"""The method table: every row loads what it says, and says what the method's file says."""

import subprocess
import sys

import pytest

from prefopt.methods.table import METHODS, MethodRow


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_row_agrees_with_its_module(row: MethodRow):
    method = row.load()
    assert method.name == row.name
    docstring = sys.modules[row.module].__doc__
    assert docstring.split("\n")[0] == row.summary
    for heading in ("loss = ", "When to use it:", "What to watch:", "Deviations"):
        assert heading in docstring


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_declarations_are_complete(row: MethodRow):
    method = row.load()(row.load().settings_class())
    assert method.units
    assert 0 < method.rates.full < method.rates.adapter
    assert method.initial_state() == {}
    assert not method.couples_examples


def test_loading_methods_leaves_torch_alone():
    code = "import sys; from prefopt.methods.table import METHODS; [row.load() for row in METHODS]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
