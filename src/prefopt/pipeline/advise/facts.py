"""What is known of the data and of the model: figures, and nothing that is concluded from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True, slots=True)
class Spread:
    """How long texts are: percentiles."""

    p5: int = 0
    median: int = 0
    p95: int = 0
    p99: int = 0
    longest: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Spread":
        """Of these lengths."""
        if not len(lengths):
            return cls()
        found = np.percentile(np.asarray(lengths), [5, 50, 95, 99, 100])
        return cls(*(round(float(number)) for number in found))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts and answers are.

    Attributes:
        unit: of all figures.
        prompt, answer, together: of prompts, of answers, and of a prompt with its longest answer.
        prompt_share: share of all that would be read without sharing that is prompt.
        longer_chosen: pairs whose chosen answer is the longer one, of those that differ in length.
        ratio: median of how many times as long the longer answer of a pair is.
        chosen, rejected: median lengths of what is good and of what is bad, by verdict, rank or thumb.
        too_long: examples whose prompt is cut to fit in `max_length`, or that are left out; known in tokens only.
        uncut: tokens that 99 in 100 examples have at most, uncut; told from their characters.
    """

    unit: Unit
    prompt: Spread
    answer: Spread
    together: Spread
    prompt_share: float
    longer_chosen: Count = Count()
    ratio: float = 1.0
    chosen: int = 0
    rejected: int = 0
    too_long: Count = Count()
    uncut: int = 0


@dataclass(frozen=True, slots=True)
class Copies:
    """What is there several times.

    Attributes:
        repeated: examples that repeat an earlier one exactly.
        near: different examples that are near copies of an earlier one.
        prompts: different prompts.
        near_prompts: those among them that are near copies of an earlier one.
        leaks: held-out examples whose opening has a near copy among the openings that are trained on.
        held_out: what is held out, in words.
    """

    repeated: Count
    near: Count
    prompts: int
    near_prompts: Count
    leaks: Count
    held_out: str


@dataclass(frozen=True, slots=True)
class Content:
    """What the texts are.

    Attributes:
        scripts: script -> share of all letters.
        broken: texts with characters that were lost or mistaken.
        numeric, code: good answers that end in a final answer, a number or in a box; that hold code.
        tests, instructions, truths: rows with tests of code, with names of constraints, with the right answer.
        raw: examples that are plain text, not a chat.
    """

    scripts: Mapping[str, float]
    broken: Count
    numeric: Count
    code: Count
    tests: Count
    instructions: Count
    truths: Count
    raw: Count


@dataclass(frozen=True, slots=True)
class Way:
    """A way of training, as `prefopt plan` finds it."""

    name: str
    fits: bool
    peak: str
    changes: Mapping[str, Any]
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class Said:
    """What the model says of answers of the data, in nats per token.

    Attributes:
        num: examples that it was asked about.
        good, bad: negative log-likelihood of what is good and of what is bad; None: there is none of it.
        own: entropy of its predictions in the good answers, which is what its own answers would have.
        prefers: pairs whose chosen answer it finds likelier per token.
    """

    num: int
    good: float
    own: float
    bad: float | None = None
    prefers: Count = Count()

    @property
    def surprise(self) -> float:
        """By how much a token of the good answers is less likely to it than one of its own would be."""
        return self.good - self.own


@dataclass(frozen=True, slots=True)
class Model:
    """The model that would be trained.

    Attributes:
        name: as it was given.
        num_parameters: of the whole model.
        is_adapter: it is an adapter over another model already.
        has_template: its tokenizer brings a chat template, as those of models that were fine-tuned on chats do.
        context: tokens that it can read; None: it does not say.
        ways: full, LoRA and QLoRA, as they fit.
        chosen: the one that `prefopt plan` would take; empty: nothing fits.
        room: the memory, in words.
        said: of the answers; None: it was not asked, and `silent` says why.
    """

    name: str
    num_parameters: int
    is_adapter: bool
    has_template: bool
    context: int | None
    ways: tuple[Way, ...]
    chosen: str
    room: str
    said: Said | None = None
    silent: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it.

    Attributes:
        kind: as what the data is advised on.
        sources: the files.
        num_rows: of all files.
        serves: kind -> examples of that kind that the rows give; of the kinds that every source gives.
        num_examples: of `kind`.
        faults: rows that cannot be used, by reason.
        passed: what is right and says nothing in this kind (ties above all), by reason.
        sampled: examples whose text was looked at.
        counts: thumbs, answers per prompt, ties.
        lengths, copies, content: of the sample.
        agreement: of verdicts on the same answers; `voters`: they are votes within a row.
        alike: pairs whose two answers are near copies of each other.
        have: what the user says there is.
        has_eval: held-out data was given.
        model: None: none was given.
    """

    kind: Held
    sources: tuple[SourceSummary, ...]
    num_rows: int
    serves: Mapping[Kind, int]
    num_examples: int
    faults: Mapping[str, int]
    passed: Mapping[str, int]
    sampled: int
    counts: Counts
    lengths: Lengths
    copies: Copies
    content: Content
    agreement: Agreement = field(default_factory=Agreement)
    voters: bool = False
    alike: Count = Count()
    have: tuple[str, ...] = ()
    has_eval: bool = False
    model: Model | None = None

    @property
    def num_faults(self) -> int:
        """Rows that cannot be used."""
        return sum(self.faults.values())

    @property
    def most_answers(self) -> int:
        """Answers of the prompt that has most."""
        return max(self.counts.branches, default=0)

    @property
    def said(self) -> Said | None:
        """What the model says."""
        return None if self.model is None else self.model.said

    def to_dict(self) -> dict[str, Any]:
        """For JSON; shares are rounded."""
        found: dict[str, Any] = _plain(asdict(self))
        return found | {
            "counts": self.counts.to_dict(),
            "agreement": found["agreement"] | {"share": round(self.agreement.share, 4), "error": round(self.agreement.error, 4)},
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"num", "of"}:
            return {**value, "share": round(value["num"] / value["of"], 4) if value["of"] else 0.0}
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value


@dataclass(slots=True)
class Tally:
    """What is counted over all rows while they stream by."""

    num_rows: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    serves: dict[Kind, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
