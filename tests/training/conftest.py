"""A file of pairs and one of demonstrations, for whoever trains."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.training import group_server
from tests.training.crash_server import Server, serving
from tests.training.runs import pair_rows, write_rows


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve short pairs."""
    return write_rows(Path(tmp_path_factory.mktemp("data")) / "pairs.jsonl", pair_rows())


@pytest.fixture(scope="session")
def one_opening(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve pairs of one prompt, of which none can be held out by what they open with."""
    return write_rows(Path(tmp_path_factory.mktemp("data")) / "one.jsonl", [row | {"prompt": "Is it good?"} for row in pair_rows()])


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve demonstrations: the better answers."""
    found = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows()]
    return write_rows(Path(tmp_path_factory.mktemp("data")) / "demonstrations.jsonl", found)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs command lines in processes of their own, without the seconds that imports take."""
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def groups() -> Iterator[group_server.Server]:
    """groups.run("train", ...) starts several processes of `group_scenarios.py` and waits for them."""
    with group_server.serving() as server:
        yield server
