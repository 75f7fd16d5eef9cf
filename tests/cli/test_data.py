"""`prefopt data`: what is said about files before anything is trained on them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt.cli import main

PAIRS = [
    {"prompt": "How do I boil an egg?", "chosen": " In water.", "rejected": " I do not know."},
    {"prompt": "Is the sea wide?", "chosen": " Yes, it is.", "rejected": " No."},
]


def written(folder: Path, rows: list[dict[str, str]]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_are_counted_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", written(tmp_path, PAIRS)]) == 0
    out = capsys.readouterr().out
    assert "pairs.jsonl: 2 rows" in out
    assert "2 rows -> 2 examples" in out


def test_bad_rows_stop_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, [*PAIRS, {**PAIRS[0], "chosen": " "}])
    assert main(["data", path]) == 2
    assert "pairs.jsonl:3" in capsys.readouterr().err
    assert main(["data", path, "--on-bad-row", "drop"]) == 0
    out = capsys.readouterr().out
    assert "3 rows -> 2 examples" in out
    assert "dropped 1: blank_answer 1" in out


def test_with_a_model_the_first_example_is_shown_as_tokens(
    tmp_path: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    assert main(["data", written(tmp_path, PAIRS), "--model", str(model_folder())]) == 0
    out = capsys.readouterr().out
    assert "2 rows -> 2 examples" in out
    assert "the first example:" in out
    assert "How do I boil an egg?" in out


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ("chosn=chosen", "no format has a field chosn (did you mean chosen?)"),
        ("chosen=choosen", "no row has a column choosen (did you mean chosen?)"),
    ],
)
def test_a_mapping_is_checked_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], mapping: str, says: str):
    assert main(["data", written(tmp_path, PAIRS), "--columns", mapping]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.jsonl"], "none.jsonl"),
        ([], "--data: is required"),
        (["x.jsonl", "--max-length", "100"], "max_length shape tokens, and those need a tokenizer: give model too"),
        (["x.jsonl", "--eval-data", "y"], "--eval-data: no such flag"),
        (["x.jsonl", "--kind", "triple"], "--kind: must be demonstration, pair, thumbs or ranked (given: triple)"),
    ],
)
def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], words: list[str], says: str):
    assert main(["data", *words]) == 2
    assert says in capsys.readouterr().err


def test_thumbs_and_rankings_are_counted_by_class_and_by_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"prompt": "q", "completion": f"a{number}", "label": number > 0} for number in range(4)]
    assert main(["data", written(tmp_path, rows), "--kind", "thumbs"]) == 0
    assert "4 rows -> 4 examples\nthumbs: 3 up, 1 down (75% up)" in capsys.readouterr().out
    assert main(["data", written(tmp_path, PAIRS), "--kind", "thumbs"]) == 0
    out = capsys.readouterr().out
    assert "each read as a thumb up for the chosen answer and one down for the rejected" in out
    assert "2 rows -> 4 examples\nthumbs: 2 up, 2 down (50% up)" in out
    ranked = [{"prompt": "q", "completions": ["a", "b", "c"], "ranks": ranks} for ranks in ([1, 2, 3], [1, 1, 2], [1, 1, 1])]
    path = written(tmp_path, ranked)
    assert main(["data", path, "--kind", "ranked"]) == 0
    assert "3 rows -> 2 examples\nanswers ranked: 2 of 3; 1 with ties\ndropped 1: tie 1" in capsys.readouterr().out
    for which, number in (("all", 5), ("best", 4), ("ends", 2)):
        assert main(["data", path, "--pairs-of-ranks", which]) == 0
        assert f"3 rows -> {number} examples" in capsys.readouterr().out


def test_settings_of_another_kind_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", written(tmp_path, PAIRS), "--kind", "ranked", "--pairs-of-ranks", "best"]) == 2
    assert "pairs_of_ranks says which pairs a ranking comes to: give kind pair too" in capsys.readouterr().err
    assert main(["data", written(tmp_path, PAIRS), "--kind", "stars"]) == 2
    assert "thumbs" in capsys.readouterr().err


def test_weights_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, PAIRS)
    assert main(["data", f"{path}:0.5"]) == 0
    assert "pairs.jsonl: each example 0.5 times in an epoch" in capsys.readouterr().out
