"""A run from its settings to its results: the walk through all rooms, once.

data -> model -> proof of the engine -> reference -> loop -> model folder, summary and report
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.config import check
from prefopt.data.cache import cache_folder
from prefopt.data.store import JoinedTrees, Sizes
from prefopt.engine.offload import CudaCopies, Offload
from prefopt.errors import RunStopped
from prefopt.machine import keep_freed_memory, prepare_environment
from prefopt.methods.method import Method
from prefopt.models.load import is_hub_name, locate
from prefopt.models.policy import trained_parameters
from prefopt.models.reference import DataReference
from prefopt.models.save import end_ids, save_model
from prefopt.training.assemble import method_named, own_settings, reference_settings, settings_for
from prefopt.training.combination import check_combination
from prefopt.training.cut import needed_positions
from prefopt.training.examples import needed_trees
from prefopt.training.group.processes import Processes, join
from prefopt.training.group.sharding import is_cut, saved_weights, wrap
from prefopt.training.interrupt import StopRequest, stop_at_once, stop_on_signals
from prefopt.training.loop import Trainer
from prefopt.training.memory.check import check_memory
from prefopt.training.memory.out_of_memory import explaining_out_of_memory
from prefopt.training.optimizer import Schedule, make_optimizer
from prefopt.training.prepare import Prepared, prepare
from prefopt.training.record.again import Again
from prefopt.training.record.callbacks import Callback
from prefopt.training.record.checkpoint import Checkpoints
from prefopt.training.record.folder import RunFolder
from prefopt.training.record.logbook import Logbook
from prefopt.training.record.manifest import make_manifest
from prefopt.training.record.reporters import make_reporters
from prefopt.training.record.resume import check_reference_is_same, check_start_is_same, find_checkpoint
from prefopt.training.references import choose_reference
from prefopt.training.runner import Checkpoint, Runner
from prefopt.training.samples import make_sampler
from prefopt.training.settings import RunSettings
from prefopt.training.terminal.narrator import Narrator, Quiet, Terminal
from prefopt.training.terminal.words import closing_lines


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


def train_with(method: str, /, *, narrator: Narrator | None = None, callbacks: Sequence[Callback] = (), **settings: Any) -> RunResult:
    """`train` with settings by name.

    Raises:
        ConfigError: names every setting that is unknown, missing or wrong.
    """
    return train(method, check(settings_for(method_named(method)), settings), narrator=narrator, callbacks=callbacks)


def train(
    method: str | Method,
    settings: RunSettings,
    *,
    narrator: Narrator | None = None,
    callbacks: Sequence[Callback] = (),
    again: Again | None = None,
) -> RunResult:
    """Run a method from its settings to a trained model on disk.

    Args:
        method: a method's name, with settings of its `settings_for` class; or a method object with its own settings.
        settings: of the run.
        narrator: where words and progress go; the default is the terminal.
        callbacks: are told of every step, on the main process.
        again: the run that this one repeats; its examples and weights must be the same.

    Raises:
        PrefoptError: the settings, the data, the model or the run; says what was given, what is allowed and what to do.
    """
    if isinstance(method, str):
        kind = method_named(method)
        method = kind(own_settings(kind, settings))
    prepare_environment()  # who comes from Python may have loaded torch, but may not have multiplied yet
    book: Logbook | None = None
    try:
        with stop_at_once(), join(settings.device) as processes:
            if processes.device.type == "cpu":
                keep_freed_memory()
            speaker = (narrator or Terminal()) if processes.is_main else Quiet()
            book = Logbook(RunFolder(settings.out.expanduser()), speaker, callbacks, is_main=processes.is_main)
            if processes.lifeline is not None:
                processes.lifeline.advice = book.folder.how_to_go_on
                processes.lifeline.at_end = partial(book.failed, stopped=False)
            return _run(method, settings, processes, book, again)
    except KeyboardInterrupt:
        if book is None or not book.is_main:
            raise
        if not book.is_open:
            raise RunStopped(_before_the_first_step(method, settings)) from None
        left = "the last checkpoint is as it was. Go on with the same command and --resume"
        stopped = RunStopped(
            f"stopped at once; {left if book.folder.has_checkpoint else 'no checkpoint was saved. Start anew with --overwrite'}."
        )
        book.failed(stopped, stopped=True)
        raise stopped from None
    except Exception as error:  # where another process is gone, `join` has said so by now
        if book is not None:
            book.failed(error, stopped=isinstance(error, RunStopped))
            book.pages(report=settings.report)
        raise
    finally:
        if book is not None:
            book.close()


def _before_the_first_step(method: Method, settings: RunSettings) -> str:
    """What is said where a run is stopped before it begins: nothing is lost but time, and not all of that."""
    kept = ""
    if method.needs.reference and reference_settings(settings).reference_cache:
        kept = " What was computed of the reference's values is kept in the cache."
    left = f" What {settings.out} held is as it was." if settings.resume or settings.overwrite else ""
    return f"stopped before the first step.{left}{kept} Give the same command to start again."


def _run(method: Method, settings: RunSettings, processes: Processes, book: Logbook, again: Again | None) -> RunResult:
    began = time.perf_counter()
    folder, narrator = book.folder, book.narrator
    if is_hub_name(settings.model):
        narrator.say(f"there is no folder {settings.model} here; looking for it on the hub")
    with processes.main_first():
        if processes.is_main:
            read = models_read(settings) if settings.overwrite else ()
            book.lock = folder.prepare(resume=settings.resume, overwrite=settings.overwrite, models=read)
            book.callbacks = (*make_reporters(settings.report_to, folder.path, narrator.say), *book.callbacks)
    checkpoints = Checkpoints(folder.files.checkpoints, keep=settings.keep_checkpoints)
    checkpoint = find_checkpoint(checkpoints, method, settings, processes) if settings.resume else None
    check_combination(settings, processes)
    memory = check_memory(method, settings, processes)
    explained = partial(
        explaining_out_of_memory,
        settings,
        doing=book.doing,
        device=processes.device,
        advice=partial(folder.how_to_go_on, several=processes.count > 1),
    )
    with explained():
        ready = prepare(method, settings, memory, processes, narrator)
    sizes = Sizes.of(JoinedTrees(ready.data.train, ready.data.held_out))
    with explained(longest=int(needed_positions(sizes, ready.policy.path.sharing).max())):
        runner = _runner(method, ready, checkpoint, processes, book, again)
        if (summary := runner.done_before()) is not None:
            narrator.say(f"this run has finished before, and stays as it is: {folder.path}")
            return RunResult(folder.path, folder.files.model, summary)
        stop = StopRequest()
        with stop_on_signals(narrator, stop, grace_s=0.0 if processes.count == 1 else 2.0):
            summary = runner.go(stop)
            summary["seconds"] = round(time.perf_counter() - began, 2)
            _save(ready, summary, processes, book)
    for line in closing_lines(summary, folder):
        narrator.say(line)
    return RunResult(folder.path, folder.files.model, summary)


def models_read(settings: RunSettings) -> list[str]:
    """Where the run reads weights: of an adapter its base too, without which neither it nor what is trained on it is worth anything."""
    named = (settings.model, reference_settings(settings).reference)
    return [place for place in (settings.adapter, *(part for name in named if name for part in locate(name))) if place]


def _runner(
    method: Method, ready: Prepared, checkpoint: Checkpoint | None, processes: Processes, book: Logbook, again: Again | None
) -> Runner:
    """The run, its reference computed."""
    settings, policy, data, precision = ready.settings, ready.policy, ready.data, ready.precision
    manifest = make_manifest(method, ready, processes)
    if checkpoint is not None:
        check_start_is_same(*checkpoint, manifest)
    if again is not None:
        again.check(manifest, book.narrator)
    trees = needed_trees(ready.order, data)
    choice = choose_reference(
        method,
        settings,
        policy,
        ready.loaded,
        trees,
        fingerprint=ready.fingerprint,
        precision=precision,
        processes=processes,
        narrator=book.narrator,
    )
    if choice is not None and choice.fingerprint is not None:
        manifest["reference"] = {"name": reference_settings(settings).reference, "fingerprint": choice.fingerprint}
        if checkpoint is not None:
            check_reference_is_same(*checkpoint, manifest)
        if again is not None:
            again.check(manifest, book.narrator)
    wrapped = wrap(policy, processes, settings.parallel)
    reference = live = None
    if choice is not None:
        reference = choice.ready(
            trees,
            cache_folder=cache_folder(settings.cache_dir) / "reference",
            max_tokens=settings.max_tokens,
            precision=precision,
            parallel=settings.parallel,
            processes=processes,
            narrator=book.narrator,
            policy=policy,
        )
        live = choice.live(reference)
    if isinstance(reference, DataReference):
        manifest["resolved"]["reference"] = "data"
    trainer = Trainer(
        policy=policy,
        wrapped=wrapped,
        method=method,
        reference=reference,
        optimizer=make_optimizer(trained_parameters(policy), weight_decay=settings.weight_decay, kind=settings.optim),
        schedule=Schedule(ready.learning_rate, ready.order.num_steps, settings.warmup_ratio, settings.lr_schedule),
        max_grad_norm=settings.max_grad_norm,
        max_tokens=settings.max_tokens,
        autocast=precision.autocast,
        processes=processes,
        offload=Offload(CudaCopies(processes.device)) if settings.offload_activations else None,
    )
    num_samples = settings.samples if method.needs.model == "language" else 0
    sampler = make_sampler(
        policy,
        live,
        data.held_out or data.train,
        data.tokenizer,
        end_ids(ready.loaded, data.end_of_turn),
        num=num_samples,
        max_new_tokens=settings.sample_tokens,
        max_length=settings.max_length,
        seed=settings.seed,
        autocast=precision.autocast,
        processes=processes,
    )
    if settings.samples and method.needs.model == "reward":
        book.narrator.say("note: no answers are sampled: a reward model scores answers and writes none")
    elif settings.samples and sampler is None:
        book.narrator.say(
            f"note: no answers are sampled: the model cannot generate, or no prompt leaves {settings.sample_tokens} tokens for an answer "
            f"within {settings.max_length} (lower sample_tokens, or samples 0)"
        )
    return Runner(
        book=book,
        settings=ready.given,
        trainer=trainer,
        data=data,
        order=ready.order,
        sampler=sampler,
        manifest=manifest,
        checkpoint=checkpoint,
    )


def _save(ready: Prepared, summary: dict[str, Any], processes: Processes, book: Logbook) -> None:
    """The model's folder, the summary, and the pages about them."""
    loaded, data = ready.loaded, ready.data
    weights = None
    if is_cut(ready.policy.parameters()):
        weights = saved_weights(loaded.adapter or loaded.model, processes, trained_only=loaded.adapter is not None)
    if processes.is_main:
        with processes.writing():
            save_model(loaded, book.folder.files.model, chat_template=data.chat_template, end_of_turn=data.end_of_turn, weights=weights)
        book.end(summary)
        book.pages(report=ready.settings.report)
    processes.wait()
