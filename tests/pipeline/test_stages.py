"""Stages from one file: each starts from, and refers to, the one before."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.runs import figures, losses, pair_rows, rows, weights, write_rows
from transformers import AutoModelForCausalLM

from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.pipeline.stages import plan_stages, run_stages

PLAN = {"stages": ["sft", "dpo"], "model": "base", "out": "runs/a", "data": "all.jsonl"}


def settings(values: dict[str, Any], **overrides: Any) -> list[Any]:
    return [stage.settings for stage in plan_stages(PLAN | values, overrides)]


# The plan.


def test_each_stage_starts_from_the_one_before_in_a_folder_of_its_own():
    planned = plan_stages(PLAN, {})
    assert [(stage.name, stage.method.name) for stage in planned] == [("sft", "sft"), ("dpo", "dpo")]
    sft, dpo = (stage.settings for stage in planned)
    assert (sft.model, sft.out, sft.data) == ("base", Path("runs/a/sft"), ["all.jsonl"])
    assert (dpo.model, dpo.out, dpo.data) == ("runs/a/sft/model", Path("runs/a/dpo"), ["all.jsonl"])
    assert dpo.reference is None


def test_a_stage_s_own_keys_win_over_shared_ones_and_flags_over_both():
    values = {
        "seed": 1,
        "epochs": 2,
        "batch_size": 8,
        "sft": {"data": "sft.jsonl", "epochs": 3},
        "dpo": {"epochs": 4, "batch_size": 16, "beta": 0.2},
    }
    sft, dpo = settings(values)
    assert (sft.seed, sft.epochs, sft.batch_size, sft.data) == (1, 3, 8, ["sft.jsonl"])
    assert (dpo.seed, dpo.epochs, dpo.batch_size, dpo.data, dpo.beta) == (1, 4, 16, ["all.jsonl"], 0.2)
    sft, dpo = settings(values, epochs="5", beta="0.3", out="runs/b", model="other")
    assert (sft.epochs, dpo.epochs, dpo.beta) == (5, 5, 0.3)
    assert (sft.model, sft.out, dpo.model, dpo.out) == ("other", Path("runs/b/sft"), "runs/b/sft/model", Path("runs/b/dpo"))


def test_a_shared_key_of_one_method_is_no_mistake_for_the_others():
    sft, dpo = settings({"beta": 0.3, "score": "assistant", "reference_cache": False})
    assert dpo.beta == 0.3
    assert dpo.reference_cache is False
    assert sft.score == "assistant"
    assert not hasattr(sft, "beta")


@pytest.mark.parametrize(
    ("values", "overrides", "says"),
    [
        ({"stages": "sft"}, {}, r"stages must list methods in their order, for example \[sft, dpo\] \(given: 'sft'\)"),
        ({"stages": []}, {}, "stages must list methods"),
        ({"stages": [1]}, {}, "stages must list methods"),
        ({"stages": None}, {}, "stages must list methods"),
        ({"stages": ["sft", "dpoo"]}, {}, r"dpoo: no such method \(did you mean dpo\?\)"),
        ({"stages": ["dpo", "dpo"]}, {}, r"each method stands once \(given: dpo, dpo\)"),
        ({"betta": 0.1}, {}, r"(?s)in the stage sft:.*betta: no such setting"),
        ({"dpo": {"betta": 0.1}}, {}, r"(?s)in the stage dpo:.*betta: no such setting \(did you mean beta\?\)"),
        ({"sft": {"beta": 0.1}}, {}, r"(?s)in the stage sft:.*beta: no such setting"),
        ({}, {"sead": 1}, r"sead: no such setting \(did you mean seed\?\)"),
        ({"dpo": {"epochs": -1}}, {}, r"(?s)in the stage dpo:.*epochs: must be greater than 0"),
        ({"dpo": "fast"}, {}, r"dpo: must hold that stage's settings as `name: value` lines \(given: 'fast'\)"),
        ({"dpo": {"model": "other"}}, {}, r"dpo.model: a stage takes its model and its folder from the top"),
        ({"sft": {"out": "other"}}, {}, r"sft.out: a stage takes its model and its folder from the top"),
        ({"out": 5}, {}, r"out: must be a path \(given: 5\)"),
        ({"out": None}, {}, r"out: must be a path"),
        (
            {"lora_rank": 4, "dpo": {"lora_rank": 8}},
            {},
            r"dpo.lora_rank: the stage goes on with the adapter of sft, and cannot have another",
        ),
        ({"lora_rank": 4, "dpo": {"adapter": "a"}}, {}, r"dpo.adapter: the stage goes on with the adapter of sft"),
    ],
)
def test_mistakes_are_found_before_anything_runs(values: dict[str, Any], overrides: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        plan_stages(PLAN | values, overrides)


@pytest.mark.parametrize("name", ["model", "out"])
def test_model_and_out_are_required(name: str):
    values = {key: value for key, value in PLAN.items() if key != name}
    with pytest.raises(ConfigError, match=rf"{name}: is required at the top of a file with stages"):
        plan_stages(values, {})
    assert plan_stages(values, {name: "given"})


def test_an_adapter_is_made_once():
    sft, dpo = settings({"lora_rank": 4, "lora_alpha": 16, "target_modules": ["q_proj"]})
    assert (sft.lora_rank, sft.lora_alpha, sft.target_modules) == (4, 16, ["q_proj"])
    assert (dpo.lora_rank, dpo.lora_alpha, dpo.target_modules, dpo.adapter) == (0, None, [], None)
    sft, dpo = settings({"adapter": "first"})
    assert (sft.adapter, dpo.adapter) == ("first", None)
    sft, dpo = settings({"dpo": {"lora_rank": 4}})
    assert (sft.lora_rank, dpo.lora_rank) == (0, 4)
    sft, dpo = settings({}, lora_rank="4")
    assert (sft.lora_rank, dpo.lora_rank) == (4, 0)


def test_home_is_understood(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    sft, dpo = settings({"out": "~/runs"})
    assert (sft.out, dpo.model) == (Path("/home/me/runs/sft"), "/home/me/runs/sft/model")


# The run.


@pytest.fixture
def plan(model_folder: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """Two short stages, each with its data."""
    found = pair_rows()
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in found]
    return {
        "stages": ["sft", "dpo"],
        "model": str(model_folder()),
        "out": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "batch_size": 4,
        "epochs": 2,
        "learning_rate": 1e-3,
        "max_length": 128,
        "precision": "float32",
        "device": "cpu",
        "sft": {"data": write_rows(tmp_path / "demonstrations.jsonl", demonstrations)},
        "dpo": {"data": write_rows(tmp_path / "pairs.jsonl", found)},
    }


def test_dpo_starts_from_and_refers_to_the_model_of_sft(plan: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    out = Path(plan["out"])
    assert run_stages(plan) == out / "dpo" / "model"
    assert losses(out / "sft")[-1] < losses(out / "sft")[0]
    first = rows(out / "dpo")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    summary = json.loads((out / "dpo" / "summary.json").read_text())
    assert summary["model"] == str(out / "sft" / "model")
    base, tuned, aligned = (
        AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in (plan["model"], out / "sft" / "model", out / "dpo" / "model")
    )
    assert not torch.equal(base, tuned)
    assert not torch.equal(tuned, aligned)
    said = capsys.readouterr().err
    assert said.index("stage 1 of 2: sft") < said.index("stage 2 of 2: dpo")


def test_the_adapter_of_sft_goes_on(plan: dict[str, Any]):
    out = Path(plan["out"])
    for cache in (True, False):
        run_stages(plan, {"lora_rank": "4", "out": str(out / str(cache)), "reference_cache": cache, "learning_rate": "1e-2"})
        folder = out / str(cache)
        assert rows(folder / "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
        config = json.loads((folder / "dpo" / "model" / "adapter_config.json").read_text())
        assert (config["r"], config["base_model_name_or_path"]) == (4, plan["model"])
        assert weights(folder / "dpo") != weights(folder / "sft")
    assert losses(out / "True" / "dpo") == pytest.approx(losses(out / "False" / "dpo"), abs=1e-5)


def test_going_on_passes_over_what_is_done(plan: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    out = Path(plan["out"])
    run_stages(plan | {"save_every_steps": 2})
    whole = {name: figures(out / name) for name in ("sft", "dpo")}
    capsys.readouterr()
    # Stopped in the second stage, after a checkpoint.
    (out / "dpo" / "summary.json").unlink()
    shutil.rmtree(out / "dpo" / "model")
    shutil.rmtree(out / "dpo" / "checkpoints" / "step-000006")
    sft = {path: path.stat().st_mtime_ns for path in (out / "sft").rglob("*")}
    run_stages(plan | {"save_every_steps": 2}, {"resume": True})
    said = capsys.readouterr().err
    assert f"stage 1 of 2, sft: done before, in {out / 'sft'}" in said
    assert "4 of 6 steps are done" in said
    assert {path: path.stat().st_mtime_ns for path in (out / "sft").rglob("*")} == sft
    assert figures(out / "dpo") == whole["dpo"]
    # Stopped before the second stage had a checkpoint, and before it began.
    for left in (["config.yaml", "metrics.jsonl", "checkpoints"], []):
        for path in (out / "dpo").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in left:
                path.unlink()
        if left:
            (out / "dpo" / "checkpoints").mkdir()
        else:
            (out / "dpo").rmdir()
        run_stages(plan, {"resume": True})
        assert figures(out / "dpo") == whole["dpo"]
    # Stopped in the first.
    (out / "sft" / "summary.json").unlink()
    shutil.rmtree(out / "dpo")
    run_stages(plan, {"resume": True})
    assert {name: figures(out / name) for name in ("sft", "dpo")} == whole
    # All done: nothing runs.
    monkeypatch.setattr("prefopt.training.run.train", lambda *_, **__: pytest.fail("nothing is left to do"))
    run_stages(plan, {"resume": True})


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "setting": ("epochs was 2.0, is 3.0", lambda plan: plan["sft"].update(epochs=3)),
    "data": (
        r"the data is not what .*sft/checkpoints/step-000006 was trained on",
        lambda plan: write_rows(Path(plan["sft"]["data"]), [{"prompt": f"{n}", "completion": " other"} for n in range(12)]),
    ),
    "model": (r"the model .* has changed since .*sft/checkpoints/step-000006", lambda plan: scale_weights(Path(plan["model"]))),
}
"""What is changed after the first stage has finished, and what is said then."""


def scale_weights(folder: Path) -> None:
    """Every other number of every weight half as large again, at the same size of file."""
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.view(-1)[1::2] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_stage_that_would_come_out_otherwise_is_refused(plan: dict[str, Any], tmp_path: Path, what: str):
    plan["model"] = str(shutil.copytree(plan["model"], tmp_path / "base"))
    run_stages(plan)
    out = Path(plan["out"])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    says, change = CHANGES[what]
    change(plan)
    with pytest.raises(RunError, match=says):
        run_stages(plan, {"resume": True})
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_files_that_were_only_written_again_are_looked_into(plan: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    """Their time says that they may have changed, their content that they have not."""
    run_stages(plan)
    out = Path(plan["out"])
    Path(plan["sft"]["data"]).touch()
    capsys.readouterr()
    run_stages(plan, {"resume": True})
    said = capsys.readouterr().err
    assert f"this run has finished before, and stays as it is: {out / 'sft'}" in said
    assert f"stage 2 of 2, dpo: done before, in {out / 'dpo'}" in said
    run_stages(plan, {"resume": True})
    assert f"stage 1 of 2, sft: done before, in {out / 'sft'}" in capsys.readouterr().err


def test_a_finished_stage_s_model_is_made_again_where_it_is_gone(plan: dict[str, Any]):
    run_stages(plan)
    out = Path(plan["out"])
    whole = weights(out / "sft")
    shutil.rmtree(out / "sft" / "model")
    run_stages(plan, {"resume": True})
    assert weights(out / "sft") == whole


def test_a_finished_stage_without_checkpoints_is_passed_over_and_never_overwritten(plan: dict[str, Any]):
    """Somebody made room. While nothing has changed that is all right; else nothing is left to compare with."""
    run_stages(plan)
    out = Path(plan["out"])
    shutil.rmtree(out / "sft" / "checkpoints")
    run_stages(plan, {"resume": True})
    plan["sft"]["epochs"] = 3
    whole = weights(out / "sft")
    with pytest.raises(RunError, match=r"the stage sft has finished in .* and it cannot be told whether it would come out the same now"):
        run_stages(plan, {"resume": True})
    assert weights(out / "sft") == whole


def test_a_later_stage_s_folder_is_looked_at_first(plan: dict[str, Any]):
    out = Path(plan["out"])
    (out / "dpo").mkdir(parents=True)
    (out / "dpo" / "mine").touch()
    with pytest.raises(RunError, match=r"dpo is not empty"):
        run_stages(plan)
    assert not (out / "sft").exists()


def test_an_error_of_a_stage_ends_the_run(plan: dict[str, Any]):
    with pytest.raises(ModelError, match="no folder /no/model"):
        run_stages(plan, {"model": "/no/model"})
    assert not (Path(plan["out"]) / "dpo").exists()


def test_planning_does_not_load_torch():
    code = "import sys, prefopt.pipeline.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
