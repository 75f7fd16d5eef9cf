"""The answers exchanged: what a loss says of a pair, less what it says of the pair the other way round, is known exactly.

For −log σ(x) it is −x, since log σ(x) − log σ(−x) = x; the other relations are worked out beside their methods. So a wrong sign, a β in
the wrong place or a mean in the place of a sum shows in the loss itself. Everything is taken from the made-up log-probabilities in
plain Python; nothing here calls what it tests.

Swapped means: chosen and rejected of a pair; a thumb up and down; all ranks of a ranking reversed; of a whole order its two last,
because that is the exchange whose effect is as simple as a pair's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.cases import WITH_OPTIONS, Case
from tests.methods.made_up import POLICY, REFERENCE, found
from tests.methods.oracles import log_sigma, sigma

from prefopt.methods.pair_method import PairMethod
from prefopt.trees import Completion, PromptTree

WITHOUT_SWAP = {"sft": "it has one answer to a prompt, and nothing to exchange it with"}
"""Methods to which the question does not apply, and why."""


@dataclass(frozen=True)
class Answer:
    """What is known of a completion, from the made-up models."""

    logps: np.ndarray
    refs: np.ndarray
    squares: np.ndarray
    score: float
    given: float

    @classmethod
    def of(cls, tree: PromptTree, completion: Completion) -> "Answer":
        policy = POLICY.tokens(tree, completion), POLICY.squares(tree, completion)
        return cls(policy[0], REFERENCE.tokens(tree, completion), policy[1], POLICY.score(tree, completion), completion.reward or 0.0)

    @property
    def log_odds(self) -> float:
        mean = math.exp(self.logps.mean())
        return math.log(mean / (1 - mean))

    def ratio(self, settings: Any, other: "Answer") -> float:
        """log π − log π_ref, or what the settings put in its place."""
        tail = getattr(settings, "ld_alpha", None)
        head = len(self.logps) if tail is None else min(len(self.logps), len(other.logps))
        away = self.logps - self.refs
        x = float(away[:head].sum() + (tail or 0.0) * away[head:].sum())
        kind = getattr(settings, "f_divergence", "reverse-kl")
        if kind == "alpha":
            return (1 - math.exp(-settings.f_alpha * x)) / settings.f_alpha
        return {"reverse-kl": lambda: x, "forward-kl": lambda: -math.exp(-x), "js": lambda: log_sigma(x)}[kind]()


def softplus(x: float) -> float:
    return -log_sigma(-x)


def gap(s: Any, c: Answer, r: Answer) -> float:
    """β·Δ."""
    return s.beta * (c.ratio(s, r) - r.ratio(s, c))


def mean_gap(c: Answer, r: Answer) -> float:
    return float((c.logps - c.refs).mean() - (r.logps - r.refs).mean())


def sides(s: Any, c: Answer, r: Answer) -> tuple[float, float]:
    """Both rewards β·(ℓ − ref)."""
    return s.beta * c.ratio(s, r), s.beta * r.ratio(s, c)


def dpo(s: Any, c: Answer, r: Answer) -> float:
    """−(1−ε)·[log σ(x) − log σ(−x)] − ε·[log σ(−x) − log σ(x)] = −(1−2ε)·x."""
    return -(1 - 2 * s.label_smoothing) * gap(s, c, r)


def robust(s: Any, c: Answer, r: Answer) -> float:
    """[−(1−ε)·x − ε·x] / (1−2ε)."""
    return -gap(s, c, r) / (1 - 2 * s.label_smoothing)


def hinge(s: Any, c: Answer, r: Answer) -> float:
    """max(0, 1−x) − max(0, 1+x): −2x where both are above 0, else the one of them that is."""
    x = gap(s, c, r)
    return -x - max(-1.0, min(1.0, x))


def ipo(s: Any, c: Answer, r: Answer) -> float:
    """(Δ−g)² − (−Δ−g)² = −4gΔ with g = 1/(2β)."""
    return -2 * (mean_gap(c, r) if s.reduction == "mean" else c.ratio(s, r) - r.ratio(s, c)) / s.beta


def sppo(s: Any, c: Answer, r: Answer) -> float:
    """(a−g)² + (b+g)² − (b−g)² − (a+g)² = −4g·(a−b) with g = 1/(2β)."""
    return -2 * (c.ratio(s, r) - r.ratio(s, c)) / s.beta


def ln_dpo(s: Any, c: Answer, r: Answer) -> float:
    return -(1 - 2 * s.label_smoothing) * s.beta * mean_gap(c, r)


def rdpo(s: Any, c: Answer, r: Answer) -> float:
    """The lengths are exchanged too, so that the whole logit changes its sign."""
    return -(gap(s, c, r) + s.length_weight * (len(c.logps) - len(r.logps)))


def dpop(s: Any, c: Answer, r: Answer) -> float:
    """The logit is β·(Δ − λ·fall of the chosen one), and the other way round β·(−Δ − λ·fall of what was rejected)."""
    (good, bad), x = sides(s, c, r), gap(s, c, r)
    return softplus(s.penalty * max(0.0, -good) - x) - softplus(s.penalty * max(0.0, -bad) + x)


def exo(s: Any, c: Answer, r: Answer) -> float:
    """The entropies of p are the same, and p − (1−p) = tanh(x/2) times the log-odds of the label is left."""
    return -math.tanh(gap(s, c, r) / 2) * math.log((1 - s.label_smoothing) / s.label_smoothing)


def nca(s: Any, c: Answer, r: Answer) -> float:
    """The two terms with ½ are symmetric."""
    good, bad = sides(s, c, r)
    return log_sigma(bad) - log_sigma(good)


def apo_zero(s: Any, c: Answer, r: Answer) -> float:
    good, bad = sides(s, c, r)
    return -2 * (sigma(good) - sigma(bad))


def apo_down(s: Any, c: Answer, r: Answer) -> float:
    """σ(x) − σ(−x) = tanh(x/2)."""
    good, bad = sides(s, c, r)
    return sigma(good) - sigma(bad) - math.tanh((good - bad) / 2)


def discopop(s: Any, c: Answer, r: Answer) -> float:
    """With x turned round m becomes 1−m: (1−m)·(−log σ(x)) + m·log σ(−x) + m·e^−x − (1−m)·e^x, and log σ(−x) = log σ(x) − x."""
    x = gap(s, c, r)
    m = sigma(x / s.tau)
    return (2 * m - 1) * log_sigma(x) - m * x + m * math.exp(-x) - (1 - m) * math.exp(x)


def simpo(s: Any, c: Answer, r: Answer) -> float:
    """The margin γ is asked of whichever side is labelled better: logits y − γ and −y − γ; smoothing adds ε times each."""
    y = s.beta * float(c.logps.mean() - r.logps.mean())
    return softplus(s.margin - y) - softplus(s.margin + y) + 2 * s.label_smoothing * y


def cpo(s: Any, c: Answer, r: Answer) -> float:
    return -(1 - 2 * s.label_smoothing) * s.beta * float(c.logps.sum() - r.logps.sum())


def orpo(s: Any, c: Answer, r: Answer) -> float:
    return -s.odds_weight * (c.log_odds - r.log_odds)


def reward(s: Any, c: Answer, r: Answer) -> float:
    """The margin is the difference of the data's scores, and changes its sign with them; centring is symmetric."""
    margin = c.given - r.given if s.margin_from_scores else 0.0
    return -(1 - 2 * s.label_smoothing) * (c.score - r.score - margin)


