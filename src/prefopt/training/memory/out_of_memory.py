"""When memory runs out in the middle: what was going on, which setting to lower to what, and that nothing is lost."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from prefopt.errors import RunError
from prefopt.training.memory.available import held
from prefopt.training.memory.check import LORA_RANK
from prefopt.training.memory.estimate import size, trains_adapter
from prefopt.training.settings import RunSettings

SIGNS = ("DefaultCPUAllocator", "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")
"""What messages of a failed allocation hold where they have no class of their own."""

ASKED = re.compile(r"(?:allocate|alloc) (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, on a CPU, or in Python itself."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def out_of_memory(
    error: BaseException, settings: RunSettings, *, doing: str, device: torch.device, advice: str = "", longest: int | None = None
) -> RunError:
    """The error that ends the run.

    Args:
        error: for which `is_out_of_memory` is true.
        settings: of the run.
        doing: what was going on, as the end of a sentence: "in step 12 of 100".
        device: of the run.
        advice: what became of checkpoints, and how to go on.
        longest: positions of the largest example, below which max_tokens cannot go; None: nothing was cut into micro-batches yet,
            and max_tokens would not help.
    """
    return RunError(
        " ".join(
            sentence
            for sentence in (
                f"memory ran out {doing}: {in_use(device)}{_asked(error)}.",
                _lower_max_tokens(settings, longest),
                _other_settings(settings, device),
                advice,
            )
            if sentence
        )
    )


@contextmanager
def explaining_out_of_memory(
    settings: RunSettings, *, doing: Callable[[], str], device: torch.device, advice: Callable[[], str], longest: int | None = None
) -> Iterator[None]:
    """Turns a failed allocation inside into the `RunError` that `out_of_memory` makes; `doing` and `advice` are asked then."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, settings, doing=doing(), device=device, advice=advice(), longest=longest) from None


def in_use(device: torch.device) -> str:
    """What the run holds at this moment."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        name = torch.cuda.get_device_name(device)
        return f"the run held {size(torch.cuda.memory_allocated(device))} of the {size(total)} of {name}"
    if not (now := held()):
        return "on the CPU"
    count = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return f"this process held {size(now)} of the machine's memory" + (f", and {count - 1} others run beside it" if count > 1 else "")


def _asked(error: BaseException) -> str:
    found = ASKED.search(str(error))
    return f", and {size(float(found[1]) * UNITS[found[2]])} more were asked for" if found else ""


def _lower_max_tokens(settings: RunSettings, longest: int | None) -> str:
    if longest is None:
        return ""
    lower = max(settings.max_tokens // 2, longest)
    if lower >= settings.max_tokens:
        return (
            f"max_tokens is {settings.max_tokens}, and the largest example takes {longest} of them, so it cannot be much lower. "
            "A lower max_length makes examples shorter, in a new run."
        )
    return f"Lower max_tokens from {settings.max_tokens} to {lower}; results do not depend on it, and a run may be resumed with it."


def _other_settings(settings: RunSettings, device: torch.device) -> str:
    found = []
    if settings.gradient_checkpointing != "on":
        found.append("--gradient-checkpointing on takes less memory and about a third more time, also in a run that is resumed")
    if not trains_adapter(settings):
        found.append(f"an adapter (--lora-rank {LORA_RANK}) takes about a quarter of the memory of weights, in a new run")
    if device.type == "cuda" and settings.parallel == "ddp":
        found.append("--parallel fsdp shares the weights among several GPUs, also in a run that is resumed")
    if not found:
        return ""
    text = "; ".join(found)
    return text[0].upper() + text[1:] + "."
