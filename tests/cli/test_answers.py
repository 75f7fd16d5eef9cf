"""`prefopt merge`, `generate` and `chat` from the command line: what goes where, and the exit codes."""

import json
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from tests.pipeline.trained_runs import full_run, lora_run

from prefopt.cli import main

__all__ = ["full_run", "lora_run"]

QUICK = ["--max-new-tokens", "4", "--precision", "float32"]


def test_merge_says_what_it_did_and_where_the_model_is(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["merge", str(lora_run), "--out", str(tmp_path / "out"), "--precision", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("base: ")
    assert lines[1].endswith("LoRA of rank 4, changes 14 layers")
    assert lines[-1] == f"model: {tmp_path / 'out'}"
    assert main(["generate", str(tmp_path / "out"), "--prompt", "Is number 1 good?", *QUICK]) == 0


def test_generate_keeps_answers_and_remarks_apart(full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "asked.txt").write_text("Is number 1 good?\nIs number 2 good?\n")
    assert main(["generate", str(full_run), "--prompts", str(tmp_path / "asked.txt"), *QUICK]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("── 1 of 2: asked.txt:1\nprompt: Is number 1 good?\nreference: ")
    assert "prompts: plain text is continued as it is, as in training" in err
    out_file = tmp_path / "answers.jsonl"
    assert main(["generate", str(full_run), "--prompt", "a", "b", "--out", str(out_file), "--logps", *QUICK]) == 0
    assert capsys.readouterr().out == ""
    rows = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b"]
    assert rows[0].keys() == {"prompt", "row", "policy", "reference", "tokens", "ended", "logps", "log_ratio", "reward"}


def test_chat_reads_a_pipe(full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"Is number 1 good?\n")))
    assert main(["chat", str(full_run), *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "> Is number 1 good?\nreference: " in out
    assert err == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["merge"], "--adapter: is required"),
        (["merge", "a", "b", "--out", "x"], "--adapter: takes one value (given: a b)"),
        (["merge", "/no/such", "--out", "x"], "no folder /no/such"),
        (["merge", "x", "--out", "y", "--precision", "int8"], "--precision: must be float32, bf16 or float16 (given: int8)"),
        (["generate", "x"], "give prompts as a file (--prompts FILE"),
        (["generate", "/no/such", "--prompt", "a"], "no folder /no/such"),
        (["generate", "x", "--prompts", "/no/such.txt"], "/no/such.txt does not exist"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "--temperature: must be greater than or equal to 0"),
        (["chat"], "--model: is required"),
        (["chat", "/no/such"], "no folder /no/such"),
        (["chat", "x", "--promt"], "--promt: no such flag"),
    ],
)
def test_mistakes_exit_with_2_and_a_sentence(words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.startswith("prefopt: ")
    assert "Traceback" not in err
    assert out == ""


def test_a_whole_model_needs_no_merging(full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["merge", str(full_run), "--out", str(tmp_path / "out")]) == 2
    assert "holds a whole model: there is no adapter to merge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
