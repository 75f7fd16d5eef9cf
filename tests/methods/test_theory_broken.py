"""The proof of `test_theory.py` can fail: DPO with a mistake in it does not reach the optimum."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tests.methods.enumerated import Exact, World, all_alike, bradley_terry, far_apart, make_world, pairs, tilted
from torch import Tensor

from prefopt.methods.dpo import DPO, DPOSettings, dpo_loss
from prefopt.methods.method import State
from prefopt.methods.pairs import Pairs
from prefopt.trees import PromptTree

BETA = 0.5


@cache
def world() -> World:
    return make_world()


@cache
def noisy_pairs() -> tuple[PromptTree, ...]:
    return tuple(pairs(bradley_terry(world().reward_XY), all_alike()))


def from_the_optimum(kind: type[DPO], trees: Sequence[PromptTree]) -> float:
    """Total variation between what it comes to and π_ref·exp(r/β)/Z."""
    problem = Exact(kind(DPOSettings(beta=BETA)), trees, world())
    return far_apart(problem.solve().logps(), tilted(world().reference_XY, world().reward_XY / BETA))


class WrongSign(DPO):
    """Chosen and rejected exchanged."""

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        chosen_P, rejected_P, *references = pairs.sums()
        return dpo_loss(rejected_P, chosen_P, *reversed(references), beta=self.settings.beta)


class BetaMisplaced(DPO):
    """Divided by in the place of multiplied with."""

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        return dpo_loss(*pairs.sums(), beta=1 / self.settings.beta)


class BetaOutside(DPO):
    """A factor of the loss and not of the margin."""

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        return self.settings.beta * dpo_loss(*pairs.sums(), beta=1.0)


class Means(DPO):
    """Per token in the place of per answer."""

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        return dpo_loss(*pairs.means(), beta=self.settings.beta)


class NoReference(DPO):
    """Left out."""

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        return dpo_loss(*pairs.own_sums(), *(torch.zeros_like(side) for side in pairs.own_sums()), beta=self.settings.beta)


class ReferenceAdded(DPO):
    """With the wrong sign."""

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        chosen_P, rejected_P, *references = pairs.sums()
        return dpo_loss(chosen_P, rejected_P, *(-side for side in references), beta=self.settings.beta)


BROKEN = (WrongSign, BetaMisplaced, BetaOutside, Means, NoReference, ReferenceAdded)


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_loss_with_a_mistake_does_not_reach_the_optimum(kind: type[DPO]):
    assert from_the_optimum(kind, noisy_pairs()) > 0.1


def test_answers_without_their_last_token_do_not_reach_the_optimum():
    def cut(tree: PromptTree) -> PromptTree:
        masks = [np.arange(len(one.ids)) < len(one.ids) - 1 for one in tree.completions]
        return replace(tree, completions=tuple(replace(one, scored=mask) for one, mask in zip(tree.completions, masks, strict=True)))

    assert from_the_optimum(DPO, noisy_pairs()) < 1e-6
    assert from_the_optimum(DPO, [cut(tree) for tree in noisy_pairs()]) > 0.1
