"""Which format a source is in: found by looking at its first rows, and said aloud.

A format is taken when more than half of the rows looked at fit it. Rows that could not even be
parsed are counted too: where they are the majority nothing is guessed from the remaining few.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from prefopt.data.formats import COMMON_FIELDS, FORMATS, Format
from prefopt.data.kinds import PLURAL, Kind
from prefopt.data.message_trees import message_tree
from prefopt.data.rows import Dropped, Row, clip
from prefopt.data.thumbs import LABEL_SAYS, is_label
from prefopt.errors import DataError

LOOKED_AT = 100
"""Rows that decide the format."""

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "instruction", "input", "context", "user"),
    "chosen": ("chosen_messages", "preferred", "better", "better_answer", "accepted", "winner", "good", "answer_chosen", "chosen_response"),
    "rejected": ("rejected_messages", "dispreferred", "worse", "worse_answer", "loser", "bad", "answer_rejected", "rejected_response"),
    "completion": ("response", "answer", "output", "target", "reply"),
    "label": ("thumb", "thumbs", "feedback", "is_good"),
    "messages": ("dialogue", "dialog", "chat", "conversation"),
    "text": ("content", "document", "body", "review"),
}
"""What other people call our columns: used for suggestions only, never to read."""


LOOK_LIKE: Mapping[Kind, str] = {
    "demonstration": "one answer each, which `prefopt train sft` reads",
    "pair": "a chosen and a rejected answer each, which most methods read",
    "thumbs": "single answers, each with a thumb up or down, which `prefopt train kto` reads",
    "ranked": "several answers of one prompt each, with ranks or scores",
}
"""What rows of a kind hold, and who reads them."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """A source's format, and why."""

    format: Format
    because: str


def rename(columns: Mapping[str, Any], mapping: Mapping[str, str]) -> Mapping[str, Any]:
    """The row under our names: each `field: column` of the mapping reads that column as that field.

    A column that is mapped away is no longer read under its old name, and a field that is mapped is read from nowhere
    else: `mapping_for` leaves only what the source has.
    """
    if not mapping:
        return columns
    taken = set(mapping.values())
    kept = {name: value for name, value in columns.items() if name not in taken and name not in mapping}
    return kept | {field: columns[column] for field, column in mapping.items() if column in columns}


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Refuses a mapping to fields that no format has.

    Raises:
        DataError: names the unknown fields, the nearest and all that are known.
    """
    known = known_fields()
    for field in mapping:
        if field not in known:
            close = get_close_matches(field, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise DataError(
                f"columns: no format has a field {clip(field)}{hint}. Known fields are {', '.join(known)}; "
                "write `field: column of your file`."
            )


def check_columns(seen: Mapping[str, Sequence[str]], mapping: Mapping[str, str]) -> None:
    """Refuses a mapping from columns that no source has: it would do nothing, and nobody would be told.

    Args:
        seen: the columns of each source, by its name.
        mapping: as `field: column`.

    Raises:
        DataError: names the missing columns, the nearest, and those that there are.
    """
    if not mapping:
        return
    columns = list(dict.fromkeys(column for names in seen.values() for column in names))
    missing = [column for column in mapping.values() if column not in columns]
    # Where no row could be parsed there is worse to tell.
    if not missing or not columns:
        return
    hints = []
    for column in missing:
        close = get_close_matches(column, columns, n=1)
        hints.append(clip(column) + (f" (did you mean {clip(close[0])}?)" if close else ""))
    there = "; ".join(f"{name} has {', '.join(map(clip, names[:40])) or 'no columns'}" for name, names in list(seen.items())[:4])
    raise DataError(f"columns: no row has a column {', '.join(hints)}. {there}. Write `field: column of your file`.")


def mapping_for(columns: Collection[str], mapping: Mapping[str, str]) -> Mapping[str, str]:
    """What of the mapping applies to a source of these columns: of several sources each may need only a part of it."""
    return {field: column for field, column in mapping.items() if column in columns}


def columns_of(rows: Iterable[Row | Dropped]) -> list[str]:
    """The columns of the rows, in the order of their first use."""
    return list(dict.fromkeys(column for row in rows if isinstance(row, Row) for column in row.value))


def known_fields() -> list[str]:
    """Every field of every format, in the table's order."""
    return list(dict.fromkeys([*(name for entry in FORMATS for name in entry.fields if name not in COMMON_FIELDS), *COMMON_FIELDS]))


def recognise(
    name: str,
    rows: Sequence[Row | Dropped],
    kind: Kind,
    data_format: str = "auto",
    *,
    own_columns: Sequence[str] | None = None,
    mapping: Mapping[str, str] | None = None,
) -> Recognised:
    """The format of a source.

    Args:
        name: the source, for messages.
        rows: its first rows, under our names.
        kind: what is to be read from it.
        data_format: the name of a format, or `auto` to look.
        own_columns: what the source itself calls its columns, for messages; None: as in the rows.
        mapping: the names that the rows were given, as `field: column`, for messages.

    Raises:
        DataError: no format is known by that name, or none fits; it lists the columns seen and the formats known.
    """
    usable = candidates(kind)
    if data_format != "auto":
        return Recognised(named(data_format, kind, usable), "as asked by data_format")
    good = [row for row in rows if isinstance(row, Row)]
    broken = [row for row in rows if isinstance(row, Dropped)]
    if len(broken) > len(good):
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(row.reason for row in broken).most_common())
        raise DataError(
            f"{name}: {len(broken)} of the first {len(rows)} rows cannot be parsed ({reasons}; "
            f"the first at {broken[0].location}: {broken[0].detail}). "
            "No format is guessed from the rest: mend the file, or name the format with "
            f"data_format ({', '.join(entry.name for entry in usable)})."
        )
    votes = Counter(entry.name for row in good if (entry := first_fit(row.value, usable)) is not None)
    if votes:
        best, count = votes.most_common(1)[0]
        if count * 2 > len(good):
            found = next(entry for entry in usable if entry.name == best)
            return Recognised(found, f"{count} of the first {len(good)} rows have {', '.join(found.needs)}")
    raise DataError(not_recognised(name, [row.value for row in good], kind, usable, own_columns, mapping or {}))


