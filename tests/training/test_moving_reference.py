"""A reference that follows the policy (TR-DPO): its steps by hand, exact resume, and what is refused."""

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.training.runs import Asks, figures, losses, pair_rows, rows, run, weights, write_rows
from tests.training.test_step import pairs as drawn_pairs
from tests.training.test_step import trainer
from torch import Tensor

from prefopt.engine.batch import pack
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.models.load import Precision, load_model
from prefopt.models.moving import Following, MovingReference
from prefopt.models.policy import EnginePath, Policy
from prefopt.models.reference import FrozenAdapter, FrozenCopy
from prefopt.models.settings import ModelSettings, ReferenceSettings
from prefopt.training.assemble import method_named, settings_for
from prefopt.training.memory.estimate import estimate_memory


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows())


# The arithmetic.


def moving(make_model: Any, every: int, weight: float) -> tuple[Any, MovingReference]:
    """A float64 trainer whose reference is a copy of its policy and follows it."""
    one = trainer(make_model, DPO(DPOSettings(beta=0.3)))
    reference = MovingReference(FrozenCopy.of(one.policy), one.policy, Following(every, weight))
    object.__setattr__(one, "reference", reference)
    return one, reference


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


def test_two_steps_by_hand(make_model: Any):
    """θ_ref ← α·θ + (1 − α)·θ_ref before the second and the third step, in float64; the losses are DPO's against those weights."""
    one, reference = moving(make_model, 1, 0.6)
    trees = drawn_pairs(4)
    policy = [flat(one.policy)]
    expected = [policy[0]]
    for step in range(3):
        result, _ = one.step(trees, step, {})
        if step:
            expected.append(0.6 * policy[step] + 0.4 * expected[-1])
        torch.testing.assert_close(flat(reference.reference.policy), expected[step], rtol=1e-14, atol=1e-16)
        by_hand = loss_by_hand(one.policy, policy[step], expected[step], trees)
        assert result.loss == pytest.approx(by_hand, rel=1e-9)
        policy.append(flat(one.policy))
    assert (policy[1] - policy[0]).abs().max() > 1e-4
    assert (expected[1] - expected[0]).abs().max() > 1e-4


def loss_by_hand(policy: Policy, of_policy: Tensor, of_reference: Tensor, trees: list[Any]) -> float:
    """DPO's loss of the pairs by weight, from two sets of weights."""
    sums = []
    model = Policy(copy.deepcopy(policy.model), policy.path)
    for values in (of_policy, of_reference):
        start = 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(values[start : start + parameter.numel()].view_as(parameter))
                start += parameter.numel()
            batch = pack(trees, sharing="flat")
            sums.append(model(batch).sum().view(-1, 2).unbind(1))
    (chosen, rejected), (ref_chosen, ref_rejected) = sums
    margins = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    losses = [math.log1p(math.exp(-margin)) for margin in margins.tolist()]
    weight = [tree.weight for tree in trees]
    return sum(loss * own for loss, own in zip(losses, weight, strict=True)) / sum(weight)


def test_a_hard_update_makes_it_the_policy(make_model: Any):
    one, reference = moving(make_model, 2, 1.0)
    trees = drawn_pairs(4)
    start = flat(one.policy)
    one.step(trees, 0, {})
    one.step(trees, 1, {})
    assert torch.equal(flat(reference.reference.policy), start)
    before = flat(one.policy)
    result, _ = one.step(trees, 2, {})
    assert torch.equal(flat(reference.reference.policy), before)
    assert result.loss == pytest.approx(math.log(2), abs=1e-12)
    assert result.metrics["kl"] == pytest.approx(0, abs=1e-15)


def test_it_moves_before_a_step_once_and_not_before_the_first(make_model: Any):
    one, reference = moving(make_model, 3, 0.5)
    with torch.no_grad():
        for parameter in one.policy.parameters():
            parameter.add_(1.0)
    moved = []
    for step in (0, 1, 2, 3, 3, 4, 6):
        before = flat(reference.reference.policy)
        reference.before_step(step)
        moved.append(not torch.equal(before, flat(reference.reference.policy)))
    assert moved == [False, False, False, True, False, False, True]
    assert reference.moved_for == 6


def test_an_evaluation_does_not_move_it(make_model: Any):
    one, reference = moving(make_model, 1, 1.0)
    one.step(drawn_pairs(3), 0, {})
    before = flat(reference.reference.policy)
    one.evaluate(drawn_pairs(3), {})
    assert torch.equal(flat(reference.reference.policy), before)


def test_mixing_in_bf16_is_rounded_once():
    policy = torch.nn.Linear(64, 64).to(torch.bfloat16)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.weight.normal_(generator=torch.Generator().manual_seed(0))
    expected = (0.3 * policy.weight.double() + 0.7 * other.weight.double()).to(torch.bfloat16)

    class Holds:
        def __init__(self, module: torch.nn.Module) -> None:
            self.policy = module

    MovingReference(Holds(other), policy, Following(1, 0.3)).move()  # type: ignore[arg-type]
    torch.testing.assert_close(other.weight.detach(), expected, rtol=2**-7, atol=0)
    assert (other.weight != expected).float().mean() < 0.01  # a float32 sum now and then falls on the other side of a tie


