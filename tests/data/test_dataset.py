"""The whole walk, from files to trees: counts, bad rows, the cache, the split."""

import json
import os
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from prefopt.data import cache
from prefopt.data.dataset import load, split, write_dropped
from prefopt.data.formats import FORMATS
from prefopt.data.rows import REASONS
from prefopt.data.store import record_of
from prefopt.errors import DataError
from prefopt.trees import Completion, PromptTree, token_ids

PAIRS = [{"prompt": f"question {number}? ", "chosen": "good answer", "rejected": "bad"} for number in range(6)]


def same(ones: Sequence[PromptTree], others: Sequence[PromptTree]) -> bool:
    return [record_of(tree) for tree in ones] == [record_of(tree) for tree in others]


def test_counts_first_example_and_places(write, settings, tokenizer):
    path = write("pairs.jsonl", [*PAIRS, PAIRS[0] | {"note": "x"}])
    made = load([str(path)], settings(), tokenizer, kind="pair")
    assert [tree.row_id for tree in made.trees] == [f"pairs.jsonl:{number}" for number in range(1, 8)]
    summary = made.summary
    assert (summary.num_rows, summary.num_trees, summary.num_dropped, summary.num_duplicates, summary.num_glued) == (7, 7, 0, 1, 0)
    assert summary.sources[0].unread_columns == ("note",)
    tree = made.trees[0]
    assert summary.num_tokens == sum(one.num_tokens for one in made.trees)
    assert summary.longest == max(one.longest for one in made.trees)
    assert summary.prompt_share == pytest.approx(
        sum(2 * len(one.prompt_ids) for one in made.trees)
        / sum(2 * len(one.prompt_ids) + sum(len(branch.ids) for branch in one.completions) for one in made.trees)
    )
    assert made.first_example == (
        f"── prompt, {len(tree.prompt_ids)} tokens (pairs.jsonl:1) ──\nquestion 0? \n"
        f"── chosen, {len(tree.completions[0].ids)} tokens ──\ngood answer<eos>\n"
        f"── rejected, {len(tree.completions[1].ids)} tokens ──\nbad<eos>"
    )
    lines = "\n".join(summary.lines())
    assert (
        "pairs.jsonl: 7 rows of prompt, chosen and rejected as text [text_pair; 7 of the first 7 rows have prompt, chosen, rejected]"
        in lines
    )
    assert "columns not read: note" in lines
    assert json.loads(json.dumps(summary.to_dict()))["num_trees"] == 7
    assert (made.chat_template, made.end_of_turn) == (None, "<eos>")


@pytest.mark.parametrize("kind", ["pair", "thumbs", "ranked", "demonstration"])
def test_rows_whose_scores_contradict_their_order_are_counted(write, settings, tokenizer, kind):
    scores = [(1, 5), (5, 1), (2, 2), (0.5, 0.75)]
    rows = [PAIRS[place] | {"chosen_score": better, "rejected_score": worse} for place, (better, worse) in enumerate(scores)]
    path = write("scored.jsonl", [*rows, PAIRS[4], PAIRS[5] | {"margin": -1}])
    made = load([str(path)], settings(), tokenizer, kind=kind)
    notes = [note for note in made.summary.notes if "scores" in note]
    if kind == "demonstration":  # of which the rejected answer is not read
        assert notes == []
        return
    assert len(made.trees) == (12 if kind == "thumbs" else 6)
    (note,) = notes
    assert note.startswith("3 of 6 rows bring scores that contradict their own order: a worse answer has the higher one. The order counts")
    assert load([str(path)], settings(), tokenizer, kind=kind).summary.notes == made.summary.notes


def test_pairs_of_a_ranking_by_its_scores_contradict_nothing(write, settings, tokenizer):
    rows = [{"prompt": "which? ", "completions": ["good answer", "bad", "worse"], "scores": [1.0, 3.0, 2.0]}]
    for kind in ("pair", "ranked"):
        made = load([str(write(f"{kind}.jsonl", rows))], settings(), tokenizer, kind=kind)
        assert len(made.trees) == (3 if kind == "pair" else 1)
        assert not any("contradict" in note for note in made.summary.notes)


