"""Rows with two answers and a verdict on them: of one judge, or of several that vote."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.columns import asked, check_prompt, common_turns, fitted, turns_of, weight_of
from prefopt.data.examples import Answer, Conversation, Example, Fields, check_answer
from prefopt.data.kinds import Kind
from prefopt.data.rows import RowFault, clip
from prefopt.data.thumbs import label_of

COUPLES = (
    *((f"{noun}_a", f"{noun}_b") for noun in ("completion", "response", "answer", "output")),
    *((f"{noun}_1", f"{noun}_2") for noun in ("completion", "response", "answer", "output")),
    *((f"{noun}1", f"{noun}2") for noun in ("completion", "response", "answer", "output")),
    *((f"{noun}_0", f"{noun}_1") for noun in ("completion", "response", "answer", "output")),
)
"""What the two answers may be called; `_1` is the first beside `_2`, and the second beside `_0`."""

VERDICTS = ("preference", "winner", "label", "choice", "preferred", "better", "better_response_id")
"""What the verdict may be called."""

MOST_ANNOTATORS = 16
ANNOTATORS = tuple(f"annotator{number}" for number in range(1, MOST_ANNOTATORS + 1))

SIDE = re.compile(r"(?:(?:model|response|completion|answer|output|option|assistant)[-_ ]?|a(?=[12]$))?([ab012])")
GRADED = re.compile(r"([ab12])[-_ ]is[-_ ](?:(slightly|much|significantly|clearly)[-_ ])?better")
GRADES = {"slightly": 1.0, None: 2.0, "": 2.0}
STRONG = 3.0
TIES = frozenset({"tie", "tied", "draw", "equal", "same", "both", "neither", "both bad", "bothbad", "tie (bothbad)", "tie (both bad)"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was said of two answers.

    Attributes:
        winner: 0 for the first, 1 for the second; None: neither.
        grade: how much better: 1 slightly, 2, 3 much; None where that is not said.
    """

    winner: int | None
    grade: float | None = None


def is_verdict(value: object) -> bool:
    """A text or a number."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def comparison(row: Fields, kind: Kind) -> Example:
    """A prompt, two answers, and which of them is better."""
    couple = couple_of(row)
    name = row.first(VERDICTS) or VERDICTS[0]
    verdict = verdict_of(row.value(name), name, first=0 if couple[0].endswith("_0") else 1, lettered=couple[0].endswith("_a"))
    prompt, contents = fitted(asked(row), {side: row.value(side) for side in couple})
    columns = [f"{side}_is_acceptable" for side in couple]
    labels = [label_of(row.value(column), column) if row.has(column) else None for column in columns]
    return compared(row, prompt, contents, couple, verdict, labels)


def arguments(row: Fields, kind: Kind) -> Example:
    """Two arguments, `a1` and `a2`, and which convinces more; there is no prompt."""
    verdict = verdict_of(row.value("label"), "label", first=1, lettered=False)
    return compared(row, "", [row.text("a1"), row.text("a2")], ("a1", "a2"), verdict)


def arena(row: Fields, kind: Kind) -> Example:
    """Two whole conversations with the same questions, and which is better."""
    couple = ("conversation_a", "conversation_b")
    verdict = verdict_of(row.value("winner"), "winner", first=1, lettered=True)
    one, other = (turns_of(row.value(name), name, role="user") for name in couple)
    shared = common_turns(one, other, min(len(one), len(other)) - 1)
    return compared(row, one[:shared], [one[shared:], other[shared:]], couple, verdict)


def votes(row: Fields, kind: Kind) -> Example:
    """A prompt, two answers, and the votes of several annotators (1, 2, or 0 for neither): what most of them say."""
    couple = couple_of(row)
    cast = [verdict_of(row.value(name), name, first=1, lettered=False).winner for name in ANNOTATORS if row.has(name)]
    most = Counter(cast).most_common(2)
    decided = len(most) == 1 or most[0][1] > most[1][1]
    prompt, contents = fitted(asked(row), {side: row.value(side) for side in couple})
    return compared(row, prompt, contents, couple, Verdict(most[0][0] if decided else None))


def couple_of(row: Fields) -> tuple[str, str]:
    """What the row calls its two answers.

    Raises:
        RowFault: it has no two that go together.
    """
    found = next((couple for couple in COUPLES if all(name in row.columns for name in couple)), None)
    if found is None:
        raise RowFault("missing_field", f"no completion_a and completion_b, or the like; the row has {', '.join(map(clip, row.columns))}")
    return found


def verdict_of(value: Any, name: str, *, first: int, lettered: bool) -> Verdict:
    """What the column says.

    Args:
        value: a, b, 1, 2, such a letter or number behind the word for an answer, `a-is-slightly-better`, or a word for a tie.
        name: of the column.
        first: the number of the first answer. Where that is 1, a 0 is a tie,
        lettered: unless the answers have letters: then it could be the first or a tie, and is refused.

    Raises:
        RowFault: it says nothing that is known.
    """
    said = str(int(value)) if isinstance(value, float) and value.is_integer() else value
    said = str(said).strip().lower() if isinstance(said, str | int) and not isinstance(said, bool) else ""
    if said in TIES:
        return Verdict(None)
    if graded := GRADED.fullmatch(said):
        return Verdict("ab12".index(graded[1]) % 2, GRADES.get(graded[2], STRONG))
    if side := SIDE.fullmatch(said):
        if side[1] in "ab":
            return Verdict("ab".index(side[1]))
        number = int(side[1]) - first
        if number in (0, 1):
            return Verdict(number)
        if number == -1 and not lettered:
            return Verdict(None)
    raise RowFault(
        "unknown_verdict",
        f"`{name}` is {clip(value)}, and must say which is better: a, b, {first}, {first + 1}, a-is-better, or tie",
    )


def compared(
    row: Fields,
    prompt: str | Conversation,
    contents: Sequence[str | Conversation],
    names: Sequence[str],
    verdict: Verdict,
    labels: Sequence[bool | None] = (None, None),
) -> Example:
    """The two answers in the order of the verdict; how much the better one is so is its reward, and that of the other is 0.

    Raises:
        RowFault: an answer is blank, or both are the same.
    """
    check_prompt(prompt)
    for content, name in zip(contents, names, strict=True):
        check_answer(content, name)
    if contents[0] == contents[1]:
        raise RowFault("same_answers", f"`{names[0]}` and `{names[1]}` are the same")
    answers = [
        Answer(
            content,
            label=label,
            rank=0 if verdict.winner in (None, place) else 1,
            reward=None if verdict.grade is None else verdict.grade if verdict.winner == place else 0.0,
        )
        for place, (content, label) in enumerate(zip(contents, labels, strict=True))
    ]
    return Example(prompt, tuple(reversed(answers) if verdict.winner == 1 else answers), weight=weight_of(row))
