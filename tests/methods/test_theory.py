"""What the methods' papers prove, held against the methods as they are: on a world small enough to enumerate, with data without end.

docs/theory.md says what it means. Closed forms are compared in total variation, which is the largest error in the probability of any
set of answers. KTO, SimPO and ORPO have none: their objectives stand here a second time, in numpy and written from the papers.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from tests.methods.enumerated import (
    CHAIN,
    COMPLETIONS,
    LENGTH_Y,
    PREFIXES,
    PROMPTS,
    Exact,
    World,
    all_alike,
    balanced,
    bradley_terry,
    by_chance,
    certain,
    completion,
    exact,
    far_apart,
    flipped,
    make_world,
    only,
    pairs,
    per_token,
    rankings,
    reward_and_kl,
    thumbs,
    tilted,
)
from torch import Tensor

from prefopt.trees import PromptTree, token_ids

AT_REST = 1e-6
"""Total variation that training leaves; the claim is 1e-3."""


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@cache
def noisy_pairs() -> tuple[PromptTree, ...]:
    """All pairs, with the preferences of Bradley and Terry."""
    return tuple(pairs(bradley_terry(make_world().reward_XY), all_alike()))


def test_the_space_is_complete_and_packed_as_the_engine_does(world: World):
    assert len(COMPLETIONS) == len(set(COMPLETIONS)) == 15
    torch.testing.assert_close(world.reference_XY.exp().sum(-1), torch.ones(len(PROMPTS), dtype=torch.float64))
    every = tuple(completion(y) for y in range(len(COMPLETIONS)))
    problem = exact("dpo", [PromptTree(token_ids(prompt), every) for prompt in PROMPTS], world, plackett_luce=True)
    assert len(problem.parts["loss"][1].unique()) == len(PROMPTS) * len(PREFIXES)
    torch.testing.assert_close(problem.reference["loss"].sum().view(len(PROMPTS), -1), world.reference_XY, rtol=0, atol=1e-14)


# DPO.


@pytest.mark.parametrize("drawn_from", ["all alike", "reference"])
@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 3.0])
def test_dpo_reaches_the_optimum_of_rlhf_and_recovers_the_reward(world: World, beta: float, drawn_from: str):
    often = all_alike() if drawn_from == "all alike" else by_chance(world.reference_XY.exp())
    problem = exact("dpo", pairs(bradley_terry(world.reward_XY), often), world, beta=beta)
    found_XY = problem.solve().logps()
    best_XY = tilted(world.reference_XY, world.reward_XY / beta)
    assert far_apart(world.reference_XY, best_XY) > 0.05
    assert far_apart(found_XY, best_XY) < AT_REST
    # β·log(π/π_ref) = r − β·log Z: the reward up to a number of each prompt's, for answers that the policy hardly gives too.
    shift_XY = world.reward_XY - beta * (found_XY - world.reference_XY)
    log_z_X = (world.reference_XY + world.reward_XY / beta).logsumexp(-1)
    torch.testing.assert_close(shift_XY, (beta * log_z_X)[:, None].expand_as(shift_XY), rtol=0, atol=1e-4)
    assert abs(log_z_X[0] - log_z_X[1]) * beta > 0.05
    reward, kl = reward_and_kl(world, found_XY)
    assert reward - beta * kl == pytest.approx(beta * log_z_X.mean().item(), abs=1e-8)


def test_comparisons_that_connect_all_answers_suffice(world: World):
    chain = exact("dpo", pairs(bradley_terry(world.reward_XY), only(CHAIN)), world, beta=0.5)
    assert far_apart(chain.solve().logps(), tilted(world.reference_XY, world.reward_XY / 0.5)) < AT_REST


def test_between_answers_that_nothing_connects_anything_goes(world: World):
    cut = 7
    couples = [couple for couple in CHAIN if couple != (cut - 1, cut)]
    problem = exact("dpo", pairs(bradley_terry(world.reward_XY), only(couples)), world, beta=0.5)
    found_XY, best_XY = problem.solve().logps(), tilted(world.reference_XY, world.reward_XY / 0.5)
    for part in (slice(None, cut), slice(cut, None)):
        assert far_apart(found_XY[:, part].log_softmax(-1), best_XY[:, part].log_softmax(-1)) < AT_REST
    assert far_apart(found_XY, best_XY) > 0.02


# What a certain preference does.


def test_dpo_on_certain_preferences_has_no_end_and_ipo_does(world: World):
    trees = pairs(certain(world.reward_XY), all_alike())
    dpo, ipo = exact("dpo", trees, world, beta=0.5), exact("ipo", trees, world, beta=0.5, reduction="sum")
    margins, losers = [], []
    for step, policy in enumerate(dpo.steps(torch.optim.AdamW, 400, lr=0.05, weight_decay=0.0)):
        if step in (50, 100, 200, 400):
            margins.append(dpo.metric("rewards/margin", policy))
            losers.append(policy.logps().gather(1, world.reward_XY.argmin(-1, keepdim=True)).max().item())
    growth, fall = np.diff(margins), -np.diff(losers)
    assert 0.7 < growth[0] < growth[1] < growth[2]  # over twice the time more, every time
    assert 2 < fall[0] < fall[1] < fall[2]
    rest_XY = tilted(world.reference_XY, wins(certain(world.reward_XY)) / 0.5)
    policy = ipo.solve()
    assert far_apart(policy.logps(), rest_XY) < AT_REST
    assert margins[-1] > 10 * ipo.metric("rewards/margin", policy)
    log_ratio_XY = policy.logps() - world.reference_XY
    assert (log_ratio_XY.amax(-1) - log_ratio_XY.amin(-1)).max() < 1 / 0.5  # the bound: wins lie between 0 and 1
    *_, policy = ipo.steps(torch.optim.AdamW, 150, lr=0.1, fade=True, weight_decay=0.0)
    assert far_apart(policy.logps(), rest_XY) < 1e-3


RESTS: dict[str, tuple[str, dict[str, float | str], float]] = {
    "cdpo": ("dpo", {"beta": 0.5, "label_smoothing": 0.1}, math.log(0.9 / 0.1)),
    "exo": ("exo", {"beta": 0.5, "label_smoothing": 0.1}, math.log(0.9 / 0.1)),
    "ipo": ("ipo", {"beta": 0.5, "reduction": "sum"}, 0.5),
    "ipo on means": ("ipo", {"beta": 0.5}, 0.5),
    "sppo": ("sppo", {"beta": 0.5}, 1.0),
}
"""Methods whose reward margin on a pair of certain preference has an end, and where it is."""


@pytest.mark.parametrize(("name", "settings", "margin"), RESTS.values(), ids=RESTS)
def test_margin_of_a_certain_pair_rests_where_the_page_of_the_method_says(world: World, name: str, settings: dict, margin: float):
    problem = exact(name, pairs(certain(world.reward_XY), only([(3, 9)])), world, **settings)
    assert problem.metric("rewards/margin", problem.solve()) == pytest.approx(margin, abs=1e-6)


def test_nca_holds_the_chosen_answer_and_lets_the_rejected_one_fall(world: World):
    problem = exact("nca", pairs(certain(world.reward_XY), only([(3, 9)])), world, beta=1.0)
    chosen, rejected = [], []
    for step, policy in enumerate(problem.steps(torch.optim.AdamW, 400, lr=0.1, weight_decay=0.0)):
        if step in (100, 200, 400):
            chosen.append(problem.metric("rewards/chosen", policy))
            rejected.append(problem.metric("rewards/rejected", policy))
    assert chosen[-2:] == pytest.approx([math.log(2)] * 2, abs=1e-4)
    fall = -np.diff(rejected)
    assert 0.3 < fall[0] < fall[1]  # over twice the time more
    assert rejected[-1] < -8


def test_hinge_stops_once_it_is_right_by_enough(world: World):
    problem = exact("hinge", pairs(certain(world.reward_XY), only([(3, 9)])), world, beta=0.5)
    policy = problem.solve()
    assert problem.loss(policy).item() == 0
    assert 1 <= problem.metric("rewards/margin", policy) < 4


# Labels that are wrong.


def test_robust_dpo_on_flipped_labels_is_dpo_on_clean_ones_and_conservative_dpo_is_not(world: World):
    wrong = pairs(flipped(bradley_terry(world.reward_XY), 0.2), all_alike())
    best_XY = tilted(world.reference_XY, world.reward_XY / 0.5)
    robust = exact("robust", wrong, world, beta=0.5, label_smoothing=0.2)
    clean = exact("dpo", noisy_pairs(), world, beta=0.5)
    policy = robust.solve()
    assert far_apart(policy.logps(), best_XY) < AT_REST
    assert robust.loss(policy).item() == pytest.approx(clean.loss(policy).item(), abs=1e-12)

    # Taking the labels as they come, and doubting them, both leave the policy closer to the reference than the clean labels do.
    plain_XY = exact("dpo", wrong, world, beta=0.5).solve().logps()
    doubting_XY = exact("dpo", wrong, world, beta=0.5, label_smoothing=0.2).solve().logps()
    moved = [reward_and_kl(world, logps_XY)[1] for logps_XY in (doubting_XY, plain_XY, best_XY)]
    assert moved[0] < 0.6 * moved[1] < 0.36 * moved[2]
    assert far_apart(plain_XY, best_XY) > 0.05


# Optima in closed form.


def wins(preference_XYY: Tensor) -> Tensor:
    """How often each answer is preferred to one drawn from all alike, itself included."""
    return preference_XYY.mean(-1)


def forward_kl(ratio: Tensor) -> Tensor:
    """log u where f'(u) = −1/u is the given number."""
    return -(-ratio).log()


