"""The losses again, from the papers, in plain Python: slow, obvious, float64, and sharing nothing with `prefopt`.

Every function takes numbers of one example and gives its loss. A pair is (chosen, rejected, reference of chosen, reference of
rejected), log-probabilities all four.
"""

import math
from collections.abc import Sequence
from itertools import permutations


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def dpo(c: float, r: float, rc: float, rr: float, *, beta: float, label_smoothing: float = 0.0) -> float:
    """Cross-entropy of the label, which is right with probability 1 − ε, with σ of the difference of rewards."""
    right = log_sigma(beta * (c - rc) - beta * (r - rr))
    wrong = log_sigma(beta * (r - rr) - beta * (c - rc))
    return -((1 - label_smoothing) * right + label_smoothing * wrong)


def robust(c: float, r: float, rc: float, rr: float, *, beta: float, label_smoothing: float) -> float:
    """The estimate whose mean over flips of the label is DPO's loss on the true one."""
    as_given, flipped = dpo(c, r, rc, rr, beta=beta), dpo(r, c, rr, rc, beta=beta)
    return ((1 - label_smoothing) * as_given - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(c: float, r: float, rc: float, rr: float, *, beta: float) -> float:
    """Squared distance of the log of (π_c·ref_r) / (π_r·ref_c) from 1/(2τ)."""
    return (c + rr - r - rc - 0.5 / beta) ** 2


def hinge(c: float, r: float, rc: float, rr: float, *, beta: float) -> float:
    gap = 1 - beta * (c - rc - r + rr)
    return gap if gap > 0 else 0.0


def dpop(c: float, r: float, rc: float, rr: float, *, beta: float, penalty: float) -> float:
    fallen = rc - c if rc > c else 0.0
    return -log_sigma(beta * (c - rc) - beta * (r - rr) - beta * penalty * fallen)


def rdpo(c: float, r: float, rc: float, rr: float, *, beta: float, length_weight: float, longer: float) -> float:
    """The preference is σ of the rewards' difference plus α times the difference of lengths; its negative log-likelihood."""
    return -log_sigma((beta * (c - rc) + length_weight * longer) - beta * (r - rr))


def exo(c: float, r: float, rc: float, rr: float, *, beta: float, label_smoothing: float) -> float:
    """KL of the softmax over the two rewards from the smoothed label."""
    rewards = (beta * (c - rc), beta * (r - rr))
    top = max(rewards)
    shares = [math.exp(reward - top) for reward in rewards]
    total = sum(shares)
    label = (1 - label_smoothing, label_smoothing)
    return sum(
        share / total * (reward - top - math.log(total) - math.log(target))
        for share, reward, target in zip(shares, rewards, label, strict=True)
    )


def nca(c: float, r: float, rc: float, rr: float, *, beta: float) -> float:
    """A chosen answer against noise, and both answers as noise, half each."""
    chosen, rejected = beta * (c - rc), beta * (r - rr)
    return -log_sigma(chosen) - 0.5 * (log_sigma(-chosen) + log_sigma(-rejected))


def bco(c: float, r: float, rc: float, rr: float, *, beta: float, shift: float) -> float:
    """Cross-entropies of a classifier with the logit reward − δ."""
    return bco_thumb(c, rc, up=True, beta=beta, shift=shift) + bco_thumb(r, rr, up=False, beta=beta, shift=shift)


def bco_thumb(logp: float, ref: float, *, up: bool, beta: float, shift: float) -> float:
    good = sigma(beta * (logp - ref) - shift)
    return -math.log(good if up else 1 - good)


def sppo(c: float, r: float, rc: float, rr: float, *, beta: float) -> float:
    """Log-ratios against η·(P − ½) with η = 1/β and P = 1 for the winner, 0 for the loser."""
    return (c - rc - (1 - 0.5) / beta) ** 2 + (r - rr - (0 - 0.5) / beta) ** 2


def apo_zero(c: float, r: float, rc: float, rr: float, *, beta: float) -> float:
    return (1 - sigma(beta * (c - rc))) + sigma(beta * (r - rr))


def apo_down(c: float, r: float, rc: float, rr: float, *, beta: float) -> float:
    return sigma(beta * (c - rc)) + 1 - sigma(beta * (c - rc) - beta * (r - rr))


def discopop(c: float, r: float, rc: float, rr: float, *, beta: float, tau: float) -> float:
    x = beta * (c - rc - r + rr)
    share = sigma(x / tau)
    return (1 - share) * math.log(1 + math.exp(-x)) + share * math.exp(-x)


def kto(logp: float, ref: float, *, up: bool, z0: float, beta: float, desirable: float, undesirable: float) -> float:
    """λ − v of equation 7 and 8."""
    if up:
        return desirable - desirable * sigma(beta * ((logp - ref) - z0))
    return undesirable - undesirable * sigma(beta * (z0 - (logp - ref)))


def simpo(c: float, r: float, *, beta: float, gamma_beta_ratio: float, label_smoothing: float) -> float:
    """On means; the margin as the authors' code has it."""
    logit = beta * ((c - r) - gamma_beta_ratio)
    return -(1 - label_smoothing) * log_sigma(logit) - label_smoothing * log_sigma(-logit)


def cpo(c: float, r: float, *, beta: float, label_smoothing: float) -> float:
    return dpo(c, r, 0.0, 0.0, beta=beta, label_smoothing=label_smoothing)


def orpo(c: float, r: float) -> float:
    """On means: −log σ of the log of the ratio of odds."""
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (c, r)]
    return -log_sigma(math.log(odds[0] / odds[1]))


