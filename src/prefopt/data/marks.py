"""Which parts of a text are learned, as its row says."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefopt.data.rows import RowFault, clip

MARKS = ("weight", "loss_weight", "train")
"""What says of a turn, or of a part of its content, whether it is learned."""

Parts = Sequence[tuple[str, bool]]
"""Stretches of a text, in order, with whether each is learned."""


class Marked(str):
    """A text of which the row says part by part whether it is learned.

    It equals the same text without marks, and is used like it: who does not ask for the parts need not know of them. What is made
    of it (stripped, joined with others) has no marks.

    Attributes:
        parts: their texts, in order, with whether each is learned; None: the row does not say.
    """

    parts: tuple[tuple[str, bool | None], ...]

    def __new__(cls, parts: Iterable[tuple[str, bool | None]]) -> "Marked":
        """The parts as one text."""
        parts = tuple(parts)
        made = super().__new__(cls, "".join(text for text, _ in parts))
        made.parts = parts
        return made

    def __reduce__(self) -> tuple[type["Marked"], tuple[Any, ...]]:
        return Marked, (self.parts,)


def parts_of(text: str, otherwise: bool) -> Parts:
    """The text in stretches that are learned, and that are not; what says nothing is as `otherwise` says."""
    if not isinstance(text, Marked):
        return ((text, otherwise),)
    return joined((part, otherwise if learned is None else learned) for part, learned in text.parts)


def joined(parts: Iterable[tuple[str, bool]]) -> Parts:
    """The same with neighbours of one kind as one, and without empty ones."""
    found: list[tuple[str, bool]] = []
    for text, learned in parts:
        if text and found and found[-1][1] == learned:
            found[-1] = (found[-1][0] + text, learned)
        elif text:
            found.append((text, learned))
    return tuple(found)


def counts(text: str, otherwise: bool) -> bool:
    """Whether something of the text is learned that is not blank."""
    return any(learned and bool(part.strip()) for part, learned in parts_of(text, otherwise))


def is_parts(value: object) -> bool:
    """A list of objects with text and without a role: the parts of one text."""
    return isinstance(value, list) and bool(value) and all(is_part(part) for part in value)


def is_part(value: object) -> bool:
    """An object with text and without a role."""
    return isinstance(value, dict) and "text" in value and "role" not in value and "from" not in value


def learned_of(entry: Mapping[str, Any], name: str, what: str = "turn", keys: Sequence[str] = MARKS) -> bool | None:
    """Whether the row says that a turn, or a part, is learned.

    Raises:
        RowFault: it says something else than yes or no.
    """
    for key in keys:
        value = entry.get(key)
        if value is not None:
            if value not in (0, 1):
                raise RowFault("bad_number", f"`{name}` has a {what} whose `{key}` is {clip(value)}, and must be 0 or 1")
            return bool(value)
    return None
