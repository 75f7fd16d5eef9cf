"""How much memory there is, as the system and its limits tell."""

from pathlib import Path

import pytest
import torch

from prefopt.training.memory.available import available_memory

CPU = torch.device("cpu")


def machine(root: Path, cgroup: str, files: dict[str, str], available_kb: int = 8_000_000) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   {available_kb} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


STAT = "anon 5\nfile 7\ninactive_file 100000000\ntotal_inactive_file 200000000\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 8_192_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/b/memory.current": "5\n", "a/b/memory.stat": STAT}, 8_192_000_000),
        ("0::/a/b\n", {"a/memory.max": "4000000000", "a/memory.current": "1000000000", "a/memory.stat": STAT}, 3_100_000_000),
        (
            "9:cpu:/\n4:memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": "4000000000",
                "memory/job/memory.usage_in_bytes": "1000000000",
                "memory/job/memory.stat": STAT,
            },
            3_200_000_000,
        ),
        (  # a container that hears its name from outside and sees itself as the root
            "4:memory:/docker/123\n",
            {"memory/memory.limit_in_bytes": "2000000000", "memory/memory.usage_in_bytes": "500000000", "memory/memory.stat": "\n"},
            1_500_000_000,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"}, 8_192_000_000),
    ],
)
def test_available_is_what_the_machine_has_or_what_its_limit_leaves(tmp_path: Path, cgroup: str, files: dict[str, str], expected: int):
    root = machine(tmp_path, cgroup, files)
    found = available_memory(CPU, local_count=1, root=root)
    assert found is not None
    assert found.num_bytes == expected
    assert ("cgroup" in found.where) == (expected != 8_192_000_000)
    shared = available_memory(CPU, local_count=2, root=root)
    assert shared is not None
    assert shared.num_bytes == expected // 2
    assert "for each of its 2 processes" in shared.where


def test_a_machine_that_does_not_tell_is_not_asked_again(tmp_path: Path):
    assert available_memory(CPU, root=tmp_path) is None
