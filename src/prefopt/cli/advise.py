"""`prefopt advise`: look at data, and say which method, with which settings, and why."""

from prefopt.cli.flags import settings_app
from prefopt.pipeline.advise.settings import AdviseSettings


def run(settings: AdviseSettings) -> None:
    """Look, decide and say it."""
    from prefopt.pipeline.advise.run import advise

    advise(settings, print)


app = settings_app(
    "advise",
    AdviseSettings,
    run,
    usage="advise FILE... [--model MODEL] [--write advice.yaml] [FLAGS]",
    positional="data",
    without=("on_bad_row",),
)
