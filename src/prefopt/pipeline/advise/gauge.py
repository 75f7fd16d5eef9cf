"""Figures of examples whose text is at hand."""

from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import replace

from prefopt.data.examples import Answer, Example
from prefopt.data.kinds import as_pairs
from prefopt.data.rows import RowFault
from prefopt.pipeline.advise import content
from prefopt.pipeline.advise.alike import clusters, likeness, runs_of
from prefopt.pipeline.advise.content import words_of
from prefopt.pipeline.advise.facts import Content, Count, Lengths, Spread
from prefopt.pipeline.advise.noise import Agreement, agreement_of, verdicts_by_pair

SMALL_EDIT = 0.5
"""Likeness from which on two answers to one prompt are the same but for an edit: about one word in fifteen is another."""

CLOSE = 0.01
"""Difference between two rates of wrong verdicts that does not matter."""

Couple = tuple[str, str]


def couples_of(example: Example) -> list[Couple]:
    """The texts of each better and worse answer that an example holds; none of a single answer."""
    made = as_pairs(example, "all") if len(example.answers) > 1 else []
    pairs = [entry.answers for entry in made if not isinstance(entry, RowFault)]
    return [(words_of(one.content), words_of(other.content)) for one, other in pairs]


def good_answers(example: Example) -> list[Answer]:
    """Those that should be given: the best, what has a thumb up, the one that there is."""
    if len(example.answers) == 1:
        return [answer for answer in example.answers if answer.label is not False]
    return [answer for answer in example.answers if answer.rank == example.answers[0].rank]


def lengths_of(examples: Sequence[Example]) -> Lengths:
    """How long they are, in characters."""
    prompts = [len(words_of(example.prompt)) for example in examples]
    answers = [[len(words_of(answer.content)) for answer in example.answers] for example in examples]
    every = [number for own in answers for number in own]
    read = sum(prompt * len(own) for prompt, own in zip(prompts, answers, strict=True))
    decided = [len(one) > len(other) for example in examples for one, other in couples_of(example) if len(one) != len(other)]
    return Lengths(
        "characters",
        Spread.of(prompts),
        Spread.of(every),
        Spread.of([prompt + max(own) for prompt, own in zip(prompts, answers, strict=True)]),
        read / max(1, read + sum(every)),
        Count(sum(decided), len(decided)),
    )


def agreement(examples: Sequence[Example], votes: Sequence[list[int]], ties: int = 0, copies: Set[str] = frozenset()) -> Agreement:
    """How far verdicts on the same answers agree. A row that is there twice is one verdict, which somebody copied.

    Args:
        examples: of which several may judge the same answers.
        votes: of rows that have several for one of the answers; where there are any, they are what is looked at.
        ties: votes for neither.
        copies: places of examples whose row is the same as an earlier one in every column.
    """
    if votes:
        return agreement_of(votes, together=True, ties=ties)
    judged = [(example.location in copies, (words_of(example.prompt), *couple)) for example in examples for couple in couples_of(example)]
    found = agreement_of(verdicts_by_pair(verdict for is_copy, verdict in judged if not is_copy), together=False)
    every = agreement_of(verdicts_by_pair(verdict for _, verdict in judged), together=False)
    return found if are_told_apart(found, every) else replace(found, if_verdicts=every.error)


def are_told_apart(found: Agreement, every: Agreement) -> bool:
    """Whether copies are known to be copies, or make no difference.

    Without a column that says who judged, verdicts that agree are equal rows, as copies are. Where there is one, those that agree stand
    beside those that do not: of pairs half of the couples or more, since verdicts are better than coins.

    Args:
        found: agreement without copies.
        every: agreement with copies as verdicts.
    """
    if abs(found.error - every.error) < CLOSE:
        return True
    return 2 * found.agree >= found.couples


def graded_of(examples: Sequence[Example]) -> tuple[Count, int]:
    """Prompts of which some answers are up and others down, and the pairs of one of each that they give."""
    by_prompt: defaultdict[str, Counter[bool]] = defaultdict(Counter)
    for example in examples:
        by_prompt[words_of(example.prompt)].update(answer.label for answer in example.answers if answer.label is not None)
    pairs = [min(found[True], found[False]) for found in by_prompt.values()]
    return Count(sum(number > 0 for number in pairs), len(pairs)), sum(pairs)


def content_of(examples: Sequence[Example], num_copies: int | None, tests: Count, constraints: Count, truths: Count) -> Content:
    """What the texts are.

    Args:
        examples: whose texts are looked at.
        num_copies: of examples, where those are counted by more than their texts.
        tests, constraints, truths: of all examples, those with columns of that kind.
    """
    whole = ["\n\n".join(parts_of(example)) for example in examples]
    distinct = list(dict(zip(whole, examples, strict=True)).values())
    good = [words_of(answer.content) for example in examples for answer in good_answers(example)]
    likenesses = [likeness(runs_of(one), runs_of(other)) for example in examples for one, other in couples_of(example)]
    return Content(
        languages=content.languages_of(whole),
        raw=Count(sum(not example.is_chat for example in examples), len(examples)),
        repeated=Count(len(whole) - len(distinct) if num_copies is None else num_copies, len(whole)),
        near=Count(num_near(distinct), len(distinct)),
        alike=Count(sum(found >= SMALL_EDIT for found in likenesses), len(likenesses)),
        numeric=Count(sum(map(content.ends_in_an_answer, good)), len(good)),
        code=Count(sum(map(content.has_code, good)), len(good)),
        tests=tests,
        constraints=constraints,
        truths=truths,
        unprompted=Count(sum(not words_of(example.prompt).strip() for example in examples), len(examples)),
    )


def parts_of(example: Example) -> list[str]:
    """The texts of prompt and answers, in their order."""
    return [words_of(example.prompt), *(words_of(answer.content) for answer in example.answers)]


def num_near(examples: Sequence[Example]) -> int:
    """Examples of which the prompt and each answer, in their order, are near copies of those of an earlier one."""
    parts = [parts_of(example) for example in examples]
    texts = list(dict.fromkeys(text for own in parts for text in own))
    root = dict(zip(texts, clusters(texts), strict=True))
    return len(parts) - len({tuple(root[text] for text in own) for own in parts})
