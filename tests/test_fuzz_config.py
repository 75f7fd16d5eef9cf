"""Settings and YAML files as nobody should write them: a sentence each time, never a traceback or a hang."""

import json
import random
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.command_line import refused, scratch
from tests.data.broken import NUMBERS, ODD, TEXTS, deep, json_values

from prefopt.config import MOST_VALUES, Setting, Settings, check, from_yaml, read_yaml, to_yaml
from prefopt.errors import ConfigError, PrefoptError
from prefopt.methods.table import METHODS
from prefopt.training.assemble import settings_for

KINDS = {row.name: settings_for(row.load()) for row in METHODS}
REQUIRED = {"model": "/no/such/model", "data": ["/no/such.jsonl"], "out": "/no/such/out"}

values = st.one_of(
    st.sampled_from([*ODD, *TEXTS, *NUMBERS]),
    st.sampled_from(
        [
            None,
            [],
            {},
            [None],
            [[]],
            ["a", 1],
            {"a": "b"},
            {1: 2},
            {"": ""},
            date(2024, 1, 1),
            b"\xff",
            Path("x"),
            (1,),
            {1},
            object,
            deep(200, 1),
        ]
    ),
    json_values,
)


def plain_names(kind: type[Settings]) -> list[str]:
    return sorted(kind.model_fields)


def said_of(call: Any, *args: Any, **named: Any) -> str | None:
    """What a ConfigError says, None where there is none; it names what it is about, and no terminal is harmed by it."""
    try:
        call(*args, **named)
    except ConfigError as error:
        message = str(error)
    else:
        return None
    assert message
    assert all(char.isprintable() or char == "\n" for char in message), ascii(message)
    return message


# Settings from anything.


@pytest.mark.parametrize("method", KINDS)
@settings(max_examples=500)
@given(data=st.data())
def test_any_mapping_is_settings_or_its_mistakes_are_named(method: str, data: st.DataObject):
    kind = KINDS[method]
    names = st.one_of(
        st.sampled_from(plain_names(kind)), st.sampled_from(["", "bata", "\ud800", "\x1b[0m", "model_fields", "a.b", "__class__"])
    )
    drawn = data.draw(st.dictionaries(names, values, min_size=1, max_size=3))
    given = REQUIRED | drawn
    message = said_of(check, kind, given, source="run.yaml")
    unknown = [name for name in given if name not in kind.model_fields]
    if message is None:
        assert not unknown
        checked = check(kind, given)
        assert round_trip(kind, checked) == checked
        return
    first, *lines = message.splitlines()
    assert first in {"1 mistake in run.yaml:", f"{len(lines)} mistakes in run.yaml:"}
    if any("\ud800" in name for name in unknown):
        return
    for name in unknown:
        assert any(": no such setting" in line and (name in line or ascii(name)[1:-1] in line) for line in lines)
    assert all(len(line) < 600 for line in lines)


def round_trip(kind: type[Settings], checked: Settings) -> Settings:
    """The settings as `config.yaml` holds them, read again; any YAML library must read the same words and numbers."""
    dumped = json.loads(checked.model_dump_json())
    text = to_yaml(dumped)
    assert from_yaml(text) == dumped
    assert yaml.safe_load(text) == dumped
    return check(kind, from_yaml(text))


