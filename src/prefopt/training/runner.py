"""A run that is about to step: start or resume, evaluate, save, end."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefopt.data.dataset import write_dropped
from prefopt.errors import PrefoptError, RunStopped
from prefopt.methods.method import State
from prefopt.models.moving import MovingReference
from prefopt.models.policy import trained_parameters
from prefopt.models.reference import CachedReference, DataReference
from prefopt.report.files import read_json, read_lines
from prefopt.training.assemble import reference_settings
from prefopt.training.examples import RunData, mean_lengths
from prefopt.training.interrupt import SaveClock, StopRequest, any_process
from prefopt.training.loop import Asked, Best, Course, Trainer, peak_memory_gb, run_steps
from prefopt.training.not_finite import NotFinite, held_out_not_finite
from prefopt.training.order import DataOrder
from prefopt.training.record.callbacks import RunStart
from prefopt.training.record.checkpoint import Checkpoints, Progress, restore, restore_reference, verified
from prefopt.training.record.environment import differences
from prefopt.training.record.held_out import HeldOutLines, described
from prefopt.training.record.logbook import Logbook
from prefopt.training.record.resume import check_reference_values, config_values, fixed_settings, rounding_differences, start_of
from prefopt.training.references import check_start
from prefopt.training.samples import Sampler, means
from prefopt.training.settings import RunSettings
from prefopt.training.terminal.words import figures_line
from prefopt.training.watching.watched import WatchedRun
from prefopt.trees import PromptTree

Checkpoint = tuple[Path, Mapping[str, Any]]
"""A checkpoint's folder and its `state.json`."""


