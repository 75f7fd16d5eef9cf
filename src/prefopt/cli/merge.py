"""`prefopt merge`: one model of base and adapter."""

from prefopt.cli.flags import settings_app
from prefopt.pipeline.merge_settings import MergeSettings


def run(settings: MergeSettings) -> None:
    """Merge them."""
    from prefopt.pipeline.merge import merge  # loads torch

    merge(settings)


app = settings_app("merge", MergeSettings, run, usage="merge RUN_OR_ADAPTER --out DIR [FLAGS]", positional="adapter", word="RUN")
