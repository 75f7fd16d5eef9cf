"""Examples to trees: rendered, encoded, and made to fit in `max_length`.

An answer is never cut. What is too long loses whole turns from the left of its prompt (a system
message stays), or, where the prompt is raw text, its first tokens; the cut prompt is the same for
all answers. What still does not fit is dropped and counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from prefopt.data.encode import Branch, Encoded, Encoder
from prefopt.data.examples import Answer, Conversation, Example, Message
from prefopt.data.learning import as_chat, learned_turns, opening_of
from prefopt.data.rows import RowFault
from prefopt.data.template import Chat, Rendered, eos_text, plain
from prefopt.trees import Completion, PromptTree, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """What decides the trees beside template and tokenizer; the names are those of `DataSettings`."""

    score: Literal["completion", "assistant"]
    text_as: Literal["raw", "chat"]
    max_length: int
    too_long: Literal["cut", "drop"]


@dataclass(frozen=True, slots=True)
class Grown:
    """What became of an example.

    Attributes:
        tree: its tree, or the reason why it has none.
        merges: boundaries that joint tokenisation would have merged across.
        rewritten: answers set behind the prompt because the template breaks the prefix.
        cut: whether its prompt was cut.
    """

    tree: PromptTree | RowFault
    merges: int = 0
    rewritten: int = 0
    cut: bool = False


class Grower:
    """Makes trees of examples.

    Args:
        tokenizer: fast or slow.
        chat: how chats become text; None where no example is a chat.
        options: what the user decides.

    Raises:
        DataError: the tokenizer has no token that could end an answer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat: Chat | None, options: TreeOptions) -> None:
        self.chat = chat
        self.options = options
        raw_end = eos_text(tokenizer) if chat is None or tokenizer.eos_token else chat.end_of_turn
        self.raw_encoder = Encoder(tokenizer, raw_end, ())
        self.chat_encoder = Encoder(tokenizer, chat.end_of_turn, chat.control) if chat is not None else self.raw_encoder

    def grow(self, examples: Sequence[Example]) -> list[Grown]:
        """Each example's tree, in order, or why it has none."""
        prepared = [attempt(self.prepare, example) for example in examples]
        encoded = self.encode([entry if isinstance(entry, RowFault) else entry[1] for entry in prepared])
        return [
            Grown(ids)
            if isinstance(ids, RowFault)
            else Grown(entry)
            if isinstance(entry, RowFault)
            else self.fit(*entry, ids, opening_of(example))
            for example, entry, ids in zip(examples, prepared, encoded, strict=True)
        ]

    def prepare(self, example: Example) -> tuple[Example, Rendered]:
        """The example as it is to be learned, and its text.

        Raises:
            RowFault: it cannot be learned like that, or the template refuses it.
        """
        shaped = self.shape(example)
        return shaped, self.render(shaped)

    def shape(self, example: Example) -> Example:
        """The example as the settings want it learned."""
        if self.options.text_as == "chat":
            example = as_chat(example)
        is_demonstration = len(example.answers) == 1 and example.answers[0].label is None
        return learned_turns(example, every=self.options.score == "assistant") if is_demonstration else example

    def render(self, example: Example) -> Rendered:
        """The example as text.

        Raises:
            RowFault: the template refuses it.
        """
        if isinstance(example.prompt, str):
            if example.tools:
                raise RowFault("template_refused", "the row brings tools, and plain text has no place for them; `--text-as chat` has")
            return plain(example)
        assert self.chat is not None, "a chat needs a template"
        return self.chat.example(example.prompt, example.answers, example.tools)

    def encode(self, rendered: Sequence[Rendered | RowFault]) -> list[Encoded | RowFault]:
        """Each text's ids; faults stay where they are."""
        results: list[Encoded | RowFault] = [
            entry if isinstance(entry, RowFault) else RowFault("template_refused", "not encoded") for entry in rendered
        ]
        for encoder, is_chat in ((self.chat_encoder, True), (self.raw_encoder, False)):
            indices = [index for index, entry in enumerate(rendered) if isinstance(entry, Rendered) and entry.is_chat == is_chat]
            texts = [entry for index in indices if isinstance(entry := rendered[index], Rendered)]
            for index, ids in zip(indices, encoder.encode(texts), strict=True):
                results[index] = ids
        return results

    def fit(self, example: Example, text: Rendered, ids: Encoded, opened_with: str) -> Grown:
        """The example's tree, cut where it must be and may be; what it opened with outlives the cut."""
        limit = self.options.max_length
        cut = ids.longest > limit
        if cut:
            if self.options.too_long == "drop":
                return Grown(RowFault("too_long", f"{ids.longest} tokens, and max_length is {limit}"))
            if any(answer.reference_logp is not None for answer in example.answers):
                return Grown(
                    RowFault(
                        "too_long",
                        f"{ids.longest} tokens, max_length is {limit}, and its reference log-probabilities are those of the whole prompt",
                    )
                )
            shorter = self.shorten(example, ids)
            if isinstance(shorter, RowFault):
                return Grown(shorter)
            example, text, ids = shorter
        if len({branch.ids.tobytes() for branch in ids.branches}) < len(ids.branches):
            return Grown(RowFault("same_answers", "the answers differ as text, but are the same tokens"))
        return Grown(tree_of(example, ids, opened_with), ids.merges, text.rewritten, cut)

    def shorten(self, example: Example, ids: Encoded) -> tuple[Example, Rendered, Encoded] | RowFault:
        """The example with as much of its prompt as fits."""
        limit = self.options.max_length
        if not example.is_chat:
            room = limit - ids.longest_answer - len(ids.start)
            if room < 1:
                return too_long_answer(ids, limit)
            return example, plain(example), replace(ids, prompt=ids.prompt[-room:])
        # Later starts are shorter, so the first that fits is found by halving.
        starts = turn_starts(example)
        low, high = 0, len(starts)
        best: tuple[Example, Rendered, Encoded] | None = None
        smallest = ids
        while low < high:
            middle = (low + high) // 2
            candidate = from_turn(example, starts[middle])
            text = attempt(self.render, candidate)
            encoded = text if isinstance(text, RowFault) else self.chat_encoder.encode([text])[0]
            if isinstance(text, RowFault) or isinstance(encoded, RowFault):
                return text if isinstance(text, RowFault) else RowFault("blank_answer", str(encoded))
            smallest = encoded
            if encoded.longest <= limit:
                best, high = (candidate, text, encoded), middle
            else:
                low = middle + 1
        if best is not None:
            return best
        if smallest.longest_answer >= limit:
            return too_long_answer(smallest, limit)
        return RowFault(
            "last_turn_too_long",
            f"{smallest.longest} tokens are left when only the last turn before the answer is kept, and max_length is {limit}",
        )


