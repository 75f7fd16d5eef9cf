"""The page about choosing a method: the rules of `prefopt advise` as tables, and what it reads off data."""

from prefopt.methods.table import METHODS
from prefopt.pipeline.advise.rules import RULES, Topic

ABOUT = """# Choosing a method, and its settings

```
prefopt advise pairs.jsonl
prefopt advise pairs.jsonl --model MODEL --memory 24GB --write run.yaml
prefopt train --config run.yaml
```

`prefopt advise` looks at data and says which method, which β, which learning rate, how many epochs, all weights or LoRA, and why: each
sentence with the figure that it rests on. It reads everything that `prefopt train` reads ([data.md](data.md)). What it
cannot see you can say: `--have checker` (a program tells right answers from wrong), `--have reward-model`, `--have shaped-rewards`,
`--have no-judge` (no pairs, and no way to make them). In Python it is

```text
advice = prefopt.advise("pairs.jsonl", model="MODEL")
advice.method, advice.config, advice.facts.agreement.share
```

[recipes/](../recipes/) has a file of settings for each kind of data, with what it gave.
"""

TITLES: dict[Topic, tuple[str, str]] = {
    "warnings": ("What may make the advice wrong", "Every row that holds is said, above the advice."),
    "first": ("What comes first", "Every row that holds is said."),
    "method": (
        "Which method",
        (
            "The first row that holds decides. Where its methods are not in prefopt yet that is said, and the next row that holds says "
            "what to do until they are."
        ),
    ),
    "settings": (
        "Settings that follow from data and model",
        "Every row that holds sets something. What fits is what `prefopt plan` finds.",
    ),
}

HOW = """## What it reads off the data

**How many verdicts are wrong** follows from how often two on the same answers agree, *a*: votes within a row, or rows that judge the same
answers again. If each is wrong as often as every other, ε, and by itself, a = (1 − ε)² + ε². What everybody gets wrong alike it cannot
see. A vote for neither answer is left out and counted: no pair is made of what it says. A row that is the same in every column is a
copy, and no second verdict; one that differs in any column is a verdict of its own, and no copy, even where only a number was changed.
Where no column says who judged, two verdicts that agree are equal rows, as copies are, and only those that disagree are left: then no
rate is told, but what it would be if all of them are verdicts.

**Thumbs** are balanced or not by their weights: the `weight` column, and how often an epoch takes their file.

**Files of several kinds** are read as what says most, if all of them can be. Otherwise the settings are those of two stages: SFT on the
good answers of all files, then the method on those that it reads. Within one file there is one kind: rows of another are left out, and
counted.

**Near copies** are texts that share four fifths of their runs of five words (eight characters in scripts without spaces), found by
MinHash, without comparing each with each. The two answers of a pair are the same but for a few words where they share half.

**A program could check** answers that end in a final one (`####`, `\\boxed{}`, "the answer is"), and rows with tests, names of constraints
or the right answer in a column of their own.

**The model** is asked what a token of 32 good answers costs it (`--ask`), by forward passes; on a CPU only up to 1e9 weights. That it had
SFT is concluded from that and from a chat template.

**Large files** are read as a stream: every row is read and counted, and of the texts a sample is kept (`--sample`), drawn by prompt, so
that all that was said of a prompt is in it or nothing. Copies among different prompts are then undercounted.

**What it does not know.** Whether answers are true, safe or well written it does not judge. Languages in Latin letters are told by their
most frequent words, seven of them; others by their script. Rules are rules of thumb: try a neighbour, on held-out pairs (`prefopt sweep`).

## β and learning rates

What is advised is the method's own: its default β, and its usual rate for all weights or LoRA, more for a model below 1e9 parameters, as a
run takes it. Begin there, and compare with a third and three times that β (`prefopt sweep`, whose command is printed).

Nothing in the data moves β. Wrong verdicts are for `label_smoothing`: at a rate ε the loss of conservative DPO is least where β·Δ is
log((1 − ε) / ε), and β says only how far from the reference that is. How far the model may go is a matter of what it is for; that few or
near-equal pairs ask for another β none of our measurements shows.
"""


def choosing_page() -> str:
    """All of it, in Markdown."""
    tables = [part for topic in TITLES for part in (f"## {TITLES[topic][0]}\n\n{TITLES[topic][1]}\n", rules_table(topic))]
    return "\n".join([ABOUT, *tables, HOW, rates_table()])


def rules_table(topic: Topic) -> str:
    """The rules of a topic, in their order."""
    rows = [f"| {rule.when} | {rule.advice} | {rule.why} | {rule.said_by} |" for rule in RULES[topic]]
    return "\n".join(["| where | do | because | from |", "|---|---|---|---|", *rows, ""])


def rates_table() -> str:
    """What each method begins with."""
    lines = ["| method | β | usual | all weights | LoRA |", "|---|---|---|---|---|"]
    for row in METHODS:
        method = row.load()
        beta = method.settings_class.model_fields.get("beta")
        least, most = method.usual.get("beta", (0.0, 0.0))
        of_beta = f"{beta.default:g} | {least:g} to {most:g}" if beta is not None else "none | none"
        lines.append(f"| [{row.name}](methods/{row.name}.md) | {of_beta} | {method.rates.full:g} | {method.rates.adapter:g} |")
    return "\n".join([*lines, ""])
