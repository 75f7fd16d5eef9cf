"""Trees packed into the tensors of one forward pass.

Shapes: B trees, C completions, N scored tokens (completions' first, then prompts'); flat: T tokens in one row;
plain: R rows (one per completion) of L positions, padded on the right; fork: B rows of P positions, padded on the left,
then C rows of L positions, padded on the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prefopt.engine.layout import FlatLayout, ForkLayout, TreeSpan
from prefopt.trees import Completion, PromptTree, TokenIds

Sharing = Literal["flat", "fork", "plain"]
"""How completions share their prompt. flat: one row, tree attention. fork: every prompt once, and completions that continue from
copies of its cache; for layers that pass more from token to token than attention does. plain: every completion with its own prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class TreeBatch:
    """One micro-batch.

    Attributes:
        trees: the examples themselves, for what methods read beside log-probabilities.
        input_ids: [1, T] flat, [R, L] plain, or the prompts of a forked batch, [B, P]; int64.
        layout: where the trees stand in the flat row, or the completions of a forked batch; None: plain.
        attention_mask: [R, L], 1 on tokens and 0 on padding, of a plain batch; else None.
        predict_from_N: position, in the flattened input, whose output predicts each scored token, int64. Forked: in the
            flattened prompts with the flattened completions after them.
        target_N: the scored tokens' ids, int64.
        last_C: position of each completion's last token, counted in the same way, int64.
        lengths_C: scored tokens of each completion, int64.
        prompt_lengths_B: scored tokens of each prompt, int64.
        num_completion_tokens: how many of the N belong to completions.
        weight_B: how much each example counts, float32.
    """

    trees: tuple[PromptTree, ...]
    input_ids: Tensor
    layout: FlatLayout | ForkLayout | None
    attention_mask: Tensor | None
    predict_from_N: Tensor
    target_N: Tensor
    last_C: Tensor
    lengths_C: Tensor
    prompt_lengths_B: Tensor
    num_completion_tokens: int
    weight_B: Tensor

    @property
    def sharing(self) -> Sharing:
        """How it is packed."""
        return "plain" if self.layout is None else "flat" if isinstance(self.layout, FlatLayout) else "fork"

    @property
    def completions(self) -> tuple[Completion, ...]:
        """All completions, tree by tree, as the C of every tensor counts them."""
        return tuple(completion for tree in self.trees for completion in tree.completions)

    @property
    def num_tokens(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel() + (self.layout.completion_ids_CL.numel() if isinstance(self.layout, ForkLayout) else 0)

    def by_tree(self, values_C: Tensor, *, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Values as [B, K] with `fill` where a tree has fewer than K completions, and the mask of those that exist."""
        sizes_B = torch.tensor([len(tree.completions) for tree in self.trees], device=values_C.device)
        exists_BK = torch.arange(max(len(tree.completions) for tree in self.trees), device=values_C.device) < sizes_B[:, None]
        table_BK = values_C.new_full(exists_BK.shape, fill).masked_scatter(exists_BK, values_C)
        return table_BK, exists_BK

    def labels(self) -> Tensor:
        """Thumbs of the completions, bool [C]; a missing label counts as down."""
        return torch.tensor([bool(completion.label) for completion in self.completions], device=self.input_ids.device)

    def ranks(self) -> Tensor:
        """Ranks of the completions, 0 for the best, int64 [C]; where none is given, the order of the data."""
        ranks = [
            index if completion.rank is None else completion.rank
            for tree in self.trees
            for index, completion in enumerate(tree.completions)
        ]
        return torch.tensor(ranks, device=self.input_ids.device)

    def rewards(self) -> Tensor:
        """Scores that came with the data, float32 [C]; NaN where there is none."""
        rewards = [float("nan") if completion.reward is None else completion.reward for completion in self.completions]
        return torch.tensor(rewards, dtype=torch.float32, device=self.input_ids.device)


def cost(tree: PromptTree, sharing: Sharing) -> int:
    """Positions that a tree takes in a batch, before padding."""
    return tree.num_tokens if sharing != "plain" else sum(len(tree.prompt_ids) + len(completion.ids) for completion in tree.completions)


def pack(trees: Sequence[PromptTree], *, sharing: Sharing, device: torch.device | str = "cpu", pad_to_multiple: int = 1) -> TreeBatch:
    """One micro-batch of the trees.

    Args:
        trees: at least one; their order is the order of B and C.
        sharing: `flat` packs one row without padding, `plain` one padded row per completion, `fork` padded rows of prompts and
            of completions.
        device: where the tensors go.
        pad_to_multiple: plain only: the rows' length becomes a multiple of it.
    """

    def tensor(values: list[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device, non_blocking=True)

    attention_mask: Tensor | None = None
    layout: FlatLayout | ForkLayout | None = None
    if sharing == "flat":
        starts, input_ids, spans, positions = _flat_row(trees)
        layout = FlatLayout(spans, tensor(positions))
    elif sharing == "fork":
        starts, input_ids, parts = _forked_rows(trees)
        layout = ForkLayout(*map(tensor, parts))
    else:
        starts, input_ids, mask = _plain_rows(trees, pad_to_multiple)
        attention_mask = tensor(mask)
    predict_from: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    lengths: list[int] = []
    last: list[int] = []
    for tree, (prompt_start, branch_starts) in zip(trees, starts, strict=True):
        prompt_end = prompt_start + len(tree.prompt_ids) - 1
        for completion, start in zip(tree.completions, branch_starts, strict=True):
            # Token k of a completion is predicted from token k − 1; the first from the end of the prompt in its own row.
            source = np.arange(start - 1, start - 1 + len(completion.ids))
            source[0] = start - 1 if sharing == "plain" else prompt_end
            scored = slice(None) if completion.scored is None else completion.scored
            predict_from.append(source[scored])
            targets.append(completion.ids[scored])
            lengths.append(len(targets[-1]))
            last.append(start + len(completion.ids) - 1)
    num_completion_tokens = sum(lengths)
    prompt_lengths = [
        _add_prompt_tokens(tree, prompt_start, predict_from, targets) for tree, (prompt_start, _) in zip(trees, starts, strict=True)
    ]

    return TreeBatch(
        trees=tuple(trees),
        input_ids=tensor(input_ids),
        layout=layout,
        attention_mask=attention_mask,
        predict_from_N=tensor(np.concatenate(predict_from)),
        target_N=tensor(np.concatenate(targets)),
        last_C=tensor(last),
        lengths_C=tensor(lengths),
        prompt_lengths_B=tensor(prompt_lengths),
        num_completion_tokens=num_completion_tokens,
        weight_B=torch.tensor([tree.weight for tree in trees], dtype=torch.float32).to(device, non_blocking=True),
    )


Starts = list[tuple[int, list[int]]]
"""Of each tree: where its prompt starts in the flattened input (plain: in its first row), and each completion."""


def _flat_row(trees: Sequence[PromptTree]) -> tuple[Starts, np.ndarray, tuple[TreeSpan, ...], np.ndarray]:
    starts: Starts = []
    spans: list[TreeSpan] = []
    parts: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    start = 0
    for tree in trees:
        prompt = len(tree.prompt_ids)
        span = TreeSpan(start, prompt, tuple(len(completion.ids) for completion in tree.completions))
        spans.append(span)
        starts.append((start, [first for first, _ in span.branches()]))
        parts += [tree.prompt_ids, *(completion.ids for completion in tree.completions)]
        positions += [np.arange(prompt), *(np.arange(prompt, prompt + length) for length in span.completions)]
        start = span.end
    return starts, np.concatenate(parts)[None], tuple(spans), np.concatenate(positions)


def _plain_rows(trees: Sequence[PromptTree], multiple: int) -> tuple[Starts, np.ndarray, np.ndarray]:
    num_rows = sum(len(tree.completions) for tree in trees)
    width = -(-max(tree.longest for tree in trees) // multiple) * multiple
    input_ids = np.zeros((num_rows, width), dtype=np.int64)  # any id does for padding: it comes after all that is read
    attention_mask = np.zeros((num_rows, width), dtype=np.int64)
    starts: Starts = []
    row = 0
    for tree in trees:
        prompt = len(tree.prompt_ids)
        starts.append((row * width, [(row + branch) * width + prompt for branch in range(len(tree.completions))]))
        for completion in tree.completions:
            length = prompt + len(completion.ids)
            input_ids[row, :length] = np.concatenate([tree.prompt_ids, completion.ids])
            attention_mask[row, :length] = 1
            row += 1
    return starts, input_ids, attention_mask


def _forked_rows(trees: Sequence[PromptTree]) -> tuple[Starts, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The prompts, and the four parts of a `ForkLayout`."""
    prompts = [tree.prompt_ids for tree in trees]
    completions = [completion.ids for tree in trees for completion in tree.completions]
    prompt_ids, prompt_mask = _padded(prompts, on_the_left=True)
    completion_ids, completion_mask = _padded(completions, on_the_left=False)
    prompt_of = np.repeat(np.arange(len(trees)), [len(tree.completions) for tree in trees])
    width, length = prompt_ids.shape[1], completion_ids.shape[1]
    rows = iter(range(prompt_ids.size, prompt_ids.size + completion_ids.size, length))
    starts = [((row + 1) * width - len(tree.prompt_ids), [next(rows) for _ in tree.completions]) for row, tree in enumerate(trees)]
    return starts, prompt_ids, (prompt_mask, completion_ids, completion_mask, prompt_of)


def _padded(rows: Sequence[TokenIds], *, on_the_left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length, and 1 where their tokens stand."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), width) if on_the_left else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def _add_prompt_tokens(tree: PromptTree, prompt_start: int, predict_from: list[np.ndarray], targets: list[np.ndarray]) -> int:
    if tree.prompt_scored is None:
        return 0
    scored = np.flatnonzero(tree.prompt_scored)
    predict_from.append(prompt_start + scored - 1)
    targets.append(tree.prompt_ids[scored])
    return len(scored)
