"""Thumbs: partners for KTO's divergence, weights of the two kinds, BCO's shift."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.methods import oracles
from tests.methods.cases import CASES, Case, thumbs
from tests.training.test_step import gradients, pairs, trainer

from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.logps import TokenLogps
from prefopt.errors import DataError
from prefopt.methods.bco import shift_of
from prefopt.methods.kto import KTO, balancing_weights
from prefopt.methods.thumbs import WithPartners, thumb_metrics
from prefopt.trees import Completion, PromptTree, token_ids


def tree(prompt: list[int], answer: list[int], **about: object) -> PromptTree:
    return PromptTree(token_ids(prompt), (Completion(token_ids(answer), **about),))


def singles(trees: list[PromptTree]) -> list[PromptTree]:
    """Each answer of pairs alone: the chosen one up, the rejected one down."""
    return [replace(own, completions=(replace(answer, label=place == 0),)) for own in trees for place, answer in enumerate(own.completions)]


def test_partners_answer_other_prompts_and_everybody_is_one_about_once():
    trees = [tree([1, place // 2], [100 + place], label=True) for place in range(40)]  # two answers to each prompt
    arranged = WithPartners(trees, seed=3)
    partners = []
    for own, given in zip(arranged, trees, strict=True):
        answer, partner = own.completions
        assert answer is given.completions[0]
        assert (int(partner.ids[0]) - 100) // 2 != int(given.prompt_ids[1])
        assert partner.label is None
        partners.append(int(partner.ids[0]))
    assert max(Counter(partners).values()) <= 3
    assert len(set(partners)) >= 34


def test_a_partner_is_the_next_on_the_circle_that_answers_another_prompt():
    trees = [tree([1, place % 3 if place < 30 else place], [100 + place]) for place in range(40)]
    circle = np.random.default_rng([7, 40]).permutation(40).tolist()
    behind = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    for place, one in enumerate(WithPartners(trees, seed=7)):
        other = behind[place]
        while trees[other].prompt_ids.tolist() == trees[place].prompt_ids.tolist():
            other = behind[other]
        assert one.completions[1].ids.tolist() == [100 + other]


def test_the_draw_depends_on_the_seed_alone():
    trees = [tree([1, place], [100 + place]) for place in range(20)]
    drawn = {seed: [int(one.completions[1].ids[0]) for one in WithPartners(trees, seed=seed)] for seed in (0, 1, -5, 2**70)}
    assert drawn[0] == [int(one.completions[1].ids[0]) for one in WithPartners(list(trees), seed=0)]
    assert drawn[0] != drawn[1]
    assert [one.completions[1].ids.tolist() for one in WithPartners(trees, seed=0)[3:5]] == [[drawn[0][3]], [drawn[0][4]]]


def test_a_partner_is_cut_to_the_room_behind_a_long_prompt():
    trees = [tree([1] * 9, [5]), tree([2], [7, 8, 9])]
    arranged = WithPartners(trees, seed=0)
    assert arranged[0].completions[1].ids.tolist() == [7]
    assert arranged[1].completions[1].ids.tolist() == [5]
    assert max(one.longest for one in arranged) == max(one.longest for one in trees)


def test_with_one_prompt_partners_are_answers_to_it():
    arranged = WithPartners([tree([1], [5], label=True), tree([1], [6], label=False)], seed=0)
    assert [one.completions[1].ids.tolist() for one in arranged] == [[6], [5]]
    (note,) = Case("kto", {}).method().remarks(arranged)
    assert note.endswith("all answer one prompt, so z0 is measured on answers to that prompt too")
    assert WithPartners([tree([1], [5])], seed=0)[0].completions[1].ids.tolist() == [5]
    assert len(WithPartners([], seed=0)) == 0


def test_a_prompt_that_most_answer_leaves_z0_on_few_answers():
    def said(*prompts: int) -> list[str]:
        trees = [tree([prompt], [100 + place], label=place % 2 == 0) for place, prompt in enumerate(prompts)]
        return list(Case("kto", {}).method().remarks(WithPartners(trees, seed=0)))

    alone = "because few answer another prompt than they"
    assert said(*[1] * 11, 2) == [f"note: thumbs: 6 up, 6 down; for 11 of 12 z0 is measured on one answer alone, {alone}"]
    assert said(*[1] * 3, 2) == []
    assert said(*range(20), *range(20)) == []
    (note,) = said(*[1] * 98, 2, 3)
    assert note == f"note: thumbs: 50 up, 50 down; for 98 of 100 z0 is measured on 2 answers alone, {alone}"


@pytest.mark.parametrize("name", ["kto", "kto balanced", "bco on thumbs"])
def test_examples_of_weight_zero_are_as_if_absent_from_the_data(make_model, name: str):
    """Before the draw of partners: with them and without, the others have the same partners, state, loss and gradient."""
    case = CASES[name]
    trees = case.make_trees(7)
    idle = [own.with_weight(0.0) for own in [*case.make_trees(13)[7:], tree([9] * 60, [5] * 9, label=True)]]
    idle[0] = replace(idle[0], prompt_ids=trees[0].prompt_ids)
    mixed = [own for couple in zip(idle, trees, strict=True) for own in couple]
    alone, among = (list(case.method().arrange(given, seed=4)) for given in (trees, mixed))
    assert len(among) == 14
    assert [[one.ids.tolist() for one in own.completions] for own in among[1::2]] == [
        [one.ids.tolist() for one in own.completions] for own in alone
    ]
    assert case.method().state_from(among) == case.method().state_from(alone)
    state = case.state(alone)
    one, other = trainer(make_model, case.method()), trainer(make_model, case.method())
    (result, _), (other_result, _) = one.step(alone, 0, state), other.step(among, 0, state)
    torch.testing.assert_close(gradients(other), gradients(one), rtol=1e-8, atol=1e-12)
    assert other_result.loss == pytest.approx(result.loss, rel=1e-11)
    assert other_result.metrics == pytest.approx(result.metrics, rel=1e-8, abs=1e-12)
    assert other_result.state_sums == pytest.approx(result.state_sums, rel=1e-9)


def test_sums_of_the_reference_from_the_data_are_refused():
    with pytest.raises(DataError, match="Remove the columns with reference log-probabilities"):
        WithPartners([tree([1], [5], reference_logp=-1.0), tree([2], [6], reference_logp=-2.0)], seed=0)


def test_z0_is_the_mean_over_partners_and_at_least_nothing(make_model):
    case = Case("kto", {"beta": 0.3})
    trees = [own.with_weight(1.0) for own in case.method().arrange(thumbs(6), seed=1)]
    one = trainer(make_model, case.method())
    partners = [replace(own, completions=own.completions[1:]) for own in trees]
    batch = pack(partners, sharing="flat")
    with torch.no_grad():
        ratios = one.policy(batch).sum() - one.reference.logps(batch).sum()
    state = case.method().state_from(trees)
    assert one.evaluate(trees, state).figures["z0"] == pytest.approx(max(0.0, float(ratios.mean())))
    # policy and reference exchanged: every log-ratio has the other sign
    other = replace(one, policy=one.reference.policy, wrapped=one.reference.policy, reference=type(one.reference)(one.policy))
    assert other.evaluate(trees, state).figures["z0"] == pytest.approx(max(0.0, -float(ratios.mean())))
    assert float(ratios.mean()) != 0


def test_partners_add_nothing_to_the_loss_but_z0(make_model, monkeypatch: pytest.MonkeyPatch):
    """With z0 held, other partners leave every number and the gradient as they were; and the loss is the answers' own."""
    case = Case("kto", {"beta": 0.3, "undesirable_weight": 0.5})
    single = singles(pairs(6))
    drawn = [list(WithPartners(single, seed=seed)) for seed in (1, 2)]
    partners = [[one.completions[1].ids.tolist() for one in trees] for trees in drawn]
    assert sum(one != other for one, other in zip(*partners, strict=True)) > 6
    state = case.method().state_from(drawn[0])

    def stepped(trees: list[PromptTree]) -> tuple[object, torch.Tensor]:
        one = trainer(make_model, case.method())
        result, _ = one.step(trees, 0, state)
        return result, gradients(one)

    results, _ = zip(*map(stepped, drawn), strict=True)
    assert results[0].metrics["z0"] != pytest.approx(results[1].metrics["z0"])

    def held(self: KTO, policy: TokenLogps, reference: TokenLogps, batch: TreeBatch) -> dict[str, torch.Tensor]:
        return {"log_ratio": policy.values_N.new_tensor(0.6), "weight": policy.values_N.new_tensor(2.0)}

    monkeypatch.setattr(KTO, "statistics", held)
    (one, its_slopes), (other, other_slopes) = map(stepped, drawn)
    torch.testing.assert_close(its_slopes, other_slopes, rtol=1e-9, atol=1e-14)
    assert one.loss == pytest.approx(other.loss, rel=1e-12)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-12)
    assert one.metrics["z0"] == pytest.approx(0.3)

    made = trainer(make_model, case.method())
    batch = pack(single[:], sharing="flat")
    with torch.no_grad():
        policy, reference = made.policy(batch).sum(), made.reference.logps(batch).sum()
    rows = zip(policy.tolist(), reference.tolist(), single, strict=True)
    each = [
        (oracles.kto(p, q, up=own.completions[0].label, z0=0.3, beta=0.3, desirable=1.0, undesirable=0.5), own.weight) for p, q, own in rows
    ]
    assert one.loss == pytest.approx(sum(loss * weight for loss, weight in each) / sum(weight for _, weight in each))


