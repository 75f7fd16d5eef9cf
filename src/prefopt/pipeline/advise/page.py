"""The advice as a page for the terminal, and as a YAML file with its reasons."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap

from prefopt.config import to_yaml
from prefopt.data.kinds import PLURAL, Kind
from prefopt.data.summary import source_lines
from prefopt.errors import PrefoptError
from prefopt.pipeline.advise.decide import GIVEN, Decision
from prefopt.pipeline.advise.facts import Count, Facts, Lengths, Model, Spread, percent
from prefopt.pipeline.advise.rules import Topic

WIDTH = 110
INDENT = 13
"""Columns of a line's name."""

ALSO_SAID: dict[Topic, str] = {"before": "first", "weights": "weights", "settings": "settings", "data": "data"}

MOST_SOURCES = 4
"""Sources that are named."""

RARE = 0.005
"""Share of letters from which on a script is named."""


def page(facts: Facts, decision: Decision) -> list[str]:
    """What was found, what is advised, and the settings, line by line.

    Args:
        facts: all of them.
        decision: what follows.
    """
    lines = [line for source in facts.sources[:MOST_SOURCES] for line in source_lines(source)]
    if len(facts.sources) > MOST_SOURCES:
        lines.append(f"… and {len(facts.sources) - MOST_SOURCES} more sources")
    lines += ["", "what it is", *(line for name, text in _about(facts) for line in _entry(name, text)), ""]
    return [*lines, "what to do", *_advice(decision), "", *_run(facts, decision)]


def _entry(name: str, text: str) -> list[str]:
    parts = wrap(text, WIDTH - INDENT - 2, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"  {name if place == 0 else '':<{INDENT}}{part}".rstrip() for place, part in enumerate(parts)]


