"""What of a model's training fits into a memory, with which settings, and how long it takes. Nothing is loaded but the model's config.

Three ways are looked at: all weights, a LoRA adapter, and a LoRA adapter over a base in 4 bits (QLoRA). Of a model that is an
adapter already, that adapter goes on, over its base as it is and in 4 bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from prefopt.config import check
from prefopt.data.dataset import load
from prefopt.data.settings import DataSettings
from prefopt.data.store import Sizes
from prefopt.engine.batch import Sharing
from prefopt.errors import ModelError, PrefoptError
from prefopt.machine import prepare_environment
from prefopt.methods.method import Method
from prefopt.models.load import is_hub_name, load_tokenizer, locate
from prefopt.models.policy import transformers_logging_at
from prefopt.models.quantise import has_bitsandbytes
from prefopt.models.read import context_of
from prefopt.models.settings import ModelSettings
from prefopt.pipeline.pace import Pace, Work, assumed_pace, matrix_rate, measure_pace, work_of
from prefopt.pipeline.plan_fit import Examples, Fit, find_fit, not_installed
from prefopt.pipeline.plan_settings import PlanSettings, num_bytes
from prefopt.pipeline.plan_words import Plan, Times, Way, command_of, table, values_of, why, write
from prefopt.training.assemble import method_named, own_settings, reference_settings, settings_for
from prefopt.training.cut import cut, needed_positions
from prefopt.training.memory.available import available_memory, held
from prefopt.training.memory.estimate import forget, precision_of, size, trains_adapter
from prefopt.training.optimizers.kinds import KINDS
from prefopt.training.order import DataOrder
from prefopt.training.settings import RunSettings
from prefopt.trees import Completion, PromptTree, token_ids

CUDA_ITSELF = 1_000_000_000
"""What a GPU's memory loses to CUDA's kernels and libraries and to the edges of the allocator's blocks. Assumed, not measured."""

LOOKED_AT = 5000
"""Examples, of all, from which the time of the reference is told."""

STEPS_LOOKED_AT = 20
"""Steps of a run that are cut into micro-batches to tell its time."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """The question, looked up."""

    settings: PlanSettings
    method: Method
    device: torch.device
    is_here: bool
    trees: Sequence[PromptTree]
    num_examples: int
    sharing: Sharing


def plan(settings: PlanSettings, say: Callable[[str], object] = print, *, only: str | None = None, quick: bool = False) -> Plan:
    """Look at the ways of training the model, and propose one.

    Args:
        settings: the question.
        say: takes the answer, line by line.
        only: name of the one way to look at; None: all.
        quick: say nothing of times, and look at no way after the first that fits.

    Raises:
        PrefoptError: there is no such method, model, or data, or what was asked cannot be told.
    """
    prepare_environment()
    forget()
    kind = method_named(settings.method)
    _, adapter = locate(settings.model)
    device, is_here = _device(settings)
    base = _within_context(_base_settings(settings, kind, is_here), say)
    method = kind(own_settings(kind, base))
    sharing: Sharing = "plain" if settings.sharing == "plain" else "flat"
    process = held() if device.type == "cpu" else 0
    room, where = _room(settings, device, is_here, process)
    trees, num_examples = _examples(settings, base, method, say)
    asked = _Asked(settings, method, device, is_here, trees, num_examples, sharing)
    say(f"memory: {size(room)} {where}")
    rate = None if quick else _say_machine(asked, base, say)
    ways = []
    for name, changes in _ways(settings, adapter is not None):
        if only not in (None, name):
            continue
        run = base.model_copy(update=changes)
        fit = find_fit(method, run, _sizes_of_examples(asked), room=room - _taken(device, process), device=device, gpus=settings.gpus)
        ways.append(Way(name, fit, _times(asked, fit, rate)))
        if quick and fit.fits and _is_installed(ways[-1]):
            break
    for line in table(ways, _taken(device, process)):
        say(line)
    _say_what_was_not_tried(ways, device, say)
    chosen = next((way for way in ways if way.fit.fits and _is_installed(way)), None)
    if chosen is None:
        _say_why_none(ways, settings, device, process, say)
        return Plan(tuple(ways), None, room, where, process)
    values = values_of(settings, chosen, is_adapter=adapter is not None)
    command = command_of(settings.method, values, chosen.fit.gpus)
    say(f"chosen: {chosen.name}, {why(chosen, ways)}")
    for line in chosen.fit.estimate.lines("Python and its libraries" if device.type == "cpu" else "CUDA itself", _taken(device, process)):
        say(f"  {line}")
    say(f"run it:\n  {command}")
    found = Plan(tuple(ways), chosen, room, where, process, command, values)
    if settings.write is not None:
        write(settings.write, settings.method, values, say)
    if settings.measure:
        from prefopt.pipeline.plan_measure import measure

        measure(found, settings, say)
    return found


def _base_settings(settings: PlanSettings, kind: type[Method], is_here: bool) -> RunSettings:
    """The run as it would be if there were room. A GPU that is not here is taken for one with bf16 products."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set & DataSettings.model_fields.keys()}
    shared = {name: getattr(settings, name) for name in ("model", "batch_size", "epochs", "max_tokens", "precision", "sharing")}
    if not is_here and settings.precision == "auto":
        shared["precision"] = "bf16"
    run = {"out": "runs/plan", "trust_remote_code": settings.trust_remote_code, "gradient_checkpointing": "off", **shared, **given}
    return check(settings_for(kind), {**run, "data": settings.data or ["-"]})


