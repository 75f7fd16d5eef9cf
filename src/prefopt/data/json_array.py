"""A JSON array, item by item: what is held of the file is one item and a part of it, however long the array is.

Python's own decoder reads the items. It cannot ask for more, so an item that it cannot read is tried again with twice as
much text, unless the fault lies too far from the end of what is there to be mended by more.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO

from prefopt.data.readers import DECODER, Joined, json_fault, json_row, line_rows, object_row, parsed, text_of
from prefopt.data.rows import Dropped, Row, Unreadable, clip
from prefopt.errors import DataError

PART = 2**18
"""Bytes that are read at a time."""

NEAR_END = 20
"""Characters; a fault closer to the end of a text may be a number, a word or an escape that was cut."""

BLANKS = re.compile(r"[ \t\n\r]*")
ALLOWED = "Allowed are an array of objects, or one object per line."


def json_array(file: IO[bytes], name: str) -> Iterator[Row | Dropped]:
    """An array of objects, located by their number; or, since some call them .json, one object, or lines of objects.

    Raises:
        DataError: it is none of these, or in another encoding.
    """
    content = text_of(file, name)
    number, line = 1, content.readline(PART)
    while line and not line.strip():
        number += line.endswith(b"\n")
        line = content.readline(PART)
    if line.lstrip().startswith(b"["):
        yield from Items(Joined(line.lstrip(), content), name).rows()
        return
    while line and not line.endswith(b"\n") and (more := content.readline()):
        line += more
    first = json_row(line.removesuffix(b"\n"), f"{name}:{number}")
    later = next(((place, found) for place, found in enumerate(content, number + 1) if found.strip()), None)
    if isinstance(first, Row) and later is not None:
        yield first
        yield from line_rows(chain([later[1]], content), name, first=later[0])
        return
    yield object_row(one_object(line + (later[1] if later else b"") + content.read(), name), f"{name}:item 1")


def one_object(content: bytes, name: str) -> object:
    """The object that a file holds.

    Raises:
        DataError: it holds something else.
    """
    try:
        value = parsed(content.decode())
    except (ValueError, RecursionError) as error:
        fault = f"it is not UTF-8 at byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else json_fault(error)
        raise DataError(f"{name} is not valid JSON: {fault}. {ALLOWED}") from None
    if not isinstance(value, dict | Unreadable):
        raise DataError(f"{name} holds {clip(value)}. {ALLOWED}")
    return value


class Items:
    """The items of an array.

    Args:
        file: begins with its bracket.
        name: of the file.
    """

    def __init__(self, file: IO[bytes] | Joined, name: str) -> None:
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._place = 0
        self._num_before = 0  # characters before the text that is held
        self._num_bytes = 0  # read
        self._is_whole = False

    def rows(self) -> Iterator[Row | Dropped]:
        """All of them, as rows.

        Raises:
            DataError: it is no array, is cut short, or something follows it.
        """
        self._take("[")
        number = 0
        if self._next() != "]":
            while True:
                number += 1
                yield object_row(self._value(number), f"{self._name}:item {number}")
                if self._next() != ",":
                    break
                self._take(",")
        if self._next() != "]":
            raise self._fault("a comma or the closing bracket is missing", number)
        self._take("]")
        if self._next():
            raise self._fault("something follows the array", number)

    def _next(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            found = BLANKS.match(self._text, self._place)
            assert found is not None, "nothing at all is a match too"
            self._place = found.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _take(self, character: str) -> None:
        assert self._next() == character, "it was looked at before"
        self._place += 1

    def _value(self, number: int) -> object:
        """The item that begins here."""
        self._next()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                fault = self._fault(error.msg.removesuffix(" starting at"), number, error.pos)
                curable = error.pos > len(self._text) - NEAR_END or error.msg.startswith("Unterminated string")
                if curable and self._more(len(self._text) - self._place):
                    continue
                raise fault from None
            except (ValueError, RecursionError) as error:
                raise self._fault(json_fault(error), number) from None
            # A number may go on: with a digit, or after what is cut of `.5` or `e-7`.
            if isinstance(value, int | float) and end > len(self._text) - 3 and self._more():
                continue
            self._place = end
            return value

    def _more(self, size: int = 0) -> bool:
        """Read on, at least so many bytes; False where the file has ended."""
        if self._is_whole:
            return False
        part = self._file.read(max(PART, size))
        try:
            text = self._decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            held = len(error.object) - len(part)
            raise DataError(
                f"{self._name} is not valid JSON: it is not UTF-8 at byte {self._num_bytes - held + error.start + 1}. {ALLOWED}"
            ) from None
        if not part:
            self._is_whole = True
            return False
        self._num_bytes += len(part)
        self._num_before += self._place
        self._text, self._place = self._text[self._place :] + text, 0
        return True

    def _fault(self, what: str, number: int, place: int | None = None) -> DataError:
        where = self._num_before + (self._place if place is None else place) + 1
        return DataError(f"{self._name} is not valid JSON: {what} at character {where}, in or behind item {number}. {ALLOWED}")
