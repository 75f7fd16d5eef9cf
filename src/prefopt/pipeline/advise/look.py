"""Rows into facts: all of them are read and counted, one after the other; the texts of a sample are looked at.

The sample is drawn by prompt, so that all that was said of a prompt is in it or nothing: verdicts that contradict each other stay
together, however large the file is.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from xxhash import xxh64_intdigest

from prefopt.data import sources
from prefopt.data.columns import PROMPTS, is_text
from prefopt.data.counts import Counts
from prefopt.data.examples import Answer, Example
from prefopt.data.files import Source
from prefopt.data.formats import FORMATS
from prefopt.data.kinds import PLURAL, Kind
from prefopt.data.learning import opening_of
from prefopt.data.reading import Read, Reading, readings
from prefopt.data.recognise import (
    LOOKED_AT,
    candidates,
    check_columns,
    check_mapping,
    columns_of,
    first_fit,
    mapping_for,
    rename,
    suggested_mapping,
)
from prefopt.data.rows import NOT_FAULTS, Dropped, Row, clip
from prefopt.data.summary import SourceSummary
from prefopt.data.thumbs import LISTS
from prefopt.errors import DataError
from prefopt.pipeline.advise import content
from prefopt.pipeline.advise.facts import Beside, Count, Facts, Held, Thumbs
from prefopt.pipeline.advise.gauge import agreement, content_of, graded_of, lengths_of, parts_of
from prefopt.pipeline.advise.noise import votes_of
from prefopt.pipeline.advise.settings import AdviseSettings

ORDER: tuple[Kind, ...] = ("ranked", "pair", "thumbs", "demonstration")
"""Kinds, the one that says most first."""

CHARACTERS_HELD = 2**28
"""Characters of texts that are held in memory: some 300 MB."""

SPACE = 2**64


@dataclass(slots=True)
class Sample:
    """Examples of as many prompts as there is room for, drawn by a digest of the prompt: of each prompt all, or none.

    Attributes:
        most: examples that are kept.
        below: digests of prompts that are drawn.
        num_added, num_kept, num_characters: examples that were drawn, those that are kept, and the characters of these.
        kept: digest of a prompt -> its examples, each with the number under which it was added.
        heap: the digests of `kept`, negative, so that the largest is at hand.
        copies: places of examples whose row is the same as an earlier one in every column.
    """

    most: int
    below: int = SPACE
    num_added: int = 0
    num_kept: int = 0
    num_characters: int = 0
    kept: dict[int, list[tuple[int, Example]]] = field(default_factory=dict)
    heap: list[int] = field(default_factory=list)
    copies: set[str] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)

    def add(self, example: Example, columns: Mapping[str, Any]) -> None:
        """One more, if its prompt is drawn; the draw gets stricter when there is no more room."""
        prompt = digest(group_of(example))
        if prompt >= self.below:
            return
        row = digest(repr((columns, example.answers)))
        if row in self.rows:
            self.copies.add(example.location)
        self.rows.add(row)
        if prompt not in self.kept:
            heappush(self.heap, -prompt)
        self.kept.setdefault(prompt, []).append((self.num_added, example))
        self.num_added += 1
        self._count(example, 1)
        while self.num_kept > self.most or self.num_characters > CHARACTERS_HELD:
            if len(self.kept) == 1:  # one prompt alone has more: its first examples stay
                ((alone, own),) = self.kept.items()
                self._count(own.pop()[1], -1)
                if not own:
                    del self.kept[alone], self.heap[:]
                return
            self.below = -heappop(self.heap)
            for _, gone in self.kept.pop(self.below):
                self._count(gone, -1)

    def _count(self, example: Example, sign: int) -> None:
        self.num_kept += sign
        self.num_characters += sign * characters(example)

    def examples(self) -> list[Example]:
        """What is kept, in the order in which it was added."""
        return [example for _, example in sorted((entry for own in self.kept.values() for entry in own), key=lambda entry: entry[0])]


def digest(text: str) -> int:
    """Of 64 bits."""
    return xxh64_intdigest(text.encode(errors="surrogatepass"))


def group_of(example: Example) -> str:
    """The prompt; where there is none, the answers in any order."""
    prompt, *answers = parts_of(example)
    return prompt if prompt.strip() else "\0".join(sorted(answers))


def characters(example: Example) -> int:
    """Of prompt and answers."""
    return sum(map(len, parts_of(example)))


@dataclass(slots=True)
class Stream:
    """What was gathered of all rows.

    Attributes:
        sample: examples of the kind that is advised on.
        num_examples: of that kind.
        num_per_epoch: those, each as often as an epoch takes it.
        faults, passed: rows that cannot be used, and what says nothing in that kind, by reason.
        counts: thumbs, answers per prompt, ties.
        votes: of each row with votes, those for one side; ties: votes for neither.
        weight: of all examples.
        openings: what they open with, two of them at most.
        up, down: weights of thumbs, as often as an epoch takes them.
        num_beside, beside_per_epoch: good answers of sources that the method cannot read beside the others.
        strays: rows of another kind than their source, by kind.
        tests, constraints, truths: examples with such columns beside them.
    """

    sample: Sample
    num_examples: int = 0
    num_per_epoch: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    counts: Counts = field(default_factory=Counts)
    votes: list[list[int]] = field(default_factory=list)
    ties: int = 0
    weight: float = 0.0
    openings: set[str] = field(default_factory=set)
    up: float = 0.0
    down: float = 0.0
    num_beside: int = 0
    beside_per_epoch: float = 0.0
    strays: Counter[Kind] = field(default_factory=Counter)
    tests: int = 0
    constraints: int = 0
    truths: int = 0

    def take(self, entry: Read | Dropped, times: float, own: Kind | None = None) -> None:
        """One more example, of which an epoch takes so many on average, or why there is none.

        Args:
            entry: what the row is.
            times: how often an epoch takes it.
            own: the kind of its source; None: it has none.
        """
        columns = entry.row if isinstance(entry, Dropped) else entry.columns
        # A row of which the votes make a tie gives no pair, and is still one on which people disagree.
        if isinstance(columns, Mapping):
            votes, ties = votes_of(columns)
            self.votes += [votes] if len(votes) > 1 else []
            self.ties += ties
        if isinstance(entry, Dropped):
            self.leave(entry, own)
            return
        self.num_examples += 1
        self.num_per_epoch += times
        self.weight += entry.example.weight
        if len(self.openings) < 2:
            self.openings.add(opening_of(entry.example))
        self.counts.add(entry.example.answers)
        for answer in entry.example.answers:
            self.up += times * entry.example.weight * (answer.label is True)
            self.down += times * entry.example.weight * (answer.label is False)
        self.sample.add(entry.example, entry.columns)
        self.tests += content.brings(entry.columns, content.TEST_COLUMNS)
        self.constraints += content.brings(entry.columns, content.CONSTRAINT_COLUMNS)
        self.truths += content.brings(entry.columns, content.TRUTH_COLUMNS)

    def leave(self, entry: Dropped, own: Kind | None) -> None:
        """One that is left out; where it would be right in a file of its own kind, that is noted too."""
        if entry.reason in NOT_FAULTS:
            self.passed[entry.reason] += 1
            return
        self.faults[entry.reason] += 1
        other = first_fit(entry.row, FORMATS) if isinstance(entry.row, Mapping) else None
        if other is not None and own not in (None, other.kind):
            self.strays[other.kind] += 1

    def take_beside(self, entry: Read | Dropped, times: float, own: Kind) -> None:
        """One more good answer of a source of which nothing else is read, or why there is none."""
        if isinstance(entry, Dropped):
            self.leave(entry, own)
        else:
            self.num_beside += 1
            self.beside_per_epoch += times


def look(settings: AdviseSettings) -> Facts:
    """What the data is like; nothing of a model.

    Raises:
        DataError: a source cannot be read or is empty, its format is not recognised, `columns` names what is not there, or no row can
            be used.
    """
    opened = [sources.read(place) for place in sources.find(settings.data).places]
    data: tuple[str, ...] = tuple(settings.data)
    beside: tuple[str, ...] = ()
    if settings.eval_data:
        sources.find(settings.eval_data)  # it is named in the settings that come out, so it has to be there
    stream = Stream(Sample(settings.sample))
    kind: Held
    num_contrary = 0
    try:
        found = readings(opened, settings, "demonstration")  # every format serves as that, so the first that fits is what it is
    except DataError:
        asked = under_our_names(opened, settings.columns)
        for source in asked:
            check_one_kind(source)
        if settings.data_format != "auto" or not all(map(holds_prompts, asked)):
            raise
        kind, about = "prompts", [read_prompts(source, stream) for source in asked]
    else:
        judged, rest = apart(found)
        kind = read_answers(judged, rest, stream)
        about = [reading.summary() for reading in found]
        num_contrary = sum(reading.num_contrary for reading in judged)
        if rest:
            data = tuple(text for text, reading in zip(texts_of(settings.data), found, strict=True) if reading in judged)
            beside = tuple(reading.source.name for reading in rest)
    num_rows = sum(source.num_rows for source in about)
    if not stream.num_examples:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in (stream.faults + stream.passed).most_common())
        raise DataError(f"none of the {num_rows:,} rows can be used ({reasons}). `prefopt data` names each with its reason.")
    examples = stream.sample.examples()
    every = stream.num_examples
    copies = stream.sample.copies
    num_copies = sum(example.location in copies for example in examples) if kind in ("pair", "ranked", "thumbs") else None
    return Facts(
        kind=kind,
        data=data,
        sources=tuple(about),
        num_rows=num_rows,
        num_examples=every,
        num_per_epoch=max(1, round(stream.num_per_epoch)),
        faults=dict(stream.faults.most_common()),
        passed=dict(stream.passed.most_common()),
        sampled=len(examples),
        counts=stream.counts,
        lengths=lengths_of(examples),
        content=content_of(examples, num_copies, *(Count(number, every) for number in (stream.tests, stream.constraints, stream.truths))),
        agreement=agreement(examples, stream.votes, stream.ties, copies),
        thumbs=Thumbs(stream.up, stream.down, *graded_of(examples)) if kind == "thumbs" else Thumbs(),
        beside=Beside(beside, stream.num_beside, max(1, round(stream.beside_per_epoch))) if beside else Beside(),
        strays=dict(stream.strays.most_common()),
        unread=tuple(dict.fromkeys(column for source in about for column in source.unread_columns if column not in content.COLUMNS)),
        contrary=Count(num_contrary, num_rows),
        weight=stream.weight,
        one_opening=len(stream.openings) == 1,
        have=tuple(settings.have),
        has_eval=bool(settings.eval_data),
        eval_fraction=settings.eval_fraction if "eval_fraction" in settings.model_fields_set else None,
    )


def apart(found: Sequence[Reading]) -> tuple[list[Reading], list[Reading]]:
    """The sources that a method reads together, and those beside them of which it could read nothing but the good answers.

    What says better or worse goes before demonstrations; where sources differ in what they say, the kind that most of them serve.
    """
    kinds = {kind: [reading for reading in found if reading.recognised.format.serves(kind)] for kind in ORDER}
    own = {reading.recognised.format.kind for reading in found}
    judged = [kinds[kind] for kind in ORDER if kind in own and kind != "demonstration"]
    together = max(judged, key=len) if judged else list(found)
    return together, [reading for reading in found if reading not in together]


def read_answers(judged: Sequence[Reading], rest: Sequence[Reading], stream: Stream) -> Kind:
    """Every row of every source, once: those that are judged as the kind that all of them serve and that says most.

    Args:
        judged, rest: the sources, as `apart` has them.
        stream: gets what is in them.
    """
    common = [kind for kind in ORDER if all(reading.recognised.format.serves(kind) for reading in judged)]
    own = {reading.recognised.format.kind for reading in judged}
    kind = next((entry for entry in common if entry in own), common[0])
    for reading in judged:
        reading.kind = kind
        for entry in reading:
            stream.take(entry, reading.source.times, reading.recognised.format.kind)
    for reading in rest:
        reading.kind = "demonstration"
        for entry in reading:
            stream.take_beside(entry, reading.source.times, reading.recognised.format.kind)
    return kind


def texts_of(data: Sequence[str]) -> list[str]:
    """For each source what names it alone, as it is given to a run: of a folder its files."""
    texts = []
    for item in data:
        places = sources.find([item]).places
        inside = [str(replace(place.given, name=str(Path(place.given.name) / place.name))) for place in places]
        texts += [item] if len(places) == 1 else inside
    return texts


def check_one_kind(source: Source) -> None:
    """Refuses rows of several kinds of which none is the most frequent.

    Raises:
        DataError: says how many of each there are.
    """
    rows = [row.value for row in islice(source.stream(), LOOKED_AT) if isinstance(row, Row)]
    found = Counter(entry.kind for value in rows if (entry := first_fit(value, FORMATS)) is not None)
    if len(found) > 1 and 2 * max(found.values()) <= len(rows):
        each = ", ".join(f"{number} are {PLURAL[kind]}" for kind, number in found.most_common())
        raise DataError(
            f"{source.name} holds several kinds of data: of the first {len(rows)} rows {each}. A file is read as one kind, and the rest of "
            "it would be lost: give a file for each kind, all of them together."
        )


def under_our_names(opened: Sequence[Source], columns: Mapping[str, str]) -> list[Source]:
    """The sources with their columns under our names.

    Raises:
        DataError: there is no such field, or no source has such a column.
    """
    if not columns:
        return [*opened]
    check_mapping(columns)
    seen = {source.name: columns_of(source.stream()) for source in opened}
    check_columns(seen, columns)
    return [renamed(source, mapping_for(seen[source.name], columns)) for source in opened]


def renamed(source: Source, mapping: Mapping[str, str]) -> Source:
    """The source with its columns under other names, as `field: column`."""

    def rows() -> Iterator[Row | Dropped]:
        for row in source.parse():
            yield row if isinstance(row, Dropped) else Row(row.location, rename(row.value, mapping))

    return replace(source, parse=rows)


def holds_prompts(source: Source) -> bool:
    """Whether most rows hold a question, and nothing that could be meant as an answer."""
    rows = [row for row in islice(source.stream(), LOOKED_AT) if isinstance(row, Row)]
    values = [row.value for row in rows]
    if 2 * sum(any(isinstance(value.get(name), list) and value[name] for name in LISTS) for value in values) > len(rows):
        return False  # lists of answers, if of one each
    asked = sum(any(is_text(value.get(name)) for name in PROMPTS) for value in values)
    formats = [candidate for kind in get_args(Kind) for candidate in candidates(kind)]
    return 2 * asked > len(rows) > 0 and not suggested_mapping(values, columns_of(rows), formats)


def read_prompts(source: Source, stream: Stream) -> SourceSummary:
    """The prompts of a source that nobody has answered, each with an empty answer, which nobody looks at."""
    number = 0
    columns: dict[str, None] = {}
    for entry in asked_in(source):
        stream.take(entry, source.times)
        number += 1
        columns |= dict.fromkeys(entry.columns if isinstance(entry, Read) else ())
    unread = tuple(column for column in map(clip, columns) if column not in PROMPTS)
    return SourceSummary(source.name, "none", "prompts without answers", "no column holds answers", number, unread)


def asked_in(source: Source) -> Iterator[Read | Dropped]:
    """Each row's prompt as an example."""
    for row in source.stream():
        if isinstance(row, Dropped):
            yield row
        elif text := next((row.value[name] for name in PROMPTS if is_text(row.value.get(name))), "").strip():
            yield Read(Example(text, (Answer(""),), location=row.location), row.value)
        else:
            yield Dropped(row.location, "no_prompt", "no column holds a question", row.value)
