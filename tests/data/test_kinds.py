"""What an example of one kind is as another, and that no answer is lost or invented on the way."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.dataset import load
from prefopt.data.examples import Answer, Example, Message
from prefopt.data.kinds import as_kind, in_order
from prefopt.data.rows import RowFault
from prefopt.data.store import record_of, tree_of_record
from prefopt.errors import DataError


def ranking(*ranks, labels=None):
    labels = labels or [None] * len(ranks)
    return Example(
        "q", tuple(Answer(f"answer {place}", rank=rank, label=label) for place, (rank, label) in enumerate(zip(ranks, labels, strict=True)))
    )


def texts(made):
    return [tuple(answer.content.removeprefix("answer ") for answer in entry.answers) for entry in made if isinstance(entry, Example)]


@pytest.mark.parametrize(
    ("ranks", "which", "expected"),
    [
        ((0, 1), "all", ["01"]),
        ((0, 1), "ends", ["01"]),
        ((0, 1, 2), "all", ["01", "02", "12"]),
        ((0, 1, 2), "best", ["01", "02"]),
        ((0, 1, 2), "ends", ["02"]),
        ((0, 0, 1), "all", ["02", "12"]),
        ((0, 0, 1), "best", ["02", "12"]),
        ((0, 1, 1), "best", ["01", "02"]),
        ((0, 1, 1, 2), "ends", ["03"]),
    ],
)
def test_the_pairs_of_a_ranking(ranks, which, expected):
    made = as_kind(ranking(*ranks), "pair", which)
    assert texts(made) == [tuple(pair) for pair in expected]
    assert all([answer.rank for answer in entry.answers] == [0, 1] for entry in made)


@pytest.mark.parametrize("kind", ["pair", "ranked", "demonstration", "thumbs"])
def test_a_complete_tie_is_left_out_with_its_reason(kind):
    (fault,) = as_kind(ranking(0, 0), kind)
    assert isinstance(fault, RowFault)
    assert fault.reason == "tie"


def test_a_tie_with_labels_still_has_its_thumbs():
    made = as_kind(ranking(0, 0, labels=[True, False]), "thumbs")
    assert [(entry.answers[0].label, entry.answers[0].rank) for entry in made] == [(True, None), (False, None)]


def test_a_pair_is_a_thumb_up_and_one_down():
    made = as_kind(ranking(0, 1), "thumbs")
    assert texts(made) == [("0",), ("1",)]
    assert [entry.answers[0].label for entry in made] == [True, False]


def test_a_ranking_of_three_has_thumbs_only_where_it_has_labels():
    (fault,) = as_kind(ranking(0, 1, 2), "thumbs")
    assert fault.reason == "no_label"
    assert texts(as_kind(ranking(0, 1, 2, labels=[True, None, False]), "thumbs")) == [("0",), ("2",)]


def test_the_best_answer_or_each_with_a_thumb_up_is_a_demonstration():
    assert texts(as_kind(ranking(0, 0, 1), "demonstration")) == [("0",)]
    labelled = Example("q", (Answer("answer 0", label=True), Answer("answer 1", label=False), Answer("answer 2", label=True)))
    assert texts(as_kind(labelled, "demonstration")) == [("0",), ("2",)]
    (fault,) = as_kind(Example("q", (Answer("a", label=False),)), "demonstration")
    assert fault.reason == "thumbs_down"


@given(ranks=st.lists(st.integers(-3, 3), min_size=2, max_size=7), which=st.sampled_from(["all", "best", "ends"]))
def test_pairs_agree_with_the_ranks_they_come_from(ranks, which):
    answers = in_order(Answer(str(place), rank=rank) for place, rank in enumerate(ranks))
    assert [answer.rank for answer in answers] == sorted(sorted(set(ranks)).index(rank) for rank in ranks)
    made = as_kind(Example("q", answers), "pair", which)
    pairs = [tuple(int(answer.content) for answer in entry.answers) for entry in made if isinstance(entry, Example)]
    assert all(ranks[one] < ranks[other] for one, other in pairs)
    assert len(set(pairs)) == len(pairs)
    count = Counter(ranks)
    different = (len(ranks) ** 2 - sum(number**2 for number in count.values())) // 2
    best = count[min(ranks)]
    assert len(pairs) == {"all": different, "best": best * (len(ranks) - best), "ends": int(len(count) > 1)}[which]


# The whole way.

ROWS = [
    {"prompt": "first? ", "completions": ["good", "middling", "bad"], "ranks": [1, 2, 3]},
    {"prompt": "second? ", "completions": ["one", "two"], "ranks": [1, 1]},
    {"prompt": "third? ", "completions": ["right", "wrong", "false"], "ranks": [1, 2, 2]},
]


def test_rankings_become_trees_of_all_answers(write, settings, tokenizer):
    made = load([str(write("a.jsonl", ROWS))], settings(), tokenizer, kind="ranked")
    assert [(tree.row_id, [completion.rank for completion in tree.completions]) for tree in made.trees] == [
        ("a.jsonl:1", [0, 1, 2]),
        ("a.jsonl:3", [0, 1, 1]),
    ]
    assert dict(made.summary.dropped) == {"tie": 1}
    assert (dict(made.summary.branches), made.summary.num_ties, made.summary.num_more) == ({"3": 2}, 1, 0)
    assert "answers ranked: 2 of 3; 1 with ties" in made.summary.lines()
    assert "── completion 1 (rank 0), 2 tokens ──" in made.first_example


def test_rankings_become_pairs_that_are_told_apart(write, settings, tokenizer):
    path = str(write("a.jsonl", ROWS))
    made = load([path], settings(), tokenizer, kind="pair")
    assert [tree.row_id for tree in made.trees] == [f"a.jsonl:1#{part}" for part in (1, 2, 3)] + ["a.jsonl:3#1", "a.jsonl:3#2"]
    assert made.summary.num_rows + made.summary.num_more == len(made.trees) + made.summary.num_dropped == 6
    assert len({tree.opening for tree in made.trees}) == 2
    assert "read as pairs of answers of different rank" in made.summary.sources[0].says


def test_pairs_become_thumbs_on_one_side_of_the_split(write, settings, tokenizer):
    rows = [{"prompt": f"{number}? ", "chosen": "good", "rejected": "bad"} for number in range(3)]
    made = load([str(write("a.jsonl", rows))], settings(), tokenizer, kind="thumbs")
    assert [(tree.row_id, tree.completions[0].label, tree.completions[0].rank) for tree in made.trees[:2]] == [
        ("a.jsonl:1#1", True, None),
        ("a.jsonl:1#2", False, None),
    ]
    assert made.trees[0].opening == made.trees[1].opening
    assert "thumbs: 3 up, 3 down (50% up)" in made.summary.lines()
    assert "── completion (thumb up)" in made.first_example


def test_thumbs_of_one_prompt_are_no_pair(write, settings, tokenizer):
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}]
    path = str(write("a.jsonl", rows))
    with pytest.raises(DataError, match="these look like thumbs"):
        load([path], settings(), tokenizer, kind="pair")
    assert [len(tree.completions) for tree in load([path], settings(), tokenizer, kind="thumbs").trees] == [1, 1]


def test_thumbs_down_are_not_learned_as_demonstrations_and_stop_nothing(write, settings, tokenizer):
    rows = [{"prompt": f"{number} ", "completion": "a", "label": number % 2} for number in range(4)]
    made = load([str(write("a.jsonl", rows))], settings(), tokenizer, kind="demonstration")
    assert [tree.row_id for tree in made.trees] == ["a.jsonl:2", "a.jsonl:4"]
    assert dict(made.summary.dropped) == {"thumbs_down": 2}
    assert [row["reason"] for row in made.dropped_rows] == ["thumbs_down", "thumbs_down"]


def test_one_class_alone_is_told(write, settings, tokenizer):
    made = load([str(write("a.jsonl", [{"prompt": "q", "completion": "a", "label": 1}]))], settings(), tokenizer, kind="thumbs")
    assert "thumbs: 1 up, 0 down (100% up; all are up, and nothing tells good from bad)" in made.summary.lines()


def test_labels_ranks_and_scores_outlive_the_cache(write, settings, tokenizer):
    rows = [{"prompt": "q ", "completions": ["a", "b", "c"], "scores": [0.25, 3, 0.25]}]
    path = str(write("a.jsonl", rows))
    first, again = (load([path], settings(), tokenizer, kind="ranked") for _ in range(2))
    assert again.summary.from_cache
    for tree in (first.trees[0], again.trees[0], tree_of_record(b"".join(record_of(first.trees[0])))):
        assert [(one.rank, one.reward) for one in tree.completions] == [(0, 3.0), (1, 0.25), (1, 0.25)]
    assert json.dumps(again.summary.to_dict()["branches"]) == '{"3": 1}'


def test_a_chat_of_several_turns_is_a_thumb_that_is_never_cut_inside(write, settings, chatml):
    turns = [
        {"role": "user", "content": "long " * 40},
        {"role": "assistant", "content": "short"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "end"},
    ]
    row = {"prompt": turns[:1], "completion": turns[1:], "label": True}
    made = load([str(write("a.jsonl", [row]))], settings(), chatml, kind="thumbs")
    assert made.trees[0].completions[0].num_scored < len(made.trees[0].completions[0].ids)
    with pytest.raises(DataError, match="last_turn_too_long"):
        load([str(write("b.jsonl", [row]))], settings(max_length=60), chatml, kind="thumbs")
    assert (
        Message("user", "more")
        in as_kind(
            Example(
                (Message("user", "x"),),
                (Answer((Message("assistant", "a"), Message("user", "more"), Message("assistant", "b")), label=True),),
            ),
            "thumbs",
        )[0]
        .answers[0]
        .content
    )
