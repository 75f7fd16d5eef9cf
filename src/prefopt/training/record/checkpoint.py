"""Checkpoints: complete, atomic, verified when read.

A checkpoint is a folder that appears by one rename, after everything in it has been flushed to disk:

    policy.safetensors      the trained parameters
    reference.safetensors   the weights of a reference that follows the policy, where there is one
    optimizer.safetensors   what the optimizer keeps (moments, step counts), and the random state
    state.json              step, the method's state, the best evaluation, settings, data fingerprint, the machine, checksums

Only tensors and JSON: nothing is unpickled. Data order and learning rate follow from seed and step and are not saved.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from prefopt.disk import old_of, remove, replace_folder
from prefopt.errors import RunError
from prefopt.methods.method import State
from prefopt.training.group.processes import ALONE, Processes
from prefopt.training.group.sharding import SharedFile, gathered, like, put
from prefopt.training.optimizers.kinds import kind_of
from prefopt.training.record.folder import folder_gone

RANDOM_STATE = "random_state"

POLICY, OPTIMIZER, REFERENCE = "policy.safetensors", "optimizer.safetensors", "reference.safetensors"
"""The files of tensors."""


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
        optimizer: Optimizer,
        progress: Progress,
        facts: Mapping[str, Any],
        *,
        reference: Mapping[str, nn.Parameter] | None = None,
        best_step: int | None = None,
        keep_older: bool = False,
        processes: Processes = ALONE,
    ) -> Path:
        """Write a checkpoint, then remove those that are too old. All processes take part; the main one writes.

        Args:
            parameters: the trained parameters by name.
            optimizer: its state is saved by the same names.
            progress: where the run stands.
            facts: JSON values that `newest_state` hands back: settings, data fingerprint.
            reference: weights of a reference that moves.
            best_step: the checkpoint of that step stays, however old.
            keep_older: all others stay too.
            processes: of the run; what they hold in parts is put together.

        Raises:
            RunError: the disk is full or cannot be written; earlier checkpoints are as they were.
        """
        final = self.at(progress.step)
        weights = gathered(parameters, processes)
        moments = gathered(_optimizer_tensors(parameters, optimizer, processes), processes)
        files = {POLICY: weights, OPTIMIZER: moments}
        if reference is not None:
            files[REFERENCE] = gathered(reference, processes)
        if processes.is_main:
            with processes.writing():
                self._write(final, files, progress, facts)
                if not keep_older:
                    self._remove_old(final, best_step)
        return final

    def _write(self, final: Path, files: Mapping[str, Mapping[str, Tensor]], progress: Progress, facts: Mapping[str, Any]) -> None:
        draft = self.folder / f".{final.name}.{os.getpid()}"
        try:
            self.folder.mkdir(exist_ok=True)  # without its parents: where they are gone, a new folder would hide that
            self._remove_drafts()
            draft.mkdir()
            for name, tensors in files.items():
                save_file(dict(tensors), draft / name)
            checksums = {path.name: _checksum(path) for path in sorted(draft.glob("*.safetensors"))}
            state = {"step": progress.step, "method_state": progress.method_state, "checksums": checksums, **facts}
            state["checksum"] = _checksum_of(state)
            (draft / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
            replace_folder(draft, final)
            for later in self.all()[self.all().index(final) + 1 :]:  # passed over as damaged when the run was resumed
                self._remove(later)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            if not self.folder.parent.exists():
                raise folder_gone(final, self.folder.parent) from None
            next_step = "go on with --resume: earlier checkpoints are untouched" if self.all() else "start anew with --overwrite"
            raise RunError(f"cannot write the checkpoint {final}: {error}. Make room and {next_step}.") from None

    def _remove_old(self, newest: Path, best_step: int | None) -> None:
        finished = self.all()
        for old in finished[: max(0, finished.index(newest) + 1 - self.keep)]:
            if best_step is None or old != self.at(best_step):
                self._remove(old)

    def tidy(self, newest: Path, best_step: int | None = None, *, keep_older: bool = False) -> None:
        """Finish what a killed process began: remove drafts, and those that are too old beside the newest whole one."""
        self._remove_drafts()
        if not keep_older:
            self._remove_old(newest, best_step)

    def _remove(self, old: Path) -> None:
        """It goes by one rename: a kill in the middle of deleting must not leave half of one under its name."""
        going = old_of(old)
        with suppress(OSError):
            old.rename(going)
        with suppress(OSError):
            remove(going)

    def _remove_drafts(self) -> None:
        for left in self.folder.glob(".step-*"):  # by a process that was killed while writing or removing
            with suppress(OSError):
                remove(left)

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:06d}"

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted((path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]))

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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, ["state.json"]


def restore(
    path: Path, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, processes: Processes = ALONE
) -> Progress:
    """Put a checkpoint's numbers into the model and the optimizer. Only the main process reads; the others are sent what it reads.

    Raises:
        RunError: the checkpoint is of another model or adapter.
    """
    _restore_weights(path / POLICY, parameters, processes)
    own: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in SharedFile(path / OPTIMIZER, processes).tensors():
        if key == RANDOM_STATE:
            states = tensor.cpu().reshape(-1, torch.get_rng_state().numel())  # one per process that there was
            own_state = states[processes.rank if processes.rank < len(states) else 0]
            torch.set_rng_state(own_state.clone())  # torch reads from the start of the storage, where another process's state is
            continue
        name, moment = key.rsplit("|", 1)
        parameter = parameters[name]
        own[name][moment] = like(parameter, tensor) if tensor.shape == parameter.shape else tensor
    kind = kind_of(optimizer)
    for name, parameter in parameters.items():
        kind.put(optimizer, parameter, own[name])
    return Progress(step=state["step"], method_state=state["method_state"])


def restore_reference(path: Path, reference: Mapping[str, nn.Parameter], processes: Processes = ALONE) -> None:
    """Put a checkpoint's numbers into a reference that follows the policy.

    Raises:
        RunError: the checkpoint is of another model or adapter.
    """
    _restore_weights(path / REFERENCE, reference, processes)


def _restore_weights(file: Path, parameters: Mapping[str, nn.Parameter], processes: Processes) -> None:
    weights = SharedFile(file, processes)
    if weights.shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise RunError(
            f"the checkpoint {file.parent} holds other parameters than this run trains: the model or the adapter settings have changed."
        )
    for name, tensor in weights.tensors():
        put(parameters[name], tensor)


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, processes: Processes) -> dict[str, Tensor]:
    kept = {name: kind_of(optimizer).tensors(optimizer, parameter) for name, parameter in parameters.items()}
    tensors = {f"{name}|{key}": value for name, own in kept.items() for key, value in own.items()}
    return tensors | {RANDOM_STATE: processes.collect(torch.get_rng_state())}


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
