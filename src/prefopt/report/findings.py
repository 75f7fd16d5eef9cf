"""Which of the watch's findings weigh most, and which are no longer true of the model that a run leaves."""

from collections.abc import Mapping, Sequence

from prefopt.report.figures import Change
from prefopt.report.record import Finding, RunRecord

BROKEN = ("endings", "repetition", "entropy")
"""Rules that say that the model's own answers have suffered: whatever else was learned, that decides."""

RANKS = (
    *BROKEN,
    *("diverged", "loss_spike", "untrained_reference", "overfitting", "kl", "displacement", "lengths"),
    *("wrong_way", "no_progress", "accuracy_near_half", "by_heart", "too_easy", "gradient_spike"),
    *("few_steps", "start_difference", "learning_rate", "beta"),
)
"""All rules, those first whose remedy is the most urgent: broken answers, broken training, a wrong beginning, what was paid for
the margin, what was not learned, and settings that are merely odd."""

SAMPLED = {
    "endings": "samples/ended",
    "repetition": "samples/repetition",
    "entropy": "samples/entropy",
    "lengths": "samples/length",
}
"""The figure that a rule about sampled answers looks at."""


def by_rank(findings: Sequence[Finding]) -> list[Finding]:
    """The most urgent first; those of rules that are not known come last, in the order in which they were found."""
    place = {rule: rank for rank, rule in enumerate(RANKS)}
    return sorted(findings, key=lambda finding: place.get(finding.rule, len(RANKS)))


def passed(finding: Finding, record: RunRecord, figures: Mapping[str, Change]) -> str:
    """That and why a finding is no longer true, as a sentence; empty where it is, or where that cannot be known.

    Args:
        finding: of the run.
        record: of the run.
        figures: the run's, as `changes` gives them: those of the saved model, or of the newest evaluation while there is none.
    """
    if record.summary and record.model_step < finding.step:
        return f"The model is that of step {record.model_step:,}, from before this."
    compared = _figure_and_limit(finding, figures)
    if compared is None:
        return ""
    figure, limit, is_bad_above = compared
    return "At the last evaluation this was no longer so." if (figure < limit if is_bad_above else figure > limit) else ""


def _figure_and_limit(finding: Finding, figures: Mapping[str, Change]) -> tuple[float, float, bool] | None:
    """The figure that the finding is about as it is now, the value beyond which its rule speaks, and whether beyond is above."""
    values = finding.values
    limit, now = values.get("limit"), values.get("now")
    if finding.rule == "kl":
        figure, limit, is_above = after(figures, "samples/kl", "kl"), values.get("budget"), True
    elif finding.rule == "displacement":
        figure, is_above = figures["logps/chosen"].difference if "logps/chosen" in figures else None, False
    elif finding.rule in SAMPLED and now is not None and "before" in values:
        figure, is_above = after(figures, SAMPLED[finding.rule]), now > values["before"]
    elif finding.rule == "overfitting" and now is not None and "best" in values:
        is_above = now > values["best"]  # a loss that rose; else it is a margin that fell
        figure = after(figures, "loss" if is_above else "rewards/margin")
    else:
        return None
    return None if figure is None or limit is None else (figure, limit, is_above)


def after(figures: Mapping[str, Change], *names: str) -> float | None:
    """The newest value of the first of the metrics that has one."""
    return next((value for name in names if name in figures and (value := figures[name].after) is not None), None)
