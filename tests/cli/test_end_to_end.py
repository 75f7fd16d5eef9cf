"""From words on a command line to a model on disk, with nothing replaced."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt.cli import main

QUESTIONS = ["How do I boil an egg?", "Is the sea wide?", "What is the capital of France?", "Write a poem.", "Are you there?", "Who sings?"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": question, "chosen": f" Yes, {question.lower()}", "rejected": " I do not know."} for question in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_dpo_by_flags_then_again_from_the_config_it_wrote(pairs: str, model_folder: Callable[..., Path], tmp_path: Path):
    out = tmp_path / "run"
    common = ["--model", str(model_folder()), "--data", pairs, "--precision", "float32", "--learning-rate", "1e-3"]
    assert main(["train", "dpo", *common, "--out", str(out), "--batch-size", "3", "--max-steps", "3"]) == 0
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are the same function
    assert lines[2]["loss"] < lines[0]["loss"]
    assert json.loads((out / "summary.json").read_text())
    assert (out / "model" / "config.json").is_file()

    again = tmp_path / "again"
    assert main(["train", "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    assert [line["loss"] for line in metrics(again)] == pytest.approx([line["loss"] for line in lines], abs=1e-6)


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(
    pairs: str, model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["train", "sft", "--model", str(model_folder()), "--data", pairs, "--out", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "is not empty" in err
    assert "Traceback" not in err
    assert main([*words, "--overwrite"]) == 0


def test_stages_follow_each_other(pairs: str, model_folder: Callable[..., Path], tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model_folder()}\ndata: {pairs}\nout: {tmp_path / 'run'}\nstages: [sft, dpo]\nmax-steps: 1\ndpo:\n  batch-size: 2\n"
    )
    assert main(["train", "--config", str(file), "--seed", "3"]) == 0
    assert (tmp_path / "run" / "dpo" / "model" / "config.json").is_file()
    assert [len(metrics(tmp_path / "run" / stage)) for stage in ("sft", "dpo")] == [1, 1]
