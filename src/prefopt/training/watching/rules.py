"""The rules of the watch, in one table, with what `docs/watch.md` says of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prefopt.training.watching import drift, learning, start
from prefopt.training.watching.watched import SURE, WINDOW, Finding, History

When = Literal["start", "step", "evaluation"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule.

    Attributes:
        look: a pure function of the run so far; what it found, or None.
        when: `start`: before the first step and once after it; `step`: after every step; `evaluation`: where there are
            held-out figures, or samples.
        speaks: when it does, with its thresholds.
        because: why these.
        remedy: what to change.
        over_steps: it compares figures of different steps, or takes the reference for the start: silent where the reference moves.
    """

    look: Callable[[History], Finding | None]
    when: When
    speaks: str
    because: str
    remedy: str
    over_steps: bool = False

    @property
    def name(self) -> str:
        """The rule's, as its findings bear it."""
        return self.look.__name__


RULES: tuple[Rule, ...] = (
    Rule(
        start.learning_rate,
        "start",
        f"the peak rate is more than {start.RATE_FACTOR:g} times the usual one for the method, the model's size and adapter or not, "
        f"or {start.RATE_FACTOR:g} times less",
        "full fine-tuning and adapters are a factor of 10 apart, SFT and DPO a factor of 40: a rate meant for the other is found",
        "`--learning-rate`",
    ),
    Rule(
        start.beta,
        "start",
        "β is outside the range that the method calls usual (DPO: 0.01 to 0.5)",
        "below it nothing holds the policy, above it little is learned",
        "`--beta`",
    ),
    Rule(
        start.start_difference,
        "start",
        f"policy and reference differ by more than {start.SAME_START:g} nats per token before the first step",
        "bf16 rounding makes up to 0.009, another template or adapter 0.1 and more",
        "`--reference`, or the reference columns in `--data`",
    ),
    Rule(
        start.untrained_reference,
        "start",
        f"before training the chosen answers have {start.UNKNOWN_TEXT:g} nats per token or more; or none of {start.MIN_SAMPLES} or more "
        f"samples ends, though the limit is {start.ENDS_WITHIN:g} times the data's mean length",
        "a pretrained model has 1 to 3 nats on its language, an untrained one 6 to 12; if it answered like the data, four samples past "
        "three times the mean would come once in 81 times at most",
        "SFT first; `--chat-template`, `--text-as`",
    ),
    Rule(
        start.few_steps,
        "start",
        f"the run has fewer than {start.FEW_STEPS} steps, and `--max-steps` does not say so",
        "AdamW moves a weight by the learning rate per step at most, and the usual rates are for hundreds of steps",
        "`--batch-size`, `--epochs`",
    ),
    Rule(
        learning.diverged,
        "step",
        f"the mean loss of {WINDOW} steps is {learning.DIVERGED:.0%} and {SURE:g} standard errors above the first; "
        f"without a reference, every one of them is {learning.DIVERGED_NOISY:.0%} above it",
        "worse than before training; for DPO that is 0.76 against log 2",
        "`--learning-rate`, `--warmup-ratio`",
    ),
    Rule(
        learning.loss_spike,
        "step",
        f"three losses in a row are {learning.LOSS_SPIKE:.0%}, 0.05 nats and 8 robust standard deviations above the median of "
        f"{learning.SPIKE_WINDOW} before them",
        "one odd batch cannot do that, weights that were thrown off can",
        "`--learning-rate`, `--max-grad-norm`",
        over_steps=True,
    ),
    Rule(
        learning.gradient_spike,
        "step",
        f"a gradient is more than {learning.SPIKE:g} times the median of {learning.SPIKE_WINDOW} before it, {learning.SPIKE_SPREAD:g} "
        f"robust standard deviations of their logarithm, and {learning.SPIKE_OVER_START:g} times that of the first {learning.SPIKE_ROWS}",
        "norms of healthy runs reach 7 times their median, and fall as a model learns",
        "`--learning-rate`, `--max-grad-norm`, `--batch-size`, the examples",
    ),
    Rule(
        learning.no_progress,
        "step",
        f"half-way after warm-up KL is below {learning.HARDLY_MOVED_KL:g} nats and the margin below {learning.HARDLY_MOVED_MARGIN:g} nats; "
        f"for SFT, the loss has fallen by less than {learning.NO_FALL:.0%}",
        "so close, samples of the two models differ in 7 of 100 cases at most; and half of all movement is over",
        "`--learning-rate`, `--epochs`, `--batch-size`, `--beta`",
        over_steps=True,
    ),
    Rule(
        learning.accuracy_near_half,
        "step",
        f"half-way after warm-up the accuracy on the pairs of the second half so far, with {SURE:g} standard errors added, is "
        f"below {learning.NEAR_HALF:g}, and the policy has moved",
        "it takes some hundred pairs to tell; DPO on the well-known sets reaches 0.6 and more within one epoch",
        "the pairs, `--label-smoothing`, `--learning-rate`",
        over_steps=True,
    ),
    Rule(
        learning.wrong_way,
        "step",
        f"half-way after warm-up the accuracy on the pairs of the second half so far, with {SURE:g} standard errors added, is "
        f"below {learning.WRONG_WAY:g}, the policy has moved, and it began at its reference",
        "swapped labels are learned as they are and show an accuracy above one half; below it the loss itself, or its steps, lead away",
        "`--learning-rate`; `--beta` of `discopop`",
        over_steps=True,
    ),
    Rule(
        learning.too_easy,
        "step",
        f"in the first epoch the accuracy on the last {learning.TOO_EASY_PAIRS} pairs is {learning.TOO_EASY:g} or more",
        "where quality decides 0.7 to 0.9 is reached; at 0.98 ± 0.01 something simpler does",
        "the pairs, `--max-steps`",
    ),
    Rule(
        learning.by_heart,
        "step",
        f"nothing is held out, and the accuracy on pairs seen again is {learning.BY_HEART:g} (and {SURE:g} standard errors) "
        "above that on the last new ones",
        "what is learned for all pairs shows on new ones too: 0.65 to 0.88 where the held-out loss rose, 0.87 to 0.92 in the quickstart",
        "`--epochs`, `--learning-rate`, `--eval-fraction`",
        over_steps=True,
    ),
    Rule(
        drift.displacement,
        "step",
        f"the chosen answers have lost {drift.FALL_PER_TOKEN:g} nats per token and {drift.FALL:g} in all (a warning from "
        f"{drift.BAD_FALL_PER_TOKEN:g} on): held-out ones since before training, or else by the rewards of {WINDOW} steps",
        "their perplexity is then up by a tenth (a third); the quickstart loses 0.07, a small model on noisy pairs lost 0.14",
        "SFT first, `--max-steps`, `--epochs`, `--learning-rate`, `--beta`",
    ),
    Rule(
        drift.kl,
        "step",
        f"KL (`samples/kl` where a run has it, else that on the data's answers) is beyond `--kl-budget`; where none is given, "
        f"{drift.KL_BUDGET:g} nats per completion or {drift.KL_BUDGET_PER_TOKEN:g} per token, whichever is more",
        "the frontier in the DPO paper ends at about 20 nats with nearly all its reward before; long answers are given a change of each "
        "token's log-probability by 0.45",
        "`--kl-budget`, `--max-steps`, `--learning-rate`, `--beta`",
    ),
    Rule(
        learning.overfitting,
        "evaluation",
        f"after the first epoch the held-out loss is {learning.RISE:.0%} (at least {learning.RISE:g} nats) above its lowest at two "
        f"evaluations in a row, or {learning.CLEAR_RISE:.0%} at one, while that of training fell by {learning.STILL_FALLING:.0%}; or the "
        f"held-out margin is {learning.MARGIN_FALL:.0%} below its highest at two in a row while that of training rose by as much; and "
        f"training accuracy is {learning.AHEAD:g} standard errors above held-out accuracy",
        "two in a row are no wobble; in the first epoch what it trains on is as new as what is held out; and a few wrong labels among few "
        "held-out pairs look alike",
        "`--max-steps`, `--early-stop`, `--epochs`, `--learning-rate`, `--label-smoothing`",
        over_steps=True,
    ),
    Rule(
        drift.lengths,
        "evaluation",
        f"sampled answers are {drift.LENGTH_FACTOR:g} times longer or shorter than before training, and {drift.SAMPLES_SURE:g} standard "
        "errors (2.9 times with four samples, 1.7 with sixteen), where fewer end than before those that do; not in SFT",
        "less than half more may be what better answers need; lengths of one model differ by a factor of 1.8; and what is cut at the limit "
        "has no length of its own",
        "the pairs, or where they do not ask for it `--learning-rate`; `--beta`, `--max-steps`, `--epochs`",
    ),
    Rule(
        drift.endings,
        "evaluation",
        f"the share of samples that end has fallen by {drift.FEWER_END:g} standard errors",
        "four of four to none of four is 2.8",
        "the data's answers, `--max-length`, `--learning-rate`, `--max-steps`",
    ),
    Rule(
        drift.repetition,
        "evaluation",
        f"the share of repeated stretches of four tokens is up by {drift.REPETITION_RISE:g}, or with n samples by "
        f"{drift.REPETITION_NOISE:g}/√n where that is more",
        "an answer caught in a loop has 0.7 and more, prose below 0.1; one of four may loop by chance",
        "`--epochs`, `--learning-rate`, `--beta`, `--max-steps`",
    ),
    Rule(
        drift.entropy,
        "evaluation",
        f"the entropy of the samples is {drift.NARROWER:g} times less than before training, or {drift.WIDER:g} times and "
        f"{drift.WIDER_BY:g} nats more (with fewer than four samples it takes more); not in SFT",
        "at half of it the effective number of choices per token is down to its square root; healthy small models went up to twice, "
        "broken ones four to six times",
        "`--epochs`, `--learning-rate`, `--beta`, `--max-steps`",
    ),
)


def rules_table() -> str:
    """The rules as a table in Markdown; a test compares the docs with it."""
    lines = ["| rule | looks | speaks when | why there | what to change |", "|---|---|---|---|---|"]
    when = {"start": "at the start", "step": "at every step", "evaluation": "at evaluations"}
    for rule in RULES:
        speaks = rule.speaks + ("; never where the reference moves" if rule.over_steps else "")
        lines.append(f"| `{rule.name}` | {when[rule.when]} | {speaks} | {rule.because} | {rule.remedy} |")
    return "\n".join(lines) + "\n"
