"""`prefopt report`: one page about a run, or about a sweep."""

from pathlib import Path

from prefopt.cli.flags import settings_app
from prefopt.config import REQUIRED, Setting, Settings


class ReportSettings(Settings):
    """What can be said about the page."""

    run: Path = Setting(REQUIRED, help="Folder of a run or of a sweep: going on, finished, stopped or failed.")
    out: Path | None = Setting(None, help="File to write; the default is report.html in the run's folder.")


def run(settings: ReportSettings) -> None:
    """Write the page and say where it is."""
    from prefopt.report.page import write_report
    from prefopt.report.sweep.files import is_sweep
    from prefopt.report.sweep.page import write_sweep_report

    folder, out = settings.run.expanduser(), None if settings.out is None else settings.out.expanduser()
    print(write_sweep_report(folder, out) if is_sweep(folder) else write_report(folder, out))


app = settings_app("report", ReportSettings, run, usage="report RUN [--out FILE]", positional="run", word="RUN")
