"""Contestants take turns, one at a time; those that fail are noted and the others go on; none is left behind."""

import sys
import time
from pathlib import Path

import pytest
from bench.versus.match import Player, Rounds


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary"


@pytest.fixture
def make_player(diary: Path, tmp_path: Path):
    made: list[Player] = []

    def make(name: str, *, reference: int = 0, fails_at: int = -1, limit_s: float = 30.0) -> Player:
        command = [sys.executable, "-m", "tests.bench.pretend", str(diary), name, str(reference), str(fails_at)]
        made.append(Player(name, command, tmp_path / f"{name}.log", {}, limit_s))
        return made[-1]

    yield make
    for player in made:
        player.end()


def rounds(blocks: int, said: list[str] | None = None, rates: list[float] | None = None) -> Rounds:
    numbers = iter(rates or [float(number) for number in range(100)])
    return Rounds(blocks, lambda: next(numbers), (said if said is not None else []).append)


def test_blocks_alternate(make_player, diary: Path):
    one, other = make_player("one"), make_player("other")
    rates = rounds(3).interleaved([one, other], [], "train")
    assert diary.read_text().splitlines() == [f"{name} block {block}" for block in range(3) for name in ("one", "other")]
    assert [stretch.facts["losses"] for stretch in one.of("train")] == [[0.0], [0.1], [0.2]]
    assert all(0.01 <= stretch.seconds < 5 for stretch in (*one.of("train"), *other.of("train")))
    assert rates == [0.0, 1.0, 2.0, 3.0]
    assert one.failure == other.failure == ""


def test_reference_passes_take_turns_and_those_who_read_them_start_afterwards(make_player, diary: Path):
    one, other, warm = make_player("one", reference=4), make_player("other", reference=2), make_player("warm")
    rounds(1).interleaved([one, other], [warm], "train")
    expected = ["one reference 0", "one reference 1", "other reference 0", "one reference 2", "one reference 3", "other reference 1"]
    assert diary.read_text().splitlines() == [*expected, "one block 0", "other block 0", "warm block 0"]
    assert [len(player.of("reference")) for player in (one, other, warm)] == [2, 2, 0]


def test_apart_each_one_runs_to_its_end(make_player, diary: Path):
    players = [make_player("one", reference=1), make_player("other")]
    rates = rounds(2).apart(players, "train")
    assert diary.read_text().splitlines() == ["one reference 0", "one block 0", "one block 1", "other block 0", "other block 1"]
    assert rates == {"one": [0.0, 1.0, 2.0], "other": [3.0, 4.0, 5.0]}


@pytest.mark.parametrize(("name", "words"), [("failing", "this is what went wrong"), ("killed", "exit code 3")])
def test_a_contestant_that_fails_is_reported_with_its_last_lines_and_the_rest_goes_on(make_player, name: str, words: str):
    failing, other = make_player(name, fails_at=1), make_player("other")
    said: list[str] = []
    rounds(3, said).interleaved([failing, other], [], "train")
    assert words in failing.failure
    assert "this is what the log says" in failing.failure
    assert any(f"{name} failed" in line for line in said)
    assert (len(failing.of("train")), len(other.of("train"))) == (1, 3)


def test_one_that_fails_before_its_first_turn_is_reported(make_player):
    other = make_player("other")
    broken = Player("broken", [sys.executable, "-c", "raise SystemExit('not to be started')"], other.log.with_name("broken.log"), {}, 30.0)
    rounds(1).interleaved([broken, other], [], "train")
    assert "not to be started" in broken.failure
    assert len(other.of("train")) == 1


def test_one_that_is_silent_for_too_long_has_failed(make_player):
    stuck = make_player("stuck", limit_s=2.0)
    began = time.monotonic()
    rounds(1).interleaved([stuck], [], "train")
    assert "took longer than 2 s" in stuck.failure
    assert time.monotonic() - began < 20


def test_an_ended_contestant_is_gone(make_player):
    stuck = make_player("stuck", reference=1)
    stuck.start()
    process = stuck._process
    assert process is not None
    assert process.poll() is None
    stuck.end()
    assert process.poll() is not None
    stuck.end()  # twice does no harm
