"""Rows into facts: all of them are read and counted, one after the other; the texts of a sample are looked at.

The sample is drawn by prompt, so that all that was said of a prompt is in it or nothing: verdicts that contradict each other stay
together, however large the file is.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import islice
from typing import Any, get_args

from xxhash import xxh64_intdigest

from prefopt.data import sources
from prefopt.data.columns import PROMPTS, is_text
from prefopt.data.counts import Counts
from prefopt.data.examples import Answer, Example
from prefopt.data.files import Source
from prefopt.data.kinds import Kind
from prefopt.data.reading import Read, Reading, readings
from prefopt.data.recognise import LOOKED_AT, candidates, check_columns, check_mapping, columns_of, mapping_for, rename, suggested_mapping
from prefopt.data.rows import NOT_FAULTS, Dropped, Row
from prefopt.data.summary import SourceSummary
from prefopt.errors import DataError
from prefopt.pipeline.advise import content
from prefopt.pipeline.advise.facts import Count, Facts, Held
from prefopt.pipeline.advise.gauge import agreement, content_of, lengths_of, parts_of
from prefopt.pipeline.advise.noise import sided_votes
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
        votes: of each row with votes, those for one side.
        tests, constraints, truths: examples with such columns beside them.
    """

    sample: Sample
    num_examples: int = 0
    num_per_epoch: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    counts: Counts = field(default_factory=Counts)
    votes: list[list[int]] = field(default_factory=list)
    tests: int = 0
    constraints: int = 0
    truths: int = 0

    def take(self, entry: Read | Dropped, times: float) -> None:
        """One more example, of which an epoch takes so many on average, or why there is none."""
        columns = entry.row if isinstance(entry, Dropped) else entry.columns
        # A row of which the votes make a tie gives no pair, and is still one on which people disagree.
        if isinstance(columns, Mapping) and len(votes := sided_votes(columns)) > 1:
            self.votes.append(votes)
        if isinstance(entry, Dropped):
            (self.passed if entry.reason in NOT_FAULTS else self.faults)[entry.reason] += 1
            return
        self.num_examples += 1
        self.num_per_epoch += times
        self.counts.add(entry.example.answers)
        self.sample.add(entry.example, entry.columns)
        self.tests += content.brings(entry.columns, content.TEST_COLUMNS)
        self.constraints += content.brings(entry.columns, content.CONSTRAINT_COLUMNS)
        self.truths += content.brings(entry.columns, content.TRUTH_COLUMNS)


def look(settings: AdviseSettings) -> Facts:
    """What the data is like; nothing of a model.

    Raises:
        DataError: a source cannot be read or is empty, its format is not recognised, `columns` names what is not there, or no row can
            be used.
    """
    opened = [sources.read(place) for place in sources.find(settings.data).places]
    if settings.eval_data:
        sources.find(settings.eval_data)  # it is named in the settings that come out, so it has to be there
    stream = Stream(Sample(settings.sample))
    kind: Held
    try:
        found = readings(opened, settings, "demonstration")  # every format serves as that, so the first that fits is what it is
    except DataError:
        asked = under_our_names(opened, settings.columns)
        if settings.data_format != "auto" or not all(map(holds_prompts, asked)):
            raise
        kind, about = "prompts", [read_prompts(source, stream) for source in asked]
    else:
        kind, about = read_answers(found, stream)
    num_rows = sum(source.num_rows for source in about)
    if not stream.num_examples:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in (stream.faults + stream.passed).most_common())
        raise DataError(f"none of the {num_rows:,} rows can be used ({reasons}). `prefopt data` names each with its reason.")
    examples = stream.sample.examples()
    every = stream.num_examples
    return Facts(
        kind=kind,
        sources=tuple(about),
        num_rows=num_rows,
        num_examples=every,
        num_per_epoch=max(1, round(stream.num_per_epoch)),
        faults=dict(stream.faults.most_common()),
        passed=dict(stream.passed.most_common()),
        sampled=len(examples),
        counts=stream.counts,
        lengths=lengths_of(examples),
        content=content_of(examples, Count(stream.tests, every), Count(stream.constraints, every), Count(stream.truths, every)),
        # A row that is there twice is one verdict, which somebody copied.
        agreement=agreement([example for example in examples if example.location not in stream.sample.copies], stream.votes),
        have=tuple(settings.have),
        has_eval=bool(settings.eval_data),
        eval_fraction=settings.eval_fraction if "eval_fraction" in settings.model_fields_set else None,
    )


def read_answers(found: Sequence[Reading], stream: Stream) -> tuple[Kind, list[SourceSummary]]:
    """Every row of every source, once, as the kind that all of them serve and that says most.

    Args:
        found: the sources.
        stream: gets what is in them.
    """
    common = [kind for kind in ORDER if all(reading.recognised.format.serves(kind) for reading in found)]
    own = {reading.recognised.format.kind for reading in found}
    kind = next((entry for entry in common if entry in own), common[0])
    for reading in found:
        reading.kind = kind
        for entry in reading:
            stream.take(entry, reading.source.times)
    return kind, [reading.summary() for reading in found]


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
    asked = sum(any(is_text(value.get(name)) for name in PROMPTS) for value in values)
    formats = [candidate for kind in get_args(Kind) for candidate in candidates(kind)]
    return 2 * asked > len(rows) > 0 and not suggested_mapping(values, columns_of(rows), formats)


def read_prompts(source: Source, stream: Stream) -> SourceSummary:
    """The prompts of a source that nobody has answered, each with an empty answer, which nobody looks at."""
    number = 0
    for entry in asked_in(source):
        stream.take(entry, source.times)
        number += 1
    return SourceSummary(source.name, "none", "prompts without answers", "no column holds answers", number, ())


def asked_in(source: Source) -> Iterator[Read | Dropped]:
    """Each row's prompt as an example."""
    for row in source.stream():
        if isinstance(row, Dropped):
            yield row
        elif text := next((row.value[name] for name in PROMPTS if is_text(row.value.get(name))), "").strip():
            yield Read(Example(text, (Answer(""),), location=row.location), row.value)
        else:
            yield Dropped(row.location, "no_prompt", "no column holds a question", row.value)
