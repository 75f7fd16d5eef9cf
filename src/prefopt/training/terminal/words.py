"""What a run says of itself before and after: plain lines, with every value that was chosen for the user."""

from collections.abc import Mapping
from typing import Any

import torch

from prefopt.methods.method import Method
from prefopt.models.load import LoadedModel, Precision
from prefopt.models.policy import trained_parameters
from prefopt.models.quantise import num_parameters, quantisation_of
from prefopt.training.group.processes import Processes
from prefopt.training.order import DataOrder
from prefopt.training.record.folder import RunFolder
from prefopt.training.settings import RunSettings
from prefopt.training.terminal.shown import clock


def opening_lines(
    method: Method,
    settings: RunSettings,
    loaded: LoadedModel,
    precision: Precision,
    order: DataOrder,
    learning_rate: float,
    engine: str,
    processes: Processes,
) -> list[str]:
    """What will be done, with every value that was chosen for the user."""
    total = num_parameters(loaded.model)
    trained = sum(parameter.numel() for _, parameter in trained_parameters(loaded.model))
    what = "all weights" if loaded.adapter is None else f"an adapter of {trained:,} weights ({trained / total:.1%})"
    if packed := quantisation_of(loaded.model):
        what += f" on a base in {packed}"
    where = device_name(processes.device)
    if processes.count > 1:
        where += f" in {processes.count} processes ({settings.parallel})"
    elif settings.parallel == "fsdp":
        where += " in one process (--parallel fsdp cuts a model among several: start them with torchrun)"
    return [
        f"model: {settings.model}, {type(loaded.model).__name__}, {total:,} parameters, trains {what}; {precision} on {where}",
        f"engine: {engine}",
        f"{method.name}: {order.num_steps} steps of {settings.batch_size}, {order.epoch_after(order.num_steps - 1):.2g} epochs, "
        f"learning rate {learning_rate:g} ({settings.lr_schedule}, {settings.warmup_ratio:.0%} warm-up)"
        + ("" if settings.optim == "adamw" else f", {settings.optim}")
        + "".join(f", {setting}" for setting in own_settings_in_words(method)),
    ]


def own_settings_in_words(method: Method) -> list[str]:
    """The method's own settings: those that have a usual range, and whatever is not as it is by default."""
    defaults = {name: info.default for name, info in method.settings_class.model_fields.items()}
    values = {name: getattr(method.settings, name) for name in defaults}
    told = {name: value for name, value in values.items() if value is not None and (value != defaults[name] or name in method.usual)}
    return [f"{name} {_in_words(value)}" for name, value in told.items()]


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return " ".join(f"{name}={_in_words(part)}" for name, part in value.items())
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def closing_lines(summary: Mapping[str, Any], folder: RunFolder) -> list[str]:
    """The plain summary at the end."""
    lines = []
    if figures := figures_line(summary["after"]):
        lines.append(f"held out, after:  {figures}")
    speed = f", {summary['examples_per_second']:.2f} examples/s" if summary["examples_per_second"] else ""
    lines.append(f"{summary['steps']} steps in {clock(summary['training_seconds'])}{speed}, peak memory {summary['peak_memory_gb']:.2f} GB")
    return [*lines, f"model: {folder.files.model}", f"metrics: {folder.files.metrics}"]


def figures_line(values: Mapping[str, float]) -> str:
    """Held-out figures in words; empty where there are none."""
    return ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in values.items() if name.startswith("eval/"))


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