def test_several_sources_of_different_formats(write, settings, chatml):
    text = write("a.jsonl", PAIRS[:2])
    chat = write("b.json", [json.dumps([{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}])])
    made = load([str(text), str(chat)], settings(), chatml, kind="pair")
    assert [source.format for source in made.summary.sources] == ["text_pair", "hh"]
    assert [tree.row_id for tree in made.trees] == ["a.jsonl:1", "a.jsonl:2", "b.json:item 1"]
    assert made.chat_template == chatml.chat_template
    assert made.end_of_turn == "<|im_end|>"
    assert any("plain text" in note for note in made.summary.notes)


def test_unfit_sources_are_not_read_as_something_else(write, settings, tokenizer):
    with pytest.raises(DataError, match="not recognised"):
        load([str(write("a.jsonl", [{"x": 1}]))], settings(), tokenizer, kind="pair")


BAD = [PAIRS[0], "{", PAIRS[1] | {"chosen": " "}, PAIRS[2] | {"chosen": "bad"}, b'{"prompt": "\xff"}', PAIRS[3], PAIRS[4], PAIRS[5]]


def test_bad_rows_stop(write, settings, tokenizer):
    with pytest.raises(DataError) as caught:
        load([str(write("a.jsonl", BAD))], settings(), tokenizer, kind="pair")
    lines = str(caught.value).split("\n")
    assert lines[0] == "4 of 8 rows cannot be used (invalid_json 1, blank_answer 1, same_answers 1, not_utf8 1):"
    assert [line.split(": ")[:2] for line in lines[1:5]] == [
        ["  a.jsonl:2", "invalid_json"],
        ["  a.jsonl:3", "blank_answer"],
        ["  a.jsonl:4", "same_answers"],
        ["  a.jsonl:5", "not_utf8"],
    ]
    assert "--on-bad-row drop" in lines[5]


def test_the_list_of_bad_rows_ends_after_twenty(write, settings, tokenizer):
    rows = [*PAIRS * 10, *[PAIRS[0] | {"chosen": ""}] * 25]
    with pytest.raises(DataError, match=r"25 of 85 rows") as caught:
        load([str(write("a.jsonl", rows))], settings(), tokenizer, kind="pair")
    assert str(caught.value).count("blank_answer:") == 20
    assert "… and 5 more" in str(caught.value)


def test_bad_rows_are_dropped_and_written_down(write, settings, tokenizer, tmp_path):
    path, dropped_file = write("a.jsonl", BAD), tmp_path / "run" / "dropped.jsonl"
    for from_cache in (False, True):
        dropped_file.unlink(missing_ok=True)
        made = load([str(path)], settings(on_bad_row="drop"), tokenizer, kind="pair")
        write_dropped(made.dropped_rows, dropped_file)
        assert made.summary.from_cache is from_cache
        assert dict(made.summary.dropped) == {"invalid_json": 1, "blank_answer": 1, "same_answers": 1, "not_utf8": 1}
        assert len(made.trees) + made.summary.num_dropped == made.summary.num_rows == 8
        dropped = [json.loads(line) for line in dropped_file.read_text().split("\n") if line]
        assert [(entry["location"], entry["reason"]) for entry in dropped] == [
            ("a.jsonl:2", "invalid_json"),
            ("a.jsonl:3", "blank_answer"),
            ("a.jsonl:4", "same_answers"),
            ("a.jsonl:5", "not_utf8"),
        ]
        assert dropped[0]["row"] == "{"
        assert dropped[1]["row"] == BAD[2]


