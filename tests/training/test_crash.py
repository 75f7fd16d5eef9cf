"""`kill -9` at any moment: the run goes on, and ends as if nothing had been.

A run is done once in one piece, with every change that it makes to its files written down. Then it is done again and again,
struck each time at another place of that list or at another time, and taken up by the command that its own sentence names. Where it
ends, everything that it leaves is compared with the whole run, byte by byte where no times stand in between.
"""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.training.crash_server import Blow, Server, flags
from tests.training.runs import figures

from prefopt.training.record.checkpoint import Checkpoints, verified

SETTINGS: dict[str, dict[str, Any]] = {
    # Everything at once: several micro-batches, samples, a checkpoint after every step, the best one kept.
    "full": {
        "eval_fraction": 0.33,
        "eval_every_steps": 2,
        "save_every_steps": 1,
        "keep_checkpoints": 2,
        "samples": 2,
        "sample_tokens": 6,
        "max_tokens": 90,
    },
    # The held-out loss rises from the second evaluation on: the run ends early, by the best checkpoint, older than those that are kept.
    "early": {
        "eval_fraction": 0.33,
        "eval_every_steps": 1,
        "early_stop": 3,
        "save_every_steps": 3,
        "keep_checkpoints": 1,
        "learning_rate": 0.1,
        "epochs": 6,
        "report": True,
    },
    "lora": {
        "eval_fraction": 0.33,
        "eval_every_steps": 3,
        "save_every_steps": 2,
        "samples": 1,
        "sample_tokens": 6,
        "lora_rank": 4,
        "learning_rate": 1e-2,
    },
}


@dataclass(frozen=True)
class Whole:
    """A run in one piece.

    Attributes:
        out: its folder.
        words: its command line, for another folder.
        events: what it did to files, in order.
        seconds: how long it took.
    """

    out: Path
    words: Callable[[Path], list[str]]
    events: list[str]
    seconds: float


@pytest.fixture(scope="module")
def whole(
    server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Whole]:
    """A run in one piece by the name of its settings; each is done once."""
    done: dict[str, Whole] = {}

    def find(name: str) -> Whole:
        if name not in done:
            base = tmp_path_factory.mktemp(name)

            def words(out: Path) -> list[str]:
                return flags("dpo", model_folder(), pairs, out, **SETTINGS[name])

            began = time.monotonic()
            server.run(words(base / "run"), trace=base / "events")
            done[name] = Whole(base / "run", words, (base / "events").read_text().splitlines(), time.monotonic() - began)
        return done[name]

    return find


# Where the blows fall.


def part_of(event: str) -> str:
    """What a run is doing when it does that to a file."""
    if "/checkpoints/" in event or re.search(r"\.\.\./(state\.json|\w+\.safetensors)$", event):
        return "save"
    if ".model." in event:
        return "model"
    if re.search(r" run\b", event):
        return "notes"
    return "caches"


def draw(events: list[str], drawn: random.Random, **numbers: int) -> Iterator[Blow]:
    """Places among the events, so many of each part."""
    for part, number in numbers.items():
        places = [place for place, event in enumerate(events, 1) if part_of(event) == part]
        for place in sorted(drawn.sample(places, number)):
            yield Blow(".", place)


def draw_cuts(drawn: random.Random, at: str, nths: range, number: int, *, longest: int) -> Iterator[Blow]:
    """Writes that end in the middle of a file."""
    for nth in sorted(drawn.sample(nths, number)):
        yield Blow(at, nth, "cut", drawn.randrange(longest))


def blows(events: dict[str, list[str]]) -> list[tuple[str, Blow | float]]:
    """Which run is struck, and where; a number is the share of the whole run's time after which SIGKILL comes from outside."""
    drawn = random.Random(7)
    full, early, lora = events["full"], events["early"], events["lora"]
    found: list[tuple[str, Blow | float]] = []
    found += [("full", blow) for blow in draw(full, drawn, save=6, model=2, notes=4, caches=3)]
    found += [("full", blow) for blow in draw_cuts(drawn, r"os.mkdir .*/\.step-", range(1, 8), 3, longest=360_000)]
    found += [("full", blow) for blow in draw_cuts(drawn, r"open run/metrics.jsonl", range(1, 8), 2, longest=250)]
    found += [("full", blow) for blow in draw_cuts(drawn, r"open run/(samples.jsonl|\.held_out)", range(1, 9), 2, longest=500)]
    found += [("full", blow) for blow in draw_cuts(drawn, r"os.mkdir run/\.model", range(1, 2), 1, longest=170_000)]
    found += [("full", drawn.uniform(0.1, 1.0)) for _ in range(4)]
    found += [("early", blow) for blow in draw(early, drawn, save=3, model=2, notes=2)]
    found += [("early", blow) for blow in draw_cuts(drawn, r"os.mkdir .*/\.step-", range(1, 3), 1, longest=360_000)]
    found += [("lora", blow) for blow in draw(lora, drawn, save=1, model=1, notes=1)]
    found += [("lora", blow) for blow in draw_cuts(drawn, r"os.mkdir .*/\.step-", range(1, 4), 1, longest=60_000)]
    found += [("lora", drawn.uniform(0.1, 1.0)), ("lora", Blow(r"open run/model/\.README", 1))]
    return found


