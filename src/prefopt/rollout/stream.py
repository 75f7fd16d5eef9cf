"""An answer as it is written, piece by piece.

Token by token instead of through `generate`, so that two models, or one model with its adapter on and off, can take turns:
each stream keeps its own cache and touches the model only while it takes a step. The draws are those of
`prefopt.rollout.sample`: for the same model, prompt and seed a stream writes what `sample` gives.

Text is held back while it can still change: the bytes of one character may be spread over several tokens.

Shapes: T tokens read in one step (the prompt first, then one), S tokens so far, V tokens of the vocabulary.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.rollout.sample import check_arguments, embeddings_of, inverse_cdf
from prefopt.trees import TokenIds

Stopped = Literal["end", "limit", "context"]
"""Why an answer is over: its end-of-turn token, as many tokens as were allowed, the longest text that the model can read."""

REPLACEMENT = "\ufffd"
"""What stands in decoded text for bytes that are no character, or not yet."""


class Stream:
    """One answer of one model; iterate over it once for its pieces of text, one per token.

    Args:
        use: gives the model, ready to run (its adapter on or off, evaluation mode); entered anew for every step.
        tokenizer: turns tokens into text.
        prompt: token ids, at least one.
        eos_ids: tokens that end the answer.
        max_new_tokens: where an answer that has not ended is cut.
        temperature: logits are divided by it; 0 takes the most likely token each time.
        seed: fixes the draws.
        context: tokens of the longest text that the model can read; None: no limit is known.

    Attributes:
        ids: the tokens so far, the end-of-turn token included.
        text: the text so far, control tokens left out; all pieces together.
        stopped: why the answer is over; None while it is not, and after it was broken off.

    Raises:
        ModelError: the model cannot generate, or an end-of-turn token is not in its vocabulary.
        ValueError: the prompt is empty or leaves no room in the context, or an argument is out of range.
    """

    def __init__(
        self,
        use: Callable[[], AbstractContextManager[PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        prompt: TokenIds,
        *,
        eos_ids: Collection[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        context: int | None = None,
    ) -> None:
        with use() as model:
            check_arguments(model, [prompt], eos_ids, 1, max_new_tokens, temperature, 1)
        if context is not None and len(prompt) >= context:
            raise ValueError(f"the prompt has {len(prompt)} tokens and the model reads {context}: no room for an answer")
        self.ids: list[int] = []
        self.text = ""
        self.stopped: Stopped | None = None
        self._use, self._tokenizer, self._prompt = use, tokenizer, prompt
        self._eos_ids, self._temperature = frozenset(eos_ids), temperature
        self._limit = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
        self._limited_by: Stopped = "limit" if self._limit == max_new_tokens else "context"
        self._uniforms = None if temperature == 0 else np.random.default_rng(seed).random(self._limit)
        self._cache: Any = None

    def __iter__(self) -> Iterator[str]:
        """The text that each token adds: nothing where it is held back, or the token writes none."""
        while self.stopped is None:
            token = self._next_token()
            self.ids.append(token)
            if token in self._eos_ids:
                self.stopped = "end"
            elif len(self.ids) == self._limit:
                self.stopped = self._limited_by
            piece = self._new_text(final=self.stopped is not None)
            self.text += piece
            yield piece

    @torch.no_grad()
    def _next_token(self) -> int:
        with self._use() as model:
            whole = self._cache is None
            read = [*self._prompt.tolist(), *self.ids] if whole else self.ids[-1:]
            so_far = len(self._prompt) + len(self.ids)
            device = embeddings_of(model).device
            inputs: dict[str, Any] = {
                "input_ids": torch.tensor([read], device=device),
                # Of all that stands in the cache too: without a mask some models take tokens that also pad for padding.
                "attention_mask": torch.ones(1, so_far, dtype=torch.int64, device=device),
                "use_cache": True,
            }
            if not whole:
                inputs["past_key_values"] = self._cache
            optional = {
                # Not every model counts on from its cache by itself: bamba gives other numbers without.
                "position_ids": torch.arange(so_far - len(read), so_far, device=device)[None],
                "logits_to_keep": 1,
            }
            out = model(**inputs, **{name: value for name, value in optional.items() if name in arguments_of(type(model).forward)})
            # A model that keeps its memory in another form is read anew from the beginning: slower, and right.
            self._cache = out.get("past_key_values")
            return self._draw(out.logits[:, -1].float())

    def _draw(self, logits_1V: Tensor) -> int:
        if self._uniforms is None:
            return int(logits_1V.argmax())
        uniform_11 = torch.tensor([[self._uniforms[len(self.ids)]]], dtype=torch.float64, device=logits_1V.device)
        return int(inverse_cdf(logits_1V / self._temperature, uniform_11))

    def _new_text(self, *, final: bool) -> str:
        """What the tokens so far add to the text."""
        whole = str(self._tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        settled = whole if final else whole.rstrip(REPLACEMENT)
        return settled[len(self.text) :] if settled.startswith(self.text) else ""


@cache
def arguments_of(forward: Callable[..., Any]) -> frozenset[str]:
    """The arguments that a model's forward knows by name."""
    return frozenset(inspect.signature(forward).parameters)
