"""Sources as checked examples, row by row, so that no source need fit into memory.

What must be known of all rows at the end (their number, columns that nobody reads, what was left out) is gathered on the way.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice, permutations
from typing import Any

from prefopt.data.columns import is_turn
from prefopt.data.examples import TURN_KEYS, Example, Fields
from prefopt.data.files import Source
from prefopt.data.kinds import SAYS, Kind, PairsOfRanks
from prefopt.data.recognise import LOOKED_AT, Recognised, check_columns, check_mapping, columns_of, mapping_for, recognise, rename
from prefopt.data.rows import Dropped, Row, RowFault, clip
from prefopt.data.settings import DataSettings, PairSettings
from prefopt.data.summary import SourceSummary


@dataclass(frozen=True, slots=True)
class Read:
    """An example of a row.

    Attributes:
        example: the example.
        columns: the row it was read from, under our names.
    """

    example: Example
    columns: Mapping[str, Any]


@dataclass(slots=True)
class Reading:
    """One source whose format is known.

    Attributes:
        source, recognised, mapping, kind, pairs_of_ranks: what is read, and how.
        num_rows: read so far, bad ones included.
        num_more: further examples, and parts left out, of rows that gave one already.
        num_contrary: rows whose scores contradict the order of their answers.
        columns: seen so far, in the order of their first use.
        unread_in_turns: what turns hold beside role and content.
    """

    source: Source
    recognised: Recognised
    mapping: Mapping[str, str]
    kind: Kind
    pairs_of_ranks: PairsOfRanks = "all"
    num_rows: int = 0
    num_more: int = 0
    num_contrary: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    unread_in_turns: dict[str, None] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Read | Dropped]:
        """What its rows are, good or bad, in order.

        Raises:
            DataError: it is damaged.
        """
        read = self._columns_read()
        for found in self.source.stream():
            self.num_rows += 1
            if isinstance(found, Dropped):
                yield found
                continue
            row = Row(found.location, rename(found.value, self.mapping))
            self.columns.update(dict.fromkeys(row.value))
            note_unread(row.value, read, self.unread_in_turns)
            examples = self._examples(row)
            self.num_more += len(examples) - 1
            self.num_contrary += is_contrary([entry.example for entry in examples if isinstance(entry, Read)])
            yield from examples

    def again(self) -> "Reading":
        """The same from the first row on, with nothing gathered."""
        return Reading(self.source, self.recognised, self.mapping, self.kind, self.pairs_of_ranks)

    def summary(self) -> SourceSummary:
        """What there is to say about it when all was read."""
        entry = self.recognised.format
        read = self._columns_read()
        unread = [column for column in self.columns if column not in read] + sorted(self.unread_in_turns)
        changed = SAYS.get((entry.kind, self.kind))
        says = f"{entry.says}, {changed}" if changed else entry.says
        return SourceSummary(self.source.name, entry.name, says, self.recognised.because, self.num_rows, tuple(map(clip, unread)))

    def _columns_read(self) -> set[str]:
        return {*self.recognised.format.fields} - ({"rejected"} if self.kind == "demonstration" else set())

    def _examples(self, row: Row) -> list[Read | Dropped]:
        try:
            found = self.recognised.format.examples(Fields(row.value), self.kind, self.pairs_of_ranks)
        except RowFault as fault:
            return [Dropped(row.location, fault.reason, fault.detail, row.value)]
        return [
            Dropped(location, entry.reason, entry.detail, row.value)
            if isinstance(entry, RowFault)
            else Read(replace(entry, location=location), row.value)
            for location, entry in zip(row.parts(len(found)), found, strict=True)
        ]


def readings(opened: Sequence[Source], settings: DataSettings, kind: Kind) -> list[Reading]:
    """The sources, their formats recognised by their first rows.

    Raises:
        DataError: a source is damaged or empty, its format is not recognised, or `columns` names a field that no format
            has or a column that no source has.
    """
    check_mapping(settings.columns)
    first = [list(islice(source.stream(), LOOKED_AT)) for source in opened]
    # A column may be there in a later row alone.
    seen = [columns_of(source.stream()) if settings.columns else [] for source in opened]
    check_columns({source.name: columns for source, columns in zip(opened, seen, strict=True)}, settings.columns)
    found = []
    for source, own_rows, columns in zip(opened, first, seen, strict=True):
        mapping = mapping_for(columns, settings.columns)
        rows = [row if isinstance(row, Dropped) else Row(row.location, rename(row.value, mapping)) for row in own_rows]
        named = source.data_format or settings.data_format
        recognised = recognise(source.name, rows, kind, named, own_columns=columns_of(own_rows), mapping=mapping)
        found.append(Reading(source, recognised, mapping, kind, pairs_of(settings)))
    return found


def pairs_of(settings: DataSettings) -> PairsOfRanks:
    """Which pairs a ranking comes to."""
    return settings.pairs_of_ranks if isinstance(settings, PairSettings) else "all"


def is_contrary(examples: Sequence[Example]) -> bool:
    """Whether of a row's answers one that is worse, by rank or thumb, brings the higher score.

    Args:
        examples: of the row: a pair, a ranking, the pairs of one, or single answers.
    """
    single = [example.answers[0] for example in examples if len(example.answers) == 1]
    together = [example.answers for example in examples if len(example.answers) > 1]
    for answers in (single, *together):
        scored = [(answer.label if answer.rank is None else -answer.rank, answer.reward) for answer in answers]
        known = [(merit, score) for merit, score in scored if merit is not None and score is not None]
        if any(one > other and own < its for (one, own), (other, its) in permutations(known, 2)):
            return True
    return False


def note_unread(columns: Mapping[str, Any], read: Set[str], found: dict[str, None]) -> None:
    """Note what turns hold beside role and content, as `column[].key`: a model's thoughts, names, weights of turns."""
    for column in read & columns.keys():
        value = columns[column]
        for turn in value if isinstance(value, list) else [value]:
            if is_turn(turn) and not turn.keys() <= TURN_KEYS and not turn.keys().isdisjoint(("content", "value")):
                found |= dict.fromkeys(f"{column}[].{key}" for key, entry in turn.items() if key not in TURN_KEYS and entry is not None)
