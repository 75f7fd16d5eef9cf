"""Command lines as nobody should write them: done, or a sentence about what to mend, never a traceback.

No run starts here: what would be trained is refused where training would begin.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo
from tests.command_line import prefopt, refused, scratch
from tests.data.broken import NUMBERS, ODD, TEXTS, json_values

from prefopt.cli.flags import Panel, parse
from prefopt.config import Settings, to_yaml
from prefopt.errors import ConfigError
from prefopt.methods.table import METHODS
from prefopt.training.assemble import settings_for
from prefopt.training.settings import RunSettings

KINDS = {row.name: settings_for(row.load()) for row in METHODS}
REQUIRED = {"model": "/no/such/model", "data": ["/no/such.jsonl"], "out": "/no/such/out"}


@pytest.fixture(autouse=True)
def no_run_starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been trained; settings that are right reach a model that is not there, as in life."""
    runs: list[Any] = []

    def train(method: str, settings: RunSettings, **_: Any) -> None:
        runs.append((method, settings))
        raise ConfigError(f"no folder {settings.model!r}")

    for name in ("prefopt.training.run", "prefopt.pipeline.quickstart", "prefopt.pipeline.new"):
        module = ModuleType(name)
        vars(module).update(train=train, quickstart=lambda *_: None, new_model=lambda *_: None)
        monkeypatch.setitem(sys.modules, name, module)
    return runs


def flags_of(kind: type[Settings]) -> list[str]:
    return ["--" + name.replace("_", "-") for name in kind.model_fields]


FLAGS = sorted({flag for kind in KINDS.values() for flag in flags_of(kind)} | {"--config"})
# fmt: off
WORDS = [
    "--help", "-h", "--version", "--", "-", "---", "--=", "-x", "--no-resume", "--Model", "--batch_size", "—model", "--columns.chosen",
    "--beta=", "=x", "train", "dpo", "sft", "data", "methods", "new", "quickstart", "model", "x.jsonl", "/no/such", "a=b", "=",
    "--template-args.a",
]
# fmt: on
words = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(FLAGS),
    st.sampled_from([*WORDS, *ODD]),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.sampled_from([*ODD, *WORDS])),
    st.sampled_from([text for text in TEXTS if "\0" not in text]),
)
beginnings = st.sampled_from(
    [(), ("train",), ("train", "dpo"), ("train", "dpo"), ("train", "sft"), ("train", "none"), ("data",), ("new",), ("methods",), ("bogus",)]
)


@settings(max_examples=200)
@given(beginning=beginnings, more=st.lists(words, max_size=6))
def test_any_command_line_is_done_or_told_what_to_mend(beginning: tuple[str, ...], more: list[str]):
    said = prefopt(*beginning, *more).check()
    assert "bug in prefopt" not in said.err


@settings(max_examples=40)
@given(more=st.lists(words, max_size=6))
def test_every_unknown_flag_is_named(more: list[str]):
    said = prefopt("train", "dpo", *more, "--bogus-flag", "x").check()
    if not {"-h", "--help", "--version"} & set(more) and not any(word.startswith("--config") for word in more):
        assert "--bogus-flag: no such flag" in said.err


@settings(max_examples=500)
@given(given=st.lists(words, max_size=10))
def test_no_word_of_a_command_line_gets_lost(given: list[str]):
    found = parse(given, [Panel("all", fields_of(KINDS["dpo"]))])
    told = repr((found.values, found.mistakes))
    for word in given:
        value = word.partition("=")[2] if word.startswith("-") else word
        if value in WORDS and value.isalnum():
            named = any(said in what for what in found.mistakes.values() for said in ("no such flag", "written name=value", " twice"))
            assert value in told or named


def fields_of(kind: type[Settings]) -> Mapping[str, FieldInfo]:
    return kind.model_fields


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["model"], "'model': belongs to no flag"),
        ([""], "'': belongs to no flag"),
        (["--cache-dir="], "--cache-dir: must not be empty"),
        (["--seed", "010", "--seed", "1"], "--seed: takes one value (given: 010 1)"),
        (["--batch-size", "true"], "--batch-size: must be a whole number (given: true)"),
        (["--template-args", "a=!!python/name:os.system"], "--template-args: the value of a is not YAML"),
        (["--template-args", "a=" + "[" * 1000], "--template-args: the value of a is not YAML"),
        (["--template-args", "a=.nan"], "--template-args: a must be text, a finite number"),
        (["--template-args", "chat_template=x"], "--template-args: chat_template cannot be given to a template"),
        (["--stages", "sft"], "--stages: no such flag"),
    ],
)
def test_words_that_are_easily_mistaken_are_told_as_they_stand(more: list[str], says: str):
    required = [word for name, value in REQUIRED.items() for word in ("--" + name, *([value] if isinstance(value, str) else value))]
    assert says in refused("train", "dpo", *more, *required)


def test_numbers_mean_the_same_in_a_file_and_on_the_command_line(tmp_path: Path, no_run_starts: list[Any]):
    path = tmp_path / "run.yaml"
    for text in ("010", "1_000", "7", "1e3", "0.25", "5e-7"):
        path.write_text(to_yaml(REQUIRED) + f"learning_rate: {text}\n")
        refused("train", "dpo", "--config", str(path))
        refused("train", "dpo", "--learning-rate", text, "--model", "m", "--data", "d", "--out", "o")
    rates = [settings.learning_rate for _, settings in no_run_starts]
    assert rates[::2] == rates[1::2] == [10.0, 1000.0, 7.0, 1000.0, 0.25, 5e-7]


stage_values = st.one_of(st.none(), st.sampled_from([*ODD, *TEXTS, *NUMBERS]), json_values)


@settings(max_examples=120)
@given(data=st.data())
def test_any_file_of_stages_is_planned_or_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    names = ["stages", "method", "sft", "dpo", "model", "data", "out", "beta", "seed", "bogus", "lora_rank"]
    stage = st.dictionaries(
        st.sampled_from(["beta", "seed", "data", "model", "batch-size", "batch_size", "lora_rank", 1]), stage_values, max_size=3
    )
    held = {"model": "/no/such", "out": "/no/such/out", "data": "x.jsonl", "stages": ["sft", "dpo"]}
    held |= data.draw(st.dictionaries(st.sampled_from(names), st.one_of(stage_values, stage, st.just(["sft"])), max_size=4))
    path = scratch(tmp_path_factory) / "stages.yaml"
    path.write_bytes(json.dumps(held, default=str).encode(errors="replace"))
    prefopt("train", "--config", str(path)).check()


def test_names_that_are_no_text_are_told(tmp_path: Path):
    path = tmp_path / "run.yaml"
    top = "model: m\nout: o\nstages: [sft]\ndata: x\n"
    for text, says in (
        ("1: 2\n", "one of its names is 1"),
        ("null: 2\n", "one of its names is None"),
        ("sft: {1: 2}\n", "sft in"),
        ("sft: {on: 2}\n", "one of its names is true"),
        ("2024-01-01: 3\n", "2024_01_01: no such setting"),
    ):
        path.write_text(top + text)
        assert says in refused("train", "--config", str(path))