def js(ratio: Tensor) -> Tensor:
    """log u where f'(u) = log(u / (1 + u)) is the given number."""
    return ratio - (-ratio.expm1()).log()


def alpha(ratio: Tensor) -> Tensor:
    """log u where f'(u) = (1 − u^−½) / ½ is the given number."""
    return -2 * (1 - ratio / 2).log()


def f_tilted(world: World, inverse: Callable[[Tensor], Tensor], bound: float) -> Tensor:
    """π with f'(π/π_ref) = r − λ, and the λ that makes it a policy (β = 1); f' is below the bound."""
    return balanced(lambda c: world.reference_XY + inverse(world.reward_XY + c), bound - world.reward_XY.amax(-1))


def along_the_chain(world: World, gap: Callable[[Tensor], Tensor]) -> Tensor:
    """The reference tilted so that the log-ratios of neighbours differ by `gap` of how often the second is preferred."""
    preferred_XY = bradley_terry(world.reward_XY).diagonal(offset=-1, dim1=1, dim2=2)
    return tilted(world.reference_XY, torch.cat([torch.zeros(len(PROMPTS), 1, dtype=torch.float64), gap(preferred_XY).cumsum(-1)], 1))


ClosedForm = Callable[[World], Tensor]
CLOSED: dict[str, tuple[str, dict[str, float | str | bool], ClosedForm]] = {
    "wpo": ("dpo", {"beta": 0.5, "wpo": True}, lambda world: tilted(world.reference_XY, world.reward_XY / 0.5)),
    "cpo": ("cpo", {"beta": 0.5, "sft_weight": 0.0}, lambda world: world.reward_XY.div(0.5).log_softmax(-1)),
    "rdpo": (
        "rdpo",
        {"beta": 0.5, "length_weight": 0.3},
        lambda world: tilted(world.reference_XY, (world.reward_XY - 0.3 * LENGTH_Y) / 0.5),
    ),
    "ln-dpo": ("ln-dpo", {"beta": 2.0}, lambda world: per_token(world.reference_XY, world.reward_XY / 2)),
    "simpo without a margin": (
        "simpo",
        {"beta": 2.0, "gamma": 0.0},
        lambda world: per_token(torch.zeros_like(world.reward_XY), world.reward_XY / 2),
    ),
    "ipo on sums": (
        "ipo",
        {"beta": 0.2, "reduction": "sum"},
        lambda world: tilted(world.reference_XY, wins(bradley_terry(world.reward_XY)) / 0.2),
    ),
    "ipo on means": ("ipo", {"beta": 0.2}, lambda world: per_token(world.reference_XY, wins(bradley_terry(world.reward_XY)) / 0.2)),
    "forward kl": ("dpo", {"beta": 1.0, "f_divergence": "forward-kl"}, lambda world: f_tilted(world, forward_kl, 0.0)),
    "js": ("dpo", {"beta": 1.0, "f_divergence": "js"}, lambda world: f_tilted(world, js, 0.0)),
    "alpha": ("dpo", {"beta": 1.0, "f_divergence": "alpha", "f_alpha": 0.5}, lambda world: f_tilted(world, alpha, 2.0)),
}
"""Name and settings of a method, and the policy that it has on Bradley and Terry's pairs without end."""


