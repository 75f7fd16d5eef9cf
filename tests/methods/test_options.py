"""The options that methods on pairs share: what may be given together, how a mix is written, and what they add to a loss."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tests.methods import oracles
from tests.methods.cases import Case, rankings
from tests.methods.made_up import POLICY, REFERENCE, MadeUp, found
from tests.training.test_step import pairs, trainer

from prefopt.config import check
from prefopt.engine.batch import pack
from prefopt.errors import ConfigError
from prefopt.methods.comparisons import Comparisons
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.methods.pair_method import PairMethod, pair_methods
from prefopt.methods.pairs import Pairs
from prefopt.methods.simpo import SimPOSettings
from prefopt.training.assemble import settings_for
from prefopt.trees import Completion, PromptTree, token_ids

REFUSED = {
    "f_alpha without alpha": ("dpo", {"f_alpha": 0.5}, "f_divergence alpha and f_alpha go together"),
    "alpha without f_alpha": ("hinge", {"f_divergence": "alpha"}, "f_divergence alpha and f_alpha go together"),
    "clamp without wpo": ("ipo", {"wpo_clamp": False}, "wpo is off: give wpo too"),
    "ld on rankings": ("dpo", {"ld_alpha": 0.5, "all_pairs": True}, "ld_alpha is about the two answers of a pair"),
    "ld on an order": ("dpo", {"ld_alpha": 0.5, "plackett_luce": True}, "ld_alpha is about the two answers of a pair"),
    "an ld of 0 on rankings": ("robust", {"ld_alpha": 0.0, "all_pairs": True}, "ld_alpha is about the two answers of a pair"),
    "an ld of 0 on an order": ("dpo", {"ld_alpha": 0.0, "plackett_luce": True}, "plackett_luce reads rankings: leave one of them out"),
    "ld on rankings, in a mix": (
        "dpo",
        {"all_pairs": True, "mix": {"hinge": {"ld_alpha": 0.5}}},
        r"mix: hinge\.ld_alpha is about the two answers of a pair, and all_pairs reads rankings: leave one of them out",
    ),
    "ld on an order, in a mix": (
        "dpo",
        {"plackett_luce": True, "mix": {"exo": {"weight": 0.5, "ld_alpha": 0}}},
        r"mix: exo\.ld_alpha is about the two answers of a pair, and plackett_luce reads rankings",
    ),
    "a reduction of nothing": ("ipo", {"sft_reduction": "sum"}, "sft_reduction is about what sft_weight adds, and sft_weight is 0"),
    "a reduction of nothing in cpo": ("cpo", {"sft_weight": 0, "sft_reduction": "mean"}, "sft_weight is 0: give it too, or leave"),
    "order and pairs": (
        "dpo",
        {"plackett_luce": True, "all_pairs": True},
        "plackett_luce reads whole rankings, and all_pairs is about pairs",
    ),
    "order and smoothing": ("dpo", {"plackett_luce": True, "label_smoothing": 0.1}, "label_smoothing is about pairs"),
    "two margins": ("simpo", {"gamma": 1.0, "gamma_beta_ratio": 0.5}, r"gamma = beta \* gamma_beta_ratio\): give one of them"),
    "certain labels": ("exo", {"label_smoothing": 0}, "label_smoothing: must be greater than 0"),
    "a coin": ("robust", {"label_smoothing": 0.5}, "label_smoothing: must be less than 0.5"),
    "chosen weights": ("kto", {"balance": True, "desirable_weight": 2}, "balance chooses desirable_weight"),
    "nothing to learn": ("kto", {"desirable_weight": 0, "undesirable_weight": 0}, "nothing to learn"),
    "thumbs and pairs": ("bco", {"unpaired": True, "wpo": True}, "wpo is about pairs, and unpaired reads single answers"),
    "no such loss": ("dpo", {"mix": {"ipoo": 1}}, r"mix: ipoo is no loss on pairs \(did you mean ipo\?\); there are dpo, ipo, "),
    "a setting in one word": (
        "dpo",
        {"mix": "ipo=0.5,beta=0.3"},
        r"beta is a setting and no loss: .* in a file, as {ipo: {weight: 0.5, beta:",
    ),
    "a loss on thumbs": ("dpo", {"mix": {"kto": 1}}, "kto is no loss on pairs"),
    "no weight": ("dpo", {"mix": {"ipo": "much"}}, "the weight of ipo must be a number, 0 or more"),
    "a negative weight": ("dpo", {"mix": {"ipo": -1}}, "the weight of ipo must be a number, 0 or more"),
    "no such setting": ("dpo", {"mix": {"ipo": {"betta": 1}}}, r"ipo\.betta: no such setting \(did you mean beta\?\)"),
    "a wrong setting": ("dpo", {"mix": {"ipo": {"beta": 0}}}, r"ipo\.beta: must be greater than 0"),
    "a mix in a mix": ("dpo", {"mix": {"ipo": {"mix": {"sft": 1}}}}, "mix is set for the whole mix, not for ipo in it"),
    "rankings in a mix": ("dpo", {"mix": {"dpo": {"plackett_luce": True}}}, "plackett_luce is set for the whole mix"),
    "settings of a likelihood": ("dpo", {"mix": {"sft": {"weight": 1, "beta": 1}}}, "sft has no settings but its weight"),
    "a reference where there is none": ("simpo", {"mix": {"dpo": 1}}, "dpo needs a reference, and this method has none: train with dpo"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_reason(what: str):
    name, values, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message):
        check(settings_for(type(Case(name, {}).method())), {"model": "m", "data": "d", "out": "o", **values})


@pytest.mark.parametrize(
    "written",
    [
        {"ipo": 0.5, "sft": 0.1},
        {"ipo": "0.5", "sft": "0.1"},
        {"ipo": "0.5,sft=0.1"},
        "ipo=0.5,sft=0.1",
        "ipo=0.5, sft=0.1",
        {"ipo": {"weight": 0.5}, "sft": {"weight": 0.1}},
    ],
)
def test_a_mix_is_read_as_flags_words_and_files_write_it(written: object):
    method = DPO(DPOSettings(mix=written))
    assert [(weight, part and part.name) for weight, part in method.parts] == [(0.5, "ipo"), (0.1, None)]


def test_a_loss_that_is_mixed_in_has_settings_of_its_own():
    method = DPO(DPOSettings(beta=0.1, mix={"ipo": {"weight": 0.5, "beta": 0.7}, "simpo": {"wpo": True}}))
    (_, ipo), (weight, simpo) = method.parts
    assert (ipo.settings.beta, weight, simpo.settings.beta) == (0.7, 1.0, 2.5)
    assert method.needs.outputs == {"log_sum_squares"}


@pytest.mark.parametrize("name", sorted(pair_methods()))
def test_a_mix_is_the_sum_of_its_losses(make_model, name: str):
    trees = pairs(4)
    main = Case("dpo", {"beta": 0.3, "mix": {name: 0.7}})
    loss = (
        trainer(make_model, main.method())
        .evaluate(list(main.method().arrange(trees, seed=0)), main.method().initial_state())
        .figures["loss"]
    )
    parts = []
    for case in (Case("dpo", {"beta": 0.3}), Case(name, {})):
        own = list(case.method().arrange(trees, seed=0))
        parts.append(trainer(make_model, case.method()).evaluate(own, case.method().initial_state()).figures["loss"])
    assert loss == pytest.approx(parts[0] + 0.7 * parts[1])


def test_a_loss_in_a_mix_keeps_the_likelihood_that_it_has_itself():
    """Its own `sft_weight` counts within its weight in the mix: 0.5 · (hinge + 0.3 · nll)."""
    trees = pairs(7)
    case = Case("dpo", {"beta": 0.3, "mix": {"hinge": {"weight": 0.5, "beta": 0.7, "sft_weight": 0.3}}})
    sums = [[float(model.tokens(own, one).sum()) for model in (POLICY, REFERENCE) for one in own.completions] for own in trees]
    both = [oracles.dpo(*own, beta=0.3) + 0.5 * oracles.hinge(*own, beta=0.7) for own in sums]
    weights = [own.weight for own in trees]
    nll = oracles.likelihood([POLICY.tokens(own, own.completions[0]).tolist() for own in trees], weights, "tokens")
    expected = sum(loss * weight for loss, weight in zip(both, weights, strict=True)) / sum(weights) + 0.5 * 0.3 * nll
    assert found(case, trees).loss.item() == pytest.approx(expected, rel=1e-9)


def test_sft_weight_adds_the_likelihood_per_token(make_model):
    trees = [tree.with_weight(1.0) for tree in pairs(5)]
    one = trainer(make_model, Case("dpo", {}).method())
    with torch.no_grad():
        logps = one.policy(pack(trees, sharing="flat"))
    tokens = sum(tree.completions[0].num_scored for tree in trees)
    nll = -float(logps.sum()[::2].sum()) / tokens
    base = one.evaluate(trees, {}).figures["loss"]
    for settings in ({"sft_weight": 0.4}, {"mix": {"sft": 0.4}}):
        assert trainer(make_model, Case("dpo", settings).method()).evaluate(trees, {}).figures["loss"] == pytest.approx(base + 0.4 * nll)


@pytest.mark.parametrize("reduction", ["tokens", "mean", "sum"])
def test_the_likelihood_is_averaged_as_told(reduction: str):
    for make_trees, more in ((pairs, {}), (rankings, {"all_pairs": True}), (rankings, {"plackett_luce": True})):
        trees = make_trees(7)
        with_order = [tree for tree in trees if len({one.rank for one in tree.completions}) > 1 or tree.completions[0].rank is None]
        chosen = [POLICY.tokens(tree, min(tree.completions, key=lambda one: one.rank or 0)).tolist() for tree in with_order]
        nll = oracles.likelihood(chosen, [tree.weight for tree in with_order], reduction)
        base = found(Case("dpo", more), trees).loss.item()
        given = {**more, "sft_weight": 0.4, "sft_reduction": reduction}
        assert found(Case("dpo", given), trees).loss.item() == pytest.approx(base + 0.4 * nll, rel=1e-9)
        if not more:
            cpo = [found(Case("cpo", {"sft_weight": weight, **of}), trees).loss.item() for weight, of in ((0, {}), (1, given))]
            assert cpo[1] - cpo[0] == pytest.approx(0.4 * nll, rel=1e-9)


def test_the_likelihood_by_hand():
    """Answers of 2 and 4 tokens of probability e^−1: 1 per token either way, (2 + 4) / 2 per answer; one token of e^−2 moves all three."""
    assert [oracles.likelihood([[-1.0] * 2, [-1.0] * 4], [1, 1], how) for how in ("tokens", "mean", "sum")] == [1, 1, 3]
    assert [oracles.likelihood([[-1.0, -2.0], [-1.0] * 4], [1, 1], how) for how in ("tokens", "mean", "sum")] == [7 / 6, 1.25, 3.5]

    @dataclass(frozen=True)
    class Worked(MadeUp):
        def tokens(self, tree: PromptTree, completion: Completion) -> np.ndarray:
            return np.array([-1.0] * (completion.num_scored - 1) + [-2.0 if completion.num_scored == 2 else -1.0])

    short, long, other = (Completion(token_ids(ids)) for ids in ([5, 6], [5, 6, 7, 8], [9]))
    trees = [PromptTree(token_ids([1]), (short, other)), PromptTree(token_ids([2]), (long, other))]
    # Δ is −3 + 1 and −4 + 1 with β = 1: log(1 + e^2) = 2.126928 and log(1 + e^3) = 3.048587
    for reduction, nll in (("tokens", 7 / 6), ("mean", 1.25), ("sum", 3.5)):
        case = Case("cpo", {"beta": 1.0, "sft_weight": 0.5, "sft_reduction": reduction})
        assert found(case, trees, policy=Worked(0)).loss.item() == pytest.approx((2.126928 + 3.048587) / 2 + 0.5 * nll, abs=1e-6)


def test_orpo_s_likelihood_is_of_prompts_too_unless_told_otherwise(make_model):
    trees = [tree.with_weight(1.0) for tree in pairs(5)]
    losses = {}
    for of in ("prompt-and-chosen", "chosen"):
        case = Case("orpo", {"likelihood_of": of, "odds_weight": 0.0})
        own = list(case.method().arrange(trees, seed=0))
        assert [tree.prompt_scored is not None for tree in own] == [of != "chosen"] * 5
        losses[of] = trainer(make_model, case.method()).evaluate(own, {}).figures["loss"]
    case = Case("sft", {})
    whole = [
        type(tree)(
            tree.prompt_ids[:1],
            (type(tree.completions[0])(torch.cat([torch.tensor(tree.prompt_ids[1:]), torch.tensor(tree.completions[0].ids)]).numpy()),),
        )
        for tree in trees
    ]
    answers = [type(tree)(tree.prompt_ids, tree.completions[:1]) for tree in trees]
    for of, given in (("prompt-and-chosen", whole), ("chosen", answers)):
        assert trainer(make_model, case.method()).evaluate(given, {}).figures["loss"] == pytest.approx(losses[of])


@pytest.mark.parametrize("reduction", ["tokens", "mean", "sum"])
@pytest.mark.parametrize("of", ["prompt-and-chosen", "chosen"])
def test_orpo_s_likelihood_is_averaged_as_told(of: str, reduction: str):
    case = Case("orpo", {"odds_weight": 0.0, "likelihood_of": of, "sft_reduction": reduction})
    trees = list(case.method().arrange(pairs(7), seed=0))
    texts = [[*POLICY.prompt(tree), *POLICY.tokens(tree, tree.completions[0])] for tree in trees]
    expected = oracles.likelihood(texts, [tree.weight for tree in trees], reduction)
    assert found(case, trees).loss.item() == pytest.approx(expected, rel=1e-9)


def test_wpo_weighs_pairs_by_the_policy(make_model):
    trees = pairs(1)
    one = trainer(make_model, Case("dpo", {"wpo": True, "wpo_clamp": False}).method())
    with torch.no_grad():
        logps = one.policy(pack(trees, sharing="flat"), extras=True)
    weight = (logps.mean() - logps.mean_tokens(logps.log_sum_squares_N)).exp().prod().item()
    plain = trainer(make_model, Case("dpo", {}).method()).evaluate(trees, {}).figures["loss"]
    assert one.evaluate(trees, {}).figures["loss"] == pytest.approx(plain * weight)
    clamped = trainer(make_model, Case("dpo", {"wpo": True}).method())
    assert clamped.evaluate(trees, {}).figures["loss"] == pytest.approx(plain * min(1.0, weight))


def test_rankings_are_weighed_pair_by_pair():
    trees = [tree for tree in rankings(8) if len({one.rank for one in tree.completions}) > 1]
    clamped, unclamped, plain = (
        found(Case("dpo", {"all_pairs": True, **given}), trees).losses_B.tolist()
        for given in ({"wpo": True}, {"wpo": True, "wpo_clamp": False}, {})
    )
    heavier = 0
    for place, tree in enumerate(trees):
        of_pairs = {True: [], False: []}
        for better in tree.completions:
            for worse in tree.completions:
                if better.rank < worse.rank:
                    pair = [replace(tree, completions=(better, worse))]
                    told = [(POLICY.tokens(tree, one) - POLICY.squares(tree, one)).mean() for one in (better, worse)]
                    weight = float(np.exp(sum(told)))
                    heavier += weight > 1
                    loss = found(Case("dpo", {}), pair).losses_B.item()
                    of_pairs[True].append(min(1.0, weight) * loss)
                    of_pairs[False].append(weight * loss)
        assert clamped[place] == pytest.approx(np.mean(of_pairs[True]))
        assert unclamped[place] == pytest.approx(np.mean(of_pairs[False]))
        assert clamped[place] < plain[place]
    assert heavier > 0


def test_all_pairs_of_a_ranking_are_its_pairs_one_by_one(make_model):
    trees = [tree for tree in rankings(5) if len({one.rank for one in tree.completions}) > 1][:3]
    found = trainer(make_model, Case("dpo", {"all_pairs": True}).method()).evaluate(trees, {})
    for place, tree in enumerate(trees):
        ranks = [one.rank for one in tree.completions]
        both = [(a, b) for a in range(len(ranks)) for b in range(len(ranks)) if ranks[a] < ranks[b]]
        alone = [type(tree)(tree.prompt_ids, (tree.completions[a], tree.completions[b])) for a, b in both]
        expected = trainer(make_model, Case("dpo", {}).method()).evaluate(alone, {}).figures
        assert found.examples["loss"][place] == pytest.approx(expected["loss"])
        assert found.examples["rewards/accuracy"][place] == pytest.approx(expected["rewards/accuracy"])


@pytest.mark.parametrize("read_as", ["all_pairs", "plackett_luce"])
@pytest.mark.parametrize(
    "more",
    [{}, {"sft_weight": 0.3}, {"sft_weight": 0.3, "sft_reduction": "sum"}, {"mix": {"hinge": 0.5, "bco": 0.2, "orpo": 0.1, "sft": 0.3}}],
)
def test_a_ranking_of_equals_teaches_nothing(read_as: str, more: dict[str, object]):
    """Neither its answers nor, where the likelihood is added, the first of them."""
    case = Case("dpo", {read_as: True, **more})
    trees = list(case.method().arrange(rankings(4), seed=0))
    assert len({one.rank for one in trees[2].completions}) == 1
    whole, without = found(case, trees), found(case, [*trees[:2], trees[3]])
    assert whole.losses_B[2] == 0
    assert whole.loss.item() == pytest.approx(without.loss.item(), rel=1e-12)
    alone = found(case, [trees[2]])
    assert (alone.loss.item(), bool(alone.gradient.any())) == (0.0, False)
    sums = [{name: value.item() for name, value in one.output.state_sums.items()} for one in (whole, without)]
    assert sums[0] == pytest.approx(sums[1])


def test_ld_on_rankings_is_no_number():
    """Nobody gets there by settings; and if somebody does, it says so in place of reading pairs where there are none."""
    batch = pack([tree for tree in rankings(6) if len(tree.completions) == 4], sharing="flat")
    compared = Comparisons.of(batch, all_pairs=True)
    policy, reference = (model.logps(batch, torch.float64) for model in (POLICY, REFERENCE))
    with pytest.raises(AssertionError, match="the two completions of a pair"):
        Pairs(compared, policy, reference, ld_alpha=0.5).sums()
    with pytest.raises(AssertionError, match="a pair has two completions"):
        Comparisons.of(batch, all_pairs=False)


@pytest.mark.parametrize("read_as", ["all_pairs", "plackett_luce"])
def test_a_ranking_of_equals_is_left_out_of_loss_and_figures(make_model, read_as: str):
    trees = rankings(4)
    assert len({one.rank for one in trees[2].completions}) == 1
    case = Case("dpo", {read_as: True})
    whole, without = (trainer(make_model, case.method()).evaluate(own, {}).figures for own in (trees, [*trees[:2], trees[3]]))
    assert whole == pytest.approx(without)


def test_comparisons_by_hand():
    batch = pack(rankings(3), sharing="flat")
    found = Comparisons.of(batch, all_pairs=True)
    assert len(found.better_P) == int(found.num_B.sum())
    ranks = batch.ranks()
    assert bool((ranks[found.better_P] < ranks[found.worse_P]).all())
    assert bool(
        (ranks[found.best_B] == torch.stack([part.min() for part in ranks.split([len(tree.completions) for tree in batch.trees])])).all()
    )


def test_simpo_s_margin_either_way():
    assert SimPOSettings(beta=2.0, gamma=1.0).margin == SimPOSettings(beta=2.0, gamma_beta_ratio=0.5).margin == 1.0
    assert SimPOSettings(beta=4.0).margin == 2.0


def test_needs_follow_the_settings():
    assert Case("dpo", {"plackett_luce": True}).method().needs.completions == "ranked"
    assert Case("ipo", {"all_pairs": True}).method().needs.completions == "ranked"
    assert Case("bco", {"unpaired": True}).method().needs.completions == "thumbs"
    assert Case("hinge", {"wpo": True}).method().needs.outputs == {"log_sum_squares"}
    assert all(issubclass(kind, PairMethod) for kind in pair_methods().values())
