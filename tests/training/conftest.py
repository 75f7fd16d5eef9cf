"""A file of pairs and one of demonstrations, for whoever trains."""

from pathlib import Path

import pytest
from tests.training.runs import pair_rows, write_rows


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve short pairs."""
    return write_rows(Path(tmp_path_factory.mktemp("data")) / "pairs.jsonl", pair_rows())


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve demonstrations: the better answers."""
    found = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows()]
    return write_rows(Path(tmp_path_factory.mktemp("data")) / "demonstrations.jsonl", found)