def reward(c: float, r: float, *, margin: float, label_smoothing: float) -> float:
    """Cross-entropy of the label with the Bradley-Terry probability of scores, the chosen one less its margin."""
    right = sigma(c - margin - r)
    return -(1 - label_smoothing) * math.log(right) - label_smoothing * math.log(1 - right)


def centring(mean: float) -> float:
    """The sum of two scores of that mean, squared."""
    return (mean + mean) ** 2


def sft(logp: float) -> float:
    """The surprise of an answer of that log-probability."""
    return math.log(1 / math.exp(logp))


def likelihood(answers: Sequence[Sequence[float]], weights: Sequence[float], reduction: str) -> float:
    """The chosen answers' negative log-likelihood from their tokens' log-probabilities: of CPO's paper (sum), of RPO's (mean), of TRL."""
    if reduction == "tokens":
        tokens = [(weight, logp) for answer, weight in zip(answers, weights, strict=True) for logp in answer]
        return -sum(weight * logp for weight, logp in tokens) / sum(weight for weight, _ in tokens)
    of_one = {"sum": sum, "mean": lambda answer: sum(answer) / len(answer)}[reduction]
    return -sum(weight * of_one(answer) for answer, weight in zip(answers, weights, strict=True)) / sum(weights)


def plackett_luce(rewards: Sequence[float]) -> float:
    """The given order is the best first; its probability, by drawing without replacement, is normalised over all orders."""

    def probability(order: Sequence[float]) -> float:
        likely = 1.0
        for place, reward in enumerate(order):
            likely *= math.exp(reward) / sum(math.exp(other) for other in order[place:])
        return likely

    assert math.isclose(sum(probability(order) for order in permutations(rewards)), 1.0)
    return -math.log(probability(rewards))


def f_slope(u: float, divergence: str, alpha: float = 0.5) -> float:
    """f'(u) of the f-divergence Σ ref·f(π/ref), from f by differences."""

    def f(u: float) -> float:
        return {
            "reverse-kl": lambda: u * math.log(u),
            "forward-kl": lambda: -math.log(u),
            "js": lambda: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
            "alpha": lambda: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
        }[divergence]()

    step = 1e-5 * u
    return (f(u + step) - f(u - step)) / (2 * step)


def wpo(*answers: tuple[Sequence[float], Sequence[Sequence[float]]], clamp: bool) -> float:
    """Over a pair's answers the product of the geometric means over tokens of π(y_t) / Σ_v π(v)², 1 at most if clamped.

    Args:
        answers: of each the log-probabilities of its tokens, and the distributions that they were predicted by.
        clamp: as the authors' code does.
    """
    weight = 1.0
    for logps, distributions in answers:
        product = 1.0
        for logp, distribution in zip(logps, distributions, strict=True):
            product *= math.exp(logp) / sum(share * share for share in distribution)
        weight *= product ** (1 / len(logps))
    return min(1.0, weight) if clamp else weight


def ld(chosen: Sequence[float], rejected: Sequence[float], *, alpha: float) -> tuple[float, float]:
    """Log-probabilities of both answers, tokens past the shorter one's length by alpha."""
    shorter = min(len(chosen), len(rejected))
    return tuple(sum(side[:shorter]) + alpha * sum(side[shorter:]) for side in (chosen, rejected))
