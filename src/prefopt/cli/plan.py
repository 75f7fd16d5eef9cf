"""`prefopt plan`: what of a model's training fits into a memory, with which settings, and how long it takes."""

from prefopt.cli.flags import settings_app
from prefopt.pipeline.plan_settings import PlanSettings


def run(settings: PlanSettings) -> None:
    """Plan it."""
    from prefopt.pipeline.plan import plan  # loads torch

    plan(settings)


app = settings_app(
    "plan",
    PlanSettings,
    run,
    usage="plan [METHOD] --model MODEL [--memory 24GB] [--data FILE...] [FLAGS]",
    positional="method",
    word="METHOD",
    without=("eval_data", "eval_fraction"),
)
