"""Prompts without answers: read from anywhere, and made into tokens exactly as in training.

Any file that can be trained on serves: its prompts are read and its answers left aside. Beside those there are rows that
hold a prompt alone, and plain text with one prompt per line.
"""

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefopt.data import readers, sources
from prefopt.data.columns import instruction_prompt, is_text, is_turns, with_system
from prefopt.data.examples import Conversation, Example, Fields, Message, tools_of
from prefopt.data.formats import FORMATS
from prefopt.data.paths import at_home, near_paths, why
from prefopt.data.recognise import OTHER_NAMES, check_columns, check_mapping, columns_of, first_fit, mapping_for, rename
from prefopt.data.rows import Dropped, Row, RowFault, clip, listed
from prefopt.data.template import Chat, Rendered, chat_of
from prefopt.data.tokenize import Grower, TreeOptions, opening
from prefopt.data.unpack import PACKED, unpacked_bytes
from prefopt.errors import ConfigError, DataError
from prefopt.trees import TokenIds, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Content = str | Conversation
TextAs = Literal["raw", "chat"]

NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked.

    Attributes:
        content: text, or the turns of a chat.
        location: where it stands, for messages.
    """

    content: Content
    location: str

    def as_json(self) -> str | list[dict[str, str]]:
        """The form in which data files hold it."""
        return self.content if isinstance(self.content, str) else [message.as_dict() for message in self.content]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt as tokens.

    Attributes:
        ids: its tokens, what generation begins with included.
        num_cut: what was cut from its left to fit: turns of a chat, tokens of raw text.
    """

    ids: TokenIds
    num_cut: int


class Renderer:
    """Makes prompts into tokens as `prefopt.data.tokenize` does for training.

    Args:
        tokenizer: of the model.
        text_as: how a prompt that is plain text is meant.
        with_chats: whether there are chats among the prompts, so that a template is needed even where text is raw.
        chat_template: a template, the path of one, or None: the tokenizer's own.
        template_args: further arguments of the template.
        system: opens every chat that has no system message of its own.

    Raises:
        DataError: the template cannot be used, or nothing could end an answer.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        text_as: TextAs,
        with_chats: bool = False,
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        self.text_as: TextAs = text_as
        self.system = system
        self.chat: Chat | None = chat_of(tokenizer, chat_template, template_args or {}) if text_as == "chat" or with_chats else None
        self._grower = Grower(tokenizer, self.chat, TreeOptions("completion", text_as, NO_LIMIT, "cut"))

    @property
    def end_ids(self) -> set[int]:
        """The tokens that closed answers in training."""
        return {self._grower.raw_encoder.end_id, self._grower.chat_encoder.end_id}

    @property
    def end_of_turn(self) -> str:
        """The text of the token that closes an answer to the prompts."""
        return self._grower.chat_encoder.end_text if self.chat is not None else self._grower.raw_encoder.end_text

    def shape(self, content: Content) -> Content:
        """The prompt as it is meant: plain text as one question where `text_as` is `chat`; a chat with its system message."""
        if isinstance(content, str):
            if self.text_as == "raw" or not content.strip():
                return content
            content = (Message("user", content),)
        return (Message("system", self.system), *content) if self.system and content[0].role != "system" else content

    def fit(self, content: Content, *, room: int | None) -> Fitted:
        """The prompt's tokens, its left cut where it is too long: whole turns of a chat, as in training.

        Args:
            content: the prompt.
            room: how many tokens it may have; None: any number.

        Raises:
            RowFault: a turn holds a control token, the template refuses, or the last turn alone is too long.
        """
        shaped = self.shape(content)
        limit = NO_LIMIT if room is None else room
        if isinstance(shaped, str):
            start, ids = self._encode(Rendered(shaped, False, ()))
            kept = max(1, limit - len(start))
            return Fitted(token_ids(start + ids[-kept:]), max(0, len(ids) - kept))
        assert self.chat is not None, "a chat needs a template"
        self.chat.refuse_control(shaped)
        for turns in shorter_and_shorter(shaped):
            start, ids = self._encode(Rendered(self.chat.render(turns, generate=True), True, ()))
            if len(start) + len(ids) <= limit:
                return Fitted(token_ids(start + ids), len(shaped) - len(turns))
        raise RowFault("last_turn_too_long", f"its last turn alone takes {len(start) + len(ids)} tokens, and there is room for {limit}")

    def _encode(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        """What is never cut, and the rest."""
        encoded = self._grower.encode([rendered])[0]
        assert not isinstance(encoded, RowFault), "only answers can be blank"
        return encoded.start, encoded.prompt.tolist()


def shorter_and_shorter(turns: Conversation) -> Iterable[Conversation]:
    """The chat, then without its first turns: each time from a later turn of the user on, behind the system messages."""
    yield turns
    first = opening(turns)
    for index in range(first + 1, len(turns)):
        if turns[index].role == "user":
            yield (*turns[:first], *turns[index:])


def read_prompts(given: str, columns: Mapping[str, str]) -> tuple[list[Prompt], list[Dropped]]:
    """The prompts of a file, a folder, a dataset or standard input, and the rows that hold none.

    Args:
        given: a text file with one prompt per line (`.txt`), whatever can be trained on, or `-`.
        columns: other column names, as `field: column`.

    Raises:
        DataError: it cannot be read, is empty, or no row holds a prompt.
    """
    check_mapping(columns)
    if given == "-":
        content = stdin_content()
        if not content.lstrip().startswith(b"{"):
            return text_prompts(content, "stdin")
        read = [("stdin", list(readers.json_lines(io.BytesIO(content), "stdin")))]
    elif given.lower().endswith((".txt", *(f".txt{ending}" for ending in PACKED))):
        return text_prompts(file_content(at_home(given)), Path(given).name)
    else:
        opened = [sources.read(place) for place in sources.find([given]).places]
        read = [(source.name, source.rows()) for source in opened]
    seen = {name: columns_of(rows) for name, rows in read}
    check_columns(seen, columns)
    prompts: list[Prompt] = []
    faulty: list[Dropped] = []
    for name, rows in read:
        mapping = mapping_for(seen[name], columns)
        for row in rows:
            prompt = row if isinstance(row, Dropped) else prompt_of(Row(row.location, rename(row.value, mapping)))
            if isinstance(prompt, Prompt):
                prompts.append(prompt)
            else:
                faulty.append(prompt)
    if not prompts:
        raise DataError(nothing_to_ask(given, [row for _, rows in read for row in rows], faulty))
    return prompts, faulty


def stdin_content() -> bytes:
    """What is piped in.

    Raises:
        DataError: nothing is, or nothing but blanks, or text in another encoding.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("`-` reads prompts from standard input, and nothing is piped in. To type prompts, use prefopt chat.")
    content = readers.without_mark(sys.stdin.buffer.read(), "standard input")
    if not content.strip():
        raise DataError("standard input is empty. Pipe one prompt per line into the command, or JSON lines.")
    return content


