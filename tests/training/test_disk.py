"""A disk that fills up costs the run, and nothing that was saved; one sentence says so.

The disk is a small tmpfs, which root may mount. Others get one in a namespace of their own, where the system lets them: the commands
then run in it, and the tests look at it from outside, through /proc.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.training.crash_server import Blow, Server, flags, serving
from tests.training.runs import figures, losses, run, weights

from prefopt.training.record.checkpoint import Checkpoints, verified

SIZE_K = 4096
"""Of the disk: several checkpoints of half a megabyte fit."""

SETTINGS: dict[str, Any] = {"eval_fraction": 0.33, "eval_every_steps": 2, "save_every_steps": 1, "samples": 1, "sample_tokens": 4}
ONLY_METRICS: dict[str, Any] = {"epochs": 12}


@dataclass(frozen=True)
class Disk:
    """A small disk.

    Attributes:
        path: where commands see it.
        seen: where the tests do.
        server: runs the commands.
    """

    path: Path
    seen: Path
    server: Server

    def make_room(self) -> None:
        (self.seen / "ballast").unlink()


def mounting(path: Path) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"size={SIZE_K}k", "tmpfs", str(path)]


@pytest.fixture(scope="module")
def mounted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """The disk of this file's tests; each empties it."""
    path = tmp_path_factory.mktemp("disk")
    mounted_here = shutil.which("mount") is not None and subprocess.run(mounting(path), capture_output=True, check=False).returncode == 0
    if mounted_here:
        try:
            yield Disk(path, path, server)
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        return
    script = f'{" ".join(mounting(path))} && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may mount no tmpfs, neither here nor in a namespace of its own, so there is no small disk to fill")
    with serving(tmp_path_factory.mktemp("inside"), under=inside) as other:
        yield Disk(path, Path(f"/proc/{other.process.pid}/root") / path.relative_to("/"), other)


