"""The page about choosing a method: the rules of `prefopt advise` as tables, and what it reads off data."""

import ast
import inspect
from itertools import pairwise
from types import ModuleType

from prefopt.methods.table import METHODS
from prefopt.pipeline.advise import alike, choices, gauge, signs
from prefopt.pipeline.advise.rules import RULES, TOPICS, Topic

ABOUT = """# Choosing a method, and its settings

```
prefopt advise pairs.jsonl
prefopt advise pairs.jsonl --model MODEL --memory 24GB --write run.yaml
prefopt train --config run.yaml
```

`prefopt advise` looks at data and says which method, which β, which learning rate, how many epochs, all weights or an adapter, and why:
each sentence with the figure that it rests on. It reads everything that `prefopt train` reads ([data.md](data.md)). What it
cannot see you can say: `--have checker` (a program tells right answers from wrong), `--have reward-model`, `--have shaped-rewards`.
`--json` prints the same for programs; in Python it is

```text
advice = prefopt.advise("pairs.jsonl", model="MODEL")
advice.method, advice.config, advice.facts.agreement.share
```
"""

TITLES: dict[Topic, tuple[str, str]] = {
    "method": (
        "Which method",
        (
            "The first row that holds decides. Where its methods are not in prefopt yet that is said, and the next row that holds says "
            "what to do until they are; rows below the one that decides are named too."
        ),
    ),
    "before": ("What comes first", "Every row that holds."),
    "weights": ("All weights, or an adapter", "The first row that holds, of a model that was given; `prefopt plan` says what fits."),
    "settings": ("Settings that follow from the data", "Every row that holds."),
    "data": ("What to do with the data", "Every row that holds."),
}

LOOKS: tuple[tuple[str, str], ...] = (
    ("kinds", "as what the rows serve: pairs, rankings, thumbs, demonstrations, or prompts that nobody has answered; how many of each"),
    ("faults", "rows that cannot be used, by reason: blank answers, two answers that are the same, broken JSON; ties, which are no pair"),
    (
        "lengths",
        ("prompts and answers in characters, with `--model` in its tokens; what a shared prompt saves; how often the longer wins"),
    ),
    (
        "verdicts",
        (
            "how often two verdicts on the same answers agree: votes within a row, or rows that judge the same answers again; a row that "
            "is the same in every column is a copy, and no second verdict"
        ),
    ),
    (
        "copies",
        (
            "examples that repeat an earlier one or are near copies of one; prompts likewise; held-out examples whose opening has a near "
            "copy on the other side"
        ),
    ),
    (
        "texts",
        "scripts; final answers (`####`, `\\boxed{}`), code, tests, names of constraints, right answers in a column; lost characters",
    ),
    (
        "the model",
        ("its size, its chat template, what of its training fits; what a token of good and of bad answers costs it, and one of its own"),
    ),
)

HOW = """**How many verdicts are wrong** follows from how often two agree, *a*, if each is wrong as often as every other, ε, and by itself:
a = (1 − ε)² + ε². What everybody gets wrong alike it cannot see.

**Near copies** are texts that share four fifths of their runs of five words (eight characters in scripts without spaces), found by
MinHash, without comparing each with each.

**Large files** are read as a stream: every row is read and counted, and of the texts a sample is kept (`--sample`), drawn by prompt, so
that all that was said of a prompt is in it or nothing. Copies among different prompts are then undercounted; the page says how many
examples it saw.

**What it does not know.** A script is no language: Latin may be English or Vietnamese. Whether answers are true, safe or well written
it does not judge, and it generates nothing. A code answer is known by its looks. That a model had SFT is concluded from a chat template
and from what the answers cost it. Rules are rules of thumb: try a neighbour, on held-out pairs (`prefopt sweep`).
"""


def choosing_page() -> str:
    """All of it, in Markdown."""
    parts = [ABOUT]
    for topic in TOPICS:
        title, words = TITLES[topic]
        parts += [f"## {title}\n\n{words}\n", rules_table(topic)]
    parts += [
        "## What it looks at\n",
        looks_table(),
        HOW,
        "## β and learning rates\n",
        RATES,
        rates_table(),
        "## Thresholds\n",
        thresholds_table(),
    ]
    return "\n".join(parts)


RATES = """What is advised is the method's own: its default β, and its usual rate for all weights or an adapter, more for a model below 1e9
parameters, as a run takes it. Begin there, and compare with a third and three times that β (`prefopt sweep`, whose command is printed).
"""


def looks_table() -> str:
    """What is read off data and model."""
    return "\n".join(["| what | how |", "|---|---|", *(f"| {what} | {how} |" for what, how in LOOKS), ""])


def rules_table(topic: Topic) -> str:
    """The rules of a topic, in their order."""
    lines = ["| where | do | because | from |", "|---|---|---|---|"]
    for rule in RULES:
        if rule.topic == topic:
            because = rule.reason[:1].upper() + rule.reason[1:]
            lines.append(f"| {rule.when} | {rule.advice} | {because} | {rule.said_by} |")
    return "\n".join([*lines, ""])


def rates_table() -> str:
    """What each method begins with."""
    lines = ["| method | β | usual | all weights | adapter |", "|---|---|---|---|---|"]
    for row in METHODS:
        method = row.load()
        beta = method.settings_class.model_fields.get("beta")
        least, most = method.usual.get("beta", (0.0, 0.0))
        of_beta = f"{beta.default:g} | {least:g} to {most:g}" if beta is not None else "none | none"
        lines.append(f"| [{row.name}](methods/{row.name}.md) | {of_beta} | {method.rates.full:g} | {method.rates.adapter:g} |")
    return "\n".join([*lines, ""])


def thresholds_table() -> str:
    """Every number that a rule compares with, and its reason."""
    lines = ["| | | why |", "|---|---|---|"]
    for module in (signs, gauge, choices, alike):
        for name, reason in constants_of(module):
            value = getattr(module, name)
            lines.append(f"| {name.lower().replace('_', ' ')} | {value:g} | {reason} |")
    return "\n".join([*lines, ""])


def constants_of(module: ModuleType) -> list[tuple[str, str]]:
    """The numbers of a module that have a sentence below them, each with it."""
    found = []
    body = ast.parse(inspect.getsource(module)).body
    for one, after in pairwise(body):
        if not (isinstance(one, ast.Assign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
            continue
        (target,) = one.targets
        if isinstance(target, ast.Name) and isinstance(getattr(module, target.id), int | float):
            found.append((target.id, " ".join(str(after.value.value).split())))
    return found
