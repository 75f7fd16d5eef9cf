"""The shapes in which people keep preferences and demonstrations, each a small function and a line of the table.

A format reads a row's `Fields` and gives an `Example`. To add one: write its function, add its line
to `FORMATS`, add its case to `tests/data/test_formats.py`. The order of the table is the precedence:
a row that fits several formats is read by the first.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.data.examples import Answer, Conversation, Example, Fields, Message, check_answer, conversation_of, text_of
from prefopt.data.rows import RowFault, clip

Kind = Literal["demonstration", "pair"]
Side = Literal["chosen", "rejected"]
Test = Callable[[Any], bool]

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
COMMON_FIELDS = ("weight", "reference_chosen_logp", "reference_rejected_logp")
"""Columns that every format reads where they are there (the reference's in pairs only)."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write an example down.

    Attributes:
        name: what `data_format` calls it.
        kind: whether its rows are pairs or demonstrations; pairs also serve as demonstrations of their chosen answer.
        needs: the columns that must be there, each with the test that its value must pass to be recognised.
        optional: further columns that it reads.
        read: one row as an example, of the kind asked for.
        says: what it is, in words for the terminal.
    """

    name: str
    kind: Kind
    needs: Mapping[str, Test]
    optional: tuple[str, ...]
    read: Callable[[Fields, Kind], Example]
    says: str

    def fits(self, columns: Mapping[str, Any]) -> bool:
        """Whether the row has the columns of this format, of the right shape."""
        return all(name in columns and test(columns[name]) for name, test in self.needs.items())

    @property
    def fields(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return (*self.needs, *self.optional, *COMMON_FIELDS)


def is_text(value: object) -> bool:
    """A text."""
    return isinstance(value, str)


def is_transcript(value: object) -> bool:
    """A text that begins with a speaker of HH."""
    return isinstance(value, str) and SPEAKER.match(value) is not None


def is_turns(value: object) -> bool:
    """A list of turns."""
    return isinstance(value, list) and bool(value) and all(is_turn(turn) for turn in value)


def is_turn(value: object) -> bool:
    """An object with a role, or `from`."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def is_prompt(value: object) -> bool:
    """A text or a list of turns."""
    return is_text(value) or is_turns(value)


def is_answer(value: object) -> bool:
    """A text, a turn or a list of turns."""
    return is_prompt(value) or is_turn(value)


def is_chat_answer(value: object) -> bool:
    """A turn or a list of turns."""
    return is_turns(value) or is_turn(value)


# One function per format.


def text_pair(row: Fields, kind: Kind) -> Example:
    """`prompt`, `chosen` and `rejected` as text."""
    prompt = row.text("prompt")
    return pair(row, kind, lambda side: (prompt, row.text(side)))


def chat_pair(row: Fields, kind: Kind) -> Example:
    """`prompt` as text or messages; `chosen` and `rejected` as text, a turn, messages, or the whole conversation again."""
    prompt = turns_of(row.value("prompt"), "prompt", role="user")
    return pair(row, kind, lambda side: (prompt, without_prompt(turns_of(row.value(side), side, role="assistant"), prompt, side)))


def conversation_pair(row: Fields, kind: Kind) -> Example:
    """`chosen` and `rejected` as whole conversations; the prompt is what they begin with in common."""
    sides = {side: row.conversation(side) for side in sides_of(kind)}
    shared = min(len(conversation) for conversation in sides.values()) - 1
    if kind == "pair":
        shared = common_turns(sides["chosen"], sides["rejected"], shared)
    return pair(row, kind, lambda side: (sides[side][:shared], sides[side][shared:]))


def hh_pair(row: Fields, kind: Kind) -> Example:
    """`chosen` and `rejected` as transcripts of `\\n\\nHuman:` and `\\n\\nAssistant:`; the last answer is the completion."""
    sides = {side: transcript(row.text(side), side) for side in sides_of(kind)}
    return pair(row, kind, lambda side: (sides[side][:-1], sides[side][-1:]))


def sharegpt_pair(row: Fields, kind: Kind) -> Example:
    """`conversations` of from/value turns as the prompt, `chosen` and `rejected` as a turn or text."""
    prompt = with_system(row, row.conversation("conversations"))
    return pair(row, kind, lambda side: (prompt, turns_of(row.value(side), side, role="assistant")))


def instruction_pair(row: Fields, kind: Kind) -> Example:
    """Alpaca's `instruction` and `input`, with `chosen` and `rejected`."""
    prompt = instruction_prompt(row)
    return pair(row, kind, lambda side: (prompt, (Message("assistant", row.text(side)),)))


def messages_demonstration(row: Fields, kind: Kind) -> Example:
    """`messages` that end with the assistant."""
    turns = row.conversation("messages")
    return demonstration(row, turns[:-1], turns[-1:], "messages")


def sharegpt_demonstration(row: Fields, kind: Kind) -> Example:
    """`conversations` of from/value turns that end with gpt."""
    turns = with_system(row, row.conversation("conversations"))
    return demonstration(row, turns[:-1], turns[-1:], "conversations")


def text_completion(row: Fields, kind: Kind) -> Example:
    """`prompt` and `completion` as text."""
    return demonstration(row, row.text("prompt"), row.text("completion"), "completion")


def chat_completion(row: Fields, kind: Kind) -> Example:
    """`prompt` and `completion`, at least one of them as messages."""
    prompt = turns_of(row.value("prompt"), "prompt", role="user")
    return demonstration(row, prompt, turns_of(row.value("completion"), "completion", role="assistant"), "completion")


def instruction_demonstration(row: Fields, kind: Kind) -> Example:
    """Alpaca's `instruction`, `input` and `output`."""
    return demonstration(row, instruction_prompt(row), (Message("assistant", row.text("output")),), "output")


def plain_text(row: Fields, kind: Kind) -> Example:
    """`text`, learned from its first token on."""
    return demonstration(row, "", row.text("text"), "text")


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
        {"prompt": is_text, "chosen": is_text, "rejected": is_text},
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
        {"instruction": is_text, "chosen": is_text, "rejected": is_text},
        ("input", "system"),
        instruction_pair,
        "instruction and input with chosen and rejected answers",
    ),
    Format("messages", "demonstration", {"messages": is_turns}, (), messages_demonstration, "conversations in messages"),
    Format("sharegpt", "demonstration", {"conversations": is_turns}, ("system",), sharegpt_demonstration, "ShareGPT conversations"),
    Format(
        "text_completion", "demonstration", {"prompt": is_text, "completion": is_text}, (), text_completion, "prompt and completion as text"
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
        {"instruction": is_text, "output": is_text},
        ("input", "system"),
        instruction_demonstration,
        "instruction, input and output",
    ),
    Format("text", "demonstration", {"text": is_text}, (), plain_text, "plain text"),
)


