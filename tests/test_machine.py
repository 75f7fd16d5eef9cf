"""What the libraries are told before they work: memory does not grow with every new length of a row."""

import logging
import os
import subprocess
import sys

import pytest

from prefopt.cli.entry import main
from prefopt.machine import ENVIRONMENT, keep_freed_memory, prepare_environment

PRODUCTS = """
import torch
from prefopt.machine import prepare_environment
prepare_environment()

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3

weight = torch.randn(256, 128, dtype=torch.bfloat16, requires_grad=True)
before = resident()
for length in range(300, 700):
    (torch.randn(length, 128, dtype=torch.bfloat16, requires_grad=True) @ weight.T).sum().backward()
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_bf16_products_of_many_lengths_take_no_memory_for_good():
    """As the libraries come it is 2 MB for every length, 0.9 GB here; a processor without bf16 products takes less either way."""
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 400


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    prepare_environment()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "32")


def test_the_command_line_sets_it_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert main(["--version"]) == 0
    assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT


FAULTS = """
import resource, torch
from prefopt.machine import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(12_000_000)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times

print(faults(10), keep_freed_memory(), faults(20) and faults(20))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_a_step_has_freed_is_not_cleared_again_by_the_system():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    before, told, after = done.stdout.split()
    if told == "False":
        pytest.skip("another C library")
    assert float(before) > 20  # of 2 MB at the most
    assert float(after) < 0.2 * float(before)


def test_what_the_environment_says_of_malloc_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not keep_freed_memory()


def test_a_kernel_that_nothing_uses_is_not_missed_on_the_terminal():
    prepare_environment()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
