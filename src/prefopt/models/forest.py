"""Random prompt trees on which a model has to show that sharing is right.

They cross every window and chunk length that the config names and rows of `max_length` can reach, because a window that
is never exceeded would prove nothing. So do the pieces in which layers that carry a state compute long rows; their trees stand
apart, because rows without sharing are all as long as the longest.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from transformers import PretrainedConfig

from prefopt.engine.states import PIECE
from prefopt.trees import Completion, PromptTree, TokenIds, token_ids

SPAN_WORDS = ("window", "chunk", "original_max_position")
"""Parts of the names under which configs hold lengths beyond which a token's view of the row changes."""

NUM_SHORT_TREES = 3
"""Trees of the forest that cross no such length."""

UNNAMED = {64}
"""Chunks in which recurrences are computed whose length no config names: an argument's default in linear attention."""


def random_forest(config: PretrainedConfig, max_length: int) -> list[PromptTree]:
    """Random trees: short ones of two and three branches, one without a shared prompt, and some across each window or chunk.

    Args:
        config: of the model.
        max_length: longest prompt with completion of the run: what it cannot reach need not hold.
    """
    tree = _drawing(config)
    forest = [tree(11, 5, 8), tree(4, 3, 7, 2), tree(1, 6)]
    assert len(forest) == NUM_SHORT_TREES
    for span in sorted(spans_named(config) | (UNNAMED if carries_a_state(config) else set())):
        if span < max_length:
            # The edge falls inside the prompt for one branch's tokens, and inside the branch for the other's.
            forest += [tree(span - span // 4, span // 4 + 5, 4), tree(span + 3, 3, 6)]
    return forest


def long_trees(config: PretrainedConfig, max_length: int) -> list[PromptTree]:
    """Random trees of a model whose layers carry a state: a prompt, and two completions, that such a layer computes in pieces.

    Args:
        config: of the model.
        max_length: longest prompt with completion of the run; without rows that long there are none.
    """
    if not carries_a_state(config) or max_length < PIECE + 6:
        return []
    tree = _drawing(config)
    return [tree(PIECE + 3, 3), tree(3, PIECE + 3, PIECE - 4)]


def _drawing(config: PretrainedConfig) -> Callable[..., PromptTree]:
    """What draws a tree from the tokens of its prompt and of its completions, the same ones in every process."""
    vocabulary = config.get_text_config().vocab_size
    generator = np.random.default_rng(20230529)  # the DPO paper's date; any number does

    def draw(length: int) -> TokenIds:
        return token_ids(generator.integers(0, vocabulary, length).tolist())

    def tree(prompt: int, *completions: int) -> PromptTree:
        return PromptTree(draw(prompt), tuple(Completion(draw(length)) for length in completions))

    return tree


def spans_named(config: PretrainedConfig) -> set[int]:
    """Window and chunk lengths, and lengths from which on rotary embeddings change, that a config names."""

    def found(values: Mapping[str, object]) -> Iterator[int]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from found(value)
            elif isinstance(value, int) and value > 1 and any(word in name for word in SPAN_WORDS) and "layers" not in name:
                yield value

    return set(found(config.get_text_config().to_dict()))


def carries_a_state(config: PretrainedConfig) -> bool:
    """Whether the config names layers that pass a state from token to token."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return any("attention" not in kind or "linear" in kind for kind in kinds)
