"""The shapes in which people keep preferences, thumbs, rankings and demonstrations, each a small function and a line of the table.

A format reads a row's `Fields` and gives an `Example` with all that the row says: labels, ranks, scores. What that is as the kind of
data that was asked for is the business of `kinds`. To add one: write its function beside those of its kind (`pairs`, `comparisons`,
`ranked`, `message_trees`, `thumbs`, `demonstrations`), add its line to `FORMATS`, add its case to `tests/data/test_formats.py`. The
order of the table is the precedence: a row that fits several formats is read by the first.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt.data.columns import PROMPTS, is_answer, is_list, is_numbers, is_prompt, is_text, is_text_answer, is_transcript, is_turns
from prefopt.data.comparisons import ANNOTATORS, COUPLES, VERDICTS, arena, arguments, comparison, is_verdict, votes
from prefopt.data.demonstrations import (
    chat_completion,
    instruction_demonstration,
    messages_demonstration,
    plain_text,
    sharegpt_demonstration,
    text_completion,
    text_segments,
)
from prefopt.data.examples import Example, Fields, tools_of
from prefopt.data.kinds import SERVES, Kind, PairsOfRanks, as_kind
from prefopt.data.learning import check_learned
from prefopt.data.marks import is_parts
from prefopt.data.message_trees import is_tree, message_tree
from prefopt.data.pairs import PAIR_FIELDS, chat_pair, conversation_pair, hh_pair, instruction_pair, sharegpt_pair, text_pair
from prefopt.data.ranked import RANKS, SCORES, is_rated, ranked_completions, rated_completions, scored_completions
from prefopt.data.rows import RowFault
from prefopt.data.thumbs import (
    LABELS,
    LISTS,
    SOLUTIONS,
    gsm8k_solutions,
    instruction_label,
    is_label,
    is_labels,
    is_solution,
    labelled_completions,
    messages_label,
    sharegpt_label,
    text_label,
)

__all__ = ["COMMON_FIELDS", "FORMATS", "Format", "Kind"]

Test = Callable[[Any], bool]

COMMON_FIELDS = ("weight", "tools", *PAIR_FIELDS)
"""Columns that are read where they are there: the first two by every format, the others by those with `chosen` and `rejected`."""

FIRSTS = tuple(first for first, _ in COUPLES)
SECONDS = tuple(second for _, second in COUPLES)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write an example down.

    Attributes:
        name: what `data_format` calls it.
        kind: what its rows are; `SERVES` says as what else they are read.
        needs: the columns that must be there, each with the test that its value must pass to be recognised.
        optional: further columns that it reads.
        read: one row as an example with all that it says; as several examples (or faults) where it holds several prompts. It is
            told the kind that is asked for: of a demonstration the other answers need not be right.
        says: what it is, in words for the terminal.
        spelled: what else a needed column may be called.
        also: further kinds as which its rows are read.
    """

    name: str
    kind: Kind
    needs: Mapping[str, Test]
    optional: tuple[str, ...]
    read: Callable[[Fields, Kind], Example | Sequence[Example | RowFault]]
    says: str
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    also: frozenset[Kind] = frozenset()

    def fits(self, columns: Mapping[str, Any]) -> bool:
        """Whether the row has the columns of this format, of the right shape."""
        return all(test(self.value_of(name, columns)) for name, test in self.needs.items())

    def has(self, need: str, columns: Collection[str]) -> bool:
        """Whether a needed column is there, under one of its names."""
        return any(name in columns for name in self.names_of(need))

    def value_of(self, need: str, columns: Mapping[str, Any]) -> Any:
        """A needed column's value under the first of its names that is there and not null, which is the one that is read."""
        return next((columns[name] for name in self.names_of(need) if columns.get(name) is not None), None)

    def names_of(self, need: str) -> tuple[str, ...]:
        """What a needed column may be called."""
        return self.spelled.get(need, (need,))

    def serves(self, kind: Kind) -> bool:
        """Whether its rows are read as that kind."""
        return kind in SERVES[self.kind] | self.also

    def examples(self, row: Fields, kind: Kind, pairs_of_ranks: PairsOfRanks = "all") -> list[Example | RowFault]:
        """All that a row is as that kind: at least one example, or why it is none.

        Raises:
            RowFault: the row as a whole cannot be read.
        """
        found = self.read(row, kind)
        tools = tools_of(row)
        made: list[Example | RowFault] = []
        for entry in [found] if isinstance(found, Example) else found:
            made += [entry] if isinstance(entry, RowFault) else as_kind(replace(entry, tools=tools), kind, pairs_of_ranks)
        for example in made:
            if isinstance(example, Example) and kind != "demonstration":
                check_learned(example)
        return made

    @property
    def fields(self) -> tuple[str, ...]:
        """All columns that it reads."""
        common = COMMON_FIELDS if {"chosen", "rejected"} <= self.needs.keys() else COMMON_FIELDS[:2]
        return (*dict.fromkeys(name for need in self.needs for name in self.names_of(need)), *self.optional, *common)


