"""Every method, with every option, where numbers are extreme or narrow."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tests.methods.cases import EVERY_OPTION, Case
from tests.methods.made_up import MadeUp, found

from prefopt.trees import Completion, PromptTree

ENDS = (-1e4, -1e-9)


@dataclass(frozen=True)
class AtTheEnds(MadeUp):
    """Gives every token of a completion one of the ends: which, the tree's number says, so that sixteen trees are all ways for a pair."""

    def _end(self, tree: PromptTree, completion: Completion) -> float:
        place = tree.completions.index(completion)
        number = int(tree.row_id)
        if place < 2:
            return ENDS[number >> (2 * self.seed + place) & 1]
        return float(np.random.default_rng([self.seed, number, place]).choice(ENDS))

    def tokens(self, tree: PromptTree, completion: Completion) -> np.ndarray:
        return np.full(completion.num_scored, self._end(tree, completion))

    def squares(self, tree: PromptTree, completion: Completion) -> np.ndarray:
        return np.full(completion.num_scored, -12.0 if int(tree.row_id) % 3 else -1e-9)

    def score(self, tree: PromptTree, completion: Completion) -> float:
        return 1e4 + 2 * self._end(tree, completion)

    def prompt(self, tree: PromptTree) -> np.ndarray:
        return np.full(len(super().prompt(tree)), ENDS[int(tree.row_id) % 2])


def numbered(case: Case) -> list[PromptTree]:
    return [replace(tree, row_id=str(number)) for number, tree in enumerate(case.trees(16))]


@EVERY_OPTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_ends(case: Case, dtype: torch.dtype):
    """Log-probabilities of −1e4 and −1e-9 for every token of the policy's and the reference's answers, with gradients."""
    trees = numbered(case)
    at_ends = found(case, trees, policy=AtTheEnds(0), reference=AtTheEnds(1), dtype=dtype)
    assert bool(torch.isfinite(at_ends.losses_B).all())
    assert bool(torch.isfinite(at_ends.loss))
    assert bool(torch.isfinite(at_ends.gradient).all())
    assert all(bool(torch.isfinite(values_B).all()) for values_B in at_ends.output.metrics.values())
    assert len(at_ends.losses_B.unique()) > 1


@EVERY_OPTION
def test_narrow_numbers_are_computed_with_in_float32(case: Case):
    trees = case.trees(12)
    narrow = found(case, trees, dtype=torch.bfloat16)
    wide = found(case, trees, dtype=torch.float32, given_as=torch.bfloat16)
    assert {term.values_B.dtype for term in narrow.output.terms} == {torch.float32}
    torch.testing.assert_close(narrow.losses_B, wide.losses_B, rtol=0, atol=0)
    assert narrow.statistics == wide.statistics
    # Slopes come back in bf16, several to a token, so that each is within a digit of the largest.
    torch.testing.assert_close(narrow.gradient.float(), wide.gradient, rtol=2**-7, atol=2**-7 * wide.gradient.abs().max().item())
