"""Trees made of other trees when they are asked for, so that data larger than memory stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from prefopt.trees import PromptTree


class ArrangedTrees(Sequence[PromptTree]):
    """Each tree of a sequence, changed when it is asked for.

    Args:
        trees: as they are.
        change: makes a tree of a tree.
    """

    def __init__(self, trees: Sequence[PromptTree], change: Callable[[PromptTree], PromptTree]) -> None:
        self.trees = trees
        self.change = change

    def __len__(self) -> int:
        return len(self.trees)

    @overload
    def __getitem__(self, place: int) -> PromptTree: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[PromptTree]: ...

    def __getitem__(self, place: int | slice) -> PromptTree | Sequence[PromptTree]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        return self.change(self.trees[place])


def with_scored_prompt(tree: PromptTree) -> PromptTree:
    """The tree with all of its prompt scored but the first token, which nothing predicts."""
    scored = np.arange(len(tree.prompt_ids)) > 0
    return replace(tree, prompt_scored=scored)
