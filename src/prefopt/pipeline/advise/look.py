"""Rows into facts: all of them are read and counted, one after the other; the texts of a sample are looked at.

The sample is drawn by prompt, so that all that was said of a prompt is in it or nothing: verdicts that contradict each other stay
together, however large the file is. What is counted of prompts that resemble each other is too low where not all are in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, get_args

from xxhash import xxh64_intdigest

from prefopt.data import sources
from prefopt.data.columns import PROMPTS, is_text
from prefopt.data.examples import Answer, Example
from prefopt.data.files import Source
from prefopt.data.kinds import Kind
from prefopt.data.reading import Reading, readings
from prefopt.data.recognise import LOOKED_AT, candidates, columns_of, suggested_mapping
from prefopt.data.rows import NOT_FAULTS, Dropped, Row
from prefopt.data.summary import SourceSummary
from prefopt.errors import DataError
from prefopt.pipeline.advise import content
from prefopt.pipeline.advise.content import words_of
from prefopt.pipeline.advise.facts import Content, Copies, Count, Facts, Lengths, Spread, Tally
from prefopt.pipeline.advise.gauge import agreement, alike_answers, content_of, copies_of, lengths_of
from prefopt.pipeline.advise.noise import sided_votes
from prefopt.pipeline.advise.settings import AdviseSettings

ORDER: tuple[Kind, ...] = ("ranked", "pair", "thumbs", "demonstration")
"""Kinds, the one that says most first."""

CHARACTERS_HELD = 2**28
"""Characters of texts that are held in memory: some 300 MB."""

SPACE = 2**64


class Sample:
    """Examples of as many prompts as there is room for, drawn by a digest of the prompt and the seed: of each prompt all, or none.

    Args:
        most: examples that are kept.
        seed: of the draw.

    Attributes:
        copies: places of examples whose row is the same as an earlier one in every column.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.seed = most, seed
        self.below = SPACE
        self.num_characters = 0
        self.kept: list[tuple[int, Example]] = []
        self.copies: set[str] = set()
        self._rows: set[int] = set()

    def add(self, example: Example, row: object) -> None:
        """One more, if its prompt is drawn; the draw gets stricter when there is no more room.

        Args:
            example: to be kept.
            row: whatever tells it from an example that is a copy of it, down to the last column.
        """
        place = xxh64_intdigest(group_of(example).encode(errors="surrogatepass"), seed=self.seed % 2**32)
        if place >= self.below:
            return
        digest = xxh64_intdigest(repr(row).encode(errors="surrogatepass"))
        if digest in self._rows:
            self.copies.add(example.location)
        self._rows.add(digest)
        self.kept.append((place, example))
        self.num_characters += characters(example)
        while len(self.kept) > self.most or self.num_characters > CHARACTERS_HELD:
            if len({place for place, _ in self.kept}) == 1:  # one prompt alone has more: its first examples stay
                self.num_characters -= characters(self.kept.pop()[1])
                return
            self.below = max(place for place, _ in self.kept)
            self.kept = [entry for entry in self.kept if entry[0] < self.below]
            self.num_characters = sum(characters(example) for _, example in self.kept)

    @property
    def examples(self) -> list[Example]:
        """What is in it, in the order of the rows."""
        return [example for _, example in self.kept]


def group_of(example: Example) -> str:
    """The prompt; where there is none, the answers in any order."""
    prompt = words_of(example.prompt)
    return prompt if prompt.strip() else "\0".join(sorted(words_of(answer.content) for answer in example.answers))


def characters(example: Example) -> int:
    """Of prompt and answers."""
    return len(words_of(example.prompt)) + sum(len(words_of(answer.content)) for answer in example.answers)


@dataclass(slots=True)
class Stream:
    """What was gathered of all rows.

    Attributes:
        tally: their numbers.
        sample: examples of the kind that is advised on.
        votes: of each row with votes, those for one side.
        tests, instructions, truths: rows with such columns.
    """

    sample: Sample
    tally: Tally = field(default_factory=Tally)
    votes: list[list[int]] = field(default_factory=list)
    tests: int = 0
    instructions: int = 0
    truths: int = 0

    def note(self, columns: Mapping[str, Any]) -> None:
        """What a row has beside its example."""
        self.tests += content.brings(columns, content.TEST_COLUMNS)
        self.instructions += content.brings(columns, content.INSTRUCTION_COLUMNS)
        self.truths += content.brings(columns, content.TRUTH_COLUMNS)


def look(settings: AdviseSettings) -> Facts:
    """What the data is like; nothing of a model.

    Raises:
        DataError: a source cannot be read or is empty, its format is not recognised, no row can be used, or the sources have no kind of
            data in common.
    """
    opened = [sources.read(place) for place in sources.find(settings.data).places]
    try:
        found = readings(opened, settings, "demonstration")  # every format serves as that, so the first that fits is what it is
    except DataError:
        if settings.data_format == "auto" and all(map(holds_prompts, opened)):
            return prompts_alone(opened, settings)
        raise
    common = {kind for kind in ORDER if all(reading.recognised.format.serves(kind) for reading in found)}
    own = {reading.recognised.format.kind for reading in found} & common
    kind = next(entry for entry in ORDER if entry in (own or common))
    for reading in found:
        reading.kind = kind
    stream = run_through(found, [entry for entry in ORDER if entry in common], settings)
    check_any(stream)
    held = eval_examples(settings, kind) if settings.eval_data else None
    examples = stream.sample.examples
    # A row that is there twice is one verdict, which somebody copied.
    voted, voters = agreement([example for example in examples if example.location not in stream.sample.copies], stream.votes)
    tally = stream.tally
    return Facts(
        kind=kind,
        sources=tuple(reading.summary() for reading in found),
        num_rows=tally.num_rows,
        serves=tally.serves,
        num_examples=tally.serves[kind],
        faults=tally.faults,
        passed=tally.passed,
        sampled=len(examples),
        counts=tally.counts,
        lengths=lengths_of(examples),
        copies=copies_of(examples, held, fraction=settings.eval_fraction, seed=settings.seed),
        content=content_of(examples, tally.num_rows, stream.tests, stream.instructions, stream.truths),
        agreement=voted,
        voters=voters,
        alike=alike_answers(examples),
        have=tuple(settings.have),
        has_eval=held is not None,
    )


