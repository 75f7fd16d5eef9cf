"""Tiny random models of the architectures that are tested, compared with the plain Hugging Face forward.

`python -m tests.models.architectures` writes docs/architectures.md from what it measures; test_architectures.py holds
every row of it. Each model has two layers of 32 numbers and windows of 12 tokens, so that rows of up to 24 tokens
cross them. Weights are drawn ten times wider than usual, and biases, norms and sinks are moved from their start:
a freshly made model predicts nearly the same everywhere, and little that goes wrong in it would show.

The loss is DPO's with β = 0.1, on three pairs; its reference is the uniform distribution, which needs no model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import log
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from prefopt.engine.batch import pack
from prefopt.models.policy import EnginePath, Policy, transformers_logging_at
from prefopt.models.proof import prove
from prefopt.trees import Completion, PromptTree, token_ids

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
COMMAND = "python -m tests.models.architectures"

VOCABULARY = 101
BETA = 0.1
WINDOW = 12


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is tested of one architecture.

    Attributes:
        way: how it must be run, as the proof has to find: `flat`, `fork` or `plain`.
        head: `chunked` or `own`.
        remark: what the tiny model has of its kind, for the page.
        config: changes to the common tiny configuration.
    """

    way: str = "flat"
    head: str = "chunked"
    remark: str = ""
    config: dict[str, Any] = field(default_factory=dict)


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {"head_dim": 8}
SLIDING = {"sliding_window": WINDOW}
SLIDING_THEN_FULL = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
LINEAR_THEN_FULL = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