@settings(max_examples=300)
@given(data=st.data())
def test_texts_that_are_accepted_are_read_again_from_the_config_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = scratch(tmp_path_factory)
    words = st.one_of(st.sampled_from([*ODD, *TEXTS]), st.text(max_size=12))
    args = st.dictionaries(
        words, st.one_of(words, st.integers(), st.floats(), st.booleans(), st.none(), st.lists(words, max_size=2)), max_size=3
    )
    given = REQUIRED | {"model": data.draw(words), "data": data.draw(st.lists(words, min_size=1, max_size=3)), "out": data.draw(words)}
    given |= {"columns": data.draw(st.dictionaries(words, words, max_size=2)), "template_args": data.draw(args)}
    try:
        checked = check(KINDS["dpo"], given)
    except ConfigError:
        return
    path = folder / "config.yaml"
    path.write_text(to_yaml(json.loads(checked.model_dump_json())), encoding="utf-8")
    assert check(KINDS["dpo"], read_yaml(path)) == checked


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        (
            "batch_size",
            True,
            "batch_size: must be a whole number (given: true; YAML reads yes, no, on and off as true and false: put them in quotes)",
        ),
        ("learning_rate", False, "learning_rate: must be a number (given: false; YAML reads"),
        ("max_steps", True, "max_steps: must be a whole number (given: true; YAML reads"),
        ("lr_schedule", False, "lr_schedule: must be cosine, linear or constant (given: false; YAML reads"),
        ("out", "", "out: must not be empty (given: '')"),
        ("model", " ", "model: must not be empty (given: ' ')"),
        ("adapter", "", "adapter: must not be empty (given: '')"),
        ("data", ["a", ""], "data: must not be empty (given: ['a', ''])"),
        ("out", "a\0b", "out: must not hold a NUL character (given: 'a\\x00b')"),
        ("out", "\udcff", "out: must be UTF-8: it holds bytes or surrogates that are no characters (given: '\\udcff')"),
        ("out", "~nobody-of-that-name/x", "out: must not begin with ~ and a name that is no user of this machine"),
        ("columns", {1: "a"}, "columns: a name must be text (given: 1)"),
        (
            "template_args",
            {"a": date(2024, 1, 1)},
            "template_args: a must be text, a finite number, on or off, null, or a list or mapping of them",
        ),
        ("template_args", {"a": float("nan")}, "template_args: a must be text, a finite number, on or off, null"),
        ("template_args", {"a": {1: 2}}, "template_args: a has the name 1, and names must be text"),
        ("template_args", {"a": deep(30, 1)}, "template_args: a is nested too deeply"),
        ("template_args", {"a": "\ud800"}, "template_args: must be UTF-8"),
        ("template_args", {"a": ["\ud800"]}, "template_args: a must be UTF-8"),
        ("template_args", {"max_length": 5}, "template_args: max_length cannot be given to a template: leave it out"),
        ("template_args", {"tokenize": True}, "template_args: tokenize cannot be given to a template"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(name: str, given: Any, says: str):
    message = said_of(check, KINDS["dpo"], REQUIRED | {name: given})
    assert message is not None
    assert says in message


def test_a_value_that_holds_itself_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    args: dict[str, Any] = {}
    args["a"] = args
    for name, value in (("data", loop), ("precision", loop), ("columns", args), ("template_args", args)):
        assert said_of(check, KINDS["dpo"], REQUIRED | {name: value})


# YAML.


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("a: 010", {"a": "010"}),
        ("a: 1:30", {"a": "1:30"}),
        ("a: 2024-01-01", {"a": "2024-01-01"}),
        ("a: 2024-13-45", {"a": "2024-13-45"}),
        ("a: 2001-12-14t21:59:43.10-05:00", {"a": "2001-12-14t21:59:43.10-05:00"}),
        ("a: =", {"a": "="}),
        ("a: 1_000", {"a": 1000}),
        ("a: 0x1F", {"a": 31}),
        ("a: 0b11", {"a": "0b11"}),
        ("a: 0o17", {"a": "0o17"}),
        ("a: -0", {"a": 0}),
        ("a: 5e-7", {"a": 5e-7}),
        ("a: 1.5e+3", {"a": 1500.0}),
        ("a: .5", {"a": 0.5}),
        ("a: -.inf", {"a": float("-inf")}),
        ("a: on", {"a": True}),
        ("a: No", {"a": False}),
        ("a: 'no'", {"a": "no"}),
        ("a: ~", {"a": None}),
        ("a:", {"a": None}),
        ("a: !!str 3", {"a": "3"}),
        ("a: ⟨ü🦊⟩", {"a": "⟨ü🦊⟩"}),
        ("\ufeffa: 1", {"a": 1}),
        ("sft: &x {seed: 1}\ndpo: {<<: *x, beta: 2}", {"sft": {"seed": 1}, "dpo": {"seed": 1, "beta": 2}}),
        ("sft: &x {seed: 1}\ndpo: {<<: *x, seed: 2}", {"sft": {"seed": 1}, "dpo": {"seed": 2}}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("", None),
        ("# nothing", None),
    ],
)
def test_yaml_values_are_what_they_look_like(text: str, held: Any):
    assert from_yaml(text) == held
    assert repr(from_yaml(text)) == repr(held)  # 1000 is not 1000.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system [exit 1]", "the tag !!python/object/apply:os.system is not read"),
        ("a: !!python/name:os.system", "the tag !!python/name:os.system is not read"),
        ("a: !!binary gICB", "the tag !!binary is not read"),
        ("a: !!set {x, y}", "the tag !!set is not read"),
        ("a: !!timestamp 2024-01-01", "the tag !!timestamp is not read"),
        ("a: !mine x", "the tag !mine is not read"),
        ("a: !!bool maybe", "a value does not fit its tag"),
        ("a: !!int x", "a value does not fit its tag"),
        ("a: !!int", "a value does not fit its tag"),
        ("a: !!float x", "a value does not fit its tag"),
        ("a: " + "1" * 5000, "4300 digits"),
        ("a: 1\nb: 2\na: 3", "a is given twice"),
        ("a: {b: 1, b: 1}", "b is given twice"),
        ("a: 1\n'a': 2", "a is given twice"),
        ("<<: {a: 1}\n<<: {b: 1}", "<< is given twice"),
        ("<<: 3", "expected a mapping"),
        ('"a\\nb": 1\n"a\\nb": 2', "'a\\nb' is given twice"),
        ("a: &x [*x]", "a value holds itself"),
        ("a: &x {b: {c: *x}}", "a value holds itself"),
        ("a: *x", "undefined alias"),
        ("? [1]\n: 2", "unhashable key"),
        ("? {a: 1}\n: 2", "unhashable key"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("a: b: c", "mapping values are not allowed"),
        ("a:\n\tb: 1", "cannot start any token"),
        ("---\na: 1\n---\nb: 1", "single document"),
        ("%YAML 9.0\n---\na: 1", "incompatible"),
        ("a: \0", "special characters are not allowed"),
        ("a: \x1b", "special characters are not allowed"),
    ],
)
def test_yaml_that_means_something_else_or_nothing_is_refused(text: str, says: str):
    with pytest.raises(ValueError, match=r"(?s).+") as caught:
        from_yaml(text)
    assert says in str(caught.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("key", ["bomb", "data", "template_args", "precision", "model"])
def test_a_yaml_bomb_neither_hangs_nor_fills_memory(tmp_path: Path, key: str):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join([*levels, f"{key}: *a29"]))
    assert f"it comes to more than {MOST_VALUES:,} values once its aliases are written out" in refused(
        "train", "dpo", "--config", str(path)
    )


