"""How much memory a process may still take."""

import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Available:
    """Memory that a process of the run may still take.

    Attributes:
        num_bytes: how much.
        where: of what, as a sentence goes on after a number of GB: "of this machine".
    """

    num_bytes: int
    where: str


def available_memory(device: torch.device, *, local_count: int | None = None, root: Path = Path("/")) -> Available | None:
    """What is left on a GPU, or on this machine for each process of the run that is on it; None where the system does not tell.

    Args:
        device: that the run computes on.
        local_count: processes on this machine; the default is what the launcher says.
        root: where /proc and /sys are, for tests.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What torch holds and does not use, it gives to the next run of this process.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Available(free, f"of the {total / 1e9:.1f} GB of {torch.cuda.get_device_name(device)}")
    found = [number for number in (_machine(root), *_groups(root)) if number is not None]
    if not found:
        return None
    count = local_count or int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    limit = "this machine" if found[0] == min(found) else "this machine's limit (cgroup)"
    return Available(max(0, min(found)) // count, f"of {limit}" + (f" for each of its {count} processes" if count > 1 else ""))


def held() -> int:
    """Memory that this process holds, in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def most_held() -> int:
    """The most memory that this process has held at once, in bytes.

    On Linux the kernel's mark of the process itself, where it has one: `ru_maxrss` begins at what the process that started it held.
    """
    with suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine(root: Path) -> int | None:
    """What the kernel says can be had without swapping; elsewhere than on Linux all that there is."""
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if root == Path("/") else None
    except (AttributeError, ValueError, OSError):
        return None


def _groups(root: Path) -> list[int]:
    """What is left of the limit of each control group that this process is in, the outer ones included."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left: list[int] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            mount, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = mount / name.strip("/")
        # A container may see its own group as the mount's root and still hear its name from outside.
        folders = {mount, inner, *(parent for parent in inner.parents if parent.is_relative_to(mount))}
        left += [rest for folder in folders if (rest := _left(folder, *files)) is not None]
    return left


def _left(folder: Path, limit_file: str, usage_file: str, cache_entry: str) -> int | None:
    """The limit less what is in use; pages of files that nobody looked at lately are given back when they are needed."""
    try:
        limit = int((folder / limit_file).read_text(encoding="ascii"))  # "max" where there is none
        usage = int((folder / usage_file).read_text(encoding="ascii"))
        if limit >= 2**60:  # how the first version of control groups writes that there is none
            return None
        entries = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - usage + sum(int(entry[1]) for entry in entries if entry[:1] == [cache_entry])
    except (OSError, ValueError, IndexError):
        return None
