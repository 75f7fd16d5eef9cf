"""Answers to many prompts: of a policy and its reference, drawn with the same numbers, and scored where asked for.

Prompts are answered in groups of a fixed number, so that what comes out depends on the seed and on a prompt's place in the
file, and neither on memory nor on how many answers are written at once; and so that answers are there, on disk or on the
screen, before all are done.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TextIO

import numpy as np
from rich.console import Console

from prefopt.data.examples import Message
from prefopt.data.prompts import Fitted, Prompt, read_prompts, refuse_faulty
from prefopt.data.rows import Dropped, RowFault
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.pipeline.answer_settings import GenerateSettings
from prefopt.pipeline.screen import Column, Page, rule
from prefopt.pipeline.voices import Voice, Voices, explaining_out_of_memory, open_voices
from prefopt.report.text import plural
from prefopt.rollout.sample import sample
from prefopt.training.terminal.narrator import Terminal, Ticker
from prefopt.training.terminal.shown import clock
from prefopt.trees import Completion, PromptTree, TokenIds

GROUP = 64
"""Prompts that are answered together. Another number would draw other answers from the same seed."""

ROOM_STEP = 16
"""Where the context leaves less room than an answer may take, room is counted in steps of so many tokens: prompts whose lengths
differ a little are then answered together, and cut up to 15 tokens before the end of the context."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer.

    Attributes:
        ids: its tokens, the end-of-turn token included.
        text: without control tokens.
        ended: whether it ended by itself, rather than where it was cut.
        logps: its log-probability under each model by role, summed over its tokens, in nats; empty where none was asked for.
    """

    ids: TokenIds
    text: str
    ended: bool
    logps: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt with an answer of each model.

    Attributes:
        prompt: what was asked.
        copy: which of several answers to it, from 0.
        answers: by role.
    """

    prompt: Prompt
    copy: int
    answers: Mapping[str, Answer]


@explaining_out_of_memory(
    "Lower batch_size or max_new_tokens, or leave the reference out with --reference none; the answers so far are written."
)
def generate(settings: GenerateSettings) -> None:
    """Answer prompts, and write the answers to a file or to standard output.

    Raises:
        PrefoptError: the settings, the prompts, the models, or the file.
    """
    began = time.perf_counter()
    narrator = Terminal()
    out = None if settings.out is None else settings.out.expanduser()
    if out is not None:
        check_out(out, overwrite=settings.overwrite)
    prompts, faulty = given_prompts(settings)
    if settings.on_bad_row == "stop":
        refuse_faulty(faulty, len(prompts) + len(faulty))
    voices = open_voices(settings, with_chats=any(not isinstance(prompt.content, str) for prompt in prompts))
    if settings.logps and not voices.same_tokens:
        raise ConfigError("logps scores the answers of each model under the other, and these two read different tokens. Leave it out.")
    prompts, fitted, unfit = fit_all(voices, prompts)
    num_rows = len(prompts) + len(faulty) + len(unfit)
    if settings.on_bad_row == "stop":
        refuse_faulty(unfit, num_rows)
    if not prompts:
        raise DataError(f"none of the {num_rows} prompts can be asked. The first, {unfit[0].location}: {unfit[0].detail}.")
    for line in [*voices.lines(), *notes_on(voices, fitted, num_dropped=num_rows - len(prompts))]:
        narrator.say(line)
    written: list[Answered] = []
    write, end = writer(out, settings, voices, len(prompts))
    try:
        with progress(narrator, settings, len(prompts) * settings.num_per_prompt * len(voices.all)) as ticker:
            for answered in answer_all(voices, prompts, fitted, settings, ticker):
                write(answered)
                written.append(answered)
    finally:
        end()
        if written and len(written) < len(prompts) * settings.num_per_prompt:
            narrator.say(f"broken off: {len(written)} of {len(prompts) * settings.num_per_prompt} answers of each model are written")
    for line in closing(voices, written, settings, time.perf_counter() - began):
        narrator.say(line)


