"""Thousands of broken rows of every format: each is an example or is named with its reason, and none of them is a traceback."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.broken import broken_rows, deep, good_rows, json_values, line, texts_in
from tests.data.conftest import CHATML, EverySetting, byte_bpe
from transformers import PreTrainedTokenizerFast

from prefopt.data import cache, sources
from prefopt.data.dataset import Dataset, check, load, write_dropped
from prefopt.data.formats import FORMATS
from prefopt.data.rows import DEEPEST, NOT_FAULTS, REASONS, as_json, clip
from prefopt.data.settings import DataSettings
from prefopt.data.show import decode
from prefopt.errors import DataError

NAMES = [entry.name for entry in FORMATS]
KINDS = {entry.name: entry.kind for entry in FORMATS}
SERVED = {entry.name: [kind for kind in ("pair", "demonstration", "thumbs", "ranked") if entry.serves(kind)] for entry in FORMATS}
END = "<eos>"

Load = Callable[..., Dataset]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One without a chat template, and one with."""
    chat = byte_bpe()
    chat.chat_template = CHATML
    return {"plain": byte_bpe(), "chat": chat}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Any:
    """Thousands of files are written that nobody needs after a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.os, "fsync", lambda handle: None)
        yield


def strict(text: str) -> Any:
    """JSON as the standard has it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Rows:
    """A file of rows, and what is said about it."""

    def __init__(self, folder: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast, **more: Any) -> None:
        self.rows, self.tokenizer = rows, tokenizer
        self.file, self.dropped = folder / "rows.jsonl", folder / "dropped.jsonl"
        self.file.write_bytes(b"".join(line(row) + b"\n" for row in rows))
        self.dropped.unlink(missing_ok=True)
        self.more = {"data": [str(self.file)], "cache_dir": folder / "cache", **more}

    @property
    def places(self) -> list[str]:
        return [f"rows.jsonl:{number}" for number in range(1, len(self.rows) + 1)]

    def settings(self, on_bad_row: str) -> DataSettings:
        return EverySetting(**self.more, on_bad_row=on_bad_row)

    def load(self, kind: str, on_bad_row: str) -> Dataset | str:
        """The dataset, or the error's message."""
        try:
            settings = self.settings(on_bad_row)
            made = load([str(self.file)], settings, self.tokenizer, kind=kind)
            write_dropped(made.dropped_rows, self.dropped)
            return made
        except DataError as error:
            message = str(error)
            assert "rows.jsonl" in message
            assert all(char.isprintable() or char == "\n" for char in message)
            return message

    def check_account(self, kind: str) -> Dataset | None:
        """Whether every row is an example or is dropped with its reason, stops and all."""
        settings = self.settings("drop")
        made = self.load(kind, "drop")
        stopped = self.load(kind, "stop")
        if isinstance(made, str):
            assert isinstance(stopped, str)
            return None
        written = [strict(text) for text in self.dropped.read_text("utf-8").split("\n") if text] if self.dropped.exists() else []
        summary = made.summary
        assert summary.num_rows == len(self.rows)
        assert summary.num_rows + summary.num_more == len(made.trees) + len(written)
        assert summary.num_trees == len(made.trees)
        assert all(tree.longest <= settings.max_length and 0 <= tree.weight < math.inf for tree in made.trees)
        assert summary.num_dropped == len(written)
        ids = [tree.row_id for tree in made.trees]
        assert ids == sorted(ids, key=lambda place: [int(number) for number in re.findall(r"[:#](\d+)", place)])
        parts = [*ids, *(entry["location"] for entry in written)]
        assert len(set(parts)) == len(parts)
        assert {part.partition("#")[0] for part in parts} == set(self.places)
        self.check_kind(kind, made)
        for entry in written:
            assert entry["reason"] in REASONS
            assert entry["detail"].isprintable(), entry["detail"]
            assert entry["detail"]
        "\n".join(summary.lines()).encode()
        json.dumps(summary.to_dict(), allow_nan=False)
        # Stopping names what dropping leaves out, but for what is only too long.
        faults = [entry for entry in written if entry["reason"] not in NOT_FAULTS]
        if faults:
            assert isinstance(stopped, str)
            named = re.findall(r"^  (rows\.jsonl:\d+(?:#\d+)?): (\w+): ", stopped, re.MULTILINE)
            assert named
            assert set(named) <= {(entry["location"], entry["reason"]) for entry in faults}
        else:
            assert isinstance(stopped, Dataset)
            assert stopped.fingerprint == made.fingerprint
        return made

    def check_kind(self, kind: str, made: Dataset) -> None:
        """What every tree of a kind is, whichever rows it came from."""
        for tree in made.trees:
            ranks, labels = ([getattr(one, name) for one in tree.completions] for name in ("rank", "label"))
            if kind == "pair":
                assert (ranks, labels) == ([0, 1], [None, None])
            elif kind == "ranked":
                assert ranks == sorted(ranks)
                assert set(ranks) == set(range(max(ranks) + 1))
                assert max(ranks) > 0
            elif kind == "thumbs":
                assert len(labels) == 1
                assert labels[0] is not None
            else:
                assert (ranks, labels) == ([None], [None])

    def row_of(self, place: str) -> Any:
        return self.rows[int(place.rpartition(":")[2].partition("#")[0]) - 1]


