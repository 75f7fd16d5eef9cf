"""Which turns are learned, and how tools and their calls reach the chat template."""

import json

import numpy as np
import pytest
from tests.data.turns import gpt, user

from prefopt.data.dataset import load
from prefopt.data.examples import Message
from prefopt.data.show import decode, show_completion
from prefopt.errors import DataError

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}

WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ 'CALL ' + call.function.name + ' ' + (call.function.arguments | tojson) }}{% endfor %}"
    "{% if message.tool_call_id %}{{ ' of ' + message.tool_call_id }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def learned(tree, tokenizer):
    """The texts that count of each completion."""
    found = []
    for completion in tree.completions:
        mask = np.ones(len(completion.ids), np.bool_) if completion.scored is None else completion.scored
        found.append(decode(completion.ids[mask], tokenizer).split("<|im_end|>")[:-1])
    return found


LONG = [user("q1"), gpt("a1"), user("q2"), gpt("a2"), user("q3"), gpt("a3")]


def marked(**marks):
    """The conversation with marks on its answers: a1=0 says that it is not learned."""
    turns = [dict(turn) for turn in LONG]
    for place, value in marks.items():
        next(turn for turn in turns if turn["content"] == place)["weight"] = value
    return {"messages": turns}


@pytest.mark.parametrize(
    ("marks", "of_completion", "of_assistant"),
    [
        ({}, ["a3"], ["a1", "a2", "a3"]),
        ({"a1": 0}, ["a3"], ["a2", "a3"]),
        ({"a1": 1}, ["a1", "a3"], ["a1", "a2", "a3"]),
        ({"a1": 1, "a2": 0}, ["a1", "a3"], ["a1", "a3"]),
        ({"a2": 1, "a3": 0}, ["a2"], ["a1", "a2"]),
        ({"a1": 1, "a2": 1, "a3": 1}, ["a1", "a2", "a3"], ["a1", "a2", "a3"]),
        ({"a1": 0, "a2": 0}, ["a3"], ["a3"]),
    ],
)
def test_what_a_turn_says_of_itself_goes_before_score(write, settings, chatml, marks, of_completion, of_assistant):
    path = str(write("a.jsonl", [marked(**marks)]))
    for score, expected in (("completion", of_completion), ("assistant", of_assistant)):
        (tree,) = load([path], settings(score=score), chatml, kind="demonstration").trees
        assert learned(tree, chatml) == [expected]
        whole = decode(tree.prompt_ids, chatml) + decode(tree.completions[0].ids, chatml)
        assert [text for text in ("q1", "a1", "q2", "a2", "q3", "a3") if text in whole] == ["q1", "a1", "q2", "a2", "q3", "a3"]


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("weight", 0.0), ("loss_weight", 0.0), ("train", False)])
def test_every_spelling_of_the_mark_is_understood(write, settings, chatml, key, value):
    row = {"messages": [user("q"), gpt("a", **{key: value}), user("r"), gpt("b")]}
    (tree,) = load([str(write("a.jsonl", [row]))], settings(score="assistant"), chatml, kind="demonstration").trees
    assert learned(tree, chatml) == [["b"]]


def test_marks_on_other_turns_change_nothing(write, settings, chatml):
    row = {"messages": [{"role": "system", "content": "s", "weight": 1}, user("q") | {"weight": 1}, gpt("a")]}
    (tree,) = load([str(write("a.jsonl", [row]))], settings(score="assistant"), chatml, kind="demonstration").trees
    assert learned(tree, chatml) == [["a"]]


def test_a_row_that_leaves_nothing_to_learn_is_named(write, settings, chatml):
    path = str(write("a.jsonl", [marked(a3=0)]))
    with pytest.raises(DataError, match="nothing_to_learn"):
        load([path], settings(), chatml, kind="demonstration")
    assert learned(load([path], settings(score="assistant"), chatml, kind="demonstration").trees[0], chatml) == [["a1", "a2"]]
    for kind, row in (
        ("pair", {"prompt": [user("q")], "chosen": [gpt("a", weight=0)], "rejected": [gpt("b")]}),
        ("thumbs", {"messages": [user("q"), gpt("a", train=False)], "label": True}),
        ("ranked", {"prompt": "q", "completions": [gpt("a"), gpt("b", weight=0)], "ranks": [1, 2]}),
    ):
        with pytest.raises(DataError, match="nothing_to_learn"):
            load([str(write(f"{kind}.jsonl", [row]))], settings(), chatml, kind=kind)


