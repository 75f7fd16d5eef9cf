"""The page about data says what the code does."""

import json
import re
from pathlib import Path

import pytest

from prefopt.data.comparisons import ANNOTATORS
from prefopt.data.examples import ROLES, Example, Fields
from prefopt.data.formats import COMMON_FIELDS, FORMATS
from prefopt.data.recognise import recognise
from prefopt.data.rows import REASONS, Row

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = [json.loads(line) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_every_format_is_there_with_its_columns(entry):
    (line,) = re.findall(rf"^\| `{entry.name}` \| (.*)$", PAGE, re.MULTILINE)
    # Endings that go with each of several names of a column are written once.
    named = {name for name in (*entry.needs, *entry.optional) if not name.endswith("_is_acceptable") and name not in ANNOTATORS[1:]}
    assert {f"`{name}`" for name in named} <= set(re.findall(r"`\w+`", line))
    for need in entry.needs:
        for name in entry.names_of(need):
            assert f"`{name}`" in PAGE


def test_the_examples_are_of_the_formats_in_the_order_of_the_table():
    assert len(EXAMPLES) == len(FORMATS)
    for entry, row in zip(FORMATS, EXAMPLES, strict=True):
        assert recognise("page", [Row("page:1", row)], entry.kind).format is entry
        made = entry.examples(Fields(row), entry.kind)
        assert all(isinstance(example, Example) for example in made)
        assert len(made[0].answers) == {"pair": 2, "ranked": 3}.get(entry.kind, 1)


def test_every_reason_role_and_common_column_is_there():
    assert re.findall(r"^\| `(\w+)` \| (?=.)", PAGE.split("## Bad rows")[1], re.MULTILINE) == list(REASONS)
    for name in COMMON_FIELDS:
        assert f"`{name}`" in PAGE
    for role in ROLES:
        assert re.search(rf"\b{role}\b", PAGE)
