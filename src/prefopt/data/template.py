"""Chats as text: the tokenizer's chat template, the user's, or a stated default.

What must hold: the text of a prompt is the beginning of the text of prompt and answer, as at
generation; and an answer ends in exactly one end-of-turn token. Templates are found by experiment
rather than trusted: the end-of-turn token is the one that follows an answer in a small probe chat.
Where a template breaks the first rule (it rewrites earlier turns, or opens the answer otherwise when
it is there), the prompt stays as the model sees it at generation, and the answer is set behind it as
it stands in the data, closed by the end-of-turn token; such answers are counted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefopt.data.examples import Answer, Conversation, Example, Message
from prefopt.data.marks import parts_of
from prefopt.data.pieces import Piece, in_pieces, turn_pieces
from prefopt.data.rows import RowFault, clip
from prefopt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRANSCRIPT = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '\\n\\nAssistant: ' + message.content + eos_token }}"
    "{% elif message.role == 'user' %}{{ '\\n\\nHuman: ' + message.content }}"
    "{% else %}{{ '\\n\\n' + message.role.capitalize() + ': ' + message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
"""The default for a tokenizer without a template: HH's transcripts, each answer closed by the end-of-sequence token."""

PROBE_ANSWER = "plain answer"
Origin = Literal["tokenizer", "settings", "default"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as text, ready for the tokenizer.

    Attributes:
        prompt: its text, up to where generation would begin.
        is_chat: whether a template wrote it, special tokens included.
        branches: each answer as pieces; the last piece ends its turn.
        rewritten: answers that were set behind the prompt as they stand, because the template breaks the prefix.
    """

    prompt: str
    is_chat: bool
    branches: tuple[tuple[Piece, ...], ...]
    rewritten: int = 0


@dataclass(frozen=True, slots=True)
class Chat:
    """How chats become text for one tokenizer.

    Attributes:
        tokenizer: renders.
        text: the template.
        args: further arguments of the template.
        origin: whose template it is.
        end_of_turn: the text of the token that closes an answer.
        tail: what the template writes after an answer where that is no token: dropped white space, or kept words.
        emits_end: whether the template itself writes the end-of-turn token.
        control: texts of tokens that no message may contain.
    """

    tokenizer: "PreTrainedTokenizerBase"
    text: str
    args: Mapping[str, Any]
    origin: Origin
    end_of_turn: str
    tail: str
    emits_end: bool
    control: tuple[str, ...]

    def render(self, turns: Conversation, *, generate: bool) -> str:
        """The chat's text, with the opening of the next answer where `generate`.

        Raises:
            RowFault: the template refuses these turns.
        """
        return render(self.tokenizer, self.text, self.args, turns, generate=generate)

    def with_tools(self, tools: str) -> "Chat":
        """The same for a chat with these tools.

        Raises:
            RowFault: the template does not write tools, or one of them holds a control token.
        """
        self.refuse_unwritten("tools")
        self.refuse_control((Message("tool", "", tools),))
        return replace(self, args={**self.args, "tools": json.loads(tools)})

    def refuse_unwritten(self, name: str) -> None:
        """Refuses what the template leaves out.

        Raises:
            RowFault: the template does not read what is called so.
        """
        if not re.search(rf"\b{name}\b", self.text):
            raise RowFault("template_refused", f"the row brings {name}, and the chat template of the {self.origin} does not write them")

    def example(self, prompt: Conversation, answers: Sequence[Answer], tools: str = "") -> Rendered:
        """The chat and its answers as text.

        Args:
            prompt: its turns.
            answers: the turns of each.
            tools: that the template is told of, as JSON; empty: none.

        Raises:
            RowFault: a turn holds a control token, or the template refuses, or would leave out tools or their calls.
        """
        if tools:
            return self.with_tools(tools).example(prompt, answers)
        for turns in (prompt, *(answer.content for answer in answers)):
            self.refuse_control(turns)
            if any(isinstance(turn, Message) and turn.calls_tools for turn in turns):
                self.refuse_unwritten("tool_calls")
        head = self.render(prompt, generate=True)
        branches = []
        rewritten = 0
        for answer in answers:
            turns = answer.content
            assert not isinstance(turns, str), "a chat's answers are messages"
            pieces = self.branch(prompt, turns, head)
            if pieces is None:
                pieces = self.set_behind(prompt, turns)
                rewritten += 1
            branches.append(pieces)
        return Rendered(head, True, tuple(branches), rewritten)

    def refuse_control(self, turns: str | Conversation) -> None:
        """Refuses turns that would end themselves or open others.

        Raises:
            RowFault: one holds a control token.
        """
        for message in turns:
            assert isinstance(message, Message), "a chat is made of messages"
            for token in self.control:
                if token in message.content or token in message.more:
                    raise RowFault(
                        "control_token",
                        f"a turn of the {message.role} holds {clip(token)}, which the chat template uses to end or begin turns",
                    )

    def branch(self, prompt: Conversation, turns: Conversation, head: str) -> tuple[Piece, ...] | None:
        """An answer's pieces as the template writes them; None where it breaks the prefix."""
        whole = self.render(prompt + turns, generate=False)
        if not whole.startswith(head):
            return None
        pieces: list[Piece] = []
        done = len(head)
        for index, message in enumerate(turns):
            if message.role != "assistant":
                continue
            if index > 0:
                opened = self.render(prompt + turns[:index], generate=True)
                if not whole.startswith(opened) or len(opened) < done:
                    return None
                pieces.append(Piece(whole[done : len(opened)], scored=False))
                done = len(opened)
            end = self.turn_end(whole, done, prompt + turns[: index + 1])
            if end is None:
                return None
            pieces += turn_pieces(message, whole[done : end[0]])
            done = end[1]
        return tuple(piece for piece in pieces if piece.text or piece.ends_turn)

    def turn_end(self, whole: str, start: int, turns: Conversation) -> tuple[int, int] | None:
        """Where the answer that begins at `start` ends, and where the text goes on behind its end-of-turn token."""
        if self.emits_end:
            end = whole.find(self.end_of_turn, start)
            return None if end < 0 else (end, end + len(self.end_of_turn))
        closed = self.render(turns, generate=False)
        if not whole.startswith(closed) or len(closed) <= start:
            return None
        words = self.tail.rstrip()
        end = len(closed) - len(self.tail) + len(words) if closed.endswith(self.tail) else len(closed)
        return (max(end, start), max(end, start))

    def set_behind(self, prompt: Conversation, turns: Conversation) -> tuple[Piece, ...]:
        """An answer's pieces as they stand in the data, for a template that breaks the prefix.

        Raises:
            RowFault: it has several turns, whose texts in between only the template could write, or calls tools.
        """
        if len(turns) == 1 and not turns[0].calls_tools:
            return turn_pieces(turns[0], turns[0].content)
        raise RowFault(
            "template_refused",
            "the chat template writes earlier turns differently once later ones follow, so several turns cannot be learned at once; "
            "`score: completion` learns the last answer of each conversation",
        )


def chat_of(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, args: Mapping[str, Any]) -> Chat:
    """How this tokenizer's chats become text.

    Args:
        tokenizer: its own template serves unless another is given.
        chat_template: a template, the path of one, or None.
        args: further arguments of the template.

    Raises:
        DataError: the template cannot be read, cannot render a simple chat, leaves no end-of-turn token, or has no use for
            one of the arguments.
    """
    text, origin = template_text(tokenizer, chat_template)
    if unused := [name for name in args if not re.search(rf"\b{re.escape(name)}\b", text)]:
        raise DataError(f"template_args: the chat template of the {origin} does not read {', '.join(map(clip, unused))}. Leave it out.")
    probe = (Message("user", "question"), Message("assistant", PROBE_ANSWER))
    try:
        whole = render(tokenizer, text, args, probe, generate=False)
        opened = render(tokenizer, text, args, probe[:1], generate=True)
    except RowFault as fault:
        raise DataError(
            f"the chat template of the {origin} cannot render a question and an answer: {fault.detail}. Give another with chat_template."
        ) from None
    _, found, suffix = whole.rpartition(PROBE_ANSWER)
    if not found:
        raise DataError(
            f"the chat template of the {origin} leaves the answer out: it renders {clip(whole)}. Give another with chat_template."
        )
    tokens = sorted((token for token in added_tokens(tokenizer) if token in suffix), key=lambda token: (suffix.index(token), -len(token)))
    emits_end = bool(tokens) and not suffix[: suffix.index(tokens[0])].strip()
    end_of_turn = tokens[0] if emits_end else eos_text(tokenizer)
    special = {end_of_turn, tokenizer.eos_token, tokenizer.bos_token}
    openers = {token for token in added_tokens(tokenizer) if token in opened and token in control_tokens(tokenizer)}
    control = tuple(sorted(token for token in special | openers if token))
    return Chat(tokenizer, text, dict(args), origin, end_of_turn, "" if emits_end else suffix, emits_end, control)


def template_text(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> tuple[str, Origin]:
    """The template, and whose it is.

    Raises:
        DataError: a path that cannot be read, or a tokenizer with several templates and no default.
    """
    if chat_template is not None:
        return read_template(chat_template), "settings"
    if tokenizer.chat_template:
        try:
            return str(tokenizer.get_chat_template()), "tokenizer"
        except ValueError as error:
            raise DataError(
                f"the tokenizer has several chat templates and none is the default: {clip(str(error))}. Give one with chat_template."
            ) from None
    eos_text(tokenizer)
    opening = "{{ bos_token }}" if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in added_prefix(tokenizer) else ""
    return opening + TRANSCRIPT, "default"


def read_template(given: str) -> str:
    """The template that was given, or that stands in the file that was given.

    Raises:
        DataError: it is neither Jinja nor a readable file.
    """
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(
            f"chat_template is {clip(given)}, which is neither a Jinja template nor a file that can be read ({clip(str(error))})."
        ) from None


def render(tokenizer: "PreTrainedTokenizerBase", text: str, args: Mapping[str, Any], turns: Conversation, *, generate: bool) -> str:
    """The chat's text.

    Raises:
        RowFault: the template refuses, or fails on, these turns.
    """
    messages = [message.as_dict() for message in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, add_generation_prompt=generate, **args))
    except Exception as error:  # a template is a program, and can fail in any way that Python code can
        raise RowFault("template_refused", f"the chat template says: {clip(str(error)) or type(error).__name__}") from None


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The texts that the tokenizer never splits."""
    return tuple(dict.fromkeys([*tokenizer.get_added_vocab(), *all_special(tokenizer)]))


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """The texts of tokens that steer: those with a role, and those that are marked as special without one."""
    return frozenset([*all_special(tokenizer), *(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)])


def all_special(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The texts of its special tokens."""
    return tuple(str(token) for token in tokenizer.all_special_tokens)


def eos_text(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The end-of-sequence token.

    Raises:
        DataError: there is none.
    """
    if not isinstance(tokenizer.eos_token, str) or not tokenizer.eos_token:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so nothing can end an answer. "
            "Set tokenizer.eos_token and save it, or give a chat_template that ends turns."
        )
    return tokenizer.eos_token


def added_prefix(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text by itself, usually none or one BOS."""
    with_special = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    without = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return tuple(with_special[:start])
    return ()


def plain(example: Example) -> Rendered:
    """Raw text as it is."""
    assert isinstance(example.prompt, str), "chats are rendered by their template"
    return Rendered(example.prompt, False, tuple(in_pieces(parts_of(answer.text, True)) for answer in example.answers))


def template_key(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> str:
    """What decides the template, for the key of a cache.

    Raises:
        DataError: a path that cannot be read.
    """
    if chat_template is not None:
        return read_template(chat_template)
    return json.dumps(tokenizer.chat_template, sort_keys=True) if tokenizer.chat_template else TRANSCRIPT
