"""`prefopt new`: a small model and its tokenizer, from any text."""

from prefopt.cli.flags import settings_app
from prefopt.pipeline.new_settings import NewSettings


def run(settings: NewSettings) -> None:
    """Make the model."""
    from prefopt.pipeline.new import new_model  # loads torch

    new_model(settings)


app = settings_app("new", NewSettings, run, usage="new --text FILE... --out DIR [FLAGS]")
