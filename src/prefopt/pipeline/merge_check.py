"""Whether a merged model is the one that was trained, and what of it saving in fewer bits loses.

Shapes: N scored tokens, C completions, B pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.errors import ModelError
from prefopt.models.settings import ModelKind
from prefopt.pipeline.texts import Texts
from prefopt.pipeline.trained import Trained
from prefopt.report.files import read_lines

NOISE_FACTOR = 8.0
SAME = 1e-4
LOUDEST = 1e-2
"""Two forms of a model are the same where no log-probability differs by more than `NOISE_FACTOR` times the noise of the
arithmetic itself, measured on that very model, or by `SAME` nats, which float32 sums in another order reach in large models;
and never by more than `LOUDEST`. (Seen: 5e-6 for 2 million parameters. A merge that misses a layer or doubles a scale is off
by as much as the adapter does.)"""

OTHER_BASE = 0.1
"""Mean difference per token, in nats, from what the run noted of its base above which that base was another one. bf16 moves
it by 0.01 and less, other weights by more than this."""

OTHER_BASE_IN_4BIT = 0.2
"""The same where the run held its base in four bits, which moves it by itself: by 0.003 for 4 million parameters. Of larger models we
have no figure, hence the room."""

WHAT: dict[ModelKind, str] = {"language": "log-probs", "reward": "scores"}
"""What is compared."""

UNIT: dict[ModelKind, str] = {"language": "nats per token", "reward": "at a token"}
"""And in what."""


@dataclass(frozen=True, slots=True)
class Unmerged:
    """Base and adapter before they are merged.

    Attributes:
        texts: what all forms of the model are run on.
        trained: log-probs with the adapter on, [N], in nats.
        alone: of the base alone, [N].
        noise: largest difference of two ways to run the model with the adapter on.
        kind: of the model; of a reward model scores stand in the place of log-probs.
    """

    texts: Texts
    trained: Tensor
    alone: Tensor
    noise: float
    kind: ModelKind = "language"

    @property
    def allowed(self) -> float:
        """The largest difference that counts as none."""
        return min(max(NOISE_FACTOR * self.noise, SAME), LOUDEST)

    def refuse_other(self, logps: Tensor, expected: Tensor, what: str) -> None:
        """Stops where a model is not the same any more.

        Args:
            logps: its log-probs, [N].
            expected: what they should be.
            what: went wrong if they are not, as the beginning of a sentence.

        Raises:
            ModelError: a log-probability differs by more than allowed.
        """
        if (found := largest(logps - expected)) > self.allowed:
            raise ModelError(
                f"{what}: {WHAT[self.kind]} differ by up to {found:.2g} {UNIT[self.kind]}, and arithmetic alone explains "
                f"{self.allowed:.1g}. Nothing was written. Serve base and adapter as they are, and please report the model's architecture."
            )


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the merged model is from base with adapter; differences are of log-probs, in nats per token.

    Attributes:
        texts: what they were compared on, in words.
        num_tokens: how many tokens that is.
        noise: largest difference of two ways to run the unmerged model.
        allowed: largest difference that counts as none.
        effect: mean difference that the adapter makes.
        merged: largest difference after merging, in float32.
        saved_mean, saved_largest: of the model as it lies on disk.
        margins_moved: mean change that saving makes in the margins between the answers of pairs, relative to the mean change that the
            adapter makes in them; None: no pairs.
        preferences_lost: pairs whose change of margin points the other way after saving.
        num_pairs: of how many, those left out whose margin the adapter does not change.
        kind: of the model; of a reward model scores stand in the place of log-probs.
    """

    texts: str
    num_tokens: int
    noise: float
    allowed: float
    effect: float
    merged: float
    saved_mean: float
    saved_largest: float
    margins_moved: float | None
    preferences_lost: int
    num_pairs: int
    kind: ModelKind = "language"


def compare(unmerged: Unmerged, merged: Tensor, saved: Tensor) -> Comparison:
    """The figures of the merged model, and of the saved one, both [N]."""
    texts, trained, alone = unmerged.texts, unmerged.trained, unmerged.alone
    moved, lost, num_pairs = None, 0, 0
    if texts.are_pairs:
        before_B, after_B = (margins(logps, texts) - margins(alone, texts) for logps in (trained, saved))
        learned_B = before_B.abs() > unmerged.allowed
        num_pairs = int(learned_B.sum())
        moved = float((after_B - before_B).abs().mean() / before_B.abs().mean()) if num_pairs else None
        lost = int((learned_B & (before_B.sign() != after_B.sign())).sum())
    return Comparison(
        texts=texts.origin,
        num_tokens=len(trained),
        noise=unmerged.noise,
        allowed=unmerged.allowed,
        effect=float((trained - alone).abs().mean()),
        merged=largest(merged - trained),
        saved_mean=float((saved - trained).abs().mean()),
        saved_largest=largest(saved - trained),
        margins_moved=moved,
        preferences_lost=lost,
        num_pairs=num_pairs,
        kind=unmerged.kind,
    )


def largest(difference: Tensor) -> float:
    """The largest absolute difference; infinite where one is not a number."""
    return float(difference.abs().nan_to_num(nan=float("inf")).max())


def sums(logps: Tensor, texts: Texts) -> Tensor:
    """Log-probability of each completion, [C], in nats."""
    lengths = [completion.num_scored for tree in texts.trees for completion in tree.completions]
    return torch.stack([part.sum() for part in logps.split(lengths)])


def margins(logps: Tensor, texts: Texts) -> Tensor:
    """Log-probability of each pair's chosen completion less that of its rejected one, [B], in nats."""
    chosen_B, rejected_B = sums(logps, texts).view(-1, 2).unbind(1)
    return chosen_B - rejected_B


def is_other_base(moved: float | None, *, in_4bit: bool = False) -> bool:
    """Whether the base is probably not the one that the adapter was trained on.

    Args:
        moved: as `moved_from_run` gives it.
        in_4bit: the run held its base in four bits.
    """
    return moved is not None and moved > (OTHER_BASE_IN_4BIT if in_4bit else OTHER_BASE)


def moved_from_run(unmerged: Unmerged, trained: Trained) -> float | None:
    """Mean difference per token between the base's log-probs and those that the run noted before it began; None: it noted none.

    Only where the run's adapter was new: then the model before the first step was the base.
    """
    if trained.files is None or not trained.config.get("lora_rank") or not unmerged.texts.are_pairs:
        return None
    noted: dict[Any, Mapping[str, Any]] = {row.get("row"): row for row in read_lines(trained.files.held_out)}
    moved, num_tokens = 0.0, 0
    for tree, (chosen, rejected) in zip(unmerged.texts.trees, sums(unmerged.alone, unmerged.texts).view(-1, 2).tolist(), strict=True):
        row = noted.get(tree.row_id, {})
        before = row.get("before") or {}
        lengths = [len(completion.ids) for completion in tree.completions]
        if row.get("lengths") == lengths and {"logps/chosen", "logps/rejected"} <= before.keys():
            moved += abs(chosen - before["logps/chosen"]) + abs(rejected - before["logps/rejected"])
            num_tokens += sum(lengths)
    return moved / num_tokens if num_tokens else None
