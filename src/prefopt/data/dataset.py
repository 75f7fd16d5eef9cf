"""The face of the room: sources in, trees and an account of them out.

`load` walks the whole way: sources, rows, format, examples, text, ids, trees. `split` holds some
trees out, the same rows in every stage, never with an opening on both sides.
"""

import json
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefopt.data import cache, sources
from prefopt.data.examples import TURN_KEYS, Example, Fields
from prefopt.data.formats import Kind
from prefopt.data.recognise import LOOKED_AT, Recognised, check_columns, check_mapping, columns_of, mapping_for, recognise, rename
from prefopt.data.rows import LENGTH_REASONS, Dropped, Row, RowFault, clip, count_reasons, stop_at_bad_rows
from prefopt.data.settings import ConversationSettings, DataSettings
from prefopt.data.show import show_tree
from prefopt.data.summary import DataSummary, SourceSummary
from prefopt.data.template import Chat, chat_of, template_key
from prefopt.data.tokenize import Grower, Grown, TreeOptions
from prefopt.data.workers import grow_all
from prefopt.errors import DataError
from prefopt.trees import PromptTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Dataset:
    """Trees, and an account of how they came about.

    Attributes:
        trees: in the order of their rows.
        summary: what was read, dropped, cut and altered.
        dropped_rows: the rows that were left out, as `write_dropped` writes them.
        first_example: the first tree as text, with marks where prompt and completions begin.
        fingerprint: of what the trees hold, wherever their rows stood.
        chat_template: the template that rendered the chats, to be saved with the model; None where there was no chat.
        end_of_turn: the token that closes the answers, for whoever generates.
    """

    trees: tuple[PromptTree, ...]
    summary: DataSummary
    dropped_rows: Sequence[Mapping[str, Any]]
    first_example: str
    fingerprint: str
    chat_template: str | None = None
    end_of_turn: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """What the sources hold, before it is tokens."""

    sources: tuple[SourceSummary, ...]
    examples: tuple[Example, ...]
    rows: tuple[Mapping[str, Any], ...]
    dropped: tuple[Dropped, ...]
    num_rows: int