def _device(settings: PlanSettings) -> tuple[torch.device, bool]:
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu and settings.memory is None:
        raise PrefoptError("device cuda: there is no GPU here to look at. Say how much memory yours has: --memory 24GB.")
    kind = "cuda" if settings.device == "cuda" or (settings.device == "auto" and has_gpu) else "cpu"
    return torch.device(kind), kind == "cpu" or has_gpu


def _within_context(base: RunSettings, say: Callable[[str], object]) -> RunSettings:
    """The settings with `max_length` no longer than what the model was made for, as in the run. Nothing but its config is read.

    Raises:
        ModelError: it cannot be read; says what to do.
    """
    source, adapter = locate(base.model)
    try:
        with transformers_logging_at("ERROR"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=base.trust_remote_code)
    except Exception as error:  # the library lets errors of many kinds through; all mean that there is no config to read
        found = " ".join(str(error).split())[:300].rstrip(".")
        if is_hub_name(source):
            raise ModelError(
                f"there is no folder {source} here, and the hub gave no config of that name: {found}. Check the spelling."
            ) from None
        raise ModelError(f"cannot read the config of {source}: {found}. A plan needs the model's config.json.") from None
    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    say(f"model: {base.model}, {text.model_type}{f', {count} layers' if count else ''}{', an adapter over ' + source if adapter else ''}")
    context = context_of(config)
    return base.model_copy(update={"max_length": context}) if context and context < base.max_length else base


def _room(settings: PlanSettings, device: torch.device, is_here: bool, process: int) -> tuple[int, str]:
    if settings.memory is not None:
        return num_bytes(settings.memory), "(as given)"
    available = available_memory(device)
    if available is None:
        raise PrefoptError("this system does not tell how much memory is free. Say how much there is: --memory 24GB.")
    # What this process holds will be gone when the run begins.
    return available.num_bytes + process, f"{available.where} are free"


def _taken(device: torch.device, process: int) -> int:
    """What a process takes beside what is estimated."""
    return process if device.type == "cpu" else CUDA_ITSELF


