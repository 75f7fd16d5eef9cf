"""What methods on pairs report, worked by hand."""

import math

import torch

from prefopt.engine.batch import pack
from prefopt.engine.logps import CompletionLogps, TokenLogps
from prefopt.methods.pairs import pair_metrics
from prefopt.trees import Completion, PromptTree, token_ids


def tree(chosen: int, rejected: int) -> PromptTree:
    return PromptTree(token_ids([1]), (Completion(token_ids([2] * chosen)), Completion(token_ids([3] * rejected))))


def logps(batch, *values: float) -> TokenLogps:
    return TokenLogps(torch.tensor(values), batch.lengths_C, batch.prompt_lengths_B, batch.num_completion_tokens)


def test_metrics_by_hand():
    batch = pack([tree(2, 1), tree(1, 2)], sharing="flat")
    policy = logps(batch, -1.0, -2.0, -3.0, -4.0, -1.0, -1.0)  # sums −3, −3 and −4, −2
    reference = logps(batch, -1.0, -3.0, -2.0, -4.0, -1.0, -1.0)  # sums −4, −2 and −4, −2
    metrics = pair_metrics(policy, reference, batch, beta=0.5)
    assert metrics["rewards/chosen"].tolist() == [0.5, 0.0]
    assert metrics["rewards/rejected"].tolist() == [-0.5, 0.0]
    assert metrics["rewards/margin"].tolist() == [1.0, 0.0]
    assert metrics["rewards/accuracy"].tolist() == [1.0, 0.5]  # a tie counts as half
    assert metrics["logps/chosen"].tolist() == [-3.0, -4.0]
    assert metrics["logps/rejected"].tolist() == [-3.0, -2.0]
    # One chosen token has risen by a nat, the rejected one has fallen by a nat: 1 − 1 + e⁻¹ and 1 − 2·e⁻¹, mean (1 − e⁻¹) / 2
    torch.testing.assert_close(metrics["kl"], torch.tensor([(1 - math.exp(-1)) / 2, 0.0]))


def test_sums_from_the_data_give_no_kl():
    batch = pack([tree(2, 1)], sharing="flat")
    metrics = pair_metrics(logps(batch, -1.0, -2.0, -3.0), CompletionLogps(torch.tensor([-3.0, -3.0]), batch.lengths_C), batch, beta=1.0)
    assert "kl" not in metrics
    assert metrics["rewards/margin"].tolist() == [0.0]


def test_metrics_carry_no_gradient():
    batch = pack([tree(1, 1)], sharing="flat")
    policy = logps(batch, -1.0, -2.0)._replace(values_N=torch.tensor([-1.0, -2.0], requires_grad=True))
    assert not any(values.requires_grad for values in pair_metrics(policy, logps(batch, -1.0, -2.0), batch, beta=1.0).values())
