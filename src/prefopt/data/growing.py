"""From rows to trees on their way into a file: a batch at a time, counted as they pass.

At no time is more held than some batches, and eight bytes for each example, by which repeated ones are found.
"""

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from prefopt.data.counts import Counts
from prefopt.data.examples import Example
from prefopt.data.kinds import Kind
from prefopt.data.reading import Read, Reading
from prefopt.data.recognise import LOOKED_AT
from prefopt.data.rows import NOT_FAULTS, Dropped, Faults, RowFault
from prefopt.data.settings import ConversationSettings, DataSettings
from prefopt.data.show import is_pair
from prefopt.data.summary import DataSummary
from prefopt.data.template import chat_of
from prefopt.data.tokenize import Grower, Grown, TreeOptions
from prefopt.data.workers import CHUNK, grow_all
from prefopt.data.writer import TreeWriter
from prefopt.trees import PromptTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatFound(Exception):
    """There is a chat after all where only plain text was expected; caught by whoever can begin anew."""


class Growing:
    """Makes trees of all rows, and an account of what happened to them.

    Args:
        readings: the sources.
        settings: how to read them.
        tokenizer: cuts texts.
        writer: takes the trees.
        chats: whether there are chats, which need a template.
        score: which turns count.

    Raises:
        DataError: the template cannot be used, or the tokenizer has no token that could end an answer.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        settings: DataSettings,
        tokenizer: "PreTrainedTokenizerBase",
        writer: TreeWriter,
        *,
        chats: bool,
        score: Literal["completion", "assistant"] = "completion",
    ) -> None:
        self.readings = readings
        self.settings = settings
        self.tokenizer = tokenizer
        self.writer = writer
        self.chat = chat_of(tokenizer, settings.chat_template, settings.template_args) if chats else None
        options = TreeOptions(score, settings.text_as, settings.max_length, settings.too_long)
        self.grower = Grower(tokenizer, self.chat, options)
        self.unread = Faults()
        """Rows that are no examples."""
        self.unfit = Faults()
        """Examples that give no tree, and what is none in the kind of data that was asked for."""
        self.wrong = Faults()
        """Those of them that are at fault themselves, not too long."""
        self._waiting: deque[list[Read]] = deque()
        self._contents = array("q")
        self._has_raw = False
        self._num_glued = self._num_cut = self._num_merges = self._num_rewritten = 0
        self._pairs = [0, 0, 0]
        self._shapes = Counts()

    @property
    def num_rows(self) -> int:
        """Rows read, bad ones included."""
        return sum(reading.num_rows for reading in self.readings)

    def run(self) -> None:
        """All of them.

        Raises:
            ChatFound: there is a chat, and none was expected.
            DataError: a source is damaged, or the disk is full.
        """
        for grown in grow_all(self.grower, self._batches(), self.settings.data_workers):
            self._take(self._waiting.popleft(), grown)

    def summary(self) -> DataSummary:
        """The account of it, when all is done."""
        chat = self.chat
        own = DataSummary(
            sources=tuple(reading.summary() for reading in self.readings),
            num_rows=self.num_rows,
            num_more=sum(reading.num_more for reading in self.readings),
            dropped=(self.unread + self.unfit).counts,
            num_cut=self._num_cut,
            num_merges=self._num_merges,
            num_rewritten=self._num_rewritten,
            num_duplicates=len(self._contents) - len(np.unique(np.frombuffer(self._contents, np.int64))),
            num_glued=self._num_glued,
            template=chat.origin if chat is not None else "",
            notes=tuple(self._notes()),
            **self._shapes.to_dict(),
        )
        return own.with_sizes(self.writer.sizes, *self._pairs)

    def _batches(self) -> Iterator[list[Example]]:
        batch: list[Read] = []
        for entry in (entry for reading in self.readings for entry in reading):
            if isinstance(entry, Dropped):
                (self.unfit if entry.reason in NOT_FAULTS else self.unread).add(entry)
                continue
            if self.settings.on_bad_row == "stop" and self.unread.num:
                continue  # the rest is read for the list of bad rows, and nothing will come of it
            self._note(entry.example)
            batch.append(entry)
            if len(batch) == CHUNK:
                self._waiting.append(batch)
                yield [read.example for read in batch]
                batch = []
        if batch:
            self._waiting.append(batch)
            yield [read.example for read in batch]

    def _note(self, example: Example) -> None:
        self._contents.append(hash((example.prompt, example.answers, example.tools)))
        if example.is_chat:
            if self.chat is None:
                raise ChatFound
        elif example.prompt and self.settings.text_as == "raw":
            self._has_raw = True
            self._num_glued += is_glued(example)

    def _take(self, batch: Sequence[Read], grown: Sequence[Grown]) -> None:
        trees = []
        for read, entry in zip(batch, grown, strict=True):
            self._num_cut += entry.cut
            self._num_merges += entry.merges
            self._num_rewritten += entry.rewritten
            tree = entry.tree
            if isinstance(tree, RowFault):
                dropped = Dropped(read.example.location, tree.reason, tree.detail, read.columns)
                self.unfit.add(dropped)
                if tree.reason not in NOT_FAULTS:
                    self.wrong.add(dropped)
                continue
            trees.append(tree)
            self._shapes.add(tree.completions)
            self._count_pair(tree)
        self.writer.add(trees)

    def _count_pair(self, tree: PromptTree) -> None:
        if is_pair(tree):
            chosen, rejected = tree.completions
            self._pairs[0] += 1
            self._pairs[1] += len(chosen.ids)
            self._pairs[2] += len(rejected.ids)

    def _notes(self) -> Iterator[str]:
        unused = [name for name in ("chat_template", "template_args") if getattr(self.settings, name)]
        if unused and self.chat is None:
            yield f"{' and '.join(unused)} had nothing to do: no row is a chat; `--text-as chat` makes plain prompts one"
        if contrary := sum(reading.num_contrary for reading in self.readings):
            yield (
                f"{contrary:,} of {self.num_rows:,} rows bring scores that contradict their own order: a worse answer has the higher one. "
                "The order counts; see whether chosen and rejected, or the scores, are the wrong way round"
            )
        if self._has_raw and self.tokenizer.chat_template:
            yield "prompts are plain text and are used as they are; the tokenizer has a chat template, which `--text-as chat` would use"
        if self.chat is not None and self.chat.origin == "default":
            yield (
                "the tokenizer has no chat template: chats are written as transcripts (Human:/Assistant:), "
                "each answer closed by the end-of-sequence token"
            )


def score_of(settings: DataSettings, kind: Kind) -> Literal["completion", "assistant"]:
    """Which turns count: the last answer, unless the settings of demonstrations say otherwise."""
    return settings.score if isinstance(settings, ConversationSettings) and kind == "demonstration" else "completion"


def chats_expected(readings: Sequence[Reading], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether there are chats: by a look at the first rows, or at all of them where the end of plain text depends on it."""
    if settings.text_as == "chat":
        return True
    looked_at = LOOKED_AT if tokenizer.eos_token else None
    return any(isinstance(entry, Read) and entry.example.is_chat for reading in readings for entry in islice(reading.again(), looked_at))


def is_glued(example: Example) -> bool:
    """Whether raw text and its answers meet without white space."""
    assert isinstance(example.prompt, str), "only raw text is glued"
    return not example.prompt[-1].isspace() and any(not str(answer.content)[0].isspace() for answer in example.answers)
