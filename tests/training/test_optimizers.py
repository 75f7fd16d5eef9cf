"""AdamW in 8 bits, and in bf16 with compensated sums: what they compute, what a checkpoint keeps, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.training.group_server import Server
from tests.training.runs import losses, rows, run, weights
from tests.training.test_sharding import cut_short
from torch import nn
from torch.optim import AdamW, Optimizer

from prefopt.errors import ConfigError
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.training.assemble import method_named, settings_for
from prefopt.training.combination import check_combination
from prefopt.training.group.processes import ALONE, Processes
from prefopt.training.loop import Trainer
from prefopt.training.memory.check import estimate_memory
from prefopt.training.not_finite import NotFinite
from prefopt.training.optimizer import make_optimizer, set_learning_rate
from prefopt.training.optimizers import kind as kind_module
from prefopt.training.optimizers.kinds import KINDS, kind_of
from prefopt.training.record.checkpoint import Checkpoints, Progress, restore
from prefopt.training.settings import RunSettings

CPU = torch.device("cpu")
TWO = Processes(0, 2, CPU)


def installed(name: str) -> Any:
    """The kind as a parameter; skipped where its library is not there."""
    library = KINDS[name].library
    return pytest.param(name, marks=pytest.mark.skipif(library is not None and find_spec(library) is None, reason=f"needs {library}"))


ALL = [installed(name) for name in KINDS]
SAVING = [installed(name) for name in KINDS if name != "adamw"]
eight_bit = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
compensated = pytest.mark.skipif(find_spec("optimi") is None, reason="needs optimi")


def one_weight(kind: str, weights: torch.Tensor, *, weight_decay: float = 0.0) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(weights.to(KINDS[kind].trained, copy=True))
    return parameter, make_optimizer([("weight", parameter)], weight_decay=weight_decay, kind=kind)


def step_with(optimizer: Optimizer, gradients: Mapping[nn.Parameter, torch.Tensor], rate: float) -> None:
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.to(parameter.dtype, copy=True)
    set_learning_rate(optimizer, rate)
    optimizer.step()


# What they compute.


@compensated
def test_at_5e7_plain_bf16_loses_every_update_and_compensated_sums_none():
    """Under a constant gradient AdamW moves a weight by the learning rate: 200 steps of 5e-7 are 1e-4. The weight 0.02 is held as
    0.02001953125, and the next bf16 number below is 2^-13 = 1.22e-4 away. The compensation is a bf16 number too, and the same update
    is rounded the same way each time: 4 % of it are lost, where noise would even that out.
    """
    start = torch.full((2, 3), 0.02)
    kept, kahan = one_weight("adamw-bf16", start)
    plain = nn.Parameter(start.bfloat16())
    naive = AdamW([plain], lr=5e-7, weight_decay=0.0)
    for _ in range(200):
        step_with(kahan, {kept: torch.ones(2, 3)}, 5e-7)
        plain.grad = torch.ones(2, 3, dtype=torch.bfloat16)
        naive.step()
    assert plain.tolist() == [[0.02001953125] * 3] * 2  # as if nothing had happened
    assert kept.dtype == torch.bfloat16
    assert kept.tolist() == [[0.02001953125 - 2**-13] * 3] * 2
    moved = 0.02001953125 - (kept.double() + kahan.state[kept]["kahan_comp"].double())
    assert torch.allclose(moved, torch.full((2, 3), 1e-4, dtype=torch.float64), rtol=0.05)


@compensated
def test_decay_too_small_for_bf16_is_not_lost():
    """w ← w·(1 − 1e-3·0.01), a hundred times; on vectors none."""
    kept, optimizer = one_weight("adamw-bf16", torch.full((2, 2), 0.02), weight_decay=0.01)
    for _ in range(100):
        step_with(optimizer, {kept: torch.zeros(2, 2)}, 1e-3)
    moved = 0.02001953125 - (kept.double() + optimizer.state[kept]["kahan_comp"].double())
    assert torch.allclose(moved, torch.full((2, 2), 0.02001953125 * (1 - (1 - 1e-5) ** 100), dtype=torch.float64), rtol=0.02)
    vector, optimizer = one_weight("adamw-bf16", torch.full((4,), 0.02), weight_decay=0.01)
    step_with(optimizer, {vector: torch.zeros(4)}, 1e-3)
    assert vector.tolist() == [0.02001953125] * 4
    assert float(optimizer.state[vector]["kahan_comp"].abs().max()) == 0.0


@compensated
def test_the_second_moment_can_fall_again():
    """It could not with β₂ = 0.999: a bf16 number times 0.999 is itself."""
    kept, optimizer = one_weight("adamw-bf16", torch.full((1, 2), 0.02))
    step_with(optimizer, {kept: torch.full((1, 2), 8.0)}, 0.0)
    for _ in range(300):
        step_with(optimizer, {kept: torch.full((1, 2), 0.125)}, 0.0)
    assert float(optimizer.state[kept]["exp_avg_sq"].max()) < 2 * 0.125**2 + 64 / 100
    stuck = torch.tensor(64.0, dtype=torch.bfloat16)
    assert float(stuck * 0.999) == 64.0


@pytest.mark.parametrize("kind", ALL)
def test_the_way_is_that_of_adamw(kind: str):
    """Against AdamW in float64 on noisy gradients; the first step is one of the learning rate in every weight."""
    draw = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(64, 128, generator=draw)
    start = start.bfloat16().float()
    mine, optimizer = one_weight(kind, start, weight_decay=0.1)
    exact = nn.Parameter(start.double())
    expected = AdamW([exact], lr=0.0, betas=(0.9, 0.99 if kind == "adamw-bf16" else 0.999), weight_decay=0.1)
    slope = torch.randn(64, 128, generator=draw)
    for number in range(60):
        gradient = (slope + torch.randn(64, 128, generator=draw)).bfloat16().float()
        rate = 1e-3 * (1 - number / 60)
        step_with(optimizer, {mine: gradient}, rate)
        exact.grad = gradient.double()
        set_learning_rate(expected, rate)
        expected.step()
        if number == 0:
            moved = (mine.detach().float() - start).abs()
            assert float(moved.mean()) == pytest.approx(1e-3, rel=0.1)
    way = (exact.detach() - start).norm()
    far = (mine.detach().double() - exact.detach()).norm() / way
    assert float(way) > 1.0
    assert far < {"adamw": 1e-5, "adamw-8bit": 0.05, "adamw-bf16": 0.05}[kind]


@eight_bit
def test_moments_in_8_bits_are_8_bits():
    large, optimizer = one_weight("adamw-8bit", torch.randn(64, 128))
    small, of_small = one_weight("adamw-8bit", torch.randn(8, 16))
    step_with(optimizer, {large: torch.ones(64, 128)}, 1e-3)
    step_with(of_small, {small: torch.ones(8, 16)}, 1e-3)
    kept = kind_of(optimizer).tensors(optimizer, large)
    assert {name: (tensor.dtype, tensor.numel()) for name, tensor in kept.items()} == {
        "step": (torch.int64, 1),
        "state1": (torch.uint8, 8192),
        "state2": (torch.uint8, 8192),
        "absmax1": (torch.float32, 32),
        "absmax2": (torch.float32, 32),
    }
    held = sum(tensor.nbytes for name, tensor in kept.items() if name != "step")
    assert held / 8192 == KINDS["adamw-8bit"].state_bytes
    assert of_small.state[small]["state1"].dtype == torch.float32


@pytest.mark.parametrize("kind", ALL)
def test_matrices_decay_and_vectors_do_not(kind: str):
    matrix, vector = nn.Parameter(torch.ones(2, 2, dtype=KINDS[kind].trained)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([("matrix", matrix), ("vector", vector)], weight_decay=0.5, kind=kind)
    step_with(optimizer, {matrix: torch.zeros(2, 2), vector: torch.zeros(2)}, 0.5)
    assert matrix.tolist() == [[0.75, 0.75], [0.75, 0.75]]
    assert vector.tolist() == [1.0, 1.0]


# What a checkpoint keeps.


def small(kind: str, seed: int = 0) -> tuple[dict[str, nn.Parameter], Optimizer]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"wide": (64, 128), "narrow": (4, 8), "norm": (128,), "idle": (2, 2)}
    parameters = {
        name: nn.Parameter((0.1 * torch.randn(shape, generator=draw)).to(KINDS[kind].trained if len(shape) > 1 else torch.float32))
        for name, shape in shapes.items()
    }
    return parameters, make_optimizer(parameters.items(), weight_decay=0.1, kind=kind)


def some_steps(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, numbers: range) -> None:
    """`idle` never gets a gradient."""
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        moving = {parameter: torch.randn(parameter.shape, generator=draw) for name, parameter in parameters.items() if name != "idle"}
        step_with(optimizer, moving, 1e-3 / (1 + number))


@pytest.mark.parametrize("kind", ALL)
def test_it_goes_on_to_the_bit(kind: str, tmp_path: Path):
    parameters, optimizer = small(kind)
    some_steps(parameters, optimizer, range(5))
    path = Checkpoints(tmp_path, keep=1).save(parameters, optimizer, Progress(5, {}), {})
    some_steps(parameters, optimizer, range(5, 9))

    others, another = small(kind, seed=1)
    restore(path, {"step": 5, "method_state": {}}, others, another)
    some_steps(others, another, range(5, 9))
    for name, parameter in parameters.items():
        assert torch.equal(others[name], parameter), name
        mine, theirs = (kind_of(made).tensors(made, held) for made, held in ((optimizer, parameter), (another, others[name])))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert kind_of(optimizer).tensors(optimizer, parameters["idle"]) == {}
    assert kind_of(optimizer) is KINDS[kind]


RUN: dict[str, Any] = {"save_every_steps": 2, "keep_checkpoints": 9, "weight_decay": 0.01, "precision": "auto"}


@pytest.fixture(scope="module")
def finished(model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """finished("adamw-8bit"): a run with it, made once; nobody writes into it."""
    folder = tmp_path_factory.mktemp("optimizers")

    def made(kind: str) -> Path:
        if not (folder / kind).exists():
            precision = "float32" if kind != "adamw-bf16" else "auto"
            run("dpo", model_folder(), pairs, folder / kind, optim=kind, **RUN | {"precision": precision})
        return folder / kind

    return made


@pytest.mark.parametrize("kind", SAVING)
def test_a_run_learns_as_with_float32_and_goes_on_to_the_bit(
    finished: Callable[[str], Path], model_folder: Callable[..., Path], pairs: str, tmp_path: Path, kind: str
):
    out = finished(kind)
    assert rows(out)[0]["rewards/margin"] == pytest.approx(0.0, abs=1e-6)
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(out) == pytest.approx(losses(finished("adamw")), abs=3e-3)
    assert losses(out)[-1] < 0.6
    again = cut_short(out, tmp_path / "run")
    run("dpo", model_folder(), pairs, again, optim=kind, resume=True, **RUN | {"precision": "float32" if kind == "adamw-8bit" else "auto"})
    assert losses(again) == losses(out)
    assert weights(again) == weights(out)


@compensated
def test_weights_in_bf16_are_saved_as_they_were_trained(
    finished: Callable[[str], Path], pairs: str, tmp_path: Path, model_folder: Callable[..., Path]
):
    """Matrices in bf16, norms in float32; who goes on from them in float32 starts from the same numbers."""
    out = finished("adamw-bf16")
    saved = load_file(out / "model" / "model.safetensors")
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.float32} == {name for name in saved if "norm" in name}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.bfloat16}
    trained = load_file(out / "checkpoints" / "step-000006" / "policy.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, trained[f"model.{name}"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["resolved"]["precision"] == "bf16, trained weights in bf16 with compensated sums"
    run("dpo", out / "model", pairs, tmp_path / "on", max_steps=1, precision="float32")
    first = load_file(out / "model" / "model.safetensors")
    assert json.loads((tmp_path / "on" / "manifest.json").read_text())["model"]["num_trained"] == sum(t.numel() for t in first.values())


@compensated
def test_processes_that_hold_parts_make_the_run_of_one(
    groups: Server, finished: Callable[[str], Path], model_folder: Callable[..., Path], pairs: str, tmp_path: Path
):
    given = {"optim": "adamw-bf16", "cache_dir": tmp_path / "cache", "parallel": "fsdp", **RUN}
    groups.run("train", method="dpo", model=model_folder(), data=pairs, out=tmp_path / "cut", **given)
    assert losses(tmp_path / "cut") == pytest.approx(losses(finished("adamw-bf16")), abs=2e-3)
    again = cut_short(tmp_path / "cut", tmp_path / "again")
    groups.run("train", method="dpo", model=model_folder(), data=pairs, out=again, resume=True, **given)
    assert losses(again) == losses(tmp_path / "cut")
    assert weights(again) == weights(tmp_path / "cut")
    shutil.rmtree(tmp_path / "again")
    alone = cut_short(tmp_path / "cut", tmp_path / "again")  # and one goes on from two
    run("dpo", model_folder(), pairs, alone, optim="adamw-bf16", resume=True, **RUN)
    assert losses(alone) == pytest.approx(losses(tmp_path / "cut"), abs=2e-3)


@pytest.mark.parametrize(
    ("kind", "key"),
    [pytest.param("adamw-8bit", "absmax2", marks=eight_bit), pytest.param("adamw-bf16", "exp_avg_sq", marks=compensated)],
)
def test_moments_that_have_overflowed_are_not_saved(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, key: str
):
    step = Trainer.step

    def then_overflow(self: Trainer, trees: Any, number: int, state: Any) -> Any:
        found = step(self, trees, number, state)
        weight = next(weight for weight in self.policy.parameters() if weight.numel() >= 4096)
        self.optimizer.state[weight][key].view(-1)[0] = math.inf
        return found

    monkeypatch.setattr(Trainer, "step", then_overflow)
    precision = "auto" if kind == "adamw-bf16" else "float32"
    with pytest.raises(NotFinite, match=r"the optimizer's averages for model.model.embed_tokens.weight are not finite"):
        run("dpo", model_folder(), pairs, tmp_path / "run", max_steps=1, optim=kind, precision=precision)


# What it takes, and what is refused.


def settings(model: Path | str, **given: Any) -> RunSettings:
    return settings_for(method_named("dpo")).model_validate({"model": str(model), "data": "pairs.jsonl", "out": "out"} | given)


def test_bytes_for_a_trained_weight(model_folder: Callable[..., Path]):
    """16 in float32; 10 with moments in 8 bits; 10 in bf16, compensation included."""
    num = 43168

    def certain(kind: str) -> float:
        return estimate_memory(DPO(DPOSettings()), settings(model_folder(), optim=kind), positions=64, device=CPU).certain / num

    assert certain("adamw") == pytest.approx(16)
    assert certain("adamw-8bit") == pytest.approx(10 + 1 / 32, abs=1e-3)
    assert certain("adamw-bf16") == pytest.approx(10)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optim": "adamw-bf16", "precision": "float32"}, "holds the weights in bf16, and precision says float32"),
        ({"optim": "adamw-bf16", "lora_rank": 4}, "is for training all weights"),
        ({"optim": "adamw-bf16", "adapter": "runs/sft"}, "is for training all weights"),
        ({"optim": "adam"}, "adamw-8bit"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        settings("model", **given)


def test_what_only_the_run_can_see(model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_folder())}))
    with pytest.raises(ConfigError, match="is an adapter, whose weights are few"):
        check_combination(settings(tmp_path, optim="adamw-bf16"), ALONE)
    check_combination(settings(model_folder(), optim="adamw-8bit", parallel="fsdp"), ALONE)
    check_combination(settings(model_folder(), optim="adamw-8bit"), TWO)
    check_combination(settings(model_folder(), optim="adamw-bf16", parallel="fsdp"), TWO)
    with pytest.raises(ConfigError, match=r"--optim adamw-8bit with --parallel fsdp: .* Use --optim adamw"):
        check_combination(settings(model_folder(), optim="adamw-8bit", parallel="fsdp"), TWO)
    monkeypatch.setattr(kind_module, "find_spec", lambda name: None)
    check_combination(settings(model_folder()), ALONE)
    for kind, command in (("adamw-8bit", r"prefopt\[bits\]"), ("adamw-bf16", r"prefopt\[bf16\]")):
        with pytest.raises(ConfigError, match=rf"--optim {kind} needs the library \w+, which is not installed.*{command}"):
            check_combination(settings(model_folder(), optim=kind), ALONE)
