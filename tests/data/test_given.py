"""Sources with weights and formats of their own, as texts and as parts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.config import check
from prefopt.data import sources
from prefopt.data.dataset import load
from prefopt.data.given import Given, as_text, path_and_rest
from prefopt.data.settings import DataSettings
from prefopt.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b.jsonl", Given("b.jsonl")),
        ("b.jsonl:0.3", Given("b.jsonl", 0.3)),
        ("b.jsonl:2", Given("b.jsonl", 2)),
        ("b.jsonl:.5:format=hh", Given("b.jsonl", 0.5, "hh")),
        ("b.jsonl:format=text_pair", Given("b.jsonl", 1, "text_pair")),
        ("org/name:train", Given("org/name:train")),
        ("org/name:config:train:0.25", Given("org/name:config:train", 0.25)),
        ("-:0.5", Given("-", 0.5)),
        ("x:0.3y", Given("x:0.3y")),
        ("b.jsonl:1e-05", Given("b.jsonl", 1e-5)),
        ("b.jsonl:+2E1:format=hh", Given("b.jsonl", 20, "hh")),
        ("org/name:info", Given("org/name:info")),
        (":0.3", Given(":0.3")),
    ],
)
def test_what_a_text_says(text, expected):
    assert Given.of(text) == expected


def test_a_file_of_that_very_name_is_that_file(tmp_path):
    path = tmp_path / "a.jsonl:0.3"
    path.write_text("{}\n")
    assert Given.of(str(path)) == Given(str(path))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"path": "b.jsonl"}, "b.jsonl"),
        ({"path": "b.jsonl", "weight": 0.3}, "b.jsonl:0.3"),
        ({"path": "b.jsonl", "weight": 2, "format": "hh"}, "b.jsonl:2:format=hh"),
        ({"path": "b.jsonl", "format": "hh"}, "b.jsonl:format=hh"),
        ("b.jsonl", "b.jsonl"),
    ],
)
def test_parts_are_the_text_that_says_the_same(parts, text):
    assert as_text(parts) == text
    assert DataSettings(data=[parts, "c.jsonl"]).data == [text, "c.jsonl"]
    assert DataSettings(data=parts).data == [text]


@given(name=st.sampled_from(["a.jsonl", "x/y:z", "-"]), times=st.floats(1e-12, 1000), form=st.sampled_from([None, "hh"]))
def test_parts_come_back_from_their_text(name, times, form):
    found = Given.of(as_text({"path": name, "weight": times, "format": form}))
    assert found == Given(name, float(f"{times:.15g}"), form)
    assert Given.of(str(found)).name == name


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"path": "b", "weigth": 1}, "a source has no weigth: give path, weight, format"),
        ({"weight": 1}, "needs a path"),
        ({"path": "b", "weight": 0}, "the weight of b must be a number above 0"),
        ({"path": "b", "weight": "much"}, "must be a number above 0"),
        ({"path": "b", "weight": True}, "must be a number above 0"),
        ({"path": "b", "format": "x y"}, "the format of b must be the name of one"),
    ],
)
def test_parts_that_say_nothing_are_refused(parts, says):
    with pytest.raises(ConfigError, match=says):
        check(DataSettings, {"data": [parts]})


@pytest.mark.parametrize("weight", ["0", "-1", "-0.5", "nan", "-inf", "1e9", "1000.5", "1e999", "0e0"])
@pytest.mark.parametrize("rest", ["", ":format=hh"])
def test_a_number_that_is_no_weight_is_refused(write, weight, rest):
    with pytest.raises(DataError, match=f"its weight is {weight}, and must be above 0, up to 1000"):
        sources.find([f"{write('a.jsonl', [{}])}:{weight}{rest}"])


@pytest.mark.parametrize("behind", ["0,5", "50%", "x2", "", "format=", "train"])
def test_what_is_neither_weight_nor_format_is_said_to_be_behind_a_file(write, behind):
    path = write("a.jsonl", [{}])
    with pytest.raises(DataError) as caught:
        sources.find([f"{path}:{behind}"])
    assert f"{path} is there, and '{behind}' behind its colon is neither a weight (a number above 0, up to 1000)" in str(caught.value)


def test_the_path_in_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    name = str(tmp_path / "a.jsonl")
    for rest in ("", ":0.3", ":format=hh", ":2:format=hh", ":train"):
        assert path_and_rest(name + rest) == (name, rest)
    assert path_and_rest("nowhere:train") == ("nowhere:train", "")


def test_each_source_has_its_format_and_its_weight(write, settings, tokenizer):
    pairs = [{"prompt": f"{number} ", "chosen": "a", "rejected": "b"} for number in range(3)]
    one, other = write("one.jsonl", pairs), write("other.jsonl", [row | {"prompt": "x " + row["prompt"]} for row in pairs])
    made = load([str(one), f"{other}:0.5:format=chat_pair"], settings(), tokenizer, kind="pair")
    assert [source.format for source in made.summary.sources] == ["text_pair", "chat_pair"]
    assert made.times == {"other.jsonl": 0.5}
    again = load([f"{one}:2", f"{other}:format=chat_pair"], settings(), tokenizer, kind="pair")
    assert again.summary.from_cache  # the trees are the same
    assert again.times == {"one.jsonl": 2}
    assert json.loads(json.dumps(made.summary.to_dict())) != {}
    with pytest.raises(DataError, match="data_format nope is not known"):
        load([f"{one}:format=nope"], settings(), tokenizer, kind="pair")
