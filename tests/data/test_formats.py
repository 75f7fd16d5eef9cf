"""What each format makes of a row, and how a format is recognised."""

import pytest

from prefopt.data.examples import Answer, Example, Fields, Message
from prefopt.data.formats import FORMATS
from prefopt.data.recognise import check_mapping, recognise, rename
from prefopt.data.rows import Dropped, Row, RowFault
from prefopt.errors import DataError


def user(text: str) -> Message:
    return Message("user", text)


def gpt(text: str) -> Message:
    return Message("assistant", text)


def system(text: str) -> Message:
    return Message("system", text)


def pair(prompt, chosen, rejected, **more) -> Example:
    return Example(prompt, (Answer(chosen, rank=0), Answer(rejected, rank=1)), **more)


def demonstration(prompt, answer) -> Example:
    return Example(prompt, (Answer(answer),))


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}

PAIRS = [
    ("text_pair", {"prompt": "q", "chosen": "a", "rejected": "b"}, pair("q", "a", "b")),
    ("chat_pair", {"prompt": [U], "chosen": [A], "rejected": [B]}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("chat_pair", {"prompt": "q", "chosen": A, "rejected": [B]}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("chat_pair", {"prompt": [U], "chosen": "a", "rejected": "b"}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("chat_pair", {"prompt": "q", "chosen": [U, A], "rejected": [U, B]}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    ("conversation_pair", {"chosen": [U, A], "rejected": [U, B]}, pair((user("q"),), (gpt("a"),), (gpt("b"),))),
    (
        "conversation_pair",
        {"chosen": [U, A, U, A], "rejected": [U, A, U, B]},
        pair((user("q"), gpt("a"), user("q")), (gpt("a"),), (gpt("b"),)),
    ),
    (
        "conversation_pair",
        {"chosen": [U, A, U, A], "rejected": [U, B]},
        pair((user("q"),), (gpt("a"), user("q"), gpt("a")), (gpt("b"),)),
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: q\n\nmore\n\nAssistant: x\n\nHuman: r\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nmore\n\nAssistant: x\n\nHuman: r\n\nAssistant:  b",
        },
        pair((user("q\n\nmore"), gpt("x"), user("r")), (gpt("a"),), (gpt(" b"),)),
    ),
    (
        "sharegpt_pair",
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        pair((system("s"), user("q")), (gpt("a"),), (gpt("b"),)),
    ),
    (
        "sharegpt_pair",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
        pair((system("s"), user("q")), (gpt("a"),), (gpt("b"),)),
    ),
    (
        "instruction_pair",
        {"instruction": "do", "input": "it", "chosen": "a", "rejected": "b"},
        pair((user("do\n\nit"),), (gpt("a"),), (gpt("b"),)),
    ),
    ("instruction_pair", {"instruction": "do", "input": "", "chosen": "a", "rejected": "b"}, pair((user("do"),), (gpt("a"),), (gpt("b"),))),
    ("text_pair", {"prompt": "q", "chosen": "a", "rejected": "b", "weight": "0.5"}, pair("q", "a", "b", weight=0.5)),
]

DEMONSTRATIONS = [
    ("messages", {"messages": [U, A]}, demonstration((user("q"),), (gpt("a"),))),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "value": "?"}]}, A]},
        demonstration((user("q?"),), (gpt("a"),)),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        demonstration((user("q"),), (gpt("a"),)),
    ),
    ("text_completion", {"prompt": "q", "completion": "a"}, demonstration("q", "a")),
    ("chat_completion", {"prompt": [U], "completion": [A]}, demonstration((user("q"),), (gpt("a"),))),
    ("chat_completion", {"prompt": "q", "completion": A}, demonstration((user("q"),), (gpt("a"),))),
    (
        "instruction",
        {"instruction": "do", "input": "it", "output": "a", "system": "s"},
        demonstration((system("s"), user("do\n\nit")), (gpt("a"),)),
    ),
    ("text", {"text": "a"}, demonstration("", "a")),
]


