"""Text to ids, so that a prompt's ids are always the beginning of the ids of prompt and answer.

The prompt is encoded alone, as it is at generation. What follows it is encoded in its context: the
answer's ids are what joint tokenisation puts behind the prompt's ids. Where joint tokenisation would
merge across the boundary (its ids do not begin with the prompt's) the answer is encoded apart, and
the boundary is counted.

Encoding prompt and answer jointly means reading a long prompt once per answer. Where the tokenizer is
proved to allow it (`prefopt.data.locality`), texts are put together from the ids of their words
instead, and a prompt is read once.

For others a short window of the text before the boundary tells the same: if the window's ids are the
last ids of the prompt, what follows cannot be seen differently from further back. That is an
assumption about tokenizers (no id depends on text far away), so it is tried out on the first examples
against the whole text, and given up for this tokenizer if any id differs. So are words.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prefopt.data.locality import is_stock, words_of
from prefopt.data.pieces import Piece
from prefopt.data.rows import RowFault
from prefopt.data.template import Rendered, added_prefix
from prefopt.data.words import Ids, NotLocal, Words, packed
from prefopt.trees import TokenIds, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 48
"""Characters of context before a boundary; words are shorter, and where they are not the whole text is read."""

TRIED = 32
"""Examples on which the window, or words, are tried out against the whole text."""

ENOUGH = 400
"""Examples at once from which on the proof that words may be encoded pays."""


BLANK = RowFault("blank_answer", "the tokenizer has no token for the answer, or only the end-of-turn token")
UNLEARNED = RowFault("nothing_to_learn", "the tokenizer has no token for what is to be learned of the answer")


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """An answer's ids; `scored` is None where all count."""

    ids: TokenIds
    scored: list[bool] | None


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An example as ids.

    Attributes:
        start: what stands before the prompt's own ids and is never cut: BOS, for raw text.
        prompt: the prompt's ids.
        branches: the answers' ids.
        merges: boundaries that joint tokenisation would have merged across.
    """

    start: Ids
    prompt: TokenIds
    branches: tuple[Branch, ...]
    merges: int

    @property
    def longest_answer(self) -> int:
        """Ids of the longest answer."""
        return max(len(branch.ids) for branch in self.branches)

    @property
    def longest(self) -> int:
        """Ids of the prompt with its longest answer."""
        return len(self.start) + len(self.prompt) + self.longest_answer


class Encoder:
    """Encodes rendered examples with one tokenizer.

    Args:
        tokenizer: fast or slow.
        end_of_turn: the text of the token that closes an answer.
        anchors: texts of tokens that no text is merged with; the last one before a boundary opens its window.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end_of_turn: str, anchors: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.end_text = end_of_turn
        self.end_id = token_id(tokenizer, end_of_turn)
        self.anchors = tuple(anchors)
        self.start = list(added_prefix(tokenizer))
        self.is_stock = is_stock(tokenizer)
        self.words: Words | None = None
        self.num_untried_words = TRIED
        self.window_size: int | None = WINDOW
        self.num_untried = TRIED

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Each text's ids, no special token added."""
        return self.words.ids(texts) if self.words is not None and texts else self.whole_ids(texts)

    def whole_ids(self, texts: Sequence[str]) -> list[Ids]:
        """The same from whole texts, whatever is known of words."""
        if not texts:
            return []
        if self.is_stock:
            backend = self.tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            return [entry.ids for entry in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        batch = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return list(batch["input_ids"])

    def encode(self, examples: Sequence[Rendered]) -> list[Encoded | RowFault]:
        """Each example's ids, or why it has none."""
        if self.words is None and len(examples) >= ENOUGH and self.num_untried_words:
            self.words = words_of(self.tokenizer)
            self.num_untried_words = TRIED if self.words is not None else 0
        if self.words is not None:
            try:
                return self.by_words(examples)
            except NotLocal:
                self.words, self.num_untried_words = None, 0
        if self.num_untried > 0 and self.window_size is not None:
            self.try_window(examples[: self.num_untried])
        return self.rounds(examples)

    def by_words(self, examples: Sequence[Rendered]) -> list[Encoded | RowFault]:
        """Each example's ids, put together from those of its words; the first examples are compared with the whole texts.

        Raises:
            NotLocal: they differ, or as `Words.learn`.
        """
        assert self.words is not None
        simple = [index for index, example in enumerate(examples) if all(len(pieces) == 1 for pieces in example.branches)]
        others = sorted({*range(len(examples))} - {*simple})
        results = dict(zip(simple, WordAssembly(self, self.words).examples([examples[index] for index in simple]), strict=True))
        results |= zip(others, self.rounds([examples[index] for index in others]), strict=True)
        if self.num_untried_words:
            tried = range(min(self.num_untried_words, len(examples)))
            self.num_untried_words -= len(tried)
            words, window = self.words, self.window_size
            self.words = self.window_size = None
            whole = self.rounds([examples[index] for index in tried])
            self.words, self.window_size = words, window
            if [ids_of(entry) for entry in whole] != [ids_of(results[index]) for index in tried]:
                raise NotLocal
        return [results[index] for index in range(len(examples))]

    def try_window(self, examples: Sequence[Rendered]) -> None:
        """Gives the window up where it sees other ids than the whole text."""
        seen_through_window = self.rounds(examples)
        self.window_size = None
        if [ids_of(entry) for entry in self.rounds(examples)] == [ids_of(entry) for entry in seen_through_window]:
            self.window_size = WINDOW
        self.num_untried -= len(examples)

    def rounds(self, examples: Sequence[Rendered]) -> list[Encoded | RowFault]:
        """All examples, in as many batches as it takes until every text that is asked for is known."""
        known: dict[str, Ids] = {}
        results: list[Encoded | RowFault | None] = [None] * len(examples)
        open_indices = list(range(len(examples)))
        while open_indices:
            wanted: dict[str, None] = {}
            for index in open_indices:
                results[index] = Assembly(self, known, wanted).example(examples[index])
            open_indices = [index for index in open_indices if results[index] is None]
            known.update(zip(wanted, self.ids(list(wanted)), strict=True))
        return [result for result in results if result is not None]

    def window(self, left: str) -> str:
        """The end of the text before a boundary that is enough context for what follows."""
        if self.window_size is None:
            return left
        earliest = max(0, len(left) - self.window_size)
        anchor = max((left.rfind(anchor, earliest) for anchor in self.anchors), default=-1)
        if anchor >= 0:
            return left[anchor:]
        if earliest <= self.window_size:
            return left
        space = left.rfind(" ", earliest - self.window_size, earliest)
        return left[space if space >= 0 else earliest :]

    def start_of(self, example: Rendered, prompt: Ids) -> Ids:
        """What stands before a prompt's own ids: BOS, or for an empty prompt, as in GPT-2, at least the end-of-sequence token."""
        start = [] if example.is_chat else self.start
        if prompt[: len(start)] == start:
            start = []
        if prompt or start:
            return start
        bos = self.tokenizer.bos_token_id
        return [int(bos) if isinstance(bos, int) else self.end_id]


@dataclass(frozen=True, slots=True)
class WordAssembly:
    """Puts the ids of examples together from those of words; each answer is of one piece.

    The stretches of prompt and answer are those of the prompt but for its last one, and those of that last one with the
    answer behind it: a border is told by what stands beside it.
    """

    encoder: Encoder
    words: Words

    def examples(self, examples: Sequence[Rendered]) -> list[Encoded | RowFault]:
        """Each example's ids, or why it has none.

        Raises:
            NotLocal: as `Words.learn`.
        """
        cut = self.words.cut
        first: set[str] = set()
        later: set[str] = set()
        stretches: list[tuple[list[str], list[list[str]]]] = []
        for example in examples:
            prompt = cut(example.prompt)
            joint = [cut(prompt[-1] + pieces[0].text) for pieces in example.branches]
            stretches.append((prompt, joint))
            first.add(prompt[0])
            later.update(prompt[1:])
            for own in joint:
                (first if len(prompt) == 1 else later).add(own[0])
                later.update(own[1:])
        self.words.learn(first, later)
        return [self.example(example, *own) for example, own in zip(examples, stretches, strict=True)]

    def example(self, example: Rendered, prompt: Sequence[str], joint: Sequence[Sequence[str]]) -> Encoded | RowFault:
        """An example's ids from its stretches: of the prompt, and of the prompt's last one with each answer behind it."""
        is_first = len(prompt) == 1
        ids = self.words.joined(prompt)
        before = ids if is_first else self.words.later[prompt[-1]]
        end = packed([self.encoder.end_id])
        branches: list[Branch] = []
        merges = 0
        for pieces, own in zip(example.branches, joint, strict=True):
            new = self.words.joined(own) if is_first else self.words.continued(own)
            if new.startswith(before):
                new = new[len(before) :]
            else:
                new = packed(self.encoder.whole_ids([pieces[0].text])[0])
                merges += 1
            while new.endswith(end):
                new = new[: -len(end)]
            if not new:
                return BLANK
            branches.append(Branch(np.frombuffer(new + end, np.int32), None))
        head = np.frombuffer(ids, np.int32)
        begins = head[: max(1, len(self.encoder.start))].tolist()
        return Encoded(self.encoder.start_of(example, begins), head, tuple(branches), merges)


@dataclass(frozen=True, slots=True)
class Assembly:
    """Puts an example's ids together from texts already encoded, and notes the texts that are still wanted."""

    encoder: Encoder
    known: Mapping[str, Ids]
    wanted: dict[str, None]

    def get(self, text: str) -> Ids | None:
        """The text's ids, or None, and a note to encode it."""
        ids = self.known.get(text)
        if ids is None:
            self.wanted[text] = None
        return ids

    def example(self, example: Rendered) -> Encoded | RowFault | None:
        """The example's ids; None while a text is wanted."""
        prompt = self.get(example.prompt)
        branches: list[Branch] = []
        merges = 0
        waiting = prompt is None
        for pieces in example.branches:
            grown = self.branch(example.prompt, prompt, pieces)
            if isinstance(grown, RowFault):
                return grown
            if grown is None:
                waiting = True
                continue
            branches.append(grown[0])
            merges += grown[1]
        if waiting or prompt is None:
            return None
        return Encoded(self.encoder.start_of(example, prompt), token_ids(prompt), tuple(branches), merges)

    def branch(self, left: str, left_ids: Ids | None, pieces: Sequence[Piece]) -> tuple[Branch, int] | RowFault | None:
        """An answer's ids and how many of its boundaries merge; None while a text is wanted."""
        encoder = self.encoder
        ids: Ids = []
        scored: list[bool] = []
        begin = merges = 0
        for piece in pieces:
            found = self.continued(left, None if left_ids is None else left_ids + ids, piece.text)
            left += piece.text + (encoder.end_text if piece.ends_turn else "")
            if found is None:
                left_ids = None
                continue
            new, merged = found
            merges += merged
            begin = begin if piece.goes_on else len(ids)
            ids += new
            scored += [piece.scored] * len(new)
            if piece.ends_turn:
                while len(ids) > begin and ids[-1] == encoder.end_id:
                    del ids[-1], scored[-1]
                if len(ids) == begin:
                    return BLANK
                ids.append(encoder.end_id)
                scored.append(piece.end_scored)
        if left_ids is None:
            return None
        if not any(own and number != encoder.end_id for number, own in zip(ids, scored, strict=True)):
            return UNLEARNED
        return Branch(token_ids(ids), None if all(scored) else scored), merges

    def continued(self, left: str, left_ids: Ids | None, text: str) -> tuple[Ids, bool] | None:
        """The ids of a text behind another, and whether joint tokenisation would merge the two.

        None while a text is wanted, or what stands before is not known yet (`left_ids` is None).
        """
        window = self.encoder.window(left)
        if len(window) < len(left):
            before, joint = self.get(window), self.get(window + text)
            if before is None or joint is None or left_ids is None:
                return None
            # The first half may differ: the window can begin inside a word.
            half = before[len(before) // 2 :]
            if half and left_ids[-len(half) :] == half:
                if joint[: len(before)] == before:
                    return joint[len(before) :], False
                return self.apart(text)
        joint = self.get(left + text)
        if joint is None or left_ids is None:
            return None
        if joint[: len(left_ids)] == left_ids:
            return joint[len(left_ids) :], False
        return self.apart(text)

    def apart(self, text: str) -> tuple[Ids, bool] | None:
        """The ids of a text encoded alone, for a boundary that would merge."""
        ids = self.get(text)
        return None if ids is None else (ids, True)


def token_id(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    """The id of a token that the tokenizer knows."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), "one token has one id"
    return found


def ids_of(entry: Encoded | RowFault) -> object:
    """What must not depend on how it was found."""
    if isinstance(entry, RowFault):
        return entry.detail
    return entry.start, entry.prompt.tolist(), [(branch.ids.tolist(), branch.scored) for branch in entry.branches], entry.merges
