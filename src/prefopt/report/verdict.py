"""What came of a run, in three sentences: what was learned, what it cost, what to do next.

Pure functions of figures, so that every sentence can be tested. They claim no more than the figures carry: a change below
two of its standard errors counts as none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefopt.report.figures import METRICS, Change, changes
from prefopt.report.findings import BROKEN, by_rank, passed
from prefopt.report.metrics import Curve
from prefopt.report.record import Finding, RunRecord
from prefopt.report.state import RunState
from prefopt.report.text import duration, one_line, plain, plural, share

CLEAR = 3.0
"""Standard errors beyond which a change is called clear: chance alone gives one as large in 3 of 1,000 runs."""

SEEN = 2.0
"""Standard errors below which a change counts as none: chance alone gives one as large in 1 of 20 runs."""

FEW = 30
"""Held-out examples below which the reader is told that they are few: the error of a share is then above 5 to 9 points."""

FELL = 0.02
"""Share of the chosen answers' log-probability by which it must have fallen before that is held against the run: a percent or two is
what any step on other texts does."""

ADVICE_OF_WATCH = "Before you rely on it, see to what the watch warns of"
"""Begins the advice where a rule has warned."""

MOVED = 0.05
"""Log-probability per answer, in nats, below which it is said to have stayed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a run.

    Attributes:
        headline: in a few words.
        tone: `good`, `mixed`, `bad`, or `open` where there is nothing to judge yet.
        learned, cost, advice: a sentence each; the second is empty where nothing is known of the cost.
    """

    headline: str
    tone: str
    learned: str
    cost: str
    advice: str


def verdict(record: RunRecord, state: RunState) -> Verdict:
    """What came of the run."""
    figures = changes(record)
    outcome = judge(figures)
    all_warnings = [finding for finding in record.findings if finding.is_warning]
    warnings = by_rank([finding for finding in all_warnings if not passed(finding, record, figures)])
    is_broken = any(finding.rule in BROKEN for finding in warnings)
    headline, tone = heading(state, outcome, len(warnings), is_broken=is_broken)
    return Verdict(
        headline=headline,
        tone=tone,
        learned=what_was_learned(record, figures, outcome),
        cost=what_it_cost(record, figures),
        advice=what_to_do(record, state, outcome, warnings, num_passed=len(all_warnings) - len(warnings)),
    )


def main_figure(figures: Mapping[str, Change]) -> Change | None:
    """The held-out figure that decides: accuracy where there are pairs, else the loss."""
    return next((figures[name] for name in ("rewards/accuracy", "loss") if name in figures), None)


def judge(figures: Mapping[str, Change]) -> str:
    """`learned`, `perhaps`, `nothing`, `worse`, or `open` where the figures do not say."""
    figure = main_figure(figures)
    if figure is None or figure.difference is None:
        return "open"
    gain = figure.difference if figure.metric.better == "up" else -figure.difference
    away = figure.errors_away
    if away is None and "rewards/accuracy" not in figures and "logps/chosen" in figures:
        away = figures["logps/chosen"].errors_away  # the same change, per answer in place of per token, with its error
    if away is None:
        return "learned" if gain > 0 else "worse" if gain < 0 else "nothing"
    if abs(away) < SEEN:
        return "nothing"
    if gain < 0:
        return "worse"
    return "learned" if abs(away) >= CLEAR else "perhaps"


def heading(state: RunState, outcome: str, num_warnings: int, *, is_broken: bool = False) -> tuple[str, str]:
    """The headline and its tone; where its own answers are broken, what was learned about others is no matter."""
    ended = {
        "failed": (f"Failed after {state.progress}", "bad"),
        "broken off": (f"Ended without a word after {state.progress}", "bad"),
        "stopped": (f"Stopped after {state.progress}", "mixed"),
        "running": (f"Still training: {state.progress}", "open"),
    }
    if state.name in ended:
        return ended[state.name]
    found = {
        "learned": ("It learned what it was shown", "good"),
        "perhaps": ("It seems to have learned something", "mixed"),
        "nothing": ("No more learned than chance would give", "mixed"),
        "worse": ("Worse than before training", "bad"),
        "open": ("Trained, but not judged", "open"),
    }
    headline, tone = ("Its own answers suffered from training", "bad") if is_broken else found[outcome]
    if num_warnings:
        return f"{headline}, with {plural(num_warnings, 'warning')}", "mixed" if tone == "good" else tone
    return headline, tone


def what_was_learned(record: RunRecord, figures: Mapping[str, Change], outcome: str) -> str:
    """The first sentence."""
    figure = main_figure(figures)
    if not record.metrics.num_rows:
        return "No step is done yet, so there is nothing to judge."
    if figure is None or figure.difference is None:
        known = "The held-out examples have not been looked at since training began" if record.num_held_out else "Nothing was held out"
        return f"{known}, so these figures cannot say whether anything carries over to new prompts; {on_trained(record)}."
    sentence = pairs_learned(figures, outcome) if figure.name == "rewards/accuracy" else loss_learned(figures, record.num_held_out)
    if record.summary and record.model_step < record.metrics.last_step:
        sentence += f"; the model is that of step {record.model_step:,}, where the held-out loss was lowest"
    return sentence + "."


def pairs_learned(figures: Mapping[str, Change], outcome: str) -> str:
    """How often the chosen answer wins on held-out pairs, or a single answer's reward agrees with its thumb."""
    accuracy = figures["rewards/accuracy"]
    weight = {
        "learned": "well beyond what chance would give",
        "perhaps": "more than chance would give, though not by much",
        "nothing": "which chance alone may give",
        "worse": "which is worse than before",
        "open": "",
    }[outcome]
    error = f" (standard error {accuracy.shown_error()})" if accuracy.error is not None else ""
    what = "answer" if "rewards/desirable" in figures or "rewards/undesirable" in figures else "pair"
    few = f", though {accuracy.num} {what}s are few" if 0 < accuracy.num < FEW else ""
    shares = f"in {accuracy.shown_after()}{error}, against {accuracy.shown_before()} before training, {weight}{few}"
    sentence = (
        f"Of {plural(accuracy.num, 'held-out pair')} the chosen answer now has the higher reward {shares}"
        if what == "pair"
        else f"Of {plural(accuracy.num, 'held-out answer')} the reward now agrees with the thumb {shares}"
    )
    others = [figures[name] for name in ("rewards/margin", "loss") if name in figures and figures[name].difference is not None]
    if others:
        moves = [f"the {change.metric.label.lower()} from {change.shown_before()} to {change.shown_after()}" for change in others]
        sentence += f"; {' and '.join(moves).replace(' from', ' went from', 1)}"
    if outcome in ("learned", "perhaps") and "loss" in figures and (figures["loss"].difference or 0.0) > 0:
        sentence += f", so some of the {what}s that it gets wrong it gets wrong with confidence"
    return sentence


