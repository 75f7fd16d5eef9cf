"""The options that methods on pairs share: what may be given together, how a mix is written, and what they add to a loss."""

import pytest
import torch
from tests.methods.test_invariants import Case, rankings
from tests.training.test_step import pairs, trainer

from prefopt.config import check
from prefopt.engine.batch import pack
from prefopt.errors import ConfigError
from prefopt.methods.comparisons import Comparisons
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.methods.pair_method import PairMethod, pair_methods
from prefopt.methods.simpo import SimPOSettings
from prefopt.training.assemble import settings_for

REFUSED = {
    "f_alpha without alpha": ("dpo", {"f_alpha": 0.5}, "f_divergence alpha and f_alpha go together"),
    "alpha without f_alpha": ("hinge", {"f_divergence": "alpha"}, "f_divergence alpha and f_alpha go together"),
    "clamp without wpo": ("ipo", {"wpo_clamp": False}, "wpo is off: give wpo too"),
    "ld on rankings": ("dpo", {"ld_alpha": 0.5, "all_pairs": True}, "ld_alpha is about the two answers of a pair"),
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


def test_wpo_weighs_pairs_by_the_policy(make_model):
    trees = pairs(1)
    one = trainer(make_model, Case("dpo", {"wpo": True, "wpo_clamp": False}).method())
    with torch.no_grad():
        logps = one.policy(pack(trees, sharing="flat"), extras=True)
    weights = (logps.mean() - logps.mean_tokens(logps.log_sum_squares_N)).exp()
    plain = trainer(make_model, Case("dpo", {}).method()).evaluate(trees, {}).figures["loss"]
    assert one.evaluate(trees, {}).figures["loss"] == pytest.approx(plain * float(weights.prod()))
    clamped = trainer(make_model, Case("dpo", {"wpo": True}).method())
    assert clamped.evaluate(trees, {}).figures["loss"] == pytest.approx(plain * float(weights.clamp(max=1).prod()))


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


def test_a_ranking_of_equals_is_left_out_of_loss_and_figures(make_model):
    trees = rankings(4)
    assert len({one.rank for one in trees[2].completions}) == 1
    case = Case("dpo", {"all_pairs": True})
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
