"""Rows into facts: all of them are read and counted, one after the other; the texts of a sample are looked at.

The sample is drawn by prompt, so that all that was said of a prompt is in it or nothing: verdicts that contradict each other stay
together, however large the file is.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from prefopt.data.recognise import LOOKED_AT, candidates, columns_of, suggested_mapping
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
        kept: digest of the prompt, and the example.
        copies: places of examples whose row is the same as an earlier one in every column.
    """

    most: int
    below: int = SPACE
    num_characters: int = 0
    kept: list[tuple[int, Example]] = field(default_factory=list)
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
        self.kept.append((prompt, example))
        self.num_characters += characters(example)
        while len(self.kept) > self.most or self.num_characters > CHARACTERS_HELD:
            if len({place for place, _ in self.kept}) == 1:  # one prompt alone has more: its first examples stay
                self.num_characters -= characters(self.kept.pop()[1])
                return
            self.below = max(place for place, _ in self.kept)
            self.kept = [entry for entry in self.kept if entry[0] < self.below]
            self.num_characters = sum(characters(example) for _, example in self.kept)


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
        faults, passed: rows that cannot be used, and what says nothing in that kind, by reason.
        counts: thumbs, answers per prompt, ties.
        votes: of each row with votes, those for one side.
        tests, constraints, truths: examples with such columns beside them.
    """

    sample: Sample
    num_examples: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    counts: Counts = field(default_factory=Counts)
    votes: list[list[int]] = field(default_factory=list)
    tests: int = 0
    constraints: int = 0
    truths: int = 0

    def take(self, entry: Read | Dropped) -> None:
        """One more example, or why there is none."""
        columns = entry.row if isinstance(entry, Dropped) else entry.columns
        # A row of which the votes make a tie gives no pair, and is still one on which people disagree.
        if isinstance(columns, Mapping) and len(votes := sided_votes(columns)) > 1:
            self.votes.append(votes)
        if isinstance(entry, Dropped):
            (self.passed if entry.reason in NOT_FAULTS else self.faults)[entry.reason] += 1
            return
        self.num_examples += 1
        self.counts.add(entry.example.answers)
        self.sample.add(entry.example, entry.columns)
        self.tests += content.brings(entry.columns, content.TEST_COLUMNS)
        self.constraints += content.brings(entry.columns, content.CONSTRAINT_COLUMNS)
        self.truths += content.brings(entry.columns, content.TRUTH_COLUMNS)


def look(settings: AdviseSettings) -> Facts:
    """What the data is like; nothing of a model.

    Raises:
        DataError: a source cannot be read or is empty, its format is not recognised, no row can be used, or the sources have no kind of
            data in common.
    """
    opened = [sources.read(place) for place in sources.find(settings.data).places]
    if settings.eval_data:
        sources.find(settings.eval_data)  # it is named in the settings that come out, so it has to be there
    stream = Stream(Sample(settings.sample))
    kind: Held
    try:
        found = readings(opened, settings, "demonstration")  # every format serves as that, so the first that fits is what it is
    except DataError:
        if settings.data_format != "auto" or not all(map(holds_prompts, opened)):
            raise
        kind, about = "prompts", [read_prompts(source, stream) for source in opened]
    else:
        kind, about = read_answers(found, stream)
    num_rows = sum(source.num_rows for source in about)
    if not stream.num_examples:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in (stream.faults + stream.passed).most_common())
        raise DataError(f"none of the {num_rows:,} rows can be used ({reasons}). `prefopt data` names each with its reason.")
    examples = [example for _, example in stream.sample.kept]
    every = stream.num_examples
    return Facts(
        kind=kind,
        sources=tuple(about),
        num_rows=num_rows,
        num_examples=every,
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
            stream.take(entry)
    return kind, [reading.summary() for reading in found]


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
        stream.take(entry)
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
