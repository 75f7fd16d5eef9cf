"""Command lines, YAML files and settings in the docs are those of the program."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs.pages import GENERATED, PAGES, ROOT, Block, blocks, blocks_of, commands, name_of, spans

from prefopt.cli import main
from prefopt.cli.entry import COMMANDS
from prefopt.cli.flags import Given
from prefopt.config import Settings, check, read_yaml, underscored
from prefopt.methods.table import METHODS
from prefopt.pipeline.stages import plan_stages
from prefopt.pipeline.sweep.plan import SweepPlan, plan_sweep
from prefopt.training.assemble import method_named, settings_for

WRITTEN = [page for page in PAGES if page.name not in GENERATED]

ALWAYS = {"help", "version", "config"}
"""Flags that are no settings."""

OTHER_PROGRAMS = ("pip", "python", "torchrun", "accelerate", "git", "make")

LINES = [(block, words) for page in WRITTEN for block in blocks(page) if block.kind == "sh" for words in commands(block)]


class Understood(BaseException):
    """Raised where a command would begin its work; no handler of errors takes it."""


@contextmanager
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands check what they were given, and stop there."""
    checked = Given.check

    def check_and_stop(self: Given, kind: type[Settings]) -> Any:
        checked(self, kind)
        raise Understood

    def plan_and_stop(values: dict[str, Any], overrides: dict[str, Any]) -> None:
        plan_stages(values, overrides)
        raise Understood

    def stop(plan: SweepPlan, **_: Any) -> None:
        raise Understood

    with monkeypatch.context() as patch:
        patch.setattr(Given, "check", check_and_stop)
        patch.setattr("prefopt.pipeline.stages.run_stages", plan_and_stop)
        patch.setattr("prefopt.pipeline.sweep.run.run_sweep", stop)
        yield


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether prefopt would begin to work; false where it has no more to do (`--help`), or refuses."""
    with no_work(monkeypatch):
        try:
            return main(words) == 0
        except Understood:
            return True


@pytest.mark.parametrize(("block", "words"), LINES, ids=[f"{block.place} {' '.join(words)[:60]}" for block, words in LINES])
def test_command_lines_are_understood(
    block: Block, words: list[str], workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (workshop / "recipes").symlink_to(ROOT / "recipes")
    configs = [
        other.text for other in blocks(block.page) if other.kind == "yaml" and re.search(r"^(method|stages):", other.text, re.MULTILINE)
    ]
    (workshop / "run.yaml").write_text(configs[0] if configs else "method: dpo\nmodel: model\ndata: pairs.jsonl\nout: runs/dpo\n")
    if "..." in words:  # stands for what a run needs anyway
        words = [*(word for word in words if word != "..."), "--model", "model", "--data", "pairs.jsonl", "--out", "runs/dpo"]
    assert understood(words, monkeypatch), f"{block.place}: prefopt {' '.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("train dpo --model m --data d --out o --beta 0.1", True),
        ("train dpo --model m --data d --out o --betta 0.1", False),
        ("train dpo --model m --data d --out o --lr-schedule sine", False),
        ("train dpo --model m", False),
        ("trian dpo", False),
        ("train --help", True),
        ("sweep beta=0.1,0.3 --model m --data d --out o --eval-fraction 0.1", True),
        ("sweep betta=0.1,0.3 --model m --data d --out o --eval-fraction 0.1", False),
    ],
)
def test_a_wrong_command_line_would_be_noticed(words: str, right: bool, monkeypatch: pytest.MonkeyPatch):
    assert understood(words.split(), monkeypatch) is right


@pytest.mark.parametrize("block", blocks_of("yaml", WRITTEN), ids=lambda block: block.place)
def test_yaml_is_settings(block: Block, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(block.text)
    values = read_yaml(path)
    if "stages" in values:
        plan_stages({name: underscored(value, source=name) if isinstance(value, dict) else value for name, value in values.items()}, {})
    elif "sweep" in values:
        required = {"model": "m", "data": "d", "out": "o"}
        plan_sweep(values.pop("method", "dpo"), values.pop("sweep"), required | values)
    elif "method" in values:
        kind = settings_for(method_named(values.pop("method")))
        required = {"model": "m", "data": "d", "out": "o"}
        check(kind, required | values)
    else:
        assert values
        for kind in (settings_for(row.load()) for row in METHODS):
            if values.keys() <= kind.model_fields.keys():
                check(kind, {"model": "m", "data": "d", "out": "o"} | values)
                return
        pytest.fail(f"{block.place}: no method has all of {', '.join(values)}")


@cache
def all_settings() -> frozenset[str]:
    """The settings of all commands, as flags without their dashes."""
    from prefopt.cli.sweep_method import sweep_panels

    names = {name for row in METHODS for panel in sweep_panels(row.name) for name in panel.fields}
    for module in COMMANDS:
        app = __import__(f"prefopt.cli.{module}", fromlist=["app"]).app
        for parameter in signature_of(app):
            names.add(parameter)
    return frozenset(name.replace("_", "-") for name in names) | ALWAYS


def signature_of(app: Any) -> list[str]:
    import inspect

    command: Callable[..., Any] | None = app.default_command
    return [] if command is None else [name for name in inspect.signature(command).parameters if name != "words"]


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_settings_that_pages_name_exist(page: Path):
    ours = [span for span in spans(page) if not span.startswith(OTHER_PROGRAMS)]
    named = [flag for span in ours for flag in re.findall(r"(?:^|[ \[])--([a-z][a-z0-9-]*)", span)]
    assert [flag for flag in named if flag not in all_settings()] == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_commands_that_pages_name_exist(page: Path):
    named = {words[1] for span in spans(page) if (words := span.split())[0] == "prefopt" and len(words) > 1}
    assert {name for name in named if not name.startswith("-")} - {*COMMANDS, "..."} == set()
    methods = {words[2] for span in spans(page) if (words := span.split())[:2] == ["prefopt", "train"] and len(words) > 2}
    assert {name for name in methods if not name.startswith("-")} - {*(row.name for row in METHODS), "METHOD", "..."} == set()


def test_the_settings_of_all_commands_are_known():
    assert {"beta", "lora-rank", "kind", "vocabulary", "score", "config"} <= all_settings()
    assert "betta" not in all_settings()


def test_recipes_are_settings(tmp_path: Path):
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        if "stages" in values:
            plan_stages(values, {})
        else:
            check(settings_for(method_named(values.pop("method"))), {"model": "m", "data": "d", "out": "o"} | values)
