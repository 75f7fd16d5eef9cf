"""Samples from a causal language model, in process.

`generate` of transformers runs the model, with its cache and its care for every architecture, but the
draw is ours: each token is found by looking up a uniform number in the cumulative distribution, and
the uniform numbers are fixed beforehand, one per completion and position, by the seed. So a completion
depends on its own numbers alone: not on how many are sampled at once, on the order of the batches, or on
torch's generators, which are left as they were.

Samples are from the model's own distribution: nothing but the temperature shapes it, and the defaults
that a model brings along (top-k, repetition penalties) are set aside. That is what estimates
of reward and KL need.

Shapes: B completions sampled at once, V tokens of the vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from prefopt.errors import ModelError
from prefopt.trees import TokenIds, token_ids

Uniforms = npt.NDArray[np.float64]
Done = Callable[[int], None]


def sample(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    *,
    eos_ids: Collection[int],
    num_per_prompt: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    done: Done | None = None,
) -> list[list[TokenIds]]:
    """Completions of each prompt.

    Args:
        model: a Hugging Face causal language model; `Policy.generating()` gives one.
        prompts: their token ids, at least one each.
        eos_ids: tokens that end a completion; they are part of it.
        num_per_prompt: how many completions of each prompt.
        max_new_tokens: where a completion that has not ended is cut; it then has no end-of-turn token.
        temperature: logits are divided by it; 0 takes the most likely token each time (and `seed` has no say).
        seed: fixes the draws.
        batch_size: completions sampled at once; it changes speed and memory, and results only by rounding.
        done: is told how many completions are finished, after each batch.

    Returns:
        For each prompt its completions, in the order of the prompts.

    Raises:
        ModelError: the model cannot generate, or an end-of-turn token is not in its vocabulary.
    """
    check_arguments(model, prompts, eos_ids, num_per_prompt, max_new_tokens, temperature, batch_size)
    uniforms = None if temperature == 0 else np.random.default_rng(seed).random((len(prompts), num_per_prompt, max_new_tokens))
    completions: list[list[TokenIds]] = [[token_ids([])] * num_per_prompt for _ in prompts]
    # Prompts of like length together: little padding. The longest first, so that memory runs out at once or never.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    places = [(index, copy) for index in order for copy in range(num_per_prompt)]
    with ready_to_sample(model):
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            numbers = None if uniforms is None else np.stack([uniforms[place] for place in batch])
            rows = generate_batch(model, [prompts[index] for index, _ in batch], numbers, eos_ids, max_new_tokens, temperature)
            for (index, copy), row in zip(batch, rows, strict=True):
                completions[index][copy] = row
            if done is not None:
                done(start + len(batch))
    return completions


def check_arguments(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    eos_ids: Collection[int],
    num_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> None:
    """Refuse what cannot work before the first forward pass.

    Raises:
        ModelError: the model cannot generate, or an end-of-turn token is not in its vocabulary.
        ValueError: a count is below 1, the temperature below 0, or a prompt empty.
    """
    if not isinstance(model, GenerationMixin):
        raise ModelError(f"{type(model).__name__} cannot generate text: give a causal language model.")
    num_tokens = embeddings_of(model).shape[0]
    if outside := [token for token in eos_ids if not 0 <= token < num_tokens]:
        raise ModelError(f"end-of-turn token {outside[0]} is not among the model's {num_tokens} tokens. Give the model's own tokenizer.")
    if min(num_per_prompt, max_new_tokens, batch_size) < 1:
        raise ValueError("num_per_prompt, max_new_tokens and batch_size are at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature} and must be 0 or more")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt needs at least one token: its completion's first token is predicted from it")


def embeddings_of(model: PreTrainedModel) -> Tensor:
    """The weight of the input embeddings, [V, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def ready_to_sample(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout, gradients and the defaults it brings for generation; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    defaults = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = defaults
        for module in training:
            # Not `module.train()`, which would reach into frozen parts that were not training.
            module.training = True


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    uniforms_BL: Uniforms | None,
    eos_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
) -> list[TokenIds]:
    """One completion per prompt, cut after its end-of-turn token.

    Prompts are padded on the left, so that all completions begin in the same column. Token 0 serves as padding: it is
    never attended to, and what stands behind an end is cut by `until_end`.
    """
    width = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.as_tensor(np.array(prompt, dtype=np.int64))
        mask[row, width - len(prompt) :] = 1
    device = embeddings_of(model).device
    draw = [] if uniforms_BL is None else [DrawFrom(torch.from_numpy(uniforms_BL).to(device), width, temperature)]
    output = model.generate(  # type: ignore[operator]  # check_arguments looked for GenerationMixin
        input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(eos_ids) or None, pad_token_id=0, use_cache=True
        ),
        logits_processor=LogitsProcessorList(draw),
    )
    rows = output[:, width:].cpu().numpy()
    return [until_end(row, eos_ids) for row in rows]


def until_end(row: npt.NDArray[np.int64], eos_ids: Collection[int]) -> TokenIds:
    """The tokens up to and with the first that ends a completion; all where none does."""
    (ends,) = np.isin(row, list(eos_ids)).nonzero()
    return token_ids((row[: ends[0] + 1] if len(ends) else row).astype(np.int32))


class DrawFrom(LogitsProcessor):
    """Leaves of each row's logits one token, drawn by the row's uniform number, which the greedy search then takes."""

    def __init__(self, uniforms_BL: Tensor, prompt_width: int, temperature: float) -> None:
        self.uniforms_BL = uniforms_BL
        self.prompt_width = prompt_width
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] that are 0 at the drawn tokens and minus infinity elsewhere."""
        column = input_ids.shape[1] - self.prompt_width
        drawn_B1 = inverse_cdf(scores / self.temperature, self.uniforms_BL[:, column : column + 1])
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_B1, 0.0)


def inverse_cdf(logits_BV: Tensor, uniforms_B1: Tensor) -> Tensor:
    """For each row the first token at which the cumulative probability exceeds the uniform number, [B, 1] int64.

    In float64: a float32 sum over a large vocabulary is off by more than its rare tokens weigh. The number is scaled by the
    last sum instead of 1, so that rounding can never point behind the last token that has any probability.
    """
    cumulative_BV = nn.functional.softmax(logits_BV.double(), dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative_BV, uniforms_B1 * cumulative_BV[:, -1:], right=True).clamp_(max=logits_BV.shape[-1] - 1)
