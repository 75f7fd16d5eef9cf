"""The picture of docs/theory.md can be drawn."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench.theory import BETAS, FILE, draw

SVG = "{http://www.w3.org/2000/svg}"


def words(picture: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(picture).iter(f"{SVG}text")]


def test_the_picture_and_its_table_are_drawn_from_a_short_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "theory.svg"
    draw(out, 3)
    titles = [text for text in words(FILE) if text in words(out)]
    assert {f"β {beta:g}" for beta in BETAS} < set(titles)
    assert "DPO reaches the closed form" in titles
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [float(row.split("|")[1]) for row in rows] == list(BETAS)
    # Three steps are far from the optimum: the numbers come from the training.
    assert all(float(row.split("|")[3]) > 1e-2 for row in rows)