@pytest.mark.parametrize(("name", "row", "expected"), PAIRS)
def test_pairs(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "pair").format
    assert (found.name, found.read(Fields(row), "pair")) == (name, expected)


@pytest.mark.parametrize(("name", "row", "expected"), DEMONSTRATIONS)
def test_demonstrations(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "demonstration").format
    assert (found.name, found.read(Fields(row), "demonstration")) == (name, expected)


@pytest.mark.parametrize(("name", "row", "expected"), [case for case in PAIRS if case[1] != PAIRS[7][1]])
def test_pairs_serve_as_demonstrations_of_the_chosen_answer(name, row, expected):
    found = recognise("rows", [Row("rows:1", row)], "demonstration").format
    made = found.read(Fields(row), "demonstration")
    assert found.name == name
    assert (made.prompt, made.weight) == (expected.prompt, expected.weight)
    assert made.answers == (Answer(expected.answers[0].content),)


def test_every_format_has_a_case():
    assert {entry.name for entry in FORMATS} == {name for name, _, _ in PAIRS + DEMONSTRATIONS}


def test_reference_columns_are_carried():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "reference_chosen_logp": -3.5, "reference_rejected_logp": -4}
    found = recognise("rows", [Row("rows:1", row)], "pair").format
    assert [answer.reference_logp for answer in found.read(Fields(row), "pair").answers] == [-3.5, -4.0]


def text_row(**changes):
    return {"prompt": "q", "chosen": "a", "rejected": "b", **changes}


