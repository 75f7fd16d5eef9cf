"""A sweep: each run as it would be alone, nothing computed twice, and on again from wherever it was ended."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command_line import Said, prefopt
from tests.training.conftest import one_opening, pairs, server
from tests.training.crash_server import Blow, Server, flags
from tests.training.runs import figures, weights

import prefopt as package
from prefopt.errors import ConfigError, RunError
from prefopt.machine import keep_freed_memory
from prefopt.training.loop import Trainer, forget_peak_memory, peak_memory_gb

__all__ = ["one_opening", "pairs", "server"]

BETAS = ("0.05", "0.1", "0.3")


def words_of(model: Path, data: str, out: Path, *swept: str, method: str = "dpo", **settings: Any) -> list[str]:
    """The words of a sweep of small runs."""
    own = {"eval_fraction": 0.3, "report": True} | settings
    return ["sweep", method, *swept, *flags(method, model, data, out, **own)[2:]]


def alone(model: Path, data: str, out: Path, **settings: Any) -> Path:
    """The same run by `prefopt train`, with caches of its own."""
    own = {"eval_fraction": 0.3, "report": True, "cache_dir": out.parent / f"cache of {out.name}"} | settings
    assert prefopt(*flags("dpo", model, data, out, **own)).check().code == 0
    return out


def book(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return found


def states(out: Path) -> dict[str, str]:
    return {run["name"]: run["state"] for run in book(out)["runs"]}


def begun(out: Path) -> dict[str, int]:
    """When the newest start of each run wrote its manifest: it is written once per start."""
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted(out.glob("*/manifest.json"))}


def same_run(one: Path, other: Path) -> None:
    """Equal weights, figures and examples, to the bit."""
    assert weights(one) == weights(other) != {}
    assert figures(one) == figures(other)
    assert (one / "held_out.jsonl").read_bytes() == (other / "held_out.jsonl").read_bytes()
    assert (one / "samples.jsonl").is_file() == (other / "samples.jsonl").is_file()
    if (one / "samples.jsonl").is_file():
        assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


# What a run of a sweep is.


@pytest.mark.parametrize(
    "settings", [{}, {"lora_rank": 4, "learning_rate": 1e-2, "samples": 2, "sample_tokens": 8}], ids=["full", "lora with samples"]
)
def test_each_run_is_to_the_bit_what_train_makes_of_it_alone(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, settings: dict[str, Any]
):
    out = tmp_path / "sweep"
    prefopt(*words_of(model_folder(), pairs, out, f"beta={','.join(BETAS)}", **settings)).check()
    assert states(out) == {f"beta-{beta}": "finished" for beta in BETAS}
    for beta in BETAS:
        same_run(out / f"beta-{beta}", alone(model_folder(), pairs, tmp_path / f"alone-{beta}", beta=beta, **settings))
    assert len({str(weights(out / f"beta-{beta}")) for beta in BETAS}) == 3


def test_tokens_and_reference_are_computed_by_the_first_run_and_by_no_other(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from prefopt.data.tokenize import Grower
    from prefopt.training.references import InPlace

    counted: list[tuple[int, int]] = []
    done = [0, 0]
    grow, logps = Grower.grow, InPlace.logps

    def counting_grow(self: Grower, examples: Any) -> Any:
        done[0] += len(examples)
        return grow(self, examples)

    def counting_logps(self: InPlace, batch: Any) -> Any:
        done[1] += 1
        return logps(self, batch)

    class Counts(package.Callback):
        def on_end(self, summary: Any) -> None:
            counted.append((done[0], done[1]))

    monkeypatch.setattr(Grower, "grow", counting_grow)
    monkeypatch.setattr(InPlace, "logps", counting_logps)
    settings = {"eval_fraction": 0.3, "batch_size": 4, "max_steps": 2, "max_length": 128, "max_tokens": 128, "device": "cpu"}
    package.sweep(
        *("dpo", {"beta": [0.05, 0.1, 0.3]}),
        callbacks=[Counts()],
        **{"model": model_folder(), "data": pairs, "out": tmp_path / "sweep", "cache_dir": tmp_path / "cache", "samples": 0, **settings},
    )
    rows, passes = counted[0]
    assert rows == 12
    assert passes > 1
    assert counted == [(rows, passes)] * 3


def test_python_gets_what_came_of_it(model_folder: Callable[..., Path], pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = {"batch_size": 4, "max_steps": 2, "max_length": 128, "device": "cpu", "precision": "float32", "samples": 0}
    result = package.sweep(
        *("dpo", {"beta": [0.1, 0.3]}),
        model=model_folder(),
        data=pairs,
        out=tmp_path / "s",
        eval_fraction=0.3,
        learning_rate=1e-3,
        **settings,
    )
    assert result.folder == tmp_path / "s"
    assert result.report.is_file()
    assert list(result.runs) == ["beta-0.1", "beta-0.3"]
    assert result.best in result.runs
    # β is a factor of the reward, and nearly the same steps are taken.
    assert result.runs["beta-0.3"]["rewards/margin"] == pytest.approx(3 * result.runs["beta-0.1"]["rewards/margin"], rel=0.1)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["beta", "0.1", "0.3"]
    with pytest.raises(ConfigError, match="betta: no such setting"):
        package.sweep("dpo", {"betta": [1]}, model="m", data="d", out="o", eval_fraction=0.1)


def test_memory_is_counted_anew_for_each_run():
    keep_freed_memory()
    forget_peak_memory()
    before = peak_memory_gb(torch.device("cpu"))
    block = bytearray(300_000_000)
    block[::4096] = b"1" * len(block[::4096])
    high = peak_memory_gb(torch.device("cpu"))
    assert high > before + 0.2
    del block
    forget_peak_memory()
    if Path("/proc/self/clear_refs").exists():
        assert peak_memory_gb(torch.device("cpu")) < high - 0.2


def test_memory_is_that_of_this_process_not_of_the_one_that_started_it():
    words = "from prefopt.training.memory.available import most_held; print(most_held())"
    block = bytearray(800_000_000)
    block[::4096] = b"1" * len(block[::4096])
    ended = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < len(block) or not Path("/proc/self/status").exists()


# Going on.


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, out = tmp_path / "whole" / "sweep", tmp_path / "sweep"
    words = [f"beta={','.join(BETAS)}"]
    prefopt(*words_of(model_folder(), pairs, whole, *words)).check()
    step, taken = Trainer.step, 0

    def interrupted(self: Trainer, *args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == whole_steps + 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    whole_steps = len(figures(whole / "beta-0.05"))
    monkeypatch.setattr(Trainer, "step", interrupted)
    said = prefopt(*words_of(model_folder(), pairs, out, *words))
    assert said.code == 130
    assert (
        f"the sweep was stopped in run 2 of 3, beta 0.1 after step 2 of {whole_steps}. 1 of 3 runs is finished. "
        "Go on with the same command and --resume." in said.err
    )
    assert states(out) == {"beta-0.05": "finished", "beta-0.1": "stopped", "beta-0.3": "waiting"}
    assert "2 runs are not finished" in " ".join((out / "report.html").read_text().split())
    before = begun(out)
    said = prefopt(*words_of(model_folder(), pairs, out, *words), "--resume").check()
    assert "run 1 of 3, beta 0.05: done before, in " in said.err
    assert taken == 3 * whole_steps  # no step was taken twice
    assert begun(out)["beta-0.05"] == before["beta-0.05"]
    for beta in BETAS:
        same_run(out / f"beta-{beta}", whole / f"beta-{beta}")
    assert said.out.splitlines()[-1:] == prefopt(*words_of(model_folder(), pairs, out, *words), "--resume").check().out.splitlines()[-1:]


@pytest.fixture(scope="module")
def four_steps(model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    for beta in ("0.05", "0.3"):
        alone(model_folder(), pairs, folder / f"beta-{beta}", beta=beta, max_steps=4)
    return folder


@pytest.mark.parametrize(
    "blow",
    [
        Blow(r"open run/beta-0\.05/metrics\.jsonl", 1),
        Blow(r"open run/\.sweep\.json\.new", 2),
        Blow(r"open run/beta-0\.3/metrics\.jsonl", 3),
        Blow(r"os\.rename run/beta-0\.3/\.model\.new", 1),
        Blow(r"open run/\.sweep\.json\.new", 7),
        Blow(r"open run/\.report\.html\.new", 2),
    ],
    ids=["first step", "the book", "second run", "its model", "the book after it", "the last page"],
)
def test_a_sweep_that_was_killed_goes_on_to_the_bit(
    server: Server, model_folder: Callable[..., Path], pairs: str, four_steps: Path, tmp_path: Path, blow: Blow
):
    out = tmp_path / "run"
    words = words_of(model_folder(), pairs, out, "beta=0.05,0.3", max_steps=4, save_every_steps=1)
    server.run(words, blow=blow, code=-signal.SIGKILL, base=tmp_path)
    said = server.run([*words, "--resume"])
    assert states(out) == {"beta-0.05": "finished", "beta-0.3": "finished"}, said
    for beta in ("0.05", "0.3"):
        same_run(out / f"beta-{beta}", four_steps / f"beta-{beta}")


def test_a_run_whose_numbers_are_not_finite_is_noted_and_the_others_run(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "sweep"
    words = words_of(model_folder(), pairs, out, "learning_rate=1e30,1e-3")
    words = [word for place, word in enumerate(words) if "--learning-rate" not in (word, words[place - 1])]
    said = prefopt(*words)
    assert said.code == 2
    assert said.err.splitlines()[-1] == "prefopt: 1 of 2 runs failed: learning_rate 1e30. The others are done."
    assert states(out) == {"learning-rate-1e30": "failed", "learning-rate-0.001": "finished"}
    assert "learning_rate 1e30: the" in said.out
    assert "One run failed and cannot be compared: learning_rate 1e30." in said.out
    page = (out / "report.html").read_text()
    assert "learning_rate 1e30 failed" in page

    taken = 0
    step = Trainer.step

    def counting(self: Trainer, *args: Any) -> Any:
        nonlocal taken
        taken += 1
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", counting)
    again = prefopt(*words, "--resume")
    assert again.code == 2
    assert f"failed before, and would again; delete {out / 'learning-rate-1e30'} to try it anew" in again.err
    assert taken == 0
    shutil.rmtree(out / "learning-rate-1e30")
    assert prefopt(*words, "--resume").code == 2
    assert taken > 0


def test_a_full_disk_ends_the_sweep_and_costs_no_run(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from prefopt.training.record import folder

    out = tmp_path / "sweep"
    words = words_of(model_folder(), pairs, out, "beta=0.05,0.1,0.3")
    write = folder.write_whole

    def full(path: Path, text: str) -> None:
        if path.parent.name == "beta-0.1" and path.name == "summary.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_whole", full)
        said = prefopt(*words)
    assert said.code == 2
    assert "No space left on device" in said.err
    assert states(out) == {"beta-0.05": "finished", "beta-0.1": "stopped", "beta-0.3": "waiting"}
    prefopt(*words, "--resume").check()
    assert set(states(out).values()) == {"finished"}
    same_run(out / "beta-0.1", alone(model_folder(), pairs, tmp_path / "alone", beta="0.1"))


def test_values_may_be_added_and_left_out(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "sweep"

    def sweep(swept: str) -> Said:
        return prefopt(*words_of(model_folder(), pairs, out, swept, max_steps=2), *(["--resume"] if out.exists() else [])).check()

    sweep("beta=0.05,0.1")
    before = begun(out)
    said = sweep("beta=0.1,0.30")
    assert "left out of the table, for they are not asked for now: beta-0.05; their folders stay" in said.err
    assert list(states(out)) == ["beta-0.1", "beta-0.3"]
    assert (out / "beta-0.05" / "model").is_dir()
    assert begun(out)["beta-0.1"] == before["beta-0.1"]
    assert "run 1 of 3, beta 0.05: done before" in sweep("beta=0.05,0.1,0.3").err
    assert begun(out)["beta-0.05"] == before["beta-0.05"]
    # More settings give other runs, in folders of their own.
    sweep("label_smoothing=0,0.1")
    assert list(states(out)) == ["label-smoothing-0", "label-smoothing-0.1"]


def test_a_sweep_runs_again_from_the_file_that_it_wrote(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "sweep"
    prefopt(*words_of(model_folder(), pairs, out, "beta=0.1,0.3", max_steps=2)).check()
    before = begun(out)
    said = prefopt("sweep", "--config", str(out / "sweep.yaml"), "--resume").check()
    assert said.err.count("done before") == 2
    assert begun(out) == before
    prefopt("sweep", "--config", str(out / "sweep.yaml"), "beta=0.3", "--out", str(tmp_path / "again")).check()
    same_run(tmp_path / "again" / "beta-0.3", out / "beta-0.3")
    config = str(out / "beta-0.3" / "config.yaml")
    assert prefopt("train", "--config", config, "--out", str(tmp_path / "one")).check().code == 0
    same_run(tmp_path / "one", out / "beta-0.3")


def test_runs_around_one_that_was_made_before(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """The manifest of a run: its settings, on the same examples and weights or not at all."""
    run = alone(model_folder(), pairs, tmp_path / "run", beta=0.1, max_steps=2)
    out = tmp_path / "sweep"
    prefopt("sweep", "beta=0.1,0.3", "--config", str(run / "manifest.json"), "--out", str(out)).check()
    assert weights(out / "beta-0.1") == weights(run)


# What is refused.


@pytest.fixture
def swept(model_folder: Callable[..., Path], pairs: str, tmp_path: Path) -> list[str]:
    """The words of a sweep that has run, over data of its own."""
    data = tmp_path / "pairs.jsonl"
    data.write_text(Path(pairs).read_text())
    words = words_of(model_folder(), str(data), tmp_path / "sweep", "beta=0.1,0.3", max_steps=2)
    prefopt(*words).check()
    return words


def test_a_folder_that_holds_a_sweep_is_neither_gone_on_with_nor_replaced_unasked(swept: list[str], tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    said = prefopt(*swept).check()
    assert f"{tmp_path / 'sweep'} holds a sweep. Give another folder as out, --resume to go on with it" in said.err
    said = prefopt(*swept, "--resume", "--overwrite").check()
    assert "resume and overwrite exclude each other" in said.err
    said = prefopt(*swept, "--resume", "--weight-decay", "0.5").check()
    assert "these settings differ from those of the sweep in " in said.err
    assert "weight_decay was 0.0, is 0.5" in said.err
    said = prefopt("sweep", "sft", "epochs=1,2", *swept[3:], "--resume").check()
    assert said.code == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*") if path.is_file()} == before


def test_other_data_is_refused_and_what_is_done_stays_done(swept: list[str], tmp_path: Path):
    data = tmp_path / "pairs.jsonl"
    was = data.read_text()
    data.write_text(was.replace("yes", "perhaps"))
    said = prefopt(*swept, "--resume").check()
    assert said.code == 2
    assert "the data is not what" in said.err
    assert states(tmp_path / "sweep")["beta-0.1"] == "finished"
    data.write_text(was)  # with another time of its last change: the run itself has to look
    assert "this run has finished before, and stays as it is" in prefopt(*swept, "--resume").check().err


def test_overwrite_makes_all_runs_anew(swept: list[str], tmp_path: Path):
    out = tmp_path / "sweep"
    before, was = begun(out), weights(out / "beta-0.1")
    prefopt(*swept, "--overwrite").check()
    assert all(time > before[name] for name, time in begun(out).items())
    assert weights(out / "beta-0.1") == was
    within = [*swept[:3], "--model", str(out / "beta-0.1" / "model"), *swept[5:], "--overwrite"]
    assert "--overwrite would delete it before it is trained" in prefopt(*within).check().err
    assert weights(out / "beta-0.1") == was


@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]], ids=["", "resume", "overwrite"])
def test_folders_of_others_are_left_alone(swept: list[str], tmp_path: Path, how: list[str]):
    def into(out: Path) -> str:
        place = swept.index("--out")
        said = prefopt(*swept[: place + 1], str(out), *swept[place + 2 :], *how).check()
        assert said.code == 2
        return said.err

    assert "holds a run of its own, and no sweep" in into(tmp_path / "sweep" / "beta-0.1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "is not empty, and holds no sweep (thesis.tex)" in into(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    assert "is a file. Give a folder as out" in into(tmp_path / "file")
    assert (tmp_path / "mine" / "thesis.tex").is_file()


def test_one_sweep_at_a_time(swept: list[str], tmp_path: Path):
    from prefopt.training.record.lock import Lock

    lock = Lock(tmp_path / "sweep" / ".lock")
    try:
        assert "another run is going on in " in prefopt(*swept, "--resume").check().err
    finally:
        lock.release()


def test_several_processes_are_refused(swept: list[str], monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "a sweep runs in one process, and 2 were started" in prefopt(*swept, "--resume").check().err


def test_an_error_that_all_runs_would_meet_ends_the_sweep_at_once(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    said = prefopt(*words_of(model_folder(), str(tmp_path / "nothing.jsonl"), tmp_path / "sweep", "beta=0.1,0.3")).check()
    assert said.code == 2
    assert "nothing.jsonl" in said.err
    assert "run 2 of 2" not in said.err
    assert states(tmp_path / "sweep") == {"beta-0.1": "waiting", "beta-0.3": "waiting"}
    prefopt(*words_of(model_folder(), pairs, tmp_path / "sweep", "beta=0.1,0.3", max_steps=1), "--resume").check()


def test_data_of_which_nothing_can_be_held_out_ends_the_sweep_at_once(
    model_folder: Callable[..., Path], one_opening: str, pairs: str, tmp_path: Path
):
    said = prefopt(*words_of(model_folder(), one_opening, tmp_path / "sweep", "beta=0.1,0.3")).check()
    assert said.code == 2
    assert "a sweep compares its runs on held-out examples, and eval_fraction can hold none of these out" in said.err
    assert "run 2 of 2" not in said.err
    assert not list(tmp_path.glob("sweep/*/metrics.jsonl"))
    given = words_of(model_folder(), one_opening, tmp_path / "sweep", "beta=0.1,0.3", eval_data=pairs, max_steps=1)
    prefopt(*given, "--overwrite").check()
    assert set(states(tmp_path / "sweep").values()) == {"finished"}


def test_a_way_that_is_wrong_on_the_model_fails_by_itself(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    said = prefopt(*words_of(model_folder("falcon"), pairs, tmp_path / "sweep", "sharing=flat,plain", max_steps=1))
    assert states(tmp_path / "sweep")["sharing-plain"] == "finished", said.err


def test_the_report_command_makes_the_page_again(swept: list[str], tmp_path: Path):
    page = tmp_path / "sweep" / "report.html"
    page.unlink()
    assert prefopt("report", str(tmp_path / "sweep")).check().out.strip() == str(page)
    assert "report of a sweep" in page.read_text()
    elsewhere = tmp_path / "page.html"
    prefopt("report", str(tmp_path / "sweep"), "--out", str(elsewhere)).check()
    assert "beta-0.1/report.html" in page.read_text()
    assert "beta-0.1/report.html" not in elsewhere.read_text()  # from there it would lead nowhere


def test_run_error_is_what_python_sees(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    with pytest.raises(RunError, match="1 of 2 runs failed: learning_rate 1e30"):
        package.sweep(
            *("dpo", {"learning_rate": [1e30, 1e-3]}),
            model=model_folder(),
            data=pairs,
            out=tmp_path / "s",
            eval_fraction=0.3,
            batch_size=4,
            max_length=128,
            device="cpu",
            precision="float32",
            samples=0,
        )