def run_through(found: Sequence[Reading], kinds: Sequence[Kind], settings: AdviseSettings) -> Stream:
    """Every row of every source, once.

    Args:
        found: the sources, to be read as the kind that is advised on.
        kinds: as which rows are counted.
        settings: how many examples are kept.
    """
    stream = Stream(Sample(settings.sample, settings.seed))
    tally = stream.tally
    tally.serves = dict.fromkeys(kinds, 0)
    for reading in found:
        for row in reading.rows():
            tally.num_rows += 1
            if isinstance(row, Dropped):
                tally.faults[row.reason] = tally.faults.get(row.reason, 0) + 1
                continue
            stream.note(row.value)
            if len(votes := sided_votes(row.value)) > 1:
                stream.votes.append(votes)
            for kind in kinds:
                made = reading.examples_of(row, kind)
                tally.serves[kind] += sum(not isinstance(entry, Dropped) for entry in made)
                for part, entry in enumerate(made if kind == reading.kind else ()):
                    if isinstance(entry, Dropped):
                        reasons = tally.passed if entry.reason in NOT_FAULTS else tally.faults
                        reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
                    else:
                        tally.counts.add(entry.example.answers)
                        stream.sample.add(entry.example, (part, row.value))
    return stream


def check_any(stream: Stream) -> None:
    """Without an example there is nothing to advise on.

    Raises:
        DataError: no row can be used.
    """
    if not stream.sample.kept:
        reasons = ", ".join(f"{reason} {number}" for reason, number in {**stream.tally.faults, **stream.tally.passed}.items())
        raise DataError(f"none of the {stream.tally.num_rows} rows can be used ({reasons}). `prefopt data` names each with its reason.")


def eval_examples(settings: AdviseSettings, kind: Kind) -> list[Example]:
    """A sample of the held-out examples, read as the others are.

    Raises:
        DataError: as `look`.
    """
    found = readings([sources.read(place) for place in sources.find(settings.eval_data).places], settings, kind)
    stream = run_through(found, [kind], settings)
    check_any(stream)
    return stream.sample.examples


def holds_prompts(source: Source) -> bool:
    """Whether most rows hold a question, and nothing that could be meant as an answer."""
    rows = [row for row in islice(source.stream(), LOOKED_AT) if isinstance(row, Row)]
    values = [row.value for row in rows]
    asked = sum(any(is_text(value.get(name)) for name in PROMPTS) for value in values)
    formats = [candidate for kind in get_args(Kind) for candidate in candidates(kind)]
    return 2 * asked > len(rows) > 0 and not suggested_mapping(values, columns_of(rows), formats)


def prompts_alone(opened: Sequence[Source], settings: AdviseSettings) -> Facts:
    """What there is to say of prompts that nobody has answered."""
    stream = Stream(Sample(settings.sample, settings.seed))
    tally, about = stream.tally, []
    for source in opened:
        before = tally.num_rows
        for example in asked_in(source, stream):
            stream.sample.add(example, example.prompt)
        about.append(SourceSummary(source.name, "none", "prompts without answers", "no column holds answers", tally.num_rows - before, ()))
    check_any(stream)
    examples = stream.sample.examples
    spread = Spread.of([len(words_of(example.prompt)) for example in examples])
    found = copies_of(examples, None, fraction=settings.eval_fraction, seed=settings.seed)
    nothing = Count(0, len(examples))
    texts = [words_of(example.prompt) for example in examples]
    return Facts(
        kind="prompts",
        sources=tuple(about),
        num_rows=tally.num_rows,
        serves={},
        num_examples=tally.num_rows - sum(tally.faults.values()),
        faults=tally.faults,
        passed={},
        sampled=len(examples),
        counts=tally.counts,
        lengths=Lengths("characters", spread, Spread(), spread, 1.0),
        copies=Copies(found.repeated, found.near, found.prompts, found.near_prompts, found.leaks, found.held_out),
        content=Content(
            content.scripts_of(texts),
            Count(sum(map(content.is_broken, texts)), len(texts)),
            nothing,
            nothing,
            Count(stream.tests, tally.num_rows),
            Count(stream.instructions, tally.num_rows),
            Count(stream.truths, tally.num_rows),
            Count(len(texts), len(texts)),
        ),
        have=tuple(settings.have),
    )


def asked_in(source: Source, stream: Stream) -> Iterator[Example]:
    """The prompts of a source, each with an empty answer, which nobody looks at."""
    tally = stream.tally
    for row in source.stream():
        tally.num_rows += 1
        text = None if isinstance(row, Dropped) else next((row.value[name] for name in PROMPTS if is_text(row.value.get(name))), None)
        if isinstance(row, Dropped) or text is None or not text.strip():
            reason = row.reason if isinstance(row, Dropped) else "no_prompt"
            tally.faults[reason] = tally.faults.get(reason, 0) + 1
            continue
        stream.note(row.value)
        yield Example(text, (Answer(""),), location=row.location)