@pytest.mark.parametrize(("name", "settings", "closed"), CLOSED.values(), ids=CLOSED)
def test_optimum_is_the_closed_form(world: World, name: str, settings: dict, closed: ClosedForm):
    best_XY = closed(world)
    torch.testing.assert_close(best_XY.exp().sum(-1), torch.ones(len(PROMPTS), dtype=torch.float64))
    assert far_apart(world.reference_XY, best_XY) > 0.1
    assert far_apart(exact(name, noisy_pairs(), world, **settings).solve().logps(), best_XY) < AT_REST


GAPS: dict[str, tuple[str, dict[str, float], Callable[[Tensor], Tensor]]] = {
    "cdpo": ("dpo", {"beta": 0.5, "label_smoothing": 0.1}, lambda p: flipped(p, 0.1).logit() / 0.5),
    "exo": ("exo", {"beta": 0.5, "label_smoothing": 0.1}, lambda p: (2 * p - 1) * math.log(0.9 / 0.1) / 0.5),
}


@pytest.mark.parametrize(("name", "settings", "gap"), GAPS.values(), ids=GAPS)
def test_where_every_pair_can_have_its_own_way_each_rests_at_its_own_gap(world: World, name: str, settings: dict, gap: Callable):
    problem = exact(name, pairs(bradley_terry(world.reward_XY), only(CHAIN)), world, **settings)
    assert far_apart(problem.solve().logps(), along_the_chain(world, gap)) < AT_REST