def given_prompts(settings: GenerateSettings) -> tuple[list[Prompt], list[Dropped]]:
    """The prompts, and rows that hold none.

    Raises:
        DataError: as `read_prompts`.
    """
    if settings.prompts is not None:
        return read_prompts(settings.prompts, settings.columns)
    return [Prompt(text, f"prompt {number}") for number, text in enumerate(settings.prompt, 1)], []


def fit_all(voices: Voices, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[list[Fitted]], list[Dropped]]:
    """The prompts that everyone can be asked, their tokens (by voice), and the others with the reason."""
    good: list[Prompt] = []
    fitted: list[list[Fitted]] = [[] for _ in voices.all]
    unfit: list[Dropped] = []
    for prompt in prompts:
        try:
            of_each = [voice.fit(prompt.content) for voice in voices.all]
        except RowFault as fault:
            unfit.append(Dropped(prompt.location, fault.reason, fault.detail, prompt.as_json()))
            continue
        good.append(prompt)
        for mine, one in zip(fitted, of_each, strict=True):
            mine.append(one)
    return good, fitted, unfit


def notes_on(voices: Voices, fitted: Sequence[Sequence[Fitted]], *, num_dropped: int) -> list[str]:
    """What was left out or cut."""
    notes = [f"note: {plural(num_dropped, 'row')} left out"] if num_dropped else []
    for voice, mine in zip(voices.all, fitted, strict=True):
        if num_cut := sum(bool(one.num_cut) for one in mine):
            notes.append(f"note: {plural(num_cut, 'prompt')} cut on the left: the {voice.role} reads {voice.speaker.context} tokens")
    return notes


def answer_all(
    voices: Voices, prompts: Sequence[Prompt], fitted: Sequence[Sequence[Fitted]], settings: GenerateSettings, ticker: Ticker | None
) -> Iterator[Answered]:
    """Every prompt with its answers, group by group, in the order of the prompts."""
    done = 0
    for start in range(0, len(prompts), GROUP):
        part = slice(start, start + GROUP)
        drawn: dict[str, list[list[TokenIds]]] = {}
        for voice, mine in zip(voices.all, fitted, strict=True):
            before = done

            def tell(count: int, before: int = before) -> None:
                if ticker is not None:
                    ticker.step(before + count, {})

            asked = [one.ids for one in mine[part]]
            # Who is to score an answer must have room for it too.
            readers = zip(voices.all, fitted, strict=True) if settings.logps else [(voice, mine)]
            each = [reader.rooms(theirs[part], settings.max_new_tokens) for reader, theirs in readers]
            seed = derived(settings.seed, start) if start else settings.seed
            drawn[voice.role] = draw(voice, asked, [*map(min, zip(*each, strict=True))], settings, seed=seed, done=tell)
            done += len(asked) * settings.num_per_prompt
        logps = score(voices, [mine[part] for mine in fitted], drawn) if settings.logps else {}
        for index, prompt in enumerate(prompts[part]):
            for copy in range(settings.num_per_prompt):
                answers = {}
                for voice in voices.all:
                    ids = drawn[voice.role][index][copy]
                    under = {role: values[index][copy] for (of, role), values in logps.items() if of == voice.role}
                    answers[voice.role] = Answer(ids, voice.text(ids), int(ids[-1]) in voice.end_ids, under)
                yield Answered(prompt, copy, answers)