def bco(s: Any, c: Answer, r: Answer) -> float:
    """−log σ(a−δ) − log σ(δ−b) + log σ(b−δ) + log σ(δ−a) = −(a−δ) + (b−δ): the shift is gone."""
    return -gap(s, c, r)


RELATIONS: dict[str, Callable[[Any, Answer, Answer], float]] = {
    "dpo": dpo, "robust": robust, "hinge": hinge, "ipo": ipo, "sppo": sppo, "ln-dpo": ln_dpo, "rdpo": rdpo, "dpop": dpop, "exo": exo,
    "nca": nca, "apo-zero": apo_zero, "apo-down": apo_down, "discopop": discopop, "simpo": simpo, "cpo": cpo, "orpo": orpo,
    "reward": reward, "bco": bco,
}  # fmt: skip
"""Loss of a pair less that of the same pair exchanged, by method."""


def ranks(tree: PromptTree) -> list[int]:
    return [place if one.rank is None else one.rank for place, one in enumerate(tree.completions)]


def best(tree: PromptTree) -> Completion:
    return tree.completions[min(range(len(tree.completions)), key=ranks(tree).__getitem__)]


def likelihood(name: str, s: Any, tree: PromptTree) -> float:
    """The share that the chosen answer's likelihood has in the loss."""
    weight = 1.0 if name == "orpo" else getattr(s, "sft_weight", 0.0)
    logps = np.concatenate([POLICY.prompt(tree), POLICY.tokens(tree, best(tree))])
    return -weight * float(logps.mean() if getattr(s, "sft_reduction", "") == "mean" else logps.sum())


def wpo(s: Any, c: Answer, r: Answer) -> float:
    """The pair's weight, which exchanging leaves as it is."""
    if not getattr(s, "wpo", False):
        return 1.0
    product = math.exp((c.logps - c.squares).mean()) * math.exp((r.logps - r.squares).mean())
    return min(1.0, product) if s.wpo_clamp else product


