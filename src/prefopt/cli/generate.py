"""`prefopt generate`: answers to prompts, of a policy and its reference."""

from prefopt.cli.flags import settings_app
from prefopt.pipeline.answer_settings import GenerateSettings


def run(settings: GenerateSettings) -> None:
    """Answer them."""
    from prefopt.pipeline.answers import generate  # loads torch

    generate(settings)


app = settings_app(
    "generate",
    GenerateSettings,
    run,
    usage="generate MODEL_OR_RUN --prompts FILE [FLAGS]\n       prefopt generate MODEL_OR_RUN --prompt TEXT... [FLAGS]",
    positional="model",
    word="MODEL",
)
