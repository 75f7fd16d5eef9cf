"""A causal language model as a policy: trees in, log-probabilities of their tokens out. A reward model goes the same way to its scores.

`Policy` is the module that training wraps (DDP, FSDP2), so that the head's weight is gathered by the ordinary
forward. It exposes neither input nor output embeddings: wrappers that carve a model into units would otherwise
take the head out of the unit that `forward` gathers.

Shapes: T positions of the flattened input, D hidden size, N scored tokens.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from prefopt.engine.attention import TREE_ATTENTION
from prefopt.engine.batch import Sharing, TreeBatch
from prefopt.engine.fork import forked_hidden
from prefopt.engine.head import HeadShape, head_logps
from prefopt.engine.layout import FlatLayout, ForkLayout
from prefopt.engine.logps import TokenLogps
from prefopt.engine.states import in_rows
from prefopt.errors import ModelError


@dataclass(frozen=True, slots=True)
class EnginePath:
    """How a model is run, as proved at load.

    Attributes:
        sharing: how completions share their prompt.
        chunked_head: the head's shape, where it runs in chunks; None: the model's own head on the scored positions.
        scores: the model is a reward model: it has a score layer in the place of a head, and gives no log-probabilities.
    """

    sharing: Sharing
    chunked_head: HeadShape | None
    scores: bool = False

    def __str__(self) -> str:
        if self.scores:
            return f"{self.sharing}, scores"
        return f"{self.sharing}, {'chunked head' if self.chunked_head else 'own head'}"


class Policy(nn.Module):
    """A causal language model that gives log-probabilities of the tokens of trees, or a reward model that gives scores.

    Args:
        model: the Hugging Face model; with an adapter, the base model into which its layers were put.
        path: how to run it; `prefopt.models.proof.prove` finds the fastest that is right.
        scalar_head: maps hidden states to one number per position beside the log-probabilities (value models); None: none. A reward
            model has its own.

    Raises:
        ModelError: the model has no decoder or head that could be run apart, and the path asks for it.
    """

    def __init__(self, model: PreTrainedModel, path: EnginePath, *, scalar_head: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.path = path
        self.scalar_head = scalar_head
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self.use_path(path)

    def use_path(self, path: EnginePath) -> None:
        """Run the model another way from now on."""
        if path.scores and (decoder_of(self.model) is None or score_head_of(self.model) is None):
            raise ModelError(f"{type(self.model).__name__} has no decoder and score layer to run apart")
        if path.sharing == "fork" and path.chunked_head is None and not path.scores:
            raise ModelError("completions continue from a cache only where the head runs in chunks")
        if path.chunked_head is not None and (decoder_of(self.model) is None or plain_head_of(self.model) is None):
            raise ModelError(f"{type(self.model).__name__} has no decoder and linear head to run apart; use its own head")
        self.path = path
        set_attention(self.model, TREE_ATTENTION if path.sharing == "flat" else None)

    def __call__(self, batch: TreeBatch, *, extras: bool = False) -> TokenLogps:
        """`forward`, with its types."""
        result: TokenLogps = super().__call__(batch, extras=extras)
        return result

    def forward(self, batch: TreeBatch, *, extras: bool = False) -> TokenLogps:
        """Log-probability of every scored token of the batch.

        Args:
            batch: packed the way that `self.path.sharing` says.
            extras: also entropies and log Σπ² of the predicting distributions.
        """
        if batch.sharing != self.path.sharing:
            raise ValueError(f"the batch is packed {batch.sharing}, the policy runs {self.path.sharing}")
        if self.path.scores:
            return self._scores(batch)
        if self.path.chunked_head is None:
            logps_N, entropy_N, squares_N, hidden_TD = self._own_head(batch, extras)
        else:
            logps_N, entropy_N, squares_N, hidden_TD = self._chunked_head(batch, self.path.chunked_head, extras)
        return TokenLogps(
            values_N=logps_N,
            lengths_C=batch.lengths_C,
            prompt_lengths_B=batch.prompt_lengths_B,
            num_completion_tokens=batch.num_completion_tokens,
            entropy_N=entropy_N,
            log_sum_squares_N=squares_N,
            scalar_T=None if self.scalar_head is None else _scalars(self.scalar_head, hidden_TD),
        )

    def _scores(self, batch: TreeBatch) -> TokenLogps:
        """A reward model's score at every position, and no log-probabilities."""
        decoder, head = decoder_of(self.model), score_head_of(self.model)
        assert decoder is not None, "use_path checked it"
        assert head is not None, "use_path checked it"
        scalar_T = _scalars(head, _hidden(decoder, batch))
        return TokenLogps(
            values_N=scalar_T.detach()[:0],
            lengths_C=torch.zeros_like(batch.lengths_C),
            prompt_lengths_B=torch.zeros_like(batch.prompt_lengths_B),
            num_completion_tokens=0,
            scalar_T=scalar_T,
        )

    def _chunked_head(self, batch: TreeBatch, shape: HeadShape, extras: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        decoder, head = decoder_of(self.model), plain_head_of(self.model)
        assert decoder is not None, "use_path checked it"
        assert head is not None, "use_path checked it"
        hidden_TD = _hidden(decoder, batch)
        logps_N, entropy_N, squares_N = head_logps(
            hidden_TD[batch.predict_from_N], head.weight, head.bias, batch.target_N, shape, extras=extras
        )
        return logps_N, entropy_N, squares_N, hidden_TD

    def _own_head(self, batch: TreeBatch, extras: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """The model's own head, on the columns of the input that predict something."""
        width = batch.input_ids.shape[1]
        row_N, column_N = batch.predict_from_N // width, batch.predict_from_N % width
        columns, kept_N = torch.unique(column_N, return_inverse=True)
        needs_hidden = self.scalar_head is not None
        out = self.model(
            input_ids=batch.input_ids, use_cache=False, logits_to_keep=columns, output_hidden_states=needs_hidden, **_inputs(batch)
        )
        logits_NV = out.logits[row_N, kept_N if out.logits.shape[1] == len(columns) else column_N]
        all_logps_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)
        logps_N = all_logps_NV.gather(-1, batch.target_N[:, None]).squeeze(-1)
        entropy_N = -(all_logps_NV.exp() * all_logps_NV).sum(-1) if extras else None
        squares_N = (2 * all_logps_NV.detach()).logsumexp(-1) if extras else None
        hidden_TD = out.hidden_states[-1].flatten(0, 1) if needs_hidden else logps_N
        return logps_N, entropy_N, squares_N, hidden_TD

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The model, ready for `generate`: its own attention, evaluation mode, no gradients.

        Never inside a step: recomputation in the backward pass needs the attention of the forward pass. A model whose weights
        are cut into parts must generate on all processes alike: the layers gather themselves, and what lies outside them
        (embeddings, last norm, head) is gathered here, because `generate` does not go through the policy's forward.
        """
        was_training = self.model.training
        set_attention(self.model, None)
        self.model.train(False)
        if isinstance(self, FSDPModule):
            self.unshard()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            if isinstance(self, FSDPModule):
                self.reshard()
            self.model.train(was_training)
            set_attention(self.model, TREE_ATTENTION if self.path.sharing == "flat" else None)


def _hidden(decoder: nn.Module, batch: TreeBatch) -> Tensor:
    """The last hidden states of a batch, [T, D]."""
    if isinstance(batch.layout, ForkLayout):
        return forked_hidden(decoder, batch.input_ids, batch.layout)
    hidden: Tensor = decoder(input_ids=batch.input_ids, use_cache=False, **_inputs(batch)).last_hidden_state
    return hidden.flatten(0, 1)


def _scalars(head: nn.Module, hidden_TD: Tensor) -> Tensor:
    """One number per position, in the head's own precision whatever the products are in: bf16 has no three digits."""
    dtype = next((parameter.dtype for parameter in head.parameters()), hidden_TD.dtype)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        scalar_T: Tensor = head(hidden_TD.to(dtype)).squeeze(-1)
    return scalar_T.to(torch.promote_types(scalar_T.dtype, torch.float32))


def _inputs(batch: TreeBatch) -> dict[str, object]:
    """What the model is told about a flat or plain batch beside its tokens."""
    if isinstance(batch.layout, FlatLayout):
        return {"position_ids": batch.layout.position_ids_T[None], "tree_layout": batch.layout}
    return {"attention_mask": batch.attention_mask}


def decoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The part of a causal LM below its head; None where it cannot be told apart."""
    for name in (model.base_model_prefix, "model"):  # llama4 names the prefix of another of its models
        decoder = getattr(model, name, None) if name else None
        if isinstance(decoder, nn.Module) and decoder is not model:
            return decoder
    return None


def plain_head_of(model: PreTrainedModel) -> nn.Linear | None:
    """The head, where it is one linear layer and nothing (no adapter) is wrapped around it."""
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


def score_head_of(model: nn.Module) -> nn.Module | None:
    """The layer that gives a reward model's scores, with what an adapter wraps around it; None: it is no reward model."""
    head = getattr(model, "score", None)
    return head if isinstance(head, nn.Module) else None


def set_attention(model: PreTrainedModel, implementation: str | None) -> None:
    """Switch the attention implementation; None: leave tree attention for one of the model's own, if it is on.

    With tree attention layers that carry a state take flat rows, and with any other what they always take.

    Raises:
        ModelError: the model's attention cannot be replaced.
    """
    current = model.config._attn_implementation
    if current == implementation or (implementation is None and current != TREE_ATTENTION):
        return
    with transformers_logging_at("ERROR"):  # what it would say about models that cannot switch is said below
        for name in [implementation] if implementation else ["sdpa", "eager"]:
            try:
                model.set_attn_implementation(name)
            except (ValueError, ImportError):
                continue
            if model.config._attn_implementation == name:
                in_rows(model, wanted=name == TREE_ATTENTION)
                return
    raise ModelError(f"{type(model).__name__} does not take its attention from outside")


@contextmanager
def transformers_logging_at(level: str) -> Iterator[None]:
    """The library's messages below the level, and its progress bars, are silent inside."""
    logger = logging.getLogger("transformers")
    before, had_bars = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(level)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if had_bars:
            hf_logging.enable_progress_bar()


def on_device(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model, moved. (The library's own `to` hides its types.)"""
    nn.Module.to(model, device, dtype)
    return model


def no_dropout(model: nn.Module) -> None:
    """Switch all dropout off, for good: a policy with dropout is not the reference at step 0, and log-probabilities are noisy."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def trained_parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and parameters that receive gradients."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def hold_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Give trained weights the dtype; modules that hold vectors only, which are norms and score layers, stay in float32.

    They are few. Weights of norms are near 1, where even a compensated sum of bf16 numbers is too coarse for small updates, and what a
    score layer computes in bf16 has no three digits.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        wanted = dtype if any(parameter.numel() > max(parameter.shape, default=1) for parameter in own) else torch.float32
        for parameter in own:
            if parameter.requires_grad:
                parameter.data = parameter.data.to(wanted)
