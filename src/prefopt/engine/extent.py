"""How many positions a forward pass computes, padding included, and trees in batches that compute no more than is allowed.

Flat rows have no padding. Plain and forked batches are as wide as their longest example.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefopt.engine.batch import Sharing
from prefopt.trees import PromptTree


@dataclass(frozen=True, slots=True)
class Extent:
    """How much a batch of some examples computes.

    Attributes:
        sharing: how it will be packed.
        num_tokens: of a flat row.
        num_prompts, num_completions: of the examples of a plain or forked batch.
        prompt, completion: tokens of the longest one each.
        longest: tokens of the longest prompt with completion.
    """

    sharing: Sharing
    num_tokens: int = 0
    num_prompts: int = 0
    num_completions: int = 0
    prompt: int = 0
    completion: int = 0
    longest: int = 0

    @property
    def num_positions(self) -> int:
        """Padding included."""
        if self.sharing == "flat":
            return self.num_tokens
        if self.sharing == "fork":
            return self.num_prompts * self.prompt + self.num_completions * self.completion
        return self.num_completions * self.longest

    def with_tree(self, tree: PromptTree) -> "Extent":
        """The same with one more example."""
        if self.sharing == "flat":
            return Extent(self.sharing, self.num_tokens + tree.num_tokens)
        return Extent(
            self.sharing,
            0,
            self.num_prompts + 1,
            self.num_completions + len(tree.completions),
            max(self.prompt, len(tree.prompt_ids)),
            max(self.completion, *(len(completion.ids) for completion in tree.completions)),
            max(self.longest, tree.longest),
        )


def num_positions(trees: Sequence[PromptTree], sharing: Sharing) -> int:
    """Positions that a forward pass over these examples computes, padding included."""
    size = Extent(sharing)
    for tree in trees:
        size = size.with_tree(tree)
    return size.num_positions


def batches(trees: Sequence[PromptTree], *, sharing: Sharing, max_tokens: int) -> Iterator[list[PromptTree]]:
    """Consecutive trees that take no more positions together, padding included, than allowed; a longer one stands alone."""
    batch: list[PromptTree] = []
    size = Extent(sharing)
    for tree in trees:
        size = size.with_tree(tree)
        if batch and size.num_positions > max_tokens:
            yield batch
            batch, size = [], Extent(sharing).with_tree(tree)
        batch.append(tree)
    if batch:
        yield batch