def load(given: Sequence[str], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", *, kind: Kind) -> Dataset:
    """The trees of all sources, from the cache where the same was asked before.

    Args:
        given: files, folders, `-`, saved datasets or hub names.
        settings: how to read them; its own `data` and `eval_data` are not looked at.
        tokenizer: of the model that will read the trees.
        kind: pairs, or demonstrations.

    Raises:
        DataError: a source that cannot be read, a format that is not recognised, bad rows where `on_bad_row` is
            `stop`, a template that cannot be used, or no example left.
    """
    began = time.perf_counter()
    found = sources.find(given)
    opened = [sources.read(place) for place in found.places]
    folder = cache.cache_folder(settings.cache_dir) / "tokens"
    key = cache.key_of(key_parts(opened, settings, tokenizer, kind))
    entry = cache.load(folder, key)
    if entry is None:
        entry = make(opened, settings, tokenizer, kind)
        cache.save(folder, key, entry)
        from_cache = False
    else:
        from_cache = True
    summary = DataSummary.from_dict(entry.about["summary"])
    summary = replace(summary, ignored=found.ignored, from_cache=from_cache, seconds=round(time.perf_counter() - began, 4))
    about = entry.about
    return Dataset(
        entry.trees,
        summary,
        about["dropped_rows"],
        about["first_example"],
        about["fingerprint"],
        about["chat_template"],
        about["end_of_turn"],
    )


def score_of(settings: DataSettings) -> Literal["completion", "assistant"]:
    """Which turns count: the last answer, unless the settings say otherwise."""
    return settings.score if isinstance(settings, ConversationSettings) else "completion"


def split(trees: Sequence[PromptTree], fraction: float, seed: int) -> tuple[tuple[PromptTree, ...], tuple[PromptTree, ...]]:
    """The trees to train on and those held out, each in the given order.

    Each opening is drawn for itself, by a digest of it and the seed, so that the same rows are held out whichever way they
    are read (a model trained on demonstrations of a file is not tested on pairs of it that it has seen), and stay held
    out as the data grows. The share is met on average, not exactly. Where there are two openings or more and the fraction
    is above 0, at least one is held out and at least one stays; only then does it matter which others there are.

    Args:
        trees: all of them.
        fraction: share to hold out, in [0, 1).
        seed: the same seed, the same split.
    """
    openings = [tree.opening or leak_key(tree) for tree in trees]
    draws = {opening: draw(opening, seed) for opening in openings}
    if fraction <= 0 or len(draws) < 2:
        return tuple(trees), ()
    held_out = {opening for opening, drawn in draws.items() if drawn < fraction}
    if not held_out:
        held_out = {min(draws, key=lambda opening: draws[opening])}
    if len(held_out) == len(draws):
        held_out.remove(max(draws, key=lambda opening: draws[opening]))
    sides = list(zip(trees, openings, strict=True))
    return (
        tuple(tree for tree, opening in sides if opening not in held_out),
        tuple(tree for tree, opening in sides if opening in held_out),
    )


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


def key_parts(opened: Sequence[sources.Source], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", kind: Kind) -> dict[str, Any]:
    """Everything that decides the trees."""
    template = template_key(tokenizer, settings.chat_template)
    deciding = ("data_format", "columns", "on_bad_row", "template_args", "text_as", "max_length", "too_long")
    return {
        "kind": kind,
        "sources": [(source.name, source.digest) for source in opened],
        "settings": {name: getattr(settings, name) for name in deciding} | {"score": score_of(settings)},
        "template": template,
        # Some templates write the date.
        "today": date.today().isoformat() if "strftime_now" in template else "",
        "tokenizer": cache.tokenizer_digest(tokenizer),
    }


def make(opened: Sequence[sources.Source], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", kind: Kind) -> cache.Entry:
    """The trees and their account, from the rows on.

    Raises:
        DataError: as `load`.
    """
    checked = check(opened, settings, kind)
    if settings.on_bad_row == "stop":
        stop_at_bad_rows(list(checked.dropped), checked.num_rows)
    needs_chat = any(example.is_chat for example in checked.examples) or settings.text_as == "chat"
    chat = chat_of(tokenizer, settings.chat_template, settings.template_args) if needs_chat else None
    options = TreeOptions(score_of(settings), settings.text_as, settings.max_length, settings.too_long)
    grower = Grower(tokenizer, chat, options)
    grown = grow_all(grower, checked.examples, settings.data_workers)
    trees = tuple(entry.tree for entry in grown if isinstance(entry.tree, PromptTree))
    unfit = [
        Dropped(example.location, entry.tree.reason, entry.tree.detail, row)
        for example, row, entry in zip(checked.examples, checked.rows, grown, strict=True)
        if isinstance(entry.tree, RowFault)
    ]
    if settings.on_bad_row == "stop":
        stop_at_bad_rows([entry for entry in unfit if entry.reason not in LENGTH_REASONS], checked.num_rows)
    dropped = [*checked.dropped, *unfit]
    if not trees:
        raise DataError(nothing_left(checked.num_rows, dropped))
    summary = account(checked, grown, dropped, chat, settings, tokenizer).with_sizes(trees)
    return cache.Entry(
        trees,
        {
            "summary": summary.to_dict(),
            "dropped_rows": [entry.to_dict() for entry in dropped],
            "first_example": show_tree(trees[0], tokenizer),
            "fingerprint": cache.fingerprint(trees),
            "chat_template": chat.text if chat is not None else None,
            "end_of_turn": chat.end_of_turn if chat is not None else grower.raw_encoder.end_text,
        },
    )


def check(opened: Sequence[sources.Source], settings: DataSettings, kind: Kind) -> Checked:
    """The sources' rows as examples.

    Raises:
        DataError: a source is damaged or empty, its format is not recognised, or `columns` names a field that no format
            has or a column that no source has.
    """
    check_mapping(settings.columns)
    read = [(source.name, source.rows()) for source in opened]
    check_columns(read, settings.columns)
    found: list[SourceSummary] = []
    examples: list[Example] = []
    kept: list[Mapping[str, Any]] = []
    dropped: list[Dropped] = []
    num_rows = 0
    for name, own_rows in read:
        mapping = mapping_for(own_rows, settings.columns)
        rows = [row if isinstance(row, Dropped) else Row(row.location, rename(row.value, mapping)) for row in own_rows]
        own_columns = columns_of(own_rows[:LOOKED_AT])
        recognised = recognise(name, rows[:LOOKED_AT], kind, settings.data_format, own_columns=own_columns, mapping=mapping)
        num_rows += len(rows)
        for row in rows:
            example = row if isinstance(row, Dropped) else example_of(row, recognised, kind)
            if isinstance(example, Dropped):
                dropped.append(example)
            elif isinstance(row, Row):
                examples.append(example)
                kept.append(row.value)
        found.append(source_summary(name, rows, recognised, kind))
    return Checked(tuple(found), tuple(examples), tuple(kept), tuple(dropped), num_rows)


def example_of(row: Row, recognised: Recognised, kind: Kind) -> Example | Dropped:
    """The row's example, or the row with the reason why it has none."""
    try:
        return replace(recognised.format.read(Fields(row.value), kind), location=row.location)
    except RowFault as fault:
        return Dropped(row.location, fault.reason, fault.detail, row.value)


def source_summary(name: str, rows: Sequence[Row | Dropped], recognised: Recognised, kind: Kind) -> SourceSummary:
    """What there is to say about a source."""
    entry = recognised.format
    as_demonstration = kind == "demonstration" and entry.kind == "pair"
    columns = columns_of(rows)
    read = {*entry.fields} - ({"rejected"} if as_demonstration else set())
    unread = [column for column in columns if column not in read] + unread_of_turns(rows, read)
    says = f"{entry.says}, read as demonstrations of the chosen answer" if as_demonstration else entry.says
    return SourceSummary(name, entry.name, says, recognised.because, len(rows), tuple(map(clip, unread)))


def unread_of_turns(rows: Sequence[Row | Dropped], read: Set[str]) -> list[str]:
    """What turns hold beside role and content, as `column[].key`: a model's thoughts, names, weights of turns."""
    found: dict[str, None] = {}
    for row in rows:
        columns = row.value if isinstance(row, Row) else {}
        for column in read & columns.keys():
            value = columns[column]
            for turn in value if isinstance(value, list) else [value]:
                if isinstance(turn, dict) and not turn.keys() <= TURN_KEYS:
                    found |= dict.fromkeys(f"{column}[].{key}" for key, entry in turn.items() if key not in TURN_KEYS and entry is not None)
    return sorted(found)


def account(
    checked: Checked,
    grown: Sequence[Grown],
    dropped: Sequence[Dropped],
    chat: Chat | None,
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
) -> DataSummary:
    """The counts of a whole load."""
    contents = [(example.prompt, example.answers) for example in checked.examples]
    raw = [example for example in checked.examples if isinstance(example.prompt, str) and example.prompt and settings.text_as == "raw"]
    notes = []
    unused = [name for name in ("chat_template", "template_args") if getattr(settings, name)]
    if unused and chat is None:
        notes.append(f"{' and '.join(unused)} had nothing to do: no row is a chat; `--text-as chat` makes plain prompts one")
    if raw and tokenizer.chat_template:
        notes.append("prompts are plain text and are used as they are; the tokenizer has a chat template, which `--text-as chat` would use")
    if chat is not None and chat.origin == "default":
        notes.append(
            "the tokenizer has no chat template: chats are written as transcripts (Human:/Assistant:), "
            "each answer closed by the end-of-sequence token"
        )
    return DataSummary(
        sources=checked.sources,
        num_rows=checked.num_rows,
        dropped=count_reasons(dropped),
        num_cut=sum(entry.cut for entry in grown),
        num_merges=sum(entry.merges for entry in grown),
        num_rewritten=sum(entry.rewritten for entry in grown),
        num_duplicates=len(contents) - len(set(contents)),
        num_glued=sum(is_glued(example) for example in raw),
        template=chat.origin if chat is not None else "",
        notes=tuple(notes),
    )


def is_glued(example: Example) -> bool:
    """Whether raw text and its answers meet without white space."""
    assert isinstance(example.prompt, str), "only raw text is glued"
    return not example.prompt[-1].isspace() and any(not str(answer.content)[0].isspace() for answer in example.answers)


def nothing_left(num_rows: int, dropped: Sequence[Dropped]) -> str:
    """The message when every row was dropped."""
    counts = ", ".join(f"{reason} {count}" for reason, count in count_reasons(dropped).items())
    first = dropped[0]
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
