"""Several processes make the steps that one makes, whether each holds the whole model or a part of every weight."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.group_scenarios import draw_samples, look_and_step, steps
from tests.training.group_server import Outcome, Server
from tests.training.runs import figures, losses, run, weights
from torch import nn

from prefopt.engine.head import HeadShape
from prefopt.models.policy import EnginePath, Policy
from prefopt.models.proof import prove
from prefopt.training.group.processes import ALONE
from prefopt.training.group.sharding import SharedFile, layers_of, like, wrap

KINDS: dict[str, dict[str, Any]] = {
    "full": {"method": "dpo", "lora": False, "tied": True, "reference": "copy"},
    "full, untied, clipped": {"method": "coupled", "lora": False, "tied": False, "reference": "copy", "clip": 0.5},
    "full, recomputed": {"method": "dpo", "lora": False, "tied": False, "reference": "copy", "checkpointing": True},
    "full, own head": {"method": "dpo", "lora": False, "tied": True, "reference": "copy", "own_head": True},
    "adapter": {"method": "dpo", "lora": True, "tied": True, "reference": "off"},
    "adapter, untied, clipped": {"method": "coupled", "lora": True, "tied": False, "reference": "start", "clip": 0.5},
    "adapter, recomputed": {"method": "dpo", "lora": True, "tied": True, "reference": "start", "checkpointing": True},
    "full, reference follows": {"method": "dpo", "lora": False, "tied": True, "reference": "copy", "follows": 0.6},
    "adapter, reference follows": {"method": "dpo", "lora": True, "tied": True, "reference": "start", "follows": 0.6},
    "reward model": {"method": "reward", "lora": False},
    "reward model, adapter": {"method": "reward", "lora": True},
}
CASES = {f"{parallel}: {kind}": case | {"parallel": parallel} for parallel, (kind, case) in product(("ddp", "fsdp"), KINDS.items())}


@pytest.fixture(scope="module")
def two(groups: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """All cases on two processes: a folder of tensors, and the numbers of each."""
    folder = tmp_path_factory.mktemp("steps")
    return folder, groups.run("steps", cases=CASES, folder=folder)


@pytest.fixture(scope="module")
def one() -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """The same cases on one process."""
    found = {kind: steps(case | {"parallel": "ddp"}, ALONE) for kind, case in KINDS.items()}
    return lambda kind: found[kind]


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_weights_are_those_of_one_process(name: str, two, one):
    folder, outcome = two
    parallel, kind = name.split(": ")
    expected, numbers = one(kind)
    tensors = load_file(folder / f"{name}.safetensors")
    assert tensors.keys() == expected.keys()
    gradients = {key for key in expected if key.startswith("gradient")}
    assert len(gradients) == len(expected) / 2  # every trained parameter has one
    for key, tensor in expected.items():
        assert tensor.dtype == torch.float64
        largest = tensor.abs().max().item()
        assert largest > 0, key
        # Adam divides gradients by their size: where one is all but 0, the quotient is anything.
        tolerance = 1e-12 * largest if key in gradients else 1e-7
        assert (tensors[key] - tensor).abs().max().item() <= tolerance, key
    for mine in outcome.results:
        found = mine[name]
        assert all(found["cut"]) if parallel == "fsdp" else not any(found["cut"])
        for key in ("loss", "norm", "second loss", "second norm", "metrics", "evaluation"):
            assert found[key] == pytest.approx(numbers[key], rel=1e-12 if key in ("loss", "norm") else 1e-7), key


def test_a_model_that_was_looked_at_before_the_optimizer_was_made_trains_its_weights(groups: Server, tmp_path: Path):
    """The no-gradient pass of a reference leaves the policy's own unit gathered. Were it not given up, the optimizer would be
    made of gathered copies: the same losses at first, and then silently others. So much must hold for the test to mean anything.
    """
    expected = look_and_step(ALONE)
    right, wrong = (groups.run("after a look", folder=tmp_path, lets_go=lets_go).results[0] for lets_go in (True, False))
    assert all(right["cut"])
    assert right["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    assert right["norms"] == pytest.approx(expected["norms"], rel=1e-12)
    assert not all(wrong["cut"])
    assert wrong["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-12)
    assert abs(wrong["losses"][1] - expected["losses"][1]) > 0.05


def test_a_model_that_is_cut_answers_as_one_that_is_whole(groups: Server):
    expected = draw_samples(ALONE)
    outcome = groups.run("samples")
    assert outcome.said == ["", ""]
    for found in outcome.results:
        assert all(found["cut"])
        assert (found["before"], found["after"]) == (expected["before"], expected["after"])
        assert (found["loss"], found["norm"]) == pytest.approx((expected["loss"], expected["norm"]), rel=1e-12)
    assert expected["before"] != expected["after"]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral", "gpt_neox"])
def test_every_layer_is_a_unit(groups: Server, architecture: str):
    for found in groups.run("units", architecture=architecture).results:
        assert found == {"layers": 2, "cut": True}


def test_layers_are_found_without_their_names(make_model):
    policy = Policy(make_model("llama"), EnginePath("plain", HeadShape()))
    named = layers_of(policy)
    policy._no_split_modules = None
    assert layers_of(policy) == named == list(policy.model.model.layers)
    policy._no_split_modules = {"LlamaDecoderLayer", "LlamaMLP"}  # a part of a layer is no unit of its own
    assert layers_of(policy) == named


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_no_device_holds_is_proved_on_its_twin(make_model, dtype: torch.dtype):
    """Few layers and random weights, on the device of the run; what an adapter does to the head it cannot show, and is looked up."""
    model = make_model("llama", num_hidden_layers=5).to(dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    whole, twin = (prove(model, max_length=64, autocast=torch.bfloat16, apart=apart) for apart in (None, torch.device("cpu")))
    assert twin.path == whole.path == EnginePath("flat", HeadShape())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert prove(make_model("bloom"), max_length=64, apart=torch.device("cpu")).path.sharing == "fork"
    model.lm_head = nn.Sequential(model.lm_head)  # as an adapter wraps it
    assert prove(model, max_length=64, autocast=torch.bfloat16, apart=torch.device("cpu")).path == EnginePath("flat", None)


def test_one_process_needs_no_wrapping(make_model):
    policy = Policy(make_model("llama"), EnginePath("plain", HeadShape()))
    assert wrap(policy, ALONE, "ddp") is policy
    assert wrap(policy, ALONE, "fsdp") is policy
    value = torch.arange(4.0)
    torch.testing.assert_close(like(torch.zeros(4), value), value)


def test_a_file_that_is_shared_comes_in_its_order(tmp_path: Path):
    from safetensors.torch import save_file

    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor([7], dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    shared = SharedFile(tmp_path / "x.safetensors", ALONE)
    assert shared.shapes == {"a": (2, 2), "b": (3,), "c": (1,)}
    for name, tensor in shared.tensors():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)


# Whole runs.

SETTINGS = {
    "full": {"eval_fraction": 0.3, "eval_every_steps": 2, "samples": 2, "sample_tokens": 8},
    "adapter": {"lora_rank": 4, "reference_cache": False, "max_tokens": 60, "gradient_checkpointing": True, "samples": 0},
    "copy": {"reference_cache": False, "max_tokens": 60, "samples": 0},
    "moving": {"sync_reference_every_steps": 2, "sync_reference_weight": 0.5, "samples": 0},
    "moving adapter": {"sync_reference_every_steps": 2, "lora_rank": 4, "samples": 0},
    "reward": {"eval_fraction": 0.3},
}
"""With the reference read beforehand; with the adapter switched off in every step; with a second model in memory; with a reference that
follows the policy; and a reward model."""

COMMON = {"save_every_steps": 2, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def runs(groups: Server, model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """runs("full", "fsdp"): the folder of such a run, on two processes or (`one`) on one, made once; it must not be changed."""
    folder = tmp_path_factory.mktemp("runs")
    model = model_folder()

    def made(kind: str, parallel: str) -> Path:
        out = folder / f"{kind}-{parallel}"
        if out.exists():
            return out
        settings = {"cache_dir": folder / f"cache-{parallel}", **COMMON, **SETTINGS[kind]}
        method = "reward" if kind == "reward" else "dpo"
        if parallel == "one":
            run(method, model, pairs, out, **settings)
        else:
            groups.run("train", method=method, model=model, data=pairs, out=out, parallel=parallel, **settings)
        return out

    return made


@pytest.mark.parametrize(("kind", "parallel"), list(product(SETTINGS, ("ddp", "fsdp"))))
def test_a_run_is_that_of_one_process(runs, kind: str, parallel: str):
    two, one = runs(kind, parallel), runs(kind, "one")
    close(two, one)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    saved, expected = (load_file(next((folder / "model").glob("*.safetensors"))) for folder in (two, one))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=2e-4)
    assert (two / "model" / "tokenizer.json").read_bytes() == (one / "model" / "tokenizer.json").read_bytes()
    summary = json.loads((two / "summary.json").read_text())
    assert summary["num_processes"] == 2
    if kind == "full":
        lines = [[json.loads(line)["text"] for line in (out / "samples.jsonl").read_text().splitlines()] for out in (two, one)]
        assert lines[0][:2] == lines[1][:2]  # before training: the same model


ENDS = [("fsdp", "one"), ("one", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp"), ("moving", "fsdp")]


@pytest.mark.parametrize(("began", "goes_on"), ENDS)
def test_a_run_goes_on_however_its_processes_share_the_model(
    runs, groups: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path, began: str, goes_on: str
):
    kind = "adapter" if (began, goes_on) == ("ddp", "fsdp") else "full"
    if began == "moving":
        kind, began = "moving", "fsdp"
    out = cut_short(runs(kind, began), tmp_path / "run")
    settings = {"cache_dir": tmp_path / "cache", **COMMON, **SETTINGS[kind], "resume": True}
    before = figures(out)[:2]
    if goes_on == "one":
        run("dpo", model_folder(), pairs, out, **settings)
    else:
        groups.run("train", method="dpo", model=model_folder(), data=pairs, out=out, parallel=goes_on, **settings)
    assert figures(out)[:2] == before
    close(out, runs(kind, "one"))
    if began == goes_on:  # the same processes, to the bit
        assert losses(out) == losses(runs(kind, began))
        assert weights(out) == weights(runs(kind, began))


def test_no_process_needs_the_disk_of_another(runs, groups: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = cut_short(runs("full", "fsdp"), tmp_path / "run")
    elsewhere = {"out": tmp_path / "elsewhere", "cache_dir": tmp_path / "another cache"}
    settings = {"cache_dir": tmp_path / "cache", **COMMON, **SETTINGS["full"], "resume": True, "parallel": "fsdp"}
    groups.run("train", method="dpo", model=model_folder(), data=pairs, out=out, of_rank={"1": elsewhere}, **settings)
    close(out, runs("full", "one"))
    assert not (tmp_path / "elsewhere").exists()


def cut_short(run_folder: Path, out: Path) -> Path:
    """A copy of a run that has gone as far as its second step."""
    import shutil

    shutil.copytree(run_folder, out)
    for path in (out / "checkpoints").iterdir():
        if path.name > "step-000002":
            shutil.rmtree(path)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    return out


def close(two: Path, one: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for mine, other in zip(figures(two), figures(one), strict=True):
        assert mine.keys() == other.keys()
        numbers = [name for name in mine if not name.startswith("samples/")]  # one token drawn otherwise changes all that follow
        assert {name: mine[name] for name in numbers} == pytest.approx({name: other[name] for name in numbers}, abs=2e-4, rel=1e-3)
