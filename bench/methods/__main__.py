"""All methods on the quickstart's world.

    python -m bench.methods --out FILE.jsonl --threads 1
    python -m bench.methods --out FILE.jsonl --threads 1 --share 1/2 &      two processes side by side, each with half
    python -m bench.methods --out FILE.jsonl --threads 1 --share 2/2        of the contenders, add to one file

For each seed a world is made once (reviews, a model from nothing, SFT, pairs of its own samples whose labels are drawn through
Bradley-Terry); then every contender trains from the same SFT model, and what it writes about openings that nobody has seen is scored by
the true reward. All runs of a seed take as many optimizer steps. A step shows 16 pairs, or their 32 answers as thumbs, or 8 rankings of
four answers each, which are other samples of the same model under the same filters, as many in all; SFT sees the pairs' chosen
answers, which are half of them. The table says how many there were.

What a contender is run with is tried out first, on a world of its own (seed 100000): of its settings in `contenders.py` the one with
the highest true reward at no more than `MOST_KL` nats from the SFT model is taken. All trials are in the table and the pictures.

A file that is there already is gone on with, so the command can be interrupted; a run that failed is written down, the others go on, and
the command ends with 1. Writes FILE.jsonl (all figures), FILE.md (the tables), FILE.svg (a row for each contender) and FILE-kl.svg (reward
and KL of all runs). With --share the last process to end writes them whole.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from bench.methods.book import Book, Line
from bench.methods.choice import best_trial, entries, run_line, trial_lines
from bench.methods.contenders import CONTENDERS
from bench.methods.picture import clouds, rows
from bench.methods.tables import page, said
from bench.methods.world import World, ensure
from bench.small_hh import said as saying
from bench.versus.contestants import UsageError

from prefopt.errors import PrefoptError
from prefopt.machine import keep_freed_memory, prepare_environment
from prefopt.pipeline.quickstart import Plan

SEEDS = (0, 1000, 2000)
TRIAL_SEED = 100_000

SIZES = replace(Plan(), dpo_epochs=1.5)
"""The quickstart's but for a quarter of the steps, so that all of it takes some two and a half hours of one core."""

SMALL = Plan(
    num_reviews=1500, num_held_out=30, num_pairs=96, hidden=64, layers=2, vocabulary=800, sft_learning_rate=1e-2, max_new_tokens=60
)
"""Enough to see that everything runs; what comes of it means nothing."""


def main(words: Sequence[str] | None = None) -> None:
    given = parser().parse_args(words)
    if given.threads:
        torch.set_num_threads(given.threads)
    prepare_environment()
    keep_freed_memory()
    bench = Bench(given)
    bench.make_worlds()
    try:
        bench.go()
    finally:
        bench.write()
    if bench.failed():
        sys.exit("some runs failed: the end of the table has the reasons. The same command tries them again.")


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="FILE.jsonl; the tables and pictures beside it")
    made.add_argument("--work", type=Path, default=Path("runs/bench-methods"), help="worlds")
    made.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="a thousand apart, so that no two share a draw")
    made.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    made.add_argument("--share", default="1/1", help="I/N: of the contenders every N-th, from the I-th on")
    made.add_argument("--threads", type=int, help="of torch; the default is one per core")
    made.add_argument("--small", action="store_true", help="a tiny world, to see that everything runs; its figures mean nothing")
    return made


