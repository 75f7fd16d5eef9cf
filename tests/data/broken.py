"""Rows that are right, and the ways in which people and programs break them: strategies for the fuzzing tests.

A row is broken one to three times: something in it is deleted, renamed, wrapped, made into another type, or replaced by
one of the values that have broken readers of such files before.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

TEXTS = [
    *("", " ", "\n", "a", "No.", "It is.", "yes, it is", "x" * 3000, "word " * 400, "0", "1", "true", "null", "NaN", "-1", "{}", "[1"),
    *(
        "\u2028",
        "\u0085",
        "\ufeff",
        "a\u202eb",
        "\x00",
        "a\x00b",
        "\x1b[31mred",
        "\r\n",
        "\t",
        "é",
        "e\u0301",
        "👩‍👩‍👧",
        "\U0010ffff",
        "漢字",
    ),
    *("\ud800", "a\udfff", "<end>", "a<end>b", "<begin>", "<turn>user\n", "<pad>", "{{ 7 * 7 }}", "{% raw %}", "{{ messages }}"),
    *("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q", "\n\nAssistant:", "Human: q\n\nAssistant:   ", "Human:", "<script>alert(1)</script>"),
]
"""Texts that are odd in one way or another."""

NUMBERS = [0, 1, -1, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**30, -(10**400), 2**63, True, False]

ROLES = ["user", "assistant", "system", "developer", "human", "gpt", "tool", "robot", "User", "", " user", "function", None, 3, ["user"]]


# fmt: off
ODD = [
    "yes", "no", "on", "off", "true", "~", "null", "010", "0x10", "0b11", "0o17", "1_000", "1:30", "190:20:30", "2024-01-01", "2024-13-45",
    "1e3", "1e-3", "1.", ".5", "1e999", "5e-7", "1/2", "1,5", "١٢", "٣.٥", "NaN", "inf", "-inf", ".inf", "-", "--", "-1", "=", "<<", "!x",
    "dpo", "sft", "auto", "AUTO", "cpu", "~/x", "~nobody-of-that-name/x", "a b", "a=b", "x" * 400, "/dev/null", ".",
    "9" * 30, "9" * 5000, "%", "@", "`", "&a", "*a", "{", "[", "a: b", "- a", "#", "'", '"', "\\", "🦊",
]
# fmt: on
"""Words that YAML, a shell, a file system or Python take for something else."""


def deep(depth: int, innermost: Any) -> Any:
    """Lists within lists."""
    for _ in range(depth):
        innermost = [innermost]
    return innermost


OBJECTS = [
    *(None, [], {}, [None], [[]], [{}], {"a": None}, [1, "a"], {"role": "user"}, {"content": "a"}, {"role": "assistant", "content": "a"}),
    *([{"role": "assistant", "content": "a"}], [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]),
    *({"from": "gpt", "value": "a"}, {"from": None, "value": None}, {"role": "assistant", "content": [{"type": "image", "url": "x"}]}),
    *({"role": "assistant", "content": [{"type": "text", "text": "a"}, "b"]}, {"role": "assistant", "content": None, "tool_calls": [{}]}),
    *(deep(60, "x"), deep(500, None), {"a": deep(90, 1)}),
]
"""Lists and objects that stand where others should."""

garbage = st.sampled_from([*TEXTS, *NUMBERS, *OBJECTS])
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(TEXTS)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(["role", "content"]), inner, max_size=3)
    ),
    max_leaves=6,
)
"""Whatever JSON can say, and the numbers that Python writes into it beside."""

QUESTIONS = ["Is tea hot?", "q", "Why?\n\nBecause.", " leading", "trailing ", "frage: ä\u2028", "What is {{ this }}?"]
ANSWERS = ["It is.", "no", " padded ", "two\n\nparagraphs", "Ünï", "a b c", "1"]

questions = st.sampled_from(QUESTIONS)
answers = st.lists(st.sampled_from(ANSWERS), min_size=2, max_size=2, unique=True)


def turn(role: str, content: str, style: str) -> dict[str, Any]:
    """A turn as role/content, as ShareGPT's from/value, or with its content in parts, of which one may not be learned."""
    if style == "sharegpt":
        return {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
    parts = [{"text": "So: ", "train": False}] if style == "marked" else []
    return {"role": role, "content": content if style == "plain" else [*parts, {"type": "text", "text": content}]}


@st.composite
def good_rows(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A row of the format of that name that nothing is wrong with."""
    question, (chosen, rejected) = draw(questions), draw(answers)
    style = draw(st.sampled_from(["plain", "parts", "marked"]))
    in_parts = [{"text": "So: ", "weight": 0}, {"text": chosen, "weight": 1}] if style == "marked" else chosen
    ask, best, worst = turn("user", question, style), turn("assistant", chosen, style), turn("assistant", rejected, style)
    before = [turn("user", "first", style), turn("assistant", "second", style)] if draw(st.booleans()) else []
    shared = [turn("system", "Be brief.", style), *before] if draw(st.booleans()) else before
    shaped: dict[str, dict[str, Any]] = {
        "hh": {key: f"\n\nHuman: {question}\n\nAssistant: {answer}" for key, answer in (("chosen", chosen), ("rejected", rejected))},
        "text_pair": {"prompt": question, "chosen": in_parts, "rejected": rejected},
        "chat_pair": {"prompt": [*shared, ask], "chosen": [best], "rejected": worst},
        "conversation_pair": {"chosen": [*shared, ask, best], "rejected": [*shared, ask, worst]},
        "sharegpt_pair": {
            "conversations": [turn("user", question, "sharegpt")],
            "chosen": turn("assistant", chosen, "sharegpt"),
            "rejected": turn("assistant", rejected, "sharegpt"),
        },
        "instruction_pair": {"instruction": question, "input": draw(st.sampled_from(["", "tea"])), "chosen": chosen, "rejected": rejected},
        "messages": {"messages": [*shared, ask, best]},
        "sharegpt": {"conversations": [turn("user", question, "sharegpt"), turn("assistant", chosen, "sharegpt")]},
        "text_completion": {"prompt": question, "completion": in_parts},
        "segments": {"segments": [{"text": question, "label": False}, {"text": chosen, "label": True}]},
        "chat_completion": {"prompt": [*shared, ask], "completion": [best]},
        "instruction": {"instruction": question, "output": chosen, "system": draw(st.sampled_from(["", "Be brief."]))},
        "text": {"text": chosen},
        "comparison": {
            "prompt": question,
            "response_a": chosen,
            "response_b": rejected,
            "preference": draw(st.sampled_from(["a", "B", 2])),
        },
        "votes": {"instruction": question, "response1": chosen, "response2": rejected, "annotator1": 1, "annotator2": 1, "annotator3": 2},
        "arena": {"conversation_a": [*shared, ask, best], "conversation_b": [*shared, ask, worst], "winner": "model_b"},
        "arguments": {"a1": chosen, "a2": rejected, "label": "a2"},
        "ranked_completions": {"prompt": question, "completions": [chosen, rejected, "third"], "ranks": [2, 1, 2]},
        "scored_completions": {"prompt": [*shared, ask], "responses": [best, rejected, "third"], "scores": [0.5, 1, 1]},
        "rated_completions": {"prompt": question, "answers": [{"text": chosen, "score": 2}, {"text": rejected, "score": -1.5}]},
        "message_tree": {
            "prompt": {
                "role": "prompter",
                "text": question,
                "replies": [
                    {"role": "assistant", "text": text, "rank": rank, "emojis": {"+1": rank, "-1": 1 - rank}, "replies": []}
                    for rank, text in enumerate((chosen, rejected))
                ],
            }
        },
        "text_label": {"prompt": question, "completion": chosen, "label": draw(st.sampled_from([True, "yes", 1, "1"]))},
        "messages_label": {"messages": [*shared, ask, best], "label": True},
        "sharegpt_label": {"conversations": [turn("user", question, "sharegpt"), turn("assistant", chosen, "sharegpt")], "kto_tag": True},
        "instruction_label": {"instruction": question, "output": chosen, "label": "up"},
        "labelled_completions": {"prompt": question, "completions": [chosen, rejected], "labels": [True, False]},
        "gsm8k_solutions": {
            "question": question,
            "6b_finetuning": {"solution": chosen, "is_correct": True},
            "6b_verification": {"solution": rejected, "is_correct": False},
            "175b_finetuning": {"solution": chosen, "is_correct": True},
            "175b_verification": {"solution": rejected, "is_correct": False},
        },
    }
    return copy.deepcopy(shaped[name])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a row, the row itself left out."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        if len(path) < 6:
            yield from places(entry, (*path, key))


@st.composite
def broken_rows(draw: st.DrawFn, name: str) -> Any:
    """A row of that format, broken in one to three places."""
    row = draw(good_rows(name))
    for _ in range(draw(st.integers(1, 3))):
        everywhere = list(places(row))
        if not everywhere:
            return row
        *path, key = draw(st.sampled_from(everywhere))
        holder = row
        for step in path:
            holder = holder[step]
        break_at(draw, holder, key)
    return row


def break_at(draw: st.DrawFn, holder: Any, key: Any) -> None:
    """Break what a list or an object holds there."""
    value = holder[key]
    way = draw(st.sampled_from(["replace", "replace", "any", "delete", "wrap", "stringify", "role", "add", "rename", "repeat", "empty"]))
    if way == "delete":
        del holder[key]
    elif way == "add":
        extra = copy.deepcopy(draw(garbage))  # what a row holds is broken further, here and below
        if isinstance(holder, list):
            holder.insert(key, extra)
        else:
            holder[
                draw(st.sampled_from(["", "system", "weight", "tool_calls", "text", "\ud800", "\x1b[0m", "input", "reference_chosen_logp"]))
            ] = extra
    elif way == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["Prompt", "prompt ", "chosen", "rejected", "role", "from", "content", "", "completion"]))] = (
            holder.pop(key)
        )
    elif way == "repeat" and isinstance(holder, list):
        holder.append(copy.deepcopy(value))
    else:
        new = {
            "any": lambda: draw(json_values),
            "wrap": lambda: draw(st.sampled_from([[value], {"value": value}, {"0": value}])),
            "stringify": lambda: json.dumps(value),
            "role": lambda: draw(st.sampled_from(ROLES)),
            "empty": lambda: type(value)() if isinstance(value, str | list | dict) else None,
        }.get(way, lambda: draw(garbage))()
        holder[key] = copy.deepcopy(new)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a row; the parts of a message's content as one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from texts_in(entry)
    elif isinstance(value, list):
        parts = [
            part if isinstance(part, str) else part.get("text", part.get("value")) if isinstance(part, dict) else None for part in value
        ]
        if parts and all(isinstance(part, str) for part in parts):
            yield "".join(parts)
        for entry in value:
            yield from texts_in(entry)


def line(row: Any) -> bytes:
    """The row as a line of a file; lone surrogates stand in it as escapes, NaN as Python writes it."""
    return json.dumps(row).encode()
