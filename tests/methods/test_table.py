"""The method table: every row loads what it says, and says what the method's file says."""

import re
import subprocess
import sys

import pytest

from prefopt.methods.method import Method
from prefopt.methods.pair_method import PairMethod, PairSettings
from prefopt.methods.table import ALSO_CALLED, METHODS, MethodRow
from prefopt.training.assemble import method_named, settings_for

ROWS = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)


@ROWS
def test_row_agrees_with_its_module(row: MethodRow):
    method = row.load()
    assert method.name == row.name
    assert row.module == f"prefopt.methods.{row.name.replace('-', '_')}"
    docstring = sys.modules[row.module].__doc__
    assert docstring.split("\n")[0] == row.summary
    for heading in ("loss = ", "When to use it:", "What to watch:", "Deviations"):
        assert heading in docstring
    assert not method.paper or f"arXiv {method.paper}" in docstring
    assert bool(method.paper) == (row.name != "sft")


@ROWS
def test_declarations_are_complete(row: MethodRow):
    method = row.load()(row.load().settings_class())
    assert method.units
    assert 0 < method.rates.full < method.rates.adapter
    assert method.couples_examples == (row.name == "kto")
    assert bool(method.initial_state()) == (row.name in ("kto", "bco"))
    assert method.needs == row.load().needs
    if isinstance(method, PairMethod):
        assert isinstance(method.settings, PairSettings)
        assert type(method.settings).has_reference == method.needs.reference


@ROWS
def test_usual_ranges_are_of_settings_that_there_are_and_hold_their_defaults(row: MethodRow):
    method = row.load()
    fields = method.settings_class.model_fields
    assert method.usual or not fields
    for name, (least, most) in method.usual.items():
        default = fields[name].default
        assert default is None or least <= default <= most


@ROWS
def test_settings_can_be_put_together(row: MethodRow):
    fields = settings_for(row.load()).model_fields
    assert all(info.description and info.description.endswith((".", ")")) for info in fields.values())
    assert ("reference" in fields) == row.load().needs.reference


def test_names_are_those_of_the_command_line():
    assert len({row.name for row in METHODS}) == len(METHODS)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)?", row.name) for row in METHODS)
    assert {"sft", "dpo", "ipo", "hinge", "robust", "kto", "orpo", "simpo", "cpo", "dpop", "rdpo", "ln-dpo", "exo", "nca", "bco"} <= {
        row.name for row in METHODS
    }
    assert {"sppo", "apo-zero", "apo-down", "discopop"} <= {row.name for row in METHODS}


def test_other_names_are_those_of_settings_and_methods_that_there_are():
    for name, here in ALSO_CALLED.items():
        method, _, setting = here.partition(" with ")
        assert name not in {row.name for row in METHODS}
        assert not setting or setting in settings_for(method_named(method)).model_fields


def test_loading_methods_leaves_torch_alone():
    code = "import sys; from prefopt.methods.table import METHODS; [row.load() for row in METHODS]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_method_is_abstract_until_it_has_a_loss():
    with pytest.raises(TypeError, match="abstract"):
        Method(None)  # type: ignore[abstract]