@pytest.mark.parametrize(("up", "down"), [(100, 400), (400, 100), (100, 100), (130, 100), (140, 100), (1, 1000)])
def test_balanced_weights_bring_the_ratio_to_where_it_should_be(up: float, down: float):
    of_up, of_down = balancing_weights(up, down)
    assert 1.0 - 1e-9 <= of_up * up / (of_down * down) <= 4 / 3 + 1e-9
    assert min(of_up, of_down) == 1.0
    if 1 <= up / down <= 4 / 3:
        assert (of_up, of_down) == (1.0, 1.0)


def test_what_is_said_about_the_balance():
    trees = [tree([place], [5], label=place < 2) for place in range(8)]

    def said(**settings: object) -> list[str]:
        return list(Case("kto", settings).method().remarks(trees))

    assert said(desirable_weight=3.0) == said(desirable_weight=4.5) == []
    (note,) = said()
    assert note.startswith("note: thumbs: 2 up, 6 down; up weighs 0.333 times what down weighs")
    assert "--desirable-weight 3 --undesirable-weight 1" in note
    assert said(balance=True) == ["thumbs: 2 up, 6 down; balanced by desirable_weight 3 and undesirable_weight 1"]
    assert "one kind only" in Case("kto", {}).method().remarks(trees[:2])[0]
    assert Case("kto", {"balance": True}).method().state_from(trees) == {"desirable_weight": 3.0, "undesirable_weight": 1.0}
    weighted = [own.with_weight(3.0) if own.completions[0].label else own for own in trees]
    assert Case("kto", {}).method().remarks(weighted) == ()


