"""The checked form of a row: what formats read, what tokenisation takes.

An example is either a chat (a prompt of messages, answers of messages, rendered by the chat
template) or raw text (used as it is). It can carry what any method reads beside the words, a label,
a rank, a reward, so that a further format needs no further type.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from prefopt.data.rows import RowFault, Unreadable, clip

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
"""Roles as rows name them, and as chat templates do."""

TURN_KEYS = frozenset({"role", "from", "content", "value", "tool_calls"})
"""What is looked at in a turn; a turn with tool_calls is refused."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content}


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion, before it is tokens.

    Attributes:
        content: text where the prompt is text, messages (the last is the assistant's) where it is a chat.
        label, rank, reward, reference_logp: as in `prefopt.trees.Completion`.
    """

    content: str | Conversation
    label: bool | None = None
    rank: int | None = None
    reward: float | None = None
    reference_logp: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answers, checked.

    Attributes:
        prompt: raw text, or the messages of a chat (at least one).
        answers: at least one; for pairs the chosen first, then the rejected.
        weight: how much the example counts.
        location: where its row stands.
    """

    prompt: str | Conversation
    answers: tuple[Answer, ...]
    weight: float = 1.0
    location: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether the chat template renders it."""
        return not isinstance(self.prompt, str)


@dataclass(frozen=True, slots=True)
class Fields:
    """A row's columns, read with checks: a fault names the column, what was found and what is allowed."""

    columns: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Whether the column is there and not null."""
        return self.columns.get(name) is not None

    def value(self, name: str) -> Any:
        """The column, whatever its type.

        Raises:
            RowFault: the row has no such column.
        """
        if name not in self.columns:
            raise RowFault("missing_field", f"no `{name}`; the row has {', '.join(map(clip, self.columns)) or 'no columns'}")
        return self.columns[name]

    def text(self, name: str) -> str:
        """The column as text.

        Raises:
            RowFault: missing, or not text.
        """
        return text_of(self.value(name), name)

    def number(self, name: str, *, minimum: float = -math.inf, maximum: float = math.inf) -> float | None:
        """The column as a finite number within bounds, or None where it is missing or null; CSV holds numbers as text.

        Raises:
            RowFault: not a number, not finite, or out of bounds.
        """
        value = self.columns.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise RowFault("bad_number", f"`{name}` is {kind_of(value)}, and must be a number")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise RowFault("bad_number", f"`{name}` is {clip(value)}, and must be a number") from None
        if not math.isfinite(number) or not minimum <= number <= maximum:
            bounds = "finite" if (minimum, maximum) == (-math.inf, math.inf) else f"finite, from {minimum:g} to {maximum:g}"
            raise RowFault("bad_number", f"`{name}` is {clip(value)}, and must be {bounds}")
        return number

    def conversation(self, name: str) -> Conversation:
        """The column as messages: a list of turns, one turn, or, as it stands in ShareGPT, from/value turns.

        Raises:
            RowFault: missing, or not messages.
        """
        return conversation_of(self.value(name), name)


def kind_of(value: object) -> str:
    """A value's type in the words of JSON."""
    names: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        Unreadable: "broken",
    }
    return names.get(type(value), type(value).__name__)


