"""Trees in a file: every field survives, large files are read piece by piece, and what is not whole is not used."""

import errno
import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.data import store, writer
from prefopt.data.cache import load
from prefopt.data.store import JoinedTrees, Sizes, Stored, StoredTrees, choose, record_of, tree_of_record
from prefopt.data.writer import TreeWriter
from prefopt.errors import DataError
from prefopt.trees import Completion, PromptTree, token_ids

FULL = PromptTree(
    token_ids([1, 2]),
    (Completion(token_ids([3]), label=True, rank=0, reward=0.5, reference_logp=-1.5), Completion(token_ids([4, 5]))),
    weight=2.0,
    row_id="ü\ud800:1",
    opening="0123456789abcdef",
)
MASKED = PromptTree(token_ids([6]), (Completion(token_ids([7, 8, 9]), scored=np.array([True, False, True]), label=False, rank=3),))
OTHERS = [
    PromptTree(token_ids([number] * (1 + number % 7)), (Completion(token_ids([number])),), row_id=f"a:{number}") for number in range(200)
]


@pytest.fixture(params=["held in memory", "on the disk"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files that are held in memory, and files that are not."""
    if request.param == "on the disk":
        monkeypatch.setattr(store, "HELD", 100)
    return str(request.param)


def written(folder: Path, trees: Sequence[PromptTree], about: dict[str, Any] | None = None, lines: Sequence[bytes] = ()) -> Stored:
    with closing(TreeWriter(folder, "key.trees")) as made:
        for start in range(0, len(trees), 64):
            made.add(trees[start : start + 64])
        return made.finish(about or {}, lines)


def fields(tree: PromptTree) -> list[object]:
    """All that a tree holds, as what can be compared."""
    own = [tree.prompt_ids.tolist(), tree.weight, tree.row_id, tree.opening]
    return own + [
        (one.ids.tolist(), None if one.scored is None else one.scored.tolist(), one.label, one.rank, one.reward, one.reference_logp)
        for one in tree.completions
    ]


def same(ones: Sequence[PromptTree], others: Sequence[PromptTree]) -> bool:
    return [fields(tree) for tree in ones] == [fields(tree) for tree in others]


@pytest.mark.parametrize("tree", [FULL, MASKED])
def test_every_field_survives(tree: PromptTree):
    back = tree_of_record(b"".join(record_of(tree)))
    assert fields(back) == fields(tree)
    arrays = [back.prompt_ids, *(one.ids for one in back.completions), *(one.scored for one in back.completions if one.scored is not None)]
    assert not any(array.flags.writeable for array in arrays)
    assert all(array.flags.aligned for array in arrays)


def test_what_is_written_is_read_again(tmp_path: Path, limit: str):
    trees = [FULL, MASKED, *OTHERS]
    lines = [b'{"location": "a:1"}\n', b'{"location": "a:2"}\n']
    first = written(tmp_path, trees, {"note": "ü"}, lines)
    second = load(tmp_path, "key.trees")
    assert second is not None
    for found in (first, second):
        assert same(found.trees, trees)
        assert found.about == {"note": "ü"}
        assert [*found.dropped_rows] == [{"location": "a:1"}, {"location": "a:2"}]
        assert (found.dropped_rows[1], found.dropped_rows[-1], len(found.dropped_rows)) == ({"location": "a:2"}, {"location": "a:2"}, 2)
        assert isinstance(found.trees.file.index, np.memmap) == (limit == "on the disk")


def test_the_same_bytes_whatever_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path / "one", OTHERS)
    monkeypatch.setattr(store, "HELD", 100)
    written(tmp_path / "two", OTHERS)
    one, two = ((tmp_path / name / "key.trees").read_bytes() for name in ("one", "two"))
    assert one == two


def test_trees_are_a_sequence(tmp_path: Path, limit: str):
    found = written(tmp_path, OTHERS).trees
    assert len(found) == 200
    assert fields(found[-1]) == fields(OTHERS[199])
    assert same(found[3:9:2], OTHERS[3:9:2])
    assert same(found[100:][5:7], OTHERS[105:107])
    for place in (200, -201):
        with pytest.raises(IndexError):
            found[place]
    some = choose(choose(found, np.array([5, 3, 150])), np.array([2, 0]))
    assert isinstance(some, StoredTrees)
    assert same(some, [OTHERS[150], OTHERS[5]])
    assert same(choose(OTHERS, np.array([1, 0])), [OTHERS[1], OTHERS[0]])


def test_sizes_are_those_of_the_trees(tmp_path: Path, limit: str):
    trees = [FULL, MASKED, *OTHERS]
    found = written(tmp_path, trees).trees
    joined = JoinedTrees(found[:10], (), trees[10:])
    assert same([joined[0], joined[9], joined[10], joined[-1], *joined[8:12]], [trees[0], trees[9], trees[10], trees[-1], *trees[8:12]])
    for given in (found, trees, joined, found[:]):
        sizes = Sizes.of(given)
        assert sizes.prompt.tolist() == [len(tree.prompt_ids) for tree in trees]
        assert (sizes.prompt + sizes.answers).tolist() == [tree.num_tokens for tree in trees]
        assert (sizes.prompt + sizes.longest).tolist() == [tree.longest for tree in trees]
        assert sizes.branches.tolist() == [len(tree.completions) for tree in trees]
        assert sizes.references.tolist() == [1, *[0] * 201]


def test_openings_are_read_from_the_index_where_they_are_digests(tmp_path: Path):
    made = [PromptTree(token_ids([1]), (Completion(token_ids([2])),), opening=text) for text in ("0" * 16, "00ff" * 4, "00FF" * 4, "", "x")]
    assert [*written(tmp_path, made).trees.openings()] == [tree.opening for tree in made]


def test_fingerprints_do_not_know_places(tmp_path: Path):
    prints = []
    for trees in (OTHERS, OTHERS[:-1], [PromptTree(tree.prompt_ids, tree.completions) for tree in OTHERS]):
        with closing(TreeWriter(tmp_path, "a.trees")) as made:
            made.add(trees)
            prints.append(made.fingerprint)
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-10],
        lambda content: b"",
        lambda content: b"x",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: content * 2,
    ],
)
def test_what_is_not_whole_is_not_used(tmp_path: Path, limit: str, damage: Callable[[bytes], bytes]):
    written(tmp_path, OTHERS)
    path = tmp_path / "key.trees"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged and are made anew"):
        assert load(tmp_path, "key.trees") is None
    assert load(tmp_path, "other.trees") is None


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path):
    for name, age_s in (("old", 25 * 3600), ("new", 60)):  # the new one may be another process's, which is still writing
        (tmp_path / f"{name}.partial").write_bytes(b"half")
        os.utime(tmp_path / f"{name}.partial", (time.time() - age_s,) * 2)
    written(tmp_path, OTHERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.trees", "new.partial"]


def test_nothing_is_left_of_what_was_not_finished(tmp_path: Path, limit: str):
    with closing(TreeWriter(tmp_path, "key.trees")) as made:
        made.add(OTHERS)
    assert [*tmp_path.glob("*")] == []


def test_a_folder_that_takes_no_files_costs_a_warning(tmp_path: Path, limit: str):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be cached"):
        assert same(written(tmp_path / "cache", OTHERS).trees, OTHERS)


class Full:
    """A disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file = file
        self.room = room

    def write(self, part: bytes) -> int:
        self.room -= len(part)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(part))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def fill_up(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    begin = writer.draft_in

    def draft(folder: Path) -> tuple[Any, Path]:
        file, path = begin(folder)
        return Full(file, room), path

    monkeypatch.setattr(writer, "draft_in", draft)


@pytest.mark.parametrize("room", [0, 1000, 9000])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int):
    monkeypatch.setattr(store, "HELD", 500)
    fill_up(monkeypatch, room)
    with pytest.raises(DataError, match=r"cannot be written to .*: No space left on device, after 0\.00 GB\..*set cache_dir"):
        written(tmp_path, OTHERS)
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_no_reason_to_stop_where_the_data_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill_up(monkeypatch, 1000)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert same(written(tmp_path, OTHERS).trees, OTHERS)
    assert [*tmp_path.iterdir()] == []


def test_a_file_that_is_removed_meanwhile_is_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "HELD", 100)
    found = written(tmp_path, OTHERS).trees
    (tmp_path / "key.trees").unlink()
    assert same(found, OTHERS)


def test_a_file_that_shrinks_meanwhile_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "HELD", 100)
    found = written(tmp_path, OTHERS).trees
    found.file.index = np.array(found.file.index)  # the map of a file that shrinks ends the process
    os.truncate(tmp_path / "key.trees", 100)
    with pytest.raises(DataError, match="became shorter while it was in use"):
        found[150]


def test_files_are_closed_when_nobody_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "HELD", 100)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    found = [written(tmp_path / str(number), OTHERS) for number in range(5)]
    del found
    gc.collect()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
