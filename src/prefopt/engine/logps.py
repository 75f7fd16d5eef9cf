"""Log-probabilities as they come out of a forward pass: the only place where tokens are reduced to completions.

Shapes: N scored tokens of the batch, those of the completions first, in order, then those of prompts;
C completions, B trees (one prompt each), T positions of the input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prefopt.errors import DataError


class TokenLogps(NamedTuple):
    """Log-probability of each scored token, in nats, float32 (float64 where the model computes in float64).

    A tuple, so that wrappers of a module (DDP, FSDP2) find the tensors in it. Of a reward model it holds `scalar_T` and no
    log-probabilities: no token is scored, and sums over completions are 0.

    Attributes:
        values_N: the log-probabilities.
        lengths_C: scored tokens of each completion, int64.
        prompt_lengths_B: scored tokens of each prompt, int64; mostly 0.
        num_completion_tokens: how many of the N belong to completions; an int, so that slicing needs no device read.
        entropy_N: entropy of each predicting distribution, in nats, where asked for.
        log_sum_squares_N: log Σ_v π(v)² of each predicting distribution, without gradient, where asked for.
        scalar_T: the scalar head's value at each position of the input, where asked for.
    """

    values_N: Tensor
    lengths_C: Tensor
    prompt_lengths_B: Tensor
    num_completion_tokens: int
    entropy_N: Tensor | None = None
    log_sum_squares_N: Tensor | None = None
    scalar_T: Tensor | None = None

    @property
    def has_tokens(self) -> bool:
        """True: single tokens can be read."""
        return True

    def sum(self) -> Tensor:
        """Summed log-probability of each completion, [C]."""
        return self.sum_tokens(self.values_N)

    def mean(self) -> Tensor:
        """Mean log-probability over each completion's scored tokens, [C]; 0 where none is scored."""
        return self.mean_tokens(self.values_N)

    def prompt_sum(self) -> Tensor:
        """Summed log-probability of each prompt's scored tokens, [B]."""
        return _segment_sum(self.values_N[self.num_completion_tokens :], self.prompt_lengths_B)

    def sum_tokens(self, tokens_N: Tensor) -> Tensor:
        """Any per-token quantity of the same tokens, summed over each completion, [C]."""
        return _segment_sum(tokens_N[: self.num_completion_tokens], self.lengths_C)

    def mean_tokens(self, tokens_N: Tensor) -> Tensor:
        """Any per-token quantity of the same tokens, averaged over each completion, [C]; 0 where none is scored."""
        return self.sum_tokens(tokens_N) / self.lengths_C.clamp(min=1)

    def last_scalars(self, last_C: Tensor) -> Tensor:
        """The scalar head's value at each completion's last token, [C]: a reward model's score.

        Args:
            last_C: where these tokens are, from the batch.
        """
        assert self.scalar_T is not None, "only a model with a scalar head is asked"
        return _wide(self.scalar_T[last_C])

    def detach(self) -> "TokenLogps":
        """The same numbers without gradients."""
        return self._replace(
            values_N=self.values_N.detach(),
            entropy_N=None if self.entropy_N is None else self.entropy_N.detach(),
            scalar_T=None if self.scalar_T is None else self.scalar_T.detach(),
        )


class CompletionLogps(NamedTuple):
    """Reference log-probabilities that came with the data as one sum per completion.

    They serve methods that read sums or means; one that reads single tokens gets a `DataError`.
    """

    sum_C: Tensor
    lengths_C: Tensor

    @property
    def has_tokens(self) -> bool:
        """False: the data brought sums."""
        return False

    def sum(self) -> Tensor:
        """Summed log-probability of each completion, [C]."""
        return self.sum_C

    def mean(self) -> Tensor:
        """Mean log-probability over each completion's scored tokens, [C]."""
        return self.sum_C / self.lengths_C.clamp(min=1)

    @property
    def values_N(self) -> Tensor:  # noqa: N802 (the name it has in TokenLogps)
        """Not there: the data brought sums.

        Raises:
            DataError: always.
        """
        raise DataError(
            "this method reads the reference's log-probability of every token, and the data brings one sum per completion. "
            "Remove the columns reference_chosen_logp and reference_rejected_logp, so that the reference is computed."
        )


ReferenceLogps = TokenLogps | CompletionLogps


def _segment_sum(values_N: Tensor, lengths_S: Tensor) -> Tensor:
    """Sums of consecutive stretches. segment_reduce adds in a fixed order on every device; index_add on CUDA does not."""
    return torch.segment_reduce(_wide(values_N), "sum", lengths=lengths_S, unsafe=True, initial=0.0)


def _wide(values: Tensor) -> Tensor:
    """At least float32: a sum over a long answer in bf16 would keep two digits."""
    return values.float() if values.element_size() < 4 else values