def test_rows_that_only_the_template_refuses_stop_too(write, settings, chatml):
    rows = [
        {"chosen": f"\n\nHuman: {text}\n\nAssistant: a", "rejected": f"\n\nHuman: {text}\n\nAssistant: b"} for text in ("q", "<|im_end|>")
    ]
    path = str(write("a.jsonl", rows))
    with pytest.raises(DataError, match=r"a\.jsonl:2: control_token"):
        load([path], settings(), chatml, kind="pair")
    assert load([path], settings(on_bad_row="drop"), chatml, kind="pair").summary.dropped == {"control_token": 1}


def test_what_is_too_long_never_stops_and_is_counted(write, settings, tokenizer):
    rows = [*PAIRS, PAIRS[0] | {"prompt": "long " * 50}, PAIRS[0] | {"rejected": "long " * 50}]
    path = str(write("a.jsonl", rows))
    cut = load([path], settings(max_length=40), tokenizer, kind="pair").summary
    assert (cut.num_trees, cut.num_cut, dict(cut.dropped)) == (7, 1, {"answer_too_long": 1})
    dropped = load([path], settings(max_length=40, too_long="drop"), tokenizer, kind="pair").summary
    assert (dropped.num_trees, dropped.num_cut, dict(dropped.dropped)) == (6, 0, {"too_long": 2})


def test_nothing_left_is_an_error(write, settings, tokenizer):
    path = str(write("a.jsonl", PAIRS))
    with pytest.raises(DataError, match=r"none of the 6 rows can be used \(too_long 6\).*Raise max_length"):
        load([path], settings(max_length=8, too_long="drop"), tokenizer, kind="pair")


def test_columns_and_unknown_fields(write, settings, tokenizer):
    path = str(write("a.jsonl", [{"question": "q ", "answer": "a"}]))
    made = load([path], settings(columns={"prompt": "question", "completion": "answer"}), tokenizer, kind="demonstration")
    assert made.summary.sources[0].format == "text_completion"
    with pytest.raises(DataError, match="no format has a field anwser"):
        load([path], settings(columns={"anwser": "answer"}), tokenizer, kind="demonstration")


def test_a_mapping_to_a_column_that_is_not_there(write, settings, tokenizer):
    path = str(write("a.jsonl", PAIRS))
    says = (
        r"columns: no row has a column choosen \(did you mean chosen\?\)\. a\.jsonl has prompt, chosen, rejected\. "
        "Write `field: column of your file`"
    )
    with pytest.raises(DataError, match=says):
        load([path], settings(columns={"chosen": "choosen"}), tokenizer, kind="pair")
    other = str(write("b.jsonl", [{"prompt": "q ", "better": "a", "worse": "b"}]))
    made = load([path, other], settings(columns={"chosen": "better", "rejected": "worse"}), tokenizer, kind="pair")
    assert [source.format for source in made.summary.sources] == ["text_pair", "text_pair"]
    assert len(made.trees) == 7


def test_what_is_not_recognised_is_told_in_the_names_of_the_file(write, settings, tokenizer):
    path = str(write("a.jsonl", [{"frage": "q", "better": "a", "chosen": 1, "worse": "b"}]))
    with pytest.raises(DataError) as caught:
        load([path], settings(columns={"prompt": "frage"}), tokenizer, kind="pair")
    assert "columns seen: frage, better, chosen, worse\n" in str(caught.value)
    path = str(write("a.jsonl", [{"frage": "q", "better": "a", "worse": "b"}]))
    with pytest.raises(DataError, match=r"perhaps: columns: \{prompt: frage, chosen: better, rejected: worse\}"):
        load([path], settings(columns={"prompt": "frage"}), tokenizer, kind="pair")


def test_glued_text_is_counted(write, settings, tokenizer):
    path = str(
        write("a.jsonl", [{"prompt": "q", "completion": "a"}, {"prompt": "q ", "completion": "a"}, {"prompt": "q", "completion": " a"}])
    )
    assert load([path], settings(), tokenizer, kind="demonstration").summary.num_glued == 1


# The cache.


