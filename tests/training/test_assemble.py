"""The settings of a method's run."""

import pytest
from pydantic import ValidationError, model_validator

from prefopt.config import Setting
from prefopt.errors import ConfigError
from prefopt.methods.method import Method, MethodSettings, Needs
from prefopt.methods.table import METHODS
from prefopt.training.assemble import method_named, own_settings, settings_for
from prefopt.training.settings import RunSettings

RUN = {"model": "m", "data": ["a"], "out": "o"}


class OwnSettings(MethodSettings):
    low: float = Setting(0.0, help="Low.")
    high: float = Setting(1.0, help="High.")

    @model_validator(mode="after")
    def _in_order(self) -> "OwnSettings":
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class Own(Method):
    name = "own"
    settings_class = OwnSettings
    needs = Needs(completions="pair", reference=False)

    def loss(self, *args, **kwargs):
        raise AssertionError


def test_a_run_has_the_fields_of_both():
    kind = settings_for(Own)
    assert issubclass(kind, RunSettings)
    assert set(kind.model_fields) == set(RunSettings.model_fields) | {"low", "high", "pairs_of_ranks"}
    assert own_settings(Own, kind(**RUN, low=0.5)) == OwnSettings(low=0.5)


def test_the_checks_of_both_hold():
    with pytest.raises(ValidationError, match="low must be below high"):
        settings_for(Own)(**RUN, low=2)
    with pytest.raises(ValidationError, match="give lora_rank too"):
        settings_for(Own)(**RUN, lora_alpha=2)


def test_a_method_may_not_take_a_name_of_the_run():
    class Greedy(MethodSettings):
        seed: int = Setting(1, help="Seed.")

    class Clash(Own):
        settings_class = Greedy

    with pytest.raises(TypeError, match="Clash has settings that every run has: seed"):
        settings_for(Clash)


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_row_of_the_table_leads_to_its_method(row):
    assert method_named(row.name).name == row.name


def test_a_name_that_is_no_method_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"dpoo: no such method \(did you mean dpo\?\). Methods: sft, dpo"):
        method_named("dpoo")
