"""Which run of a sweep is best, by which rule, and how sure that is.

Runs are judged on the same held-out examples, so that what two of them differ by is known better than what each is: most of the
luck of the draw is in both. Its standard error comes from the differences of the single examples.
"""

import math
from dataclasses import dataclass

from prefopt.report.figures import METRICS, standard_error
from prefopt.report.findings import BROKEN
from prefopt.report.record import HeldOut, RunRecord
from prefopt.report.sweep.record import SweepRecord, SweptRun
from prefopt.report.text import plain, plural, setting
from prefopt.report.verdict import FEW, SEEN

RULES = {"rewards/accuracy": "the highest accuracy on held-out pairs", "loss": "the lowest loss on held-out examples"}
"""Which run is called the best: by the first of these figures that all runs have."""

MANY = 8
"""Runs from which on the best of them owes something to having been chosen from so many: of eight runs that are all the same, the
highest figure lies 1.4 standard errors above the others' mean."""


MOST_NAMED = 5
"""Runs that are named one by one as not clearly worse."""


@dataclass(frozen=True, slots=True)
class Behind:
    """A run beside the best one.

    Attributes:
        run: it.
        by: how much worse its figure is; never negative.
        error: standard error of that; None where it cannot be known.
    """

    run: SweptRun
    by: float
    error: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the difference is more than chance would give."""
        return self.error is not None and self.by >= SEEN * self.error and self.by > 0


@dataclass(frozen=True, slots=True)
class Best:
    """The best run and the others.

    Attributes:
        figure: the name of what decides.
        run: the best.
        behind: the others, the nearest first.
    """

    figure: str
    run: SweptRun
    behind: tuple[Behind, ...]

    @property
    def level(self) -> list[Behind]:
        """The runs that are not clearly worse."""
        return [other for other in self.behind if not other.is_clear]

    @property
    def cheapest(self) -> SweptRun | None:
        """Of the best and those not clearly worse the one that moved least from the reference, where that is another than the best."""
        near = [self.run, *(other.run for other in self.level)]
        kl = next((name for name in ("samples/kl", "kl") if all(run.after(name) is not None for run in near)), None)
        found = min(near, key=lambda run: run.after(kl) or 0.0) if kl and len(near) > 1 else self.run
        return None if found is self.run else found


def find_best(record: SweepRecord) -> Best | None:
    """The best of the finished runs; None where there are none with figures. Of equal ones that with the lower KL, then the first."""
    runs = record.finished
    name = next((name for name in RULES if runs and all(run.after(name) is not None for run in runs)), None)
    if name is None:
        return None
    sign = 1.0 if METRICS[name].better == "up" else -1.0

    def worth(run: SweptRun) -> tuple[float, float]:
        # Not the loss: with another β it is another loss.
        return sign * (run.after(name) or 0.0), -(run.after("kl") or 0.0)

    best = max(runs, key=worth)
    behind = [Behind(run, worth(best)[0] - worth(run)[0], paired_error(name, best, run)) for run in runs if run is not best]
    return Best(name, best, tuple(sorted(behind, key=lambda other: other.by)))


def paired_error(name: str, one: SweptRun, other: SweptRun) -> float | None:
    """The standard error of the difference of two runs' figures; where the examples are not the same, as if they were independent."""
    pairs = same_examples(one.record, other.record)
    if not pairs:
        errors = (one.error(name), other.error(name))
        return None if None in errors else math.hypot(*(error or 0.0 for error in errors))
    if any(name not in example.after for pair in pairs for example in pair):
        return None
    differences = [(first.after[name] - second.after[name], first.weight) for first, second in pairs]
    error = standard_error(differences)
    if name != "loss" or error is None:
        return error
    # An example's loss is a sum over its share of the unit; over all units, the mean difference is smaller by the mean share.
    mean, total = one.after(name), sum(first.after[name] * first.weight for first, _ in pairs)
    weight = sum(first.weight for first, _ in pairs)
    return error * weight * mean / total if mean and total else None


def same_examples(one: RunRecord | None, other: RunRecord | None) -> list[tuple[HeldOut, HeldOut]]:
    """The held-out examples of both, side by side; empty where they are not the same, or were not last looked at as the models are."""
    if one is None or other is None or any(record.held_out_step != record.model_step for record in (one, other)):
        return []
    pairs = list(zip(one.held_out, other.held_out, strict=False))
    same = len(one.held_out) == len(other.held_out) and all(a.prompt == b.prompt and a.completions == b.completions for a, b in pairs)
    return [pair for pair in pairs if pair[0].weight > 0] if same else []


def sentences(record: SweepRecord) -> list[str]:
    """What came of the sweep, a sentence each."""
    return [sentence for _, found in parts(record) for sentence in found]


def parts(record: SweepRecord) -> list[tuple[str, list[str]]]:
    """What came of the sweep: which run is best and by which rule, how sure that is, what it cost, what to do, and which runs have none."""
    best = find_best(record)
    failed = [run.label for run in record.runs if run.state == "failed"]
    left = [run.label for run in record.runs if run.state not in ("finished", "failed")]
    missing = []
    if failed:
        missing.append(f"{'One run' if len(failed) == 1 else f'{len(failed)} runs'} failed and cannot be compared: {'; '.join(failed)}.")
    if left:
        missing.append(f"{'One run is' if len(left) == 1 else f'{len(left)} runs are'} not finished: {'; '.join(left)}.")
    found = [("Without figures", missing)]
    if best is not None:
        advice = [*warned(record, best), *at_the_end(record, best)]
        found = [
            ("Which is best", [which(best)]),
            ("How sure that is", how_sure(best)),
            ("At what cost", cost(best)),
            ("What to do", advice),
            *found,
        ]
    return [(title, lines) for title, lines in found if lines]


