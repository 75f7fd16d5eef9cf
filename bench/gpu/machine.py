"""What the machine is, and how fast: python -m bench.gpu.machine --out FILE."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "peft", "datasets", "trl", "bitsandbytes", "liger-kernel", "cut-cross-entropy"),
    *("pydantic", "cyclopts", "numpy"),
)
SECONDS = 1.0


def rate(once: Callable[[], object], work: float, device: torch.device) -> float:
    """How much of `work` (operations, bytes) is done per second, over about a second after warming up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        once()
    wait()
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        for _ in range(4):
            once()
            rounds += 1
        wait()
    return rounds * work / (time.perf_counter() - began)


def facts(device: torch.device) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size * size // 2 * (8 if device.type == "cuda" else 1), device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "packages": installed,
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "device": str(device),
        "bf16_flops": rate(lambda: left @ right, 2.0 * size**3, device),
        "copy_bytes": rate(lambda: target.copy_(source), 2.0 * source.numel() * source.element_size(), device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": properties.total_memory / 1e9,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return found


def driver() -> str:
    """The driver's version, where nvidia-smi tells."""
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.machine", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    found = facts(torch.device(given.device))
    given.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