def text_of(value: object, name: str) -> str:
    """The value as text that a tokenizer can take.

    Raises:
        RowFault: it is not text, or holds a lone surrogate, which is no character.
    """
    if not isinstance(value, str):
        raise RowFault("wrong_type", f"`{name}` is {kind_of(value)} ({clip(value)}), and must be text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowFault("not_utf8", f"`{name}` holds a lone surrogate or a broken byte at character {error.start}") from None
    return value


def content_of(value: object, name: str) -> str:
    """A message's content as text; a list of parts is joined where all of them are text.

    Raises:
        RowFault: an image or another part that is not text, or something else than text.
    """
    if not isinstance(value, list):
        return text_of(value, name)
    texts: list[str] = []
    for part in value:
        if isinstance(part, str):
            texts.append(text_of(part, name))
            continue
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            found = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RowFault("needs_text_only", f"`{name}` has a part of type {clip(found)}; only text parts are read")
        texts.append(text_of(part.get("text", part.get("value")), name))
    return "".join(texts)


def message_of(value: object, name: str) -> Message:
    """One turn, as role/content or from/value.

    Raises:
        RowFault: not a turn, an unknown role, or content that is not text.
    """
    if not isinstance(value, dict):
        raise RowFault("wrong_type", f"`{name}` holds {kind_of(value)} ({clip(value)}), and must hold turns like {{role, content}}")
    role = value.get("role", value.get("from"))
    if role is None:
        raise RowFault("missing_field", f"`{name}` has a turn without `role` (or `from`): {clip(value)}")
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault("unknown_role", f"`{name}` has the role {clip(role)}; known are {', '.join(ROLES)}")
    if value.get("tool_calls"):
        raise RowFault("needs_text_only", f"`{name}` has a turn with tool_calls; only text is read")
    if "content" not in value and "value" not in value:
        raise RowFault("missing_field", f"`{name}` has a turn without `content` (or `value`): {clip(value)}")
    return Message(ROLES[role], content_of(value.get("content", value.get("value")), f"{name}.content"))


def conversation_of(value: object, name: str) -> Conversation:
    """A list of turns, or a single one.

    Raises:
        RowFault: empty, or not turns.
    """
    turns: Sequence[object] = value if isinstance(value, list) else [value]
    if not turns:
        raise RowFault("wrong_type", f"`{name}` is an empty list, and must hold turns like {{role, content}}")
    return tuple(message_of(turn, name) for turn in turns)


def check_answer(answer: str | Conversation, name: str) -> None:
    """An answer must say something, and a chat must end with the assistant.

    Raises:
        RowFault: blank, or a conversation that ends with another role.
    """
    if isinstance(answer, str):
        if not answer.strip():
            raise RowFault("blank_answer", f"`{name}` is blank")
        return
    if not answer or answer[-1].role != "assistant":
        last = f"ends with a turn of the {answer[-1].role}" if answer else "holds no answer"
        raise RowFault("no_answer", f"`{name}` {last}, and must end with the assistant's")
    for message in answer:
        if message.role == "assistant" and not message.content.strip():
            raise RowFault("blank_answer", f"`{name}` has a blank answer")


def every_turn(example: Example) -> Example:
    """The demonstration with all of the assistant's turns in its answer, not the last one only.

    The prompt becomes everything before the first answer; text examples stay as they are.

    Raises:
        RowFault: one of the turns to be learned is blank.
    """
    answer = example.answers[0]
    if isinstance(example.prompt, str) or isinstance(answer.content, str):
        return example
    turns = example.prompt + answer.content
    # A greeting that opens the chat cannot be learned: no prompt comes before it.
    first = next(index for index, message in enumerate(turns) if message.role == "assistant" and index > 0)
    if any(message.role == "assistant" and not message.content.strip() for message in turns[first:]):
        raise RowFault("blank_answer", "one of the assistant's turns is blank, and every turn is learned")
    return replace(example, prompt=turns[:first], answers=(replace(answer, content=turns[first:]),))


def opening_of(example: Example) -> str:
    """A digest of what the example opens with: the user's first message, the text of the prompt, or the text itself.

    It is read from the text before anything is shaped or cut, so that a row read as a pair, as a demonstration of its
    last answer or of all its answers opens with the same: the whole prompts of those three differ.
    """
    answer = example.answers[0].content
    if isinstance(example.prompt, str):
        text = example.prompt if example.prompt.strip() else str(answer)
    else:
        turns = example.prompt if isinstance(answer, str) else example.prompt + answer
        text = next((message for message in turns if message.role == "user"), turns[0]).content
    return blake2b(text.strip().encode(), digest_size=8).hexdigest()


def as_chat(example: Example) -> Example:
    """The raw-text example as a chat of one question and one answer; text without a prompt stays as it is."""
    if not isinstance(example.prompt, str) or not example.prompt.strip():
        return example
    answers = tuple(replace(answer, content=(Message("assistant", str(answer.content)),)) for answer in example.answers)
    return replace(example, prompt=(Message("user", example.prompt),), answers=answers)