def test_what_an_epoch_makes_of_the_kinds_decides():
    """Twenty of each; those up are taken four times as often, or weigh so."""
    trees = [tree([place], [5], label=place < 20) for place in range(40)]
    times = np.array([4.0] * 20 + [1.0] * 20)
    found = "thumbs: 20 up, 20 down, which weigh 80 and 20 in an epoch"
    for given, taken in ((trees, times), ([own.with_weight(4.0 if place < 20 else 1.0) for place, own in enumerate(trees)], None)):
        balanced, plain = (Case("kto", {"balance": balance}).method() for balance in (True, False))
        assert balanced.state_from(given, times=taken) == pytest.approx({"desirable_weight": 1.0, "undesirable_weight": 3.0})
        assert list(balanced.remarks(given, times=taken)) == [f"{found}; balanced by desirable_weight 1 and undesirable_weight 3"]
        (note,) = plain.remarks(given, times=taken)
        assert note.startswith(f"note: {found}; up weighs 4 times what down weighs")
        assert note.endswith("--desirable-weight 1 --undesirable-weight 3")
    assert Case("kto", {}).method().remarks(trees) == ()
    assert Case("kto", {}).method().remarks([own.with_weight(5.0) for own in trees], times=times / times.sum()) != ()


@pytest.mark.parametrize(("name", "settings"), [("kto", {}), ("bco", {"unpaired": True})])
def test_one_kind_of_thumbs_is_told_whatever_the_other_s_number(name: str, settings: dict[str, object]):
    method = Case(name, settings).method()
    ups = [tree([place], [5], label=True) for place in range(3)]
    downs = [
        tree(
            [9 + place],
            [5],
            label=False,
        )
        for place in range(2)
    ]
    only = "; with one kind only the model learns to give, or to avoid, everything that it is shown"
    assert list(method.remarks(ups)) == [f"note: thumbs: 3 up, 0 down{only}"]
    assert list(method.remarks(downs)) == [f"note: thumbs: 0 up, 2 down{only}"]
    idle = [own.with_weight(0.0) for own in downs]
    assert list(method.remarks([*ups, *idle])) == [f"note: thumbs: 3 up, 2 down, which weigh 3 and 0 in an epoch{only}"]
    assert not list(method.remarks([*ups, *downs]))
    assert Case("bco", {}).method().remarks(pairs(3)) == ()