def test_an_adapter_is_mixed_number_by_number(model_folder: Callable[..., Path]):
    settings = ModelSettings(model=str(model_folder()), lora_rank=2, modules_to_save=["lm_head"])
    loaded = load_model(settings, precision=Precision(None, torch.float32), device=torch.device("cpu"), seed=0)
    policy = Policy(loaded.model, EnginePath("flat", None))
    frozen = FrozenAdapter(policy, loaded.adapter)
    reference = MovingReference(frozen, policy, Following(1, 0.25))
    batch = pack(drawn_pairs(3), sharing="flat")
    with torch.no_grad():
        torch.testing.assert_close(reference.logps(batch).values_N, policy(batch).values_N)
        base = {name: parameter.clone() for name, parameter in loaded.model.named_parameters() if "prefopt_start" not in name}
        start = {name: own.clone() for name, own in reference.parameters().items()}
        for _, _, of_policy in frozen.pairs():
            of_policy.add_(torch.linspace(-1, 1, of_policy.numel()).view_as(of_policy))
        now = {name: of_policy.clone() for name, _, of_policy in frozen.pairs()}
    reference.move()
    assert any("modules_to_save" in name for name in start)
    for name, own in reference.parameters().items():
        torch.testing.assert_close(own.detach(), 0.25 * now[name] + 0.75 * start[name])
        assert not own.requires_grad
    for name, parameter in loaded.model.named_parameters():
        if name in base and "lora_" not in name and "modules_to_save" not in name:
            assert torch.equal(parameter, base[name])
    reference.following = Following(1, 1.0)
    reference.move()
    with torch.no_grad():
        assert torch.equal(reference.logps(batch).values_N, policy(batch).values_N)


# Whole runs.

KINDS: dict[str, dict[str, Any]] = {
    "soft": {"sync_reference_every_steps": 2, "sync_reference_weight": 0.5},
    "hard": {"sync_reference_every_steps": 3, "sync_reference_weight": 1.0},
    "adapter": {"sync_reference_every_steps": 2, "lora_rank": 4, "learning_rate": 1e-2},
    "every step": {"sync_reference_every_steps": 1},
    "dora": {"sync_reference_every_steps": 2, "sync_reference_weight": 1.0, "lora_rank": 2, "dora": True, "rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_to_the_bit(model_folder: Callable[..., Path], data: str, tmp_path: Path, kind: str):
    settings = {"eval_fraction": 0.25, "eval_every_steps": 3, "save_every_steps": 1, "keep_checkpoints": 10, **KINDS[kind]}
    whole = run("dpo", model_folder(), data, tmp_path / "whole", **settings)
    for done in (2, 3):  # just before it moves, and between
        half = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"half-{done}"))
        for path in (half / "checkpoints").iterdir():
            if path.name > f"step-00000{done}":
                shutil.rmtree(path)
        (half / "summary.json").unlink()
        shutil.rmtree(half / "model")
        again = run("dpo", model_folder(), data, half, resume=True, **settings)
        assert losses(again.folder) == losses(whole.folder)
        assert figures(again.folder) == figures(whole.folder)
        assert weights(again.folder) == weights(whole.folder)
        last = max((whole.folder / "checkpoints").iterdir()).name
        assert (half / "checkpoints" / last / "reference.safetensors").read_bytes() == (
            whole.folder / "checkpoints" / last / "reference.safetensors"
        ).read_bytes()


