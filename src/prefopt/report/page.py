"""report.html: one page about a run, that needs nothing but itself.

It is made from the files of the run's folder, at any time: while the run goes, when it has ended, and when it has failed.
Whatever comes from files, data and models are among them, is escaped by the template engine and shown with its control
characters visible; a policy in the page forbids scripts and everything from elsewhere.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.disk import write_whole
from prefopt.errors import RunError
from prefopt.report.answers import dialogues, figures_of, introduction, sides
from prefopt.report.cards import cards
from prefopt.report.charts import Chart, Mark, groups, marks
from prefopt.report.examples import Learned, best_and_worst, spread
from prefopt.report.facts import all_settings, commands, data_notes, data_rows, key_settings, manifest_rows, source_rows, time_words
from prefopt.report.figures import METRICS, Metric, changes
from prefopt.report.files import RunFiles
from prefopt.report.findings import passed
from prefopt.report.record import HeldOut, RunRecord, listed, mapping, read_run
from prefopt.report.state import RunState, process_is_alive, run_state
from prefopt.report.text import base_name, clip, clip_middle, clock_time, count, model_label, number, one_line, plain, plural, visible
from prefopt.report.verdict import verdict

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent

PARTS = {
    "verdict": "Verdict",
    "watch": "Watch",
    "error": "How it ended",
    "curves": "Curves",
    "examples": "Held-out examples",
    "answers": "Answers",
    "data": "Data",
    "settings": "Settings",
    "again": "Run it again",
}

TONES = {"finished": "good", "running": "open", "stopped": "mixed", "failed": "bad", "broken off": "bad", "unknown": "open"}

CODE = re.compile(r"`([^`\n]{1,200})`|(?<![\w-])(--[a-z][a-z-]*)")
"""What our own words set in the font of code: whatever stands between backticks, and flags."""

MOST_EVALUATIONS = 60
"""Rows of the table of evaluations."""

MOST_BAD_ROWS = 20


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page about a run.

    Args:
        folder: of the run.
        out: the file to write; by default `report.html` in the folder.

    Returns:
        Where it was written. The file appears whole or not at all.

    Raises:
        ConfigError: the folder holds no run.
        RunError: the page cannot be written.
    """
    path = RunFiles(folder).report if out is None else out
    text = report_html(folder, now=datetime.now(UTC))
    try:
        write_whole(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Give another place with --out, or make room.") from None
    return path


def report_html(folder: Path, *, now: datetime) -> str:
    """The page as text.

    Args:
        folder: of the run.
        now: with its zone; when the page says that it was written.

    Raises:
        ConfigError: the folder holds no run.
    """
    record = read_run(folder)
    state = run_state(record, now=now, is_alive=process_is_alive)
    return environment().get_template("page.html").render(context(record, state, now))


@cache
def environment() -> "Environment":
    """The template engine: it escapes everything, shows control characters, and fails where a name is not known."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def shown(value: Any) -> Any:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    env = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, finalize=shown, trim_blocks=True)

    def with_code(text: str) -> Markup:
        # Escaped first: what becomes code is the same text, in another font.
        return Markup(CODE.sub(lambda found: f"<code>{found[1] or found[2]}</code>", str(escape(visible(text)))))

    env.filters |= {"code": with_code, "clip": clip, "clip_middle": clip_middle, "one_line": one_line}
    env.filters |= {"answer_figures": figures_of, "completions": completions}
    return env


def context(record: RunRecord, state: RunState, now: datetime) -> dict[str, Any]:
    """All that the template names."""
    figures = changes(record)
    found = verdict(record, state)
    answered = dialogues(record)
    failed = state.name == "failed"
    bad_rows = [bad_row(row) for row in record.bad_rows[:MOST_BAD_ROWS]]
    error = state.message or "The run ended in an error." if failed else ""
    return {
        **page_frame(record, state, now, has_error=bool(error)),
        "verdict": found,
        "cards": cards(record, figures),
        "findings": [(finding, passed(finding, record, figures)) for finding in record.findings],
        "watch_words": "The numbers stand in the charts below, at the steps of what they found." if marks(record) else "",
        "watch_silence": silence(record, state),
        "error": error,
        "bad_rows": bad_rows if failed else [],
        "num_bad_rows": plural(len(record.bad_rows), "example")
        + (f", the first {len(bad_rows)} of them" if len(bad_rows) < len(record.bad_rows) else ""),
        "groups": drawn_groups(record),
        "evaluations": evaluations(record),
        **examples_part(record, state),
        "dialogues": answered,
        "answers_words": introduction(record),
        "sides": sides(record),
        "no_answers": "" if answered else no_answers(record),
        "sources": source_rows(mapping(record.data.get("summary"))),
        "data_rows": data_rows(record),
        "data_notes": data_notes(record),
        "key_settings": key_settings(record),
        "settings": all_settings(record),
        "manifest": manifest_rows(record, state),
        "commands": commands(record, state),
    }


def page_frame(record: RunRecord, state: RunState, now: datetime, *, has_error: bool) -> dict[str, Any]:
    """Head and foot."""
    from markupsafe import Markup

    where = mapping(record.manifest.get("environment")).get("device") or record.summary.get("device") or ""
    remarks = []
    if record.metrics.num_unread:
        unread = plural(record.metrics.num_unread, "line")
        remarks.append(f"Not in the charts, because they could not be read: {unread} of {record.files.metrics.name}.")
    if not record.manifest:
        remarks.append("This run left no manifest.json; it was made by an older version, or ended before it began.")
    return {
        "title": title(record),
        # A style sheet of our own; nothing in it comes from a run.
        "css": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "state_word": f"{state.name[0].upper()}{state.name[1:]}",
        "state_tone": TONES[state.name],
        "facts": [words for words in (state.progress, early_words(record, state), time_words(record, state), str(where)) if words],
        "parts": [(name, words) for name, words in PARTS.items() if name != "error" or has_error],
        "version": version("prefopt"),
        "written": clock_time(now),
        "folder": str(record.folder),
        "remarks": remarks,
        "is_pairs": record.is_pairs,
        "num_held_out": record.num_held_out,
        "held_out_step": record.held_out_step,
    }


def title(record: RunRecord) -> str:
    """What was run: method, model and data."""
    method = record.method.upper() or "A run"
    sources = listed(mapping(record.data.get("summary")).get("sources"))
    names = [base_name(str(mapping(source).get("name", ""))) for source in sources] or [
        base_name(str(name)) for name in listed(record.settings.get("data"))
    ]
    data = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return method + (f": {model_label(record.model_name)}" if record.model_name else "") + (f" on {data}" if data else "")


def early_words(record: RunRecord, state: RunState) -> str:
    """That a run ended before its last step because the held-out loss no longer fell."""
    is_early = state.name == "finished" and state.num_steps is not None and state.step < state.num_steps
    return "ended early: the held-out loss fell no more" if is_early and record.settings.get("early_stop") else ""


def silence(record: RunRecord, state: RunState) -> str:
    """What is said where the watch found nothing."""
    if not record.metrics.num_rows:
        return "It has seen no step yet."
    if not record.manifest:
        return "There is no word of a watch in this folder: the run was made by a version without one."
    return "The watch looked at every step and found nothing" + (" so far." if not state.has_ended else ".")


def drawn_groups(record: RunRecord) -> list[dict[str, Any]]:
    """The charts, as SVG."""
    found = marks(record)
    return [
        {
            "title": group.title,
            "charts": [
                drawn_chart(chart, found) | {"size": size} for chart, size in zip(group.charts, sizes(len(group.charts)), strict=True)
            ],
        }
        for group in groups(record)
    ]


def sizes(num: int) -> list[str]:
    """How wide each chart of a group is, so that no row has a hole: two in a row, an odd number's last three in one, one alone across."""
    if num == 1:
        return ["alone"]
    return ["half"] * num if num % 2 == 0 else ["half"] * (num - 3) + ["third"] * 3


def drawn_chart(chart: Chart, found: list[Mark]) -> dict[str, Any]:
    """A chart for the template."""
    from markupsafe import Markup

    from prefopt.report.draw import draw_chart  # loads matplotlib

    legend = [(line.label, line.role, "dashed" if line.is_held_out else "") for line in chart.lines if line.label]
    return {
        "title": chart.title,
        "unit": chart.unit,
        "says": chart.says,
        "beyond": chart.beyond,
        "legend": legend,
        # Numbers and our own words; names of metrics, which a method of the user's own may choose, are escaped where it is drawn.
        "svg": Markup(draw_chart(chart, found)),
    }


def evaluations(record: RunRecord) -> dict[str, Any] | None:
    """Every evaluation's figures as a table; the newest ones where there are very many."""
    names = [name for name in METRICS if record.metrics.curve(key_of(name))]
    names += sorted({name.removeprefix("eval/") for name in record.metrics.curves if name.startswith("eval/")} - set(names))
    columns = {name: dict(zip(curve.steps, curve.values, strict=True)) for name in names if (curve := record.metrics.curve(key_of(name)))}
    steps = sorted({step for column in columns.values() for step in column})[-MOST_EVALUATIONS:]
    if not steps:
        return None
    before = record.held_out_figures(before=True)
    metrics = {name: METRICS.get(name) or Metric(name) for name in columns}
    rows = [["0", *(metrics[name].show(before.get(name)) for name in columns)]] if before else []
    rows += [[count(step), *(metrics[name].show(columns[name].get(step)) for name in columns)] for step in steps if step > 0]
    return {"names": list(columns), "rows": rows}


def key_of(name: str) -> str:
    """How the metrics name a figure of an evaluation."""
    return name if name.startswith("samples/") else f"eval/{name}"


def examples_part(record: RunRecord, state: RunState) -> dict[str, Any]:
    """The held-out examples one by one."""
    from markupsafe import Markup

    from prefopt.report.draw import draw_spread

    found = spread(record)
    best, worst = best_and_worst(record)
    if record.is_pairs:
        by, least = "largest margin", "smallest margin"
    elif record.is_thumbs:
        by, least = "reward farthest to the side of its thumb", "reward farthest to the other side"
    else:
        by, least = "likelihood per token that rose most", "likelihood per token that rose least"
    legend = [("now", "held", "block")]
    if record.is_pairs:
        legend = [("chosen ahead", "chosen", "block"), ("rejected ahead", "rejected", "block")]
    elif record.is_thumbs:
        legend = [("on the side of the thumb", "chosen", "block"), ("on the other", "rejected", "block")]
    if found and len(set(found.before)) > 1:
        legend.append(("before training", "outline", ""))
    if record.held_out_step is not None:
        why = "The file of the held-out examples holds no figures that can be shown."
    elif record.num_held_out:
        why = (
            "They have not been looked at since training began."
            if not state.has_ended
            else "No evaluation was made after training began, or none that noted single examples."
        )
    else:
        why = "Nothing was held out. With `eval_fraction: 0.1` or `eval_data`, this part shows how well each example was learned."
    return {
        "spread": found,
        "spread_legend": legend,
        "spread_svg": Markup(draw_spread(found)) if found else "",
        "ranked": [(f"Learned best: {by}", "chosen", best), (f"Learned worst: {least}", "rejected", worst)],
        "no_examples": why,
    }


def completions(learned: Learned) -> list[tuple[str, str, str, str]]:
    """An example's answers: what each is called, its colour, its text, and its figures before and now."""
    example = learned.example
    found = []
    for place, ((label, role, kind), text) in enumerate(zip(names_of(example), example.completions, strict=True)):
        length = f"{plain(example.lengths[place], 0)} tokens" if place < len(example.lengths) else ""
        before, after = (side.get(f"logps/{kind}") for side in (example.before, example.after))
        logps = "" if after is None else f"log-probability {plain(before, 1)} → {plain(after, 1)}"
        reward = example.after.get(f"rewards/{kind}")
        figures = [length, logps, "" if reward is None else f"reward {plain(reward)}"]
        found.append((label, role, text, ", ".join(filter(None, figures))))
    return found


def names_of(example: HeldOut) -> list[tuple[str, str, str]]:
    """What each of an example's answers is called, its colour, and the end of its figures' names; empty where it has none of its own."""
    num = len(example.completions)
    if num == 2:
        return [("Chosen", "chosen", "chosen"), ("Rejected", "rejected", "rejected")]
    if num > 2:  # a ranking: figures are means over its comparisons
        return [(f"Answer {place} of {num}", "chosen" if place == 1 else "rejected", "") for place in range(1, num + 1)]
    if "rewards/desirable" in example.after:
        return [("Answer, thumb up", "chosen", "desirable")]
    if "rewards/undesirable" in example.after:
        return [("Answer, thumb down", "rejected", "undesirable")]
    return [("Answer", "chosen", "chosen")] * num


def no_answers(record: RunRecord) -> str:
    """Why there are no answers to show."""
    is_off = number(record.settings.get("samples")) == 0
    return "None were sampled" + (": the setting `samples` is 0." if is_off else ".")


def bad_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """An example of a step that failed: its place, figures and texts."""
    completions = row.get("completions")
    texts = [("prompt", str(row.get("prompt", "")))]
    if isinstance(completions, list):
        names = ("chosen", "rejected") if len(completions) == 2 else ("answer",) * len(completions)
        texts += zip(names, map(str, completions), strict=True)
    # As text: figures that are not finite are what this is about, and JSON has no number for them.
    figures = ", ".join(f"{name} {value}" for name, value in mapping(row.get("figures")).items())
    return {"row": str(row.get("row", "")), "figures": figures, "texts": texts}
