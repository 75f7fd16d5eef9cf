"""What users say about a model that is made from nothing.

Apart from `new` so that `prefopt new --help` is drawn without importing torch.
"""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from prefopt.config import REQUIRED, Setting, Settings

NUM_SPECIAL_TOKENS = 4
"""Begin, start of turn, end of turn, padding."""

SMALLEST_VOCABULARY = 256 + NUM_SPECIAL_TOKENS
"""One token per byte, so that every text can be written, and the special tokens."""

Architecture = Literal["qwen3", "llama", "mistral", "gpt2"]
"""Not qwen2 or phi3: `AutoTokenizer` puts their own tokenizer class in place of the saved one (transformers 5.23), whose
normalisation and word boundaries are others, so that texts would be cut into other tokens than the tokenizer learned."""


class NewSettings(Settings):
    """A small model with random weights, and a tokenizer trained on the given text."""

    text: list[str] = Setting(
        REQUIRED, min_length=1, help="Files that the tokenizer learns from: plain text, or all strings of .jsonl and .json; each also .gz."
    )
    out: Path = Setting(REQUIRED, help="Folder to write the model and its tokenizer to.")
    architecture: Architecture = Setting("qwen3", help="Family of the model.")
    vocabulary: int = Setting(
        4096, ge=SMALLEST_VOCABULARY, help="Tokens at most; fewer where the text has no more pairs to merge. The smallest has one per byte."
    )
    hidden: int = Setting(256, ge=8, help="Width of the residual stream.")
    layers: int = Setting(4, ge=1, help="Number of blocks.")
    heads: int = Setting(4, ge=1, help="Attention heads; they divide hidden.")
    kv_heads: int | None = Setting(None, ge=1, help="Key and value heads; they divide heads. The default is as many as heads.")
    intermediate: int | None = Setting(
        None, ge=8, help="Width inside the feed-forward layers; the default is 3 times hidden, 4 times for gpt2."
    )
    context: int = Setting(2048, ge=16, help="Longest text in tokens that the model is made for.")
    seed: int = Setting(0, ge=0, help="Seed of the random weights.")
    overwrite: bool = Setting(False, help="Replace the model that `out` holds.")

    @model_validator(mode="after")
    def _shapes_fit(self) -> "NewSettings":
        if self.hidden % self.heads:
            fitting = self.heads * max(1, self.hidden // self.heads)
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads}): take {fitting}")
        if self.architecture != "gpt2" and self.hidden // self.heads % 2:
            raise ValueError(f"hidden / heads is {self.hidden // self.heads} and must be even: rotary positions turn pairs of channels")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.architecture == "gpt2" and self.kv_heads not in (None, self.heads):
            raise ValueError(f"gpt2 has as many kv_heads as heads ({self.heads}): leave kv_heads out, or take another architecture")
        return self

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, the default filled in."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def num_intermediate(self) -> int:
        """Width inside the feed-forward layers, the default filled in."""
        return self.intermediate if self.intermediate is not None else self.hidden * (4 if self.architecture == "gpt2" else 3)