# What the functions share.


def sides_of(kind: Kind) -> tuple[Side, ...]:
    """The answers of a pair that are read: as a demonstration its chosen one only."""
    return ("chosen", "rejected") if kind == "pair" else ("chosen",)


def pair(row: Fields, kind: Kind, read: Callable[[Side], tuple[str | Conversation, str | Conversation]]) -> Example:
    """A chosen and a rejected answer to one prompt; or a demonstration of the chosen one.

    Args:
        row: its columns.
        kind: what is asked for.
        read: gives the prompt and the answer of one side.

    Raises:
        RowFault: the prompts differ, an answer is blank, or the two are the same.
    """
    prompt, chosen = read("chosen")
    if kind == "demonstration":
        return demonstration(row, prompt, chosen, "chosen")
    check_prompt(prompt)
    check_answer(chosen, "chosen")
    other_prompt, rejected = read("rejected")
    check_answer(rejected, "rejected")
    if prompt != other_prompt:
        raise RowFault("prompts_differ", f"chosen and rejected answer different prompts, {where_they_part(prompt, other_prompt)}")
    if chosen == rejected:
        raise RowFault("same_answers", "chosen and rejected are the same")
    answers = (
        Answer(chosen, rank=0, reference_logp=row.number("reference_chosen_logp", maximum=0)),
        Answer(rejected, rank=1, reference_logp=row.number("reference_rejected_logp", maximum=0)),
    )
    if (answers[0].reference_logp is None) != (answers[1].reference_logp is None):
        raise RowFault("missing_field", "the row has one of reference_chosen_logp and reference_rejected_logp, and needs both or none")
    return Example(prompt, answers, weight=weight_of(row))


