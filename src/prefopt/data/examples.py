"""The checked form of a row: what formats read, what tokenisation takes.

An example is either a chat (a prompt of messages, answers of messages, rendered by the chat
template) or raw text (used as it is). It can carry what any method reads beside the words, a label,
a rank, a reward, so that a further format needs no further type.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt.data.marks import MARKS, Marked, counts, is_parts, learned_of, parts_of
from prefopt.data.rows import RowFault, Unreadable, clip

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Roles as rows name them, and as chat templates do."""

OF_TOOLS = ("tool_call_id", "name")
"""What a template may read of a turn beside its words and calls."""

TURN_KEYS = frozenset({"role", "from", "content", "value", "tool_calls", *OF_TOOLS, *MARKS})
"""What is looked at in a turn."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: as chat templates name it.
        content: what was said; `Marked` where the row says of parts of it whether they are learned.
        more: what a template reads beside it, as the text of a JSON object: calls of tools, and whose result this is.
        learned: whether the row says that this turn is to be learned, or not; None: it says nothing. What it says of parts goes
            before. Turns that differ in what is learned of them alone are the same.
    """

    role: str
    content: str
    more: str = ""
    learned: bool | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}

    @property
    def calls_tools(self) -> bool:
        """Whether the turn calls tools."""
        return '"tool_calls"' in self.more and "tool_calls" in json.loads(self.more)

    @property
    def says_nothing(self) -> bool:
        """Whether it has neither words nor calls."""
        return not self.content.strip() and not self.calls_tools

    @property
    def counts(self) -> bool:
        """Whether something of the turn is learned, where it is unless the row says otherwise."""
        own = self.learned is not False
        return own if not isinstance(self.content, Marked) or (own and self.calls_tools) else counts(self.content, own)

    def settled(self, otherwise: bool) -> "Message":
        """The turn with nothing left open: what neither it nor its part says is as `otherwise` says."""
        own = otherwise if self.learned is None else self.learned
        content = Marked(parts_of(self.content, own)) if isinstance(self.content, Marked) else self.content
        return replace(self, content=content, learned=own)


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion, before it is tokens.

    Attributes:
        content: text (`Marked` as in `Message`) where the prompt is text, messages (the last is the assistant's) where it is a chat.
        label, rank, reward, reference_logp: as in `prefopt.trees.Completion`.
    """

    content: str | Conversation
    label: bool | None = None
    rank: int | None = None
    reward: float | None = None
    reference_logp: float | None = None

    @property
    def text(self) -> str:
        """The content of an answer to raw text."""
        assert isinstance(self.content, str), "raw text is answered with text"
        return self.content


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answers, checked.

    Attributes:
        prompt: raw text, or the messages of a chat (at least one).
        answers: at least one; for pairs the chosen first, then the rejected.
        weight: how much the example counts.
        location: where its row stands.
        tools: what the chat template is told of tools, as the text of a JSON list; empty: nothing.
    """

    prompt: str | Conversation
    answers: tuple[Answer, ...]
    weight: float = 1.0
    location: str = ""
    tools: str = ""

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

    def answer(self, name: str) -> str:
        """The column as the text of an answer, which may stand in parts.

        Raises:
            RowFault: missing, or not text.
        """
        return answer_of(self.value(name), name)

    def number(self, name: str, *, minimum: float = -math.inf, maximum: float = math.inf) -> float | None:
        """The column as a finite number within bounds, or None where it is missing or null; CSV holds numbers as text.

        Raises:
            RowFault: not a number, not finite, or out of bounds.
        """
        value = self.columns.get(name)
        return None if value is None or value == "" else finite(value, name, minimum=minimum, maximum=maximum)

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these columns that is there and not null."""
        return next((name for name in names if self.has(name)), None)

    def conversation(self, name: str) -> Conversation:
        """The column as messages: a list of turns, one turn, or, as it stands in ShareGPT, from/value turns.

        Raises:
            RowFault: missing, or not messages.
        """
        return conversation_of(self.value(name), name)


def finite(value: Any, name: str, *, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """The value as a finite number within bounds; tables hold numbers as text.

    Raises:
        RowFault: not a number, not finite, or out of bounds.
    """
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


def answer_of(value: object, name: str) -> str:
    """The text of an answer, as it stands or in parts.

    Raises:
        RowFault: it is no text, or as `content_of`.
    """
    return content_of(value, name, marked=True) if is_parts(value) else text_of(value, name)


def content_of(value: object, name: str, *, marked: bool = False) -> str:
    """A message's content as text; a list of parts is joined where all of them are text.

    Args:
        value: the content.
        name: what it is called.
        marked: whether its parts may say that they are learned, or not.

    Raises:
        RowFault: an image or another part that is not text, something else than text, or a mark that is neither yes nor no.
    """
    if not isinstance(value, list):
        return text_of(value, name)
    parts: list[tuple[str, bool | None]] = []
    for part in value:
        if isinstance(part, str):
            parts.append((text_of(part, name), None))
            continue
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            found = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RowFault("needs_text_only", f"`{name}` has a part of type {clip(found)}; only text parts are read")
        learned = learned_of(part, name, "part") if marked else None
        parts.append((text_of(part.get("text", part.get("value")), name), learned))
    whole = Marked(parts)
    return str(whole) if all(learned is None for _, learned in parts) else whole


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
    calls = calls_of(value, role, name)
    more = ({"tool_calls": calls} if calls else {}) | {key: value[key] for key in OF_TOOLS if isinstance(value.get(key), str)}
    content = value.get("content", value.get("value"))
    if calls and (content is None or role == "function_call"):
        content = ""
    elif "content" not in value and "value" not in value:
        raise RowFault("missing_field", f"`{name}` has a turn without `content` (or `value`): {clip(value)}")
    is_answer = ROLES[role] == "assistant"
    learned = learned_of(value, name) if is_answer else None
    words = content_of(content, f"{name}.content", marked=is_answer)
    return Message(ROLES[role], words, as_text(more, name) if more else "", learned)


def calls_of(turn: Mapping[str, Any], role: str, name: str) -> list[Any]:
    """The calls of tools in a turn, their arguments as objects, which is what most templates write out; none where there are none.

    Raises:
        RowFault: they are not calls.
    """
    given = turn.get("tool_calls")
    if role == "function_call":
        given = from_json(turn.get("content", turn.get("value")), name)
        given = given if isinstance(given, list) else [given]
    if not given:
        return []
    if not isinstance(given, list) or not all(isinstance(call, dict) for call in given):
        raise RowFault("wrong_type", f"`{name}` has a turn whose tool_calls are {clip(given)}, and must be a list of objects")
    return [call_of(call, name) for call in given]


def call_of(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One call as templates read it: a function with a name and arguments.

    Raises:
        RowFault: it names no function.
    """
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowFault("wrong_type", f"`{name}` has a call of no tool: {clip(call)}; a call is an object with a name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        arguments = from_json(arguments, name)
    own = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    given_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**given_id, "type": "function", "function": own}


def tools_of(row: Fields) -> str:
    """What the row tells of tools, as JSON; empty where it tells nothing.

    Raises:
        RowFault: its `tools` are no list of objects.
    """
    if not row.has("tools"):
        return ""
    value = row.value("tools")
    value = from_json(value, "tools") if isinstance(value, str) and value.strip() else value or []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault("wrong_type", f"`tools` is {clip(value)}, and must be a list of objects that describe tools")
    return as_text(value, "tools") if value else ""


def from_json(value: object, name: str) -> Any:
    """What a text of JSON says.

    Raises:
        RowFault: it is no such text.
    """
    try:
        return json.loads(text_of(value, name))
    except (ValueError, RecursionError):
        raise RowFault("wrong_type", f"`{name}` holds {clip(value)}, and must hold JSON there") from None


def as_text(value: Any, name: str) -> str:
    """The value as JSON.

    Raises:
        RowFault: JSON has no word for something in it, it is nested too deeply, or holds a lone surrogate.
    """
    try:
        return text_of(json.dumps(value, ensure_ascii=False, allow_nan=False), name)
    except (TypeError, ValueError, RecursionError):
        raise RowFault("wrong_type", f"`{name}` holds something that JSON cannot say: {clip(value)}") from None


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
        if message.role == "assistant" and message.says_nothing and message.learned is not False:
            raise RowFault("blank_answer", f"`{name}` has a blank answer")
