"""What the page for people who come from other trainers says of ours is there."""

import re
from dataclasses import dataclass

import pytest
from tests.docs.pages import ROOT
from tests.docs.test_metrics_page import PAGE as METRICS_PAGE

from prefopt.methods.table import METHODS
from prefopt.training.assemble import settings_for

PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Line:
    """A line of a table: the heading above it, their names, ours, and whether there is none of ours."""

    heading: str
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    cell: str


def table() -> list[Line]:
    lines, heading = [], ""
    for text in PAGE.splitlines():
        if text.startswith("#"):
            heading = text.lstrip("# ")
        cells = [cell.strip() for cell in text.strip("|").split(" | ")]
        if text.startswith("| ") and len(cells) >= 2 and cells[0] not in ("theirs", "") and cells[1] != "TRL":
            names = [tuple(re.findall(r"`([^`]+)`", cell)) for cell in cells[:2]]
            lines.append(Line(heading, names[0], names[1], cells[1]))
    return [line for line in lines if line.heading != "What differs in results"]


OF_SETTINGS = [line for line in table() if line.heading not in ("Metrics", "Losses")]  # tests/methods/test_trl.py checks the losses
SETTINGS = {name for row in METHODS for name in settings_for(row.load()).model_fields}


def test_tables_are_read():
    assert {line.heading for line in table()} >= {"axolotl", "LLaMA-Factory", "Metrics", "LoraConfig and ModelConfig"}
    assert len(OF_SETTINGS) > 80


@pytest.mark.parametrize("line", OF_SETTINGS, ids=lambda line: f"{line.heading}: {line.cell}")
def test_ours_exist(line: Line):
    assert set(line.ours) <= SETTINGS
    assert line.ours or line.cell in ("none", "none yet")


def test_every_setting_that_others_have_too_is_mentioned():
    """Ours that the tables leave out are those that no other trainer has; a new one must be thought of here."""
    only_ours = {"on_bad_row", "kl_budget", "memory_check", "report", "sharing", "text_as", "overwrite", "pairs_of_ranks"}
    mentioned = {name for line in OF_SETTINGS for name in line.ours}
    assert SETTINGS - mentioned - only_ours == set()


def test_settings_of_what_differs_exist():
    section = PAGE.split("## What differs in results")[1].split("\n## ")[0]
    ours = [cells for text in section.splitlines() if text.startswith("| ") and len(cells := text.split(" | ")) == 3][1:]
    named = {name for cells in ours for name in re.findall(r"`([a-z_]+)`", cells[2])}
    assert len(named) > 10
    assert named <= SETTINGS


def test_metrics_of_ours_are_explained():
    ours = {name for line in table() if line.heading == "Metrics" for name in line.ours}
    assert len(ours) > 10
    assert all(f"`{name}`" in METRICS_PAGE for name in ours)


def test_metrics_are_compared_where_names_differ():
    assert ("rewards/accuracies", "rewards/accuracy") in {(*line.theirs, *line.ours) for line in table() if line.heading == "Metrics"}