class Runner:
    """A run that is about to step.

    Args:
        book: where it is noted.
        settings: as they were given.
        trainer, data, order: what steps, on what.
        sampler: answers a few prompts at each evaluation; None: none.
        manifest: what is run, by this start of it; where the run is resumed, its file keeps that of the first.
        checkpoint: to go on from; None: from the start.
    """

    def __init__(
        self,
        *,
        book: Logbook,
        settings: RunSettings,
        trainer: Trainer,
        data: RunData,
        order: DataOrder,
        sampler: Sampler | None,
        manifest: dict[str, Any],
        checkpoint: Checkpoint | None,
    ) -> None:
        self.book, self.settings, self.trainer, self.data, self.order = book, settings, trainer, data, order
        self.sampler, self.manifest, self.checkpoint = sampler, manifest, checkpoint
        self.folder, self.narrator, self.processes = book.folder, book.narrator, trainer.processes
        self.checkpoints = Checkpoints(self.folder.files.checkpoints, keep=settings.keep_checkpoints)
        self.parameters = dict(trained_parameters(trainer.policy))
        self.held_out: HeldOutLines | None = None
        self.kept_reference = trainer.reference if isinstance(trainer.reference, CachedReference) else None
        self.moving = trainer.reference if isinstance(trainer.reference, MovingReference) else None
        self.reference_digest = self.kept_reference.digest() if self.kept_reference else None
        self.reference_sample = self.kept_reference.sample() if self.kept_reference else None
        self.opening: dict[str, Any] = {}
        """What was found before the first step."""
        self.seconds = 0.0
        """Trained before the run was resumed."""
        self.started = 0.0
        """When training would have begun, had it not been interrupted; set in `go`."""
        self.saved_step = 0
        """Of the newest checkpoint."""

    def done_before(self) -> dict[str, Any] | None:
        """The summary of a run that is being resumed and has come to its end already; None: there is something left to do."""
        if self.checkpoint is None:
            return None
        _, state = self.checkpoint
        progress, best = Progress(state["step"], state["method_state"]), _best_of(state)
        summary = read_json(self.folder.files.summary) or {}
        status = read_json(self.folder.files.status) or {}
        files = self.folder.files
        whole = status.get("state") == "finished" and summary.get("steps") == progress.step
        whole &= files.card.is_file() and (files.report.is_file() or not self.settings.report)  # the last that are written
        found: dict[str, Any] | None = self.processes.share(summary if whole else None)
        return found if self._course(progress, best, StopRequest()).ended else None

    def go(self, stop: StopRequest) -> dict[str, Any]:
        """Start or resume, step to the end, and sum up. The policy then holds the weights to save.

        Args:
            stop: ends it after the step, when asked.

        Raises:
            RunError: it cannot be resumed or saved, or a step's numbers are not finite.
            RunStopped: it was asked to stop, and has saved.
        """
        course = self._start(stop) if self.checkpoint is None else self._resume(self.checkpoint, stop)
        self.book.follow(self._watched())
        self.started = time.perf_counter() - self.seconds
        self.clock = SaveClock(self.settings.save_every_minutes)  # it begins with the steps
        with self.narrator.progress("training", self.order.num_steps, course.step) as ticker:
            try:
                run_steps(self.trainer, self.data.train, course, ticker)
            except NotFinite as error:
                self._note_broken(error, course)
                if self.processes.is_main:
                    error.add(self._way_back())
                raise
        seconds = time.perf_counter() - self.started
        if course.stopped:
            raise RunStopped(
                f"stopped after step {course.step} of {self.order.num_steps}, as asked; the checkpoint is in {self.checkpoints.folder}. "
                "Go on with the same command and --resume."
            )
        self._take_best(course)
        self.trainer.check_finite(course.step)  # it may have come from a checkpoint that nobody looked at
        return self.opening | self._sum_up(course, seconds)

    def _start(self, stop: StopRequest) -> Course:
        state = self.trainer.method.state_from(self.data.train, times=self.data.times)
        if self.trainer.reference is not None:
            self.opening["start_difference"] = check_start(
                self.trainer.policy,
                self.trainer.reference,
                [self.data.train[index] for index in self.order.examples(0)],
                is_start=reference_settings(self.settings).reference is None,
                max_tokens=self.trainer.max_tokens,
                autocast=self.trainer.autocast,
                processes=self.processes,
                narrator=self.narrator,
            )
        with self.processes.main_first():
            if self.processes.is_main:  # nothing stands in the way any more, and what `out` held may go
                self.folder.clear()
                self.folder.write_config(config_values(self.trainer.method, self.settings))
                write_dropped(self.data.dropped, self.folder.files.dropped)
                write_dropped(self.data.dropped_held_out, self.folder.files.dropped_held_out)
            self._open_book(0, stop, self.manifest)
        if self.held_out is not None or self.sampler is not None:
            self.opening["before"] = self._evaluate(0, state)
            if line := figures_line(self.opening["before"]):
                self.narrator.say(f"held out, before: {line}")
        return self._course(Progress(0, state), None, stop)

    def _resume(self, checkpoint: Checkpoint, stop: StopRequest) -> Course:
        path, state = checkpoint
        check_reference_values(path, state, self.kept_reference, self.manifest["resolved"]["precision"])
        progress = restore(path, state, self.parameters, self.trainer.optimizer, self.processes)
        if self.moving is not None:
            restore_reference(path, self.moving.parameters(), self.processes)
            self.moving.moved_for = state["reference_moved_for"]
        best = _best_of(state)
        self.saved_step = progress.step
        self.opening, self.seconds = state["opening"], state["training_seconds"]
        fixed = fixed_settings(self.trainer.method, self.settings)
        different = rounding_differences(state, self.manifest, fixed, self.reference_digest)
        noted = self.manifest
        with self.processes.main_first():
            if self.processes.is_main:
                for name, count in self.folder.keep_steps(progress.step).items():
                    self.narrator.say(f"note: {name} is damaged: {count} of its lines could not be read and are left out")
                self.checkpoints.tidy(path, self._best_kept(best), keep_older=state.get("in_trouble", False))
                earlier = _earlier_manifest(self.folder.files.manifest, self.manifest)
                if earlier is self.manifest:
                    self.narrator.say(
                        "note: manifest.json is damaged or gone; it is written anew with what is known now. When the run was begun, and "
                        "where it was resumed before, is lost"
                    )
                resumed = {
                    "step": progress.step,
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "differences": different,
                    "settings": differences(earlier["settings"], self.manifest["settings"]),
                }
                noted = earlier | {"resumed": [*earlier.get("resumed", []), resumed]}
            self._open_book(progress.step, stop, noted)
        if self.held_out is not None and (lost := self.held_out.num_unknown):
            self.narrator.say(
                f"note: held_out.jsonl is damaged or gone: for {lost} of its {len(self.data.held_out)} examples the figures from before "
                "training are lost, and the report cannot show what changed there"
            )
        self.narrator.say(f"resumed from {path}: {progress.step} of {self.order.num_steps} steps are done")
        if different:
            self.narrator.say(
                f"note: {'; '.join(different)}. From here on the figures may differ in their last digits from those of a run in one piece."
            )
        return self._course(progress, best, stop)

    def _open_book(self, step: int, stop: StopRequest, manifest: Mapping[str, Any]) -> None:
        if self.data.held_out:
            self.held_out = HeldOutLines(self._read(self.data.held_out), self.data.tokenizer, read_lines(self.folder.files.held_out))
        self.book.begin(RunStart(self.folder.path, manifest, step, stop.ask), manifest, num_steps=self.order.num_steps)

    def _read(self, trees: Sequence[PromptTree]) -> list[PromptTree]:
        """The examples as the loss reads them."""
        return [self.trainer.method.in_loss(tree) for tree in trees]

    def _course(self, progress: Progress, best: Best | None, stop: StopRequest) -> Course:
        return Course(
            order=self.order,
            step=progress.step,
            state=progress.method_state,
            evaluate_every=self.settings.eval_every_steps,
            save_every=self.settings.save_every_steps,
            save_best=self.settings.keep_best,
            compares=self.moving is None,
            patience=self.settings.early_stop,
            evaluate=self._evaluate if self.held_out is not None or self.sampler is not None else None,
            save=self._save,
            record=self.book.row,
            asked=lambda: Asked(*any_process(self.processes, stop.asked, self.processes.is_main and self.clock.is_time())),
            best=best,
        )

    def _evaluate(self, step: int, state: State) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self.held_out is not None:
            evaluation = self.trainer.evaluate(self.data.held_out, state)
            figures |= {f"eval/{name}": value for name, value in evaluation.figures.items()}
            self.book.held_out(self.held_out.after(step, evaluation))
            if not math.isfinite(loss := evaluation.figures["loss"]):
                trees, losses = self.data.held_out, evaluation.examples["loss"]
                raise held_out_not_finite(loss, step, trees, losses, self.trainer.broken_weights())
        if self.sampler is not None:
            answers = self.sampler.answers(self.trainer.policy, step)
            figures |= means(answers)
            self.book.samples(answers)
        return figures

    def _save(self, course: Course, *, in_trouble: bool = False) -> None:
        """A checkpoint; `in_trouble`: of weights that have just given something that is not finite, so that older ones stay."""
        self.trainer.check_finite(course.step)
        with self.clock.saving():
            self._save_finite(course, in_trouble=in_trouble)

    def _save_finite(self, course: Course, *, in_trouble: bool) -> None:
        facts = {
            "settings": fixed_settings(self.trainer.method, self.settings),
            **start_of(self.manifest),
            "reference": self.reference_digest,
            "reference_sample": self.reference_sample,
            "reference_moved_for": self.moving.moved_for if self.moving is not None else 0,
            "best": asdict(course.best) if course.best else None,
            "opening": self.opening,
            "training_seconds": time.perf_counter() - self.started,
            "in_trouble": in_trouble,
        }
        if self.processes.is_main:
            self.folder.flush()
        self.checkpoints.save(
            self.parameters,
            self.trainer.optimizer,
            Progress(course.step, course.state),
            facts,
            reference=self.moving.parameters() if self.moving is not None else None,
            best_step=self._best_kept(course.best),
            keep_older=in_trouble,
            processes=self.processes,
        )
        self.saved_step = course.step
        self.processes.wait()

    def _best_kept(self, best: Best | None) -> int | None:
        """The step whose checkpoint stays, however old."""
        return best.step if best and self.settings.keep_best else None

    def _note_broken(self, error: NotFinite, course: Course) -> None:
        """Write the step's examples, and a checkpoint of the weights, which are as they were."""
        try:
            if error.trees:
                self._write_broken(error, course)
            if error.is_fit and course.step > self.saved_step:
                self._save(course, in_trouble=True)
        except PrefoptError as another:  # it must not hide the first one
            self.narrator.say(f"note: {another}")

    def _way_back(self) -> str:
        """What is left of a run that has come to numbers that are not finite, and how to go on; for the process that sees its disk."""
        finished = self.checkpoints.all()
        if not finished:
            return "No checkpoint was saved: when the cause is mended, start anew with --overwrite."
        back = f", and --resume goes on from {finished[-2].name}" if len(finished) > 1 else ", and start anew"
        return (
            f"The newest checkpoint, {finished[-1].name} in {self.checkpoints.folder}, is finite; if the figures ran away before that step "
            f"(metrics.jsonl has them), delete its folder{back}. The same settings lead to the same step again, unless the machine was at "
            "fault; a lower learning_rate needs a run of its own, with another --out."
        )

    def _write_broken(self, error: NotFinite, course: Course) -> None:
        if self.processes.is_main:
            figures = [dict(zip(error.examples, values, strict=True)) for values in zip(*error.examples.values(), strict=True)]
            lines = described(self._read(error.trees), self.data.tokenizer)
            ids = [{"prompt_ids": tree.prompt_ids.tolist(), "ids": [c.ids.tolist() for c in tree.completions]} for tree in error.trees]
            self.folder.write_lines(
                self.folder.files.bad_batch,
                [
                    {"step": course.step + 1, **line, "figures": {name: str(value) for name, value in own.items()}, **tokens}
                    for line, own, tokens in zip(lines, figures, ids, strict=True)
                ],
            )

    def _take_best(self, course: Course) -> None:
        """Where the run may end early, the model is that of the best evaluation."""
        if self.settings.early_stop is None or course.best is None or course.best.step == course.step:
            return
        path = self.checkpoints.at(course.best.step)
        state, damaged = self.processes.share(verified(path) if self.processes.is_main else None)
        if damaged:
            self.narrator.say(f"note: {path}, the best checkpoint, is damaged ({', '.join(damaged)}); the model is that of the last step")
            return
        restore(path, state, self.parameters, self.trainer.optimizer, self.processes)
        self.narrator.say(f"the model is taken from step {course.best.step}, where the held-out loss was lowest: {course.best.loss:.4f}")
        self.opening["model_step"] = course.best.step

    def _watched(self) -> WatchedRun:
        resolved = self.manifest["resolved"]
        return WatchedRun(
            method=self.trainer.method.name,
            settings=config_values(self.trainer.method, self.settings) | {"batch_size": self.order.batch_size},
            learning_rate=resolved["learning_rate"],
            usual_learning_rate=resolved["usual_learning_rate"],
            adapter=self.manifest["model"]["adapter"],
            num_train=len(self.data.train),
            num_samples=len(self.sampler.prompts) if self.sampler is not None else 0,
            num_steps=self.order.num_steps,
            begins_at_reference=reference_settings(self.settings).reference is None
            and not isinstance(self.trainer.reference, DataReference),
            start_difference=self.opening.get("start_difference"),
            before=self.opening.get("before", {}),
            data=self.data.facts,
            first_length=next(iter(mean_lengths(self._read([self.data.train[index] for index in self.order.examples(0)])).values()), None),
            usual=self.trainer.method.usual,
        )

    def _sum_up(self, course: Course, seconds: float) -> dict[str, Any]:
        last = self.book.rows[-1] if self.book.rows else {}
        model_step = self.opening.get("model_step", course.step)
        of_model = next((row for row in reversed(self.book.rows) if row.get("step") == model_step), last)
        num_examples = self.order.num_taken_before(course.step)
        return {
            "method": self.trainer.method.name,
            "model": str(self.settings.model),
            "steps": course.step,
            "num_steps": self.order.num_steps,
            "model_step": model_step,
            "epochs": round(self.order.epoch_after(course.step - 1), 4),
            "loss": last.get("loss"),
            "after": {name: value for name, value in of_model.items() if name.startswith(("eval/", "samples/"))},
            "last_step": last,
            "best": asdict(course.best) if course.best else None,
            "watch": [row["rule"] for row in read_lines(self.folder.files.watch) if "rule" in row],
            "training_seconds": round(seconds, 2),
            "examples_per_second": round(num_examples / seconds, 3) if seconds > 0 else None,
            "peak_memory_gb": round(peak_memory_gb(self.processes.device), 3),
            "device": self.manifest["environment"]["device"],
            "num_processes": self.processes.count,
            "engine": self.manifest["resolved"]["engine"],
            "data": self.data.facts,
            "versions": {name: self.manifest["environment"][name] for name in ("prefopt", "torch", "transformers", "python")},
        }


def _best_of(state: Mapping[str, Any]) -> Best | None:
    """The best evaluation that a checkpoint knows of."""
    return Best(**state["best"]) if state.get("best") else None


def _earlier_manifest(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What the beginning of the run noted about itself; where that is damaged, what is known now."""
    earlier = read_json(path) or {}
    for name, section in now.items():
        known = earlier.get(name)
        if isinstance(section, dict) and not (
            isinstance(known, dict) and all(_alike(known.get(key), value) for key, value in section.items())
        ):
            return now
    return earlier if isinstance(earlier.get("resumed", []), list) else now


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are of one type; numbers are, and so is what may be missing."""
    return one is None or other is None or type(one) is type(other) or all(isinstance(value, int | float) for value in (one, other))
