"""A reward model at work: trees in, one score per completion out.

Whoever needs scores of sampled completions in batches gives trees whose completions share their prompt, and each prompt is run once.

Shapes: C completions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefopt.engine.batch import Sharing, cost, pack
from prefopt.models.load import choose_precision, load_model
from prefopt.models.policy import Policy
from prefopt.models.proof import prove
from prefopt.models.speakers import Weights, device_named
from prefopt.trees import PromptTree

SCORED_TOKENS = 8192
"""Positions in one forward pass."""

MAX_LENGTH = 2048
"""Longest text on which the way to run is proved where the model names no context."""


@dataclass(frozen=True, slots=True)
class TreeScorer:
    """A reward model, ready to score. It is never trained through this.

    Attributes:
        policy: runs it, in evaluation mode and without gradients.
        tokenizer: its own.
        autocast: dtype of matrix products; None: float32. The score layer itself is float32 in any case.
        words: how it is run, for people.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    autocast: torch.dtype | None
    words: str

    @classmethod
    def load(
        cls,
        model: str,
        *,
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
        context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        longest = min(context, MAX_LENGTH) if isinstance(context, int) else MAX_LENGTH
        proof = prove(loaded.model, max_length=longest, sharing=sharing, autocast=chosen.autocast)
        policy = Policy(loaded.model, proof.path)
        policy.eval()
        return cls(policy, loaded.tokenizer, chosen.autocast, proof.sentence())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.policy.model.device

    @property
    def context(self) -> int | None:
        """Tokens of the longest text that it can read, where its config says so."""
        longest = getattr(self.policy.model.config.get_text_config(), "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else None

    @torch.no_grad()
    def scores(self, trees: Sequence[PromptTree], *, max_tokens: int = SCORED_TOKENS) -> Tensor:
        """The score of each completion in the order of the trees, float32 [C], on the CPU.

        Args:
            trees: prompts with their completions, the token that ends an answer included, as in training.
            max_tokens: positions in one forward pass; a tree that takes more stands alone.
        """
        found: list[Tensor] = []
        sharing = self.policy.path.sharing
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            for group in groups(trees, sharing, max_tokens):
                batch = pack(group, sharing=sharing, device=self.device)
                found.append(self.policy(batch).last_scalars(batch.last_C).float())
        return torch.cat(found).cpu() if found else torch.zeros(0)


def groups(trees: Sequence[PromptTree], sharing: Sharing, max_tokens: int) -> Iterator[list[PromptTree]]:
    """Consecutive trees that take no more positions together, padding included, than allowed; a longer one stands alone."""
    group: list[PromptTree] = []
    for tree in trees:
        grown = [*group, tree]
        if sharing == "flat":
            taken = sum(cost(entry, sharing) for entry in grown)
        else:
            taken = max(entry.longest for entry in grown) * sum(len(entry.completions) for entry in grown)
        if group and taken > max_tokens:
            yield group
            grown = [tree]
        group = grown
    if group:
        yield group
