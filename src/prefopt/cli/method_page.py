"""The page about a method, made of its file's docstring, its declarations and its settings: for the terminal and for the docs."""

import re
from collections.abc import Mapping
from importlib import import_module
from textwrap import dedent

from pydantic.fields import FieldInfo

from prefopt.cli.train_method import own_panel
from prefopt.cli.words import default_of, type_of
from prefopt.config import readings
from prefopt.methods.method import Method
from prefopt.methods.pair_method import PairMethod
from prefopt.methods.table import METHODS, MethodRow

LEARNS_FROM: Mapping[str, str] = {
    "demonstration": "demonstrations",
    "pair": "pairs",
    "thumbs": "thumbs",
    "ranked": "rankings",
}

DATA: Mapping[str, str] = {
    "demonstration": "demonstrations: a prompt and the answer to learn",
    "pair": "pairs: a prompt, the chosen answer and the rejected one",
    "thumbs": "thumbs: a prompt and an answer with a thumb up or down; pairs serve too",
    "ranked": "rankings: a prompt and several answers in their order",
}

ELSEWHERE = {
    "dpo": "[What DPO is](../dpo.md) derives it, and says where practice departs.",
    "reward": "[Reward models](../reward-models.md) says how to train and use one, and what goes wrong.",
}
"""Method -> a sentence with a link to a page that people wrote about it."""


def page_of(row: MethodRow, *, in_docs: bool = True) -> str:
    """The page about a method, in Markdown.

    Args:
        row: of the table.
        in_docs: with links to the other pages.
    """
    method = row.load()
    docstring = import_module(row.module).__doc__ or ""
    body = dedent(docstring.partition("\n")[2]).split("\nShapes:")[0].strip("\n")
    body = re.sub(r"^(When to use it|What to watch|Deviations[^:\n]*):", r"\n**\1:**", body, flags=re.MULTILINE)
    body = re.sub(r"arXiv (\d{4}\.\d{5})", lambda found: f"[{found[1]}]({arxiv(found[1])})", body)
    parts = [f"# {row.name}\n", f"{row.summary}\n", body + "\n", facts(method)]
    if in_docs and row.name in ELSEWHERE:
        parts.insert(3, ELSEWHERE[row.name] + "\n")
    fields = own_panel(method).fields
    parts += ["## Settings of its own\n", settings_table(fields) if fields else "None.\n"]
    if in_docs:
        parts.append(
            "The others are in [settings.md](../settings.md), losses of other trainers in [coming-from.md](../coming-from.md#losses).\n"
        )
    return "\n".join(parts)


def facts(method: type[Method]) -> str:
    """What it needs and what it begins with, as a list."""
    kinds = [DATA[method.needs.completions]]
    kinds += [f"with `{setting}` {DATA[kind]}" for setting, kind in readings(method.settings_class).items()]
    rates = f"{method.rates.full:g}, for an adapter {method.rates.adapter:g}; more for a model below 1e9 parameters"
    lines = [
        f"- **Command**: `prefopt train {method.name}`",
        f"- **Data**: {'; '.join(kinds)}",
        f"- **Reference**: {'yes' if method.needs.reference else 'none: one model in memory, and no pass before training'}",
        f"- **Learning rate** where none is given: {rates}",
    ]
    if method.needs.model == "reward":
        lines.insert(
            1, "- **Trains**: a reward model, saved as a sequence-classification model; every other method trains a language model"
        )
    if method.usual:
        ranges = (f"`{name}` {least:g} to {most:g}" for name, (least, most) in method.usual.items())
        lines.append(f"- **Usual values**: {', '.join(ranges)}")
    if issubclass(method, PairMethod):
        lines.append(f"- **In a mix** with other losses on pairs: `--mix {method.name}=0.5`")
    return "\n".join([*lines, ""])


def learns_from(method: type[Method]) -> str:
    """The shapes of data that it reads, in a word or two; rankings aside, which every method on pairs can read."""
    words = LEARNS_FROM[method.needs.completions]
    others = {LEARNS_FROM[kind] for kind in readings(method.settings_class).values() if kind != "ranked"}
    return " or ".join([words, *sorted(others)])


def index_page() -> str:
    """The list of all methods, in Markdown."""
    lines = ["# Methods\n", "What each method learns from, and its idea; `prefopt methods` prints the same.\n"]
    lines += ["| method | learns from | reference | paper | what it does |", "|---|---|---|---|---|"]
    for row in METHODS:
        method = row.load()
        paper = f"[{method.paper}]({arxiv(method.paper)})" if method.paper else ""
        reference = "yes" if method.needs.reference else "no"
        cells = (f"[{row.name}]({row.name}.md)", learns_from(method), reference, paper, row.summary)
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join([*lines, ""])


def arxiv(number: str) -> str:
    """Where a paper is."""
    return f"https://arxiv.org/abs/{number}"


def settings_table(fields: Mapping[str, FieldInfo]) -> str:
    """The settings as a table."""
    lines = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    for name, info in fields.items():
        default = "required" if info.is_required() else f"`{default_of(info)}`" if default_of(info) else ""
        lines.append(f"| `{name}` | {type_of(info)} | {default} | {info.description} |".replace("|  |", "| |"))
    return "\n".join([*lines, ""])