def _examples(settings: PlanSettings, base: RunSettings, method: Method, say: Callable[[str], object]) -> tuple[Sequence[PromptTree], int]:
    kind = method.needs.completions
    if settings.data:
        dataset = load(base.data, base, load_tokenizer(base), kind=kind)
        trees = dataset.trees
        sizes = Sizes.of(trees)
        prompt, completion = float(sizes.prompt.mean()), float(sizes.answers.sum() / sizes.branches.sum())
        longest = int((sizes.prompt + sizes.longest).max())
        say(f"examples: {len(trees):,}, prompts of {prompt:.0f} tokens, completions of {completion:.0f}, the longest together {longest:,}")
        return trees, max(1, round(sum(dataset.times_of(trees))))
    branches = 2 if kind in ("pair", "ranked") else 1
    prompt_tokens = min(settings.prompt_tokens, base.max_length - 2)
    completion = min(settings.completion_tokens, base.max_length - prompt_tokens)
    ids = token_ids([0] * completion)
    tree = PromptTree(token_ids([0] * prompt_tokens), (Completion(ids),) * branches)
    say(f"examples: {settings.examples:,} of {prompt_tokens} tokens with completions of {completion} (taken: no data was given)")
    return (tree,) * min(settings.examples, 4096), settings.examples


def _sizes_of_examples(asked: _Asked) -> Examples:
    sizes = Sizes.of(asked.trees)
    branches = max(1, round(float(sizes.branches.mean())))
    prompt, completion = float(sizes.prompt.mean()), float(sizes.answers.sum() / sizes.branches.sum())
    costs = (sizes.prompt if asked.sharing != "plain" else sizes.prompt * sizes.branches) + sizes.answers
    longest = int(np.max(needed_positions(sizes, asked.sharing)))
    per_step = min(asked.settings.batch_size, asked.num_examples)
    lengths = (max(1, round(prompt)), *(max(2, round(completion)),) * branches)
    return Examples(lengths, float(costs.mean()), float(costs.std()), longest, per_step)


def _ways(settings: PlanSettings, is_adapter: bool) -> list[tuple[str, dict[str, Any]]]:
    four = {"load_in_4bit": True}
    if is_adapter:
        return [("adapter", {}), ("adapter, base in 4 bits", four)]
    lora = {"lora_rank": settings.lora_rank}
    return [("full", {}), (f"LoRA {settings.lora_rank}", lora), (f"QLoRA {settings.lora_rank}", {**lora, **four})]


def _is_installed(way: Way) -> bool:
    """Whether the run would find its libraries; optimizers without theirs are not on the ladder."""
    return has_bitsandbytes() or not way.fit.settings.load_in_4bit


def _say_why_none(ways: Sequence[Way], settings: PlanSettings, device: torch.device, process: int, say: Callable[[str], object]) -> None:
    """No way fits, or none whose libraries are there."""
    if fitting := [way for way in ways if way.fit.fits]:
        say(f"{fitting[0].name} fits, and needs bitsandbytes, which is not installed: pip install 'prefopt[bits]', and ask again")
        return
    least = min(ways, key=lambda way: way.fit.estimate.total)
    say(
        f"nothing fits: {least.name} takes least, {size(least.fit.estimate.total + _taken(device, process))}. Take a smaller model, "
        "shorter examples (--max-length), or more memory" + (f" or GPUs (--gpus, now {settings.gpus})." if device.type == "cuda" else ".")
    )


def _say_what_was_not_tried(ways: Sequence[Way], device: torch.device, say: Callable[[str], object]) -> None:
    """The optimizers in fewer bits that are not installed, where a way did not fit without them."""
    missing = dict.fromkeys(name for way in ways if not way.fit.fits for name in not_installed(way.fit.settings, device))
    for name in missing:
        kind = KINDS[name]
        say(f"not tried: --optim {name}, for the library {kind.library} is not installed (pip install 'prefopt[{kind.extra}]')")


