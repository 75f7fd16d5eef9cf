"""Where the trees of a packed batch stand, for the attention and the cache to read.

A flat row holds tree after tree; a tree holds its prompt, then its completions:

    prompt ───────┬─ completion 0
                  └─ completion 1      ->   [prompt | completion 0 | completion 1 | next tree's prompt | ...]

Position ids restart at every prompt, and at the prompt's length for every completion, so a token sees the
positions it would see alone. A completion attends to its prompt and to itself; a prompt to itself. The prompt
and its first completion are one causal stretch; each further completion reads the prompt's keys again.

A forked batch holds the prompts as rows of their own, padded on the left, and the completions as rows that continue
from copies of what the prompt left in the model's cache, padded on the right.

Shapes: T tokens in the row, Q queries and K keys of a stretch; forked: B prompts of P positions, C completions of L.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """One tree in the row: its first token, its prompt's length, its completions' lengths."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def end(self) -> int:
        """One past its last token."""
        return self.start + self.prompt + sum(self.completions)

    def branches(self) -> Iterator[tuple[int, int]]:
        """First token and length of each completion."""
        first = self.start + self.prompt
        for length in self.completions:
            yield first, length
            first += length


@dataclass(frozen=True, slots=True)
class Varlen:
    """The row as variable-length sequences: each stretch of queries with the keys it may read, copied together.

    Attributes:
        keys_K: indices into the row, all stretches' keys one after the other, int64.
        query_offsets, key_offsets: where each stretch begins, with the total at the end, int32.
        max_queries, max_keys: the longest stretch.
    """

    keys_K: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True, eq=False)
class FlatLayout:
    """The trees of a row, and what attention derives from them once per batch and reads in every layer.

    Attributes:
        spans: the trees in order, without gaps.
        position_ids_T: position of each token in its own prompt + completion.
        memo: masks and offsets by kind; filled by `mask`, `varlen` and the CUDA attention, never by callers.
    """

    spans: tuple[TreeSpan, ...]
    position_ids_T: Tensor
    memo: dict[object, object] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Length of the row."""
        return self.spans[-1].end

    @property
    def stretches(self) -> list[int]:
        """Lengths of the causal stretches, in order: each prompt with its first completion, then each other completion."""
        return [length for span in self.spans for length in (span.prompt + span.completions[0], *span.completions[1:])]

    @property
    def longest_branch(self) -> int:
        """Tokens of the longest prompt with completion: a window at least as long hides nothing."""
        return max(span.prompt + max(span.completions) for span in self.spans)

    def later_branch_mask(self, prompt: int, completion: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [Q, K] of a completion over its prompt and itself: 0 where it may look, −inf elsewhere."""
        return self._mask(completion, prompt + completion, window, dtype)

    def first_branch_mask(self, length: int, window: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [Q, Q] of a prompt with its first completion under a sliding window."""
        return self._mask(length, length, window, dtype)

    def _mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        key = (queries, keys, window, dtype)
        mask = self.memo.get(key)
        if not isinstance(mask, Tensor):
            device = self.position_ids_T.device
            distance_QK = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
            hidden_QK = distance_QK < 0 if window is None else (distance_QK < 0) | (distance_QK >= window)
            mask = torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden_QK, float("-inf"))
            self.memo[key] = mask
        return mask

    def varlen(self) -> Varlen:
        """The row as variable-length sequences, whose last query is aligned with its last key."""
        varlen = self.memo.get("varlen")
        if not isinstance(varlen, Varlen):
            varlen = self._make_varlen()
            self.memo["varlen"] = varlen
        return varlen

    def visible(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Who sees whom, as FlexAttention asks it: (batch, head, query, key) -> bool."""
        device = self.position_ids_T.device
        tree_T = torch.cat([torch.full((span.end - span.start,), index) for index, span in enumerate(self.spans)]).to(device)
        branch_T = torch.cat(
            [
                torch.full((length,), branch)
                for span in self.spans
                for branch, length in enumerate((span.prompt, *span.completions))  # branch 0 is the prompt
            ]
        ).to(device)
        position_T = self.position_ids_T

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (tree_T[query] == tree_T[key]) & ((branch_T[key] == 0) | (branch_T[key] == branch_T[query]))
            distance = position_T[query] - position_T[key]
            near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            return own & near

        return sees

    def _make_varlen(self) -> Varlen:
        keys: list[Tensor] = []
        num_queries: list[int] = []
        for span in self.spans:
            first_length = span.prompt + span.completions[0]
            keys.append(torch.arange(span.start, span.start + first_length))
            num_queries.append(first_length)
            for first, length in list(span.branches())[1:]:
                keys.append(torch.cat([torch.arange(span.start, span.start + span.prompt), torch.arange(first, first + length)]))
                num_queries.append(length)
        num_keys = [len(stretch) for stretch in keys]
        device = self.position_ids_T.device
        return Varlen(
            keys_K=torch.cat(keys).to(device),
            query_offsets=_offsets(num_queries).to(device),
            key_offsets=_offsets(num_keys).to(device),
            max_queries=max(num_queries),
            max_keys=max(num_keys),
        )


@dataclass(frozen=True, slots=True, eq=False)
class ForkLayout:
    """Completions that continue from their prompts' cache.

    Prompts end at the same position: what a recurrent layer carries on is then the state after a prompt's last token, and a
    padded position before the first one leaves it at zero, where layers heed the mask. Whether a model's do is proved, as all else.

    Attributes:
        prompt_mask_BP: 1 on tokens and 0 on the padding before them, int64.
        completion_ids_CL: the completions' tokens, int64.
        completion_mask_CL: 1 on tokens and 0 on the padding after them, int64.
        prompt_of_C: which prompt each completion continues, int64.
    """

    prompt_mask_BP: Tensor
    completion_ids_CL: Tensor
    completion_mask_CL: Tensor
    prompt_of_C: Tensor

    @property
    def prompt_positions_BP(self) -> Tensor:  # noqa: N802  # a shape is part of the name
        """Position of each prompt token in its own text; 0 on padding."""
        return (self.prompt_mask_BP.cumsum(1) - 1).clamp(min=0)

    @property
    def completion_positions_CL(self) -> Tensor:  # noqa: N802  # as above
        """Position of each completion token in its own prompt + completion; it goes on over the padding."""
        lengths_C = self.prompt_mask_BP.sum(1)[self.prompt_of_C]
        return lengths_C[:, None] + torch.arange(self.completion_ids_CL.shape[1], device=lengths_C.device)

    @property
    def seen_CK(self) -> Tensor:  # noqa: N802  # as above
        """1 on every token of a completion's prompt and of itself, [C, P + L]."""
        return torch.cat([self.prompt_mask_BP[self.prompt_of_C], self.completion_mask_CL], dim=1)


def _offsets(lengths: list[int]) -> Tensor:
    """[0, a, a + b, ...] of lengths a, b, ..., int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
