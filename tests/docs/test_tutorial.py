"""The tutorial, run from its first line to its last.

In the normal suite with a few steps per training: every command and every block works and has the files of those before it.
The slow test runs it as it stands, and what the page claims must hold: the same lines (but for numbers), and the same outcome.
"""

import shlex
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs.pages import CLEANED, Block, blocks, commands, joined, shows
from tests.docs.test_examples import TUTORIAL, run_block

from prefopt.cli import main
from prefopt.cli.flags import parse
from prefopt.cli.train_method import panels
from prefopt.config import check
from prefopt.training.assemble import method_named, settings_for

FEW_STEPS = 13
"""One more than the step at which the tutorial interrupts a run."""

SETTINGS = "settings = {"
"""Where the settings of its Python begin."""


def run_commands(block: Block, max_steps: int | None) -> str:
    """What the commands of a block print, both streams together."""
    extra = [] if max_steps is None else ["--max-steps", str(max_steps), "--sample-tokens", "8"]
    page = StringIO()
    with redirect_stdout(page), redirect_stderr(page):
        for line in joined(block.text):
            name, *words = shlex.split(line, comments=True)
            assert name == "prefopt", f"{block.place}: {name} is not run by the tests"
            code = main([*words, *(extra if words[0] == "train" else [])])
            refused = "cannot be used" in page.getvalue()
            assert code == (2 if refused else 0), f"{block.place}: {line}\n{page.getvalue()}"
    return page.getvalue()


def shortened(block: Block, max_steps: int | None) -> Block:
    """The block with as many steps in its trainings, and few questions."""
    if max_steps is None:
        return block
    assert "prefopt.train" not in block.text or SETTINGS in block.text, (
        f"{block.place} trains with settings that this test does not shorten"
    )
    return replace(
        block,
        text=block.text.replace(SETTINGS, f'{SETTINGS}"max_steps": {max_steps}, "sample_tokens": 8, ').replace("range(100)", "range(4)"),
    )


def run_tutorial(*, max_steps: int | None = None) -> dict[str, Any]:
    """Run all blocks, and compare what they print where nothing is shortened; gives the names that its Python defines."""
    namespace: dict[str, Any] = {"__name__": "example"}
    printed = ""
    for block in blocks(TUTORIAL):
        if block.kind == "python":
            printed = run_block(shortened(block, max_steps), namespace)
        elif block.kind == "sh":
            printed = run_commands(block, max_steps)
        elif block.kind in CLEANED:
            assert block.text.strip(), f"{block.place} shows nothing; the block above prints:\n{printed}"
            if max_steps is None:
                missing = shows(block.text, printed, block.kind)
                assert missing is None, f"{block.place} shows {missing!r}; the block above prints:\n{printed}"
        else:
            assert block.kind in ("yaml", "text"), f"{block.place}: {block.kind}"
    return namespace


# What peft asks of transformers when it loads an adapter; the reader cannot change it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is there before the tutorial, no cache either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_block_runs(empty_folder: Path):
    run_tutorial(max_steps=FEW_STEPS)
    assert (empty_folder / "runs" / "second" / "report.html").is_file()
    assert (empty_folder / "shop-model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_it_shows_and_says_is_so(empty_folder: Path):
    names = run_tutorial()
    ends, watch = {run: names[run] for run in ("first", "second", "third")}, {}
    for run in ("dpo", "second", "too-far"):
        watch[run] = names["json"].loads((empty_folder / "runs" / run / "summary.json").read_text())["watch"]
    # Half of the reference's answers are rude. Of 100, differences of 14 are two standard errors of chance.
    assert ends["first"]["rude"] <= 35
    assert ends["first"]["polite"] >= 60
    assert ends["second"]["rude"] <= 14
    assert ends["second"]["polite"] >= 75
    assert ends["third"]["polite"] <= 40
    assert watch["dpo"] == []
    assert watch["second"] == []
    assert "kl" in watch["too-far"]


def test_its_file_is_its_command():
    shown = blocks(TUTORIAL)
    place = next(index for index, block in enumerate(shown) if block.kind == "yaml")
    in_file = yaml.safe_load(shown[place].text)
    assert in_file.pop("method") == "dpo"
    (words,) = [words for block in shown[:place] for words in commands(block) if words[:2] == ["train", "dpo"]]
    kind = settings_for(method_named("dpo"))
    assert check(kind, in_file) == parse(words[2:], panels(method_named("dpo"))).check(kind)