def of_pairs(name: str, s: Any, tree: PromptTree, swapped: PromptTree) -> float:
    """The mean over a tree's comparisons, and the likelihood's share."""
    answers = list(zip(ranks(tree), (Answer.of(tree, one) for one in tree.completions), strict=True))
    pairs = [(c, r) for better, c in answers for worse, r in answers if better < worse]
    if not pairs:
        return 0.0
    differences = [wpo(s, c, r) * RELATIONS[name](s, c, r) for c, r in pairs]
    return sum(differences) / len(pairs) + likelihood(name, s, tree) - likelihood(name, s, swapped)


def of_orders(name: str, s: Any, tree: PromptTree, swapped: PromptTree) -> float:
    """Both orders draw all but the last two alike; of these the better one is drawn from both of them: −log σ of the difference."""
    *_, better, worse = (Answer.of(tree, tree.completions[place]) for place in np.argsort(ranks(tree)))
    difference = better.score - worse.score if name == "reward" else gap(s, better, worse)
    return -difference + likelihood(name, s, tree) - likelihood(name, s, swapped)


def of_thumbs(name: str, s: Any, tree: PromptTree, state: dict[str, float], statistics: dict[str, float]) -> float:
    """KTO: λ_D·(1 − σ(z)) − λ_U·σ(z) with z = β·(r − z0), which is −λ·tanh(z/2) for one λ. BCO: −(ρ − δ), as for a pair."""
    (completion,) = tree.completions
    one = Answer.of(tree, completion)
    if name == "bco":
        shift = (state["up_reward"] / state["up_weight"] + state["down_reward"] / state["down_weight"]) / 2
        difference = -(s.beta * one.ratio(s, one) - shift)
    else:
        z = s.beta * (one.ratio(s, one) - max(0.0, statistics["log_ratio"] / statistics["weight"]))
        difference = state["desirable_weight"] * (1 - sigma(z)) - state["undesirable_weight"] * sigma(z)
    return difference if completion.label else -difference


def exchanged(case: Case, tree: PromptTree) -> PromptTree:
    method = case.method()
    if method.needs.completions == "thumbs":
        own, *others = tree.completions
        return replace(tree, completions=(replace(own, label=not own.label), *others))
    if method.needs.completions == "pair":
        return replace(tree, completions=tree.completions[::-1])
    last = len(tree.completions) - 1
    worst = max(ranks(tree))
    turned = (lambda rank: rank if rank < last - 1 else 2 * last - 1 - rank) if is_order(case) else (lambda rank: worst - rank)
    return replace(tree, completions=tuple(replace(one, rank=turned(one.rank)) for one in tree.completions))


def is_order(case: Case) -> bool:
    return getattr(case.method().settings, "plackett_luce", False)


def without_ties(trees: Sequence[PromptTree]) -> list[PromptTree]:
    rng = np.random.default_rng(4)
    places = [rng.permutation(len(tree.completions)).tolist() for tree in trees]
    return [
        replace(tree, completions=tuple(replace(one, rank=rank) for one, rank in zip(tree.completions, own, strict=True)))
        for tree, own in zip(trees, places, strict=True)
    ]


def expected(case: Case, tree: PromptTree, swapped: PromptTree, state: dict[str, float], statistics: dict[str, float]) -> float:
    method = case.method()
    if method.needs.completions == "thumbs":
        return of_thumbs(case.name, method.settings, method.in_loss(tree), state, statistics)
    own = (of_orders if is_order(case) else of_pairs)(case.name, method.settings, tree, swapped)
    if not isinstance(method, PairMethod):
        return own
    for weight, part in method.parts:
        if part is not None:
            own += weight * of_pairs(part.name, part.settings, tree, swapped)
        elif len(set(ranks(tree))) > 1:  # a ranking without an order has no chosen answer
            own += weight * float(POLICY.tokens(swapped, best(swapped)).sum() - POLICY.tokens(tree, best(tree)).sum())
    return own


SWAPPED = {name: case for name, case in WITH_OPTIONS.items() if case.name not in WITHOUT_SWAP}


@pytest.mark.parametrize("case", SWAPPED.values(), ids=SWAPPED)
def test_exchanging_the_answers_changes_the_loss_by_what_is_known(case: Case):
    trees = case.trees(12)
    trees = without_ties(trees) if is_order(case) else trees
    swapped = [exchanged(case, tree) for tree in trees]
    state = case.state(trees)
    there, back = found(case, trees, state=state), found(case, swapped, state=state)
    differences = [expected(case, *both, state, dict(there.statistics)) for both in zip(trees, swapped, strict=True)]
    torch.testing.assert_close(there.losses_B - back.losses_B, torch.tensor(differences, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert min(differences) < -1e-3 < 1e-3 < max(differences)


def test_every_method_has_a_relation_or_a_reason():
    assert {case.name for case in WITH_OPTIONS.values()} == RELATIONS.keys() | WITHOUT_SWAP.keys() | {"kto"}  # kto: `of_thumbs`