FORMATS: tuple[Format, ...] = (
    Format(
        "hh",
        "pair",
        {"chosen": is_transcript, "rejected": is_transcript},
        (),
        hh_pair,
        "HH transcripts (Human:/Assistant:) in chosen and rejected",
    ),
    Format(
        "sharegpt_pair",
        "pair",
        {"conversations": is_turns, "chosen": is_answer, "rejected": is_answer},
        ("system",),
        sharegpt_pair,
        "ShareGPT conversations with chosen and rejected answers",
    ),
    Format(
        "text_pair",
        "pair",
        {"prompt": is_text, "chosen": is_text_answer, "rejected": is_text_answer},
        (),
        text_pair,
        "prompt, chosen and rejected as text",
    ),
    Format(
        "chat_pair",
        "pair",
        {"prompt": is_prompt, "chosen": is_answer, "rejected": is_answer},
        (),
        chat_pair,
        "prompt with chosen and rejected answers as chat messages",
    ),
    Format(
        "conversation_pair",
        "pair",
        {"chosen": is_turns, "rejected": is_turns},
        (),
        conversation_pair,
        "chosen and rejected as whole conversations; the prompt is what both begin with",
    ),
    Format(
        "instruction_pair",
        "pair",
        {"instruction": is_text, "chosen": is_text_answer, "rejected": is_text_answer},
        ("input", "system"),
        instruction_pair,
        "instruction and input with chosen and rejected answers",
    ),
    Format(
        "comparison",
        "pair",
        {"prompt": is_prompt, "completion_a": is_answer, "completion_b": is_answer, "preference": is_verdict},
        (*(f"{name}_is_acceptable" for couple in COUPLES for name in couple), "input", "system"),
        comparison,
        "a prompt with two answers and a verdict on them",
        {"prompt": PROMPTS, "completion_a": FIRSTS, "completion_b": SECONDS, "preference": VERDICTS},
    ),
    Format(
        "votes",
        "pair",
        {"prompt": is_prompt, "completion_a": is_answer, "completion_b": is_answer, "annotator1": is_verdict},
        (*ANNOTATORS[1:], "input", "system"),
        votes,
        "a prompt with two answers and the votes of annotators",
        {"prompt": PROMPTS, "completion_a": FIRSTS, "completion_b": SECONDS},
    ),
    Format(
        "arena",
        "pair",
        {"conversation_a": is_turns, "conversation_b": is_turns, "winner": is_verdict},
        (),
        arena,
        "two whole conversations with the same questions and a verdict on them",
    ),
    Format(
        "arguments",
        "pair",
        {"a1": is_text, "a2": is_text, "label": is_verdict},
        (),
        arguments,
        "two arguments and which convinces more; there is no prompt",
    ),
    Format(
        "ranked_completions",
        "ranked",
        {"prompt": is_prompt, "completions": is_list, "ranks": is_numbers},
        ("input", "system"),
        ranked_completions,
        "a prompt with a list of answers and their ranks",
        {"prompt": PROMPTS, "completions": LISTS, "ranks": RANKS},
    ),
    Format(
        "scored_completions",
        "ranked",
        {"prompt": is_prompt, "completions": is_list, "scores": is_numbers},
        ("input", "system"),
        scored_completions,
        "a prompt with a list of answers and their scores",
        {"prompt": PROMPTS, "completions": LISTS, "scores": SCORES},
    ),
    Format(
        "rated_completions",
        "ranked",
        {"prompt": is_prompt, "completions": is_rated},
        ("input", "system"),
        rated_completions,
        "a prompt with a list of answers, each with its rank or score",
        {"prompt": PROMPTS, "completions": LISTS},
    ),
    Format(
        "message_tree",
        "ranked",
        {"prompt": is_tree},
        (),
        message_tree,
        "trees of messages with ranked replies and votes",
        also=frozenset({"thumbs"}),
    ),
    Format(
        "text_label",
        "thumbs",
        {"prompt": is_prompt, "completion": is_answer, "label": is_label},
        ("input", "system"),
        text_label,
        "prompt and completion with a label",
        {"prompt": PROMPTS, "label": LABELS},
    ),
    Format(
        "messages_label",
        "thumbs",
        {"messages": is_turns, "label": is_label},
        (),
        messages_label,
        "conversations in messages with a label",
        {"label": LABELS},
    ),
    Format(
        "sharegpt_label",
        "thumbs",
        {"conversations": is_turns, "label": is_label},
        ("system",),
        sharegpt_label,
        "ShareGPT conversations with a label",
        {"label": LABELS},
    ),
    Format(
        "instruction_label",
        "thumbs",
        {"instruction": is_text, "output": is_text_answer, "label": is_label},
        ("input", "system"),
        instruction_label,
        "instruction, input and output with a label",
        {"label": LABELS},
    ),
    Format(
        "labelled_completions",
        "thumbs",
        {"prompt": is_prompt, "completions": is_list, "labels": is_labels},
        ("input", "system"),
        labelled_completions,
        "a prompt with a list of answers and their labels",
        {"prompt": PROMPTS, "completions": LISTS},
    ),
    Format(
        "gsm8k_solutions",
        "thumbs",
        {"question": is_text, **dict.fromkeys(SOLUTIONS, is_solution)},
        ("ground_truth",),
        gsm8k_solutions,
        "questions of GSM8K with models' solutions, right and wrong",
    ),
    Format("messages", "demonstration", {"messages": is_turns}, (), messages_demonstration, "conversations in messages"),
    Format("sharegpt", "demonstration", {"conversations": is_turns}, ("system",), sharegpt_demonstration, "ShareGPT conversations"),
    Format(
        "text_completion",
        "demonstration",
        {"prompt": is_text, "completion": is_text_answer},
        (),
        text_completion,
        "prompt and completion as text",
    ),
    Format(
        "chat_completion",
        "demonstration",
        {"prompt": is_prompt, "completion": is_answer},
        (),
        chat_completion,
        "prompt and completion as chat messages",
    ),
    Format(
        "instruction",
        "demonstration",
        {"instruction": is_text, "output": is_text_answer},
        ("input", "system"),
        instruction_demonstration,
        "instruction, input and output",
    ),
    Format("text", "demonstration", {"text": is_text_answer}, (), plain_text, "plain text"),
    Format("segments", "demonstration", {"segments": is_parts}, (), text_segments, "segments of text, each labelled as learned or not"),
)