@pytest.mark.parametrize("read_as", ["plackett_luce", "all_pairs"])
def test_rankings_reach_the_same_optimum_as_pairs(world: World, read_as: str):
    groups = [[y, (y + 1) % len(COMPLETIONS), (y + 4) % len(COMPLETIONS)] for y in range(len(COMPLETIONS))]
    trees = rankings(world.reward_XY, groups)
    assert sum(tree.weight for tree in trees) == pytest.approx(len(groups) * len(PROMPTS))
    found_XY = exact("dpo", trees, world, beta=0.5, **{read_as: True}).solve().logps()
    assert far_apart(found_XY, tilted(world.reference_XY, world.reward_XY / 0.5)) < AT_REST


# Objectives without a closed form, against an optimiser of their own.


def test_simpo_is_where_newton_finds_the_least_of_the_papers_objective(world: World):
    beta, gamma = 2.0, 1.0
    preference_XYY = bradley_terry(world.reward_XY)
    mean_XY = np.stack([newton_on_simpo(preference_YY.numpy(), beta, gamma) for preference_YY in preference_XYY])
    best_XY = per_token(torch.zeros_like(world.reward_XY), torch.from_numpy(mean_XY))
    problem = exact("simpo", noisy_pairs(), world, beta=beta, gamma=gamma)
    assert far_apart(problem.solve().logps(), best_XY) < AT_REST
    without_XY = per_token(torch.zeros_like(world.reward_XY), world.reward_XY / beta)
    assert far_apart(best_XY, without_XY) > 0.02  # γ matters


