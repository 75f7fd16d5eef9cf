"""A reward model at work: trees in, one score per completion out.

Whoever needs scores of sampled completions in batches gives trees whose completions share their prompt, and each prompt is run once.

Shapes: C completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from prefopt.data.store import Sizes
from prefopt.engine.batch import pack
from prefopt.engine.extent import batches
from prefopt.errors import DataError
from prefopt.models.forest import spans_named
from prefopt.models.load import choose_precision, load_model
from prefopt.models.policy import Policy
from prefopt.models.proof import prove
from prefopt.models.read import context_of
from prefopt.models.speakers import Weights, device_named
from prefopt.trees import PromptTree

SCORED_TOKENS = 8192
"""Positions in one forward pass."""

MAX_LENGTH = 2048
"""Tokens up to which a model is taken to read that names no context, and up to which windows are crossed without being asked."""


@dataclass(frozen=True, slots=True)
class TreeScorer:
    """A reward model, ready to score. It is never trained through this.

    Attributes:
        policy: runs it, in evaluation mode and without gradients.
        tokenizer: its own.
        autocast: dtype of matrix products; None: float32. The score layer itself is float32 in any case.
        max_length: longest prompt with completion on which the way to run it was proved, in tokens.
        words: how it is run, for people.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    autocast: torch.dtype | None
    max_length: int
    words: str

    @classmethod
    def load(
        cls,
        model: str,
        *,
        max_length: int | None = None,
        adapter: str | None = None,
        precision: str = "auto",
        device: str = "auto",
        sharing: str = "auto",
        load_in_4bit: bool = False,
        trust_remote_code: bool = False,
    ) -> "TreeScorer":
        """Read a reward model, and find the fastest way to run it that is right.

        Args:
            model: folder of a run, of a model or of an adapter, or a hub name.
            max_length: longest prompt with completion that will be scored, in tokens; None: as long as `length_unasked` says.
            adapter: on the model; one that names its base is given as model.
            precision: `auto`, `bf16` or `float32`, as in training.
            device: `auto`, `cpu` or `cuda`.
            sharing: `auto`, or the one way to run it.
            load_in_4bit: hold the weights in four bits.
            trust_remote_code: run code that comes with the model.

        Raises:
            ModelError: it cannot be found or read, or is no reward model.
            ConfigError: the device is not there, or bitsandbytes is not.
        """
        where = device_named(device)
        weights = Weights.of(model, adapter)
        chosen = choose_precision(precision, where, adapter=weights.adapter is not None or load_in_4bit)
        settings = weights.settings(trust_remote_code).model_copy(update={"load_in_4bit": load_in_4bit})
        loaded = load_model(settings, precision=chosen, device=where, seed=0, frozen=True, kind="reward")
        loaded.model.eval().requires_grad_(False)
        config = loaded.model.config
        longest = min(max_length, context_of(config) or max_length) if max_length else length_unasked(config)
        proof = prove(loaded.model, max_length=longest, sharing=sharing, autocast=chosen.autocast)
        policy = Policy(loaded.model, proof.path)
        policy.eval()
        return cls(policy, loaded.tokenizer, chosen.autocast, longest, proof.sentence())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.policy.model.device

    @property
    def context(self) -> int | None:
        """Tokens of the longest text that it can read, where its config says so."""
        return context_of(self.policy.model.config)

    @torch.no_grad()
    def scores(self, trees: Sequence[PromptTree], *, max_tokens: int = SCORED_TOKENS) -> Tensor:
        """The score of each completion in the order of the trees, float32 [C], on the CPU.

        Args:
            trees: prompts with their completions, the token that ends an answer included, as in training.
            max_tokens: positions in one forward pass; a tree that takes more stands alone.

        Raises:
            DataError: a prompt with a completion is longer than `max_length`.
        """
        sizes = Sizes.of(trees)
        self.check_length(int((sizes.prompt + sizes.longest).max(initial=0)))
        found: list[Tensor] = []
        sharing = self.policy.path.sharing
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            for group in batches(trees, sharing=sharing, max_tokens=max_tokens):
                batch = pack(group, sharing=sharing, device=self.device)
                found.append(self.policy(batch).last_scalars(batch.last_C).float())
        return torch.cat(found).cpu() if found else torch.zeros(0)

    def check_length(self, longest: int) -> None:
        """Refuses texts on which nobody has shown that the model runs as it should.

        Args:
            longest: tokens of the longest prompt with completion.

        Raises:
            DataError: that is more than `max_length`.
        """
        if longest <= self.max_length:
            return
        if self.context is not None and longest > self.context:
            why, do = f"the model reads {self.context:,}", "Give shorter texts"
        else:
            why = f"the way to run the model was proved on texts of up to {self.max_length:,}"
            do = f"Load it with max_length={longest}, or give shorter texts"
        raise DataError(f"a prompt with its answer has {longest:,} tokens, and {why}. {do}.")


def length_unasked(config: PreTrainedConfig) -> int:
    """How long texts may be where nobody says it: as long as the model reads, but not beyond a window or chunk above `MAX_LENGTH`.

    The proof runs rows that cross what it speaks for, forwards and backwards: of 8,192 tokens they take a large model more memory
    than any scoring.
    """
    return min([*(span for span in spans_named(config) if span >= MAX_LENGTH), context_of(config) or MAX_LENGTH])
