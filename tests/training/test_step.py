"""One optimizer step: its gradients do not depend on how the work was cut, for every unit and every coupling."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from prefopt.engine.head import HeadShape
from prefopt.errors import RunError
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.methods.method import LossOutput, Method, MethodSettings, Needs, Term, one_per_example, scored_tokens
from prefopt.methods.sft import SFT, SFTSettings
from prefopt.models.policy import EnginePath, Policy, no_dropout, trained_parameters
from prefopt.models.reference import FrozenCopy
from prefopt.training.group.processes import Processes
from prefopt.training.loop import NotFinite, Trainer
from prefopt.training.optimizer import Schedule, make_optimizer
from prefopt.trees import Completion, PromptTree, TokenIds, token_ids

ONE_PROCESS = Processes(0, 1, torch.device("cpu"))


class Coupled(Method):
    """A method that uses all of the contract: a statistic over the batch, a state, two units, the entropy."""

    name = "coupled"
    settings_class = MethodSettings
    needs = Needs(completions="pair", reference=True, outputs=frozenset({"log_sum_squares"}))  # which brings the entropy
    units = {"pairs": one_per_example, "tokens": scored_tokens}

    def initial_state(self):
        return {"shift": 0.25}

    def next_state(self, state, sums):
        return {"shift": 0.5 * state["shift"] + 0.5 * sums["total"] / sums["count"]}

    def statistics(self, policy, reference, batch):
        ratio_B, _ = (policy.sum() - reference.sum()).view(-1, 2).unbind(1)
        return {"sum": (ratio_B * batch.weight_B).sum(), "count": batch.weight_B.sum()}

    def loss(self, policy, reference, batch, *, statistics, state):
        center = statistics["sum"] / statistics["count"]
        chosen_B, rejected_B = (policy.sum() - reference.sum()).view(-1, 2).unbind(1)
        entropy_B, _ = policy.sum_tokens(policy.entropy_N).view(-1, 2).unbind(1)
        pairs = (chosen_B - center - state["shift"] - rejected_B).square()
        nll_B = -sum(policy.sum().view(-1, 2).unbind(1))
        terms = (Term(pairs, "pairs"), Term(nll_B, "tokens", weight=0.3), Term(-entropy_B, "pairs", weight=0.1))
        state_sums = {"total": (chosen_B.detach() * batch.weight_B).sum(), "count": batch.weight_B.sum()}
        return LossOutput(terms, {"center": torch.full_like(chosen_B, center).detach()}, state_sums)


def draw(rng: np.random.Generator, length: int) -> TokenIds:
    return token_ids(rng.integers(4, 300, length))


def pairs(num: int, seed: int = 0) -> list[PromptTree]:
    rng = np.random.default_rng(seed)
    return [
        PromptTree(
            draw(rng, rng.integers(1, 12)),
            (Completion(draw(rng, rng.integers(1, 9))), Completion(draw(rng, rng.integers(1, 9)))),
            weight=weight,
        )
        for weight in rng.choice([0.5, 1.0, 2.0], num)
    ]


def demonstrations(num: int) -> list[PromptTree]:
    return [PromptTree(tree.prompt_ids, tree.completions[:1], weight=tree.weight) for tree in pairs(num)]


CASES: dict[str, tuple[Callable[[], Method], Callable[[int], list[PromptTree]]]] = {
    "dpo": (lambda: DPO(DPOSettings(beta=0.3, label_smoothing=0.1)), pairs),
    "sft": (lambda: SFT(SFTSettings()), demonstrations),
    "coupled": (lambda: Coupled(MethodSettings()), pairs),
}


def reward_model(language_model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A random reward model of the same shape."""
    config = copy.deepcopy(language_model.config)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config)


def trainer(make_model, method: Method, *, max_tokens: int = 4096, sharing: str = "flat", processes: Processes = ONE_PROCESS) -> Trainer:
    is_reward = method.needs.model == "reward"
    path = EnginePath(sharing, None, scores=True) if is_reward else EnginePath(sharing, HeadShape())
    # GPT-2: its norms compute in float64 where the model does; Llama's compute in float32 whatever the model.
    models = (make_model("gpt2", seed=seed, initializer_range=0.2) for seed in (0, 1))
    policy, other = (Policy((reward_model(model) if is_reward else model).double(), path) for model in models)
    no_dropout(policy)
    reference = FrozenCopy(other) if method.needs.reference else None
    optimizer = make_optimizer(trained_parameters(policy), weight_decay=0.0)
    schedule = Schedule(1e-3, 10, 0.0, "constant")
    return Trainer(policy, policy, method, reference, optimizer, schedule, 1e9, max_tokens, None, processes)


