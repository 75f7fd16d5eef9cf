"""Numbers, times and foreign text as people read them."""

import math
import re
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

NO_FIGURE = "–"
UNIT = "\u00a0"
"""Stands between a number and its unit, which no line end may part."""

BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They reorder what stands around them, so that a text could pass for another; joiners, which scripts need, are not among them."""

HIDDEN = frozenset({"Cc", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of characters that show as nothing, as a box, or as an end of the line."""

LARGEST = 1e100
LARGEST_SHOWN = 1e15


def visible(text: str) -> str:
    r"""The text with its control characters as escapes, `\u202e`; line ends and tabs stay."""
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char not in "\n\t" and (char in BIDI_CONTROLS or unicodedata.category(char) in HIDDEN)


def _escape(char: str) -> str:
    return char.encode("unicode_escape", errors="replace").decode("ascii")


def clip(text: str, limit: int) -> str:
    """The text, cut with a word that says so where it has more characters than the limit."""
    return text if len(text) <= limit else f"{text[:limit].rstrip()} […, {len(text) - limit:,} more characters]"


def clip_middle(text: str, limit: int) -> str:
    """As `clip`, but what is left out is the middle: the end of a prompt is what is asked."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half].rstrip()} […, {len(text) - 2 * half:,} characters left out, …] {text[-half:].lstrip()}"


def without_common(texts: Sequence[str]) -> list[str]:
    """The texts without what all of them share: whole lines and marks at the beginning, and what begins with one at the end.

    So prompts can be told apart by their first words, though a template or a system prompt stands before all of them. Nothing is
    left out where there is one text, or where all are the same.
    """
    if len(set(texts)) < 2:
        return list(texts)
    shared = shared_start(texts)
    start = max(shared.rfind(end) for end in "\n>]") + 1
    rests = [text[start:] for text in texts]
    shared = shared_start([rest[::-1] for rest in rests])[::-1]
    mark = re.search(r"[\n<\[]", shared)
    length = len(shared) - mark.start() if mark else 0
    return [rest[: len(rest) - length] for rest in rests]


def shared_start(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)  # whatever these two share, all between them in order share
    length = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def one_line(text: str, limit: int = 140) -> str:
    """The text's beginning in one line."""
    flat = " ".join(text[: 4 * limit].split())
    return flat if len(flat) <= limit else f"{flat[:limit].rstrip()} …"


def base_name(name: str) -> str:
    """A model's or file's name as strangers may see it: of a path the last part, a hub name whole."""
    path = PurePath(name)
    if path.is_absolute() or name.startswith((".", "~")) or "\\" in name or len(path.parts) > 2:
        return path.name or name
    return name


def model_label(name: str) -> str:
    """What a model is called: as `base_name`, but of a run's model, which is always in a folder `model`, the run's name."""
    found = base_name(name)
    return PurePath(name).parent.name or found if found == "model" else found


def number(value: Any) -> float | None:
    """The value as a number; None where it is none, or one beyond all that float32 holds, whose squares would be infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None


def integer(value: Any) -> int | None:
    """The value as a whole number; None where it is none."""
    found = number(value)
    return None if found is None else int(found)


def count(value: float | None) -> str:
    """`12,345`."""
    return NO_FIGURE if value is None else signed(f"{value:,.0f}")


def plain(value: float | None, digits: int = 3) -> str:
    """A figure with so many digits after the point; fewer where it is large, a power of ten where it is too small for them."""
    if value is None or not math.isfinite(value):
        return NO_FIGURE
    size = abs(value)
    if not size:
        return "0"
    if size >= LARGEST_SHOWN or round(size, max(digits, 2)) == 0:
        return signed(f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+"))
    most = next(most for limit, most in ((10, digits), (100, 2), (10_000, 1), (math.inf, 0)) if size < limit)
    return signed(f"{value:,.{min(digits, most)}f}")


def share(value: float | None, error: float | None = None) -> str:
    """A share in percent, `58.7 %`; whole percents where its error is five or more of them."""
    if value is None or not math.isfinite(value):
        return NO_FIGURE
    percent = 100 * value
    whole = abs(percent - round(percent)) < 0.05 or (error is not None and error >= 0.05)
    return signed(f"{percent:.{0 if whole else 1}f}{UNIT}%")


def rate(value: float | None) -> str:
    """A learning rate: `5e-7`."""
    if value is None:
        return NO_FIGURE
    digits, e, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}{e}{int(power)}" if value and not 0.001 <= abs(value) < 1000 else f"{value:g}"


def setting(value: Any) -> str:
    """A setting's value as a user would write it, and as no other value is written: `1e-6`, `on`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        # The shortest text that is this number, without the zeros that Python adds.
        return re.sub(r"e([-+]?)0*(\d+)$", lambda found: f"e{found[1].strip('+')}{found[2]}", repr(value)).removesuffix(".0")
    return "none" if value is None else str(value)


def signed(text: str) -> str:
    """With a minus sign in place of a hyphen, and no minus before zero."""
    return text.lstrip("-") if not text.strip(f"-0.,%{UNIT}") else text.replace("-", "−")


def duration(seconds: float | None) -> str:
    """`7 min 12 s`."""
    if seconds is None:
        return NO_FIGURE
    if seconds < 9.95:
        return f"{seconds:.1f}{UNIT}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((place for place, (amount, _) in enumerate(parts) if amount), 3)
    return UNIT.join(f"{amount}{UNIT}{unit}" for amount, unit in parts[first : first + 2] if amount) or f"0{UNIT}s"


def moment(text: Any) -> datetime | None:
    """The time that an ISO text names, in UTC where it names no zone; None where it is none."""
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):  # the last at the ends of the calendar
        return None


def clock_time(when: datetime | None) -> str:
    """`2026-11-21 11:49 UTC`."""
    return NO_FIGURE if when is None else f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def plural(amount: int, word: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{amount:,} {word}" if amount == 1 else f"{amount:,} {word}s"
