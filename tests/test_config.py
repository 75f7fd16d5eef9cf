"""Settings: what is accepted, and that all mistakes are named at once."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import model_validator

from prefopt.config import REQUIRED, Setting, Settings, check, nearest, read_yaml
from prefopt.errors import ConfigError


class Example(Settings):
    model: str = Setting(REQUIRED, help="The model.")
    data: list[str] = Setting([], help="Files.")
    rate: float = Setting(0.1, gt=0, le=1, help="Rate.")
    steps: int | None = Setting(None, ge=1, help="Steps.")
    schedule: Literal["cosine", "linear", "constant"] = Setting("cosine", help="Schedule.")
    cache: bool = Setting(True, help="Cache.")
    columns: dict[str, str] = Setting({}, help="Columns.")
    out: Path = Setting(Path("runs"), help="Out.")

    @model_validator(mode="after")
    def _steps_need_a_rate(self) -> "Example":
        if self.steps == 7 and self.rate == 1:
            raise ValueError("steps and rate do not go together")
        return self


def mistakes(values: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(Example, values, **options)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{len(lines)} mistake{'s' if len(lines) > 1 else ''} in {options.get('source', 'the settings')}:"
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("data", "a.jsonl", ["a.jsonl"]),
        ("data", Path("a.jsonl"), ["a.jsonl"]),
        ("data", ("a", Path("b")), ["a", "b"]),
        ("rate", "5e-7", 5e-7),
        ("steps", "12", 12),
        ("steps", None, None),
        ("cache", "off", False),
        ("cache", "on", True),
        ("cache", "false", False),
        ("out", "x", Path("x")),
        ("model", Path("folder"), "folder"),
    ],
)
def test_values_are_taken_as_text_or_as_they_are(name: str, given: Any, taken: Any):
    assert getattr(check(Example, {"model": "m", name: given}), name) == taken


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("rate", -1, "rate: must be greater than 0 (given: -1)"),
        ("rate", "2", "rate: must be less than or equal to 1 (given: 2)"),
        ("rate", "fast", "rate: must be a number (given: fast)"),
        ("rate", float("nan"), "rate: must be a finite number (given: nan)"),
        ("steps", "1.5", "steps: must be a whole number (given: 1.5)"),
        ("steps", 1.5, "steps: must be a whole number (given: 1.5)"),
        ("steps", "", "steps: must be a whole number (given: '')"),
        ("schedule", "sine", "schedule: must be cosine, linear or constant (given: sine)"),
        ("cache", "maybe", "cache: must be on or off (given: maybe)"),
        ("model", 7, "model: must be text (given: 7)"),
        ("data", ["a", 3], "data.1: must be text (given: 3)"),
        ("columns", "chosen", "columns: must be pairs of a name and a value (given: chosen)"),
        ("columns", {"chosen": 3}, "columns.chosen: must be text (given: 3)"),
        ("schedul", "x", "schedul: no such setting (did you mean schedule?)"),
        ("zzz", "x", "zzz: no such setting"),
    ],
)
def test_a_mistake_says_what_was_given_and_what_is_allowed(name: str, given: Any, line: str):
    assert mistakes({"model": "m", name: given}) == [line]


def test_all_mistakes_come_at_once():
    assert mistakes({"rate": 0, "stepps": 3, "cache": 9}, source="run.yaml") == [
        "model: is required, and was not given (The model.)",
        "rate: must be greater than 0 (given: 0)",
        "cache: must be on or off (given: 9)",
        "stepps: no such setting (did you mean steps?)",
    ]


def test_mistakes_are_spelled_as_the_user_wrote_them():
    given = {"rate": 0, "steps": 0, "columns": {"chosen": 3}}
    assert mistakes(given, spelled={"model": "--model", "rate": "--rate", "columns": "--columns"}) == [
        "--model: is required, and was not given (The model.)",
        "--rate: must be greater than 0 (given: 0)",
        "steps: must be greater than or equal to 1 (given: 0)",
        "--columns.chosen: must be text (given: 3)",
    ]


def test_mistakes_that_the_caller_found_replace_those_of_the_same_setting():
    found = mistakes({"rate": 0}, mistakes={"model": "needs a value"}, spelled={"model": "--model"})
    assert found == ["rate: must be greater than 0 (given: 0)", "--model: needs a value"]


def test_a_mistake_of_the_caller_alone_is_raised_too():
    assert mistakes({"model": "m"}, mistakes={"--bogus": "no such flag"}) == ["--bogus: no such flag"]


def test_settings_at_odds_are_told_in_their_own_words():
    assert mistakes({"model": "m", "steps": 7, "rate": 1}) == ["steps and rate do not go together"]


def test_long_values_are_cut():
    assert len(mistakes({"model": "m", "rate": "x" * 1000})[0]) < 120


def test_settings_do_not_change():
    settings = check(Example, {"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        settings.rate = 0.5  # type: ignore[misc]


def test_nearest_names_only_what_is_near():
    assert nearest("betta", ["beta", "seed"]) == " (did you mean beta?)"
    assert nearest("quux", ["beta", "seed"]) == ""


def yaml_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_yaml_keys_may_be_written_like_flags(tmp_path: Path):
    assert read_yaml(yaml_file(tmp_path, "batch-size: 8\nreference_cache: off\n")) == {"batch_size": 8, "reference_cache": False}


def test_an_empty_file_holds_no_settings(tmp_path: Path):
    assert read_yaml(yaml_file(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "must hold settings as `name: value` lines"),
        ("just text", "holds 'just text'"),
        ("a: [1\n", "is not valid YAML"),
        (b"a: \xff\xfe\n", "is not valid YAML"),
        ("seed: 1\nmodel: m\nseed: 2\n", "seed is given twice"),
        ("dpo:\n  beta: 1\n  beta: 2\n", "beta is given twice"),
        ("batch-size: 1\nbatch_size: 2\n", "gives batch_size twice"),
        ("1: 2\n", "must hold settings"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, text: str | bytes, says: str):
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        read_yaml(yaml_file(tmp_path, text))
    assert says in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*none.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")
