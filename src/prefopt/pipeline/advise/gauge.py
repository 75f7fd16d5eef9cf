"""Figures of examples whose text is at hand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median

from prefopt.data.dataset import draw
from prefopt.data.examples import Answer, Example
from prefopt.data.kinds import as_pairs
from prefopt.data.learning import opening_of, opening_text
from prefopt.data.rows import RowFault
from prefopt.pipeline.advise import content
from prefopt.pipeline.advise.alike import clusters, likeness, runs_of
from prefopt.pipeline.advise.content import words_of
from prefopt.pipeline.advise.facts import Content, Copies, Count, Lengths, Spread, Unit, percent
from prefopt.pipeline.advise.noise import Agreement, agreement_of, verdicts_by_pair

FEW = 1000
"""Examples below which there are few of them: fifteen steps of a batch of 64."""

SMALL_EDIT = 0.5
"""Likeness from which on two answers to one prompt are the same but for an edit: about one word in fifteen is another."""

HELD_OUT, HELD_OUT_OF_FEW = 0.05, 0.1
"""Share that is held out where nothing else is said."""

Measure = Callable[[str], int]


def held_out_share(num_examples: int) -> float:
    """What to hold out of so many: enough of few to say anything."""
    return HELD_OUT_OF_FEW if num_examples < FEW else HELD_OUT


def couples_of(example: Example) -> list[tuple[Answer, Answer]]:
    """The pairs of a better and a worse answer that an example holds; none of a single answer."""
    if len(example.answers) < 2:
        return []
    made = as_pairs(example, "all")
    return [(entry.answers[0], entry.answers[1]) for entry in made if not isinstance(entry, RowFault)]


def good_answers(example: Example) -> list[Answer]:
    """Those that should be given: the best, what has a thumb up, the one that there is."""
    if len(example.answers) == 1:
        return [answer for answer in example.answers if answer.label is not False]
    return [answer for answer in example.answers if answer.rank == example.answers[0].rank]


def bad_answers(example: Example) -> list[Answer]:
    """Those that should not."""
    if len(example.answers) == 1:
        return [answer for answer in example.answers if answer.label is False]
    return [answer for answer in example.answers if answer.rank != example.answers[0].rank]


def lengths_of(examples: Sequence[Example], measure: Measure = len, unit: Unit = "characters") -> Lengths:
    """How long they are.

    Args:
        examples: any number.
        measure: a text's length.
        unit: what it counts.
    """
    prompts = [measure(words_of(example.prompt)) for example in examples]
    answers = [[measure(words_of(answer.content)) for answer in example.answers] for example in examples]
    read = sum(prompt * len(own) for prompt, own in zip(prompts, answers, strict=True))
    every = [number for own in answers for number in own]
    couples = [(measure(words_of(one.content)), measure(words_of(other.content))) for one, other in _couples(examples)]
    decided = [one > other for one, other in couples if one != other]
    ratios = [max(couple) / max(1, min(couple)) for couple in couples]
    good = [measure(words_of(answer.content)) for example in examples for answer in good_answers(example)]
    bad = [measure(words_of(answer.content)) for example in examples for answer in bad_answers(example)]
    return Lengths(
        unit,
        Spread.of(prompts),
        Spread.of(every),
        Spread.of([prompt + max(own) for prompt, own in zip(prompts, answers, strict=True)]),
        read / max(1, read + sum(every)),
        Count(sum(decided), len(decided)),
        median(ratios) if ratios else 1.0,
        round(median(good)) if good else 0,
        round(median(bad)) if bad else 0,
    )


def _couples(examples: Sequence[Example]) -> Iterator[tuple[Answer, Answer]]:
    for example in examples:
        yield from couples_of(example)


def alike_answers(examples: Sequence[Example]) -> Count:
    """Pairs whose two answers are near copies of each other."""
    likenesses = [likeness(runs_of(words_of(one.content)), runs_of(words_of(other.content))) for one, other in _couples(examples)]
    return Count(sum(found >= SMALL_EDIT for found in likenesses), len(likenesses))


def agreement(examples: Sequence[Example], votes: Sequence[list[int]]) -> tuple[Agreement, bool]:
    """How far verdicts on the same answers agree, and whether they are votes within a row.

    Args:
        examples: of which several may judge the same answers.
        votes: of rows that have several.
    """
    if votes:
        return agreement_of(votes, together=True), True
    judged = [
        (words_of(example.prompt), words_of(one.content), words_of(other.content))
        for example in examples
        for one, other in couples_of(example)
    ]
    return agreement_of(verdicts_by_pair(judged), together=False), False


def copies_of(examples: Sequence[Example], held: Sequence[Example] | None, *, fraction: float, seed: int) -> Copies:
    """What is there several times, and what of it would stand on both sides of the held-out split.

    Args:
        examples: any number.
        held: the held-out examples, where they are given.
        fraction: share that is held out of the examples where they are not; 0: what is usual for so many.
        seed: of that split.
    """
    whole = [whole_text(example) for example in examples]
    distinct = list(dict(zip(whole, examples, strict=True)).values())
    prompts = list(dict.fromkeys(text for example in examples if (text := words_of(example.prompt).strip())))
    near_prompts = clusters(prompts)
    fraction = fraction or held_out_share(len(examples))
    apart = held if held is not None else [example for example in examples if draw(opening_of(example), seed) < fraction]
    kept = examples if held is not None else [example for example in examples if draw(opening_of(example), seed) >= fraction]
    return Copies(
        Count(len(whole) - len(distinct), len(whole)),
        Count(_num_near(distinct), len(distinct)),
        len(prompts),
        Count(sum(root != place for place, root in enumerate(near_prompts)), len(prompts)),
        Count(_num_leaks(kept, apart), len(apart)),
        "eval_data" if held is not None else f"the {percent(fraction)} that seed {seed} draws",
    )


def _num_near(examples: Sequence[Example]) -> int:
    """Examples of which the prompt and each answer, in their order, are near copies of those of an earlier one."""
    parts = [[words_of(example.prompt), *(words_of(answer.content) for answer in example.answers)] for example in examples]
    texts = list(dict.fromkeys(text for own in parts for text in own))
    root = dict(zip(texts, clusters(texts), strict=True))
    return len(parts) - len({tuple(root[text] for text in own) for own in parts})


def whole_text(example: Example) -> str:
    """Prompt and answers, in their order."""
    return "\n\n".join([words_of(example.prompt), *(words_of(answer.content) for answer in example.answers)])


def _num_leaks(kept: Sequence[Example], apart: Sequence[Example]) -> int:
    """Of the second, examples whose opening has a near copy among the openings of the first."""
    texts = list(dict.fromkeys(opening_text(example) for example in (*kept, *apart)))
    root = dict(zip(texts, clusters(texts), strict=True))
    seen = {root[opening_text(example)] for example in kept}
    return sum(root[opening_text(example)] in seen for example in apart)


def content_of(examples: Sequence[Example], num_rows: int, tests: int, instructions: int, truths: int) -> Content:
    """What the texts are.

    Args:
        examples: whose texts are looked at.
        num_rows: of the data.
        tests, instructions, truths: rows with columns of that kind.
    """
    texts = [whole_text(example) for example in examples]
    good = [words_of(answer.content) for example in examples for answer in good_answers(example)]
    return Content(
        content.scripts_of(texts),
        Count(sum(map(content.is_broken, texts)), len(texts)),
        Count(sum(map(content.ends_in_an_answer, good)), len(good)),
        Count(sum(map(content.has_code, good)), len(good)),
        Count(tests, num_rows),
        Count(instructions, num_rows),
        Count(truths, num_rows),
        Count(sum(not example.is_chat for example in examples), len(examples)),
    )


def in_tokens(lengths: Lengths, prompt: Sequence[int], answers: Sequence[int], together: Sequence[int], share: float) -> Lengths:
    """The same lengths in tokens; what is compared (which answer is longer) stays as the characters say."""
    return replace(
        lengths, unit="tokens", prompt=Spread.of(prompt), answer=Spread.of(answers), together=Spread.of(together), prompt_share=share
    )
