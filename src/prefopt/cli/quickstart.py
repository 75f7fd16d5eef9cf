"""`prefopt quickstart`: the whole of it on a small example."""

from pathlib import Path

from prefopt.cli.flags import settings_app
from prefopt.config import Setting, Settings


class QuickstartSettings(Settings):
    """What can be said about the quickstart."""

    out: Path = Setting(Path("runs/quickstart"), help="Folder of its models, data and `summary.json`.")
    seed: int = Setting(0, ge=0, help="Seed of everything drawn at random.")


def run(settings: QuickstartSettings) -> None:
    """Run it."""
    from prefopt.pipeline.quickstart import quickstart  # loads torch

    quickstart(settings.out, settings.seed)


app = settings_app("quickstart", QuickstartSettings, run, usage="quickstart [FLAGS]")
