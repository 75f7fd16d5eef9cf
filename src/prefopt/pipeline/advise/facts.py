"""What is known of the data and of the model: figures, and nothing that is concluded from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from prefopt.data.counts import Counts
from prefopt.data.kinds import Kind
from prefopt.data.summary import SourceSummary
from prefopt.pipeline.advise.noise import Agreement

Held = Kind | Literal["prompts"]
"""The kinds of data, and prompts without answers."""

Unit = Literal["characters", "tokens"]


@dataclass(frozen=True, slots=True)
class Count:
    """So many of so many."""

    num: int = 0
    of: int = 0

    @property
    def share(self) -> float:
        """In [0, 1]; 0 of nothing is 0."""
        return self.num / self.of if self.of else 0.0

    def __format__(self, noun: str) -> str:
        """With what is counted: `f"{Count(3, 12):pairs}"` is `3 of 12 pairs (25 %)`."""
        if not self.num:
            return f"none of {self.of:,} {noun}"
        return f"all {self.of:,} {noun}" if self.num == self.of else f"{self.num:,} of {self.of:,} {noun} ({percent(self.share)})"


def percent(share: float) -> str:
    """A share for people: two digits below ten percent; what is there is never 0 %, and what lacks something never 100 %."""
    if 0 < share < 0.001:
        return "below 0.1 %"
    if 0.999 < share < 1:
        return "above 99.9 %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.{1 if 0.99 < share < 1 else 0}f} %"


def counted(number: int, nouns: str) -> str:
    """`1 pair`, `2,000 pairs`; of one the last letter goes."""
    return f"{number:,} {nouns if number != 1 else nouns[:-1]}"


@dataclass(frozen=True, slots=True)
class Spread:
    """How long texts are: the median, and what 95 and 99 in 100 have at most."""

    median: int = 0
    p95: int = 0
    p99: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Spread":
        """Of these lengths."""
        if not len(lengths):
            return cls()
        return cls(*(round(float(number)) for number in np.percentile(np.asarray(lengths), [50, 95, 99])))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts and answers are.

    Attributes:
        unit: of all figures.
        prompt, answer, together: of prompts, of answers, and of a prompt with its longest answer.
        prompt_share: share of all that would be read without sharing that is prompt.
        longer_chosen: pairs whose chosen answer is the longer one, of those that differ in length.
        too_long: examples whose prompt is cut to fit in `max_length`, or that are left out; known in tokens only.
        limit: that length, as it was given or as far as the model reads; 0: no tokens were counted.
        uncut: tokens that 99 in 100 examples have at most, uncut; told from their characters.
    """

    unit: Unit
    prompt: Spread
    answer: Spread
    together: Spread
    prompt_share: float
    longer_chosen: Count = Count()
    too_long: Count = Count()
    uncut: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Content:
    """What the texts are.

    Attributes:
        languages: language in Latin letters, or other script -> share of all letters.
        raw: examples that are plain text, not a chat. unprompted: examples with no words before the answer.
        repeated: copies of an earlier example: of what is judged rows that are the same in every column, since another verdict on the
            same answers is none; else the same texts. near: different ones that are near copies of an earlier one.
        alike: pairs whose two answers are near copies of each other.
        numeric, code: good answers that end in a final answer, a number or in a box; that hold code.
        tests, constraints, truths: examples beside which the data has tests of code, names of constraints, the right answer.
    """

    languages: Mapping[str, float] = field(default_factory=dict)
    raw: Count = Count()
    repeated: Count = Count()
    near: Count = Count()
    alike: Count = Count()
    numeric: Count = Count()
    code: Count = Count()
    tests: Count = Count()
    constraints: Count = Count()
    truths: Count = Count()
    unprompted: Count = Count()