@pytest.mark.timeout(20)
def test_a_chain_of_aliases_and_a_long_list_are_read_in_no_time(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))]))
    assert "is not valid YAML" in refused("train", "dpo", "--config", str(path))
    path.write_text("data:\n" + "- x.jsonl\n" * 20_000)
    assert "--model: is required" in refused("train", "dpo", "--config", str(path))


pieces = st.sampled_from(
    [
        *(
            ": ",
            ":",
            "\n",
            "\n",
            "\n  ",
            "- ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "&a ",
            "*a",
            "!!int ",
            "!!map ",
            "! ",
            "| \n",
            ">-\n",
            "'",
            '"',
            "#",
            "---\n",
        ),
        *("...\n", "%YAML 1.1\n", "? ", "<<: ", "\t", "\r", "\\", "@", "`", "\ufeff", "\x85", "\u2028", "\0", "🦊"),
        *(
            "model",
            "data",
            "out",
            "beta",
            "batch_size",
            "stages",
            "method",
            "dpo",
            "sft",
            "template_args",
            "columns",
            "x.jsonl",
            "/no/such",
        ),
        *ODD[:40],
    ]
)


@settings(max_examples=1000)
@given(text=st.lists(pieces, max_size=14).map("".join))
def test_any_text_is_yaml_or_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = scratch(tmp_path_factory) / "any.yaml"
    path.write_bytes(text.encode())
    message = said_of(read_yaml, path)
    if message is not None:
        assert "any.yaml" in message
        return
    held = read_yaml(path)
    assert all(isinstance(name, str) and "-" not in name for name in held)
    message = said_of(check, KINDS["dpo"], REQUIRED | held)
    if message is None:
        assert not held.keys() - KINDS["dpo"].model_fields.keys()


