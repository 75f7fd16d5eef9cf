"""What the page about trouble quotes is what the program says."""

import re
from functools import cache

import pytest
from tests.docs.pages import ROOT

from prefopt.training.watching.rules import RULES

PAGE = (ROOT / "docs" / "trouble.md").read_text(encoding="utf-8")

QUOTED = [span.strip(". \n") for span in re.findall(r"`([^`]+)`", PAGE) if " " in span and "..." in span]
"""Words of the program: in code, with dots where more is said."""


@cache
def source() -> str:
    """All source, literals that are written in several parts put together."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def test_quotes_are_found():
    assert len(QUOTED) > 10


@pytest.mark.parametrize("words", QUOTED)
def test_the_program_says_so(words: str):
    assert " ".join(words.split()) in source()


def test_what_nobody_says_would_be_noticed():
    assert "the weights were eaten" not in source()


def test_every_rule_of_the_watch_leads_to_a_section():
    """But for those whose own words are all there is to say."""
    alone = {"beta", "start_difference"}
    assert {rule.name for rule in RULES} - alone - set(re.findall(r"`(\w+)`", PAGE)) == set()


def test_sections_are_listed_at_the_top():
    top = PAGE.split("\n## ")[0]
    assert len(re.findall(r"\]\(#", top)) == len(re.findall(r"^## ", PAGE, re.MULTILINE))
