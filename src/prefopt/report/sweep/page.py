"""report.html of a sweep: one page about its runs beside each other, that needs nothing but itself.

Made like the page about a run: from files, at any time, everything in it escaped.
"""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefopt.disk import write_whole
from prefopt.errors import RunError
from prefopt.report.facts import key_settings
from prefopt.report.page import HERE, environment, sizes, title
from prefopt.report.record import mapping
from prefopt.report.sweep.best import headline, parts
from prefopt.report.sweep.charts import SweepChart, sweep_charts
from prefopt.report.sweep.files import SweepFiles
from prefopt.report.sweep.record import SweepRecord, read_sweep
from prefopt.report.sweep.table import best_row, columns, reasons
from prefopt.report.text import clock_time, duration, plural, setting


def write_sweep_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page about a sweep.

    Args:
        folder: of the sweep.
        out: the file to write; by default `report.html` in the folder.

    Returns:
        Where it was written. The file appears whole or not at all.

    Raises:
        ConfigError: the folder holds no sweep.
        RunError: the page cannot be written.
    """
    path = SweepFiles(folder).report if out is None else out
    text = sweep_html(read_sweep(folder), now=datetime.now(UTC), is_inside=out is None)
    try:
        write_whole(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Give another place with --out, or make room.") from None
    return path


def sweep_html(record: SweepRecord, *, now: datetime, is_inside: bool = True) -> str:
    """The page as text.

    Args:
        record: of the sweep.
        now: with its zone; when the page says that it was written.
        is_inside: it will lie in the sweep's folder, from where the runs' pages can be linked to.
    """
    from markupsafe import Markup

    words, tone = headline(record)
    first = next((run.record for run in record.runs if run.record is not None), None)
    charts = [drawn(chart) for chart in sweep_charts(record)]
    state, state_tone = state_of(record)
    return (
        environment()
        .get_template("sweep/page.html")
        .render(
            title=heading(record),
            css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            state_word=state,
            state_tone=state_tone,
            facts=facts(record),
            headline=words,
            tone=tone,
            parts=[(name, " ".join(found)) for name, found in parts(record)],
            columns=columns(record),
            rows=rows(record, is_inside=is_inside),
            num_values=len(record.swept),
            best=best_row(record),
            reasons=reasons(record),
            charts=[chart | {"size": size} for chart, size in zip(charts, sizes(len(charts)), strict=True)],
            shared=shared_settings(record),
            commands=commands(record),
            data=str(mapping(first.data if first else {}).get("num_held_out") or ""),
            version=version("prefopt"),
            written=clock_time(now),
            folder=str(record.folder),
        )
    )


def heading(record: SweepRecord) -> str:
    """What was swept, on which model and data."""
    first = next((run.record for run in record.runs if run.record is not None), None)
    what = title(first) if first is not None else record.method.upper()
    return f"{what}, over {' and '.join(record.swept)}"


def state_of(record: SweepRecord) -> tuple[str, str]:
    """Where the sweep stands, and its tone."""
    states = [run.state for run in record.runs]
    if "running" in states:
        return "Running", "open"
    if any(state in ("waiting", "stopped") for state in states):
        return "Not finished", "mixed"
    if "failed" in states:
        return "Finished, not all of it", "mixed"
    return "Finished", "good"


def facts(record: SweepRecord) -> list[str]:
    """How many runs there are, and what they took."""
    counts = [(state, sum(run.state == state for run in record.runs)) for state in ("finished", "failed", "stopped", "running", "waiting")]
    found = [plural(len(record.runs), "run")]
    if any(run.state != "finished" for run in record.runs):
        found += [f"{num} {state}" for state, num in counts if num]
    if seconds := sum(run.seconds or 0.0 for run in record.runs):
        found.append(f"trained for {duration(seconds)} in all")
    device = next((str(run.record.summary["device"]) for run in record.runs if run.record and run.record.summary.get("device")), "")
    return [words for words in (*found, device) if words]


def rows(record: SweepRecord, *, is_inside: bool) -> list[tuple[str, Sequence[str]]]:
    """The table's rows: where the run's own page is, and the cells."""
    cells = zip(*(column.cells for column in columns(record)), strict=True)
    pages = [f"{run.name}/report.html" if is_inside and run.record and run.record.files.report.is_file() else "" for run in record.runs]
    return list(zip(pages, cells, strict=True))


def drawn(chart: SweepChart) -> dict[str, Any]:
    """A chart for the template."""
    from markupsafe import Markup

    from prefopt.report.sweep.draw import draw_sweep_chart  # loads matplotlib

    legend = [(series.label, series.role, "") for series in chart.series if series.label]
    return {"title": chart.title, "unit": chart.unit, "says": chart.says, "legend": legend, "svg": Markup(draw_sweep_chart(chart))}


def shared_settings(record: SweepRecord) -> list[tuple[str, str]]:
    """The settings that decide most and that all runs have."""
    known = [dict(key_settings(run.record)) for run in record.runs if run.record is not None]
    return [(name, value) for name, value in known[0].items() if all(other.get(name) == value for other in known)] if known else []


def commands(record: SweepRecord) -> list[tuple[str, str]]:
    """What can be typed to go on from here: a sentence and a command each."""
    config = shlex.quote(str(SweepFiles(record.folder).config))
    found = []
    if any(run.state not in ("finished", "failed") for run in record.runs):
        found.append(("Go on with it", f"prefopt sweep --config {config} --resume"))
    name, values = next(iter(record.swept.items()))
    more = ",".join([*map(setting, values), "..."])
    found.append(("Add values; what is done stays", f"prefopt sweep --config {config} {name}={more} --resume"))
    found.append(("Run it again in another folder", f"prefopt sweep --config {config} --out NEW_FOLDER"))
    found.append(("Make this page again", f"prefopt report {shlex.quote(str(record.folder))}"))
    return found
