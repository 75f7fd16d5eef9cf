"""Layers that carry a state from token to token (recurrences, convolutions), inside a flat row.

All other layers compute the row as it stands, without padding, and attention knows its trees. A layer with a state would run on
from one tree into the next, so it gets its tokens as rows: the prompts, padded on the left, and then the completions, padded on
the right, which continue from copies of the state that their prompts left in a cache of the library's own. Its outputs go back
to where their tokens stand. Rows of like length run together, so that a long one does not pad the short ones.

Nobody is asked whether a layer can do that: it is proved at load, as everything that is shared.

Shapes: T tokens of the flat row, R rows of L positions, D hidden size.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from prefopt.engine.layout import FlatLayout

Item = TypeVar("Item")

CHUNK = 64
"""Positions at a time in which linear attention is computed, at most: rows are cut into equal chunks, so that hardly any is padded."""

STEP = 16
"""Rows whose lengths differ by less than this are of one length."""

CALL = 256
"""What a further call of a layer costs beside its positions, in positions. A small model's layer on a CPU takes 12 ms for it and 6 ms
for 64 positions; a GPU would rather have fewer calls."""


PIECE = 480
"""Positions that a layer computes at once on a CPU; longer rows go on from piece to piece as completions go on from prompts. The
library's convolution takes a hundred times as long to go back over more than 508 (docs/experiments.md)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Stretches of the flat row that a layer computes together.

    Attributes:
        index_RL: place of each position in the flat row; 0 on padding, int64.
        mask_RL: 1 on tokens and 0 on padding, int64.
    """

    index_RL: Tensor
    mask_RL: Tensor

    def pieces(self) -> list["Rows"]:
        """These columns in as many equal parts as `PIECE` asks for; itself, where that is one."""
        count = -(-self.index_RL.shape[1] // PIECE) if self.index_RL.device.type == "cpu" else 1
        return [Rows(*parts) for parts in zip(self.index_RL.chunk(count, 1), self.mask_RL.chunk(count, 1), strict=True)]

    @property
    def chunk_size(self) -> int:
        """Positions of a chunk, where the row is cut into as many equal ones as `CHUNK` asks for."""
        width = self.index_RL.shape[1]
        return -(-width // -(-width // CHUNK))

    @classmethod
    def of(cls, stretches: Sequence[tuple[int, int]], *, on_the_left: bool, device: torch.device) -> "Rows":
        """Rows of stretches given by first token and length, padded on that side."""
        firsts_R, lengths_R = torch.tensor(stretches).unbind(1)
        # One position alone would be taken for a step of generation, which writes into the state in place.
        width = max(2, int(lengths_R.max()))
        places_RL = torch.arange(width) - ((width - lengths_R) if on_the_left else torch.zeros_like(lengths_R))[:, None]
        mask_RL = (places_RL >= 0) & (places_RL < lengths_R[:, None])
        return cls(((firsts_R[:, None] + places_RL) * mask_RL).to(device), mask_RL.long().to(device))


@dataclass(frozen=True, slots=True)
class Forks:
    """Prompts of like length, and their completions in groups of like length.

    Attributes:
        prompts: one row each.
        completions: each group's rows, and which of these prompts each row continues, int64.
    """

    prompts: Rows
    completions: tuple[tuple[Rows, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A flat row in rows, for layers with a state.

    Attributes:
        forks: what runs together, in this order.
        back_T: where each token of the flat row stands in all these rows one after the other.
    """

    forks: tuple[Forks, ...]
    back_T: Tensor


def in_rows(model: nn.Module, *, wanted: bool) -> None:
    """Let the layers of this model that carry a state compute flat rows, and nothing else, from now on; or as they always do."""
    config = getattr(model, "config", None)
    for module in model.modules():
        layer = place_of_state(module)
        if layer is None or not isinstance(config, PretrainedConfig):
            continue
        now = vars(module).get("forward")
        own = now.args[0] if isinstance(now, partial) and now.func is _forward else None
        if wanted and own is None:
            takes_chunks = not hasattr(module, "chunk_size")  # else its config says how long they are
            module.forward = partial(_forward, module.forward, config.get_text_config(), layer, takes_chunks)
        elif own is not None and not wanted:
            module.forward = own


def place_of_state(module: nn.Module) -> int | None:
    """Where in a cache a layer has its state; None: it is none that has. Those of the library all have a convolution, attention none."""
    layer = getattr(module, "layer_idx", None)
    return layer if isinstance(layer, int) and any(isinstance(child, nn.Conv1d) for child in module.children()) else None


def name_of_cache(forward: Callable[..., object]) -> str:
    """What a forward of the library calls its cache."""
    return "cache_params" if "cache_params" in signature(forward).parameters else "past_key_values"


