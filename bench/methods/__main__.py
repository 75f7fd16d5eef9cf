"""All methods on the quickstart's world.

    python -m bench.methods --out FILE.json [--threads 1]

For each seed a world is made once (reviews, a model from nothing, SFT, pairs of its own samples whose labels are drawn through
Bradley-Terry); then every method trains on the same pairs from the same SFT model, and what it writes about openings that nobody
has seen is scored by the true reward. A method that reads thumbs gets the pairs as thumbs, SFT the chosen answers; rankings are four
samples of each of half as many openings, so that they show as many answers.

What a method is run with is tried out first, on a world of its own (seed 100): of the settings in `contenders.py` those with the
highest true reward at no more than `MOST_KL` nats from the SFT model are kept. What was tried is in the file too. A file that is
there already is gone on with, so the command can be interrupted.

Writes FILE.json, FILE.md (the table) and FILE.svg (the picture).
"""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from bench.methods.contenders import CONTENDERS
from bench.methods.picture import by_reward, picture
from bench.methods.world import World

from prefopt.disk import write_whole
from prefopt.machine import keep_freed_memory, prepare_environment
from prefopt.pipeline.quickstart import Plan

TRIAL_SEED = 100
MOST_KL = 8.0
"""Nats. Beyond it the text breaks: the reward goes on rising and means nothing (docs/results.md)."""


def best_trial(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The highest true reward at no more than `MOST_KL`; where all went further, the one that went least far."""
    near = [trial for trial in trials if trial["kl"] <= MOST_KL]
    return max(near, key=lambda trial: trial["true_reward"]) if near else min(trials, key=lambda trial: trial["kl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="FILE.json; FILE.md and FILE.svg beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-methods"), help="worlds and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, help="of torch; the default is one per core")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    prepare_environment()
    keep_freed_memory()
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {"trials": {}, "runs": {}, "before": {}}
    worlds: dict[int, World] = {}

    def world(seed: int) -> World:
        if seed not in worlds:
            worlds.clear()  # one at a time is held
            worlds[seed] = World.make(given.work / str(seed), Plan(), seed)
            own = worlds[seed]
            if seed != TRIAL_SEED:
                found["before"][str(seed)] = own.figures(own.writer)
        return worlds[seed]

    def done(kind: str, key: str, figures: dict[str, Any]) -> None:
        found[kind][key] = figures
        write_whole(given.out, json.dumps(found, indent=1) + "\n")
        said = ", ".join(f"{name} {value:.3g}" for name, value in figures.items() if isinstance(value, float))
        print(f"{kind[:-1]} {key}: {said}", flush=True)

    for name in given.only:
        for number, settings in enumerate(CONTENDERS[name].trials):
            if (key := f"{name}/{number}") not in found["trials"] and len(CONTENDERS[name].trials) > 1:
                done("trials", key, {"settings": dict(settings)} | world(TRIAL_SEED).run(name, CONTENDERS[name], settings))
    for seed in given.seeds:
        for name in given.only:
            if (key := f"{name}/{seed}") not in found["runs"]:
                tried = [trial for other, trial in found["trials"].items() if other.split("/")[0] == name]
                settings = best_trial(tried)["settings"] if tried else CONTENDERS[name].trials[0]
                done("runs", key, {"settings": dict(settings)} | world(seed).run(name, CONTENDERS[name], settings))
    given.out.with_suffix(".md").write_text(table(found), encoding="utf-8")
    given.out.with_suffix(".svg").write_text(picture(found), encoding="utf-8")


def table(found: Mapping[str, Any]) -> str:
    """All methods, as Markdown: means over the seeds with the spread between them (standard deviation)."""
    where = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}, torch {torch.__version__}"
    lines = [
        f"{where}; `python -m bench.methods`",
        "",
        "| method | settings | true reward | KL, nats | accuracy | tokens | ended | seconds |",
        "|---|---|---|---|---|---|---|---|",
        line("(SFT)", "", list(found["before"].values())),
    ]
    for name, own in by_reward(found["runs"]).items():
        settings = ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in own[0]["settings"].items()
        )
        lines.append(line(name, settings, own))
    return "\n".join(lines) + "\n"


def line(name: str, settings: str, runs: list[dict[str, Any]]) -> str:
    """A row of the table."""

    def cell(key: str, form: str) -> str:
        values = [each[key] for each in runs if key in each]
        if not values:
            return ""
        return format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")

    cells = [cell(key, form) for key, form in COLUMNS.items()]
    return f"| {name} | {settings} | " + " | ".join(cells) + " |"


COLUMNS = {"true_reward": ".3f", "kl": ".2f", "accuracy": ".2f", "tokens": ".0f", "ended": ".2f", "seconds": ".0f"}


if __name__ == "__main__":
    main()