ARCHITECTURES: dict[str, Architecture] = {
    "arcee": Architecture(),
    "cohere": Architecture(remark="scaled logits", config={"logit_scale": 0.25}),
    "cohere2": Architecture(remark="scaled logits, sliding window", config={"logit_scale": 0.25} | SLIDING_THEN_FULL),
    "deepseek_v3": Architecture(
        remark="latent attention, mixture of experts",
        config={
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
    ),
    "ernie4_5": Architecture(config=HEAD_DIM),
    "exaone4": Architecture(remark="sliding window", config=HEAD_DIM | SLIDING_THEN_FULL),
    "gemma2": Architecture(
        remark="soft-caps in attention and head, sliding window",
        config=HEAD_DIM | SLIDING_THEN_FULL | {"query_pre_attn_scalar": 8},
    ),
    "gemma3_text": Architecture(remark="sliding window", config=HEAD_DIM | SLIDING_THEN_FULL | {"query_pre_attn_scalar": 8}),
    "glm4": Architecture(config=HEAD_DIM),
    "gpt2": Architecture(config=GPT2_SIZES),
    "gpt_neox": Architecture(),
    "gpt_oss": Architecture(
        remark="attention sinks, sliding window, mixture of experts",
        config=HEAD_DIM | SLIDING_THEN_FULL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granite": Architecture(
        remark="scaled logits and scores", config={"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}
    ),
    "hunyuan_v1_dense": Architecture(config=HEAD_DIM),
    "llama": Architecture(),
    "ministral": Architecture(remark="sliding window", config=HEAD_DIM | SLIDING_THEN_FULL),
    "mistral": Architecture(remark="sliding window", config=SLIDING),
    "mixtral": Architecture(remark="mixture of experts", config={"num_local_experts": 4}),
    "olmo2": Architecture(),
    "olmo3": Architecture(remark="sliding window", config=SLIDING_THEN_FULL),
    "opt": Architecture(config={"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "phi": Architecture(remark="head with a bias"),
    "phi3": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(config=HEAD_DIM),
    "qwen3_moe": Architecture(remark="mixture of experts", config=HEAD_DIM | FOUR_EXPERTS),
    "seed_oss": Architecture(config=HEAD_DIM),
    "smollm3": Architecture(remark="layers without positions", config={"no_rope_layers": [1, 0]}),
    "starcoder2": Architecture(remark="sliding window", config=SLIDING),
    "bamba": Architecture(
        remark="recurrence",
        config={
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
            "mamba_expand": 2,
            "attn_layer_indices": [1],
        },
    ),
    "bloom": Architecture(way="fork", remark="ALiBi", config={"n_layer": 2, "n_head": 4}),
    "falcon": Architecture(way="fork", remark="ALiBi", config={"alibi": True}),
    "gptj": Architecture(way="fork", remark="does not take its attention from outside", config=GPT2_SIZES | {"rotary_dim": 4}),
    "lfm2": Architecture(remark="convolution", config={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "llama4_text": Architecture(
        way="fork",
        remark="attention in chunks",
        config=HEAD_DIM | {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 64},
    ),
    "mamba": Architecture(way="plain", remark="recurrence", config={"state_size": 4}),
    "mamba2": Architecture(
        remark="recurrence",
        config=HEAD_DIM | {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    ),
    "qwen3_5_text": Architecture(remark="linear attention", config=HEAD_DIM | LINEAR_THEN_FULL),
    "qwen3_next": Architecture(
        remark="linear attention, mixture of experts",
        config=HEAD_DIM | LINEAR_THEN_FULL | FOUR_EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    "stablelm": Architecture(way="fork", remark="passes no keywords on to its attention"),
}


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of the architecture, in evaluation mode; `changes` go into its configuration. The same every time."""
    with torch.random.fork_rng(), transformers_logging_at("ERROR"):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[name](**(COMMON | ARCHITECTURES[name].config | changes)), dtype=dtype
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@cache
def pairs() -> tuple[PromptTree, ...]:
    """Three pairs; windows of 12 tokens end inside a prompt and inside completions, and one prompt has a single token."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Completion:
        return Completion(token_ids(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()))

    def pair(prompt: int, chosen: int, rejected: int) -> PromptTree:
        return PromptTree(draw(prompt).ids, (draw(chosen), draw(rejected)))

    return (pair(9, 14, 6), pair(17, 3, 7), pair(1, 2, 5))


def dpo_losses(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """−log σ(β·Δ) against the uniform distribution, per pair."""
    uniform_BC = torch.tensor(
        [[-len(completion.ids) * log(VOCABULARY) for completion in tree.completions] for tree in pairs()], device=chosen_B.device
    )
    return -logsigmoid(BETA * ((chosen_B - uniform_BC[:, 0]) - (rejected_B - uniform_BC[:, 1])))


def plain_logps(model: PreTrainedModel | PeftModel, tree: PromptTree, completion: Completion) -> Tensor:
    """Summed log-probability by the model's own forward: one row, no padding, no engine."""
    input_ids = torch.tensor([[*tree.prompt_ids.tolist(), *completion.ids.tolist()]], device=model.device)
    logits_TV = model(input_ids=input_ids, use_cache=False).logits[0].to(torch.promote_types(model.dtype, torch.float32))
    predicting = slice(len(tree.prompt_ids) - 1, -1)
    targets = input_ids[0, len(tree.prompt_ids) :]
    return logits_TV[predicting].log_softmax(-1).gather(-1, targets[:, None]).sum()


def plain_loss(model: PreTrainedModel) -> Tensor:
    """The DPO loss of all pairs, completion by completion."""
    summed_BC = torch.stack([torch.stack([plain_logps(model, tree, completion) for completion in tree.completions]) for tree in pairs()])
    return dpo_losses(*summed_BC.unbind(1)).sum()


@dataclass(frozen=True, slots=True)
class Measured:
    """What came out.

    Attributes:
        path: what the proof chose.
        sentence: what the proof says about it.
        loss: relative difference of the DPO loss from the plain forward's.
        gradients: the same for the gradient of each parameter, by name.
    """

    path: EnginePath
    sentence: str
    loss: float
    gradients: dict[str, float]

    @property
    def worst(self) -> str:
        """The parameter whose gradient differs most."""
        return max(self.gradients, key=lambda name: self.gradients[name])


BOUND = 1e-5
"""Relative difference allowed, of the loss and of the gradient of each parameter, in float32."""

FLOOR = 1e-2
"""A gradient smaller than this share of the largest one is compared with that share instead of with itself: some are
zero by construction (OPT's bias of all keys moves no softmax) and hold rounding only. With BOUND, that makes the absolute
error allowed 1e-7 of the largest gradient, which is float32's own resolution."""


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """The loss's gradient with respect to each parameter; zeros where it does not arrive."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def relative_differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ per parameter, in float64."""
    norms = {name: float(gradient.double().norm()) for name, gradient in expected.items()}
    smallest = FLOOR * max(norms.values())
    return {
        name: float((found[name].double() - gradient.double()).norm()) / max(norms[name], smallest) for name, gradient in expected.items()
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Products as tiny as these gain nothing from a second thread, and wait long for it where the processor is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
@one_thread()
def measure(name: str) -> Measured:
    """Proves a tiny model of the architecture, then compares `Policy` with the plain forward, completion by completion."""
    model = tiny_model(name)
    proof = prove(model, max_length=64)

    expected_loss = plain_loss(model)
    expected = gradients_of(model, expected_loss)

    batch = pack(pairs(), sharing=proof.path.sharing)
    loss = dpo_losses(*Policy(model, proof.path)(batch).sum().view(-1, 2).unbind(1)).sum()
    return Measured(
        path=proof.path,
        sentence=proof.sentence(),
        loss=abs(loss.item() - expected_loss.item()) / abs(expected_loss.item()),
        gradients=relative_differences(gradients_of(model, loss), expected),
    )


def head_of(path: EnginePath) -> str:
    """How the page calls the way in which the head runs."""
    return "chunked" if path.chunked_head else "own"


LEVELS = {"loss": (1e-6, BOUND), "gradients": (3e-6, BOUND)}
"""What the page gives in place of exact figures, which differ from machine to machine: the first level not reached."""


def level(kind: str, difference: float) -> str:
    """`< 1e-06` and the like."""
    return next(f"< {bound:.0e}" for bound in LEVELS[kind] if difference < bound)


def row(name: str, loss: str, gradients: str) -> str:
    """One line of the page's table."""
    architecture = ARCHITECTURES[name]
    return f"| {name} | {architecture.way} | {architecture.head} | {loss} | {gradients} | {architecture.remark} |"


def page(rows: list[str]) -> str:
    """docs/architectures.md."""
    table = "\n".join(rows)
    return f"""# Architectures

<!-- Written by `{COMMAND}`. Do not edit. -->

Every model is proved when it is loaded: the engine runs a small random forest of prompts and completions through it,
shared and not shared, and takes the fastest way that is right on that very model. No list of names decides, this one
neither. It shows what the proof finds, and how far the result is from the plain Hugging Face forward run completion by
completion, one row each, without padding.

- **flat**: a prompt is run once for all its completions, in one packed row without padding. Layers that carry a state from token to
  token (recurrences, convolutions) get the row's prompts, and then its completions, which continue from copies of that state.
- **fork**: a prompt is run once, and its completions continue from copies of the model's cache, through which gradients flow back.
  One row would be wrong on these, mostly without an error: their tokens learn more of each other than attention tells.
- **plain**: every completion runs with its own prompt, in padded rows.
- **chunked** head: the language-model head runs on scored positions in chunks; the full logits never exist.
  **own** head: the model's own head runs, on scored positions only.

Each model is tiny and random (two layers of 32 numbers, windows and chunks of {WINDOW} tokens, which the rows cross), and
its weights are wider than a fresh model's, so that errors show. Compared in float32 on a CPU: the DPO loss (β = {BETA}),
and the gradient of every parameter, of which the worst is listed; both as relative differences, {BOUND:.0e} at most.
Floating-point noise alone gives about 1e-06. `tests/models/test_architectures.py` holds every line.

| architecture | prompts | head | loss | worst gradient | of its kind |
|---|---|---|---|---|---|
{table}
"""


def main() -> None:
    """Measures all architectures, prints the exact figures, and writes the page."""
    rows: list[str] = []
    for name, architecture in ARCHITECTURES.items():
        measured = measure(name)
        worst = measured.gradients[measured.worst]
        print(f"{name:18s} {measured.path!s:20s} loss {measured.loss:.1e}  worst gradient {worst:.1e} ({measured.worst})")
        if (measured.path.sharing, head_of(measured.path)) != (architecture.way, architecture.head) or max(measured.loss, worst) >= BOUND:
            raise SystemExit(f"{name} is not what the table above says, or differs from the plain forward: page not written")
        rows.append(row(name, level("loss", measured.loss), level("gradients", worst)))
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
