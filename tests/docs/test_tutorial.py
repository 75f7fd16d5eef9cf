"""The tutorial, run from its first line to its last.

In the normal suite with a few steps per training: every command and every block works and has the files of those before it.
The slow test runs it as it stands, and what the page claims must hold: the same lines (but for numbers), and the same outcome.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tests.docs.pages import Block, blocks, joined, shows
from tests.docs.test_examples import TUTORIAL, run_block

from prefopt.cli import main

FEW_STEPS = 13
"""One more than the step at which the tutorial interrupts a run."""


class Terminal(StringIO):
    """Both streams of a terminal as one."""


@contextmanager
def on_paper() -> Iterator[Terminal]:
    page = Terminal()
    with redirect_stdout(page), redirect_stderr(page):
        yield page


def run_commands(block: Block, extra: list[str]) -> str:
    """What the commands of a block print, both streams together."""
    with on_paper() as page:
        for line in joined(block.text):
            name, *words = shlex.split(line, comments=True)
            assert name == "prefopt", f"{block.place}: {name} is not run by the tests"
            training = words[0] == "train"
            code = main([*words, *(extra if training else [])])
            refused = "cannot be used" in page.getvalue()
            assert code == (2 if refused else 0), f"{block.place}: {line}\n{page.getvalue()}"
    return page.getvalue()


def run_tutorial(*, extra: list[str], compare: bool) -> dict[str, Any]:
    """Run all blocks; the names that its Python defines."""
    namespace: dict[str, Any] = {"__name__": "example"}
    printed = ""
    for block in blocks(TUTORIAL):
        if block.kind == "python":
            printed = run_block(block, namespace)
        elif block.kind == "sh":
            printed = run_commands(block, extra)
        elif block.kind == "text like":
            assert block.text.strip(), f"{block.place} shows nothing; the block above prints:\n{printed}"
            if compare:
                missing = shows(block.text, printed, exactly=False)
                assert missing is None, f"{block.place} shows {missing!r}; the block above prints:\n{printed}"
        else:
            assert block.kind in ("yaml", "text"), f"{block.place}: {block.kind}"
    return namespace


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is there before the tutorial, no cache either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path, os.getcwd()])
    return tmp_path


def test_every_block_runs(empty_folder: Path):
    run_tutorial(extra=["--max-steps", str(FEW_STEPS)], compare=False)
    assert (empty_folder / "runs" / "second" / "report.html").is_file()
    assert (empty_folder / "shop-model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_it_shows_and_says_is_so(empty_folder: Path):
    names = run_tutorial(extra=[], compare=True)
    ends, watch = {run: names[run] for run in ("first", "second", "third")}, {}
    for run in ("dpo", "second", "too-far"):
        watch[run] = names["json"].loads((empty_folder / "runs" / run / "summary.json").read_text())["watch"]
    # Half of the reference's answers are rude. Of 100, differences of 14 are two standard errors of chance.
    assert ends["first"]["rude"] <= 35 and ends["first"]["polite"] >= 60
    assert ends["second"]["rude"] <= 10 and ends["second"]["polite"] >= 80
    assert ends["third"]["polite"] <= 40
    assert watch["dpo"] == []
    assert watch["second"] == []
    assert "kl" in watch["too-far"]
