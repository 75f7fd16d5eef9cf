"""Words of a command line as values, before they are checked."""

from typing import Any

import pytest

from prefopt.cli.flags import Panel, parse
from prefopt.config import Setting, Settings


class Example(Settings):
    model: str | None = Setting(None, help="The model.")
    data: list[str] = Setting([], help="Files.")
    learning_rate: float | None = Setting(None, help="Rate.")
    resume: bool = Setting(False, help="Go on.")
    columns: dict[str, str] = Setting({}, help="Columns.")
    template_args: dict[str, Any] = Setting({}, help="Arguments.")


PANELS = [Panel("Settings", Example.model_fields)]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--model m", {"model": "m"}),
        ("--model=m", {"model": "m"}),
        ("--model=-m", {"model": "-m"}),
        ("--model=a=b", {"model": "a=b"}),
        ("--data a b c", {"data": ["a", "b", "c"]}),
        ("--data a --model m --data b", {"data": ["a", "b"], "model": "m"}),
        ("--data -", {"data": ["-"]}),
        ("--data=- --data x", {"data": ["-", "x"]}),
        ("--learning-rate -1e-6", {"learning_rate": "-1e-6"}),
        ("--learning-rate 5e-7", {"learning_rate": "5e-7"}),
        ("--resume", {"resume": True}),
        ("--resume --model m", {"resume": True, "model": "m"}),
        ("--resume off", {"resume": "off"}),
        ("--resume=on", {"resume": "on"}),
        ("--columns chosen=best rejected=worst", {"columns": {"chosen": "best", "rejected": "worst"}}),
        ("--columns.chosen best --columns.rejected=worst", {"columns": {"chosen": "best", "rejected": "worst"}}),
        ("--columns chosen=a=b", {"columns": {"chosen": "a=b"}}),
        ("--columns n=3", {"columns": {"n": "3"}}),
        ("--template-args think=false n=3 who=me", {"template_args": {"think": False, "n": 3, "who": "me"}}),
        ("", {}),
    ],
)
def test_words_give_values(words: str, values: dict[str, Any]):
    given = parse(words.split(), PANELS)
    assert given.values == values
    assert given.mistakes == {}


@pytest.mark.parametrize(
    ("words", "mistakes"),
    [
        ("--modle m", {"--modle": "no such flag (did you mean --model?)"}),
        ("--learning_rate 3", {"--learning_rate": "no such flag (did you mean --learning-rate?)"}),
        ("--zzz a b --resume", {"--zzz": "no such flag"}),
        ("--model.x y", {"--model.x": "no such flag (did you mean --model?)"}),
        ("-m x", {"-m": "no such flag"}),
        ("--model", {"model": "needs a value (The model.)"}),
        ("--model --resume", {"model": "needs a value (The model.)"}),
        ("--data --resume", {"data": "needs a value (Files.)"}),
        ("--model a --model b", {"model": "takes one value (given: a b)"}),
        ("--columns chosen", {"columns": "takes pairs written name=value (given: chosen)"}),
        ("--columns =best", {"columns": "takes pairs written name=value (given: =best)"}),
        ("--columns chosen=a chosen=b", {"columns": "gives chosen twice"}),
        ("--columns.chosen a --columns.chosen b", {"columns": "gives chosen twice"}),
        ("--template-args a=[1", {"template_args": "the value of a is not YAML (given: [1)"}),
        ("--model a stray", {"stray": "belongs to no flag"}),
        ("stray --model a", {"stray": "belongs to no flag"}),
        ("--model --modle x", {"model": "needs a value (The model.)", "--modle": "no such flag (did you mean --model?)"}),
    ],
)
def test_what_is_wrong_with_the_words(words: str, mistakes: dict[str, str]):
    assert parse(words.split(), PANELS).mistakes == mistakes


def test_words_may_stand_alone_where_a_setting_takes_them():
    given = parse(["a.jsonl", "--model", "m", "b.jsonl", "-"], PANELS, positional="data")
    assert given.values == {"data": ["a.jsonl", "b.jsonl", "-"], "model": "m"}
    assert given.mistakes == {}


def test_flags_replace_keys_of_a_file_and_keep_their_spelling():
    given = parse(["--model", "m"], PANELS).over({"model": "other", "data": ["x"]}, "run.yaml")
    assert given.values == {"model": "m", "data": ["x"]}
    assert given.source == "run.yaml and the command line"
    assert given.spelled["model"] == "--model"
    assert "data" not in given.spelled  # a mistake in it is named as the file writes it
