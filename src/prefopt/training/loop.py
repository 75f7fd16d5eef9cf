"""The training loop, from top to bottom.

A step: take `batch_size` examples, cut them into micro-batches, add up gradients, read the numbers once, stop if they
are not finite, step. What the examples are, what the loss is and how the model runs is decided elsewhere.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.logps import ReferenceLogps, TokenLogps
from prefopt.engine.offload import Offload
from prefopt.machine import give_freed_memory_back
from prefopt.methods.method import Method, State
from prefopt.models.moving import MovingReference
from prefopt.models.policy import Policy, trained_parameters
from prefopt.models.reference import Reference
from prefopt.training.cut import MicroBatch, cut
from prefopt.training.group.processes import Processes
from prefopt.training.group.sharding import not_finite
from prefopt.training.memory.available import most_held
from prefopt.training.not_finite import CAUSES, NotFinite, in_words, step_not_finite
from prefopt.training.optimizer import Schedule, clip_gradients, set_learning_rate
from prefopt.training.optimizers.kinds import kind_of
from prefopt.training.order import DataOrder
from prefopt.training.step import PerExample, StepResult, Sums, unit_totals, weighted_loss
from prefopt.training.terminal.narrator import Ticker
from prefopt.trees import PromptTree


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a look at examples gave.

    Attributes:
        figures: `loss` and the metrics' means.
        examples: the same of each example, in their order; `loss` is summed over the example's share of the unit.
    """

    figures: dict[str, float]
    examples: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Trainer:
    """Everything that a step touches.

    Attributes:
        policy: the model that is trained.
        wrapped: the same, as processes share it; the policy itself on one process, and where its weights are cut into parts.
        method: gives the loss.
        reference: None for methods without.
        optimizer, schedule, max_grad_norm: how the weights move.
        max_tokens: positions of a micro-batch.
        autocast: dtype of matrix products, or None.
        processes: those of the run.
        offload: moves what the backward pass needs to the machine's memory; None: it stays.
    """

    policy: Policy
    wrapped: nn.Module
    method: Method
    reference: Reference | None
    optimizer: Optimizer
    schedule: Schedule
    max_grad_norm: float
    max_tokens: int
    autocast: torch.dtype | None
    processes: Processes
    offload: Offload | None = None

    def step(self, trees: Sequence[PromptTree], step: int, state: State) -> tuple[StepResult, float]:
        """One optimizer step on the examples.

        Returns:
            the loss and the metrics before the step, and the gradient's norm before clipping.

        Raises:
            NotFinite: loss or gradient is not finite; the weights are as they were.
        """
        if isinstance(self.reference, MovingReference):
            self.reference.before_step(step)
        statistics = self._statistics(trees)
        read = [self.method.in_loss(tree) for tree in trees]
        totals = unit_totals(self.method, read)
        mine = self._my_part(read)
        sums = Sums()
        self.optimizer.zero_grad(set_to_none=True)
        for place, micro_batch in enumerate(mine):
            with self._synchronised(is_last=place == len(mine) - 1):
                self._add_gradients(micro_batch, totals, statistics, state, sums)
        norm = clip_gradients(self.policy, self.max_grad_norm)
        *numbers, grad_norm = torch.cat([self.processes.add_up(sums.stacked()), norm.double()[None]]).tolist()  # the step's one host read
        result = StepResult.of(sums.named(numbers))
        if not (math.isfinite(result.loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise step_not_finite(result.loss, grad_norm, step, trees, self.evaluate(trees, state).examples, self.broken_weights())
        set_learning_rate(self.optimizer, self.schedule.at(step))
        self.optimizer.step()
        return result, grad_norm

    def _add_gradients(
        self, micro_batch: MicroBatch, totals: Mapping[str, float], statistics: Mapping[str, float], state: State, sums: Sums
    ) -> None:
        """Forward and backward pass over one micro-batch.

        Nothing of its graph may outlive it: thousands of small nodes all over the heap would keep what the tensors between them
        leave from growing together again, and a run on a CPU would take half as much memory again (docs/experiments.md).
        """
        batch = self._pack(micro_batch)
        logps, reference = self._forward(self.wrapped, batch)
        output = self.method.loss(logps, reference, batch, statistics=statistics, state=state)
        loss = weighted_loss(output, batch, totals)
        # Processes average their gradients; the loss is a sum over all of them.
        (loss * self.processes.count).backward()
        with torch.no_grad():
            sums.add(output, batch, loss)

    def evaluate(self, trees: Sequence[PromptTree], state: State) -> Evaluation:
        """Loss and metrics on examples, as one batch, without gradients."""
        statistics = self._statistics(trees)
        read = [self.method.in_loss(tree) for tree in trees]
        totals = unit_totals(self.method, read)
        mine = self._my_part(read)
        sums, examples = Sums(), PerExample(len(trees))
        with torch.no_grad():
            for micro_batch in mine:
                batch = self._pack(micro_batch)
                logps, reference = self._forward(self.policy, batch)
                output = self.method.loss(logps, reference, batch, statistics=statistics, state=state)
                sums.add(output, batch, weighted_loss(output, batch, totals))
                own_loss_B = torch.stack([term.weight * term.values_B for term in output.terms]).sum(0)
                examples.add(micro_batch.places, {"loss": own_loss_B, **output.metrics}, output.only)
        result = StepResult.of(sums.named(self.processes.add_up(sums.stacked()).tolist()))
        return Evaluation({"loss": result.loss, **result.metrics}, examples.named(self.processes.add_up(examples.stacked())))

    def broken_weights(self) -> list[str]:
        """Names of the trained parameters that are not finite."""
        return not_finite(dict(trained_parameters(self.policy)), self.processes)

    def broken_moments(self) -> list[str]:
        """Names of the trained parameters for which the optimizer holds something that is not finite."""
        named = dict(trained_parameters(self.policy))
        kept = {name: kind_of(self.optimizer).tensors(self.optimizer, parameter) for name, parameter in named.items()}
        held = {f"{key}|{name}": value for name, own in kept.items() for key, value in own.items() if value.is_floating_point()}
        return list(dict.fromkeys(found.split("|", 1)[1] for found in not_finite(held, self.processes)))

    def check_finite(self, step: int) -> None:
        """What is about to be saved must be finite: the weights, and the optimizer's state.

        Args:
            step: that was done last.

        Raises:
            NotFinite: it is not.
        """
        if names := self.broken_weights():
            raise NotFinite(f"after step {step} the weights of {in_words(names)} are not finite; they are not saved. {CAUSES}")
        if names := self.broken_moments():
            raise NotFinite(
                f"after step {step} the optimizer's averages for {in_words(names)} are not finite; they are not saved. {CAUSES}"
            )

    def _my_part(self, trees: Sequence[PromptTree]) -> list[MicroBatch]:
        plan = cut(trees, max_tokens=self.max_tokens, sharing=self.policy.path.sharing, num_processes=self.processes.count)
        return plan[self.processes.rank]

    def _pack(self, micro_batch: MicroBatch) -> TreeBatch:
        return pack(micro_batch.trees, sharing=self.policy.path.sharing, device=self.processes.device)

    def _forward(self, policy: Callable[..., TokenLogps], batch: TreeBatch) -> tuple[TokenLogps, ReferenceLogps | None]:
        extras = "log_sum_squares" in self.method.needs.outputs
        with torch.autocast(batch.input_ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            # The reference first: it may switch adapters, and recomputation in the backward pass must find the policy's.
            reference = None if self.reference is None else self.reference.logps(batch)
            with nullcontext() if self.offload is None else self.offload.during(self.policy):
                return policy(batch, extras=extras), reference

    def _statistics(self, trees: Sequence[PromptTree]) -> dict[str, float]:
        """The sums that couple the examples of the batch, where the method takes any."""
        if not self.method.couples_examples:
            return {}
        sums = Sums()
        with torch.no_grad():
            for micro_batch in self._my_part([self.method.in_statistics(tree) for tree in trees]):
                batch = self._pack(micro_batch)
                sums.add_named(self.method.statistics(*self._forward(self.policy, batch), batch) or {})
        return sums.named(self.processes.add_up(sums.stacked()).tolist())

    def _synchronised(self, *, is_last: bool) -> AbstractContextManager[None]:
        """DDP exchanges gradients in the last micro-batch only."""
        if isinstance(self.wrapped, DistributedDataParallel) and not is_last:
            return self.wrapped.no_sync()
        return nullcontext()


@dataclass(frozen=True, slots=True)
class Best:
    """The evaluation on the way with the lowest held-out loss.

    Attributes:
        step: after which it was.
        loss: `eval/loss` there.
        since: evaluations since, none of them lower.
    """

    step: int
    loss: float
    since: int = 0


class Asked(NamedTuple):
    """What someone or the clock asks for between two steps; the same on all processes."""

    stop: bool = False
    save: bool = False


@dataclass(slots=True)
class Course:
    """Where a run stands, and when it does what beside stepping.

    Attributes:
        order: which examples each step takes.
        step: optimizer steps done.
        state: what the method carries.
        evaluate_every, save_every: in steps; None: never on the way.
        save_best: write a checkpoint at every evaluation on the way that is the best so far.
        compares: held-out losses of different steps are of the same loss; against a reference that moves they are not.
        patience: evaluations in a row without a new best after which the run ends; None: it never does.
        evaluate: gives figures after a step, held-out ones keyed `eval/...`; None: there is nothing to look at.
        save: writes a checkpoint of the course as it stands.
        record: takes each step's row of metrics.
        asked: after each step: whether to stop after saving, and whether it is time to save.
        best: so far; None before the first evaluation on the way.
        stopped: whether the run was asked to stop, and did.
    """

    order: DataOrder
    step: int
    state: State
    evaluate_every: int | None
    save_every: int | None
    save_best: bool
    compares: bool
    patience: int | None
    evaluate: Callable[[int, State], Mapping[str, float]] | None
    save: Callable[["Course"], None]
    record: Callable[[Mapping[str, float]], None]
    asked: Callable[[], Asked]
    best: Best | None = None
    stopped: bool = False

    @property
    def ended(self) -> bool:
        """Whether no step is left: all are done, or the held-out loss has not fallen for as long as patience lasts."""
        out_of_patience = self.patience is not None and self.best is not None and self.best.since >= self.patience
        return out_of_patience or self.step >= self.order.num_steps

    def compare(self, row: Mapping[str, float]) -> bool:
        """Take note of an evaluation; whether it is the best so far. Where none is on the way there is nothing to choose from."""
        if not self.compares or self.evaluate_every is None or "eval/loss" not in row:
            return False
        if math.isfinite(row["eval/loss"]) and (self.best is None or row["eval/loss"] < self.best.loss):
            self.best = Best(self.step, row["eval/loss"])
            return True
        if self.best is not None:
            self.best = Best(self.best.step, self.best.loss, self.best.since + 1)
        return False


def run_steps(trainer: Trainer, trees: Sequence[PromptTree], course: Course, ticker: Ticker) -> None:
    """All steps of the run that are left.

    Raises:
        RunError: from a step, or from saving.
    """
    while not course.ended:
        started = time.perf_counter()
        batch = [trees[index] for index in course.order.examples(course.step)]
        result, grad_norm = trainer.step(batch, course.step, course.state)
        course.state = trainer.method.next_state(course.state, result.state_sums)
        seconds = time.perf_counter() - started
        row: dict[str, float] = {
            "step": course.step + 1,
            "epoch": round(course.order.epoch_after(course.step), 4),
            "loss": result.loss,
            **result.metrics,
            "grad_norm": grad_norm,
            "learning_rate": trainer.schedule.at(course.step),
            "tokens_per_second": sum(tree.num_tokens for tree in batch) / seconds,
            "examples_per_second": len(batch) / seconds,
            "seconds": seconds,
            "memory_gb": peak_memory_gb(trainer.processes.device),
        }
        course.step += 1
        is_best = False
        if course.evaluate is not None and (course.ended or _is_due(course.evaluate_every, course.step)):
            try:
                row |= course.evaluate(course.step, course.state)
            except NotFinite:
                course.record(row)  # the step itself was done
                raise
            is_best = course.compare(row)
        course.record(row)
        ticker.step(course.step, row)
        asked = course.asked()
        if course.ended or any(asked) or _is_due(course.save_every, course.step) or (is_best and course.save_best):
            course.save(course)
        if asked.stop and not course.ended:
            course.stopped = True
            return


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that was in use at once so far, in 10⁹ bytes: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return most_held() / 1e9


def forget_peak_memory() -> None:
    """Count `peak_memory_gb` anew, for a run that follows another one in this process. Where the system cannot, it goes on as it was."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    give_freed_memory_back()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the process's high-water mark is what it holds now
