"""Two processes make the run that one makes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.training.runs import figures, losses, rows, run, weights

from prefopt.errors import RunError
from prefopt.training.processes import Processes, join


def test_one_process_needs_nothing():
    with join("cpu") as processes:
        assert processes == Processes(0, 1, torch.device("cpu"))
        assert processes.is_main
        values = torch.tensor([1.0, 2.0])
        assert processes.add_up(values).tolist() == [1.0, 2.0]
        processes.wait()
        with processes.main_first():
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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train_in_two(words: list[str], folder: Path, *, returns: int = 0, says: str = "") -> None:
    """The command line under what torchrun sets, without its start-up time."""
    port = str(free_port())
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
            "PREFOPT_CACHE": str(folder / "cache-of-two"),
        }
        command = [sys.executable, "-m", "prefopt", "train", *words]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate(timeout=200) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == returns, err
        assert out == ""
        assert "Traceback" not in err
    assert says in outputs[0][1]
    if returns == 0:  # the other one is silent
        assert [line for line in outputs[1][1].splitlines() if "Warning" not in line and "[Gloo]" not in line] == []


def test_two_processes(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    model = model_folder()
    same = {"eval_fraction": 0.3, "eval_every_steps": 2, "save_every_steps": 2, "keep_checkpoints": 9}
    one, two = tmp_path / "one", tmp_path / "two"
    run("dpo", model, pairs, one, **same)
    flags = "--batch-size 4 --epochs 2 --learning-rate 1e-3 --max-length 128 --device cpu --precision float32"
    more = "--eval-fraction 0.3 --eval-every-steps 2 --save-every-steps 2 --keep-checkpoints 9"
    words = ["--model", str(model), "--data", pairs, *flags.split(), *more.split()]
    train_in_two(["dpo", *words, "--out", str(two)], tmp_path, says="in 2 processes")
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert len(rows(two)) == len(rows(one)) == 5
    assert json.loads((two / "summary.json").read_text())["num_processes"] == 2
    close(two, one)
    # What two began, one ends: the steps that were done stay, those that follow are the same.
    for name in ("step-000004", "step-000005"):
        for path in (two / "checkpoints" / name).iterdir():
            path.unlink()
        (two / "checkpoints" / name).rmdir()
    before = figures(two)[:2]
    run("dpo", model, pairs, two, resume=True, **same)
    assert figures(two)[:2] == before
    close(two, one)


def test_two_processes_with_an_adapter_and_references_in_memory(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    model = model_folder()
    run("dpo", model, pairs, tmp_path / "one", lora_rank=4, reference_cache=False, max_tokens=60)
    flags = "--batch-size 4 --epochs 2 --learning-rate 1e-3 --max-length 128 --device cpu --precision float32 --lora-rank 4 --max-tokens 60"
    words = ["dpo", "--model", str(model), "--data", pairs, *flags.split(), "--reference-cache", "off", "--gradient-checkpointing", "on"]
    train_in_two([*words, "--out", str(tmp_path / "two")], tmp_path)
    close(tmp_path / "two", tmp_path / "one")
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys() == {"adapter_model.safetensors"}


def test_a_mistake_ends_both(pairs: str, tmp_path: Path):
    words = ["dpo", "--model", "/no/such/model", "--data", pairs, "--out", str(tmp_path / "run"), "--device", "cpu"]
    train_in_two(words, tmp_path, returns=2, says="no folder /no/such/model")


def close(two: Path, one: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for mine, other in zip(figures(two), figures(one), strict=True):
        assert mine.keys() == other.keys()
        assert mine == pytest.approx(other, abs=2e-4, rel=1e-3)