def answers_of(made: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[str]]]:
    """Each tree's place, and its answers as text without the tokens that end them."""
    ends = (END, "<|im_end|>")
    found = []
    for tree in made.trees:
        texts = [decode(completion.ids, tokenizer) for completion in tree.completions]
        assert all(text.endswith(ends) for text in texts)
        found.append((tree.row_id, [text[: -len(next(end for end in ends if text.endswith(end)))] for text in texts]))
    return found


def says(row: Any, name: str, answer: str) -> bool:
    """Whether what a column holds says the answer: as it stands there (behind a space, in the transcripts that are the default
    template), or at the end of an HH transcript; answers of several turns are not looked at.
    """
    if any(opening in answer for opening in ("<|im_start|>", "\n\nHuman:", "\n\nAssistant:")):
        return True
    ends = (f"Assistant:{answer}", f"Assistant: {answer}")
    return any(text in (answer, answer.removeprefix(" ")) or text.endswith(ends) for text in texts_in(row.get(name)))


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(data=st.data())
def test_broken_rows_of_a_format_are_all_accounted_for(folder: Path, tokenizers, name: str, template: str, data: st.DataObject):
    rows = data.draw(st.lists(st.one_of(broken_rows(name), broken_rows(name), good_rows(name)), min_size=1, max_size=8))
    more = {"data_format": data.draw(st.sampled_from([name, name, "auto"])), "text_as": data.draw(st.sampled_from(["raw", "raw", "chat"]))}
    more["max_length"] = data.draw(st.sampled_from([2048, 2048, 24]))
    kind = data.draw(st.sampled_from(SERVED[name]))
    file = Rows(folder, rows, tokenizers[template], **more)
    made = file.check_account(kind)
    if made is None:
        return
    for place, texts in answers_of(made, file.tokenizer):
        assert all(text.strip() for text in texts)
        row = file.row_of(place)
        single = [column for column in ("chosen", "rejected") if column in row][: len(texts)] if kind == "pair" else []
        for column, text in zip(single, texts, strict=True) if single else ():
            assert says(row, column, text)


@settings(max_examples=150)
@given(data=st.data())
def test_rows_that_are_any_json_at_all_are_accounted_for(folder: Path, tokenizers, data: st.DataObject):
    name = data.draw(st.sampled_from(NAMES))
    columns = [column for entry in FORMATS for column in entry.fields]
    wild = st.one_of(json_values, st.dictionaries(st.sampled_from(columns), json_values, max_size=4))
    rows = data.draw(st.lists(wild, min_size=1, max_size=8))
    Rows(folder, rows, tokenizers["chat"], data_format=name).check_account(KINDS[name])


@settings(max_examples=100)
@given(data=st.data())
def test_rows_of_several_formats_in_one_file_are_accounted_for(folder: Path, tokenizers, data: st.DataObject):
    rows = data.draw(st.lists(st.sampled_from(NAMES).flatmap(good_rows), min_size=2, max_size=10))
    kind = data.draw(st.sampled_from(["pair", "demonstration", "thumbs", "ranked"]))
    Rows(folder, rows, tokenizers["chat"]).check_account(kind)


