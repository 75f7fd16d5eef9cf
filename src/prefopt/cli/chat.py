"""`prefopt chat`: a policy and its reference, side by side."""

from prefopt.cli.flags import settings_app
from prefopt.pipeline.answer_settings import ChatSettings


def run(settings: ChatSettings) -> None:
    """Talk."""
    from prefopt.pipeline.chat import chat  # loads torch

    chat(settings)


app = settings_app("chat", ChatSettings, run, usage="chat MODEL_OR_RUN [FLAGS]", positional="model", word="MODEL")
