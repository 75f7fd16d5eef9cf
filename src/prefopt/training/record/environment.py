"""What beside its settings decides a run's numbers to the bit: versions, the machine, how the work is spread."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

import prefopt
from prefopt.training.group.processes import Processes
from prefopt.training.terminal.words import device_name

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "datasets")


def environment(processes: Processes) -> dict[str, Any]:
    """Versions and machine, as the manifest and every checkpoint hold them."""
    return {
        "prefopt": prefopt.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(processes.device),
        "num_threads": torch.get_num_threads(),
        "num_processes": processes.count,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, as `num_threads was 2, is 1`."""
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
