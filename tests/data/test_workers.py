"""Processes that tokenize end with the one that started them, whatever ends it, and a Ctrl-C does not wait for them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from prefopt.data.workers import deaf_to_interrupts, in_processes


@dataclass
class Answer:
    """Stands for a tree that was grown."""

    tree: Any


@dataclass
class Reports:
    """In place of a grower: says of each example what its process is like."""

    def grow(self, examples: Sequence[int]) -> list[Answer]:
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return [Answer((example, os.getpid(), os.environ["TOKENIZERS_PARALLELISM"], blocked)) for example in examples]


@dataclass
class Sleeps:
    """In place of a grower: takes much too long."""

    def grow(self, examples: Sequence[int]) -> list[Answer]:
        time.sleep(120)
        return [Answer(example) for example in examples]


def start(grower: Any, examples: list[int]) -> Iterator[list[Any]]:
    batches = (examples[first : first + 3] for first in range(0, len(examples), 3))
    return in_processes(grower, batches, 2)  # type: ignore[arg-type]


def test_all_is_done_in_order_by_other_processes():
    found = [answer.tree for part in start(Reports(), list(range(20))) for answer in part]
    assert [example for example, *_ in found] == list(range(20))
    assert os.getpid() not in {process for _, process, *_ in found}
    assert {parallelism for _, _, parallelism, _ in found} == {"false"}
    assert all(blocked for *_, blocked in found), "a terminal's Ctrl-C would reach them, and each would say so in a traceback"
    assert multiprocessing.active_children() == []


def test_a_ctrl_c_ends_them_at_once():
    began = time.monotonic()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        list(start(Sleeps(), list(range(20))))
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []


def test_whoever_loses_interest_ends_them_too():
    began = time.monotonic()
    parts = start(Reports(), list(range(20)))
    next(parts)
    parts.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []


def test_an_interrupt_is_put_off_and_not_lost():
    done = False
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with deaf_to_interrupts():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # another thread would let it through
            time.sleep(0.05)
            done = True
        time.sleep(5)
    assert done
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