def draw(
    voice: Voice, prompts: Sequence[TokenIds], rooms: Sequence[int], settings: GenerateSettings, *, seed: int, done: Callable[[int], None]
) -> list[list[TokenIds]]:
    """Answers of one voice to a group of prompts."""
    rooms = [stepped(room, settings.max_new_tokens) for room in rooms]
    answers: list[list[TokenIds]] = [[] for _ in prompts]
    counted = 0
    with voice.speaker.speaking() as model:
        for room in sorted(set(rooms), reverse=True):
            places = [place for place, own in enumerate(rooms) if own == room]
            before = counted
            drawn = sample(
                model,
                [prompts[place] for place in places],
                eos_ids=voice.end_ids,
                num_per_prompt=settings.num_per_prompt,
                max_new_tokens=room,
                temperature=settings.temperature,
                seed=seed if room == settings.max_new_tokens else derived(seed, room),
                batch_size=settings.batch_size,
                done=lambda count, before=before: done(before + count),  # type: ignore[misc]  # a default that mypy cannot type
            )
            counted += len(places) * settings.num_per_prompt
            for place, mine in zip(places, drawn, strict=True):
                answers[place] = mine
    return answers


def stepped(room: int, wanted: int) -> int:
    """The room of an answer in steps, where it is less than wanted."""
    return room if room >= wanted or room <= ROOM_STEP else room - room % ROOM_STEP


def derived(seed: int, number: int) -> int:
    """Another seed, the same every time."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def score(
    voices: Voices, fitted: Sequence[Sequence[Fitted]], drawn: Mapping[str, Sequence[Sequence[TokenIds]]]
) -> dict[tuple[str, str], list[list[float]]]:
    """Log-probabilities of the answers of each voice under each: (of, under) -> by prompt and copy, in nats."""
    logps = {}
    for of, answers in drawn.items():
        for voice, mine in zip(voices.all, fitted, strict=True):
            trees = [PromptTree(one.ids, tuple(map(Completion, own))) for one, own in zip(mine, answers, strict=True)]
            values = voice.speaker.logps(trees).tolist()
            num = len(trees[0].completions)
            logps[of, voice.role] = [values[start : start + num] for start in range(0, len(values), num)]
    return logps


def as_row(answered: Answered, beta: float | None, *, several: bool) -> dict[str, Any]:
    """The JSON object of a prompt and its answers."""
    row: dict[str, Any] = {"prompt": answered.prompt.as_json(), "row": answered.prompt.location}
    if several:
        row["sample"] = answered.copy
    row |= {role: answer.text for role, answer in answered.answers.items()}
    row["tokens"] = {role: len(answer.ids) for role, answer in answered.answers.items()}
    row["ended"] = {role: answer.ended for role, answer in answered.answers.items()}
    if any(answer.logps for answer in answered.answers.values()):
        row["logps"] = {role: dict(answer.logps) for role, answer in answered.answers.items()}
        ratios = {role: ratio for role, answer in answered.answers.items() if (ratio := log_ratio(answer)) is not None}
        if ratios:
            row["log_ratio"] = ratios
            if beta is not None:
                row["reward"] = {role: beta * ratio for role, ratio in ratios.items()}
    return row


def log_ratio(answer: Answer) -> float | None:
    """log π(y|x) − log π_ref(y|x), in nats; times β it is DPO's implicit reward. None where there is no reference."""
    return answer.logps["policy"] - answer.logps["reference"] if answer.logps.keys() >= {"policy", "reference"} else None


def check_out(out: Path, *, overwrite: bool) -> None:
    """Whether the file can be written, before any work is done.

    Raises:
        RunError: it is there already, or its folder cannot be made.
    """
    try:
        if out.is_dir():
            raise RunError(f"{out} is a folder. Give a file as out, for example {out / 'answers.jsonl'}.")
        if out.exists() and not overwrite:
            raise RunError(f"{out} exists. Give another file as out, or --overwrite to replace it.")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {out}: {error.strerror}. Give a file that can be written as out.") from None