def candidates(kind: Kind) -> tuple[Format, ...]:
    """The formats that can serve, in the table's order: a row that has a chosen answer has it for a reason, so pairs come first."""
    return tuple(entry for entry in FORMATS if entry.serves(kind))


def first_fit(columns: Mapping[str, Any], usable: Iterable[Format]) -> Format | None:
    """The first format that the row fits."""
    return next((entry for entry in usable if entry.fits(columns)), None)


def named(name: str, kind: Kind, usable: Sequence[Format]) -> Format:
    """The format of that name.

    Raises:
        DataError: there is none, or its rows are not read as that kind.
    """
    for entry in FORMATS:
        if entry.name == name:
            if entry in usable:
                return entry
            raise DataError(
                f"data_format {name} holds {PLURAL[entry.kind]}, and what is asked for needs {PLURAL[kind]}: "
                f"{', '.join(known.name for known in usable)}."
            )
    names = [entry.name for entry in usable]
    close = get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise DataError(f"data_format {clip(name)} is not known{hint}. Give auto or one of {', '.join(names)}.")


def not_recognised(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    kind: Kind,
    usable: Sequence[Format],
    own_columns: Sequence[str] | None,
    given: Mapping[str, str],
) -> str:
    """The message when nothing fits: columns seen, near misses, formats known."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    wanted = PLURAL[kind]
    lines = [f"{name}: the format is not recognised: no known format for {wanted} fits more than half of the first {len(rows)} rows."]
    lines.append(f"  columns seen: {', '.join(map(clip, (columns if own_columns is None else own_columns)[:40])) or 'none'}")
    lines += [f"  near: {miss}" for miss in near_misses(rows, columns, usable, kind)]
    mapping = suggested_mapping(rows, columns, usable)
    if mapping:
        mapping = {**given, **{field: given.get(column, column) for field, column in mapping.items()}}
        pairs = ", ".join(f"{field}: {column}" for field, column in mapping.items())
        lines.append(f"  perhaps: columns: {{{pairs}}}")
    if (other := next((entry for entry in FORMATS if sum(map(entry.fits, rows)) * 2 > len(rows)), None)) is not None:
        lines.append(f"  these look like {PLURAL[other.kind]}: {LOOK_LIKE[other.kind]}; what is asked for are {LOOK_LIKE[kind]}.")
    known = [f"{entry.name} ({', '.join(entry.needs)})" for entry in usable]
    lines.append(f"  formats known: {'; '.join(known)}")
    lines.append("Rename columns with `columns: {field: column}`, or name a format with data_format.")
    return "\n".join(lines)


def near_misses(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], usable: Sequence[Format], kind: Kind) -> list[str]:
    """Formats that almost fit, and what keeps them from it: those first that lack no column, then those of the kind asked for."""
    misses: list[tuple[tuple[bool, bool, int], str]] = []
    for entry in usable:
        if entry.read is message_tree and not any(isinstance(row.get("prompt"), dict) for row in rows):
            continue  # most tables have a prompt, and few of those are trees
        missing = [need for need in entry.needs if not entry.has(need, columns)]
        place = (bool(missing), entry.kind != kind, len(missing))
        if not missing:
            misses.append((place, f"{entry.name}: the columns are there, but {misfit(entry, rows)}"))
        elif len(missing) < len(entry.needs):
            misses.append((place, f"{entry.name}: lacks {', '.join(missing)}"))
    return [miss for _, miss in sorted(misses, key=lambda entry: entry[0])][:4]


def misfit(entry: Format, rows: Sequence[Mapping[str, Any]]) -> str:
    """What keeps rows from a format of which they have every column: the column with most values that do not pass, and these."""
    wrong = {need: [value for row in rows if not test(value := entry.value_of(need, row))] for need, test in entry.needs.items()}
    worst = max(wrong, key=lambda need: len(wrong[need]))
    values = wrong[worst]
    often = f"in {len(values)} of {len(rows)} rows"
    if entry.needs[worst] is is_label and any(value is not None for value in values):
        words = list(dict.fromkeys("null" if value is None else clip(value) for value in values))
        return f"`{worst}` is {', '.join(words[:6])}{', …' * (len(words) > 6)} {often}, and must be {LABEL_SAYS}"
    if 2 * sum(map(is_written_list, values)) > len(values):
        return (
            f"`{worst}` is a list written as text {often}. Cells of tables (.csv, .tsv, .xlsx) are text or a number, and no lists are read "
            "from them: give such rows as .jsonl, .json or .parquet"
        )
    return f"`{worst}` is missing or of another type {often}"


def is_written_list(value: object) -> bool:
    """A text that is a list in JSON."""
    return isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]")


def suggested_mapping(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], usable: Sequence[Format]) -> dict[str, str]:
    """The mapping under which most rows would fit a format, tried with names in common use; empty where there is none."""
    for entry in usable:
        mapping: dict[str, str] = {}
        for need in entry.needs:
            is_there = entry.has(need, columns)
            other = next((column for column in columns if not is_there and column.lower() in OTHER_NAMES.get(need, ())), None)
            if other is not None and other not in mapping.values():
                mapping[need] = other
        if mapping and sum(entry.fits(rename(row, mapping)) for row in rows) * 2 > len(rows):
            return mapping
    return {}