def newton_on_simpo(preference_YY: np.ndarray, beta: float, gamma: float) -> np.ndarray:
    """Means over tokens, up to a constant, at which Σ p(y ≻ y')·log(1 + exp(−(β·(m(y) − m(y')) − γ))) is least; it is convex in them."""
    weight_YY = preference_YY * (1 - np.eye(len(preference_YY)))
    mean_Y = np.zeros(len(preference_YY))
    for _ in range(30):
        doubt_YY = 1 / (1 + np.exp(beta * (mean_Y[:, None] - mean_Y) - gamma))
        push_YY = beta * weight_YY * doubt_YY
        slope_Y = push_YY.sum(0) - push_YY.sum(1)
        bend_YY = beta * push_YY * (1 - doubt_YY)
        both_YY = bend_YY + bend_YY.T
        mean_Y = mean_Y - np.linalg.lstsq(np.diag(both_YY.sum(1)) - both_YY, slope_Y, rcond=1e-12)[0]
    assert np.abs(slope_Y).max() < 1e-13
    return mean_Y


@pytest.mark.parametrize("share", [0.6, 0.2], ids=["all held", "some fall"])
def test_kto_is_where_descent_on_the_papers_objective_comes_to_rest(world: World, share: float):
    settings = {"beta": 0.5, "undesirable_weight": 0.5}
    shown_XY = torch.full_like(world.reward_XY, 1 / len(COMPLETIONS))
    up_XY = share + (1 - share) * world.reward_XY.sub(0.5).sigmoid()
    problem = exact("kto", thumbs(up_XY, shown_XY), world, **settings)
    *_, policy = problem.steps(torch.optim.AdamW, 400, lr=0.4, fade=True, weight_decay=0.0)
    best_XY, z0, loss = descend_on_kto(problem.trees, world, up_XY.numpy(), shown_XY.numpy(), **settings)
    assert far_apart(best_XY, world.reference_XY) > 0.1

    # What the reference does not do: an answer whose thumbs down weigh more than its thumbs up loses all of its probability. The lower
    # it is the less it is pushed, so that it takes its time; and with such answers among z0's partners z0 is 0.
    falls_XY = up_XY < 0.5 * (1 - up_XY)
    assert falls_XY.any() == (share == 0.2)
    assert (best_XY.exp()[falls_XY] == 0).all()
    exactly = 1e-3 if falls_XY.any() else AT_REST
    assert far_apart(policy.logps(), best_XY) < exactly
    assert (z0 > 0.3) == (share == 0.6)
    assert problem.metric("z0", policy) == pytest.approx(z0, abs=exactly)
    assert problem.loss(policy).item() == pytest.approx(loss, abs=exactly)