def test_marks_inside_the_answers_of_a_pair_mask_them(write, settings, chatml):
    chosen = [gpt("a1", weight=0), user("q2"), gpt("a2")]
    rejected = [gpt("b1"), user("q2"), gpt("b2", weight=0)]
    row = {"prompt": [user("q1")], "chosen": chosen, "rejected": rejected}
    (tree,) = load([str(write("a.jsonl", [row]))], settings(), chatml, kind="pair").trees
    assert learned(tree, chatml) == [["a2"], ["b1"]]
    assert show_completion(tree.completions[0], chatml).startswith(
        "⟦a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟧a2"
    )


def test_marks_are_no_difference_between_prompts(write, settings, chatml):
    row = {"chosen": [user("q"), gpt("x", weight=0), user("r"), gpt("a")], "rejected": [user("q"), gpt("x"), user("r"), gpt("b")]}
    (tree,) = load([str(write("a.jsonl", [row]))], settings(), chatml, kind="pair").trees
    assert learned(tree, chatml) == [["a"], ["b"]]


# Tools.

ANSWERED = [gpt(None, tool_calls=[CALL]), {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"}, gpt("It rains.")]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_calls_reach_the_template_and_results_are_not_learned(write, settings, chatml, tools):
    rows = [{"prompt": [user("Ulm?")], "chosen": ANSWERED, "rejected": [gpt("No idea.")], "tools": tools}]
    made = load([str(write("a.jsonl", rows))], settings(chat_template=WITH_TOOLS), chatml, kind="pair")
    (tree,) = made.trees
    prompt = decode(tree.prompt_ids, chatml)
    assert prompt.startswith('<|im_start|>system\n[{"type": "function", "function": {"name": "weather"')
    assert learned(tree, chatml) == [['CALL weather {"city": "Ulm"}', "It rains."], ["No idea."]]
    assert "tool\nrain of c1" in decode(tree.completions[0].ids, chatml)
    assert made.summary.sources[0].unread_columns == ()


def test_calls_as_sharegpt_writes_them_are_the_same(write, settings, chatml):
    turns = [
        {"from": "human", "value": "Ulm?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    row = {"conversations": turns, "tools": json.dumps(TOOLS)}
    (tree,) = load(
        [str(write("a.jsonl", [row]))], settings(chat_template=WITH_TOOLS, score="assistant"), chatml, kind="demonstration"
    ).trees
    assert learned(tree, chatml) == [['CALL weather {"city": "Ulm"}', "It rains."]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [user("q"), *ANSWERED]}, "the row brings tool_calls, and the chat template of the tokenizer does not write them"),
        (
            {"messages": [user("q"), gpt("a")], "tools": TOOLS},
            "the row brings tools, and the chat template of the tokenizer does not write them",
        ),
        ({"messages": [user("q"), gpt("a")], "tools": "[3]"}, "`tools` is \\[3\\], and must be a list of objects"),
        ({"messages": [user("q"), gpt("a")], "tools": "{"}, "must hold JSON there"),
        ({"prompt": "q", "completion": "a", "tools": TOOLS}, "plain text has no place for them"),
    ],
)
def test_tools_that_would_get_lost_are_refused(write, settings, chatml, row, says):
    with pytest.raises(DataError, match=says):
        load([str(write("a.jsonl", [row]))], settings(), chatml, kind="demonstration")


def test_control_tokens_in_calls_and_tools_are_refused(write, settings, chatml):
    evil = [{"type": "function", "function": {"name": "<|im_end|>"}}]
    for row in ({"messages": [user("q"), gpt("a", tool_calls=evil)]}, {"messages": [user("q"), gpt("a")], "tools": evil}):
        with pytest.raises(DataError, match="control_token"):
            load([str(write("a.jsonl", [row]))], settings(chat_template=WITH_TOOLS), chatml, kind="demonstration")


def test_empty_tools_are_none(write, settings, chatml):
    for tools in ([], "", None, "[]"):
        (tree,) = load(
            [str(write("a.jsonl", [{"messages": [user("q"), gpt("a")], "tools": tools}]))], settings(), chatml, kind="demonstration"
        ).trees
        assert learned(tree, chatml) == [["a"]]


def test_turns_that_differ_in_marks_alone_are_the_same():
    assert Message("assistant", "a", learned=False) == Message("assistant", "a")
    assert Message("assistant", "a", '{"tool_calls": []}') != Message("assistant", "a")
