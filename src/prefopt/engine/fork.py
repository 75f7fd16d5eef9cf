"""Sharing by forking a cache: every prompt is run once, and its completions continue from copies of what it left behind.

Attention over a flat row shares prompts where attention is all that tokens learn of each other. Recurrences, convolutions,
ALiBi and chunks of attention are more; but every model that generates can go on from a cache, and what it goes on
from is a function like any other: gradients flow through the copies back into the prompt.

Shapes: B prompts of P positions, C completions of L, D hidden size.
"""

from inspect import signature

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from prefopt.engine.layout import ForkLayout


def forked_hidden(decoder: nn.Module, prompt_ids_BP: Tensor, layout: ForkLayout) -> Tensor:
    """Hidden states of all prompts, then of all completions, [B·P + C·L, D].

    Args:
        decoder: the model below its head.
        prompt_ids_BP: the prompts, padded on the left.
        layout: masks, and the completions.
    """
    config = decoder.config
    assert isinstance(config, PretrainedConfig), "every decoder of the library carries its config"
    cache = DynamicCache(config=config)

    def run(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        inputs = {"attention_mask": mask, "position_ids": positions, name_of_cache(decoder): cache}
        hidden: Tensor = decoder(input_ids=ids, use_cache=True, **inputs).last_hidden_state
        return hidden.flatten(0, 1)

    prompts = run(prompt_ids_BP, layout.prompt_mask_BP, layout.prompt_positions_BP)
    fork(cache, layout.prompt_of_C)
    return torch.cat([prompts, run(layout.completion_ids_CL, layout.seen_CK, layout.completion_positions_CL)])


def name_of_cache(decoder: nn.Module) -> str:
    """What the model's forward calls its cache."""
    return "cache_params" if "cache_params" in signature(decoder.forward).parameters else "past_key_values"


def fork(cache: DynamicCache, prompt_of_C: Tensor) -> None:
    """Makes of every prompt's cache one for each of its completions, in the same cache.

    Args:
        cache: of B prompts; of C completions afterwards.
        prompt_of_C: which prompt each completion continues.
    """
    cache.reorder_cache(prompt_of_C)  # type: ignore[arg-type]  # any tensor of whole numbers
    for layer in cache.layers:
        if hasattr(layer, "update_recurrent_state"):
            # The library writes the state after a completion into the state before it, which the backward pass reads again.
            # Nobody goes on from the end of a completion: it is not written at all.
            layer.update_recurrent_state = _not_kept  # type: ignore[method-assign]  # of this one cache


def _not_kept(recurrent_states: Tensor, state_idx: int = 0, **_others: object) -> Tensor:
    return recurrent_states
