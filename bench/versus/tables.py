"""What was measured as a table, on the terminal and as Markdown, and as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

READING = (
    "Medians over the blocks, 10-90 % in brackets. `with reference` adds the reference pass before training to the steps by its share; "
    "`steps` leaves it out. `time` is how many times longer a token takes than with {base}, block by block: 3 means that {base} is three "
    "times as fast. The share of the matrix rate counts the operations that are needed, the same for all: {formula}. "
    "Peak memory is {memory}. The losses are compared with those of {base}, step by step."
)
MEMORY = {"cpu": "the process's (VmHWM)", "cuda": "the allocator's"}


def figures_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """A contestant's column: what each figure is called, and the figure."""
    speeds, start, apart = entry["speed"], entry["start"], entry["loss_difference"]
    known = apart is not None and apart["first"] is not None
    return {
        "pairs/s, with reference": f"{speeds['whole_pairs_per_second']:.3g}",
        "pairs/s, steps": f"{speeds['pairs_per_second']:.3g}",
        "tokens/s, with reference": f"{speeds['whole_tokens_per_second']:,.0f}",
        "time, with reference": bracketed(entry["time_with_reference"]),
        "time, steps": bracketed(entry["time_steps"]),
        "share of matrix rate": f"{speeds['share']:.0%}",
        "peak memory, GB": f"{entry['memory']['peak'] / 1e9:.2f}",
        "before the first step, GB": f"{entry['memory']['before'] / 1e9:.2f}",
        "reference, s": f"{entry['reference_seconds']:.1f}",
        "tokenisation, s": f"{start['tokenise']:.2f}",
        "imports, s": f"{start['import']:.1f}",
        "rest of the start, s": f"{start['start'] - start['import'] - start['tokenise']:.1f}",
        "loss apart, first step": f"{apart['first']:.1e}" if known else "",
        "loss apart, largest": f"{apart['largest']:.1e}" if known else "",
    }


def table_of(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table: a contestant is a column, or, where only tokenisation was measured, a row."""
    entries = found["contestants"]
    if found["what"] == "tokenise":
        rows = [
            [entry["label"], *([bracketed(entry[name]) for name in ("rows_per_second", "time")] if "time" in entry else ["failed", ""])]
            for entry in entries
        ]
        return ["", "rows/s", "time"], rows
    columns = {entry["label"]: figures_of(entry) for entry in entries if "speed" in entry}
    names = next(iter(columns.values()), {})
    rows = [[name, *(columns[entry["label"]][name] if entry["label"] in columns else "failed" for entry in entries)] for name in names]
    return ["", *(entry["label"] for entry in entries)], rows


def bracketed(values: Mapping[str, float]) -> str:
    """A median with its range."""
    return f"{values['median']:.3g} ({values['low']:.3g}-{values['high']:.3g})"


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What is to be said beside the table."""
    own = found["machine"]
    where = f"{own['device']}, {own['processor']}, {own['cores']} cores, {own['threads']} threads, {own['memory_gb']:.0f} GB"
    lines = [f"{found['date']}, {where}; " + ", ".join(f"{name} {value}" for name, value in found["versions"].items())]
    lines += [of_workload(name, account) for name, account in found["workloads"].items()]
    lines += [of_plan(found["plan"], found["what"])]
    if rate := found.get("matrix_rate"):
        low, middle, high = (rate[name] / 1e9 for name in ("low", "median", "high"))
        lines.append(f"matrix rate at these sizes: {middle:,.0f} GFLOP/s ({low:,.0f}-{high:,.0f})")
    if found.get("search"):
        speeds = [(row["pairs_per_pass"], row["pairs_per_second"]) for row in found["search"]]
        tried = ", ".join(f"{size}: {speed:.3g}" if speed else f"{size}: failed" for size, speed in speeds)
        lines.append(f"trl-best, pairs per pass and pairs/s with reference: {tried}")
    return lines + [line for entry in found["contestants"] for line in of_contestant(entry, found)]


def of_workload(name: str, account: Mapping[str, Any]) -> str:
    """What was read, left out and taken, and how long it is."""
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in account["left_out"].items()) or "none"
    return (
        f"{name}: {account['taken']:,} of {account['rows']:,} rows, left out: {left_out}; tokens of a prompt {account['mean_prompt']:.0f}, "
        f"of a completion {account['mean_completion']:.0f}, longest prompt with completion {account['longest']:,}"
    )