def attempt(make: Callable[[Given], Made], given: Given) -> Made | RowFault:
    """What is made of it, or the fault that keeps it from being made."""
    try:
        return make(given)
    except RowFault as fault:
        return fault


def too_long_answer(ids: Encoded, limit: int) -> RowFault:
    """The fault of an answer that fills `max_length` alone; answers are never cut."""
    return RowFault("answer_too_long", f"the answer alone takes {ids.longest_answer} tokens, and max_length is {limit}")


def opening(turns: Sequence[Message]) -> int:
    """How many system messages open a chat; they are never cut."""
    return next((index for index, message in enumerate(turns) if message.role != "system"), len(turns))


def turn_starts(example: Example) -> list[int]:
    """The later turns of the user from which the chat could begin instead, the earliest first.

    Where there is a single answer of several turns, it can begin inside of it too, as long as something to learn is left.
    """
    turns = chat_turns(example)
    first = opening(turns)
    last = max(index for index, message in enumerate(turns) if message.counts or not demonstrated(example))
    return [index for index, message in enumerate(turns) if message.role == "user" and first < index <= last]


def from_turn(example: Example, start: int) -> Example:
    """The chat from that turn on, behind its system messages."""
    turns = chat_turns(example)
    kept = (*turns[: opening(turns)], *turns[start:])
    removed = len(turns) - len(kept)
    assert not isinstance(example.prompt, str), "raw text has no turns"
    if not demonstrated(example):
        return replace(example, prompt=kept)
    first_answer = next(index for index, message in enumerate(kept) if message.role == "assistant" and index > opening(turns))
    split = max(len(example.prompt) - removed, first_answer)
    return replace(example, prompt=kept[:split], answers=(replace(example.answers[0], content=kept[split:]),))


def chat_turns(example: Example) -> tuple[Message, ...]:
    """The turns that may be cut: the prompt's, and behind them a demonstration's, which ends with the assistant."""
    assert not isinstance(example.prompt, str), "raw text has no turns"
    return example.prompt + answer if (answer := demonstrated(example)) else example.prompt


def demonstrated(example: Example) -> Conversation:
    """The answer's turns where it is a demonstration's; of others none may be cut, since it is judged as a whole."""
    [first, *others] = example.answers
    return () if others or first.label is not None or isinstance(first.content, str) else first.content


def tree_of(example: Example, ids: Encoded, opened_with: str) -> PromptTree:
    """The tree of an example's ids."""
    completions = tuple(completion_of(answer, branch) for answer, branch in zip(example.answers, ids.branches, strict=True))
    prompt = token_ids([*ids.start, *ids.prompt.tolist()]) if ids.start else ids.prompt
    return PromptTree(prompt, completions, weight=example.weight, row_id=example.location, opening=opened_with)


def completion_of(answer: Answer, branch: Branch) -> Completion:
    """The completion of an answer's ids."""
    scored = None
    if branch.scored is not None:
        scored = np.array(branch.scored, dtype=np.bool_)
        scored.flags.writeable = False
    return Completion(
        branch.ids,
        scored=scored,
        label=answer.label,
        rank=answer.rank,
        reward=answer.reward,
        reference_logp=answer.reference_logp,
    )