def writer(
    out: Path | None, settings: GenerateSettings, voices: Voices, num_prompts: int
) -> tuple[Callable[[Answered], None], Callable[[], None]]:
    """What writes an answered prompt, and what closes the file behind it.

    Raises:
        RunError: the file cannot be written.
    """
    several = settings.num_per_prompt > 1
    if out is None:
        console = Console(highlight=False, emoji=False)
        number = iter(range(1, num_prompts * settings.num_per_prompt + 1))
        return lambda answered: show(console, answered, voices, next(number), num_prompts * settings.num_per_prompt), lambda: None
    try:
        file = out.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise cannot_write(out, error) from None

    def write(answered: Answered) -> None:
        try:
            file.write(json.dumps(as_row(answered, voices.beta, several=several), ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            raise cannot_write(out, error) from None

    return write, lambda: close(file)


def close(file: TextIO) -> None:
    """Closes the file; what could not be written was told before."""
    try:
        file.close()
    except OSError:
        return


def cannot_write(out: Path, error: OSError) -> RunError:
    """The error of a file that cannot be written."""
    return RunError(f"cannot write {out}: {error.strerror}. Make room, or give another file as out.")


def show(console: Console, answered: Answered, voices: Voices, number: int, total: int) -> None:
    """An answered prompt for people: on a terminal the answers side by side, elsewhere one below the other."""
    place = f"{number} of {total}: {answered.prompt.location}" + (f", answer {answered.copy + 1}" if answered.copy else "")
    columns = [
        Column(voice.role, answered.answers[voice.role].text, remark(answered.answers[voice.role])) for voice in reversed(voices.all)
    ]
    if console.is_terminal:
        rule(console, place)
        console.print(Page([Column("prompt", asked(answered.prompt))]))
        console.print(Page(columns))
        console.print()
        return
    print(f"── {place}", f"prompt: {asked(answered.prompt)}", sep="\n")
    for column in columns:
        print(f"{column.title}: {column.text.strip()}" + (f"\n{column.note}" if column.note else ""))
    print(flush=True)


def asked(prompt: Prompt) -> str:
    """A prompt for people: a chat of several turns with who said them."""
    if isinstance(prompt.content, str):
        return prompt.content
    turns: tuple[Message, ...] = prompt.content
    return turns[0].content if len(turns) == 1 else "\n".join(f"[{message.role}] {message.content}" for message in turns)


def remark(answer: Answer) -> str:
    """What there is to say about an answer."""
    parts = [] if answer.ended else [f"cut after {len(answer.ids)} tokens"]
    if answer.logps:
        parts.append("log-prob " + ", ".join(f"{value:.2f} under the {role}" for role, value in answer.logps.items()))
    if (ratio := log_ratio(answer)) is not None:
        parts.append(f"log-ratio {ratio:+.2f}")
    if not answer.text.strip():
        parts.insert(0, "an empty answer")
    return f"({'; '.join(parts)})" if parts else ""


@contextmanager
def progress(narrator: Terminal, settings: GenerateSettings, total: int) -> Iterator[Ticker | None]:
    """A line of progress, where the answers themselves do not show how far it is."""
    if settings.out is None and sys.stdout.isatty():
        yield None
        return
    with narrator.progress("answers", total) as ticker:
        yield ticker


def closing(voices: Voices, written: Sequence[Answered], settings: GenerateSettings, seconds: float) -> list[str]:
    """The figures of all answers."""
    lines = [f"{plural(len(written), 'answer')} of each model in {clock(seconds)}"]
    for voice in voices.all:
        own = [answered.answers[voice.role] for answered in written]
        parts = [
            f"{mean(len(answer.ids) for answer in own):.0f} tokens on average",
            f"{mean(answer.ended for answer in own):.0%} ended by themselves",
        ]
        if ratios := [ratio for answer in own if (ratio := log_ratio(answer)) is not None]:
            parts.append(f"log-ratio {mean(ratios):+.2f} nats" + (f", reward {voices.beta * mean(ratios):+.3f}" if voices.beta else ""))
        lines.append(f"  {voice.role}: {', '.join(parts)}")
    return [*lines, *([f"answers: {settings.out}"] if settings.out is not None else [])]