def _about(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "serves as", _serves(facts)
    if facts.num_faults or facts.passed:
        yield "left out", _left_out(facts)
    if facts.sampled < facts.num_examples:
        yield "sample", f"texts are those of {Count(facts.sampled, facts.num_examples):examples}, all of the prompts that were drawn"
    yield from _shape(facts)
    yield from _lengths(facts.lengths, facts)
    yield from _noise(facts)
    yield from _copies(facts)
    yield from _content(facts)
    if facts.model is not None:
        yield from _model(facts.model)


def _serves(facts: Facts) -> str:
    if facts.kind == "prompts":
        return f"{facts.num_examples:,} prompts without answers: nothing that a method here learns from"
    others: list[Kind] = [kind for kind, number in facts.serves.items() if kind != facts.kind and number]
    also = f"; also as {', '.join(f'{facts.serves[kind]:,} {PLURAL[kind]}' for kind in others)}" if others else ""
    return f"{facts.num_examples:,} {PLURAL[facts.kind]}, of {facts.num_rows:,} rows{also}"


def _left_out(facts: Facts) -> str:
    found = []
    if facts.num_faults:
        found.append(f"{Count(facts.num_faults, facts.num_rows):rows} with faults: {_numbers(facts.faults)}")
    if facts.passed:
        found.append(f"what says nothing as {PLURAL[facts.kind] if facts.kind != 'prompts' else 'prompts'}: {_numbers(facts.passed)}")
    return "; ".join(found)


def _numbers(found: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in sorted(found.items(), key=lambda entry: -entry[1]))


def _shape(facts: Facts) -> Iterator[tuple[str, str]]:
    counts = facts.counts
    if facts.kind == "thumbs":
        of = counts.num_up + counts.num_down
        yield "thumbs", f"{counts.num_up:,} up, {counts.num_down:,} down ({percent(counts.num_up / max(1, of))} up)"
    if facts.kind == "ranked":
        several = ", ".join(f"{number:,} of {answers}" for answers, number in sorted(counts.branches.items()))
        yield "ranked", f"answers to a prompt: {several}; {Count(counts.num_ties, counts.branches.total()):prompts} have ties"


def _lengths(lengths: Lengths, facts: Facts) -> Iterator[tuple[str, str]]:
    yield "prompts", _spread(lengths.prompt, lengths.unit) if lengths.prompt.longest else "none"
    if facts.kind == "prompts":
        return
    yield "answers", _spread(lengths.answer, lengths.unit)
    if lengths.prompt.longest:
        yield "shared", f"{percent(lengths.prompt_share)} of all that would be read without sharing is prompt"
    if lengths.longer_chosen.of:
        yield (
            "longer wins",
            f"in {lengths.longer_chosen:pairs of different length}; the longer answer is {lengths.ratio:.1f} times as long (median)",
        )
    elif lengths.chosen and lengths.rejected:
        yield "good, bad", f"{lengths.chosen:,} and {lengths.rejected:,} characters (medians)"
    if lengths.too_long.num:
        yield "too long", f"{lengths.too_long:examples} do not fit in max_length as they are"


def _spread(spread: Spread, unit: str) -> str:
    return f"{spread.median:,} {unit} (median); 90 % have {spread.p5:,} to {spread.p95:,}, the longest {spread.longest:,}"


def _noise(facts: Facts) -> Iterator[tuple[str, str]]:
    found = facts.agreement
    if found.couples:
        who = "votes of a row agree" if facts.voters else "verdicts on the same two answers agree"
        both_ways = Count(found.contradicted, found.judged)
        several = f"{both_ways:rows} have votes" if facts.voters else f"{both_ways:pairs of answers that were judged again} have verdicts"
        text = f"{who} in {Count(found.agree, found.couples):couples}; {several} both ways. If each were wrong as often, and by itself, "
        yield "verdicts", f"{text}about {percent(found.error)} of {'what most say' if facts.voters else 'them'} would be wrong"
    elif facts.lengths.longer_chosen.of:
        yield "verdicts", "no two answers are judged more than once: how many verdicts are wrong cannot be told"
    if facts.alike.num:
        yield "edits", f"in {facts.alike:pairs} the two answers share most of their wording"


def _copies(facts: Facts) -> Iterator[tuple[str, str]]:
    found = facts.copies
    if not found.prompts:
        yield (
            "copies",
            f"{found.repeated:examples} repeat an earlier one, {found.near:different ones} are near copies of one; there are no prompts",
        )
        return
    rows = f"{found.repeated:examples} repeat an earlier one, {found.near:different ones} are near copies of one"
    yield "copies", f"{rows}; {found.near_prompts:different prompts} are near copies of an earlier one"
    yield "held out", f"of {found.held_out}, {found.leaks:examples} open like one that is trained on"


def _content(facts: Facts) -> Iterator[tuple[str, str]]:
    found = facts.content
    named = {script: share for script, share in found.scripts.items() if share >= RARE}
    if named:
        others = len(found.scripts) - len(named)
        more = f", {others} more below {percent(RARE)} each" if others else ""
        yield "scripts", f"{', '.join(f'{script} {percent(share)}' for script, share in named.items())}{more} of all letters"
    checks = [
        (f"{found.numeric:good answers} end in a final answer", found.numeric),
        (f"{found.code:good answers} hold code", found.code),
        (f"{found.tests:rows} bring tests", found.tests),
        (f"{found.instructions:rows} name constraints that a program can check", found.instructions),
        (f"{found.truths:rows} bring the right answer", found.truths),
    ]
    said = [words for words, count in checks if count.num]
    if said:
        yield "checkable", "; ".join(said)
    if found.broken.num:
        yield "broken", f"{found.broken:texts} have characters that were lost, or UTF-8 that was read as something else"


def _model(model: Model) -> Iterator[tuple[str, str]]:
    context = f", reads {model.context:,} tokens" if model.context else ""
    template = "a chat template" if model.has_template else "no chat template"
    yield "model", f"{model.name}: {model.num_parameters / 1e6:,.1f} million weights{context}, {template}"
    if model.said is None:
        yield "its view", f"not asked: {model.silent}"
    else:
        said = model.said
        bad = "" if said.bad is None else f", of the bad ones {said.bad:.2f}"
        prefers = f"; it finds the chosen one likelier in {said.prefers:pairs}" if said.prefers.of else ""
        cost = f"a token of the good answers costs it {said.good:.2f} nats{bad}; one of its own would cost {said.own:.2f}"
        yield "its view", f"{cost}{prefers} ({said.num:,} examples)"
    yield "memory", model.room
    for way in model.ways:
        fits = ("fits" if way.gpus == 1 else f"fits on {way.gpus} GPUs") if way.fits else "does not fit"
        with_ = ", ".join(f"{name} {plain_value(value)}" for name, value in way.changes.items())
        yield "", f"{way.name}: {way.peak}, {fits}{f' with {with_}' if with_ else ''}"


def _advice(decision: Decision) -> list[str]:
    held = [("best", verdict) for verdict in decision.better]
    held.append(("meanwhile" if held else "method", decision.method))
    held += [(name, verdict) for topic, name in ALSO_SAID.items() for verdict in decision.of(topic)]
    lines = []
    for name, verdict in held:
        lines += _entry(name, verdict.rule.advice)
        lines += _entry("", f"found: {verdict.because}")
        lines += _entry("", f"why: {capital(verdict.rule.reason)} ({plain(verdict.rule.said_by)})")
    also = [f"{verdict.rule.advice} ({verdict.because})" for verdict in decision.also]
    return lines + (_entry("also", f"these hold too: {'; '.join(also)}") if also else [])


def capital(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def plain(source: str) -> str:
    """A source without the links of Markdown: what to type, or where to read."""
    source = re.sub(r"\[[\w-]+\]\(methods/([\w-]+)\.md\)", r"prefopt methods \1", source)
    source = re.sub(r"\[([\d.]+)\]\(https[^)]*\)", r"arXiv \1", source)
    return re.sub(r"\[[\w-]+\]\(([\w-]+\.md)\)", r"docs/\1", source)


def _run(facts: Facts, decision: Decision) -> list[str]:
    """The settings, one per line, each with its reason."""
    if not decision.config:
        return ["There is nothing to train yet."]
    rows = []
    for name, value in decision.config.items():
        within = value if isinstance(value, dict) and name in decision.config.get("stages", ()) else {name: value}
        rows += [(key if within is not value else f"{name}: {key}", own, _why(decision, key)) for key, own in within.items()]
    rows += [(name, "left out", why) for name, why in decision.left.items()]
    shown = [(name, plain_value(value), why) for name, value, why in rows]
    names = max(len(name) for name, _, _ in shown) + 2
    values = max(len(value) for _, value, why in shown if why) + 2
    lines = ["settings"]
    for name, value, why in shown:
        room = max(30, WIDTH - names - values - 2)
        parts = wrap(why, room, break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(f"  {name:<{names}}{value:<{values}}{parts[0]}".rstrip())
        lines += [f"{'':<{names + values + 2}}{part}" for part in parts[1:]]
    return lines


def _why(decision: Decision, name: str) -> str:
    reason = decision.reasons.get(name, "")
    return "" if reason == GIVEN else reason


def plain_value(value: object) -> str:
    """As it is written on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{name}={entry}" for name, entry in value.items())
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
    model = "" if has_model else " --model MODEL"
    lines = ["", f"settings: {path}"] if written else ["", f"--write {path} keeps these settings; then"]
    launcher = f"torchrun --nproc-per-node {decision.gpus} -m prefopt" if decision.gpus > 1 else "prefopt"
    lines += [f"  {launcher} train --config {path}{model}"]
    return lines + ([f"  {decision.sweep}{path}{model}"] if decision.sweep else [])


def yaml_of(decision: Decision) -> str:
    """The settings, each below the reason for it."""
    parts = ["# Written by `prefopt advise`.\n"]
    chosen = decision.method
    why = {**decision.reasons, "method": f"{capital(chosen.because)}. {capital(chosen.rule.reason)}."}
    for name, value in decision.config.items():
        if (reason := why.get(name)) and reason != GIVEN:
            parts += [f"# {line}\n" for line in wrap(" ".join(reason.split()), WIDTH, break_long_words=False, break_on_hyphens=False)]
        parts.append(to_yaml({name: value}))
    return "".join(parts)


def write(path: Path, decision: Decision) -> None:
    """The settings as a file.

    Raises:
        PrefoptError: it cannot be written, or there are none.
    """
    if not decision.config:
        raise PrefoptError(f"{path} is not written: there is nothing to train yet. {decision.method.rule.advice}.")
    try:
        path.expanduser().write_text(yaml_of(decision), encoding="utf-8")
    except OSError as error:
        raise PrefoptError(f"cannot write {path}: {error.strerror}. Give another path as --write.") from None
