"""The advice as a page for the terminal, and as a YAML file with its reasons."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap

from prefopt.config import to_yaml
from prefopt.data.kinds import PLURAL
from prefopt.errors import PrefoptError
from prefopt.pipeline.advise.decide import Decision, Verdict
from prefopt.pipeline.advise.facts import Count, Facts, Model, Spread, counted, percent

WIDTH = 100
"""Columns, where there is no terminal to say."""

INDENT = 14
"""Columns of a line's name."""

MOST_COLUMNS = 8
"""Columns that are named."""

MOST_SOURCES = 3
"""Sources that are named."""

RARE, SOME = 0.01, 0.05
"""Share of letters from which on a language is named, and of examples from which on a way to check them is."""


def page(facts: Facts, decision: Decision, width: int = WIDTH) -> list[str]:
    """What was found, what is advised, and the settings, line by line; headings are the lines that are not indented.

    Args:
        facts: all of them.
        decision: what follows.
        width: columns that a line has at most.
    """
    lines = []
    for source in facts.sources[:MOST_SOURCES]:
        lines += wrapped(f"{source.name}: {counted(source.num_rows, 'rows')}, {source.says}", width, "    ")
    if len(facts.sources) > MOST_SOURCES:
        lines.append(f"and {len(facts.sources) - MOST_SOURCES} more")
    for name, text in about(facts):
        lines += wrapped(f"  {name:<{INDENT - 2}}{text}", width, " " * INDENT)
    lines.append("")
    chosen = decision.method.rule.method
    for verdict in decision.warnings:
        lines += [*wrapped("warning: " + plain(verdict.rule.advice), width, "  "), *reasons_of(verdict, width)]
    for place, verdict in enumerate((*decision.better, decision.method)):
        name = "advice: " if place == 0 else "until then: " if verdict is decision.method else "or: "
        lines += [*wrapped(name + plain(verdict.rule.advice), width, "  "), *reasons_of(verdict, width)]
    others = dict.fromkeys(verdict.rule.method for verdict in decision.also if verdict.rule.method not in (None, chosen))
    if others:
        lines += wrapped(f"  Worth a try: {', '.join(map(str, others))}.", width, "  ")
    if decision.first:
        lines.append("first of all")
        lines += [
            line for verdict in decision.first for line in wrapped(f"  {plain(verdict.rule.advice)} ({verdict.because})", width, "    ")
        ]
    return [*lines, *table(decision, width)]


def wrapped(text: str, width: int, further: str) -> list[str]:
    """The text in lines of that width, the second and further ones indented."""
    return wrap(text, width, subsequent_indent=further, break_long_words=False, break_on_hyphens=False)


def reasons_of(verdict: Verdict, width: int) -> list[str]:
    """The figures by which a row holds, and why it says what it says."""
    return wrapped(f"  {capital(verdict.because)}. {capital(plain(verdict.rule.why))} ({plain(verdict.rule.said_by)}).", width, "  ")