def demonstration(row: Fields, prompt: str | Conversation, answer: str | Conversation, name: str) -> Example:
    """A prompt with the answer to learn.

    Raises:
        RowFault: no prompt before the answer, or a blank answer.
    """
    check_answer(answer, name)
    check_prompt(prompt)
    return Example(prompt, (Answer(answer),), weight=weight_of(row))


def check_prompt(prompt: str | Conversation) -> None:
    """A chat needs a turn before its answer; raw text may begin with nothing.

    Raises:
        RowFault: there is no turn.
    """
    if prompt == ():
        raise RowFault("no_prompt", "no turn stands before the answer")


def weight_of(row: Fields) -> float:
    """The example's weight; 1 where the row gives none.

    Raises:
        RowFault: negative, or no finite number.
    """
    weight = row.number("weight", minimum=0)
    return 1.0 if weight is None else weight


def turns_of(value: object, name: str, *, role: str) -> Conversation:
    """Messages as they are, text as one turn of that role."""
    return (Message(role, text_of(value, name)),) if isinstance(value, str) else conversation_of(value, name)


def without_prompt(turns: Conversation, prompt: Conversation, name: str) -> Conversation:
    """The answer's turns; a conversation that repeats the prompt loses it.

    Raises:
        RowFault: it begins with another prompt.
    """
    if turns[0].role == "assistant":
        return turns
    if turns[: len(prompt)] == prompt:
        return turns[len(prompt) :]
    raise RowFault(
        "prompts_differ", f"`{name}` begins with a turn of the {turns[0].role} that is not the prompt's: {clip(turns[0].content)}"
    )


def common_turns(chosen: Conversation, rejected: Conversation, limit: int) -> int:
    """How many whole turns the two begin with in common.

    Raises:
        RowFault: they part at a turn that is not the assistant's in both.
    """
    shared = next((index for index in range(limit) if chosen[index] != rejected[index]), limit)
    if {chosen[shared].role, rejected[shared].role} != {"assistant"}:
        if chosen[shared] == rejected[shared]:
            raise RowFault("no_answer", f"no answer of the assistant follows the {shared} turns that chosen and rejected share")
        raise RowFault("prompts_differ", f"chosen and rejected part at turn {shared + 1}, before an answer of the assistant")
    return shared


def transcript(text: str, name: str) -> Conversation:
    """The turns of an HH transcript; one space after a speaker's colon belongs to the format.

    Raises:
        RowFault: it does not begin with a speaker, or has no turn of the assistant at its end.
    """
    parts = SPEAKER.split(text)
    if parts[0].strip() or len(parts) == 1:
        raise RowFault("wrong_type", f"`{name}` does not begin with `\\n\\nHuman:` or `\\n\\nAssistant:` but with {clip(text[:40])}")
    speakers = {"Human": "user", "Assistant": "assistant"}
    turns = tuple(Message(speakers[speaker], content.removeprefix(" ")) for speaker, content in zip(parts[1::2], parts[2::2], strict=True))
    if turns[-1].role != "assistant":
        raise RowFault("no_answer", f"`{name}` ends with a turn of Human, and must end with the Assistant's")
    return turns


def instruction_prompt(row: Fields) -> Conversation:
    """Alpaca's prompt as a chat: the system text where there is one, then instruction and input in one turn."""
    request = row.text("instruction")
    if row.has("input") and row.text("input").strip():
        request = f"{request}\n\n{row.text('input')}"
    return with_system(row, (Message("user", request),))


def with_system(row: Fields, turns: Conversation) -> Conversation:
    """The turns after the row's `system` text, where it has one and they do not begin with their own."""
    if turns[0].role == "system" or not row.has("system") or not row.text("system").strip():
        return turns
    return (Message("system", row.text("system")), *turns)


def where_they_part(one: str | Conversation, other: str | Conversation) -> str:
    """Where two prompts part, for a message."""
    if isinstance(one, str) or isinstance(other, str):
        return "as text"
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return f"from turn {index + 1} on: {clip(left.content[:60])} | {clip(right.content[:60])}"
    return f"of {len(one)} and {len(other)} turns"