def test_figures_of_thumbs_by_hand(make_model):
    """Means over each kind alone, whatever its share of the batch, and no figure of a kind that is not there."""
    case = Case("bco", {"unpaired": True, "beta": 0.5})
    trees = [own.with_weight(1.0) for own in thumbs(7)]
    one = trainer(make_model, case.method(), max_tokens=60)
    state = case.method().initial_state()
    found = one.evaluate(trees, state)
    batch = pack(trees, sharing="flat")
    with torch.no_grad():
        rewards = 0.5 * (one.policy(batch).sum() - one.reference.logps(batch).sum())
    is_up = np.array([own.completions[0].label for own in trees])
    assert found.figures["rewards/desirable"] == pytest.approx(float(rewards[is_up].mean()))
    assert found.figures["rewards/undesirable"] == pytest.approx(float(rewards[~is_up].mean()))
    right = ((rewards.numpy() > 0) == is_up).mean()
    assert found.figures["rewards/accuracy"] == pytest.approx(right)
    assert [math.isnan(value) for value in found.examples["rewards/undesirable"]] == is_up.tolist()
    ups = [own for own in trees if own.completions[0].label]
    assert "rewards/undesirable" not in one.evaluate(ups, state).figures


@pytest.mark.parametrize(("nats", "accuracy"), [(5e-4, 0.5), (-5e-4, 0.5), (2e-3, 0.0), (-2e-3, 1.0)])
def test_what_lies_as_near_to_the_point_as_rounding_is_on_neither_side(make_model, nats: float, accuracy: float):
    """z0 of a model that is its reference is not always 0, because partners are packed otherwise."""
    one = trainer(make_model, Case("kto", {"beta": 0.5}).method(), max_tokens=60)
    batch = pack([own for own in thumbs(7) if own.completions[0].label][:1], sharing="flat")
    with torch.no_grad():
        policy, reference = one.policy(batch), one.reference.logps(batch)
    point = 0.5 * (float(policy.sum() - reference.sum()) + nats)
    metrics, _ = thumb_metrics(policy, reference, batch, beta=0.5, point=point)
    assert metrics["rewards/accuracy"].tolist() == [accuracy]


def test_the_shift_is_halfway_between_the_kinds():
    method = Case("bco", {"shift_decay": 0.5}).method()
    state = method.next_state(method.initial_state(), {"up_reward": 6.0, "up_weight": 2.0, "down_reward": -1.0, "down_weight": 1.0})
    assert shift_of(state) == pytest.approx((3.0 - 1.0) / 2)
    state = method.next_state(state, {"up_reward": 0.0, "up_weight": 3.0, "down_reward": 0.0, "down_weight": 0.0})
    assert shift_of(state) == pytest.approx((3.0 / 4.0 - 1.0) / 2)
    assert shift_of(method.initial_state()) == 0.0


def test_the_shift_follows_the_rewards_of_a_run(make_model):
    for settings, make_trees in (({}, pairs), ({"unpaired": True}, thumbs)):
        case = Case("bco", {"beta": 0.3, **settings}, make_trees)
        trees = case.trees(6)
        assert len(trees) == 6
        assert {len(own.completions) for own in trees} == {1 if settings else 2}
        one = trainer(make_model, case.method(), max_tokens=80)
        state = case.method().initial_state()
        result, _ = one.step(trees, 0, state)
        after = one.method.next_state(state, result.state_sums)
        good, bad = ("desirable", "undesirable") if settings else ("chosen", "rejected")
        assert shift_of(after) == pytest.approx((result.metrics[f"rewards/{good}"] + result.metrics[f"rewards/{bad}"]) / 2)
        again, _ = trainer(make_model, case.method()).step(trees, 0, after)
        assert again.loss != pytest.approx(result.loss, rel=1e-6)
        if settings:  # the same answers, each against the shift that the first step left
            batch, shift = pack(trees, sharing="flat"), shift_of(after)
            made = trainer(make_model, case.method())
            with torch.no_grad():
                logps, refs = made.policy(batch).sum(), made.reference.logps(batch).sum()
            each = zip(logps.tolist(), refs.tolist(), trees, strict=True)
            told = [(oracles.bco_thumb(p, q, up=own.completions[0].label, beta=0.3, shift=shift), own.weight) for p, q, own in each]
            assert again.loss == pytest.approx(sum(loss * weight for loss, weight in told) / sum(weight for _, weight in told))
