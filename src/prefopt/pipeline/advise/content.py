"""What stands in texts, as far as counting words and patterns can tell: languages, and what a program could check."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from prefopt.data.examples import Conversation

SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "HANGUL": "Hangul"}
"""Unicode's name for the characters of a script, where it is not what people call the script."""

FREQUENT = {
    "English": "the and of to is that for with you this are it how what can your",
    "German": "der die und das ist nicht ich ein eine zu mit auf",
    "French": "le la les des est et que une dans pour pas qui",
    "Spanish": "el los las es que una por para con del como se",
    "Italian": "il di che è per una gli sono della con del non",
    "Portuguese": "o os que não uma para com são da em é ao pelo",
    "Dutch": "de het een en van is dat niet met voor zijn op",
}
"""Languages in Latin letters -> some of their most frequent words."""

LANGUAGE_OF: Mapping[str, tuple[str, ...]] = {
    word: tuple(name for name, words in FREQUENT.items() if word in words.split()) for text in FREQUENT.values() for word in text.split()
}

TELLS = 0.05
"""Share of words that are frequent ones of a language from which on a text is in it: every fourth to sixth word of one is."""

LOOKED_AT = 2000
"""Characters of a text whose language is looked at."""

FINAL = re.compile(r"\\boxed\s*\{|(?:####\s*|answer(?: is|:)\s*\**\s*\$?)-?[\d.,/\\$ ]*\d", re.IGNORECASE)
"""A final answer: in `\\boxed{}` as in MATH; a number after `####` as in GSM8K, or one that is said to be the answer."""

AT_THE_END = 200
"""Last characters of an answer among which a final one is looked for."""

CODE = re.compile(r"```|^\s*(?:def |class |import |from \w+ import |#include|public class |function \w+\()", re.MULTILINE)
TEST_COLUMNS = frozenset({"test", "tests", "test_list", "test_cases", "unit_tests", "input_output", "public_tests", "private_tests"})
CONSTRAINT_COLUMNS = frozenset({"instruction_id_list", "constraints", "verifiers"})
TRUTH_COLUMNS = frozenset({"ground_truth", "reference_answer", "final_answer", "gold_answer"})
"""Columns that bring what a checker needs: tests of code, names of constraints as in IFEval, the right answer."""

COLUMNS = TEST_COLUMNS | CONSTRAINT_COLUMNS | TRUTH_COLUMNS


def words_of(content: str | Conversation) -> str:
    """Text as it is; turns one after the other, without their roles."""
    return content if isinstance(content, str) else "\n\n".join(message.content for message in content)


@cache
def script_of(character: str) -> str:
    """The script of a letter, by the first word of its name in Unicode; empty for what is no letter."""
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "?").split(" ")[0].split("-")[0]
    return SCRIPTS.get(first, first.capitalize())


def latin_language(text: str) -> str:
    """The language of a text in Latin letters, by two or more of its most frequent words; "Latin" where they do not tell."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    found: Counter[str] = Counter()
    different: Counter[str] = Counter()
    for word, number in Counter(words).items():
        for name in LANGUAGE_OF.get(word, ()):
            found[name] += number
            different[name] += 1
    ((name, number),) = found.most_common(1) or [("", 0)]
    return name if number > TELLS * len(words) and different[name] > 1 else "Latin"


def languages_of(texts: Iterable[str]) -> dict[str, float]:
    """Share of all letters that belongs to each language in Latin letters, and to each other script, the largest first.

    Texts too short to tell are looked at together.
    """
    counted: Counter[str] = Counter()
    short = []
    for text in texts:
        start = text[:LOOKED_AT]
        own: Counter[str] = Counter()
        for character, number in Counter(start).items():
            if script := script_of(character):
                own[script] += number
        if latin := own.pop("Latin", 0):
            own[language := latin_language(start)] += latin
            short += [start] if language == "Latin" else []
        counted.update(own)
    if untold := counted.pop("Latin", 0):
        counted[latin_language(" ".join(short))] += untold
    total = counted.total()
    return {name: number / total for name, number in counted.most_common()}


def ends_in_an_answer(answer: str) -> bool:
    """Whether the answer ends with a final one that could be compared with the right one."""
    return FINAL.search(answer[-AT_THE_END:]) is not None


def has_code(answer: str) -> bool:
    """Whether there is code in the answer."""
    return CODE.search(answer) is not None


def brings(columns: Mapping[str, Any], names: frozenset[str]) -> bool:
    """Whether one of these columns is there and says something."""
    return any(name in names and value not in (None, "", [], {}) for name, value in columns.items())
