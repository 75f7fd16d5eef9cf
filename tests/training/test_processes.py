"""Several processes: what they say to each other, and how launchers start them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.training.group_server import Server, free_port
from tests.training.runs import losses, run

from prefopt.errors import RunError
from prefopt.training.group.processes import ALONE, Processes, ignored, join, place

TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_one_process_needs_nothing():
    with join("cpu") as processes:
        assert processes == Processes(0, 1, torch.device("cpu")) == ALONE
        assert processes.is_main
        values = torch.tensor([1.0, 2.0])
        assert processes.add_up(values).tolist() == [1.0, 2.0]
        assert processes.collect(values).tolist() == [[1.0, 2.0]]
        assert processes.send(values, 0) is values
        assert processes.share({"a": [1]}) == {"a": [1]}
        processes.agree({"the data": "any"})
        processes.wait()
        with processes.main_first(), processes.writing():
            pass
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(RunError, match="cuda was asked for, and this machine has no usable GPU"), join("cuda"):
        pass
    with join("auto") as processes:
        assert processes.device.type == "cpu"


def test_the_main_process_goes_first(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    monkeypatch.setattr(Processes, "wait", lambda self: order.append(f"{self.rank} waits"))
    for rank in (0, 1):
        with Processes(rank, 2, torch.device("cpu")).main_first():
            order.append(f"{rank} works")
    assert order == ["0 works", "0 waits", "1 waits", "1 works"]


def test_what_launchers_say():
    assert place({}) == (0, 1, 0)
    assert place({"WORLD_SIZE": "1", "RANK": "0"}) == (0, 1, 0)
    assert place(TWO) == (1, 2, 1)
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert place(mpi | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}) == (3, 4, 1)
    with pytest.raises(RunError, match="WORLD_SIZE says 4 processes, and MASTER_ADDR, MASTER_PORT is not set"):
        place(mpi)
    with pytest.raises(RunError, match="WORLD_SIZE says 2 processes, and RANK is not set"):
        place({name: value for name, value in TWO.items() if name != "RANK"})
    with pytest.raises(RunError, match="no numbers: one, 2, 1"):
        place(TWO | {"RANK": "one"})
    with pytest.raises(RunError, match="process 2 of 2"):
        place(TWO | {"RANK": "2"})


def test_what_accelerate_s_configuration_asks_for_is_not_passed_over_in_silence():
    quiet = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    assert ignored({}) == ignored(quiet) == []
    loud = quiet | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}
    sentences = " ".join(ignored(loud))
    for part in ("FSDP: use `--parallel fsdp`", "mixed precision: use `--precision`", "gradient accumulation: use `--batch-size`"):
        assert part in sentences


def test_a_process_that_does_not_come(monkeypatch: pytest.MonkeyPatch):
    from datetime import timedelta

    from prefopt.training.group import processes

    monkeypatch.setattr(processes, "COME_TOGETHER", timedelta(seconds=1))
    for name, value in (TWO | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=r"the 2 processes of the run did not come together at 127.0.0.1:\d+"), join("cpu"):
        pass


def test_words(groups: Server):
    first, second = groups.run("words").results
    for turn in range(2):  # twice in the same processes
        for found in (first, second):
            assert found[f"shared {turn}"] == {"of": 0, "turn": turn}
            assert found[f"sum {turn}"] == 3.0
            assert found[f"collected {turn}"] == [[0, turn], [1, turn]]
            assert found[f"sent {turn}"] == [1, 7]
        assert first[f"time {turn}"] < second[f"time {turn}"]


def test_random_states_come_back_to_their_processes(groups: Server, tmp_path: Path):
    first, second = groups.run("random states", folder=tmp_path).results
    assert first["first"] == first["again"] != second["again"] == second["first"]


def test_processes_that_found_different_things_do_not_train(groups: Server, model_folder, pairs: str, tmp_path: Path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(Path(pairs).read_text().splitlines()[1:]) + "\n")
    settings = {"method": "dpo", "model": model_folder(), "data": pairs, "out": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    outcome = groups.run("train", codes=[2, 2], of_rank={"1": {"data": str(other)}}, **settings)
    assert "the data: process 1 of 2 found" in outcome.said[0]
    assert "Give all processes the same command, files and versions" in outcome.said[0]
    outcome = groups.run("train", codes=[2, 2], of_rank={"1": {"seed": 1}}, **settings)
    assert "the setting seed: process 1 of 2 found 1, process 0 0" in outcome.said[0]


# Launchers.


def launch(words: list[str], folder: Path, *, code: int = 0, **variables: str) -> str:
    """A launcher's command line to its end; what it and the processes said."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{Path(__file__).parents[2] / 'src'}{os.pathsep}{Path(__file__).parents[2]}",
        "PREFOPT_CACHE": str(folder / "cache-of-two"),
        **variables,
    }
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def expected(model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run on one process."""
    out = tmp_path_factory.mktemp("expected") / "run"
    run("dpo", model_folder(), pairs, out, samples=0)
    return losses(out)


def words_of(model: Path, data: str, out: Path, *more: str) -> list[str]:
    flags = "--batch-size 4 --epochs 2 --learning-rate 1e-3 --max-length 128 --device cpu --precision float32 --samples 0"
    return ["train", "dpo", "--model", str(model), "--data", data, "--out", str(out), *flags.split(), *more]


def test_torchrun_starts_it(model_folder: Callable[..., Path], pairs: str, tmp_path: Path, expected: list[float]):
    words = words_of(model_folder(), pairs, tmp_path / "run")
    said = launch(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prefopt", *words], tmp_path)
    assert "in 2 processes" in said
    assert said.count(f"model: {tmp_path / 'run' / 'model'}") == 1  # one of them speaks
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)


def test_accelerate_is_a_mere_launcher(model_folder: Callable[..., Path], pairs: str, tmp_path: Path, expected: list[float]):
    """With a configuration that asks for FSDP, too."""
    how = "--use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port"
    words = words_of(model_folder(), pairs, tmp_path / "run", "--parallel", "fsdp")
    said = launch(["accelerate.commands.launch", *how.split(), str(free_port()), "-m", "prefopt", *words], tmp_path)
    assert "in 2 processes" in said
    assert said.count("accelerate's configuration asks for FSDP: use `--parallel fsdp`") == 1
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)


def test_a_process_that_dies_under_torchrun(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """torchrun ends the others by a signal, which must not cut short what they have to say."""
    words = words_of(model_folder(), pairs, tmp_path / "run", "--save-every-steps", "2")
    script = str(Path(__file__).with_name("struck_command.py"))
    said = launch(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *words], tmp_path, code=1)
    assert said.count("prefopt: process 1 of 2 is gone: it was killed, or its memory ran out.") == 1
    assert "start all processes again with the same command and --resume" in said
