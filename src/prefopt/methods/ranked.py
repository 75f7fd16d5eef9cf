"""Rankings of K completions of one prompt: the likelihood of the whole order.

Shapes: B trees, K completions of the tree that has most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.methods.comparisons import Comparisons


@in_float32
def plackett_luce_loss(rewards_BK: Tensor, ranks_BK: Tensor, exists_BK: Tensor) -> Tensor:
    """Negative log-likelihood of each order under the Plackett-Luce model: the best is drawn first, in proportion to e^reward, then the
    best of the rest, and so on.

        loss = Σ_k [ log Σ_{j: rank_j ≥ rank_k} e^{r_j} − r_k ]

    Rafailov et al. 2023, arXiv 2305.18290, appendix A.3, equation 20, with r = β·(ℓ − ref). For two completions it is DPO's loss.
    Completions of one rank are each drawn from all of that rank and below, which is Breslow's way with ties.

    Args:
        rewards_BK: implicit rewards, float32; anything finite where there is no completion.
        ranks_BK: 0 for the best, and so on.
        exists_BK: which entries are completions.

    Returns:
        Tensor of shape [B]; log K! where all K rewards are equal and the ranks differ.

    Example:
        >>> import torch
        >>> plackett_luce_loss(torch.zeros(1, 3), torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool))
        tensor([1.7918])
    """
    from torch import eye

    remain_BKK = (ranks_BK[:, None, :] >= ranks_BK[:, :, None]) & exists_BK[:, None, :]
    # What is not there remains for itself, so that no sum is over nothing; its place counts 0.
    remain_BKK = remain_BKK | eye(ranks_BK.shape[1], dtype=exists_BK.dtype, device=exists_BK.device)
    log_sums_BK = rewards_BK[:, None, :].expand(remain_BKK.shape).masked_fill(~remain_BKK, float("-inf")).logsumexp(-1)
    return (log_sums_BK - rewards_BK).masked_fill(~exists_BK, 0.0).sum(1)


def order_losses(rewards_C: Tensor, compared: Comparisons, batch: TreeBatch) -> Tensor:
    """`plackett_luce_loss` of each tree's order.

    Args:
        rewards_C: of the completions, float32.
        compared: pairs of different rank; where a tree has none, all its completions share a rank.
        batch: their ranks.

    Returns:
        Tensor of shape [B]; 0 where there is no order, which the unit counts as none.
    """
    rewards_BK, exists_BK = batch.by_tree(rewards_C)
    ranks_BK, _ = batch.by_tree(batch.ranks())
    return plackett_luce_loss(rewards_BK, ranks_BK, exists_BK) * (compared.num_B > 0)