def file_content(path: Path) -> bytes:
    """What a text file holds.

    Raises:
        DataError: it cannot be read, or holds no UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{clip(str(path))} does not exist{near_paths(path)}.") from None
    except (OSError, ValueError) as error:  # a ValueError: a NUL character in the name
        raise DataError(f"{clip(str(path))} cannot be read: {why(error)}.") from None
    return readers.without_mark(unpacked_bytes(content, str(path)), path.name)


def text_prompts(content: bytes, name: str) -> tuple[list[Prompt], list[Dropped]]:
    """One prompt per line that is not blank.

    Raises:
        DataError: there is none.
    """
    prompts: list[Prompt] = []
    faulty: list[Dropped] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        location = f"{name}:{number}"
        try:
            prompts.append(Prompt(line.removesuffix(b"\r").decode(), location))
        except UnicodeDecodeError as error:
            faulty.append(Dropped(location, "not_utf8", f"byte {error.start + 1} is not UTF-8", readers.printable(line)))
    if not prompts:
        raise DataError(f"{name} holds no prompt: {faulty[0].detail if faulty else 'every line is blank'}. Write one prompt per line.")
    return prompts, faulty


def prompt_of(row: Row) -> Prompt | Dropped:
    """The prompt that a row holds, beside whatever else stands in it."""
    fields = Fields(row.value)
    try:
        if tools_of(fields):
            raise RowFault("template_refused", "the row brings tools, and answers to prompts with tools are not generated")
        return Prompt(training_prompt(fields) or lone_prompt(fields), row.location)
    except RowFault as fault:
        return Dropped(row.location, fault.reason, fault.detail, row.value)


def training_prompt(row: Fields) -> Content | None:
    """The prompt of a row that could be trained on; None where it has none, or the answers are not as training wants them."""
    entry = first_fit(row.columns, FORMATS)
    if entry is None:
        return None
    for kind in dict.fromkeys((entry.kind, "demonstration")):
        try:
            found = entry.read(row, kind)
            first = found if isinstance(found, Example) else found[0]
            if isinstance(first, Example):
                return first.prompt or None
        except RowFault:
            continue  # its answers may be at fault, and they are not asked for
    return None


def lone_prompt(row: Fields) -> Content:
    """The prompt of a row without a usable answer.

    Raises:
        RowFault: there is none.
    """
    columns = row.columns
    if row.has("prompt"):
        return row.conversation("prompt") if is_turns(columns["prompt"]) else row.text("prompt")
    for name in ("messages", "conversations"):
        if is_turns(columns.get(name)):
            turns = with_system(row, row.conversation(name))
            asked = turns[:-1] if turns[-1].role == "assistant" else turns
            if asked:
                return asked
    if is_text(columns.get("instruction")):
        return instruction_prompt(row)
    if is_text(columns.get("text")):
        return row.text("text")
    raise RowFault("missing_field", f"no prompt: the row has {', '.join(map(clip, columns)) or 'no columns'}")


def nothing_to_ask(given: str, rows: Sequence[Row | Dropped], faulty: Sequence[Dropped]) -> str:
    """The message where no row holds a prompt."""
    columns = columns_of(rows)
    asked = next((name for name in columns if name.lower() in OTHER_NAMES["prompt"]), None)
    hint = f" Perhaps: --columns prompt={asked}." if asked else ""
    return (
        f"{given}: no row holds a prompt. The first, {faulty[0].location}: {faulty[0].detail}. "
        f"Prompts stand in `prompt`, `messages`, `conversations`, `instruction` or `text`.{hint}"
    )


def refuse_faulty(faulty: Sequence[Dropped], num_rows: int) -> None:
    """Stops where rows hold no prompt, or one that cannot be asked.

    Raises:
        DataError: names the first of them, and how to leave them out.
    """
    if faulty:
        head = f"{len(faulty)} of {num_rows} rows hold no prompt that can be asked:"
        raise DataError("\n".join([head, *listed(faulty, len(faulty)), "Mend the rows, or leave them out with --on-bad-row drop."]))


def refuse_unread(text_as: TextAs, **given: object) -> None:
    """Settings of chats where there is no chat.

    Args:
        text_as: how prompts are read, chats among them included.
        given: name of a setting -> its value.

    Raises:
        ConfigError: prompts are raw text, and one is given.
    """
    if text_as == "raw" and (unread := [name for name, value in given.items() if value]):
        raise ConfigError(f"{', '.join(unread)}: for chats, and these prompts are raw text. Leave it out, or give --text-as chat.")
