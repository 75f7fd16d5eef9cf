"""Sharing by forking a cache: every prompt is run once, and its completions continue from copies of what it left behind.

Attention over a flat row shares prompts where attention is all that tokens learn of each other. Recurrences, convolutions,
ALiBi and chunks of attention are more; but every model that generates can go on from a cache, and what it goes on
from is a function like any other: gradients flow through the copies back into the prompt.

Shapes: B prompts of P positions, C completions of L, D hidden size.
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from prefopt.engine.layout import ForkLayout
from prefopt.engine.states import forked, name_of_cache


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
        inputs = {"attention_mask": mask, "position_ids": positions, name_of_cache(decoder.forward): cache}
        hidden: Tensor = decoder(input_ids=ids, use_cache=True, **inputs).last_hidden_state
        return hidden.flatten(0, 1)

    prompts = run(prompt_ids_BP, layout.prompt_mask_BP, layout.prompt_positions_BP)
    cache.layers[:] = [forked(layer, layout.prompt_of_C) for layer in cache.layers]
    return torch.cat([prompts, run(layout.completion_ids_CL, layout.seen_CK, layout.completion_positions_CL)])
