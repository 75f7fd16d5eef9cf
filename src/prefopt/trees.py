"""A preference example is a tree: one prompt, and the completions that branch from it.

Trees are made once by `prefopt.data`, never changed, and read by everything above it. They hold
token ids and what a method reads beside them; no text, no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
TokenMask = npt.NDArray[np.bool_]


def token_ids(ids: Sequence[int] | TokenIds) -> TokenIds:
    """The ids as the read-only int32 array that trees are made of."""
    array = np.array(ids, dtype=np.int32)
    array.flags.writeable = False
    return array


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One branch of a prompt.

    Attributes:
        ids: its tokens, the end-of-turn token included; at least one.
        scored: which of its tokens count, as a mask of the same length; None: all of them.
        label: thumbs up or down, for methods that read single completions.
        rank: 0 for the best of its tree, and so on; for pairs the chosen is 0 and the rejected 1.
        reward: a score that came with the data.
        reference_logp: its summed log-probability under the reference, in nats, where the data brings it.
    """

    ids: TokenIds
    scored: TokenMask | None = None
    label: bool | None = None
    rank: int | None = None
    reward: float | None = None
    reference_logp: float | None = None

    def __post_init__(self) -> None:
        if len(self.ids) == 0:
            raise ValueError("a completion needs at least one token")
        if self.scored is not None and len(self.scored) != len(self.ids):
            raise ValueError(f"the mask covers {len(self.scored)} tokens, the completion has {len(self.ids)}")

    @property
    def num_scored(self) -> int:
        """How many of its tokens count."""
        return len(self.ids) if self.scored is None else int(self.scored.sum())


@dataclass(frozen=True, slots=True, eq=False)
class PromptTree:
    """One prompt and its completions.

    Attributes:
        prompt_ids: the prompt's tokens, at least one: a completion's first token is predicted from its last.
        completions: the branches; for pairs the chosen first, then the rejected.
        prompt_scored: which of the prompt's tokens count too (never the first: nothing predicts it); None: none.
        weight: how much the example counts; 0 is the same as leaving it out.
        row_id: where it came from, as `file:line`, for messages.
        opening: what the conversation opens with, as a digest: trees with the same one are never split between training
            and held-out data, whichever way the rows are read; empty where the tree was made by hand.
    """

    prompt_ids: TokenIds
    completions: tuple[Completion, ...]
    prompt_scored: TokenMask | None = None
    weight: float = 1.0
    row_id: str = ""
    opening: str = ""

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise ValueError("a prompt needs at least one token: the first token of a completion is predicted from it")
        if not self.completions:
            raise ValueError("a tree needs at least one completion")
        if self.prompt_scored is not None:
            if len(self.prompt_scored) != len(self.prompt_ids):
                raise ValueError(f"the mask covers {len(self.prompt_scored)} tokens, the prompt has {len(self.prompt_ids)}")
            if self.prompt_scored[0]:
                raise ValueError("the first token of a prompt cannot be scored: nothing predicts it")

    @property
    def num_tokens(self) -> int:
        """Tokens when the prompt is held once."""
        return len(self.prompt_ids) + sum(len(completion.ids) for completion in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt_ids) + max(len(completion.ids) for completion in self.completions)

    @property
    def num_scored(self) -> int:
        """Scored tokens of the completions; the prompt's own are not among them."""
        return sum(completion.num_scored for completion in self.completions)

    def with_weight(self, weight: float) -> "PromptTree":
        """The same tree with another weight."""
        return replace(self, weight=weight)