NUM_BLOWS = 41


@pytest.mark.parametrize("place", range(NUM_BLOWS))
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(whole: Callable[[str], Whole], server: Server, tmp_path: Path, place: int):
    drawn = blows({name: whole(name).events for name in SETTINGS})
    assert len(drawn) == NUM_BLOWS
    name, blow = drawn[place]
    expected = whole(name)
    out = tmp_path / "run"
    words = expected.words(out)
    struck(server, words, blow, expected.seconds)
    if place % 4 == 0:  # once more, in the middle of what the first kill had left
        at = random.Random(place).randrange(1, len(expected.events))
        take_up(server, out, words, blow=Blow(".", at), codes=(0, -signal.SIGKILL))
    take_up(server, out, words)
    same_as(expected.out, out)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SETTINGS)
def test_there_is_no_place_where_a_kill_does_harm(whole: Callable[[str], Whole], server: Server, tmp_path: Path, name: str):
    """Before every single change that the run makes to its files."""
    expected = whole(name)
    for place in range(1, len(expected.events) + 1):
        out = tmp_path / str(place) / "run"
        out.parent.mkdir()
        words = expected.words(out)
        assert server.start(words, blow=Blow(".", place)).wait() == -signal.SIGKILL, expected.events[place - 1]
        take_up(server, out, words)
        same_as(expected.out, out)
        shutil.rmtree(out.parent)


def struck(server: Server, words: list[str], blow: Blow | float, seconds: float) -> None:
    """The run, killed."""
    child = server.start(words, blow=blow if isinstance(blow, Blow) else None)
    if isinstance(blow, float):
        time.sleep(blow * seconds)
        child.kill()
        assert child.wait() in (-signal.SIGKILL, 0)  # on a machine that has become faster it was done
    else:
        assert child.wait() == (-signal.SIGXFSZ if blow.do == "cut" else -signal.SIGKILL), child.said


def take_up(server: Server, out: Path, words: list[str], *, blow: Blow | None = None, codes: tuple[int, ...] = (0,)) -> None:
    """Go on with a run that was killed, by the command that is asked for."""
    checkpoints = Checkpoints(out / "checkpoints", keep=1).all()
    if checkpoints:
        assert verified(checkpoints[-1])[1] == []
    else:
        said = server.run([*words, "--resume"], code=2)
        way = re.fullmatch(r"prefopt: there is nothing to resume in .*: no checkpoint was saved\. Start the run anew, (.*)\.\n", said)
        assert way, said
    how = ["--resume"] if checkpoints else {"with --overwrite in place of --resume": ["--overwrite"], "without --resume": []}[way[1]]
    child = server.start([*words, *how], blow=blow)
    assert child.wait() in codes, child.said
    assert "Traceback" not in child.said


def same_as(whole: Path, out: Path) -> None:
    """Everything that the run has left is what the whole run left: same files, none beside them, same bytes but for times."""
    expected, found = left(whole), left(out)
    assert sorted(found) == sorted(expected)
    for name, content in expected.items():
        assert found[name] == content, name
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


PASSING = {
    "seconds", "rows_per_second", "from_cache", "training_seconds", "examples_per_second", "tokens_per_second", "peak_memory_gb",
    "memory_gb", "pid", "started", "updated", "resumed", "checksum", "out", "cache_dir",
}  # fmt: skip
"""What differs from start to start."""


def left(out: Path) -> dict[str, Any]:
    """Each file below a run's folder, and what it holds."""
    return {str(path.relative_to(out)): content(path) for path in out.rglob("*") if path.is_file()}


def content(path: Path) -> Any:
    """A file's bytes; of those that hold times, what is left without them."""
    if path.name == "metrics.jsonl":
        lines = path.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
        return figures(path.parent)
    if path.suffix == ".json" and path.parent.name != "model":
        return steady(json.loads(path.read_text()))
    if path.suffix == ".yaml":
        return [line for line in path.read_text().splitlines() if line.split(":")[0] not in PASSING]
    if path.name == "README.md":
        lines = path.read_text().splitlines()
        return [re.sub(r"steps took .*", "", line) for line in lines if not re.match(r"\| (started|resumed) \|", line)]
    if path.name == "report.html":
        return path.name
    return path.read_bytes()


def steady(value: Any) -> Any:
    """A value without what differs from start to start."""
    if isinstance(value, dict):
        return {name: steady(item) for name, item in value.items() if name not in PASSING}
    return [steady(item) for item in value] if isinstance(value, list) else value


def test_the_blows_fall_where_they_should(whole: Callable[[str], Whole]):
    """What the runs do between their first and last change to a file is what this file thinks that they do."""
    parts = [part_of(event) for event in whole("full").events]
    assert list(dict.fromkeys(parts)) == ["notes", "caches", "save", "model"]
    assert parts.count("save") > 40
    summary = json.loads((whole("early").out / "summary.json").read_text())
    assert summary["steps"] < summary["num_steps"]
    assert summary["model_step"] == summary["best"]["step"] < summary["steps"] - 2
    kept = sorted(path.name for path in (whole("early").out / "checkpoints").iterdir())
    assert kept == [f"step-{step:06d}" for step in (summary["best"]["step"], summary["steps"])]
