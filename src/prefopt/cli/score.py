"""`prefopt score`: what a reward model thinks of the answers in a file."""

from prefopt.cli.flags import settings_app
from prefopt.pipeline.score_settings import ScoreSettings


def run(settings: ScoreSettings) -> None:
    """Score them."""
    from prefopt.pipeline.score import score_files  # loads torch

    score_files(settings)


app = settings_app(
    "score",
    ScoreSettings,
    run,
    usage="score MODEL_OR_RUN --data FILE... [FLAGS]",
    positional="model",
    word="MODEL",
    without=("eval_data", "eval_fraction"),
)
