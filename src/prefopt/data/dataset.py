"""The face of the room: sources in, trees and an account of them out.

`load` walks the whole way: sources, rows, format, examples, text, ids, trees. `split` holds some
trees out, the same rows in every stage, never with an opening on both sides.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import date
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.data import cache, sources
from prefopt.data.examples import Example
from prefopt.data.files import Source
from prefopt.data.growing import ChatFound, Growing, chats_expected, score_of
from prefopt.data.kinds import Kind
from prefopt.data.reading import Read, pairs_of, readings
from prefopt.data.rows import LENGTH_REASONS, Dropped, Faults, stop_at_bad_rows
from prefopt.data.settings import DataSettings
from prefopt.data.show import show_tree
from prefopt.data.store import Stored, StoredTrees, choose
from prefopt.data.summary import DataSummary, SourceSummary
from prefopt.data.template import template_key
from prefopt.data.writer import TreeWriter
from prefopt.errors import DataError
from prefopt.trees import PromptTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Dataset:
    """Trees, and an account of how they came about.

    Attributes:
        trees: in the order of their rows, each read from the disk when it is asked for.
        summary: what was read, dropped, cut and altered.
        dropped_rows: the rows that were left out, as `write_dropped` writes them.
        first_example: the first tree as text, with marks where prompt and completions begin.
        fingerprint: of what the trees hold, wherever their rows stood.
        chat_template: the template that rendered the chats, to be saved with the model; None where there was no chat.
        end_of_turn: the token that closes the answers, for whoever generates.
        times: how often an epoch takes each example of a source, on average, by its name; sources of which it takes all once are not
            in it.
    """

    trees: Sequence[PromptTree]
    summary: DataSummary
    dropped_rows: Sequence[Mapping[str, Any]]
    first_example: str
    fingerprint: str
    chat_template: str | None = None
    end_of_turn: str = ""
    times: Mapping[str, float] = field(default_factory=dict)

    def times_of(self, trees: Sequence[PromptTree]) -> list[float]:
        """How often an epoch takes each of these trees."""
        return [self.times.get(source_of(tree), 1.0) for tree in trees] if self.times else [1.0] * len(trees)


@dataclass(frozen=True, slots=True)
class Checked:
    """What the sources hold, before it is tokens."""

    sources: tuple[SourceSummary, ...]
    examples: tuple[Example, ...]
    dropped: tuple[Dropped, ...]
    num_rows: int


def load(given: Sequence[str], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", *, kind: Kind) -> Dataset:
    """The trees of all sources, from the cache where the same was asked before.

    Args:
        given: files, folders, `-`, saved datasets or hub names.
        settings: how to read them; its own `data` and `eval_data` are not looked at.
        tokenizer: of the model that will read the trees.
        kind: what the method reads.

    Raises:
        DataError: a source that cannot be read, a format that is not recognised, bad rows where `on_bad_row` is
            `stop`, a template that cannot be used, or no example left.
    """
    began = time.perf_counter()
    found = sources.find(given)
    opened = [sources.read(place) for place in found.places]
    folder = cache.cache_folder(settings.cache_dir) / cache.TOKENS
    name = cache.name_of(cache.key_of(key_parts(opened, settings, tokenizer, kind)))
    stored = cache.load(folder, name)
    from_cache = stored is not None
    if stored is None:
        stored = make(opened, settings, tokenizer, kind, folder, name)
    about = stored.about
    summary = DataSummary.from_dict(about["summary"])
    summary = replace(summary, ignored=found.ignored, from_cache=from_cache, seconds=round(time.perf_counter() - began, 4))
    return Dataset(
        stored.trees,
        summary,
        stored.dropped_rows,
        about["first_example"],
        about["fingerprint"],
        about["chat_template"],
        about["end_of_turn"],
        {source.name: source.times for source in opened if source.times != 1},
    )


def source_of(tree: PromptTree) -> str:
    """The name of the source of a tree: it stands before the last colon of its place."""
    return tree.row_id.rpartition(":")[0]


def split(trees: Sequence[PromptTree], fraction: float, seed: int) -> tuple[Sequence[PromptTree], Sequence[PromptTree]]:
    """The trees to train on and those held out, each in the given order.

    Each opening is drawn for itself, by a digest of it and the seed, so that the same rows are held out whichever way they
    are read (a model trained on demonstrations of a file is not tested on pairs of it that it has seen), and stay held
    out as the data grows. The share is met on average, not exactly. Where there are two openings or more and the fraction
    is above 0, at least one is held out and at least one stays; only then does it matter which others there are.

    Args:
        trees: all of them; those of a file are not read for this.
        fraction: share to hold out, in [0, 1).
        seed: the same seed, the same split.
    """
    if fraction <= 0:
        return trees, ()
    openings = trees.openings() if isinstance(trees, StoredTrees) else (tree.opening or leak_key(tree) for tree in trees)
    if isinstance(trees, StoredTrees):
        openings = (opening or leak_key(trees[place]) for place, opening in enumerate(openings))
    draws = np.fromiter((draw(opening, seed) for opening in openings), np.float64, len(trees))
    if len(draws) == 0 or draws.min() == draws.max():
        return trees, ()
    held_out = draws < fraction
    if not held_out.any():
        held_out = draws == draws.min()
    if held_out.all():
        held_out = draws != draws.max()
    return choose(trees, np.flatnonzero(~held_out)), choose(trees, np.flatnonzero(held_out))


def draw(opening: str, seed: int) -> float:
    """A number in [0, 1) that belongs to the opening under this seed, in every process and on every machine."""
    return int.from_bytes(blake2b(f"{seed} {opening}".encode(), digest_size=6).digest(), "big") / 2**48


def leak_key(tree: PromptTree) -> str:
    """What two trees without an opening share when one must not be trained on while the other is held out.

    That is the prompt; one of a single token (BOS before plain text) is none, and there the completions decide.
    """
    if len(tree.prompt_ids) > 1:
        return tree.prompt_ids.tobytes().hex()
    return "|".join([tree.prompt_ids.tobytes().hex(), *(completion.ids.tobytes().hex() for completion in tree.completions)])


def key_parts(opened: Sequence[Source], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", kind: Kind) -> dict[str, Any]:
    """Everything that decides the trees."""
    template = template_key(tokenizer, settings.chat_template)
    deciding = ("data_format", "columns", "on_bad_row", "template_args", "text_as", "max_length", "too_long")
    return {
        "kind": kind,
        "sources": [(source.name, source.digest, source.data_format) for source in opened],
        "settings": {name: getattr(settings, name) for name in deciding},
        "score": score_of(settings, kind),
        "pairs_of_ranks": pairs_of(settings),
        "template": template,
        # Some templates write the date.
        "today": date.today().isoformat() if "strftime_now" in template else "",
        "tokenizer": cache.tokenizer_digest(tokenizer),
    }


def make(
    opened: Sequence[Source], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", kind: Kind, folder: Path, name: str
) -> Stored:
    """The trees and their account, from the rows on, kept in a file of that name.

    Raises:
        DataError: as `load`.
    """
    found = readings(opened, settings, kind)
    chats = chats_expected(found, settings, tokenizer)
    while True:
        with closing(TreeWriter(folder, name)) as writer:
            growing = Growing(found, settings, tokenizer, writer, chats=chats, score=score_of(settings, kind))
            try:
                growing.run()
            except ChatFound:  # further down than anybody looked
                found, chats = [reading.again() for reading in found], True
                continue
            return finish(growing, writer, settings)


def finish(growing: Growing, writer: TreeWriter, settings: DataSettings) -> Stored:
    """The trees with all that is known about them.

    Raises:
        DataError: there are bad rows where `on_bad_row` is `stop`, or no tree is left.
    """
    if settings.on_bad_row == "stop":
        stop_at_bad_rows(growing.unread.first, growing.unread.counts, growing.num_rows)
        stop_at_bad_rows(growing.wrong.first, growing.wrong.counts, growing.num_rows)
    if writer.first is None:
        raise DataError(nothing_left(growing.num_rows, growing.unread + growing.unfit))
    chat = growing.chat
    about = {
        "summary": growing.summary().to_dict(),
        "first_example": show_tree(writer.first, growing.tokenizer),
        "fingerprint": writer.fingerprint,
        "chat_template": chat.text if chat is not None else None,
        "end_of_turn": chat.end_of_turn if chat is not None else growing.grower.raw_encoder.end_text,
    }
    return writer.finish(about, chain(growing.unread.lines(), growing.unfit.lines()))


def check(opened: Sequence[Source], settings: DataSettings, kind: Kind) -> Checked:
    """The sources' rows as examples, all held at once.

    Raises:
        DataError: as `prefopt.data.reading.readings`, or a source is damaged.
    """
    found = readings(opened, settings, kind)
    entries = [entry for reading in found for entry in reading]
    return Checked(
        tuple(reading.summary() for reading in found),
        tuple(entry.example for entry in entries if isinstance(entry, Read)),
        tuple(entry for entry in entries if isinstance(entry, Dropped)),
        sum(reading.num_rows for reading in found),
    )


def nothing_left(num_rows: int, dropped: Faults) -> str:
    """The message when every row was dropped."""
    counts = ", ".join(f"{reason} {count}" for reason, count in dropped.counts.items())
    first = dropped.first[0]
    hint = " Raise max_length." if first.reason in LENGTH_REASONS else ""
    return f"none of the {num_rows} rows can be used ({counts}). The first, {first.location}: {first.reason}: {first.detail}.{hint}"


def write_dropped(dropped: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the rows that were left out, one JSON line each; no file where there is none.

    Raises:
        DataError: the file cannot be written.
    """
    if not dropped:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for entry in dropped:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"the dropped rows cannot be written to {path}: {error.strerror}. Give a folder that can be written.") from None
