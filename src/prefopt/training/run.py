"""A run from its settings to its results: the walk through all rooms, once.

data -> model -> proof of the engine -> reference -> loop -> model folder and summary
"""

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import prefopt
from prefopt.config import check
from prefopt.data.cache import cache_folder
from prefopt.errors import RunError, RunStopped
from prefopt.methods.method import Method, State
from prefopt.models.load import LoadedModel, choose_precision, is_hub_name, load_model, locate
from prefopt.models.policy import Policy, trained_parameters
from prefopt.models.proof import prove
from prefopt.models.reference import Reference
from prefopt.models.save import save_model
from prefopt.training.assemble import method_named, own_settings, reference_settings, settings_for
from prefopt.training.checkpoint import Checkpoints, Progress, restore
from prefopt.training.cut import check_fits
from prefopt.training.examples import RunData, load_data, needed_trees, within_context
from prefopt.training.folder import RunFolder
from prefopt.training.interrupt import StopRequest, stop_on_signals
from prefopt.training.loop import Course, Trainer, ddp, peak_memory_gb, run_steps
from prefopt.training.narrator import Narrator, Quiet, Terminal
from prefopt.training.optimizer import Schedule, make_optimizer, usual_learning_rate
from prefopt.training.order import DataOrder
from prefopt.training.processes import Processes, join
from prefopt.training.references import check_start, make_reference
from prefopt.training.settings import RunSettings
from prefopt.training.words import closing_lines, device_name, figures_line, opening_lines


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves.

    Attributes:
        folder: of the run.
        model_dir: the trained model or adapter, with its tokenizer.
        summary: what `summary.json` holds.
    """

    folder: Path
    model_dir: Path
    summary: dict[str, Any]


def train_with(method: str, /, *, narrator: Narrator | None = None, **settings: Any) -> RunResult:
    """`train` with settings by name.

    Raises:
        ConfigError: names every setting that is unknown, missing or wrong.
    """
    return train(method, check(settings_for(method_named(method)), settings), narrator=narrator)


def train(method: str | Method, settings: RunSettings, *, narrator: Narrator | None = None) -> RunResult:
    """Run a method from its settings to a trained model on disk.

    Args:
        method: a method's name, with settings of its `settings_for` class; or a method object with its own settings.
        settings: of the run.
        narrator: where words and progress go; the default is the terminal.

    Raises:
        PrefoptError: the settings, the data, the model or the run; says what was given, what is allowed and what to do.
    """
    if isinstance(method, str):
        kind = method_named(method)
        method = kind(own_settings(kind, settings))
    with join(settings.device) as processes:
        speaker = (narrator or Terminal()) if processes.is_main else Quiet()
        return _run(method, settings, processes, speaker)


def _run(method: Method, settings: RunSettings, processes: Processes, narrator: Narrator) -> RunResult:
    began = time.perf_counter()
    folder = RunFolder(settings.out.expanduser())
    if is_hub_name(settings.model):
        narrator.say(f"there is no folder {settings.model} here; looking for it on the hub")
    with processes.main_first():
        if processes.is_main:
            models = (settings.model, settings.adapter, reference_settings(settings).reference)
            folder.prepare(resume=settings.resume, overwrite=settings.overwrite, models=models)
    torch.manual_seed(settings.seed % 2**63)  # any whole number will do
    adapter = bool(settings.lora_rank or settings.adapter or locate(settings.model)[1])
    precision = choose_precision(settings.precision, processes.device, adapter=adapter)
    loaded = load_model(settings, precision=precision, device=processes.device, seed=settings.seed)
    settings = within_context(settings, loaded, narrator)
    num_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    learning_rate = settings.learning_rate or usual_learning_rate(method.rates, num_parameters, adapter=loaded.adapter is not None)
    with processes.main_first():
        data = load_data(method, settings, loaded, folder if processes.is_main else None, narrator)
    proof = prove(loaded.model, max_length=settings.max_length, sharing=settings.sharing, autocast=precision.autocast)
    policy = Policy(loaded.model, proof.path)
    check_fits([*data.train, *data.held_out], max_tokens=settings.max_tokens, sharing=proof.path.sharing)
    order = DataOrder(len(data.train), settings.batch_size, settings.seed, settings.epochs, settings.max_steps)
    for line in opening_lines(method, settings, loaded, precision, order, learning_rate, proof.sentence(), processes):
        narrator.say(line)
    reference = make_reference(
        method,
        settings,
        policy,
        loaded,
        needed_trees(order, data),
        cache_folder=cache_folder(settings.cache_dir).parent / "reference" if reference_settings(settings).reference_cache else None,
        max_tokens=settings.max_tokens,
        precision=precision,
        processes=processes,
        narrator=narrator,
    )
    trainer = Trainer(
        policy=policy,
        wrapped=ddp(policy, processes),
        method=method,
        reference=reference,
        optimizer=make_optimizer(trained_parameters(policy), weight_decay=settings.weight_decay),
        schedule=Schedule(learning_rate, order.num_steps, settings.warmup_ratio, settings.lr_schedule),
        max_grad_norm=settings.max_grad_norm,
        max_tokens=settings.max_tokens,
        autocast=precision.autocast,
        processes=processes,
    )
    run = Run(folder, settings, trainer, data, order, narrator, began)
    summary = run.go(loaded, reference)
    if processes.is_main:
        save_model(loaded, folder.model, chat_template=data.chat_template, end_of_turn=data.end_of_turn)
        folder.write_summary(summary)
        for line in closing_lines(summary, folder):
            narrator.say(line)
    processes.wait()
    return RunResult(folder.path, folder.model, summary)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is about to step."""

    folder: RunFolder
    settings: RunSettings
    trainer: Trainer
    data: RunData
    order: DataOrder
    narrator: Narrator
    began: float

    def go(self, loaded: LoadedModel, reference: Reference | None) -> dict[str, Any]:
        """Resume or start, step to the end, and sum up."""
        checkpoints = Checkpoints(self.folder.checkpoints, keep=self.settings.keep_checkpoints)
        parameters = dict(trained_parameters(self.trainer.policy))
        opening: dict[str, Any] = {}
        seconds = 0.0
        if self.settings.resume:
            progress, facts = self._resume(checkpoints, parameters)
            opening, seconds = facts["opening"], facts["training_seconds"]
            if progress.step == self.order.num_steps and (finished := self.folder.read_summary()):
                return finished
        else:
            progress = Progress(0, self.trainer.method.initial_state())
            if reference is not None:
                first = [self.data.train[index] for index in self.order.examples(0)]
                opening["start_difference"] = check_start(
                    self.trainer.policy,
                    reference,
                    first,
                    is_start=reference_settings(self.settings).reference is None,
                    max_tokens=self.settings.max_tokens,
                    autocast=self.trainer.autocast,
                    processes=self.trainer.processes,
                    narrator=self.narrator,
                )
        if self.trainer.processes.is_main:  # nothing stands in the way any more, and what `out` held may go
            if not self.settings.resume:
                self.folder.clear(keep=self.data.dropped)
            self.folder.write_config(config_values(self.trainer.method, self.settings))
        evaluate = self._evaluate if self.data.held_out else None
        if evaluate is not None and progress.step == 0:
            opening["before"] = evaluate(progress.method_state)
            self.narrator.say("held out, before: " + figures_line(opening["before"]))
        with stop_on_signals(self.narrator, grace_s=0.0 if self.trainer.processes.count == 1 else 2.0) as stop:
            started = time.perf_counter() - seconds  # those before the run was resumed count too
            course = self._course(
                progress,
                evaluate,
                lambda done: self._save(checkpoints, parameters, done, opening, time.perf_counter() - started),
                stop,
            )
            with self.narrator.progress("training", self.order.num_steps, progress.step) as ticker:
                run_steps(self.trainer, self.data.train, course, ticker)
        if course.stopped:
            raise RunStopped(
                f"stopped after step {course.step} of {self.order.num_steps}, as asked; the checkpoint is in {checkpoints.folder}. "
                "Go on with the same command and --resume."
            )
        return opening | self._sum_up(course, time.perf_counter() - started)

    def _course(
        self, progress: Progress, evaluate: Callable[[State], dict[str, float]] | None, save: Callable[[Progress], None], stop: StopRequest
    ) -> Course:
        return Course(
            order=self.order,
            step=progress.step,
            state=progress.method_state,
            evaluate_every=self.settings.eval_every_steps,
            save_every=self.settings.save_every_steps,
            evaluate=evaluate,
            save=lambda step, state: save(Progress(step, state)),
            record=self._record,
            stopping=lambda: stop.agreed(self.trainer.processes),
        )

    def _resume(self, checkpoints: Checkpoints, parameters: Mapping[str, torch.nn.Parameter]) -> tuple[Progress, Mapping[str, Any]]:
        path, state = checkpoints.newest_state()
        if state["data"] != self.data.facts["fingerprint"]:
            raise RunError(f"the data is not what {path} was trained on. Give the same files, or start anew with another out.")
        if changed := changed_settings(state["settings"], fixed_settings(self.trainer.method, self.settings)):
            raise RunError(
                f"these settings differ from those of {path}: {'; '.join(changed)}. Give them as they were, or start anew with another out."
            )
        progress = restore(path, state, parameters, self.trainer.optimizer)
        if self.trainer.processes.is_main:
            self.folder.keep_rows(progress.step)
        self.narrator.say(f"resumed from {path}: {progress.step} of {self.order.num_steps} steps are done")
        return progress, state

    def _save(
        self,
        checkpoints: Checkpoints,
        parameters: Mapping[str, torch.nn.Parameter],
        progress: Progress,
        opening: Mapping[str, Any],
        seconds: float,
    ) -> None:
        if self.trainer.processes.is_main:
            settings = fixed_settings(self.trainer.method, self.settings)
            facts = {"settings": settings, "data": self.data.facts["fingerprint"], "opening": opening, "training_seconds": seconds}
            checkpoints.save(parameters, self.trainer.optimizer, progress, facts)
        self.trainer.processes.wait()

    def _evaluate(self, state: State) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in self.trainer.evaluate(self.data.held_out, state).items()}

    def _record(self, row: Mapping[str, float]) -> None:
        if self.trainer.processes.is_main:
            self.folder.add_row(row)

    def _sum_up(self, course: Course, seconds: float) -> dict[str, Any]:
        last = course.last_row or self.folder.last_row()
        num_examples = sum(len(self.order.examples(step)) for step in range(course.step))
        return {
            "method": self.trainer.method.name,
            "model": str(self.settings.model),
            "steps": course.step,
            "epochs": round(self.order.epoch_after(course.step - 1), 4),
            "loss": last.get("loss"),
            "after": {name: value for name, value in last.items() if name.startswith("eval/")},
            "last_step": last,
            "training_seconds": round(seconds, 2),
            "examples_per_second": round(num_examples / seconds, 3) if seconds > 0 else None,
            "seconds": round(time.perf_counter() - self.began, 2),
            "peak_memory_gb": round(peak_memory_gb(self.trainer.processes.device), 3),
            "device": device_name(self.trainer.processes.device),
            "num_processes": self.trainer.processes.count,
            "engine": str(self.trainer.policy.path),
            "data": self.data.facts,
            "versions": {
                "prefopt": prefopt.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def fixed_settings(method: Method, settings: RunSettings) -> dict[str, Any]:
    """The settings that a resumed run must share with its beginning: those that decide its numbers."""
    free = {
        "data",  # its digest decides, not how it is spelled
        "eval_data",
        "out",
        "resume",
        "overwrite",
        "keep_checkpoints",
        "save_every_steps",
        "eval_every_steps",
        "data_workers",
        "cache_dir",
        "device",
        "max_tokens",
    }
    return {"method": method.name, **json.loads(settings.model_dump_json(exclude=free)), **json.loads(method.settings.model_dump_json())}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ, as `name was a, is b`."""
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in sorted({*before, *now}) if before.get(name) != now.get(name)
    ]


def config_values(method: Method, settings: RunSettings) -> dict[str, Any]:
    """All settings, as `config.yaml` holds them."""
    return {
        "method": method.name,
        **json.loads(settings.model_dump_json(exclude={"resume", "overwrite"})),
        **json.loads(method.settings.model_dump_json()),
    }
