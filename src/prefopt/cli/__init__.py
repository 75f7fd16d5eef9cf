"""The command line: one thin file per command, no torch at import."""

from prefopt.cli.entry import main

__all__ = ["main"]