def test_the_reference_follows_and_figures_are_of_it(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    heard = Asks(lambda done: None)
    common = {"save_every_steps": 1, "keep_checkpoints": 10}
    hard = run("dpo", model_folder(), data, tmp_path / "hard", narrator=heard, **common, **KINDS["hard"])
    assert not (tmp_path / "cache" / "reference").exists()
    still = run("dpo", model_folder(), data, tmp_path / "still", **common)
    assert losses(hard.folder)[:3] == pytest.approx(losses(still.folder)[:3], abs=1e-6)
    assert rows(hard.folder)[3]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # step 4 begins with a reference that is the policy
    assert rows(hard.folder)[3]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows(still.folder)[3]["kl"] > 1e-4
    said = [line for line in heard.said if line.startswith("reference: ")]
    where = "reference: a second model in memory that follows the policy: every 3 steps it becomes the policy"
    assert said == [f"{where}; run in every step, and never cached"]
    kept = tmp_path / "hard" / "checkpoints"
    third, fourth = (load_file(kept / f"step-00000{step}" / "reference.safetensors") for step in (3, 4))
    policy = load_file(kept / "step-000003" / "policy.safetensors")
    assert all(torch.equal(fourth[name], policy[name]) for name in policy)
    assert not all(torch.equal(third[name], policy[name]) for name in policy)


@pytest.mark.parametrize("method", ["ipo", "kto", "bco", "apo-zero"])
def test_every_method_with_a_reference_can_have_one_that_follows(model_folder: Callable[..., Path], data: str, tmp_path: Path, method: str):
    moved = run(method, model_folder(), data, tmp_path / "moved", sync_reference_every_steps=1, sync_reference_weight=1.0)
    still = run(method, model_folder(), data, tmp_path / "still")
    assert losses(moved.folder)[0] == pytest.approx(losses(still.folder)[0], abs=1e-6)
    assert losses(moved.folder)[2:] != pytest.approx(losses(still.folder)[2:], abs=1e-4)


def test_methods_without_a_reference_do_not_know_the_setting():
    for method in ("simpo", "sft", "reward"):
        assert "sync_reference_every_steps" not in settings_for(method_named(method)).model_fields


def test_a_run_begins_again_from_the_config_it_wrote(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    """The file says reference_cache: false, which is what held."""
    import yaml

    run("dpo", model_folder(), data, tmp_path / "run", max_steps=1, sync_reference_every_steps=2)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["reference_cache"] is False
    assert written["sync_reference_every_steps"] == 2
    assert ReferenceSettings(**{name: written[name] for name in ReferenceSettings.model_fields}).sync_reference_every_steps == 2


# What is refused.


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sync_reference_every_steps": 2, "reference_cache": True}, "leave reference_cache out, or set it to off"),
        ({"sync_reference_every_steps": 2, "reference": "org/model"}, "reference names another model: leave one out"),
        ({"sync_reference_weight": 0.5}, "give sync_reference_every_steps too"),
        ({"sync_reference_every_steps": 0}, "greater than or equal to 1"),
        ({"sync_reference_every_steps": 2, "sync_reference_weight": 0.0}, "greater than 0"),
        ({"sync_reference_every_steps": 2, "sync_reference_weight": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        ReferenceSettings(**given)


def test_the_cache_is_off_by_itself():
    assert ReferenceSettings(sync_reference_every_steps=2).reference_cache is False
    assert ReferenceSettings(sync_reference_every_steps=2, reference_cache=False).reference_cache is False
    assert ReferenceSettings().reference_cache is True


def test_sums_of_the_data_cannot_move(model_folder: Callable[..., Path], tmp_path: Path):
    given = [row | {"reference_chosen_logp": -10.0, "reference_rejected_logp": -11.0} for row in pair_rows()]
    with pytest.raises(DataError, match="the data brings the reference's sums, and sync_reference_every_steps moves the reference"):
        run("dpo", model_folder(), write_rows(tmp_path / "pairs.jsonl", given), tmp_path / "out", sync_reference_every_steps=2)


def test_on_the_command_line_the_refusal_is_one_sentence(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="sync_reference_every_steps moves it: leave reference_cache out"):
        run("dpo", model_folder(), data, tmp_path / "out", sync_reference_every_steps=2, reference_cache=True)


def test_losses_against_several_references_decide_nothing(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    looks = {"eval_fraction": 0.25, "eval_every_steps": 1, "early_stop": 2}
    with pytest.raises(ConfigError, match="early_stop compares held-out losses of different steps"):
        run("dpo", model_folder(), data, tmp_path / "out", sync_reference_every_steps=2, **looks)


def test_how_it_follows_may_not_change_on_the_way(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    out = tmp_path / "run"
    run("dpo", model_folder(), data, out, max_steps=2, **KINDS["soft"])
    (out / "summary.json").unlink()
    with pytest.raises(RunError, match=r"sync_reference_weight was 0\.5, is 1\.0"):
        run("dpo", model_folder(), data, out, max_steps=2, resume=True, sync_reference_every_steps=2, sync_reference_weight=1.0)


# Memory.


def test_the_estimate_counts_it(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    kind = method_named("dpo")

    def reference_bytes(**given: Any) -> int:
        settings = settings_for(kind)(model=str(model_folder()), data=[data], out=tmp_path, precision="float32", **given)
        found = estimate_memory(kind(DPOSettings()), settings, positions=100, device=torch.device("cpu"), exact=False)
        return next((part.num_bytes for part in found.parts if part.name == "the reference model"), 0)

    model = load_model(
        ModelSettings(model=str(model_folder())), precision=Precision(None, torch.float32), device=torch.device("cpu"), seed=0
    )
    whole = sum(parameter.nbytes for parameter in model.model.parameters())
    assert reference_bytes() == 0
    assert reference_bytes(sync_reference_every_steps=2) == pytest.approx(whole, rel=1e-3)  # and a buffer
    assert reference_bytes(lora_rank=2, reference_cache=False) == 0
    adapter = reference_bytes(lora_rank=2, sync_reference_every_steps=2)
    assert 0 < adapter < whole / 4
