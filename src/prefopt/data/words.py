"""Ids of texts from the ids of their stretches, for tokenizers that are proved to allow it.

Texts repeat their words, and a prompt is read again before each of its answers. So texts are cut at borders that no token
spans, and each stretch between two borders is encoded once. What must hold for every border between two parts of a text is

    ids(left + right) = ids(left) + behind(right),    behind(right) = ids("a" + right) without ids("a")

Then the ids of a text are those of its first stretch, and of each later one behind an "a", one after another. The "a" keeps
tokenizers that treat the beginning of a text in a way of its own from doing so to a later stretch.

`prefopt.data.locality` says for which tokenizers that holds. Beside its proof, each later stretch is looked at when it is
encoded: its ids must begin with those of the "a".
"""

import re
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = list[int]
Packed = bytes
"""Ids as the bytes of 32-bit numbers: joined at once, and nothing for the garbage collector to look at."""

ANCHOR = "a"
"""What a later stretch is encoded behind."""

LETTERS = "A-Za-zÀ-ÖØ-öø-ÿΑ-ΡΣ-Ωα-ωА-яЁё"
"""Letters that normalisation leaves letters, and that combine with nothing before or behind them."""

VISIBLE = f"!-~{LETTERS[6:]}"
MARKS = ".,;:!?"

Border = Literal["space", "stop"]
"""A space between visible characters, the later of them no mark; it is cut out, and belongs to the later stretch. Or, with
nothing cut out, before a mark or a line break that follows a letter."""

BEGIN_STOPS = frozenset(f"{MARKS}\n")

KEPT = 2**18
"""Stretches whose ids are kept."""

AT_ONCE = 200
"""Stretches that are encoded as one text."""

LONGEST_KEPT = 40
"""Characters of a stretch that is kept; longer ones hardly come again."""


class NotLocal(Exception):
    """The ids of a stretch depend on what stands around it; caught where texts are encoded."""


class Words:
    """Encodes texts by their stretches.

    Args:
        backend: of a fast tokenizer, which neither pads nor truncates.
        borders: the kinds at which texts are cut.
        ends: characters behind which there is no border, whatever follows.
        separator: an added token, behind which a text begins anew, so that many stretches can be encoded as one text; empty: none.
    """

    def __init__(self, backend: "Tokenizer", borders: Sequence[Border], ends: str = "", separator: str = "") -> None:
        self.backend = backend
        self.borders = tuple(borders)
        self.ends = ends
        self.separator = separator
        number = backend.token_to_id(separator) if separator else None
        self._separator_id = packed([-1 if number is None else number])
        self.cut = re.compile("|".join(pattern_of(border, ends) for border in borders)).split
        """The stretches of a text, at least one; or of a later stretch with what follows it."""
        self.first: dict[str, Packed] = {}
        self.later: dict[str, Packed] = {}
        self.passing: list[tuple[dict[str, Packed], str]] = []

    def __reduce__(self) -> tuple[type["Words"], tuple["Tokenizer", tuple[Border, ...], str, str]]:
        return Words, (
            self.backend,
            self.borders,
            self.ends,
            self.separator,
        )  # a process of its own learns faster than it reads what this one knows

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Each text's ids, no special token added.

        Raises:
            NotLocal: as `learn`.
        """
        stretches = [self.cut(text) for text in texts]
        self.learn({own[0] for own in stretches}, set(chain.from_iterable(own[1:] for own in stretches)))
        return [unpacked(self.joined(own)) for own in stretches]

    def learn(self, first: set[str], later: set[str]) -> None:
        """See to it that the ids of these stretches are known, until it is called again.

        Raises:
            NotLocal: the ids of one do not begin with those of the anchor that it was set behind.
        """
        self._forget()
        begins = list(first - self.first.keys())
        follows = list(later - self.later.keys())
        self.later.update(zip(follows, self._behind(follows), strict=True))
        self.first.update(zip(begins, self._alone(begins), strict=True))
        self.passing += [(self.later, text) for text in follows if len(text) > LONGEST_KEPT]
        self.passing += [(self.first, text) for text in begins if len(text) > LONGEST_KEPT]

    def joined(self, stretches: Sequence[str]) -> Packed:
        """The ids of a text from its stretches, which are known."""
        return self.first[stretches[0]] + self.continued(stretches[1:])

    def continued(self, stretches: Sequence[str]) -> Packed:
        """The ids of later stretches, which are known, one after another."""
        return b"".join(map(self.later.__getitem__, stretches))

    def _alone(self, texts: Sequence[str]) -> list[Packed]:
        """Each text's ids, as a text of its own."""
        return [packed(entry.ids) for entry in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _behind(self, stretches: Sequence[str]) -> list[Packed]:
        """The ids of later stretches: many of them as one text, because one by one most of the time goes into beginning."""
        parts = [[ANCHOR, *map(behind_anchor, stretches[start : start + AT_ONCE])] for start in range(0, len(stretches), AT_ONCE)]
        as_one = self._alone([self.separator + self.separator.join(part) for part in parts]) if self.separator else [b""] * len(parts)
        found: list[Packed] = []
        for part, ids in zip(parts, as_one, strict=True):
            _, *sections = sections_of(ids, self._separator_id)
            if len(sections) != len(part):  # a stretch holds the separator, or there is none
                sections = self._alone(part)
            anchor, *behind = sections
            if not anchor or not all(own.startswith(anchor) for own in behind):
                raise NotLocal
            found += [own[len(anchor) :] for own in behind]
        return found

    def _forget(self) -> None:
        for known, text in self.passing:
            del known[text]
        self.passing.clear()
        for known in (self.first, self.later):
            if len(known) > KEPT:
                known.clear()


def sections_of(ids: Packed, separator: Packed) -> list[Packed]:
    """What stands between the separators, before the first and behind the last."""
    numbers = np.frombuffer(ids, np.int32)
    edges = (np.flatnonzero(numbers == np.frombuffer(separator, np.int32)) * len(separator)).tolist()
    return [ids[start:end] for start, end in zip([0, *(edge + len(separator) for edge in edges)], [*edges, len(ids)], strict=True)]


def pattern_of(border: Border, ends: str) -> str:
    """Where such borders are, as a regular expression: what it matches is cut out.

    Its first character tells most; what must stand before it is looked at only then.
    """
    behind = f"[{re.escape(ends)}]" if ends else ""
    if border == "space":
        return f" (?=[{VISIBLE}])(?![{MARKS}])(?<=[{VISIBLE}] )" + (f"(?<!{behind} )" if ends else "")
    return f"(?=[{MARKS}\n])(?<=[{LETTERS}])" + (f"(?<!{behind})" if ends else "")


def packed(ids: Ids) -> Packed:
    """The numbers as bytes."""
    return array("i", ids).tobytes()


def unpacked(ids: Packed) -> Ids:
    """The ids as numbers."""
    return array("i", ids).tolist()


def behind_anchor(stretch: str) -> str:
    """A later stretch behind the anchor, with the space that its border took; what begins with a mark or a line break had none."""
    return ANCHOR + stretch if stretch[0] in BEGIN_STOPS else f"{ANCHOR} {stretch}"