def about(facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts, each with its name."""
    lengths, found = facts.lengths, facts.content
    nouns = "prompts" if facts.kind == "prompts" else PLURAL[facts.kind]
    taken = f"; an epoch takes {facts.num_per_epoch:,}" if facts.num_per_epoch != facts.num_examples else ""
    sampled = f"; texts are those of {facts.sampled:,} drawn by prompt" if facts.sampled < facts.num_examples else ""
    yield "examples", f"{counted(facts.num_examples, nouns)}{shape(facts)}{taken}{sampled}"
    if facts.beside.sources:
        also = f"; an epoch takes {facts.beside.num_per_epoch:,}" if facts.beside.num_per_epoch != facts.beside.num_examples else ""
        yield "beside them", f"{counted(facts.beside.num_examples, 'good answers')} in the other files, for SFT{also}"
    if facts.num_faults or facts.passed:
        yield "left out", ", ".join(f"{reason} {number:,}" for reason, number in {**facts.faults, **facts.passed}.items())
    if facts.unread:
        yield "not read", "columns " + ", ".join(facts.unread[:MOST_COLUMNS]) + (" ..." if len(facts.unread) > MOST_COLUMNS else "")
    if lengths.prompt.p99:
        shared = "" if facts.kind == "prompts" else f"; {percent(lengths.prompt_share)} of the text is prompt"
        yield "prompts", f"{spread(lengths.prompt, lengths.unit)}{shared}"
    if facts.kind != "prompts":
        longer = f"; the longer one wins in {percent(lengths.longer_chosen.share)}" if lengths.longer_chosen.of else ""
        yield "answers", f"{spread(lengths.answer, lengths.unit)}{longer}"
    if lengths.too_long.num:
        yield "too long", f"{lengths.too_long:examples} do not fit in max_length as they are"
    if verdicts := noise(facts):
        yield "verdicts", verdicts
    yield "copies", copies(facts)
    if named := [f"{name} {percent(share)}" for name, share in found.languages.items() if share >= RARE]:
        yield "language", ", ".join(named)
    checks = [
        (f"{found.numeric:good answers} end in a final answer", found.numeric),
        (f"{found.code:good answers} hold code", found.code),
        (f"{found.tests:examples} bring tests", found.tests),
        (f"{found.constraints:examples} name constraints", found.constraints),
        (f"{found.truths:examples} bring the right answer", found.truths),
    ]
    yield "checkable", "; ".join(words for words, count in checks if count.share >= SOME) or "nothing that a program could"
    if facts.model is not None:
        yield from model_lines(facts.model)


def shape(facts: Facts) -> str:
    """Thumbs up and down, or answers of each prompt."""
    counts = facts.counts
    if facts.kind == "thumbs":
        up, down = facts.thumbs.up, facts.thumbs.down
        weights = f"; up weighs {up:,.6g}, down {down:,.6g}" if (up, down) != (counts.num_up, counts.num_down) else ""
        share = percent(counts.num_up / max(1, counts.num_up + counts.num_down))
        return f": {counts.num_up:,} up, {counts.num_down:,} down ({share} up){weights}"
    if facts.kind == "ranked":
        ties = f"; {counts.num_ties:,} with ties" if counts.num_ties else ""
        return f": {', '.join(f'{number:,} of {answers}' for answers, number in sorted(counts.branches.items()))} answers{ties}"
    return ""


def spread(lengths: Spread, unit: str) -> str:
    """The median, and what most have."""
    return f"{lengths.median:,} {unit} (median), 95 % have up to {lengths.p95:,}"


def noise(facts: Facts) -> str:
    """How far verdicts agree; empty where nothing is judged against something else."""
    found = facts.agreement
    if found.if_verdicts is not None:
        if_all = f"if all are verdicts, about {percent(found.if_verdicts)} is wrong"
        return f"equal rows may be copies, or verdicts that agree: how many are wrong cannot be told; {if_all}"
    if found.lacks_agreeing:
        few = f"two verdicts on the same answers agree in {Count(found.agree, found.couples):couples}, where coins would in half"
        return f"{few}: some that agree may have been removed as copies, so how many are wrong cannot be told"
    if found.couples:
        who = "votes for an answer" if found.of_voters else "two verdicts on the same answers"
        whose = "what most say" if found.of_voters else "verdicts"
        agree = f"{who} agree in {Count(found.agree, found.couples):couples}: about {percent(found.error)} of {whose} is wrong"
        return agree + (f"; {counted(found.ties, 'votes')} for neither are left out" if found.ties else "")
    return "nothing is judged twice: how many are wrong cannot be told" if facts.kind in ("pair", "ranked") else ""


def copies(facts: Facts) -> str:
    """What is there several times."""
    found = facts.content
    parts = [
        f"{found.repeated:examples} repeat an earlier one" if found.repeated.num else "",
        f"{found.near:examples} are near copies of one" if found.near.num else "",
        f"in {found.alike:pairs} both answers are near copies" if found.alike.num else "",
    ]
    return "; ".join(part for part in parts if part) or "none"


def model_lines(model: Model) -> Iterator[tuple[str, str]]:
    """What is known of the model, and what of its training fits."""
    context = f", reads {model.context:,} tokens" if model.context else ""
    template = "a chat template" if model.has_template else "no chat template"
    cost = f"not asked: {model.silent}" if model.nats is None else f"a token of good answers costs it {model.nats:.2f} nats"
    weights = f"{model.num_parameters / 1e6:,.1f} million" if model.num_parameters >= 100_000 else f"{model.num_parameters:,}"
    yield "model", f"{weights} weights{context}, {template}; {cost}"
    if model.ways:
        ways = ", ".join(f"{way.name} {way.peak}{'' if way.fits else ' (does not fit)'}" for way in model.ways)
        yield "memory", f"{model.room}: {ways}"


def capital(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def plain(text: str) -> str:
    """Without Markdown: what to type, or where to read."""
    text = re.sub(r"\[[\w-]+\]\(methods/([\w-]+)\.md\)", r"prefopt methods \1", text)
    text = re.sub(r"\[([\d.]+)\]\(https[^)]*\)", r"arXiv \1", text)
    return re.sub(r"\[[\w-]+\]\(([\w-]+\.md)\)", r"docs/\1", text).replace("`", "")


def table(decision: Decision, width: int) -> list[str]:
    """The settings that have a reason, one per line; what every run has is in the file alone."""
    if decision.obstacle:
        return ["", f"{capital(decision.obstacle[0])}."]
    rows = []
    stages = decision.config.get("stages", ())
    for name, value in decision.config.items():
        of_stage = isinstance(value, dict) and name in stages
        own = value if of_stage else {name: value}
        for key, entry in own.items():
            named = f"{name}: {key}" if of_stage else key
            rows.append((named, plain_value(entry), decision.reasons.get(named, decision.reasons.get(key))))
    there = {name.rpartition(" ")[2] for name, *_ in rows}
    rows += [(name, "-", why) for name, why in decision.reasons.items() if name.rpartition(" ")[2] not in there]
    shown = [(name, value, why) for name, value, why in rows if why]
    names, values = (max(len(row[place]) for row in shown) + 2 for place in (0, 1))
    lines = ["settings"]
    said: set[str] = set()
    for name, value, why in shown:
        head = f"  {name:<{names}}{value:<{values}}"
        lines += [head.rstrip()] if why in said else wrapped(head + why, width, " " * len(head))
        said.add(why)
    return lines


def plain_value(value: object) -> str:
    """As it is written on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def commands(decision: Decision, path: Path, *, written: bool, has_model: bool) -> list[str]:
    """What to type next.

    Args:
        decision: with settings.
        path: of the file with them.
        written: whether it is there.
        has_model: whether the settings name one.
    """
    if not decision.config:
        return []
    end = f" --config {path}" + ("" if has_model else " --model MODEL")
    launcher = f"torchrun --nproc-per-node {decision.gpus} -m prefopt" if decision.gpus > 1 else "prefopt"
    lines = ["", f"{path} has them" if written else f"--write {path} keeps them; then", f"  {launcher} train{end}"]
    return lines + ([f"  {decision.sweep}{end}"] if decision.sweep else [])


def yaml_of(decision: Decision) -> str:
    """The settings, each below the reason for it."""
    chosen = decision.method
    why: Mapping[str, str] = {**decision.reasons, "method": f"{capital(chosen.because)}. {capital(chosen.rule.why)}."}
    parts = ["# Written by `prefopt advise`.\n"]
    for verdict in decision.warnings:
        text = f"Warning: {verdict.rule.advice} ({verdict.because})."
        parts += [f"# {line}\n" for line in wrapped(" ".join(text.split()), WIDTH, "")]
    for name, value in decision.config.items():
        parts += [f"# {line}\n" for line in wrapped(" ".join(why.get(name, "").split()), WIDTH, "")]
        parts.append(to_yaml({name: value}))
    return "".join(parts)


def check_place(path: Path) -> None:
    """Whether a file could be written there.

    Raises:
        PrefoptError: its folder is not there, or it is a folder itself.
    """
    place = path.expanduser()
    if place.is_dir():
        raise PrefoptError(f"cannot write {path}: it is a folder. Give a file as --write, for example {path / 'advice.yaml'}.")
    if not place.parent.is_dir():
        raise PrefoptError(f"cannot write {path}: there is no folder {path.parent}. Make it, or give another path as --write.")


def write(path: Path, decision: Decision) -> None:
    """The settings as a file.

    Raises:
        PrefoptError: it cannot be written, or there are none.
    """
    if decision.obstacle:
        why, rule = decision.obstacle
        raise PrefoptError(f"{path} is not written: {why}. {capital(plain(rule.advice))}.")
    try:
        path.expanduser().write_text(yaml_of(decision), encoding="utf-8")
    except OSError as error:
        raise PrefoptError(f"cannot write {path}: {error.strerror}. Give another path as --write.") from None