def share_of(text: str) -> tuple[int, int]:
    """The place and the number of parts of `I/N`, the place counted from 0.

    Raises:
        UsageError: it is none.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UsageError(f"--share {text}: must be I/N with I from 1 to N, for example 1/2")
    return int(part) - 1, int(parts)


class Bench:
    """This process's part of the comparison.

    Args:
        given: the flags.

    Raises:
        UsageError: they do not go together, or the file is of worlds of other sizes.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        if any(abs(one - other) < 1000 for one in (*given.seeds, TRIAL_SEED) for other in (*given.seeds, TRIAL_SEED) if one != other):
            raise UsageError(
                f"--seeds must be a thousand apart, from {TRIAL_SEED} too, which is the trials': a world takes what follows its seed"
            )
        self.part, self.parts = share_of(given.share)
        self.given, self.plan, self.book = given, SMALL if given.small else SIZES, Book(given.out)
        self.mine = {name: CONTENDERS[name] for name in given.only[self.part :: self.parts]}
        self.world: World | None = None
        self.is_warm = False
        self.left = sum(len(CONTENDERS[name].values) + len(given.seeds) for name in self.mine)
        if any(line["plan"] != asdict(self.plan) for line in self.book.lines() if line["kind"] == "world"):
            raise UsageError(f"{given.out} is of worlds of other sizes. Give another file as --out.")

    def make_worlds(self) -> None:
        """All of them before the first run, each process beginning with another, so that none waits long."""
        seeds = [TRIAL_SEED, *self.given.seeds]
        first = len(seeds) * self.part // self.parts
        for seed in (*seeds[first:], *seeds[:first]):
            line = {"kind": "world"} | ensure(self.folder(seed), self.plan, seed)
            if self.book.find(line) is None:
                self.book.add(line)

    def folder(self, seed: int) -> Path:
        """Of a world."""
        folder: Path = self.given.work / f"world-{seed}"
        return folder

    def world_of(self, seed: int) -> World:
        """The world; one at a time is held."""
        if self.world is None or self.world.seed != seed:
            self.world = World.of(self.folder(seed), self.plan, seed)
        return self.world

    def go(self) -> None:
        """Trials, then the runs of each seed."""
        for name, own in self.mine.items():
            for line in trial_lines(name, own, TRIAL_SEED):
                self.done(line)
        for seed in self.given.seeds:
            for name, own in self.mine.items():
                tried = [found for line in trial_lines(name, own, TRIAL_SEED) if (found := self.book.find(line))]
                if tried:
                    self.done(run_line(name, own, seed, best_trial(tried, own)["settings"]))

    def done(self, line: Line) -> None:
        """Run it, unless it has been, and write down what came of it."""
        self.left -= 1
        if self.book.find(line) is not None:
            return
        world = self.world_of(line["seed"])
        if not self.is_warm:  # what a process loads and prepares once is paid by none of the runs that count
            world.run(CONTENDERS["dpo"], CONTENDERS["dpo"].trials()[0], num_steps=1)
            self.is_warm = True
        began = time.perf_counter()
        try:
            found = world.run(CONTENDERS[line["name"]], line["settings"])
        except PrefoptError as error:
            found = {"failed": str(error)}
        self.book.add(line | found)
        took = time.perf_counter() - began
        figures = ", ".join(f"{name} {value:.3g}" for name, value in found.items() if isinstance(value, float))
        what = f"{line['kind']} {line['name']} ({said(line['settings'])}), seed {line['seed']}"
        print(f"{what}: {found.get('failed') or figures}; {self.left} left, about {self.left * took / 60:.0f} min", flush=True)

    def failed(self) -> list[Line]:
        """What failed and has not been run since, of the whole file."""
        return [line for line in self.book.lines() if "failed" in line and self.book.find(line) is None]

    def write(self) -> None:
        """Tables and pictures of the whole file."""
        lines = self.book.lines()
        found = entries(lines, CONTENDERS, self.given.seeds)
        if not found:
            return
        worlds = [line for line in lines if line["kind"] == "world"]
        title = (
            f"**A tiny world, to see that everything runs; the figures mean nothing** ({json.dumps(asdict(self.plan))})."
            if self.given.small
            else ""
        )
        out = self.given.out
        out.with_suffix(".md").write_text(page(found, worlds, self.failed(), self.given.seeds, title=title), encoding="utf-8")
        out.with_suffix(".svg").write_text(rows(found, worlds), encoding="utf-8")
        out.with_name(f"{out.stem}-kl.svg").write_text(clouds(found, worlds), encoding="utf-8")


if __name__ == "__main__":
    saying(main)
