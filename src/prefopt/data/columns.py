"""What readers of rows share: tests of columns, and columns as prompts, turns and answers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.examples import Conversation, Fields, Message, answer_of, conversation_of, kind_of, text_of
from prefopt.data.marks import is_parts
from prefopt.data.rows import RowFault, clip

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
"""Where a turn of an HH transcript begins. The first turn may come without line breaks, and is given its own: one literal is found four
times as fast as a choice of two openings."""

PROMPTS = ("prompt", "instruction", "question")
"""What a prompt may be called where several names are read."""


def is_text(value: object) -> bool:
    """A text."""
    return isinstance(value, str)


def is_transcript(value: object) -> bool:
    """A text that begins with a speaker of HH."""
    return isinstance(value, str) and value.removeprefix("\n\n").startswith(("Human:", "Assistant:"))


def is_turns(value: object) -> bool:
    """A list of turns."""
    return isinstance(value, list) and bool(value) and all(is_turn(turn) for turn in value)


def is_turn(value: object) -> bool:
    """An object with a role, or `from`."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def is_prompt(value: object) -> bool:
    """A text or a list of turns."""
    return is_text(value) or is_turns(value)


def is_text_answer(value: object) -> bool:
    """A text, or its parts."""
    return is_text(value) or is_parts(value)


def is_answer(value: object) -> bool:
    """A text, its parts, a turn or a list of turns."""
    return is_prompt(value) or is_turn(value) or is_parts(value)


def is_list(value: object) -> bool:
    """A list of several."""
    return isinstance(value, list) and len(value) > 1


def is_number(value: object) -> bool:
    """A number; a switch is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_numbers(value: object) -> bool:
    """A list of several numbers; nulls among them are for reading to find fault with."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(entry is None or is_number(entry) for entry in value) and any(entry is not None for entry in value)


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
    """Messages as they are, text (the assistant's also in parts) as one turn of that role."""
    if isinstance(value, str) or (role == "assistant" and is_parts(value)):
        return (Message(role, answer_of(value, name)),)
    return conversation_of(value, name)


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
    parts = SPEAKER.split(f"\n\n{text}")
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


def asked(row: Fields) -> str | Conversation:
    """The prompt of a row that may call it `prompt`, `question` or, with its input, `instruction`.

    Raises:
        RowFault: there is none, or it is no text and no turns.
    """
    name = row.first(PROMPTS)
    if name == "instruction":
        return instruction_prompt(row)
    value = row.value(name or "prompt")
    return text_of(value, name or "prompt") if isinstance(value, str) else with_system(row, conversation_of(value, name or "prompt"))


def fitted(prompt: str | Conversation, answers: Mapping[str, Any]) -> tuple[str | Conversation, list[str | Conversation]]:
    """The prompt and its answers as they go together: all of them text, or all of them turns.

    Args:
        prompt: as it was read.
        answers: as they stand in the row, by what they are called there; texts may stand in parts, turns may repeat the prompt.

    Raises:
        RowFault: an answer is neither text nor turns, or answers another prompt.
    """
    if isinstance(prompt, str) and not any(isinstance(value, list | dict) and not is_parts(value) for value in answers.values()):
        return prompt, [answer_of(value, name) for name, value in answers.items()]
    turns = turns_of(prompt, "prompt", role="user") if isinstance(prompt, str) else prompt
    for name, value in answers.items():
        if not is_answer(value) and not isinstance(value, list):
            raise RowFault("wrong_type", f"`{name}` is {kind_of(value)} ({clip(value)}), and must be text or turns")
    return turns, [without_prompt(turns_of(value, name, role="assistant"), turns, name) for name, value in answers.items()]


def each_of(row: Fields, name: str, number: int, of: str) -> Sequence[Any]:
    """The column as a list of that many entries.

    Raises:
        RowFault: it is none, or has more or fewer than the column `of`.
    """
    found = row.value(name)
    if not isinstance(found, list):
        raise RowFault("wrong_type", f"`{name}` is {clip(found)}, and must be a list of one entry for each of `{of}`")
    if len(found) != number:
        raise RowFault("wrong_type", f"`{name}` has {len(found)} entries, and `{of}` has {number}")
    return found