def test_a_hit_equals_the_miss(write, settings, tokenizer):
    conversation = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")], "weight": 0.25}
    path = str(write("a.jsonl", [conversation, {"messages": conversation["messages"][:2]}]))
    first, second = (load([path], settings(score="assistant"), tokenizer, kind="demonstration") for _ in range(2))
    assert (first.summary.from_cache, second.summary.from_cache) == (False, True)
    assert same(first.trees, second.trees)
    assert (first.fingerprint, first.first_example, first.chat_template) == (second.fingerprint, second.first_example, second.chat_template)
    assert second.trees[0].completions[0].scored.tolist() == first.trees[0].completions[0].scored.tolist()
    assert second.trees[0].weight == 0.25
    assert not second.trees[0].prompt_ids.flags.writeable
    assert second.summary.lines()[1:] != []


def test_whatever_decides_the_trees_decides_the_key(write, settings, tokenizer, chatml):
    path = str(write("a.jsonl", PAIRS))
    assert not load([path], settings(), tokenizer, kind="pair").summary.from_cache
    assert load([path], settings(data_workers=1), tokenizer, kind="pair").summary.from_cache
    for others, with_tokenizer, kind in [
        ({"max_length": 77}, tokenizer, "pair"),
        ({"text_as": "chat"}, tokenizer, "pair"),
        ({"too_long": "drop"}, tokenizer, "pair"),
        ({"on_bad_row": "drop"}, tokenizer, "pair"),
        ({}, chatml, "pair"),
        ({}, tokenizer, "demonstration"),
    ]:
        assert not load([path], settings(**others), with_tokenizer, kind=kind).summary.from_cache
    Path(path).write_text(json.dumps(PAIRS[0]))
    assert not load([path], settings(), tokenizer, kind="pair").summary.from_cache


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-10], lambda content: b"", lambda content: content[:-1] + bytes([content[-1] ^ 1])]
)
def test_a_damaged_entry_is_made_anew(write, settings, tokenizer, tmp_path, damage):
    path = str(write("a.jsonl", PAIRS))
    first = load([path], settings(), tokenizer, kind="pair")
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    with pytest.warns(UserWarning, match="damaged and are made anew"):
        second = load([path], settings(), tokenizer, kind="pair")
    assert not second.summary.from_cache
    assert same(first.trees, second.trees)
    assert load([path], settings(), tokenizer, kind="pair").summary.from_cache


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(write, settings, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be cached"):
        assert len(load([str(write("a.jsonl", PAIRS))], settings(), tokenizer, kind="pair").trees) == 6


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    assert cache.cache_folder(None) == tmp_path
    assert cache.cache_folder(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv("PREFOPT_CACHE")
    assert cache.cache_folder(None) == Path.home() / ".cache" / "prefopt"


def test_fingerprints_follow_the_content_and_not_the_place(write, settings, tokenizer):
    prints = {
        name: load([str(write(name, rows))], settings(), tokenizer, kind="pair").fingerprint
        for name, rows in (("a.jsonl", PAIRS), ("b.jsonl", PAIRS), ("c.jsonl", PAIRS[:5]))
    }
    assert prints["a.jsonl"] == prints["b.jsonl"] != prints["c.jsonl"]


def test_processes_give_the_same_trees(write, settings, tokenizer, tmp_path):
    path = str(write("a.jsonl", PAIRS))
    alone = load([path], settings(data_workers=1), tokenizer, kind="pair")
    beside = load([path], settings(data_workers=2, cache_dir=tmp_path / "other"), tokenizer, kind="pair")
    assert same(alone.trees, beside.trees)
    assert len({one.opening for one in beside.trees}) == 6
    assert not beside.summary.from_cache
    assert not beside.trees[0].prompt_ids.flags.writeable


# The split.


def tree(prompt: list[int], answer: int, row: int, opening: str = "") -> PromptTree:
    return PromptTree(token_ids(prompt), (Completion(token_ids([answer])),), row_id=str(row), opening=opening)


def held_rows(trees: Sequence[PromptTree], fraction: float, seed: int) -> set[str]:
    return {one.row_id for one in split(trees, fraction, seed)[1]}


def dialogs(number: int) -> dict[str, list[dict[str, str]]]:
    """A pair of dialogs of one to three exchanges; openings repeat, later turns do not."""
    shared = [{"role": "system", "content": f"rules {number % 3}"}] if number % 2 else []
    for turn in range(number % 3):
        shared += [{"role": "user", "content": f"q {number // 2} {turn}"}, {"role": "assistant", "content": f"a {number} {turn}"}]
    shared.append({"role": "user", "content": f"q {number // 2} {number % 3}"})
    return {side: [*shared, {"role": "assistant", "content": f"{side} {number}"}] for side in ("chosen", "rejected")}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_stage_holds_out_the_same_rows(write, settings, chatml, seed):
    path = str(write("pairs.jsonl", [dialogs(number) for number in range(60)]))
    read = [
        load([path], settings(), chatml, kind="pair"),
        load([path], settings(score="completion"), chatml, kind="demonstration"),
        load([path], settings(score="assistant"), chatml, kind="demonstration"),
        load([path], settings(max_length=45), chatml, kind="pair"),
    ]
    assert len({tuple(len(one.prompt_ids) for one in made.trees) for made in read[1:]}) == 3
    held = [held_rows(made.trees, 0.2, seed) for made in read]
    assert 2 <= len(held[0]) <= 24
    assert read[3].summary.num_cut > 0
    assert held[0] == held[1] == held[2] == held[3]


def test_what_a_row_opens_with(write, settings, chatml):
    turn = {"role": "user", "content": "q"}
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "system", "content": "s"}, turn], **answers},
        {"prompt": [{"role": "assistant", "content": "hi"}, turn], **answers},
        {"prompt": [{"role": "system", "content": "s"}], **answers},
        {"prompt": "s", "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "a", "chosen": "c", "rejected": "b"},
    ]
    openings = [load([str(write("a.jsonl", [row]))], settings(), chatml, kind="pair").trees[0].opening for row in rows]
    assert openings[0] == openings[1] == openings[2] == blake2b(b"q", digest_size=8).hexdigest()
    assert openings[3] == openings[4] == blake2b(b"s", digest_size=8).hexdigest()
    assert openings[5] == openings[6] == blake2b(b"a", digest_size=8).hexdigest()


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_the_share_held_out_is_close_to_the_fraction(fraction):
    trees = [tree([1], 1, number, f"opening {number}") for number in range(2000)]
    for seed in range(3):
        # Four standard deviations of a binomial draw.
        assert abs(len(held_rows(trees, fraction, seed)) - 2000 * fraction) < 4 * (2000 * fraction * (1 - fraction)) ** 0.5


