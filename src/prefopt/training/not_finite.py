"""Numbers that are not finite end a run: what is said of them."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from prefopt.errors import RunError
from prefopt.trees import PromptTree

CAUSES = "A learning rate that is far too high is the usual cause; so are float16 weights that overflow, and rows of extreme length."


class NotFinite(RunError):
    """A loss, a gradient or a weight that is not finite.

    Attributes:
        trees: the examples of the step whose loss or gradient it is; none where it is something else.
        examples: metric -> the value of each, computed again with the weights as they were; `loss` is among them.
        is_fit: whether the weights are fit for a checkpoint: finite, and nothing else is wrong with what they give.
    """

    def __init__(
        self,
        message: str,
        trees: Sequence[PromptTree] = (),
        examples: Mapping[str, Sequence[float]] = MappingProxyType({}),
        *,
        is_fit: bool = False,
    ) -> None:
        super().__init__(message)
        self.trees, self.examples, self.is_fit = trees, examples, is_fit

    def add(self, sentence: str) -> None:
        """Say more."""
        self.args = (f"{self} {sentence}",)


def step_not_finite(
    loss: float,
    grad_norm: float,
    step: int,
    trees: Sequence[PromptTree],
    examples: Mapping[str, Sequence[float]],
    broken_weights: Sequence[str],
) -> NotFinite:
    """The error that stops the run: it names the weights that are not finite, and the examples whose own loss is not, or all."""
    broken = [tree for tree, value in zip(trees, examples["loss"], strict=True) if not math.isfinite(value)]
    what = f"the loss of step {step + 1} is {loss}" if not math.isfinite(loss) else f"the gradient of step {step + 1} is {grad_norm}"
    weights = "the weights were not changed"
    if broken_weights:
        weights = (f"since the update of step {step} " if step else "before any update ") + weights_in_words(broken_weights)
        if len(broken) == len(trees):  # no row is to blame
            return NotFinite(f"{what}; {weights}. {CAUSES}", trees, examples)
    rows = in_words([tree.row_id for tree in broken or trees], most=8)
    whose = "Examples whose own loss is not finite" if broken else "Each example's own loss is finite; the step's examples"
    return NotFinite(f"{what}; {weights}. {whose}: {rows}. {CAUSES}", trees, examples, is_fit=not broken_weights)


def held_out_not_finite(
    loss: float, step: int, trees: Sequence[PromptTree], losses: Sequence[float], broken_weights: Sequence[str]
) -> NotFinite:
    """The same for an evaluation; nothing is trained or saved on the ground of such weights."""
    when = f"after step {step}" if step else "before training"
    what = f"the held-out loss {when} is {loss}"
    if broken_weights:
        return NotFinite(f"{what}: {weights_in_words(broken_weights)}. {CAUSES}")
    broken = [tree.row_id for tree, value in zip(trees, losses, strict=True) if not math.isfinite(value)]
    whose = "Held-out examples whose own loss is not finite" if broken else "Each example's own loss is finite; the held-out examples"
    rows = in_words(broken or [tree.row_id for tree in trees], most=8)
    return NotFinite(f"{what}, and the weights are finite. {whose}: {rows}. {CAUSES}")


def weights_in_words(names: Sequence[str]) -> str:
    """Which weights are not finite, as a clause."""
    return f"the weights of {in_words(names)} are not finite"


def in_words(names: Sequence[str], most: int = 2) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
