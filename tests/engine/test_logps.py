"""Tokens reduced to completions, worked by hand."""

import pytest
import torch

from prefopt.engine.logps import CompletionLogps, TokenLogps
from prefopt.errors import DataError


def worked() -> TokenLogps:
    """Four completions of 3, 0, 1 and 2 scored tokens, in two trees, whose prompts have 2 and 0 scored tokens."""
    return TokenLogps(
        values_N=torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -0.5, -0.25]),
        lengths_C=torch.tensor([3, 0, 1, 2]),
        prompt_lengths_B=torch.tensor([2, 0]),
        num_completion_tokens=6,
    )


def test_sum_is_per_completion_and_leaves_prompts_out():
    assert worked().sum().tolist() == [-7, 0, -8, -48]


def test_mean_divides_by_scored_tokens_and_is_zero_where_none_is_scored():
    assert worked().mean().tolist() == pytest.approx([-7 / 3, 0, -8, -24])


def test_prompt_sum_is_per_prompt_and_leaves_completions_out():
    assert worked().prompt_sum().tolist() == [-0.75, 0]


def test_any_quantity_of_the_same_tokens_is_reduced_in_the_same_way():
    logps = worked()
    ones = torch.ones_like(logps.values_N)
    assert logps.sum_tokens(ones).tolist() == [3, 0, 1, 2]
    assert logps.mean_tokens(ones).tolist() == [1, 0, 1, 1]
    assert logps.sum_tokens(logps.values_N * 2).tolist() == (2 * logps.sum()).tolist()


def test_empty_completions_give_zero_gradients_not_nan():
    logps = worked()
    values = logps.values_N.clone().requires_grad_()
    moved = logps._replace(values_N=values)
    (gradient,) = torch.autograd.grad((moved.mean() * torch.tensor([3.0, 5.0, 7.0, 9.0])).sum() + 2 * moved.prompt_sum().sum(), values)
    # dmean/dtoken = weight / scored tokens; nothing for the completion without tokens.
    assert gradient.tolist() == [1, 1, 1, 7, 4.5, 4.5, 2, 2]


def test_all_completions_empty():
    none = torch.tensor([0, 0])
    logps = TokenLogps(torch.empty(0), none, torch.tensor([0]), 0)
    assert logps.sum().tolist() == [0, 0]
    assert logps.mean().tolist() == [0, 0]
    assert logps.prompt_sum().tolist() == [0]


def test_float64_is_kept():
    logps = worked()._replace(values_N=worked().values_N.double())
    assert {logps.sum().dtype, logps.mean().dtype, logps.prompt_sum().dtype} == {torch.float64}


def test_detach_keeps_numbers_and_drops_gradients():
    values = worked().values_N.clone().requires_grad_()
    logps = worked()._replace(values_N=values, entropy_N=values * 2, scalar_T=values * 3)
    detached = logps.detach()
    assert logps.sum().requires_grad
    assert detached.entropy_N is not None
    assert detached.scalar_T is not None
    assert not any(part.requires_grad for part in (detached.values_N, detached.entropy_N, detached.scalar_T, detached.sum()))
    assert detached.values_N.tolist() == values.tolist()
    assert detached.entropy_N.tolist() == (values * 2).tolist()
    assert detached.scalar_T.tolist() == (values * 3).tolist()
    assert detached.lengths_C is logps.lengths_C
    assert detached.num_completion_tokens == 6
    assert detached.log_sum_squares_N is None


def test_detach_keeps_what_is_not_there_away():
    detached = worked().detach()
    assert (detached.entropy_N, detached.log_sum_squares_N, detached.scalar_T) == (None, None, None)


def test_sums_that_came_with_the_data():
    given = CompletionLogps(sum_C=torch.tensor([-6.0, 0.0]), lengths_C=torch.tensor([3, 0]))
    assert given.sum().tolist() == [-6, 0]
    assert given.mean().tolist() == [-2, 0]


def test_sums_that_came_with_the_data_have_no_tokens_and_say_what_to_do():
    given = CompletionLogps(sum_C=torch.tensor([-6.0]), lengths_C=torch.tensor([3]))
    assert (given.has_tokens, worked().has_tokens) == (False, True)
    with pytest.raises(DataError, match=r"Remove the columns reference_chosen_logp and reference_rejected_logp"):
        given.values_N  # noqa: B018