def test_more_rows_move_no_row():
    trees = [tree([1], 1, number, f"opening {number // 2}") for number in range(400)]
    few, many = held_rows(trees[100:300], 0.1, 7), held_rows(trees, 0.1, 7)
    assert few
    assert few == {row for row in many if 100 <= int(row) < 300}


def test_an_opening_is_on_one_side_only():
    trees = [tree([1, number], number, number, f"opening {number % 7}") for number in range(50)]
    train, held_out = split(trees, 0.3, seed=1)
    assert len(train) + len(held_out) == 50
    assert held_out
    assert not {one.opening for one in train} & {one.opening for one in held_out}


def test_a_prompt_is_on_one_side_only():
    trees = [tree([1, number % 7], number, number) for number in range(50)]
    train, held_out = split(trees, 0.2, seed=3)
    assert sorted(int(one.row_id) for one in train + held_out) == list(range(50))
    assert not {one.prompt_ids.tobytes() for one in train} & {one.prompt_ids.tobytes() for one in held_out}
    assert held_out
    again = split(trees, 0.2, seed=3)
    assert [one.row_id for one in again[1]] == [one.row_id for one in held_out]
    assert [one.row_id for one in held_out] == sorted((one.row_id for one in held_out), key=int)
    assert {one.row_id for one in split(trees, 0.2, seed=4)[1]} != {one.row_id for one in held_out}