FAULTS = [
    ("text_pair", {"prompt": "q", "chosen": "a"}, "missing_field", "`rejected`"),
    ("text_pair", text_row(chosen=None), "wrong_type", "null"),
    ("text_pair", text_row(chosen=True), "wrong_type", "boolean"),
    ("text_pair", text_row(prompt=3), "wrong_type", "number"),
    ("text_pair", text_row(rejected=["b"]), "wrong_type", "list"),
    ("text_pair", text_row(rejected=" \n\u2028"), "blank_answer", "`rejected`"),
    ("text_pair", text_row(rejected="a"), "same_answers", "same"),
    ("text_pair", text_row(weight=float("nan")), "bad_number", "nan"),
    ("text_pair", text_row(weight=-1), "bad_number", "-1"),
    ("text_pair", text_row(weight=True), "bad_number", "boolean"),
    ("text_pair", text_row(weight="much"), "bad_number", "much"),
    ("text_pair", text_row(weight=10**400), "bad_number", "weight"),
    ("text_pair", text_row(reference_chosen_logp=-1), "missing_field", "both"),
    ("text_pair", text_row(reference_chosen_logp=0.5, reference_rejected_logp=-1), "bad_number", "0.5"),
    ("text_pair", text_row(chosen="a\ud800"), "not_utf8", "surrogate"),
    ("chat_pair", {"prompt": [U], "chosen": [{"role": "robot", "content": "a"}], "rejected": [B]}, "unknown_role", "robot"),
    ("chat_pair", {"prompt": [U], "chosen": [{"content": "a"}], "rejected": [B]}, "missing_field", "role"),
    ("chat_pair", {"prompt": [U], "chosen": [{"role": "assistant"}], "rejected": [B]}, "missing_field", "content"),
    ("chat_pair", {"prompt": [U], "chosen": [{"role": "assistant", "content": None}], "rejected": [B]}, "wrong_type", "null"),
    ("chat_pair", {"prompt": [U], "chosen": [], "rejected": [B]}, "wrong_type", "empty"),
    (
        "chat_pair",
        {"prompt": [U], "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": [B]},
        "needs_text_only",
        "image",
    ),
    ("chat_pair", {"prompt": [U], "chosen": [A | {"tool_calls": [1]}], "rejected": [B]}, "needs_text_only", "tool_calls"),
    ("chat_pair", {"prompt": "other", "chosen": [U, A], "rejected": [U, B]}, "prompts_differ", "begins with"),
    ("chat_pair", {"prompt": [U], "chosen": [A, U], "rejected": [B]}, "no_answer", "user"),
    ("conversation_pair", {"chosen": [U, A], "rejected": [{"role": "user", "content": "r"}, B]}, "prompts_differ", "turn 1"),
    ("conversation_pair", {"chosen": [U, A], "rejected": [U, A]}, "same_answers", "same"),
    ("conversation_pair", {"chosen": [A], "rejected": [B]}, "no_prompt", "no turn"),
    ("conversation_pair", {"chosen": [U, U], "rejected": [U, U]}, "no_answer", "follows"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "blank_answer", "chosen"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"}, "prompts_differ", "turn 1"),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: x", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "no_answer", "Human"),
    ("hh", {"chosen": "hello", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "wrong_type", "hello"),
    ("messages", {"messages": [U]}, "no_answer", "user"),
    ("messages", {"messages": [A]}, "no_prompt", "no turn"),
    ("messages", {"messages": [U, "a"]}, "wrong_type", "turns"),
    ("text", {"text": "\n"}, "blank_answer", "`text`"),
]


@pytest.mark.parametrize(("name", "row", "reason", "says"), FAULTS)
def test_faults(name, row, reason, says):
    entry = next(entry for entry in FORMATS if entry.name == name)
    with pytest.raises(RowFault) as caught:
        entry.read(Fields(row), entry.kind)
    assert caught.value.reason == reason
    assert says in caught.value.detail


def rows(*values):
    return [Row(f"rows:{number}", value) for number, value in enumerate(values, start=1)]


def test_the_majority_decides():
    good = text_row()
    found = recognise("rows", rows(good, good, {"prompt": "q"}), "pair")
    assert found.format.name == "text_pair"
    assert found.because == "2 of the first 3 rows have prompt, chosen, rejected"


def test_nothing_is_guessed_from_mostly_broken_rows():
    broken = [Dropped(f"rows:{number}", "invalid_json", "no JSON", "{") for number in range(3)]
    with pytest.raises(DataError, match="3 of the first 4 rows cannot be parsed"):
        recognise("rows", [*broken, *rows(text_row())], "pair")
    assert recognise("rows", [*broken, *rows(text_row())], "pair", "text_pair").format.name == "text_pair"


def test_an_unknown_shape_lists_columns_formats_and_a_mapping():
    with pytest.raises(DataError) as caught:
        recognise("rows.csv", rows({"question": "q", "better": "a", "worse": "b"}), "pair")
    message = str(caught.value)
    assert "columns seen: question, better, worse" in message
    assert "columns: {prompt: question, chosen: better, rejected: worse}" in message
    assert "text_pair (prompt, chosen, rejected)" in message


def test_a_column_of_the_wrong_type_is_named():
    with pytest.raises(DataError, match="`chosen` is missing or of another type in 2 of 2 rows"):
        recognise("rows", rows(text_row(chosen=1), text_row(chosen=2)), "pair")


def test_demonstrations_where_pairs_are_needed():
    with pytest.raises(DataError, match="look like demonstrations"):
        recognise("rows", rows({"messages": [U, A]}), "pair")
    with pytest.raises(DataError, match="needs pairs"):
        recognise("rows", rows({"messages": [U, A]}), "pair", "messages")


def test_an_unknown_format_name_gets_the_nearest():
    with pytest.raises(DataError, match="did you mean text_pair"):
        recognise("rows", rows(text_row()), "pair", "text_pairs")


def test_columns_are_renamed_and_unknown_fields_refused():
    assert rename({"question": "q", "prompt": "old", "x": 1}, {"prompt": "question"}) == {"x": 1, "prompt": "q"}
    check_mapping({"prompt": "question"})
    with pytest.raises(DataError, match="did you mean chosen"):
        check_mapping({"chosn": "better"})
