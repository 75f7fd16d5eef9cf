"""What a source yields: rows with their place, and the closed list of reasons why one is left out.

A bad row is a value, not an accident: it travels to the summary and to `dropped.jsonl` with its
place, its reason and what the row held, so that nothing disappears without being counted.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from prefopt.disk import Spool
from prefopt.errors import DataError

Reason = Literal[
    "invalid_json",
    "not_utf8",
    "not_an_object",
    "wrong_cells",
    "missing_field",
    "wrong_type",
    "needs_text_only",
    "unknown_role",
    "no_prompt",
    "no_answer",
    "blank_answer",
    "nothing_to_learn",
    "same_answers",
    "prompts_differ",
    "bad_number",
    "unknown_verdict",
    "control_token",
    "template_refused",
    "too_long",
    "answer_too_long",
    "last_turn_too_long",
    "tie",
    "thumbs_down",
    "no_label",
    "no_ranking",
]
"""Why a row is left out."""

REASONS: tuple[Reason, ...] = get_args(Reason)

LENGTH_REASONS: frozenset[Reason] = frozenset({"too_long", "answer_too_long", "last_turn_too_long"})
"""Reasons that are no fault of the row: it does not fit in `max_length`."""

NOT_FAULTS: frozenset[Reason] = LENGTH_REASONS | {"tie", "thumbs_down", "no_label", "no_ranking"}
"""Those, and what is right in itself but says nothing in the kind of data that was asked for. They never stop a run."""

SHOWN = 20
"""How many bad rows an error lists."""

CLIP = 200
"""How many characters of a value a message shows."""

LINES_HELD = 2**24
"""Bytes of lines about bad rows that are held in memory: 16 MiB."""

DEEPEST = 64
"""Lists and objects within each other that `dropped.jsonl` keeps of a row; what lies deeper is a hostile file's."""


class RowFault(Exception):
    """A row cannot be used; caught where rows are read, never seen by users."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value that stands in a row and cannot be used, whatever its column is for: it fails every test of a type.

    Attributes:
        why: what is wrong with it, in words.
        held: what is left of it.
    """

    why: str
    held: Any = None

    def __repr__(self) -> str:
        return self.why


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its source holds it.

    Attributes:
        location: `file:line`, or `file:item` where the file has no lines.
        value: its columns.
    """

    location: str
    value: Mapping[str, Any]

    def parts(self, number: int) -> list[str]:
        """The places of its parts: its own where it has but one."""
        return [self.location] if number == 1 else [f"{self.location}#{part}" for part in range(1, number + 1)]


@dataclass(frozen=True, slots=True)
class Dropped:
    """One row that is left out.

    Attributes:
        location: where it stands.
        reason: why, from the closed list.
        detail: what exactly was found.
        row: what it held: columns where it could be parsed, else its text.
    """

    location: str
    reason: Reason
    detail: str
    row: Any

    def to_dict(self) -> dict[str, Any]:
        """The line of `dropped.jsonl`, whatever the row held."""
        return {"location": self.location, "reason": self.reason, "detail": self.detail, "row": as_json(self.row)}


class Faults:
    """Rows that are left out: the first of them, how many for which reason, and all of them as lines, on the disk where they are many."""

    def __init__(self) -> None:
        self.first: list[Dropped] = []
        self._counts: Counter[str] = Counter()
        self._lines = Spool(LINES_HELD)

    @property
    def num(self) -> int:
        """How many."""
        return self._counts.total()

    @property
    def counts(self) -> dict[str, int]:
        """How many rows each reason took, the most frequent first."""
        return dict(self._counts.most_common())

    def add(self, dropped: Dropped) -> None:
        """One more."""
        if len(self.first) < SHOWN:
            self.first.append(dropped)
        self._counts[dropped.reason] += 1
        self._lines.write(json.dumps(dropped.to_dict()).encode() + b"\n")

    def lines(self) -> Iterator[bytes]:
        """The lines of `dropped.jsonl`."""
        self._lines.file.seek(0)
        yield from self._lines.file

    def __add__(self, other: "Faults") -> "Faults":
        """Both, but for the lines."""
        both = Faults()
        both.first = [*self.first, *other.first][:SHOWN]
        both._counts = self._counts + other._counts
        return both


def stop_at_bad_rows(first: Sequence[Dropped], counts: Mapping[str, int], num_rows: int) -> None:
    """Stops when there is a bad row.

    Args:
        first: the first bad rows, in order.
        counts: of all bad rows, by reason.
        num_rows: how many rows were read in all.

    Raises:
        DataError: lists the first bad rows, the count by reason, and how to leave them out.
    """
    if not first:
        return
    words = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    num = sum(counts.values())
    head = f"{num} of {num_rows} rows cannot be used ({words}):"
    advice = "Mend the rows, or leave them out with `--on-bad-row drop`, which writes each with its reason to dropped.jsonl beside the run."
    raise DataError("\n".join([head, *listed(first, num), advice]))


def listed(first: Sequence[Dropped], num: int) -> list[str]:
    """The first of them, a line each, and how many more there are."""
    more = [f"  … and {num - SHOWN} more"] if num > SHOWN else []
    return [f"  {entry.location}: {entry.reason}: {entry.detail}" for entry in first[:SHOWN]] + more


def clip(value: object) -> str:
    """The value as a short printable text for messages."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    shown = ascii_controls(text[:CLIP])
    return f"{shown}…" if len(text) > CLIP else shown


def as_json(value: Any, depth: int = DEEPEST) -> Any:
    """The value in terms of JSON: what JSON has no word for (dates, bytes, NaN) as text, what lies too deep left out."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Unreadable):
        return as_json(value.held, depth) if value.held is not None else value.why
    if not isinstance(value, Mapping | list | tuple):
        return str(value)
    if depth == 0:
        return "…"
    if isinstance(value, Mapping):
        return {str(name): as_json(entry, depth - 1) for name, entry in value.items()}
    return [as_json(entry, depth - 1) for entry in value]


def ascii_controls(text: str, *, keep_newlines: bool = False) -> str:
    """The text with control characters, lone surrogates and odd line ends as visible escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or (keep_newlines and char == "\n") else char.encode("unicode_escape").decode("ascii") for char in text
    )
