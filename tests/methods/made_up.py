"""Models that are made up: log-probabilities that are a function of the text, so that losses can be looked at without a model.

Shapes: N scored tokens, B trees, C completions, T positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tests.methods.cases import Case
from torch import Tensor

from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.logps import TokenLogps
from prefopt.methods.method import LossOutput, Method
from prefopt.training.step import unit_totals, weighted_loss
from prefopt.trees import Completion, PromptTree


@dataclass(frozen=True)
class MadeUp:
    """Says of a text what it always says of it, wherever it stands in a batch.

    Args:
        seed: which model.
    """

    seed: int

    def tokens(self, tree: PromptTree, completion: Completion) -> np.ndarray:
        """Log-probabilities of the completion's scored tokens."""
        return -2.0 * self._drawn(tree, completion, 0).random(completion.num_scored) - 1e-3

    def squares(self, tree: PromptTree, completion: Completion) -> np.ndarray:
        """log Σ π² where these are predicted: from 0.3 to 0.9 nats above the mean of the above, so that WPO clamps some."""
        return -1.2 * self._drawn(tree, completion, 1).random(completion.num_scored) - 0.3

    def score(self, tree: PromptTree, completion: Completion) -> float:
        """A reward model's."""
        return float(self._drawn(tree, completion, 2).normal())

    def prompt(self, tree: PromptTree) -> np.ndarray:
        """Log-probabilities of the prompt's scored tokens."""
        num = 0 if tree.prompt_scored is None else int(tree.prompt_scored.sum())
        return -3.0 * np.random.default_rng([self.seed, *tree.prompt_ids]).random(num) - 1e-3

    def _drawn(self, tree: PromptTree, completion: Completion, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, what, len(tree.prompt_ids), *tree.prompt_ids, *completion.ids])

    def logps(self, batch: TreeBatch, dtype: torch.dtype) -> TokenLogps:
        """As a policy gives them."""
        answers = [(tree, completion) for tree in batch.trees for completion in tree.completions]
        prompts = [self.prompt(tree) for tree in batch.trees]
        values = np.concatenate([*(self.tokens(*answer) for answer in answers), *prompts])
        squares = np.concatenate([*(self.squares(*answer) for answer in answers), *(np.full(len(one), -1.0) for one in prompts)])
        scores_T = torch.zeros(batch.num_tokens, dtype=dtype)
        scores_T[batch.last_C] = torch.tensor([self.score(*answer) for answer in answers], dtype=dtype)
        return TokenLogps(
            torch.from_numpy(values).to(dtype),
            batch.lengths_C,
            batch.prompt_lengths_B,
            batch.num_completion_tokens,
            log_sum_squares_N=torch.from_numpy(squares).to(dtype),
            scalar_T=scores_T,
        )


POLICY, REFERENCE = MadeUp(1), MadeUp(2)


@dataclass(frozen=True)
class Found:
    """What a method made of a batch.

    Attributes:
        output: of its `loss`.
        losses_B: all terms of each example, by their weights, before they are divided by their units.
        loss: what the trainer makes of it.
        gradient: of the loss, by the log-probabilities of completions' tokens, then of prompts'; of a reward model by the scores [C].
        statistics: what the method took over the batch before.
    """

    output: LossOutput
    losses_B: Tensor
    loss: Tensor
    gradient: Tensor
    statistics: Mapping[str, float]


def found(
    case: Case,
    trees: Sequence[PromptTree],
    *,
    policy: MadeUp = POLICY,
    reference: MadeUp = REFERENCE,
    dtype: torch.dtype = torch.float64,
    given_as: torch.dtype | None = None,
    state: Mapping[str, float] | None = None,
) -> Found:
    """A case on arranged trees.

    Args:
        case, trees: the method, and what it reads.
        policy, reference: what they say.
        dtype: of the numbers that the method is given.
        given_as: a narrower one through which they went before.
        state: what the method carries; None: `case.state`.
    """
    method = case.method()
    statistics = _statistics(method, trees, lambda model, batch: _logps(model, batch, dtype, given_as), policy, reference)
    batch = pack([method.in_loss(tree) for tree in trees], sharing="flat")
    logps = _logps(policy, batch, dtype, given_as)
    is_reward = method.needs.model == "reward"
    leaf = (logps.scalar_T if is_reward else logps.values_N).requires_grad_()
    other = _logps(reference, batch, dtype, given_as) if method.needs.reference else None
    output = method.loss(logps, other, batch, statistics=statistics, state=dict(case.state(list(trees)) if state is None else state))
    loss = weighted_loss(output, batch, unit_totals(method, trees))
    loss.backward()
    losses_B = torch.stack([term.weight * term.values_B for term in output.terms]).sum(0).detach()
    return Found(output, losses_B, loss.detach(), leaf.grad[batch.last_C] if is_reward else leaf.grad, statistics)


def _statistics(method: Method, trees: Sequence[PromptTree], logps: Any, policy: MadeUp, reference: MadeUp) -> dict[str, float]:
    if not method.couples_examples:
        return {}
    batch = pack([method.in_statistics(tree) for tree in trees], sharing="flat")
    sums = method.statistics(logps(policy, batch), logps(reference, batch), batch)
    return {name: value.item() for name, value in (sums or {}).items()}


def _logps(model: MadeUp, batch: TreeBatch, dtype: torch.dtype, given_as: torch.dtype | None) -> TokenLogps:
    through = model.logps(batch, given_as or dtype)
    return through._replace(
        values_N=through.values_N.to(dtype),
        log_sum_squares_N=through.log_sum_squares_N.to(dtype),
        scalar_T=through.scalar_T.to(dtype),
    )