def _forward(
    forward: Callable[..., Tensor],
    config: PretrainedConfig,
    layer: int,
    takes_chunks: bool,
    hidden_states: Tensor,
    *,
    tree_layout: FlatLayout | None = None,
    **others: object,
) -> Tensor:
    """The layer's own forward over the rows of a flat row, [1, T, D] -> [1, T, D].

    Raises:
        ValueError: the layout did not arrive: the row would be one text.
    """
    if tree_layout is None:
        raise ValueError("a layer with a state was called without tree_layout: this architecture does not pass keywords on to it")
    name = name_of_cache(forward)
    hidden_TD = hidden_states[0]

    def run(rows: Rows, cache: DynamicCache, *, masked: bool) -> Tensor:
        pieces: list[Tensor] = []
        for piece in rows.pieces():
            if pieces:
                cache.layers[layer] = forked(cache.layers[layer])
            hidden_RLD = hidden_TD.index_select(0, piece.index_RL.flatten()).view(*piece.index_RL.shape, -1)
            # The library hands keywords on to the functions that know them.
            chunks = {"chunk_size": piece.chunk_size} if takes_chunks else {}
            mask_RL = piece.mask_RL if masked else None
            pieces.append(forward(hidden_RLD, **(others | chunks | {name: cache, "attention_mask": mask_RL})))
        return torch.cat(pieces, dim=1).flatten(0, 1)

    outputs: list[Tensor] = []
    arrangement = arranged(tree_layout)
    for forks in arrangement.forks:
        cache = DynamicCache(config=config)
        outputs.append(run(forks.prompts, cache, masked=True))
        left_by_prompts = cache.layers[layer]
        for rows, prompt_of_R in forks.completions:
            cache.layers[layer] = forked(left_by_prompts, prompt_of_R)
            outputs.append(run(rows, cache, masked=False))  # what stands behind a completion does not reach it
    return torch.cat(outputs).index_select(0, arrangement.back_T)[None]


def forked(layer: Any, prompt_of_R: Tensor | None = None) -> Any:
    """A layer's cache, copied for each row that goes on from it; the one given stays as it is.

    Args:
        layer: of a cache of the library, as prompts left it.
        prompt_of_R: which prompt each row continues; None: each its own.
    """
    own = copy.copy(layer)
    for name, value in vars(own).items():
        if isinstance(value, dict):
            setattr(own, name, dict(value))
    if prompt_of_R is not None:
        own.reorder_cache(prompt_of_R)
    if hasattr(own, "update_recurrent_state"):
        # The library writes the next state into the one before it, which the backward pass reads again.
        own.update_recurrent_state = partial(_put, own.recurrent_states)
    return own


def _put(states: dict[int, Tensor | None], recurrent_states: Tensor, state_idx: int = 0, **_others: object) -> Tensor:
    states[state_idx] = recurrent_states
    return recurrent_states


def arranged(layout: FlatLayout) -> Arrangement:
    """The layout's rows, worked out once for all layers."""
    known = layout.memo.get("rows")
    if not isinstance(known, Arrangement):
        known = _arrange(layout)
        layout.memo["rows"] = known
    return known


def _arrange(layout: FlatLayout) -> Arrangement:
    device = layout.position_ids_T.device
    forks: list[Forks] = []
    in_order: list[Rows] = []
    for spans in alike(layout.spans, [span.prompt for span in layout.spans]):
        prompts = Rows.of([(span.start, span.prompt) for span in spans], on_the_left=True, device=device)
        branches = [(place, first, length) for place, span in enumerate(spans) for first, length in span.branches()]
        completions = []
        for group in alike(branches, [length for _, _, length in branches]):
            rows = Rows.of([(first, length) for _, first, length in group], on_the_left=False, device=device)
            completions.append((rows, torch.tensor([place for place, _, _ in group], device=device)))
        forks.append(Forks(prompts, tuple(completions)))
        in_order += [prompts, *(rows for rows, _ in completions)]
    index = torch.cat([rows.index_RL.flatten() for rows in in_order])
    places = torch.cat([rows.mask_RL.flatten() for rows in in_order]).nonzero().squeeze(1)
    back_T = torch.empty(layout.num_tokens, dtype=torch.int64, device=device)
    back_T[index[places]] = places
    return Arrangement(tuple(forks), back_T)


def alike(items: Sequence[Item], lengths: Sequence[int]) -> list[list[Item]]:
    """Items of like length together, longest first, in as many groups as make padding and calls together cost least.

    best(n) = min over m < n of best(m) + CALL + (items from the m-th to the n-th length) · (m-th length)
    """
    by_length: dict[int, list[Item]] = {}
    for item, length in sorted(zip(items, lengths, strict=True), key=lambda pair: -pair[1]):
        by_length.setdefault(-(-length // STEP) * STEP, []).append(item)
    steps, groups = list(by_length), list(by_length.values())
    best, begin = [0], [0]
    for end in range(1, len(groups) + 1):
        costs = []
        num_rows = 0
        for start in range(end - 1, -1, -1):
            num_rows += len(groups[start])
            costs.append((best[start] + CALL + num_rows * steps[start], start))
        least, start = min(costs)
        best.append(least)
        begin.append(start)
    found: list[list[Item]] = []
    end = len(groups)
    while end:
        found.append([item for group in groups[begin[end] : end] for item in group])
        end = begin[end]
    return found[::-1]
