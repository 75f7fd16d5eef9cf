"""Shapes of models, the floating-point operations that they need, and how fast this machine multiplies matrices of these sizes.

Shapes in names: T positions, S scored tokens, H width.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CONTEXT = 32768
"""Positions that the models are made for: longer than any workload."""

PROBE_SECONDS = 0.3
"""How long one look at the machine's matrix rate takes, at least."""

FORMULA = (
    "a forward pass over one prompt and its completions takes 2WT + 2VHS + 4HAL: W weights in the matrices of all L layers, T tokens "
    "with the prompt counted once, V x H the head on the S tokens of the completions, A pairs of a query and a key that it sees; "
    "training takes three times that (twice under an adapter), the reference once"
)
"""How operations are counted, for the results."""

Lengths = tuple[int, Sequence[int]]
"""Tokens of a prompt, and of each of its completions."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 model: grouped heads, gated feed-forward layers, biases on queries, keys and values; or another architecture of
    these sizes, whose operations are then counted as if it were one."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = True
    dtype: str = "float32"
    architecture: str = "qwen2"
    own: Mapping[str, Any] = field(default_factory=dict)

    def config(self, **more: Any) -> "PreTrainedConfig":
        """The library's config of these sizes, and whatever else is given."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.architecture,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.mlp,
            tie_word_embeddings=self.tied,
            **self.own,
            **more,
        )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def matrices(self) -> tuple[tuple[int, int, int], ...]:
        """Inputs, outputs and number of the matrices in one layer."""
        attention, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (self.hidden, attention, 1),
            (self.hidden, keys, 2),
            (attention, self.hidden, 1),
            (self.hidden, self.mlp, 2),
            (self.mlp, self.hidden, 1),
        )

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        return sum(inputs * outputs * count for inputs, outputs, count in self.matrices)

    def forward_flops(self, lengths: Lengths) -> float:
        """Operations of a forward pass over a prompt and its completions, each token computed once.

            2·W·T + 2·V·H·S + 4·H·A·layers

        W: weights of all layers' matrices; T = P + ΣC positions; V·H: the head, on the S = ΣC scored tokens; A: pairs of a
        query and a key that it sees, P(P+1)/2 + Σ(P·C + C(C+1)/2), two products of width H each. What is no matrix product
        (norms, softmax, activations) is left out, as is usual.
        """
        prompt, completions = lengths
        scored = sum(completions)
        seen = prompt * (prompt + 1) / 2 + sum(prompt * length + length * (length + 1) / 2 for length in completions)
        layers = 2 * self.layer_weights * (prompt + scored) + 4 * self.heads * self.head_dim * seen
        return self.layers * layers + 2 * self.vocabulary * self.hidden * scored

    def train_flops(self, lengths: Lengths, *, adapter: bool) -> float:
        """Forward and backward pass: three times the forward where all weights are trained (6·W·T in the layers); under an adapter
        twice, because no gradient of the frozen weights is needed (the adapter's own products are left out)."""
        return (2 if adapter else 3) * self.forward_flops(lengths)


SHAPES: dict[str, Shape] = {
    "1m": Shape(hidden=64, layers=2, heads=2, kv_heads=1, mlp=160, vocabulary=4096),
    "10m": Shape(hidden=256, layers=8, heads=4, kv_heads=2, mlp=768, vocabulary=16384),
    "32m": Shape(hidden=512, layers=8, heads=8, kv_heads=4, mlp=1408, vocabulary=16384),
    "hybrid": Shape(
        hidden=384,
        layers=8,
        heads=6,
        kv_heads=2,
        mlp=1024,
        vocabulary=16384,
        architecture="qwen3_5_text",
        own={
            "head_dim": 64,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
        },
    ),
    "135m": Shape(hidden=576, layers=30, heads=9, kv_heads=3, mlp=1536, vocabulary=49152),
    "0.5b": Shape(hidden=896, layers=24, heads=14, kv_heads=2, mlp=4864, vocabulary=151936, dtype="bfloat16"),
    "1.5b": Shape(hidden=1536, layers=28, heads=12, kv_heads=2, mlp=8960, vocabulary=151936, dtype="bfloat16"),
    "7b": Shape(hidden=4096, layers=32, heads=32, kv_heads=32, mlp=11008, vocabulary=32000, tied=False, dtype="bfloat16"),
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, mlp=14336, vocabulary=128256, tied=False, dtype="bfloat16"),
}
"""1m is for tests. hybrid has three layers of linear attention for each of full attention. 7b and 8b have the sizes of Llama 2 and
Llama 3. The large ones are stored in bf16, which says nothing about the precision in which they are trained."""


def make_model(shape: Shape, tokenizer: "PreTrainedTokenizerBase", folder: Path, *, seed: int, device: str) -> None:
    """Write a model with random weights, and the tokenizer, as `transformers` loads them."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from prefopt.pipeline.new import no_progress_bars

    if len(tokenizer) > shape.vocabulary:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {shape.vocabulary}")
    config = shape.config(
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # the contestants need it


class MatrixRate:
    """The machine's rate at the matrix products of a forward pass.

    Args:
        shape: of the model.
        positions: of a batch, T.
        scored: tokens that the head sees, S.
        dtype, device: of the products.
    """

    def __init__(self, shape: Shape, *, positions: int, scored: int, dtype: "torch.dtype", device: "torch.device") -> None:
        import torch

        self.device = device
        head = (shape.hidden, shape.vocabulary, 1)
        # One layer and the head's share for one layer, so that each matrix counts as often as it does in the model.
        rows = [(max(1, positions), entry) for entry in shape.matrices] + [(max(1, scored // shape.layers), head)]
        self.products = [
            (torch.randn(height, inputs, dtype=dtype, device=device), torch.randn(outputs, inputs, dtype=dtype, device=device), count)
            for height, (inputs, outputs, count) in rows
        ]
        self.flops = sum(2.0 * given.shape[0] * weight.numel() * count for given, weight, count in self.products)

    def measure(self) -> float:
        """Operations per second, now."""
        self._once()
        self._wait()
        began = time.perf_counter()
        rounds = 0
        while (passed := time.perf_counter() - began) < PROBE_SECONDS:
            for _ in range(8 if self.device.type == "cuda" else 1):  # a GPU is kept busy
                self._once()
                rounds += 1
            self._wait()
        return rounds * self.flops / passed if rounds else 0.0

    def _once(self) -> None:
        from torch.nn.functional import linear

        for given, weight, count in self.products:
            for _ in range(count):
                linear(given, weight)

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