def _say_machine(asked: _Asked, base: RunSettings, say: Callable[[str], object]) -> float | None:
    """The rate that times are told from, in operations per second; None: not known."""
    given = asked.settings.tflops
    if given is not None:
        say(f"times: taken to compute {given:g} TFLOP/s all told, as given; nothing was measured")
        return given * 1e12
    if not asked.is_here:
        say("times: not known, there is no such device here (--tflops N says what to take it for)")
        return None
    precision = precision_of(base, asked.device)
    sizes = _model_sizes(asked, base)
    positions = min(base.max_tokens, 2048)
    rate = matrix_rate(sizes, positions, precision.autocast or torch.float32, asked.device)
    threads = f" with {torch.get_num_threads()} threads" if asked.device.type == "cpu" else ""
    where = f"this {'GPU' if asked.device.type == 'cuda' else 'CPU'}{threads}"
    say(f"times: some of the model's layers are run on {where}, where products of their sizes reach {rate / 1e9:,.0f} GFLOP/s")
    return rate


def _model_sizes(asked: _Asked, run: RunSettings) -> Work:
    adapter = trains_adapter(run)
    return work_of(_model_settings(run), precision_of(run, asked.device), adapter=adapter, kind=asked.method.needs.model)


def _model_settings(run: RunSettings) -> ModelSettings:
    return ModelSettings.model_validate({name: getattr(run, name) for name in ModelSettings.model_fields})


def _times(asked: _Asked, fit: Fit, rate: float | None) -> Times | None:
    if rate is None:
        return None
    run = fit.settings
    sizes = _model_sizes(asked, run)
    order = DataOrder(asked.num_examples, min(run.batch_size, asked.num_examples), run.seed, run.epochs)
    steps = [
        [asked.trees[index % len(asked.trees)] for index in order.examples(step)] for step in range(min(STEPS_LOOKED_AT, order.num_steps))
    ]
    plans = [cut(trees, max_tokens=run.max_tokens, sharing=asked.sharing, num_processes=fit.gpus) for trees in steps]
    pace = _pace(asked, run, sizes, [list(batch.trees) for batch in plans[0][0]], rate)
    if pace is None:
        return None
    per_step = [max(sum(pace.micro_batch(batch.trees, recomputing=fit.recomputing) for batch in part) for part in parts) for parts in plans]
    step = float(np.mean(per_step)) + pace.optimizer()
    reference = 0.0
    if asked.method.needs.reference:
        every = max(1, len(asked.trees) // LOOKED_AT)
        some = [asked.trees[place] for place in range(0, len(asked.trees), every)]
        once = pace.forward(some) * asked.num_examples / len(some) / fit.gpus
        if reference_settings(run).reference_cache:
            reference = once
        else:
            step += once / math.ceil(asked.num_examples / order.batch_size)
    run_seconds = reference + step * order.num_steps
    return Times(step, reference, step * asked.num_examples / order.batch_size, run_seconds, pace.is_measured, _without(fit, pace))


def _without(fit: Fit, pace: Pace) -> tuple[str, ...]:
    """What takes time beside what a pace knows of."""
    found = []
    if fit.settings.load_in_4bit and not (pace.is_measured and has_bitsandbytes()):
        found.append("weights in 4 bits are written out for every pass")
    if fit.settings.offload_activations:
        found.append("activations go to the machine's memory and come back")
    if fit.gpus > 1:
        found.append("GPUs send each other weights and gradients")
    return tuple(found)


def _pace(asked: _Asked, run: RunSettings, sizes: Work, micro_batches: Sequence[list[PromptTree]], rate: float) -> Pace | None:
    if asked.settings.tflops is not None:
        return assumed_pace(sizes, rate, asked.sharing)
    try:
        return measure_pace(
            _model_settings(run),
            precision_of(run, asked.device),
            sizes,
            max(micro_batches, key=len),
            sharing=asked.sharing,
            device=asked.device,
            rate=rate,
            optim=run.optim,
        )
    except Exception:  # there is no room for the probe, or the model's layers want real numbers: its times are not known
        return None