def gradients(one: Trainer) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in one.policy.parameters()])


@pytest.mark.parametrize("case", CASES)
def test_the_cut_changes_nothing(make_model, case: str):
    make_method, make_trees = CASES[case]
    trees = make_trees(12)
    whole = trainer(make_model, make_method())
    result, norm = whole.step(trees, 0, whole.method.initial_state())
    assert norm > 0.1
    cuts = ((60, "flat"), (25 if case == "sft" else 30, "flat"), (4096, "plain"), (50, "plain"), (4096, "fork"), (50, "fork"))
    for max_tokens, sharing in cuts:
        cut = trainer(make_model, make_method(), max_tokens=max_tokens, sharing=sharing)
        cut_result, _ = cut.step(trees, 0, cut.method.initial_state())
        torch.testing.assert_close(gradients(cut), gradients(whole), rtol=1e-9, atol=1e-12)
        assert cut_result.loss == pytest.approx(result.loss, rel=1e-12)
        assert cut_result.metrics == pytest.approx(result.metrics, rel=1e-9)
        assert cut_result.state_sums == pytest.approx(result.state_sums, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_order_and_weightless_examples_change_nothing(make_model, case: str):
    make_method, make_trees = CASES[case]
    trees = make_trees(6)
    base = trainer(make_model, make_method())
    result, _ = base.step(trees, 0, base.method.initial_state())
    other = trainer(make_model, make_method())
    weightless = [tree.with_weight(0.0) for tree in make_trees(9)[6:]]
    other_result, _ = other.step([*weightless, *reversed(trees)], 0, other.method.initial_state())
    torch.testing.assert_close(gradients(other), gradients(base), rtol=1e-9, atol=1e-12)
    assert other_result.loss == pytest.approx(result.loss, rel=1e-12)
    assert other_result.metrics == pytest.approx(result.metrics, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_processes_change_nothing(make_model, monkeypatch: pytest.MonkeyPatch, case: str):
    """Each process's share, added up by hand: what `add_up` and the averaging of gradients do."""
    make_method, make_trees = CASES[case]
    trees = make_trees(7)
    whole = trainer(make_model, make_method())
    result, _ = whole.step(trees, 0, whole.method.initial_state())
    statistics_of_all = {}
    shares = []
    for rank in range(3):
        share = trainer(make_model, make_method(), max_tokens=60, processes=Processes(rank, 3, torch.device("cpu")))
        monkeypatch.setattr(Processes, "add_up", lambda self, values: values)
        if share.method.couples_examples:
            mine = share._statistics(trees)
            statistics_of_all = {name: statistics_of_all.get(name, 0.0) + value for name, value in mine.items()}
        shares.append(share)
    total_gradient, total_loss = 0.0, 0.0
    for share in shares:
        monkeypatch.setattr(Trainer, "_statistics", lambda self, trees: statistics_of_all)
        part, _ = share.step(trees, 0, share.method.initial_state())
        total_gradient = total_gradient + gradients(share) / 3  # DDP averages
        total_loss += part.loss
    torch.testing.assert_close(total_gradient, gradients(whole), rtol=1e-9, atol=1e-12)
    assert total_loss == pytest.approx(result.loss, rel=1e-12)


def test_weight_counts_like_repetition(make_model):
    tree = pairs(3)[0]
    others = [one.with_weight(1.0) for one in pairs(3)[1:]]
    twice = trainer(make_model, CASES["dpo"][0]())
    twice.step([tree.with_weight(1.0), tree.with_weight(1.0), *others], 0, {})
    weighted = trainer(make_model, CASES["dpo"][0]())
    weighted.step([tree.with_weight(2.0), *others], 0, {})
    torch.testing.assert_close(gradients(weighted), gradients(twice), rtol=1e-9, atol=1e-12)


def test_state_and_statistics_reach_the_loss(make_model):
    one = trainer(make_model, Coupled(MethodSettings()))
    trees = pairs(4)
    result, _ = one.step(trees, 0, {"shift": 0.25})
    assert one.method.next_state({"shift": 0.25}, result.state_sums)["shift"] != 0.25
    again = trainer(make_model, Coupled(MethodSettings()))
    other, _ = again.step(trees, 0, {"shift": 3.0})
    assert other.loss != pytest.approx(result.loss)
    # the statistic is the mean of the chosen log ratios, the same one that the metric shows
    assert result.metrics["center"] == pytest.approx(result.state_sums["total"] / result.state_sums["count"])


def test_sft_loss_is_the_mean_over_tokens(make_model):
    trees = [tree.with_weight(1.0) for tree in demonstrations(5)]
    one = trainer(make_model, SFT(SFTSettings()))
    from prefopt.engine.batch import pack

    with torch.no_grad():
        values_N = one.policy(pack(trees, sharing="flat")).values_N
    result, _ = one.step(trees, 0, {})
    assert result.loss == pytest.approx(-values_N.mean().item())


def test_dpo_starts_at_log_two(make_model):
    one = trainer(make_model, DPO(DPOSettings()))
    same = Trainer(one.policy, one.policy, one.method, FrozenCopy.of(one.policy), one.optimizer, one.schedule, 1.0, 4096, None, ONE_PROCESS)
    result, _ = same.step(pairs(4), 0, {})
    assert result.loss == pytest.approx(math.log(2), abs=1e-12)
    assert result.metrics["rewards/margin"] == pytest.approx(0, abs=1e-12)


def test_evaluation_gives_the_step_s_numbers_and_leaves_no_gradient(make_model):
    one = trainer(make_model, CASES["dpo"][0](), max_tokens=60)
    figures = one.evaluate(pairs(6), {}).figures
    assert all(parameter.grad is None for parameter in one.policy.parameters())
    result, _ = one.step(pairs(6), 0, {})
    assert figures == pytest.approx({"loss": result.loss, **result.metrics})


@pytest.mark.parametrize("sharing", ["flat", "plain"])
def test_evaluation_gives_each_example_its_own_numbers_whatever_the_cut(make_model, sharing):
    trees = [tree.with_weight(1.0) for tree in pairs(6)]
    alone = trainer(make_model, CASES["dpo"][0](), max_tokens=4096, sharing=sharing)
    one_by_one = [alone.evaluate([tree], {}).figures for tree in trees]
    together = trainer(make_model, CASES["dpo"][0](), max_tokens=60, sharing=sharing).evaluate(trees, {}).examples
    assert together.keys() == one_by_one[0].keys()
    for name, values in together.items():
        assert values == pytest.approx([figures[name] for figures in one_by_one])


def test_a_gradient_that_is_not_finite_names_the_step_s_examples(make_model):
    one = trainer(make_model, CASES["dpo"][0]())
    one.policy.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        NotFinite, match=r"the gradient of step 1 is (nan|inf); .* Each example's own loss is finite; the step's examples: row"
    ) as caught:
        one.step([PromptTree(tree.prompt_ids, tree.completions, row_id="row") for tree in pairs(2)], 0, {})
    assert all(math.isfinite(value) for value in caught.value.examples["loss"])


def test_a_loss_that_is_not_finite_names_the_example_that_is_guilty(make_model):
    one = trainer(make_model, CASES["dpo"][0]())
    trees = [PromptTree(tree.prompt_ids, tree.completions, row_id=f"row {place}") for place, tree in enumerate(pairs(3))]
    guilty = PromptTree(token_ids([5] * 60), trees[1].completions, row_id="the guilty one")
    with torch.no_grad():
        one.policy.model.transformer.wpe.weight[50] = float("nan")  # a position that the others do not reach
    with pytest.raises(
        NotFinite, match=r"the loss of step 1 is nan; .* Examples whose own loss is not finite: the guilty one\. "
    ) as caught:
        one.step([trees[0], guilty, trees[2]], 0, {})
    assert [math.isfinite(value) for value in caught.value.examples["loss"]] == [True, False, True]
    assert caught.value.trees[1] is guilty


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_model):
    one = trainer(make_model, CASES["dpo"][0]())
    with torch.no_grad():
        one.policy.model.lm_head.weight[7] = float("nan")
    before = {name: parameter.clone() for name, parameter in one.policy.named_parameters()}
    with pytest.raises(
        RunError,
        match=r"the loss of step 3 is nan; since the update of step 2 the weights of model\.transformer\.wte\.weight are not finite",
    ):
        one.step([PromptTree(tree.prompt_ids, tree.completions, row_id="data.jsonl:5") for tree in pairs(2)], 2, {})
    for name, parameter in one.policy.named_parameters():
        torch.testing.assert_close(parameter, before[name], equal_nan=True, rtol=0, atol=0)
