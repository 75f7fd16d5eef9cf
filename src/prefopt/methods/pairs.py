"""What the methods on pairs report, the same for all of them.

Shapes: B pairs, C = 2·B completions, N scored tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import divergence

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps


def pair_metrics(policy: TokenLogps, reference: ReferenceLogps, batch: TreeBatch, *, beta: float) -> dict[str, Tensor]:
    """Metrics of each pair, [B], detached.

    `rewards/*` are implicit rewards β·(ℓ − ref). `rewards/accuracy` is 1 where the chosen one is larger and ½ on a tie, so
    that it starts at one half. `kl` sums `divergence` over the tokens of each completion, and is the mean of the two: how far
    the policy has moved on the data's tokens, in nats. It estimates KL(policy ‖ reference) as far as the data's answers
    are like the models' own; for samples of the policy see `prefopt.evaluate.kl`.
    """
    policy = policy.detach()
    logps_C, ref_C = policy.sum(), reference.sum()
    chosen_B, rejected_B = batch.as_pairs(beta * (logps_C - ref_C))
    logps_chosen_B, logps_rejected_B = batch.as_pairs(logps_C)
    metrics = {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margin": chosen_B - rejected_B,
        "rewards/accuracy": ((chosen_B > rejected_B).float() + (chosen_B >= rejected_B).float()) / 2,
        "logps/chosen": logps_chosen_B,
        "logps/rejected": logps_rejected_B,
    }
    if reference.has_tokens:
        moved_C = policy.sum_tokens(divergence(policy.values_N - reference.values_N))
        kl_chosen_B, kl_rejected_B = batch.as_pairs(moved_C)
        metrics["kl"] = (kl_chosen_B + kl_rejected_B) / 2
    return metrics
