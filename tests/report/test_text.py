"""Numbers, times and foreign text as people read them."""

from datetime import UTC, datetime

import pytest

from prefopt.report.text import (
    base_name,
    clip,
    clip_middle,
    clock_time,
    count,
    duration,
    model_label,
    moment,
    number,
    one_line,
    plain,
    rate,
    share,
    visible,
    without_common,
)

GAP = "\u00a0"
CHAT = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("texts", "left"),
    [
        ([CHAT.format("How do I fry?"), CHAT.format("How do I boil?")], ["How do I fry?", "How do I boil?"]),  # no line is cut
        ([CHAT.format("one\ntwo"), CHAT.format("one\nthree")], ["two", "three"]),
        (["<s>[INST] Why? [/INST]", "<s>[INST] What? [/INST]"], [" Why? ", " What? "]),
        (["\n\nHuman: a\n\nAssistant:", "\n\nHuman: b\n\nAssistant:"], ["Human: a", "Human: b"]),
        (["<|begin|>The film", "<|begin|>The drama"], ["The film", "The drama"]),
        (["Is tea hot?", "Is ice hot?"], ["Is tea hot?", "Is ice hot?"]),
        (["a\n", "a\nb"], ["", "b"]),
        (["same\n", "same\n"], ["same\n", "same\n"]),
        (["one\n"], ["one\n"]),
        ([], []),
    ],
)
def test_what_all_prompts_share_is_left_out_of_their_titles(texts: list[str], left: list[str]):
    assert without_common(texts) == left


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("windows\r\nend", "windows\nend"),
        ("bell\x07, escape\x1b[31m, null\x00", "bell\\x07, escape\\x1b[31m, null\\x00"),
        ("turned \u202e round \u2066 and \u200f", "turned \\u202e round \\u2066 and \\u200f"),
        ("line\u2028separator", "line\\u2028separator"),
        ("a lone \ud800 surrogate", "a lone \\ud800 surrogate"),
        ("می\u200cخواهم, 👩\u200d🚀, 12\u00a0km, é", "می\u200cخواهم, 👩\u200d🚀, 12\u00a0km, é"),
    ],
)
def test_control_characters_are_shown_and_what_scripts_need_is_kept(text: str, shown: str):
    assert visible(text) == shown


def test_a_long_text_is_cut_with_a_word():
    assert clip("abc def", 7) == "abc def"
    assert clip("abc defghi", 4) == "abc […, 6 more characters]"
    assert clip_middle("abc def", 7) == "abc def"
    assert clip_middle("abcd to fghij", 5) == "ab […, 9 characters left out, …] ij"
    assert one_line("one\n\n two   three", 40) == "one two three"
    assert one_line("one two three", 7) == "one two …"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("org/name", "org/name"),
        ("/home/somebody/models/qwen", "qwen"),
        ("../models/qwen/", "qwen"),
        ("~/qwen", "qwen"),
        ("runs/sft/model", "model"),
        ("pairs.jsonl", "pairs.jsonl"),
        ("", ""),
    ],
)
def test_a_path_is_named_by_its_last_part_and_a_hub_name_whole(name: str, shown: str):
    assert base_name(name) == shown


def test_a_runs_model_is_called_by_the_run():
    assert model_label("/home/somebody/runs/sft/model") == "sft"
    assert model_label("/home/somebody/models/qwen") == "qwen"
    assert model_label("org/name") == "org/name"
    assert model_label("model") == "model"


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400, [1]])
def test_what_is_no_finite_number_is_none(value: object):
    assert number(value) is None


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.0, 3, "0"),
        (-0.0, 3, "0"),
        (0.69314, 3, "0.693"),
        (-187.04, 1, "−187.0"),
        (10.4454, 3, "10.45"),
        (343.46, 3, "343.5"),
        (12345.6, 3, "12,346"),
        (0.00006, 3, "6e−5"),
        (-0.0004, 1, "−4e−4"),
        (3e20, 3, "3e+20"),
        (None, 3, "–"),
        (float("nan"), 3, "–"),
    ],
)
def test_figures_have_the_digits_that_say_something(value: float | None, digits: int, shown: str):
    assert plain(value, digits) == shown


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.587, 0.037, "58.7"),
        (0.587, 0.06, "59"),
        (0.5, None, "50"),
        (0.587, None, "58.7"),
        (1.0, None, "100"),
        (0.0, None, "0"),
        (-0.02, None, "−2"),
    ],
)
def test_a_share_has_no_digits_that_its_error_makes_worthless(value: float, error: float | None, shown: str):
    assert share(value, error) == f"{shown}{GAP}%"


def test_rates_and_counts():
    assert [rate(value) for value in (5e-7, 2.5e-5, 0.001, 0.0, None)] == ["5e-7", "2.5e-5", "0.001", "0", "–"]
    assert [count(value) for value in (1234567, -3, None)] == ["1,234,567", "−3", "–"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (3.21, "3.2 s"),
        (47.4, "47 s"),
        (60, "1 min"),
        (432.1, "7 min 12 s"),
        (7322, "2 h 2 min"),
        (200_000, "2 d 7 h"),
        (None, "–"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float | None, shown: str):
    assert duration(seconds) == shown.replace(" ", GAP)


def test_times_without_a_zone_are_taken_as_utc():
    assert moment("2026-11-21T10:00:00") == datetime(2026, 11, 21, 10, tzinfo=UTC)
    assert clock_time(moment("2026-11-21T12:30:00+02:00")) == "2026-11-21 10:30 UTC"
    assert moment("yesterday") is None
    assert moment(5) is None
    assert clock_time(None) == "–"
