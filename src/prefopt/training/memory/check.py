"""Whether a run fits into memory: refused, warned or helped before it begins.

A run whose certain part does not fit is refused, with what would help and how much. The likely part is an estimate
(docs/memory.md has the measurements): where it is what exceeds the memory, layers recompute if that is left to the run, and
where that is not enough the run is only warned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefopt.data.store import Sizes
from prefopt.engine.batch import Sharing
from prefopt.errors import RunError
from prefopt.methods.method import Method
from prefopt.training.assemble import reference_settings
from prefopt.training.cut import fullest_row
from prefopt.training.group.processes import Processes
from prefopt.training.memory.available import Available, available_memory
from prefopt.training.memory.estimate import (
    MemoryEstimate,
    estimate_memory,
    forget,
    layers_recomputing,
    num_layers,
    precision_of,
    size,
    trains_adapter,
)
from prefopt.training.settings import RunSettings
from prefopt.trees import PromptTree

MARGIN = 3.0
"""Times the rule of thumb that must be there for it to be enough; else the activations are counted."""

LORA_RANK = 16
"""The rank that is proposed."""

MAX_PROCESSES = 64
"""More are not proposed."""


@dataclass(frozen=True, slots=True)
class Micro:
    """The largest micro-batch of a run.

    Attributes:
        positions: that it computes.
        lengths: tokens of an example's prompt and of each of its completions, on average; None: not known.
        accumulates: a step has more than one.
    """

    positions: int
    lengths: tuple[int, ...] | None = None
    accumulates: bool = True


@dataclass(frozen=True, slots=True)
class MemoryCheck:
    """A run before it starts, and what there is for it.

    Attributes:
        method, settings: of the run.
        processes: how many share it.
        device: that it computes on.
        available: what a process may take; as it was before the model was loaded.
    """

    method: Method
    settings: RunSettings
    processes: int
    device: torch.device
    available: Available

    def refuse(self) -> None:
        """Stop a run that cannot fit.

        Raises:
            RunError: weights, gradients and moments are more than there is; says what helps.
        """
        micro = Micro(self.settings.max_tokens)
        if self.estimate(micro, exact=False).certain <= self.available.num_bytes:
            return
        estimate = self.estimate(micro)
        needed = ", ".join(f"{part.name} {size(part.num_bytes)}" for part in estimate.parts if part.certain and part.num_bytes)
        rest = sum(part.num_bytes for part in estimate.parts if not part.certain)
        reading = f"reading the model takes {size(estimate.loading)} on each process; " if estimate.certain == estimate.loading else ""
        raise RunError(
            f"the run needs at least {size(estimate.certain)} of memory, and {size(self.available.num_bytes)} {self.available.where} are "
            f"free ({reading}{needed}; activations and the like take up to {size(rest)} more). {self._advice(micro)} "
            "--memory-check off starts it all the same."
        )

    def largest_micro_batch(self, trees: Sequence[PromptTree], sharing: Sharing) -> "Micro":
        """What the run's examples come to.

        Args:
            trees: examples of the run.
            sharing: how completions share their prompt.
        """
        sizes = Sizes.of(trees)
        costs_E = (sizes.prompt if sharing != "plain" else sizes.prompt * sizes.branches) + sizes.answers
        mean, count = float(costs_E.mean()), min(self.settings.batch_size, len(trees)) / self.processes
        positions = fullest_row(mean, float(costs_E.std()), int(costs_E.max()), count=count, max_tokens=self.settings.max_tokens)
        branches = max(1, round(float(sizes.branches.mean())))
        prompt, completion = float(sizes.prompt.mean()), float(sizes.answers.mean()) / branches
        lengths = (max(1, round(prompt)), *(max(2, round(completion)),) * branches)
        return Micro(positions, lengths, accumulates=mean * count > self.settings.max_tokens)

    def fitting_layers(self, micro: "Micro") -> int | None:
        """How many layers must recompute for the run to fit, where that is left to it; None: none, or it would not help.

        Args:
            micro: its largest micro-batch.
        """
        if self.settings.gradient_checkpointing != "auto" or self._fits_at_once(micro) or self._fits(micro):
            return None
        depth = num_layers(self.method, self.settings, self.device)
        now, least = self.estimate(micro), self.estimate(micro, gradient_checkpointing="on")
        if least.total > 0.97 * now.total:
            return None
        # From none to all of them it falls layer by layer; halving the distance finds the first that fits.
        low, high = 0, depth
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(micro, gradient_checkpointing=middle) else (middle, high)
        return high

    def with_layers(self, count: int) -> "MemoryCheck":
        """The same, where that many layers recompute."""
        return replace(self, settings=self.settings.model_copy(update={"gradient_checkpointing": count}))

    def note(self, micro: "Micro") -> str | None:
        """A warning where the run may not fit, now that its examples are known; None where it should.

        Args:
            micro: its largest micro-batch.
        """
        if self._fits_at_once(micro):
            return None
        estimate = self.estimate(micro)
        if estimate.total <= self.available.num_bytes:
            return None
        parts = ", ".join(f"{part.name} {size(part.num_bytes)}" for part in estimate.parts if part.num_bytes)
        return (
            f"note: memory may run out: the run may need {size(estimate.total)} ({parts}), and {size(self.available.num_bytes)} "
            f"{self.available.where} were free. {self._advice(micro)}"
        )

    def _fits_at_once(self, micro: "Micro") -> bool:
        """Whether there is so much room that nobody need look closer."""
        return MARGIN * self.estimate(micro, exact=False).total <= self.available.num_bytes

    def _fits(self, micro: "Micro", **changes: Any) -> bool:
        return self.estimate(micro, **changes).total <= self.available.num_bytes

    def estimate(self, micro: "Micro", processes: int | None = None, *, exact: bool = True, **changes: Any) -> MemoryEstimate:
        """What a process takes, with some settings changed.

        Args:
            micro: the largest micro-batch.
            processes: how many share the run, if not as many as now.
            exact: as `estimate_memory`.
            changes: settings by name.
        """
        return estimate_memory(
            self.method,
            self.settings.model_copy(update=changes),
            positions=micro.positions,
            device=self.device,
            num_processes=processes or self.processes,
            exact=exact,
            tree=micro.lengths,
            accumulates=micro.accumulates,
        )

    def _advice(self, micro: Micro) -> str:
        """What would make it fit, the most effective first."""
        now = self.estimate(micro)
        found = [
            (self.estimate(replace(micro, positions=at), count, **changes), words, changes)
            for words, changes, at, count in self._remedies(micro)
        ]
        helpful = sorted((entry for entry in found if entry[0].total < 0.97 * now.total), key=lambda entry: entry[0].total)
        if not helpful:
            return "Take a smaller model, or more memory."
        all_at_once = {name: value for *_, changes in helpful for name, value in changes.items()}
        lines = [f"{words}: {size(estimate.total)}{self._verdict(estimate)}" for estimate, words, _ in helpful]
        if len(all_at_once) > 1 and not any(estimate.total <= self.available.num_bytes for estimate, *_ in helpful):
            at = min(micro.positions, all_at_once.get("max_tokens", micro.positions))
            best = self.estimate(replace(micro, positions=at), **all_at_once)
            lines.append(f"all of them{' but fsdp' if len(all_at_once) < len(helpful) else ''}: {size(best.total)}{self._verdict(best)}")
        return f"In all it would take about {size(now.total)}, and with\n  " + "\n  ".join(lines) + "\nOr take a smaller model."

    def _verdict(self, estimate: MemoryEstimate) -> str:
        return ", which fits" if estimate.total <= self.available.num_bytes else ""

    def _remedies(self, micro: Micro) -> list[tuple[str, dict[str, Any], int, int | None]]:
        """Each with its words, the settings that it changes, the positions of a micro-batch then, and the number of processes."""
        settings, positions = self.settings, micro.positions
        found: list[tuple[str, dict[str, Any], int, int | None]] = []
        if not trains_adapter(settings):
            found.append((f"--lora-rank {LORA_RANK}", {"lora_rank": LORA_RANK}, positions, None))
        elif precision_of(settings, self.device).autocast is None:
            found.append(("--precision bf16", {"precision": "bf16"}, positions, None))
        if trains_adapter(settings) and not settings.load_in_4bit and settings.parallel == "ddp":
            found.append(("--load-in-4bit on", {"load_in_4bit": True}, positions, None))
        if layers_recomputing(settings) is not None:
            found.append(("--gradient-checkpointing on", {"gradient_checkpointing": "on"}, positions, None))
        if (half := positions // 2) >= settings.max_length:
            found.append((f"--max-tokens {half}", {"max_tokens": half}, half, None))
        reference = reference_settings(settings)
        if self.method.needs.reference and not reference.reference_cache and reference.sync_reference_every_steps is None:
            found.append(("--reference-cache on", {"reference_cache": True}, positions, None))
        if self.device.type == "cuda" and (count := self._enough_processes(micro)):
            found.append((f"--parallel fsdp on {count} GPUs", {"parallel": "fsdp"}, positions, count))
        return found

    def _enough_processes(self, micro: Micro) -> int | None:
        count = self.processes if self.settings.parallel == "ddp" and self.processes > 1 else 2 * self.processes
        while count <= MAX_PROCESSES:
            if self.estimate(micro, count, parallel="fsdp").total <= self.available.num_bytes:
                return count
            count *= 2
        return None


def check_memory(method: Method, settings: RunSettings, processes: Processes) -> MemoryCheck | None:
    """Look whether the run can fit, before anything of the model is read.

    Returns:
        what `note` asks once the examples are known; None where it was switched off or cannot be told.

    Raises:
        RunError: it cannot fit.
    """
    if not settings.memory_check:
        return None
    available = available_memory(processes.device)
    if available is None:
        return None
    forget()
    check = MemoryCheck(method, settings, processes.count, processes.device, available)
    try:
        check.estimate(Micro(settings.max_tokens), exact=False)
    except Exception:  # the config cannot be read, or the adapter not be put in: loading the model will say what is wrong
        return None
    check.refuse()
    return check
