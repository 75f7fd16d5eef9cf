"""The bars of a GPU, each with what was measured of it or "not measured"."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

NOT_MEASURED = "not measured"

Records = Mapping[str, Mapping[str, Any]]
"""What the steps gave, by the step's name: the last line of each in gpu.jsonl."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of the table.

    Attributes:
        what: is measured.
        bar: that is set; `reported` where none is.
        read: finds it among the records: the text, and whether the bar is met (None: there is none); None where no record has it.
        step: that measures it.
    """

    what: str
    bar: str
    step: str
    read: Callable[[Mapping[str, Any]], tuple[str, bool | None] | None]


def entry(found: Mapping[str, Any], label: str) -> Mapping[str, Any] | None:
    """A contestant of bench.versus that has run to the end."""
    return next((own for own in found["contestants"] if own["label"] == label and "speed" in own), None)


def times_faster(label: str, least: float | None) -> Callable[[Mapping[str, Any]], tuple[str, bool | None] | None]:
    """How many times as fast prefopt is as that contestant, the reference counted in."""

    def read(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
        own, base = entry(found, label), entry(found, "prefopt")
        if own is None or base is None:
            return None
        times = own["time_with_reference"]
        speeds = f"{base['speed']['whole_pairs_per_second']:.3g} against {own['speed']['whole_pairs_per_second']:.3g} pairs/s"
        met = None if least is None else times["median"] >= least
        return f"{times['median']:.2f}x ({times['low']:.2f}-{times['high']:.2f}), {len(own['blocks'])} blocks; {speeds}{noise(found)}", met

    return read


def noise(found: Mapping[str, Any]) -> str:
    """What prefopt takes against itself, where that ran too."""
    again = next((own for own in found["contestants"] if own["label"].startswith("prefopt-again") and "speed" in own), None)
    if again is None:
        return ""
    times = again["time_steps"]
    return f"; A/A {times['median']:.3f} ({times['low']:.3f}-{times['high']:.3f})"


def no_slower(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    """The time of a step against that without sharing: at most 3 % and what prefopt takes against itself."""
    plain, again, base = (entry(found, label) for label in ("prefopt-plain", "prefopt-again", "prefopt"))
    if plain is None or again is None or base is None:
        return None
    took = 1 / plain["time_steps"]["median"]
    return f"{took:.3f} of its time{noise(found)}", took <= 1.03 + abs(again["time_steps"]["median"] - 1)


def less_with_sharing(least: float) -> Callable[[Mapping[str, Any]], tuple[str, bool | None] | None]:
    """How many times as fast as without sharing, and in what memory."""

    def read(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
        plain, base = entry(found, "prefopt-plain"), entry(found, "prefopt")
        told = times_faster("prefopt-plain", least)(found)
        if told is None or plain is None or base is None:
            return None
        memory = base["memory"]["peak"] / max(1, plain["memory"]["peak"])
        return f"{told[0]}; {memory:.2f} of its memory", told[1]

    return read


def per_token(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    """Time per token, the prompt counted once, of 4 and 8 completions of a prompt against 2."""
    owns = [entry(found, f"prefopt@k{count}") for count in (2, 4, 8)]
    if any(own is None for own in owns):
        return None
    two, four, eight = (median(block["seconds"] / block["tokens"] for block in own["blocks"]) for own in owns if own is not None)
    text = f"{four / two:.3f} with 4, {eight / two:.3f} with 8 completions{noise(found)}"
    return text, max(four, eight) <= 1.1 * two


def predicted(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    """Predicted by measured, of each run that was planned."""
    ratios = {f"{row['way']} {what}": row[what][0] / row[what][1] for row in found.values() for what in ("memory", "step")}
    text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return text, all(abs(ratio - 1) <= 0.15 for ratio in ratios.values())


def matrix_share(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    base = entry(found, "prefopt")
    return None if base is None else (f"{base['speed']['share']:.0%}", base["speed"]["share"] >= 0.45)


def peak_below(gigabytes: float) -> Callable[[Mapping[str, Any]], tuple[str, bool | None] | None]:
    def read(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
        base = entry(found, "prefopt")
        if base is None:
            return None
        peak = base["memory"]["peak"] / 1e9
        return f"{peak:.1f} GB allocated", peak < gigabytes

    return read


def with_setting(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    """prefopt against itself with a setting, which `prefopt-again` has."""
    base, own = entry(found, "prefopt"), entry(found, "prefopt-again")
    if base is None or own is None:
        return None
    peaks = [each["memory"]["peak"] / 1e9 for each in (base, own)]
    apart = own["loss_difference"]["largest"]
    return f"{own['time_steps']['median']:.2f}x the time, {peaks[0]:.1f} -> {peaks[1]:.1f} GB, losses within {apart:.0e}", None


def tests(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    counts = found["tests"]
    if not counts["passed"] and not counts["failed"]:
        return None
    return f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", counts["failed"] == 0


def heads(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    """Each head's time against ours at the last size that both finished."""
    rows = [row for row in found["rows"] if "failure" not in row]
    ours = {tuple(row["size"]): row for row in rows if row["name"] == "ours"}
    said = []
    for name in ("liger", "cce", "torch", "plain"):
        own = [row for row in rows if row["name"] == name and tuple(row["size"]) in ours]
        if own:
            last = own[-1]
            base = ours[tuple(last["size"])]
            time, memory = median(last["seconds"]) / median(base["seconds"]), last["peak"] / max(1, base["peak"])
            said.append(f"{name} {time:.2f}x the time, {memory:.2f}x the memory at N, V, D = {', '.join(map(str, last['size']))}")
    return ("; ".join(said), None) if said else None