@pytest.fixture
def disk(mounted: Disk) -> Iterator[Disk]:
    yield mounted
    for path in mounted.seen.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def wholes(model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The same runs on a large disk, with all their notes and with metrics only."""
    base = tmp_path_factory.mktemp("whole")
    run("dpo", model_folder(), pairs, base / "all", **{"epochs": 3} | SETTINGS)
    run("dpo", model_folder(), pairs, base / "metrics", **ONLY_METRICS)
    return {True: base / "all", False: base / "metrics"}


NO_ROOM = "No space left on device"
GO_ON = rf"{NO_ROOM}\. Make room, and go on with --resume from the last checkpoint\."

CASES: dict[str, tuple[str, int, int, str]] = {
    # Where: the event, which of them, the bytes that are left, and the sentence.
    "weights of a checkpoint": (r"os\.mkdir run/checkpoints/\.step", 4, 100_000, r"cannot write the checkpoint .*/step-000004: "),
    "moments of a checkpoint": (r"os\.mkdir run/checkpoints/\.step", 4, 300_000, r"cannot write the checkpoint .*/step-000004: "),
    "state of a checkpoint": (r"open run/checkpoints/\.step.*/state", 4, 0, r"cannot write the checkpoint .*/step-000004: "),
    "held-out lines": (r"open run/\.held_out", 3, 0, rf"cannot write .*/held_out\.jsonl: {GO_ON}"),
    "the model": (r"os\.mkdir run/\.model", 1, 100_000, r"cannot write the model to .*/run/model: "),
    "the model's tokenizer": (r"open run/\.model\.new/tokenizer_config", 1, 0, r"cannot write the model to .*/run/model: "),
    "the summary": (r"open run/\.summary", 1, 0, rf"cannot write .*/summary\.json: {GO_ON}"),
}
MAKE_ROOM = r"Make room and go on with --resume: (earlier checkpoints are untouched|the last checkpoint has the weights)\."


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_is_said_in_a_sentence_and_costs_nothing(
    disk: Disk, model_folder: Callable[..., Path], pairs: str, wholes: dict[bool, Path], tmp_path: Path, name: str
):
    at, nth, left, sentence = CASES[name]
    out, seen = disk.path / "run", disk.seen / "run"
    words = flags("dpo", model_folder(), pairs, out, cache_dir=tmp_path / "cache", **SETTINGS)
    said = disk.server.run(words, blow=Blow(at, nth, "fill", left), code=2)
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert re.fullmatch(f"prefopt: {sentence}" + ("" if GO_ON in sentence else rf".*{NO_ROOM}.*{MAKE_ROOM}"), last), last
    assert [line for line in said.splitlines() if NO_ROOM in line] == [last]
    kept = Checkpoints(seen / "checkpoints", keep=1).all()
    assert [verified(path)[1] for path in kept] == [[]] * len(kept)
    assert len(kept) >= 2
    assert not list(seen.rglob(".*"))  # nothing that takes room
    disk.make_room()
    disk.server.run([*words, "--resume"])
    assert figures(seen) == figures(wholes[True])
    assert weights(seen) == weights(wholes[True])
    assert not list(seen.rglob(".*"))


def test_a_full_disk_and_the_metrics(disk: Disk, model_folder: Callable[..., Path], pairs: str, wholes: dict[bool, Path], tmp_path: Path):
    """Lines are added until the last page of the file is full; the one that does not fit may be there in part."""
    out, seen = disk.path / "run", disk.seen / "run"
    words = flags("dpo", model_folder(), pairs, out, cache_dir=tmp_path / "cache", **ONLY_METRICS | {"save_every_steps": 4})
    said = disk.server.run(words, blow=Blow(r"open run/metrics", 9, "fill", 0), code=2)
    assert re.fullmatch(rf"prefopt: cannot write .*/metrics\.jsonl: {GO_ON}", said.splitlines()[-1]), said
    done = len(Checkpoints(seen / "checkpoints", keep=1).all())
    assert done >= 1
    disk.make_room()
    disk.server.run([*words, "--resume"])
    assert figures(seen) == figures(wholes[False])
    assert weights(seen) == weights(wholes[False])


@pytest.mark.parametrize("at", [r"open run/\.lock", r"open run/\.config", r"open run/samples"])
def test_a_disk_that_is_full_before_anything_is_saved(
    disk: Disk, model_folder: Callable[..., Path], pairs: str, wholes: dict[bool, Path], tmp_path: Path, at: str
):
    out, seen = disk.path / "run", disk.seen / "run"
    words = flags("dpo", model_folder(), pairs, out, cache_dir=tmp_path / "cache", **SETTINGS)
    said = disk.server.run(words, blow=Blow(at, 1, "fill", 0), code=2)
    last = said.splitlines()[-1]
    assert re.fullmatch(rf"prefopt: cannot (write|make) .*{NO_ROOM}.*", last), said
    assert "Traceback" not in said
    disk.make_room()
    said = disk.server.start([*words, "--resume"])
    assert said.wait() == 2
    anew = ["--overwrite"] if "with --overwrite" in said.said else []
    disk.server.run([*words, *anew])
    assert figures(seen) == figures(wholes[True])


def test_a_report_that_cannot_be_written_costs_a_note(
    disk: Disk, model_folder: Callable[..., Path], pairs: str, wholes: dict[bool, Path], tmp_path: Path
):
    words = flags("dpo", model_folder(), pairs, disk.path / "run", cache_dir=tmp_path / "cache", **SETTINGS | {"report": True})
    said = disk.server.run(words, blow=Blow(r"open run/\.?report", 1, "fill", 0))
    assert [line for line in said.splitlines() if NO_ROOM in line and line.startswith("note: ")]
    assert json.loads((disk.seen / "run" / "status.json").read_text())["state"] == "finished"
    assert weights(disk.seen / "run") == weights(wholes[True])
    disk.make_room()
    disk.server.run([*words, "--resume"])
    assert (disk.seen / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("at", "nth"), [("open cache/tokens", 1), ("sqlite3.connect cache/reference", 1), ("sqlite3.connect cache/reference", 4)]
)
def test_a_full_disk_of_the_caches_costs_a_note(
    disk: Disk, model_folder: Callable[..., Path], pairs: str, wholes: dict[bool, Path], tmp_path: Path, at: str, nth: int
):
    """They are another folder, and the run does not need them."""
    words = flags("dpo", model_folder(), pairs, tmp_path / "run", cache_dir=disk.path / "cache", max_tokens=90, **SETTINGS)
    child = disk.server.start(words, blow=Blow(at, nth, "fill", 0), base=disk.path)
    assert child.wait() == 0, child.said
    what = (
        r"tokens cannot be cached in .* \(No space left on device\)" if at.startswith("open") else r"the reference cache .* cannot be used"
    )
    assert len(re.findall(rf"^prefopt: note: {what}", child.said, re.MULTILINE)) == 1, child.said
    assert losses(tmp_path / "run") == pytest.approx(losses(wholes[True]), abs=1e-5)