def descend_on_kto(
    trees: Sequence[PromptTree], world: World, up: np.ndarray, shown: np.ndarray, *, beta: float, undesirable_weight: float
) -> tuple[Tensor, float, float]:
    """The policy at rest, z0 and the loss, by gradient descent on logits of whole completions; z0 is held in the derivative.

    With r = log(π/π_ref) the paper's loss, λ_D·(1 − σ(β(r − z0))) for thumbs up and λ_U·(1 − σ(β(z0 − r))) for thumbs down, is in the
    mean over thumbs λ_U·(1 − up) + (λ_D·up − λ_U·(1 − up))·(1 − σ(β(r − z0))).
    """
    rows, columns, often = map(np.array, zip(*map(partner, trees), strict=True))
    reference = world.reference_XY.numpy()
    weight = shown * (up - undesirable_weight * (1 - up)) / shown.sum()
    logits = np.where(weight > 0, reference, -1e3)  # others fall for ever
    for _ in range(20_000):
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ratio = logps - reference
        z0 = max(0.0, (often * ratio[rows, columns]).sum() / often.sum())
        far = 1 / (1 + np.exp(beta * (ratio - z0)))
        push = beta * weight * far * (1 - far)
        slope = np.exp(logps) * push.sum(-1, keepdims=True) - push
        logits = logits - 100 * slope
    assert np.abs(slope).max() < 1e-15
    return torch.from_numpy(logps), float(z0), float((undesirable_weight * shown * (1 - up)).sum() / shown.sum() + (weight * far).sum())


def partner(tree: PromptTree) -> tuple[int, int, float]:
    """Prompt, completion and weight of what z0 is measured on; which it is was drawn, and is not the objective's business."""
    return PROMPTS.index(tuple(tree.prompt_ids.tolist())), COMPLETIONS.index(tuple(tree.completions[-1].ids.tolist())), tree.weight


def test_orpo_rests_where_the_papers_objective_has_no_slope(world: World):
    problem = exact("orpo", noisy_pairs(), world, odds_weight=0.5, likelihood_of="chosen")
    policy = problem.solve()
    preference_XYY = bradley_terry(world.reward_XY).numpy() * (1 - np.eye(len(COMPLETIONS)))
    logits_XY = policy.logps().numpy()
    assert orpo_objective(logits_XY, preference_XYY) == pytest.approx(problem.loss(policy).item(), abs=1e-12)
    assert np.abs(differences(logits_XY, preference_XYY)).max() < 1e-8
    assert np.abs(differences(world.reference_XY.numpy(), preference_XYY)).max() > 1e-2
    # It goes beyond the answers that were chosen, which likelihood alone would imitate.
    imitated_XY = sft(world).solve().logps()
    assert reward_and_kl(world, policy.logps())[0] > reward_and_kl(world, imitated_XY)[0] + 0.05


def orpo_objective(logits_XY: np.ndarray, preference_XYY: np.ndarray) -> float:
    """Negative log-likelihood per token of what is chosen, and half the odds ratio's loss."""
    logps_XY = logits_XY - np.log(np.exp(logits_XY).sum(-1, keepdims=True))
    length_Y = LENGTH_Y.numpy()
    probability_XY = np.exp(logps_XY / length_Y)
    log_odds_XY = np.log(probability_XY / (1 - probability_XY))
    losses_XYY = np.log(1 + np.exp(log_odds_XY[:, None, :] - log_odds_XY[:, :, None]))
    chosen_XY = preference_XYY.sum(-1)
    likelihood = -(chosen_XY * logps_XY).sum() / (chosen_XY * length_Y).sum()
    return likelihood + 0.5 * (preference_XYY * losses_XYY).sum() / preference_XYY.sum()


def differences(logits_XY: np.ndarray, preference_XYY: np.ndarray) -> np.ndarray:
    """The slope of ORPO's objective by central differences."""
    steps = 1e-5 * np.eye(logits_XY.size).reshape(-1, *logits_XY.shape)
    return np.array(
        [orpo_objective(logits_XY + step, preference_XYY) - orpo_objective(logits_XY - step, preference_XYY) for step in steps]
    ) / (2e-5)


def sft(world: World) -> Exact:
    """SFT on the chosen answers of all pairs."""
    return exact("sft", [PromptTree(tree.prompt_ids, tree.completions[:1], weight=tree.weight) for tree in noisy_pairs()], world)


def test_sft_becomes_the_distribution_of_its_data(world: World):
    chosen_XY = (bradley_terry(world.reward_XY).sum(-1) - 0.5).log()
    assert far_apart(sft(world).solve().logps(), chosen_XY.log_softmax(-1)) < AT_REST