def compiled(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    times, apart = found["time_against_as_it_is"], found["largest_loss_difference"]
    text = f"{times['median']:.2f}x the time of a step, first step {found['first_step']['compiled']:.0f} s, losses within {apart:.0e}"
    return text, None


def rates(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    return f"{found['bf16_flops'] / 1e12:,.0f} TFLOP/s bf16, copies {found['copy_bytes'] / 1e12:.2f} TB/s", None


def passes(found: Mapping[str, Any]) -> tuple[str, bool | None] | None:
    tried = [f"{row['pairs_per_pass']}: {row['pairs_per_second']:.3g}" for row in found["search"] if row["pairs_per_second"]]
    return (f"pairs/s by pairs per pass: {', '.join(tried)}", None) if tried else None


BARS: Sequence[Bar] = (
    Bar("rates of the machine", "reported", "facts", rates),
    Bar("GPU against CPU: attention, architectures, losses, going on to the bit", "all pass", "correct", tests),
    Bar("the same for soft-caps and sinks (FlexAttention)", "all pass", "correct-flex", tests),
    Bar("the same for activations in main memory, 8-bit and bf16 AdamW, 4-bit bases", "all pass", "correct-bits", tests),
    Bar("0.5B in full, 64 pairs per step: pairs/s against TRL as it comes", "4.5x", "versus-0.5b", times_faster("trl", 4.5)),
    Bar("0.5B: pairs/s against TRL's best", "2.5x", "versus-0.5b", times_faster("trl-best", 2.5)),
    Bar("1.5B in full, 64 pairs per step: pairs/s against TRL as it comes", "4.5x", "versus-1.5b", times_faster("trl", 4.5)),
    Bar("1.5B: pairs/s against TRL's best", "2.5x", "versus-1.5b", times_faster("trl-best", 2.5)),
    Bar("1.5B: share of the measured bf16 rate", "45 %", "versus-1.5b", matrix_share),
    Bar("8B, LoRA of rank 16, 16 pairs per step: pairs/s against TRL as it comes", "reported", "versus-8b", times_faster("trl", None)),
    Bar("7B, LoRA of rank 16 on bf16 weights: peak", "below 24 GB", "memory-7b", peak_below(24.0)),
    Bar("7B, LoRA of rank 16 on 4-bit weights: peak", "below 12 GB", "memory-7b-4bit", peak_below(12.0)),
    Bar("`prefopt plan`, 0.5B: predicted / measured", "within 15 %", "plan", predicted),
    Bar("0.5B, prompt of 2,048, completions of 64, against sharing off", "1.8x", "long-prompt", times_faster("prefopt-plain", 1.8)),
    Bar("0.5B, no shared prefix, against sharing off", "3 % and A/A", "no-prefix", no_slower),
    Bar("0.5B, K = 4 and 8 completions against 2: time per token", "within 10 %", "k", per_token),
    Bar("hybrid shape, hh-rlhf lengths, against sharing off", "1.3x", "hybrid", less_with_sharing(1.3)),
    Bar("0.5B, made to fork, against sharing off", "1.3x", "fork", less_with_sharing(1.3)),
    Bar("language-model head against others'", "reported", "head", heads),
    Bar("0.5B, torch.compile of norms and feed-forward parts", "reported", "compile", compiled),
    Bar("0.5B, activations in main memory", "reported", "offload", with_setting),
    Bar("0.5B, AdamW with 8-bit states", "reported", "adamw8bit", with_setting),
    Bar("0.5B, AdamW with bf16 weights", "reported", "adamw-bf16", with_setting),
    Bar("TRL's pairs per pass, 0.5B", "reported", "search-0.5b", passes),
    Bar("TRL's pairs per pass, 1.5B", "reported", "search-1.5b", passes),
    Bar("tests that need no GPU, with that machine's versions", "all pass", "versions", tests),
)


LONGEST_AT = next(place for place, bar in enumerate(BARS) if bar.step == "head")


def longest(records: Records) -> tuple[str, str, str]:
    """The row that two steps measure together."""
    what, bar = "0.5B, longest pair in 24 GB against TRL's", "at least TRL's"
    sides = {side: (records.get(f"longest-{side}") or {}).get("found") for side in ("prefopt", "trl")}
    if not all(sides.values()):
        known = [f"{side} {own['longest']:,} tokens" for side, own in sides.items() if own]
        return what, bar, ", ".join([*known, NOT_MEASURED])
    own, theirs = (sides[side]["longest"] for side in ("prefopt", "trl"))  # type: ignore[index]
    if any((records[f"longest-{side}"].get("device")) == "cpu" for side in sides):
        return what, bar, f"{NOT_MEASURED}; rehearsed: {own:,} against {theirs:,} tokens"
    return what, bar, f"{own:,} against {theirs:,} tokens{verdict(own >= theirs)}"


def verdict(met: bool | None) -> str:
    return "" if met is None else ": met" if met else ": NOT met"


def rows(records: Records) -> list[tuple[str, str, str]]:
    """What is measured, the bar, and what came out."""
    made = []
    for bar in BARS:
        record = records.get(bar.step)
        read = bar.read(record["found"]) if record and record.get("found") else None
        if record and read is not None and record.get("device") == "cpu":
            text = f"{NOT_MEASURED}; rehearsed: {read[0]}"
        elif read is not None:
            text = read[0] + verdict(read[1])
        elif record:
            text = f"{NOT_MEASURED} ({record['outcome']})"
        else:
            text = NOT_MEASURED
        made.append((bar.what, bar.bar, text))
    made.insert(LONGEST_AT, longest(records))
    return made


def table(records: Records, *, title: str, command: str) -> str:
    """Everything as Markdown."""
    lines = [f"# {title}", "", f"    {command}", "", "| what | bar | measured |", "|---|---|---|"]
    lines += [f"| {what} | {bar} | {text} |" for what, bar, text in rows(records)]
    lines += ["", "The bars were set for an H200."]
    if not records:
        lines += ["", "No GPU was available. `bench/gpu.sh` measures every row; bench/README.md says how."]
        return "\n".join(lines) + "\n"
    facts = (records.get("facts") or {}).get("found") or {}
    if facts:
        versions = ", ".join(f"{name} {number}" for name, number in facts["packages"].items() if number)
        where = facts.get("gpu") or f"rehearsed on a CPU with models of a million weights: no measurement ({facts['device']})"
        lines += ["", f"- {facts['time']}, {where}, {facts['cores']} cores; python {facts['python']}, {versions}"]
    ended = [f"- {name}: {own['outcome']} after {own['seconds']:.0f} s" for name, own in records.items() if own["outcome"] != "done"]
    failed = [line for own in records.values() for line in (own.get("found") or {}).get("failures", [])]
    lines += ["", *ended, *(f"- failed: {line}" for line in failed)] if ended or failed else []
    return "\n".join(lines) + "\n"
