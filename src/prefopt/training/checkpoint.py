"""Checkpoints: complete, atomic, verified when read.

A checkpoint is a folder that appears by one rename, after everything in it has been flushed to disk:

    policy.safetensors      the trained parameters
    optimizer.safetensors   AdamW's moments and step counts, and the random state
    state.json              step, the method's state, the best evaluation, settings, data fingerprint, the machine, checksums

Only tensors and JSON: nothing is unpickled. Data order and learning rate follow from seed and step and are not saved.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from prefopt.errors import RunError
from prefopt.methods.method import State

RANDOM_STATE = "random_state"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: optimizer steps done, and what the method carries."""

    step: int
    method_state: State


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: holds one folder per checkpoint.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: AdamW,
        progress: Progress,
        facts: Mapping[str, Any],
        *,
        best_step: int | None = None,
    ) -> Path:
        """Write a checkpoint, then remove those that are too old.

        Args:
            parameters: the trained parameters by name.
            optimizer: its state is saved by the same names.
            progress: where the run stands.
            facts: JSON values that `newest_state` hands back: settings, data fingerprint.
            best_step: the checkpoint of that step stays, however old.

        Raises:
            RunError: the disk is full or cannot be written; earlier checkpoints are as they were.
        """
        final = self.at(progress.step)
        draft = self.folder / f".{final.name}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step-*"):  # by a process that was killed while writing
                shutil.rmtree(left)
            draft.mkdir()
            save_file({name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}, draft / "policy.safetensors")
            save_file(_optimizer_tensors(parameters, optimizer), draft / "optimizer.safetensors")
            checksums = {path.name: _checksum(path) for path in sorted(draft.glob("*.safetensors"))}
            state = {"step": progress.step, "method_state": progress.method_state, "checksums": checksums, **facts}
            state["checksum"] = _checksum_of(state)
            (draft / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
            for path in draft.iterdir():
                _flush(path)
            if final.exists():
                shutil.rmtree(final)
            draft.rename(final)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            next_step = "go on with --resume: earlier checkpoints are untouched" if self.all() else "start anew with --overwrite"
            raise RunError(f"cannot write the checkpoint {final}: {error}. Make room and {next_step}.") from None
        finished = self.all()
        place = finished.index(final)
        # Later ones were passed over as damaged when the run was resumed.
        for old in [*finished[: max(0, place + 1 - self.keep)], *finished[place + 1 :]]:
            if best_step is None or old != self.at(best_step):
                shutil.rmtree(old, ignore_errors=True)
        return final

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:06d}"

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        finished = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal() and (path / "state.json").is_file()]
        return sorted(finished, key=lambda path: int(path.name[5:]))

    def newest_state(self) -> tuple[Path, dict[str, Any]]:
        """The newest checkpoint that is whole, and its `state.json`.

        Raises:
            RunError: there is none.
        """
        for path in reversed(self.all()):
            state, damaged = verified(path)
            if not damaged:
                return path, state
            warnings.warn(
                f"the checkpoint {path} is damaged ({', '.join(damaged)}); the one before it is used, where there is one", stacklevel=2
            )
        raise RunError(
            f"there is no checkpoint to resume from in {self.folder}. Start the run anew: with --overwrite in place of --resume."
        )


def verified(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint's `state.json`, and the names of its files that are not as they were written."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.pop("checksum") != _checksum_of(state):
            return {}, ["state.json"]
        return state, [name for name, checksum in state["checksums"].items() if not _is_whole(path / name, checksum)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, ["state.json"]


def restore(path: Path, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: AdamW) -> Progress:
    """Put a checkpoint's numbers into the model and the optimizer.

    Raises:
        RunError: the checkpoint is of another model or adapter.
    """
    saved = load_file(path / "policy.safetensors")
    if saved.keys() != parameters.keys() or any(saved[name].shape != parameter.shape for name, parameter in parameters.items()):
        raise RunError(
            f"the checkpoint {path} holds other parameters than this run trains: the model or the adapter settings have changed."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    moments = load_file(path / "optimizer.safetensors")
    torch.set_rng_state(moments.pop(RANDOM_STATE))
    for name, parameter in parameters.items():
        own = {key.removeprefix(f"{name}|"): value for key, value in moments.items() if key.startswith(f"{name}|")}
        optimizer.state[parameter] = {
            key: (value if key == "step" and not parameter.is_cuda else value.to(parameter.device)) for key, value in own.items()
        }
    return Progress(step=state["step"], method_state=state["method_state"])


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: AdamW) -> dict[str, Tensor]:
    tensors = {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    return tensors | {RANDOM_STATE: torch.get_rng_state()}


def _is_whole(path: Path, checksum: str) -> bool:
    return path.is_file() and _checksum(path) == checksum


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _checksum_of(state: Mapping[str, Any]) -> str:
    """Of a `state.json` without its own checksum. Through JSON and back, which turns tuples into lists and keys into text."""
    return xxhash.xxh3_128_hexdigest(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