@dataclass(frozen=True, slots=True)
class Thumbs:
    """What thumbs come to beside their number.

    Attributes:
        up, down: their weights, those of a source with a weight as often as an epoch takes them.
        graded: prompts of the sample of which some answers are up and others down.
        num_pairs: pairs of one up and one down that they would give, each answer in one at most.
    """

    up: float = 0.0
    down: float = 0.0
    graded: Count = Count()
    num_pairs: int = 0


@dataclass(frozen=True, slots=True)
class Beside:
    """Sources that the method cannot read beside the others, with good answers for SFT.

    Attributes:
        sources: their names.
        num_examples, num_per_epoch: good answers in them, and those that an epoch takes.
    """

    sources: tuple[str, ...] = ()
    num_examples: int = 0
    num_per_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """A way of training, as `prefopt plan` finds it."""

    name: str
    fits: bool
    peak: str
    changes: Mapping[str, Any]
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class Model:
    """The model that would be trained.

    Attributes:
        name: as it was given.
        num_parameters: of the whole model.
        is_adapter: it is an adapter over another model already.
        has_template: its tokenizer brings a chat template, as those of models that were fine-tuned on chats do.
        context: tokens that it can read; None: it does not say.
        ways: full, LoRA and QLoRA, as far as the first that fits.
        chosen: the one that `prefopt plan` would take; empty: nothing fits.
        room: the memory, in words.
        nats: what a token of the good answers costs it, in nats; None: it was not asked, and `silent` says why.
        num_asked: examples that it was asked about.
    """

    name: str
    num_parameters: int
    is_adapter: bool
    has_template: bool
    context: int | None
    ways: tuple[Way, ...]
    chosen: str
    room: str
    nats: float | None = None
    num_asked: int = 0
    silent: str = ""

    @property
    def way(self) -> Way | None:
        """The way that was chosen."""
        return next((way for way in self.ways if way.name == self.chosen), None)


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it.

    Attributes:
        kind: as what the data is advised on.
        data: what holds it, as it is given to a run.
        sources: the files, those beside it among them.
        num_rows: of all files.
        num_examples: of `kind`.
        num_per_epoch: examples that an epoch takes: those of a source with a weight count as often as it says.
        faults: rows that cannot be used, by reason.
        passed: what is right and says nothing in this kind (ties above all), by reason.
        sampled: examples whose text was looked at.
        counts: thumbs, answers per prompt, ties.
        thumbs: their weights, and what pairs they would give.
        beside: good answers in files that are not among `data`.
        strays: rows of another kind than the others in their file, which are left out, by kind.
        lengths, content: of the sample.
        agreement: of verdicts on the same answers.
        unread: columns that are not read.
        contrary: rows whose scores contradict the order of their answers.
        weight: the sum of the examples' weights.
        one_opening: all open with the same, so that nothing can be held out of them.
        have: what the user says there is.
        has_eval: held-out data was given.
        eval_fraction: share to hold out, where one was given, 0 among them; None: nothing was said.
        model: None: none was given.
    """

    kind: Held
    sources: tuple[SourceSummary, ...]
    num_rows: int
    num_examples: int
    num_per_epoch: int
    faults: Mapping[str, int]
    passed: Mapping[str, int]
    sampled: int
    counts: Counts
    lengths: Lengths
    content: Content
    agreement: Agreement = field(default_factory=Agreement)
    data: tuple[str, ...] = ()
    thumbs: Thumbs = Thumbs()
    beside: Beside = Beside()
    strays: Mapping[Kind, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    contrary: Count = Count()
    weight: float = 1.0
    one_opening: bool = False
    have: tuple[str, ...] = ()
    has_eval: bool = False
    eval_fraction: float | None = None
    model: Model | None = None

    @property
    def num_faults(self) -> int:
        """Rows that cannot be used."""
        return sum(self.faults.values())

    def per_epoch(self, nouns: str) -> str:
        """Examples of an epoch, in words."""
        return counted(self.num_per_epoch, nouns) + (" an epoch" if self.num_per_epoch != self.num_examples else "")