@settings(max_examples=200)
@given(content=st.one_of(st.binary(max_size=40), st.binary(max_size=20).map(lambda some: b"model: m\n" + some)))
def test_any_bytes_are_yaml_or_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    path = scratch(tmp_path_factory) / "bytes.yaml"
    path.write_bytes(content)
    said_of(read_yaml, path)


def test_places_that_are_no_yaml_file_are_told(tmp_path: Path):
    for name in (str(tmp_path), str(tmp_path / "none.yaml"), "x" * 300, "/dev/null/x"):
        assert "cannot read the config" in refused("train", "dpo", "--config", name)
    with pytest.raises(ConfigError, match="null byte"):
        read_yaml(Path("a\0b"))
    assert "--model: is required" in refused("train", "dpo", "--config", "/dev/null")


class Sample(Settings):
    """Settings of every type there is."""

    number: float = Setting(1.0, help="Number.")
    whole: int | None = Setting(None, help="Whole.")
    switch: bool = Setting(False, help="Switch.")
    path: Path | None = Setting(None, help="Path.")
    texts: list[str] = Setting([], help="Texts.")
    text: str = Setting("x", help="Text.")


@settings(max_examples=500)
@given(name=st.sampled_from(plain_names(Sample)), value=values)
def test_what_is_accepted_is_what_was_said(name: str, value: Any):
    try:
        taken = getattr(check(Sample, {name: value}), name)
    except ConfigError:
        return
    if isinstance(value, bool):
        assert taken is value
    elif name == "switch":
        assert value in (0, 1) or str(value).lower() in ("0", "1", "on", "off", "yes", "no", "true", "false", "t", "f", "y", "n")
    elif name == "number":
        assert taken == float(value)
    elif name == "whole" and value is not None:
        assert taken == (int(value.replace("_", "").partition(".")[0]) if isinstance(value, str) else int(value))
    elif name == "texts":
        assert taken == ([str(value)] if isinstance(value, str | Path) else [str(item) for item in value])
    elif value is not None:
        assert str(taken) == str(Path(value) if name == "path" else value)


def test_random_damage_to_a_real_config_is_told(tmp_path: Path):
    path = tmp_path / "run.yaml"
    text = to_yaml(json.loads(check(KINDS["dpo"], REQUIRED).model_dump_json())).encode()
    draw = random.Random(0)
    for _ in range(400):
        new = bytearray(text)
        for _ in range(draw.choice([1, 1, 4])):
            new[draw.randrange(len(new))] = draw.choice([*range(256), *b":\n -[]{}'\"#&*!|>%@`" * 8])
        path.write_bytes(new[: draw.choice([len(new), draw.randrange(len(new))])])
        message = said_of(lambda: check(KINDS["dpo"], read_yaml(path)))
        assert message is None or isinstance(message, str)
    assert issubclass(ConfigError, PrefoptError)
