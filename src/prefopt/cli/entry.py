"""The entry point: the tree of commands, and what becomes of errors.

Exit codes: 0 done; 1 a bug in prefopt, or nobody reads the output; 2 something that the user can mend; 130 interrupted.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from typing import TextIO

from cyclopts import App, CycloptsError
from rich.console import Console

import prefopt
from prefopt.errors import PrefoptError, RunStopped
from prefopt.machine import prepare_environment

ABOUT = """Preference optimization for language models: every method of the family, on one fast engine.

Begin with `prefopt quickstart`. Then `prefopt train METHOD --help` lists the settings of a method."""

COMMANDS = {
    "train": "Train a model with a method, or run the stages of a YAML file.",
    "advise": "Look at data, and say which method, with which settings, and why.",
    "plan": "Say what fits into a memory, with which settings, and how long it takes.",
    "sweep": "Train with several values of a setting, and compare the runs.",
    "methods": "List the methods.",
    "data": "Read and check files of examples, and say what is in them.",
    "cache": "Say what the caches take of the disk, and remove what nobody uses.",
    "report": "Write one page about a run: what came of it, and why.",
    "generate": "Answer prompts with a model, beside its reference.",
    "chat": "Talk to a model and its reference, side by side.",
    "score": "Score the answers of a file with a reward model.",
    "merge": "Make one model of an adapter and its base.",
    "new": "Make a small model and its tokenizer from any text.",
    "quickstart": "See it all on a small example: no network, a few minutes.",
}
"""Name of a command -> what it does. Each is the `app` of the file of that name, read when the command is asked for."""


def build_app() -> App:
    """The tree of commands."""
    app = App(
        name="prefopt",
        help=ABOUT,
        version=prefopt.__version__,
        version_flags=["--version"],
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for place, (name, summary) in enumerate(COMMANDS.items()):
        app.command(f"prefopt.cli.{name}:app", name=name, help=summary, sort_key=place)
    return app


def main(argv: Sequence[str] | None = None, *, console: Console | None = None) -> int:
    """Run a command line.

    Args:
        argv: the words after `prefopt`; by default those that the process was started with.
        console: where help goes; by default the terminal.

    Returns:
        The exit code.
    """
    prepare_environment()  # before torch loads its thread pool
    # Also before torch: when a process of a run is gone, we say so in a sentence, and torch in warnings with addresses in memory.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an answer that is more than the terminal's characters is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        return run(argv, console)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """A warning as a sentence; those about code, which are for its authors, as Python writes them."""
    if issubclass(category, UserWarning):
        print(f"prefopt: note: {message}", file=file or sys.stderr)
    else:
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))


def run(argv: Sequence[str] | None, console: Console | None) -> int:
    """The command line, and its exit code."""
    try:
        build_app()(sys.argv[1:] if argv is None else list(argv), console=console)
        sys.stdout.flush()  # here, where a closed pipe is caught, rather than while Python shuts down
    except PrefoptError as error:
        if not error.told:
            print(f"prefopt: {error}", file=sys.stderr)
        return 130 if isinstance(error, RunStopped) else 2
    except CycloptsError as error:
        error.verbose = False
        print(f"prefopt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prefopt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 1
    except Exception:
        traceback.print_exc()
        print("prefopt: this is a bug in prefopt. Please report it with the lines above and the command.", file=sys.stderr)
        return 1
    return 0