def of_plan(plan: Mapping[str, Any], what: str) -> str:
    """How it was measured."""
    if what == "tokenise":
        return f"{plan['blocks']} rounds over all rows, in turns. prefopt: from the file to the saved cache; TRL: rows that are in memory."
    turns = "one contestant after the other" if plan["apart"] else "in turns"
    checkpointing = {None: "each trainer's default", True: "on", False: "off"}[plan["checkpointing"]]
    trained = f"LoRA of rank {plan['lora_rank']}" if plan["lora_rank"] else "all weights trained"
    return (
        f"{plan['shape']}, {plan['batch_size']} examples per step, {plan['blocks']} blocks of {plan['block_steps']} steps after one that "
        f"warms up, {turns}; {plan['precision']}, checkpointing {checkpointing}, {trained}"
    )


def of_contestant(entry: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is to be said of one contestant."""
    label, base = entry["label"], found["base"]
    lines = [f"{label} failed: {entry['failure']}"] if entry["failure"] else []
    if entry.get("was_warm") is False:
        lines.append(f"{label} was not warm: it computed reference values")
    if tokens := entry.get("tokens"):
        lines.append(f"{label}: {of_tokens(tokens)}")
    peaks = {other["label"]: other["memory"]["peak"] for other in found["contestants"] if "speed" in other}
    if label in peaks and label.startswith("trl") and base.startswith("prefopt"):
        times, share = bracketed(entry["time_with_reference"]), peaks[base] / peaks[label]
        lines.append(f"{base} is {times} times as fast as {label} with reference, {bracketed(entry['time_steps'])} in the steps alone")
        lines.append(f"{base} takes {share:.2f} of the memory of {label}")
    if label == "prefopt-again" and "speed" in entry:
        lines.append(f"noise: the same process twice takes {bracketed(entry['time_steps'])} times its own time; less than that is nothing")
    return lines


def of_tokens(tokens: Mapping[str, Any]) -> str:
    """Whether the ids are prefopt's."""
    if tokens["different"] is None:
        return f"it dropped rows: {tokens['kept']} of {tokens['rows']} are left, so the steps saw other pairs"
    if tokens["different"]:
        row, parts = tokens["first"]["row"] + 1, " and ".join(tokens["first"]["parts"])
        return f"{tokens['different']} of {tokens['rows']} rows have other tokens, the first is row {row} in {parts}"
    return f"the same tokens in all {tokens['rows']} rows"


def show(found: Mapping[str, Any], console: Console) -> None:
    """The table on the terminal."""
    heads, rows = table_of(found)
    table = Table()
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in remarks(found):
        console.print(line, markup=False, highlight=False)


def as_markdown(found: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    heads, rows = table_of(found)
    lines = [f"# {found['name']}", "", f"    {found['command']}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {' '.join(line.split(chr(10)))}" for line in remarks(found))]
    if found["what"] == "training":
        lines += ["", READING.format(base=found["base"], memory=MEMORY[found["plan"]["device"]], formula=found["formula"])]
    return "\n".join(lines) + "\n"


def write(found: Mapping[str, Any], out: Path, *, hidden: Sequence[str]) -> None:
    """JSON, and the table beside it.

    Args:
        found: what was measured.
        out: the JSON file.
        hidden: folders of this machine, which the files do not name.
    """
    for file, text in ((out, json.dumps(found, indent=1, ensure_ascii=False) + "\n"), (out.with_suffix(".md"), as_markdown(found))):
        shown = text
        for folder in hidden:
            shown = shown.replace(folder, "...")
        file.write_text(shown, encoding="utf-8")