def test_plain_text_is_split_by_what_it_says():
    trees = [tree([0], number // 2, number) for number in range(20)]
    train, held_out = split(trees, 0.3, seed=0)
    assert train
    assert held_out
    assert not {one.completions[0].ids.tobytes() for one in train} & {one.completions[0].ids.tobytes() for one in held_out}


def test_small_splits():
    two = [tree([1, 1], 5, 0), tree([1, 2], 5, 1)]
    assert [len(side) for side in split(two, 0.01, seed=0)] == [1, 1]
    assert [len(side) for side in split(two, 0.99, seed=0)] == [1, 1]
    assert [len(side) for side in split(two, 0, seed=0)] == [2, 0]
    assert [len(side) for side in split([tree([1, 1], number, number) for number in range(3)], 0.5, seed=0)] == [3, 0]


# Whatever stands in a row: an account of it, or a DataError.

SCALARS = strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(max_size=8)
TURNS = strategies.fixed_dictionaries(
    {},
    optional={
        "role": strategies.sampled_from(["user", "assistant", "system", "gpt", "x"]) | SCALARS,
        "from": strategies.sampled_from(["human", "gpt"]) | SCALARS,
        "content": strategies.text(max_size=5)
        | SCALARS
        | strategies.lists(SCALARS | strategies.dictionaries(strategies.sampled_from(["type", "text"]), SCALARS), max_size=2),
        "value": SCALARS,
    },
)
TRANSCRIPTS = strategies.lists(strategies.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", " b", ""]), max_size=5).map("".join)
VALUES = SCALARS | TRANSCRIPTS | TURNS | strategies.lists(TURNS | SCALARS, max_size=3)
NAMES = strategies.sampled_from(sorted({name for entry in FORMATS for name in entry.fields}))
ROWS = strategies.dictionaries(NAMES | strategies.text(max_size=3), VALUES, max_size=6)


@hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    rows=strategies.lists(ROWS | SCALARS, min_size=1, max_size=5),
    entry=strategies.sampled_from(FORMATS),
    kind=strategies.sampled_from(["pair", "demonstration", "thumbs", "ranked"]),
    good=strategies.booleans(),
)
def test_any_row_is_counted_or_refused(rows, entry, kind, good, write, settings, tokenizer):
    fit = {"prompt": "q ", "chosen": "a", "rejected": "b", "completion": "a", "text": "a", "instruction": "q", "output": "a"}
    path = write("fuzz.jsonl", [json.dumps(row) for row in [*rows, *([fit] if good else [])]])
    if not entry.serves(kind):
        kind = entry.kind
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            made = load([str(path)], settings(on_bad_row="drop", data_format=entry.name, score="assistant"), tokenizer, kind=kind)
        except DataError:
            return
    assert made.summary.num_rows == len(rows) + good
    assert len(made.trees) + made.summary.num_dropped == made.summary.num_rows + made.summary.num_more
    assert set(made.summary.dropped) <= set(REASONS)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=strategies.binary(max_size=200), name=strategies.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"]))
def test_any_bytes_are_counted_or_refused(content, name, settings, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    try:
        made = load([str(tmp_path / name)], settings(on_bad_row="drop"), tokenizer, kind="pair")
    except DataError:
        return
    assert len(made.trees) + made.summary.num_dropped == made.summary.num_rows


def test_dropped_rows_that_cannot_be_written(write, settings, tokenizer, tmp_path):
    (tmp_path / "run").write_text("a file")
    made = load([str(write("a.jsonl", BAD))], settings(on_bad_row="drop"), tokenizer, kind="pair")
    with pytest.raises(DataError, match="cannot be written"):
        write_dropped(made.dropped_rows, tmp_path / "run" / "dropped.jsonl")


def test_no_torch_is_needed_to_read_data():
    code = "import sys, prefopt.data.dataset; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    assert os.spawnv(os.P_WAIT, __import__("sys").executable, [__import__("sys").executable, "-c", code]) == 0
