"""The quickstart: small for its plumbing, whole for its promises."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.errors import RunError
from prefopt.pipeline.quickstart import MARKER, Plan, make_folder, quickstart

SMALL = Plan(num_reviews=500, num_held_out=25, num_pairs=40, hidden=64, layers=1, vocabulary=800, sft_learning_rate=2e-2, max_new_tokens=40)
PROMISED = {"true_reward_before", "true_reward_after", "kl", "reward_accuracy", "seconds"}


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_small_one_leaves_what_it_promises(tmp_path: Path) -> None:
    out, console = tmp_path / "quickstart", plain_console()
    summary = quickstart(out, plan=SMALL, console=console)
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary.keys() >= PROMISED
    assert 0 <= summary["reward_accuracy"] <= 1
    assert summary["num_pairs"] + summary["num_pairs_dropped"] == SMALL.num_pairs
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [json.loads(line) for line in (out / "held_out_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    reviews = [json.loads(line) for line in (out / "reviews.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == summary["num_pairs"]
    assert len(held_out) == summary["num_held_out_pairs"]
    unseen = {row["prompt"] for row in held_out}
    assert unseen.isdisjoint(row["prompt"] for row in pairs + reviews)
    assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in pairs + held_out)
    for folder in (out / "new", out / "sft" / "model", out / "dpo" / "model"):
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    text = said(console)
    assert [f"{number}/6 " in text for number in range(1, 7)] == [True] * 6
    assert "mean true reward" in text
    assert "prefopt train dpo --model" in text


def test_replaces_its_own_folder_only(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("do not delete", encoding="utf-8")
    with pytest.raises(RunError, match="no quickstart made"):
        quickstart(thesis)
    assert (thesis / "chapter.txt").is_file()
    assert not (thesis / MARKER).exists()

    own = tmp_path / "own"
    make_folder(own)
    (own / "old.txt").write_text("", encoding="utf-8")
    make_folder(own)
    assert [entry.name for entry in own.iterdir()] == [MARKER]

    with pytest.raises(RunError, match="cannot make the folder"):
        quickstart(thesis / "chapter.txt")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_reward_rises(tmp_path: Path) -> None:
    summary = quickstart(tmp_path / "quickstart", console=plain_console())
    assert summary["true_reward_before"] == pytest.approx(0.5, abs=0.08)
    assert summary["true_reward_after"] > 0.9
    assert 0.5 < summary["kl"] < 25
    assert summary["reward_accuracy"] > 0.75
    assert summary["seconds"] < 300
    assert summary["peak_memory_gb"] < 2
