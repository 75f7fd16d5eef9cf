"""How often a policy's implicit reward prefers the chosen completion.

    reward(x, y) = β · (log π(y|x) − log π_ref(y|x))        (DPO, 2305.18290, section 4; the term β·log Z(x) cancels in pairs)

On held-out pairs this says whether what was learned carries over to prompts that were not trained on.
It says nothing about how good the policy's own samples are: measure reward and KL on samples too.

Shapes: B pairs.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class RewardAccuracy:
    """Figures over pairs.

    Attributes:
        accuracy: share of pairs whose chosen completion has the higher implicit reward; an exact tie counts half, so that a
            policy that is still its reference scores one half.
        accuracy_error: its standard error, √(a(1−a)/B).
        margin: mean of reward(chosen) − reward(rejected), in nats times β.
        loss: mean of −log σ(margin), the DPO loss without label smoothing, in nats.
        num_pairs: B.
    """

    accuracy: float
    accuracy_error: float
    margin: float
    loss: float
    num_pairs: int


def reward_accuracy(
    policy_chosen_B: Tensor, policy_rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float
) -> RewardAccuracy:
    """Accuracy, margin and loss of the implicit reward.

    Args:
        policy_chosen_B, policy_rejected_B: log-probabilities of the completions under the policy, summed over tokens, in nats.
        ref_chosen_B, ref_rejected_B: the same under the reference.
        beta: the β that the policy was trained with; accuracy does not depend on it.

    Raises:
        ValueError: no pairs, or tensors of different lengths.
    """
    shapes = [tuple(tensor.shape) for tensor in (policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise ValueError(f"reward accuracy needs four vectors of the same length, at least 1, and was given the shapes {shapes}")
    chosen_B = policy_chosen_B.detach().double() - ref_chosen_B.detach().double()
    rejected_B = policy_rejected_B.detach().double() - ref_rejected_B.detach().double()
    margin_B = beta * (chosen_B - rejected_B)
    num_pairs = len(margin_B)
    accuracy = ((margin_B > 0).double() + 0.5 * (margin_B == 0).double()).mean().item()
    return RewardAccuracy(
        accuracy=accuracy,
        accuracy_error=math.sqrt(accuracy * (1 - accuracy) / num_pairs),
        margin=margin_B.mean().item(),
        loss=-logsigmoid(margin_B).mean().item(),
        num_pairs=num_pairs,
    )
