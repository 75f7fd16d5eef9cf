"""Texts on which two forms of a model are compared: the run's own examples where they can be had, else anything that its
tokenizer knows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefopt.config import check
from prefopt.data import sources
from prefopt.data.dataset import check as read_examples
from prefopt.data.given import path_and_rest
from prefopt.data.growing import score_of
from prefopt.data.kinds import Kind
from prefopt.data.settings import ConversationSettings, DataSettings, PairSettings
from prefopt.data.template import chat_of
from prefopt.data.tokenize import Grower, TreeOptions
from prefopt.errors import ConfigError, PrefoptError
from prefopt.pipeline.trained import Trained
from prefopt.report.files import read_lines
from prefopt.training.assemble import method_named
from prefopt.trees import Completion, PromptTree, token_ids

NUM_TREES = 16
MAX_TOKENS = 4096
"""Enough to meet every layer many times, and a minute's work for a model of some billion weights on a few cores."""

LOOKED_AT = 256
"""Examples of a run that are made into tokens, to choose from."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What is compared on.

    Attributes:
        trees: the texts as tokens.
        are_pairs: whether each has a chosen answer and a rejected one.
        origin: where they come from, in words.
    """

    trees: tuple[PromptTree, ...]
    are_pairs: bool
    origin: str


class RowSettings(DataSettings, ConversationSettings, PairSettings):
    """What of a run's settings decides its trees."""


def texts_for(trained: Trained, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int) -> Texts:
    """Examples of the run; where there is no run, or its data is not there any more, texts of tokens drawn at random.

    Args:
        trained: what is known about the model.
        tokenizer: of the model.
        num_tokens: tokens that the model knows.
    """
    kind = kind_of(trained.config)
    for held_out in (True, False):
        trees = few(rows_of_run(trained, tokenizer, kind, held_out=held_out))
        if trees:
            whose = "held-out examples of the run" if held_out else "examples of the run"
            return Texts(trees, kind == "pair", f"{len(trees)} {whose}")
    return Texts(drawn(tokenizer, num_tokens), False, "texts drawn from the tokenizer's vocabulary")


def kind_of(config: Mapping[str, Any]) -> Kind:
    """What the run's rows hold."""
    try:
        return method_named(str(config.get("method"))).needs.completions
    except ConfigError:  # a method of the user's own
        return "pair"


def rows_of_run(trained: Trained, tokenizer: PreTrainedTokenizerBase, kind: Kind, *, held_out: bool) -> list[PromptTree]:
    """Examples of the run as it read them; none where they cannot be had.

    Args:
        trained: the run.
        tokenizer: of its model.
        kind: what its rows hold.
        held_out: those that were held out, as far as the run's notes name them; else any.
    """
    config = trained.config
    given = [trained.from_where_it_ran(str(name)) for name in config.get("eval_data" if held_out else "data") or config.get("data") or ()]
    if trained.files is None or not given or not all(Path(path_and_rest(name)[0]).exists() for name in given):
        return []
    names = {row.get("row") for row in read_lines(trained.files.held_out)} if held_out else set()
    if held_out and not names and not config.get("eval_data"):
        return []
    try:
        settings = check(RowSettings, {name: config[name] for name in RowSettings.model_fields if name in config})
        found = read_examples([sources.read(place) for place in sources.find(given).places], settings, kind).examples
        examples = [example for example in found if not names or example.location in names][:LOOKED_AT]
        chats = settings.text_as == "chat" or any(example.is_chat for example in examples)
        chat = chat_of(tokenizer, settings.chat_template, settings.template_args) if chats else None
        options = TreeOptions(score_of(settings, kind), settings.text_as, min(settings.max_length, MAX_TOKENS // 2), "cut")
        grown = Grower(tokenizer, chat, options).grow(examples)
    except PrefoptError:  # changed since, or given in another way than from here
        return []
    return [entry.tree for entry in grown if isinstance(entry.tree, PromptTree)]


def few(trees: Sequence[PromptTree]) -> tuple[PromptTree, ...]:
    """As many as may be compared on, evenly from among them; long ones are left out first."""
    if not trees:
        return ()
    step = max(1, len(trees) // NUM_TREES)
    chosen: list[PromptTree] = []
    left = MAX_TOKENS
    for tree in sorted(trees[::step][:NUM_TREES], key=positions):
        if chosen and positions(tree) > left:
            break
        chosen.append(tree)
        left -= positions(tree)
    return tuple(chosen)


def positions(tree: PromptTree) -> int:
    """Tokens that a model reads of it, each answer with its own prompt."""
    return tree.longest * len(tree.completions)


def drawn(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> tuple[PromptTree, ...]:
    """Texts of 64 tokens from the tokenizer's vocabulary, the same every time; all but their first half is scored."""
    special = set(tokenizer.all_special_ids)
    known = np.array([index for index in range(min(len(tokenizer), num_tokens)) if index not in special] or [0])
    rows = np.random.default_rng(0).choice(known, size=(NUM_TREES, 64))
    return tuple(PromptTree(token_ids(row[:32]), (Completion(token_ids(row[32:])),)) for row in rows)