def loss_learned(figures: Mapping[str, Change], num: int) -> str:
    """How the held-out loss moved."""
    loss = figures["loss"]
    moved = loss.difference or 0.0
    verb = "fell" if moved < 0 else "rose" if moved > 0 else "stayed the same"
    sentence = f"On {plural(num, 'held-out example')} the loss {verb}, from {loss.shown_before()} before training to {loss.shown_after()}"
    if 0 < num < FEW:
        sentence += f", though {num} examples are few"
    return sentence


def on_trained(record: RunRecord) -> str:
    """What the figures of the trained examples say, where no others are there."""
    metrics = record.metrics
    name = "rewards/accuracy" if metrics.curve("rewards/accuracy") else "loss"
    first, last = ends(metrics.curve(name))
    if first is None or last is None:
        return "no loss was noted either"
    if len(metrics.curve(name)) == 1:
        return "nor can a single step"
    show = share if name == "rewards/accuracy" else plain
    label = "accuracy" if name == "rewards/accuracy" else "loss"
    return f"on the examples that it trained on, {label} went from {show(first)} to {show(last)}, which learning them by heart gives too"


def ends(curve: Curve) -> tuple[float | None, float | None]:
    """Means of the first and the last tenth of a curve, at least one value each."""
    if not curve:
        return None, None
    num = max(1, len(curve) // 10)
    return sum(curve.values[:num]) / num, sum(curve.values[-num:]) / num


def what_it_cost(record: RunRecord, figures: Mapping[str, Change]) -> str:
    """The second sentence: how far it moved from its reference, and the time."""
    parts = [part for part in (moved_by(record, figures), log_probabilities(figures), lengths(figures), effort(record)) if part]
    if not parts:
        return ""
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def moved_by(record: RunRecord, figures: Mapping[str, Change]) -> str:
    """The distance from the reference, and on what it was measured.

    Without a held-out figure it is that of the last steps, which are measured before they are taken: of a single one it is 0,
    whatever came of it.
    """
    for name, on in (("samples/kl", "on its own answers"), ("kl", "on the data's answers")):
        if name in figures and (kl := figures[name].after) is not None:
            which = "its reference" if record.reference_moves_every is None else "its reference, which has followed it"
            return f"it moved {METRICS[name].show(kl)} nats per answer away from {which} (KL {on})"
    curve = record.metrics.curve("kl")
    _, kl = ends(curve)
    if kl is None or len(curve) < 2:
        return ""
    at = f"about step {curve.steps[-1]:,.0f}"
    return f"it was {METRICS['kl'].show(kl)} nats per answer away from its reference (KL on the data's answers) {at}"


def log_probabilities(figures: Mapping[str, Change]) -> str:
    """Where the log-probabilities of chosen and rejected answers went; only pairs have both."""
    chosen, rejected = figures.get("logps/chosen"), figures.get("logps/rejected")
    if chosen is None or rejected is None or chosen.difference is None or rejected.difference is None:
        return ""
    up, down = chosen.difference, rejected.difference
    what = f"the chosen answers' log-probability {move(up)}, that of the rejected {move(down)}"
    if -up > FELL * abs(chosen.before or 0.0) and (chosen.errors_away or -SEEN) <= -SEEN:
        what += ", so the model grew less likely to give the very answers that it was taught to prefer"
    return what


def move(difference: float) -> str:
    """`fell by 6.0 nats`."""
    if abs(difference) < MOVED:
        return "stayed where it was"
    return f"{'rose' if difference > 0 else 'fell'} by {METRICS['logps/chosen'].show(abs(difference))} nats"


def lengths(figures: Mapping[str, Change]) -> str:
    """How the length of sampled answers moved, where it did by a quarter or more."""
    length = figures.get("samples/length")
    if length is None or not length.before or length.after is None or 0.8 < length.after / length.before < 1.25:
        return ""
    return f"its own answers went from {length.shown_before()} to {length.shown_after()} tokens ({plural(length.num, 'prompt')})"


def effort(record: RunRecord) -> str:
    """Time, steps and memory."""
    if record.seconds is None or not record.metrics.num_rows:
        return ""
    memory, steps = record.peak_memory_gb, plural(record.metrics.last_step, "step")
    return f"{steps} took {duration(record.seconds)}" + (f" and at most {memory:.2f} GB" if memory else "")


READ_ANSWERS = "read the answers below before you use it, for these figures are about given answers and not about its own"
READ_REWARD = (
    "look at the pairs below that it is sure of and gets wrong before you use it: a policy that is trained on its scores finds such"
)


def what_to_do(record: RunRecord, state: RunState, outcome: str, warnings: Sequence[Finding], *, num_passed: int = 0) -> str:
    """The third sentence: what to do next, and whether to trust the result.

    Args:
        record, state, outcome: of the run.
        warnings: those that still hold, the most urgent first.
        num_passed: how many others there were.
    """
    if state.name == "failed":
        where = " at the examples that are listed below" if record.bad_rows else ""
        left = "" if record.has_model else " and left no model"
        return f"It ended in an error{where}{left}: {one_line(state.message, 400).rstrip('.') or 'no file says which'}."
    if state.name in ("stopped", "broken off"):
        go_on = "go on from its newest checkpoint with the command below"
        return f"It is not finished; {go_on if record.has_checkpoint else 'start it anew: no checkpoint was saved'}."
    if warnings:
        worst = warnings[0]
        begin = f"Do not rely on it (the watch: `{worst.rule}`)" if worst.rule in BROKEN else ADVICE_OF_WATCH
        return f"{begin}: {lowered(one_line(worst.do, 400).rstrip('.') or worst.rule)}."
    if state.name == "running":
        warned = "what the watch warned of has passed" if num_passed else "so far the watch warns of nothing"
        return f"It is still going, and {warned}; make this page again for newer figures."
    if outcome == "open" and record.num_held_out:
        return "Evaluate it on the examples that were held out for that: nothing here says more than that its steps are done."
    nothing = "What the watch warned of on the way has passed" if num_passed else "Nothing that the watch looks at speaks against it"
    return {
        "learned": f"{nothing}; {READ_REWARD if record.is_reward_model else READ_ANSWERS}.",
        "perhaps": "More held-out pairs, or a longer run, would tell whether the gain is real; until then do not count on it.",
        "nothing": "There is no reason yet to prefer it to the model that it started from: look for mislabelled pairs first, then try "
        "more data, a higher learning rate or more epochs.",
        "worse": "Keep the model that it started from: check that chosen and rejected are not swapped, and lower the learning rate.",
        "open": "Hold some examples out (`eval_fraction: 0.1`), so that the next run can be judged on prompts that it has not seen.",
    }[outcome]


def lowered(text: str) -> str:
    """The text with its first letter small, as it stands inside a sentence; names in capitals stay."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
