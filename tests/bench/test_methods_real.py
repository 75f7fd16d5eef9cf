"""Every method on public data: that the commands are ones the command line takes, and that one failure costs nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench.methods import real
from bench.methods.book import Book
from bench.methods.real import Job, jobs, on_world, solutions, words_of
from bench.small_hh import Start
from bench.versus.contestants import UsageError

from prefopt.cli.flags import parse
from prefopt.cli.train_method import panels
from prefopt.methods.table import METHODS
from prefopt.training.assemble import method_named, own_settings, settings_for
from prefopt.training.settings import RunSettings

SOLVED = {
    "question": "1 + 1?",
    "ground_truth": "2",
    "small": {"solution": "2", "is_correct": True},
    "large": {"solution": "3", "is_correct": False},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the files of the public data, as empty as may be."""
    for name in ("llamafactory-demo/kto_en_demo.json", "gsm8k/example_model_solutions.jsonl", "open-assistant/en_100_tree.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(SOLVED) + "\n" for _ in range(9)))
    return tmp_path / "data"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "held_out.jsonl")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "world" / "sft" / "model").mkdir(parents=True)
    for name in ("pairs", "held_out_pairs"):
        (tmp_path / "world" / f"{name}.jsonl").touch()
    return tmp_path / "world"


def checked(job: Job) -> RunSettings:
    """The job's words through what `prefopt train` does with them before it trains."""
    command, method, *words = words_of(job, Path("runs"), 1.0)
    assert (command, method) == ("train", job.method)
    kind = method_named(method)
    return parse(words, panels(kind)).check(settings_for(kind))


def test_the_command_line_takes_every_job(data: Path, start: Start, world: Path, tmp_path: Path):
    every = [*jobs(data, tmp_path, start), *on_world(world)]
    assert len({(job.data, job.method, job.settings) for job in every}) == len(every)
    for job in every:
        settings = checked(job)
        assert (settings.report, settings.memory_check, settings.overwrite, settings.samples) == (False, False, True, 0)
        assert (settings.batch_size, settings.on_bad_row, settings.learning_rate) == (16, "drop", None)
        assert settings.data == [job.flags["data"]]
        assert settings.eval_data or settings.eval_fraction == real.HELD_OUT
        needs = method_named(job.method).needs_with(own_settings(method_named(job.method), settings))
        if job.data in ("kto_en_demo", "gsm8k solutions"):
            assert needs.completions == "thumbs"
        if job.data == "Open-Assistant":
            assert needs.completions == "ranked"


def test_all_methods_run_on_pairs_and_on_the_quickstarts_world(data: Path, start: Start, world: Path, tmp_path: Path):
    names = {row.name for row in METHODS}
    assert {job.method for job in jobs(data, tmp_path, start) if job.data == "hh-rlhf"} == names
    assert {job.method for job in on_world(world)} == names
    assert all(checked(job).max_length == 256 for job in on_world(world))
    moving = [checked(job) for job in jobs(data, tmp_path, start) if "sync" in job.settings]
    assert [(settings.sync_reference_every_steps, settings.lora_rank) for settings in moving] == [(4, 0), (4, 8)]


def test_every_fourth_problem_gives_its_solutions_as_thumbs(data: Path, tmp_path: Path):
    rows = [json.loads(line) for line in solutions(data / "gsm8k/example_model_solutions.jsonl", tmp_path).read_text().splitlines()]
    assert len(rows) == 6
    assert rows[:2] == [{"prompt": "1 + 1?", "completion": "2", "label": True}, {"prompt": "1 + 1?", "completion": "3", "label": False}]


def test_what_is_not_there_is_named(data: Path, start: Start, tmp_path: Path):
    (data / "open-assistant/en_100_tree.jsonl").unlink()
    with pytest.raises(UsageError, match="is not there"):
        list(jobs(data, tmp_path, start))
    with pytest.raises(UsageError, match="no sft/model"):
        list(on_world(tmp_path))


class Commands:
    """Runs nothing, and leaves what a run leaves."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.broken: set[str] = set()

    def run(self, command: list[str], **_: Any) -> SimpleNamespace:
        method, out = command[command.index("train") + 1], Path(command[command.index("--out") + 1])
        self.ran.append(method)
        if method in self.broken:
            return SimpleNamespace(returncode=2, stderr="1 mistake in | the command line:\n  --no-report: no such flag\n")
        figures = {"eval/loss": 0.693} | ({} if method == "sft" else {"eval/rewards/accuracy": 0.5})
        summary = {"steps": 16, "before": figures, "after": {name: value + 0.1 for name, value in figures.items()}}
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps(summary | {"seconds": 9.4, "peak_memory_gb": 1.25, "data": {"num_train": 1256}}))
        return SimpleNamespace(returncode=0, stderr="")


def test_one_failure_costs_nothing_else_and_is_tried_again(
    data: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    commands = Commands()
    monkeypatch.setattr(real, "subprocess", commands)
    monkeypatch.setattr(real, "prepare", lambda work, *_, **__: start)
    words = ["--data", str(data), "--out", str(tmp_path / "real.md"), "--work", str(tmp_path)]
    commands.broken = {"ipo"}
    num_jobs = len(list(jobs(data, tmp_path, start)))
    with pytest.raises(SystemExit, match=f"1 of {num_jobs} runs failed"):
        real.main(words)
    assert len(commands.ran) == num_jobs
    lines = (tmp_path / "real.md").read_text().splitlines()
    assert "| hh-rlhf | sft |  | 1,256 | 16 | 0.693 -> 0.793 |  | 9 | 1.25 |" in lines
    assert "| hh-rlhf | dpo |  | 1,256 | 16 | 0.693 -> 0.793 | 0.50 -> 0.60 | 9 | 1.25 |" in lines
    assert "| gsm8k solutions | bco | --unpaired on | 1,256 | 16 | 0.693 -> 0.793 | 0.50 -> 0.60 | 9 | 1.25 |" in lines
    [failed] = [line for line in lines if "**failed**" in line]
    assert failed.startswith(
        "| hh-rlhf | ipo |  | **failed**: ended with 2: 1 mistake in \\| the command line: --no-report: no such flag |"
    )
    assert failed.replace("\\|", "").count("|") == len(real.HEAD) + 1
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == num_jobs + 1

    commands.broken, commands.ran = set(), []
    real.main(words)
    assert commands.ran == ["ipo"]
    assert "**failed**" not in (tmp_path / "real.md").read_text()
    real.main([*words, "--epochs", "2", "--first", "2"])  # another question, so that the old answers do not serve
    assert commands.ran == ["ipo", "sft", "dpo"]
    assert "| hh-rlhf | sft |" in capsys.readouterr().out


def test_the_table_is_there_after_each_run(data: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = Commands()
    monkeypatch.setattr(real, "subprocess", commands)
    monkeypatch.setattr(real, "prepare", lambda work, *_, **__: start)
    found: list[int] = []
    add = Book.add

    def stop_at_the_third(book: Book, line: dict[str, Any]) -> None:
        if len(found) == 2:
            raise KeyboardInterrupt
        found.append(1)
        add(book, line)

    monkeypatch.setattr(Book, "add", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        real.main(["--data", str(data), "--out", str(tmp_path / "real.md"), "--work", str(tmp_path)])
    assert (tmp_path / "real.md").read_text().count("| hh-rlhf |") == 2
