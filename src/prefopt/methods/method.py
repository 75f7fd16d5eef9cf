"""What a preference method is: a name, its settings, what it needs, and a loss.

A method is a pure function of log-probabilities with a few declarations around it. It never sees
the model, the optimizer, the device or other processes: what it needs from them it declares, and the
loop provides it.

    needs       which data, whether a reference, which extra outputs of the forward pass
    units       what its loss terms are averaged over; counted from trees before the forward pass
    arrange     trees as the data gives them -> trees as the run reads them (default: unchanged)
    remarks     what the user should know about the data before the run; default: nothing
    statistics  sums over the whole optimizer batch that couple its examples (KTO's z0); default: none
    in_loss     the part of a tree that the loss reads; in_statistics: the part that the statistics read (default: all of it)
    state       numbers carried from step to step (BCO's shift); default: none
    loss        log-probabilities -> terms and metrics

Shapes: B examples (trees) in the micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from prefopt.config import Setting, Settings, readings
from prefopt.models.settings import ModelKind
from prefopt.trees import PromptTree

__all__ = [
    "CountOfTree",
    "DefaultRates",
    "LossOutput",
    "Method",
    "MethodSettings",
    "Needs",
    "Setting",
    "State",
    "Term",
    "Times",
    "one_per_example",
    "scored_tokens",
]

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps

Completions = Literal["demonstration", "pair", "thumbs", "ranked"]
"""Shapes of data: one completion per prompt; a chosen and a rejected one; one with a thumb up or down; several with their ranks."""

Output = Literal["log_sum_squares"]
"""What the forward pass of a language model can give beside log-probabilities."""

CountOfTree = Callable[[PromptTree], float]
Times = npt.NDArray[np.float64]
"""How often an epoch takes each tree, on average."""

State = dict[str, float]


def one_per_example(tree: PromptTree) -> float:
    """The unit of losses that average over examples."""
    return 1.0


def scored_tokens(tree: PromptTree) -> float:
    """The unit of losses that average over the scored tokens of all completions."""
    return float(tree.num_scored)


class MethodSettings(Settings):
    """Base of the settings that belong to one method."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method reads.

    Attributes:
        completions: the shape of data.
        reference: whether it compares with a reference policy.
        outputs: extra outputs of the policy's forward pass.
        model: what kind of model it trains.
    """

    completions: Completions
    reference: bool
    outputs: frozenset[Output] = frozenset()
    model: ModelKind = "language"


@dataclass(frozen=True, slots=True)
class DefaultRates:
    """Learning rates that are usual for a method."""

    full: float
    adapter: float


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a loss.

    Attributes:
        values_B: loss of each example, summed (not averaged) over the example's share of the unit.
        unit: the key of `Method.units` by whose count over the whole optimizer batch the sum is divided.
        weight: factor of the whole term.
    """

    values_B: Tensor
    unit: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a method makes of a micro-batch.

    Attributes:
        terms: the loss, in parts.
        metrics: one detached value per example, averaged over the optimizer batch by weight.
        state_sums: detached sums that `Method.next_state` reads after the step, added over the whole batch.
        only: metric -> which examples have it, bool [B], for those that not every example has (the reward of a thumb up); it is
            averaged over these, and left out of a step that has none.
    """

    terms: tuple[Term, ...]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    state_sums: Mapping[str, Tensor] = field(default_factory=dict)
    only: Mapping[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """Base of all methods. A method holds its settings and nothing else; state goes in and out.

    Attributes:
        name: on the command line.
        paper: where it comes from: `2305.18290` on arXiv, or words; empty for what is common knowledge.
        settings_class: the settings that belong to it; no other method sees them.
        needs: which data, and what from the engine; of a made method, with what its settings ask for (`needs_with`).
        units: what its loss terms are divided by, each counted per tree.
        rates: the learning rates that are used when none is given.
        usual: settings of its own that have a usual range, with its ends; the watch says so when one is outside.
        settings: its own settings.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    settings_class: ClassVar[type[MethodSettings]]
    needs: Needs
    units: ClassVar[Mapping[str, CountOfTree]]
    rates: ClassVar[DefaultRates]
    usual: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.needs = self.needs_with(settings)

    @classmethod
    def needs_with(cls, settings: Any) -> Needs:
        """What it reads under these settings: some ask for another shape of data, or for more from the forward pass.

        Whether it has a reference is the same for all settings: it decides which settings there are.
        """
        switched = [kind for name, kind in readings(type(settings)).items() if getattr(settings, name)]
        return replace(cls.needs, completions=switched[0]) if switched else cls.needs

    def arrange(self, trees: Sequence[PromptTree], *, seed: int) -> Sequence[PromptTree]:
        """The trees as the run reads them; the draw depends on the seed alone.

        Raises:
            DataError: the method cannot learn from them.
        """
        return trees

    def remarks(self, trees: Sequence[PromptTree], *, times: Times | None = None) -> Sequence[str]:
        """Sentences about the examples to train on that the user should read before the run.

        Args:
            trees: as `arrange` gave them.
            times: how often an epoch takes each; None: once.
        """
        return ()

    def in_loss(self, tree: PromptTree) -> PromptTree:
        """The part of an arranged tree that `loss` reads."""
        return tree

    def in_statistics(self, tree: PromptTree) -> PromptTree:
        """The part of an arranged tree that `statistics` reads."""
        return tree

    def initial_state(self) -> State:
        """What the method carries from step to step, before the first."""
        return {}

    def state_from(self, trees: Sequence[PromptTree], *, times: Times | None = None) -> State:
        """The same where it depends on the examples to train on; the arguments are as those of `remarks`."""
        return self.initial_state()

    def next_state(self, state: State, sums: Mapping[str, float]) -> State:
        """The state after a step whose `LossOutput.state_sums` added up to `sums` over all processes."""
        return state

    def statistics(self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch) -> Mapping[str, Tensor] | None:
        """Sums over a micro-batch, added over the whole optimizer batch in a pass without gradients before the step.

        None means that the method's examples do not couple, and spares the pass.
        """
        return None

    @property
    def couples_examples(self) -> bool:
        """Whether the loss of an example depends on the others of its optimizer batch."""
        return type(self).statistics is not Method.statistics

    @abstractmethod
    def loss(
        self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch, *, statistics: Mapping[str, float], state: State
    ) -> LossOutput:
        """The loss of a micro-batch.

        Args:
            policy: log-probabilities under the policy, with gradients.
            reference: the same under the reference, without; None where `needs.reference` is false.
            batch: the trees' numbers that are not log-probabilities: weights, labels, ranks, lengths.
            statistics: the sums of `statistics` over the whole optimizer batch; empty where it gives none.
            state: what `next_state` returned last.
        """