def which(best: Best) -> str:
    """The best run and the rule."""
    change = best.run.figures[best.figure]
    error = f" ± {change.shown_error()}" if change.error else ""
    examples = f" on {plural(change.num, 'held-out example')}" if change.num else ""
    if not best.behind:
        return f"{best.run.label} has no other to be compared with: {change.metric.label.lower()} {change.shown_after()}{error}{examples}."
    return f"{best.run.label} has {RULES[best.figure]}: {change.shown_after()}{error}{examples}, {change.shown_before()} before training."


def how_sure(best: Best) -> list[str]:
    """Which of the others are not clearly worse, and whether the best is better than no training at all."""
    change, lines = best.run.figures[best.figure], []
    known = best.level and all(other.error is not None for other in best.level)
    if known:
        names = "; ".join(f"{other.run.label} ({amount(best, other)})" for other in best.level[:MOST_NAMED])
        names += f"; and {len(best.level) - MOST_NAMED} more" if len(best.level) > MOST_NAMED else ""
        everyone = "None of the others is" if len(best.level) == len(best.behind) else "Not"
        lines.append(
            f"{everyone} clearly worse, by less than two standard errors of the difference on the same examples: {names}."
            if len(best.behind) > 1
            else f"The other is not clearly worse, by less than two standard errors of the difference on the same examples: {names}."
        )
    elif best.level:
        lines.append("How sure the order is cannot be told: there are too few held-out examples for an error.")
    elif best.behind:
        lines.append(
            f"Each of the others is worse by two standard errors or more; the nearest is {best.behind[0].run.label} "
            f"({amount(best, best.behind[0])})."
        )
    away = change.errors_away
    if away is not None and (away if change.metric.better == "up" else -away) < SEEN:
        lines.append("It is not clearly better than the model before training either.")
    if change.num and change.num < FEW:
        lines.append(f"{plural(change.num, 'held-out example')} are few: hold more out before you choose.")
    if len(best.behind) + 1 >= MANY and best.level:
        lines.append("The best of so many runs owes something to luck: look at it on examples that none of them was judged on.")
    return lines


def amount(best: Best, other: Behind) -> str:
    """`0.6 ± 1.2 points behind`."""
    if not other.by:
        return "equal"
    if best.figure == "rewards/accuracy":
        error = "" if other.error is None else f" ± {100 * other.error:.1f}"
        return f"{100 * other.by:.1f}{error} points behind"
    error = "" if other.error is None else f" ± {plain(other.error)}"
    return f"{plain(other.by)}{error} behind"


def cost(best: Best) -> list[str]:
    """Of the runs that are not clearly worse, the one that paid least for it."""
    cheapest = best.cheapest
    if cheapest is None:
        return []
    name = "samples/kl" if cheapest.after("samples/kl") is not None and best.run.after("samples/kl") is not None else "kl"
    on = "its own answers" if name == "samples/kl" else "the data's answers"
    least, here = (METRICS[name].show(run.after(name)) for run in (cheapest, best.run))
    if least == here:
        return []
    return [f"Of these {cheapest.label} moved least from its reference: KL {least} nats per answer on {on}, against {here}."]


def warned(record: SweepRecord, best: Best) -> list[str]:
    """What the watch says of all runs, and of the best."""
    shared = warned_of_all(record)
    rules = [finding.rule for finding in best.run.findings if finding.rule not in shared]
    lines = [f"The watch warns of every run: {', '.join(shared)}; their pages say what to do."] if shared else []
    if any(rule in BROKEN for rule in rules):
        lines.append(f"Do not take {best.run.label} unseen: the watch warns that its own answers have suffered ({', '.join(rules)}).")
    elif rules:
        lines.append(f"The watch warns of {best.run.label}: {', '.join(rules)}; its page says what to do.")
    return lines


def warned_of_all(record: SweepRecord) -> list[str]:
    """The rules that warn of every run that has finished, where that is more than one."""
    runs = record.finished
    everywhere = set.intersection(*({finding.rule for finding in run.findings} for run in runs)) if len(runs) > 1 else set()
    return [finding.rule for finding in runs[0].findings if finding.rule in everywhere] if everywhere else []


def at_the_end(record: SweepRecord, best: Best) -> list[str]:
    """Where the best value is the first or the last of those tried, what lies beyond is not known."""
    lines: list[str] = []
    if len(best.level) == len(best.behind):  # the order says nothing
        return lines
    for name, values in record.swept.items():
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        value = best.run.values.get(name)
        if len(numbers) < max(3, len(values)) or value not in (min(numbers), max(numbers)):
            continue
        which_end, beyond = ("smallest", "below") if value == min(numbers) else ("largest", "above")
        lines.append(f"{name} {setting(value)} is the {which_end} value tried: what lies {beyond} it may be better.")
    return lines


def headline(record: SweepRecord) -> tuple[str, str]:
    """What came of the sweep in a few words, and its tone on the page."""
    best = find_best(record)
    open_runs = [run for run in record.runs if run.state not in ("finished", "failed")]
    if best is None:
        return ("Nothing to compare yet", "open") if open_runs else ("No run came to its end", "bad")
    if open_runs:
        return f"So far {best.run.label} is ahead", "open"
    if not best.behind:
        return f"Only {best.run.label} can be judged", "mixed"
    if not best.level:
        return f"{best.run.label} is best", "good"
    if not any(other.by for other in best.behind):
        return "The runs came out equal", "mixed"
    if len(best.level) == len(best.behind):
        return f"{best.run.label} is ahead, but of no other clearly", "mixed"
    return f"{best.run.label} is ahead, with {plural(len(best.level), 'run')} close behind", "good"
