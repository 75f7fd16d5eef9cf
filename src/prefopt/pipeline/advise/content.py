"""What stands in texts, as far as counting characters and patterns can tell: scripts, and what a program could check."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from prefopt.data.examples import Conversation, Example

SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "HANGUL": "Hangul"}
"""Unicode's name for the characters of a script, where it is not what people call the script."""

LOOKED_AT = 2000
"""Characters of a text whose script is looked at."""

FINAL = re.compile(r"\\boxed\s*\{|(?:####\s*|answer(?: is|:)\s*\**\s*\$?)-?[\d.,/\\$ ]*\d", re.IGNORECASE)
"""A final answer: in `\\boxed{}` as in MATH; a number after `####` as in GSM8K, or one that is said to be the answer."""

AT_THE_END = 200
"""Last characters of an answer among which a final one is looked for."""

CODE = re.compile(r"```|^\s*(?:def |class |import |from \w+ import |#include|public class |function \w+\()", re.MULTILINE)
TEST_COLUMNS = frozenset({"test", "tests", "test_list", "test_cases", "unit_tests", "input_output", "public_tests", "private_tests"})
INSTRUCTION_COLUMNS = frozenset({"instruction_id_list", "constraints", "verifiers"})
TRUTH_COLUMNS = frozenset({"ground_truth", "reference_answer", "final_answer", "gold_answer"})
"""Columns that bring what a checker needs: tests of code, names of constraints as in IFEval, the right answer."""

BROKEN = re.compile(r"\ufffd|â€|Ã[\x80-\xbf©¨¤¶¼]|ï¿½")
"""Characters that were lost, or UTF-8 that was once read as Latin-1 or Windows-1252."""


def words_of(content: str | Conversation) -> str:
    """Text as it is; turns one after the other, without their roles."""
    return content if isinstance(content, str) else "\n\n".join(message.content for message in content)


def asked_last(example: Example) -> str:
    """What was asked last, whatever was said before."""
    if isinstance(example.prompt, str):
        return example.prompt
    return next((message.content for message in reversed(example.prompt) if message.role == "user"), words_of(example.prompt))


@cache
def script_of(character: str) -> str:
    """The script of a letter, by the first word of its name in Unicode; empty for what is no letter."""
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "?").split(" ")[0].split("-")[0]
    return SCRIPTS.get(first, first.capitalize())


def scripts_of(texts: Iterable[str]) -> dict[str, float]:
    """Share of all letters that belongs to each script, the most frequent first."""
    counted: Counter[str] = Counter()
    for text in texts:
        for character, number in Counter(text[:LOOKED_AT]).items():
            if script := script_of(character):
                counted[script] += number
    total = counted.total()
    return {script: number / total for script, number in counted.most_common()}


def ends_in_an_answer(answer: str) -> bool:
    """Whether the answer ends with a final one that could be compared with the right one."""
    return FINAL.search(answer[-AT_THE_END:]) is not None


def has_code(answer: str) -> bool:
    """Whether there is code in the answer."""
    return CODE.search(answer) is not None


def is_broken(text: str) -> bool:
    """Whether characters of the text were lost or mistaken."""
    return BROKEN.search(text) is not None


def brings(columns: Mapping[str, Any], names: frozenset[str]) -> bool:
    """Whether one of these columns is there and says something."""
    return any(name in names and value not in (None, "", [], {}) for name, value in columns.items())