PLAIN = [name for name in NAMES if KINDS[name] == "demonstration" or name.endswith("pair") or name == "hh"]
"""Those whose answers stand in columns of their own."""


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(PLAIN)))
@settings(max_examples=10)
@given(data=st.data())
def test_every_answer_of_a_good_row_is_read_under_every_kind_that_has_a_use_for_it(
    folder: Path, tokenizers, name: str, data: st.DataObject
):
    row = data.draw(good_rows(name))
    file = Rows(folder, [row], tokenizers["chat"], data_format=name)
    for kind in SERVED[name]:
        made = file.load(kind, "stop")
        assert isinstance(made, Dataset), made
        file.check_kind(kind, made)
        for _, texts in answers_of(made, file.tokenizer):
            for text in texts:
                assert text.removeprefix(" ") in {whole.removeprefix(" ") for whole in texts_in(row)}
        if kind == KINDS[name] and name != "message_tree":
            held = sum(len(tree.completions) for tree in made.trees)
            assert held == {"pair": 2, "ranked": 3, "thumbs": 1}[kind] or name in (
                "rated_completions",
                "labelled_completions",
                "gsm8k_solutions",
            )


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=15)
@given(data=st.data())
def test_rows_that_nothing_is_wrong_with_are_read_word_by_word(folder: Path, tokenizers, name: str, data: st.DataObject):
    rows = data.draw(st.lists(good_rows(name), min_size=1, max_size=4))
    file = Rows(folder, rows, tokenizers["chat"], data_format=name)
    made = file.load(KINDS[name], "stop")
    assert isinstance(made, Dataset)
    assert len(made.trees) == len(rows)
    for (place, texts), tree in zip(answers_of(made, file.tokenizer), made.trees, strict=True):
        row = file.row_of(place)
        columns = ["chosen", "rejected"] if KINDS[name] == "pair" else [[*row][-1] if name != "instruction" else "output"]
        for column, text in zip(columns, texts, strict=True):
            whole = list(texts_in(row[column]))
            assert text in whole or (name == "hh" and whole[0].endswith(f"\n\nAssistant: {text}"))
        prompt = decode(tree.prompt_ids, file.tokenizer)
        for asked in ("prompt", "instruction"):
            if isinstance(row.get(asked), str):
                assert row[asked] in prompt


@settings(max_examples=60)
@given(data=st.data())
def test_the_cache_gives_back_the_same_account(folder: Path, tokenizers, data: st.DataObject):
    name = data.draw(st.sampled_from(NAMES))
    rows = data.draw(st.lists(st.one_of(broken_rows(name), good_rows(name)), min_size=2, max_size=6))
    file = Rows(folder, rows, tokenizers["chat"], data_format=name, template_args={})
    first = file.load(KINDS[name], "drop")
    if isinstance(first, str):
        return
    before = file.dropped.read_bytes() if file.dropped.exists() else None
    file.dropped.unlink(missing_ok=True)
    again = file.load(KINDS[name], "drop")
    assert isinstance(again, Dataset)
    assert again.summary.from_cache
    assert again.fingerprint == first.fingerprint
    assert again.summary.dropped == first.summary.dropped
    assert (file.dropped.read_bytes() if file.dropped.exists() else None) == before


def test_a_value_nested_without_end_is_shown_and_kept_in_part():
    value = deep(100_000, "innermost")
    assert clip(value) == "a list that is nested too deeply"
    kept = as_json({"a": value})
    assert json.dumps(kept).count("[") == DEEPEST - 1
    assert "…" in repr(kept)


@settings(max_examples=150)
@given(data=st.data())
def test_rows_are_counted_without_a_tokenizer_too(folder: Path, tokenizers, data: st.DataObject):
    name = data.draw(st.sampled_from(NAMES))
    rows = data.draw(st.lists(st.one_of(broken_rows(name), json_values), min_size=1, max_size=8))
    file = Rows(folder, rows, tokenizers["plain"], data_format=name)
    opened = [sources.read(place) for place in sources.find([str(file.file)]).places]
    checked = check(opened, file.settings("drop"), KINDS[name])
    assert checked.num_rows == len(rows)
    parts = [entry.location for entry in (*checked.examples, *checked.dropped)]
    assert len(set(parts)) == len(parts)
    assert {part.partition("#")[0] for part in parts} == set(file.places)
