"""What was found, as Markdown."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from statistics import mean, stdev
from typing import Any

import torch
from bench.methods.book import Line
from bench.methods.choice import MOST_KL, Entry
from bench.methods.frontier import best_at

COLUMNS = {
    "true_reward": ("true reward", ".3f"),
    "best": ("best at this KL", ".3f"),
    "kl": ("KL, nats", ".2f"),
    "accuracy": ("accuracy", ".2f"),
    "tokens": ("tokens", ".0f"),
    "ended": ("ended", ".2f"),
    "steps": ("steps", ".0f"),
    "cpu_seconds": ("CPU s", ".0f"),
}
"""Figure -> what stands above it, and how it is written."""

ABOUT = f"""
Means over the seeds, ± the standard deviation between them; rows by true reward. A world of its own (the trials' seed) chose each
method's settings along one axis: of those with a KL of at most {MOST_KL:g} nats the highest true reward. Methods so end at different KLs,
and more KL buys more reward: "best at this KL" is what the best policy at that distance from the SFT model would have (its samples weighed
by e^(t·reward)). All trials stand below. All runs of a seed have as many steps; thumbs are the pairs' answers one by one, rankings have
four answers each, and SFT sees the chosen ones alone. CPU s: of the processor, all of a run from an empty cache, its tokens and its
reference included (by the clock it is as much on an idle core; FILE.jsonl has that too). Accuracy: share of held-out pairs, as they are
labelled, that the log-ratio to the SFT model ranks right (of the reward model: its score).
"""


def page(entries: Sequence[Entry], worlds: Sequence[Line], failed: Sequence[Line], seeds: Sequence[int], *, title: str = "") -> str:
    """All tables."""
    where = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}, torch {torch.__version__}"
    used = sorted((world for world in worlds if world["seed"] in set(seeds)), key=lambda world: world["seed"])
    parts = [
        f"{where}; `python -m bench.methods`",
        *([title] if title else []),
        ABOUT.strip(),
        "\n".join(main_table(entries, used, seeds)),
        "\n".join(trials_table(entries)),
        "\n".join(worlds_table(worlds)),
    ]
    if failed:
        parts.append(
            "Failed:\n\n"
            + "\n".join(f"- {line['name']}, seed {line['seed']}, {said(line['settings'])}: {line['failed']}" for line in failed)
        )
    return "\n\n".join(parts) + "\n"


def main_table(entries: Sequence[Entry], worlds: Sequence[Line], seeds: Sequence[int]) -> Iterator[str]:
    """A row for each contender."""
    heads = ["method", "settings", *(head for head, _ in COLUMNS.values()), "remarks"]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    yield row("(the SFT model)", "", [{"kl": 0.0} | world for world in worlds], "")
    rewards = {world["seed"]: world["rewards"] for world in worlds}
    for entry in entries:
        runs = [run | ({"best": best_at(rewards[run["seed"]], run["kl"])} if "kl" in run else {}) for run in entry.runs]
        yield row(entry.name, said(entry.settings), runs, "; ".join(remarks(entry, seeds)))


def remarks(entry: Entry, seeds: Sequence[int]) -> Iterator[str]:
    """What to know of a row."""
    if far := sum(run.get("kl", 0.0) > MOST_KL for run in entry.runs):
        yield f"KL above {MOST_KL:g} in {far} of {len(entry.runs)}"
    if entry.edge:
        yield f"{entry.contender.axis.replace('_', ' ')}: {entry.edge} of those tried"
    if (tried := len(entry.trials)) < len(entry.contender.values):
        yield f"{tried} of {len(entry.contender.values)} trials"
    if len(entry.runs) < len(seeds):
        yield f"{len(entry.runs)} of {len(seeds)} seeds"


def row(name: str, settings: str, runs: Sequence[Mapping[str, Any]], remark: str) -> str:
    """Means of runs, and what they differ by."""

    def cell(figure: str, form: str) -> str:
        values = [run[figure] for run in runs if figure in run]
        if not values:
            return ""
        return format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")

    cells = [name, settings, *(cell(figure, form) for figure, (_, form) in COLUMNS.items()), remark]
    return "| " + " | ".join(cells) + " |"


def trials_table(entries: Sequence[Entry]) -> Iterator[str]:
    """All trials: value, true reward and KL, those with the chosen settings in bold."""
    most = max((len(entry.trials) for entry in entries), default=0)
    yield "| method | varied |" + " |" * most
    yield "|---|---|" + "---|" * most
    for entry in entries:
        axis = entry.contender.axis
        cells = []
        for trial in entry.trials:
            found = f"{trial['true_reward']:.3f} at {trial['kl']:.1f}" if "kl" in trial else f"accuracy {trial['accuracy']:.2f}"
            cell = f"{trial['settings'][axis]:g}: {found}"
            cells.append(f"**{cell}**" if trial is entry.chosen else cell)
        cells += [""] * (most - len(cells))
        yield f"| {entry.name} | {axis.replace('_', ' ')} | " + " | ".join(cells) + " |"


def worlds_table(worlds: Sequence[Line]) -> Iterator[str]:
    """What methods were shown."""
    yield "| seed | pairs | labelled right | answers in pairs and as thumbs | chosen answers | rankings | answers in rankings |"
    yield "|---" * 7 + "|"
    for world in sorted(worlds, key=lambda world: world["seed"]):
        answers = world["answers"]
        cells = [f"{world['seed']}", f"{world['pairs']:,}", f"{world['labels_right']:.0%}", f"{answers['pair']:,}"]
        cells += [f"{answers['demonstration']:,}", f"{world['rankings']:,}", f"{answers['ranked']:,}"]
        yield "| " + " | ".join(cells) + " |"


def said(settings: Mapping[str, Any]) -> str:
    """Settings in a cell."""
    return ", ".join(f"{name} {value_of(value)}" for name, value in settings.items())


def value_of(value: Any) -> str:
    """As it is given on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={value_of(own)}" for name, own in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
