"""The key figures of a run, a card each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prefopt.report.figures import METRICS, Change
from prefopt.report.record import RunRecord
from prefopt.report.text import count, duration, plural
from prefopt.report.verdict import ends

LOSS_OF_LIKELIHOOD = frozenset({"sft"})
"""Methods whose loss is a negative log-likelihood per token, so that its exponential is a perplexity."""


@dataclass(frozen=True, slots=True)
class Card:
    """A key figure.

    Attributes:
        label: what it is.
        value, unit: the figure.
        was: what it is read against; may be empty.
    """

    label: str
    value: str
    unit: str = ""
    was: str = ""


def cards(record: RunRecord, figures: Mapping[str, Change]) -> list[Card]:
    """The cards that there are figures for; at most seven, which is what fits in a row."""
    kl = "samples/kl" if has_both(figures, "samples/kl") else "kl"
    names = ["rewards/accuracy", "rewards/margin", "loss", kl, *(["logps/chosen"] if record.is_pairs else [])]
    found = [held_out_card(figures[name]) for name in names if has_both(figures, name)]
    if not any(has_both(figures, name) for name in ("rewards/accuracy", "loss")):
        found += trained_cards(record)
    if record.method in LOSS_OF_LIKELIHOOD and has_both(figures, "loss"):
        found.append(perplexity_card(figures["loss"]))
    return (found + effort_cards(record))[:7]


def has_both(figures: Mapping[str, Change], name: str) -> bool:
    """Whether a figure is known before and after training."""
    return name in figures and figures[name].difference is not None


def held_out_card(change: Change) -> Card:
    """A held-out figure, with its error and what it was."""
    labels = {"logps/chosen": "Chosen log-prob.", "kl": "KL, held out", "samples/kl": "KL, own answers", "loss": "Loss, held out"}
    label = labels.get(change.name, f"{change.metric.label}, held out")
    error = f"± {change.shown_error()}" if change.error else "nats" if change.name in ("kl", "samples/kl", "logps/chosen") else ""
    return Card(label, change.shown_after(), error, f"before: {change.shown_before()}")


def trained_cards(record: RunRecord) -> list[Card]:
    """Figures of the examples trained on, where no held-out ones are there."""
    found = []
    for name in ("rewards/accuracy", "rewards/margin", "loss", "kl"):
        first, last = ends(record.metrics.curve(name))
        if last is not None:
            found.append(Card(f"{METRICS[name].label}, trained on", METRICS[name].show(last), "", f"at first: {METRICS[name].show(first)}"))
    return found


def perplexity_card(loss: Change) -> Card:
    """The exponential of a loss per token: among how many tokens it hesitates."""
    shown = [
        count(math.exp(value)) if value < 50 and math.exp(value) >= 100 else f"{math.exp(min(value, 700)):.3g}"
        for value in (loss.after or 0.0, loss.before or 0.0)
    ]
    return Card("Perplexity, held out", shown[0], "", f"before: {shown[1]}")


def effort_cards(record: RunRecord) -> list[Card]:
    """Time, speed and memory."""
    found = []
    if record.seconds and record.metrics.num_rows:
        found.append(Card("Training time", duration(record.seconds), "", plural(record.metrics.last_step, "step")))
    speeds = sorted(record.metrics.curve("tokens_per_second").values)
    if speeds:
        memory = record.peak_memory_gb
        found.append(Card("Speed", count(speeds[len(speeds) // 2]), "tokens/s", f"{memory:.2f} GB at most" if memory else ""))
    return found
