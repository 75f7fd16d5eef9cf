"""What a resumed run must share with its beginning: what may change really may, and what may not is named."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import yaml
from tests.training.crash_server import Blow, Server, flags
from tests.training.runs import Asks, figures, losses, pair_rows, rows, run, weights, write_rows

import prefopt
from prefopt.errors import ConfigError, RunError, RunStopped
from prefopt.report.files import read_lines
from prefopt.training.assemble import method_named, settings_for
from prefopt.training.record import environment
from prefopt.training.record.callbacks import RunStart
from prefopt.training.record.resume import ELSEWHERE, FREE, ROUNDING
from prefopt.training.run import train_with
from prefopt.training.terminal.narrator import Quiet

SAME: dict[str, Any] = {"eval_fraction": 0.33, "epochs": 3, "eval_every_steps": 2, "save_every_steps": 1, "samples": 1, "sample_tokens": 4}
"""Settings of the run that is gone on with: seven steps."""

FREELY: dict[str, Any] = {
    "eval_every_steps": 1,
    "early_stop": 50,
    "samples": 3,
    "sample_tokens": 7,
    "save_every_minutes": 1e-6,
    "save_every_steps": 5,
    "keep_checkpoints": 1,
    "keep_best": False,
    "kl_budget": 3.0,
    "report": True,
    "report_to": ["tensorboard"],
    "memory_check": True,
    "data_workers": 2,
}
"""Another value for every setting of `FREE`; `out` and `cache_dir` are changed in the test."""

ROUNDED: dict[str, Any] = {
    "max_tokens": 60,
    "gradient_checkpointing": "on",
    "sharing": "plain",
    "device": "auto",
    "parallel": "fsdp",
    "reference_cache": False,
}
"""The same for `ROUNDING`."""

REFUSED: dict[str, Any] = {
    "sft_weight": 0.5,
    "wpo": True,
    "ld_alpha": 0.5,
    "f_divergence": "js",
    "model": "org/another",
    "adapter": "/an/adapter",
    "lora_rank": 2,
    "lora_alpha": 3.0,
    "rslora": True,
    "dora": True,
    "target_modules": ["q_proj"],
    "modules_to_save": ["lm_head"],
    "precision": "bf16",
    "load_in_4bit": True,
    "optim": "adamw-8bit",
    "trust_remote_code": True,
    "eval_fraction": 0.4,
    "data_format": "text_pair",
    "pairs_of_ranks": "best",
    "columns": {"chosen": "better"},
    "on_bad_row": "drop",
    "chat_template": "{{ messages }}",
    "template_args": {"tools": True},
    "text_as": "chat",
    "max_length": 64,
    "too_long": "drop",
    "batch_size": 2,
    "epochs": 4,
    "max_steps": 6,
    "learning_rate": 2e-3,
    "lr_schedule": "linear",
    "warmup_ratio": 0.2,
    "weight_decay": 0.1,
    "max_grad_norm": 2.0,
    "seed": 1,
    "beta": 0.2,
    "label_smoothing": 0.1,
    "reference": "/a/reference",
    "sync_reference_every_steps": 2,
    "sync_reference_weight": 0.5,
}
"""The same for all others of DPO."""

OF_STEPS = ("loss", "rewards/margin", "logps/chosen", "kl", "grad_norm", "learning_rate", "epoch")


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder()


@pytest.fixture(scope="module")
def folders(model: Path, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run in one piece, and the same as a kill after its fourth step would have left it."""
    base = tmp_path_factory.mktemp("resume")

    def at(done: int) -> None:
        if done == 5:  # its line is written, its checkpoint is not
            shutil.copytree(base / "whole", base / "killed", ignore=shutil.ignore_patterns(".lock"))

    run("dpo", model, pairs, base / "whole", narrator=Asks(at), **SAME)
    return base / "whole", base / "killed"


@pytest.fixture
def killed(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[1], tmp_path / "killed"))


def of_steps(out: Path) -> list[dict[str, float]]:
    """The figures of the training batches, whatever else was looked at."""
    return [{name: row[name] for name in OF_STEPS} for row in rows(out)]


def everything(out: Path) -> dict[Path, tuple[bytes, int]]:
    """Each file with its content, and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


def manifest_of(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return values


# Changed settings.


def test_every_setting_is_tried_below():
    """A new setting must be put where it belongs: what a run's numbers do not depend on, what rounds them, or what decides them."""
    known = settings_for(method_named("dpo")).model_fields.keys()
    assert {*FREELY, "out", "cache_dir", "offload_activations"} == {*FREE}  # the last needs a GPU
    assert ROUNDED.keys() == {*ROUNDING}
    beside_others = {
        "wpo_clamp",
        "f_alpha",
        "sft_reduction",
        "plackett_luce",
        "all_pairs",
        "mix",
    }  # they need another setting or other data
    assert {*REFUSED, *FREE, *ROUNDING, *ELSEWHERE} == {*known} - beside_others


@pytest.mark.parametrize("name", FREELY)
def test_a_setting_that_changes_no_step_may_change(folders: tuple[Path, Path], killed: Path, model: Path, pairs: str, name: str):
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, killed, narrator=narrator, resume=True, **SAME | {name: FREELY[name]})
    whole, _ = folders
    assert of_steps(killed) == of_steps(whole)
    assert weights(killed) == weights(whole)
    assert not [line for line in narrator.said if "differ in their last digits" in line]
    [resumed] = manifest_of(killed)["resumed"]
    assert (resumed["step"], resumed["differences"]) == (4, [])
    was = manifest_of(whole)["settings"][name]
    assert f"{name} was {was}, is {FREELY[name]}" in resumed["settings"]


def test_what_a_changed_setting_of_the_notes_does(killed: Path, model: Path, pairs: str):
    changed = {"eval_every_steps": 1, "samples": 3, "keep_checkpoints": 1, "keep_best": False, "save_every_steps": 3}
    run("dpo", model, pairs, killed, resume=True, **SAME | changed)
    assert [row["step"] for row in rows(killed) if "eval/loss" in row] == [2, 4, 5, 6, 7]
    answers = [json.loads(line)["step"] for line in (killed / "samples.jsonl").read_text().splitlines()]
    assert answers == [0, 2, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7]
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-000007"]


def test_a_run_may_move(folders: tuple[Path, Path], killed: Path, model: Path, pairs: str, tmp_path: Path):
    """Folder, cache and the name of the data's file: what lies there decides."""
    moved = killed.rename(tmp_path / "elsewhere")
    data = shutil.copy(pairs, tmp_path / "pairs.jsonl")
    run("dpo", model, str(data), moved, resume=True, cache_dir=tmp_path / "another", **SAME)
    assert figures(moved) == figures(folders[0])
    assert weights(moved) == weights(folders[0])
    assert manifest_of(moved)["resumed"][0]["differences"] == []


@pytest.mark.parametrize("name", ROUNDED)
def test_a_setting_that_only_rounds_may_change_and_is_noted(folders: tuple[Path, Path], killed: Path, model: Path, pairs: str, name: str):
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, killed, narrator=narrator, resume=True, **SAME | {name: ROUNDED[name]})
    whole, _ = folders
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-5)
    assert figures(killed)[:4] == figures(whole)[:4]
    differences = manifest_of(killed)["resumed"][0]["differences"]
    said = f"{name} was {manifest_of(whole)['settings'][name]}, is {ROUNDED[name]}"
    assert said in differences
    assert f"note: {'; '.join(differences)}. From here on the figures may differ in their last digits" in "\n".join(narrator.said)


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_decides_the_numbers_may_not_change(killed: Path, model: Path, pairs: str, name: str):
    before = everything(killed)
    settings = {"model": model, **SAME, name: REFUSED[name]}
    if name in ("lora_alpha", "rslora", "dora", "target_modules", "modules_to_save"):
        settings["lora_rank"] = 1
    if name == "sync_reference_weight":
        settings["sync_reference_every_steps"] = 2
    with pytest.raises(RunError) as caught:
        run("dpo", settings.pop("model"), pairs, killed, resume=True, **settings)
    message = str(caught.value)
    assert f"these settings differ from those of {killed}/checkpoints/step-000004: " in message
    is_now = str(float(REFUSED[name])) if name == "epochs" else str(REFUSED[name])
    assert f"{name} was " in message
    assert f", is {is_now}" in message
    assert f"What may change when a run is resumed: {', '.join(sorted((*FREE, *ROUNDING)))}." in message
    assert everything(killed) == before


def test_several_changes_are_named_at_once(killed: Path, model: Path, pairs: str):
    with pytest.raises(RunError, match=r"beta was 0.1, is 0.5; seed was 0, is 3\. Give them as they were, or start anew"):
        run("dpo", model, pairs, killed, resume=True, **SAME | {"beta": 0.5, "seed": 3, "max_tokens": 60, "samples": 0})


# Changed data, a changed model, a changed machine.


def test_changed_held_out_data_is_refused(model: Path, pairs: str, tmp_path: Path):
    data = pair_rows()
    held_out = write_rows(tmp_path / "held_out.jsonl", data[:4])
    out = tmp_path / "run"
    stopped_at(2, model, pairs, out, eval_data=held_out)
    data[1]["chosen"] += "!"
    write_rows(tmp_path / "held_out.jsonl", data[:4])
    with pytest.raises(RunError, match=r"the held-out data is not what .*step-000002 was evaluated on.*Give the same eval_data"):
        run("dpo", model, pairs, out, eval_data=held_out, resume=True)
    with pytest.raises(RunError, match="the held-out data is not what"):
        run("dpo", model, pairs, out, resume=True)
    same = write_rows(tmp_path / "same.jsonl", pair_rows()[:4])
    assert run("dpo", model, pairs, out, eval_data=same, resume=True).summary["steps"] == 6


def test_held_out_examples_keep_their_figures_when_their_file_gets_another_name(model: Path, pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    stopped_at(2, model, pairs, out, eval_data=write_rows(tmp_path / "held_out.jsonl", pair_rows()[:4]))
    before = [line["before"] for line in read_lines(out / "held_out.jsonl")]
    run("dpo", model, pairs, out, eval_data=write_rows(tmp_path / "renamed.jsonl", pair_rows()[:4]), resume=True)
    assert [line["before"] for line in read_lines(out / "held_out.jsonl")] == before
    assert all(before)


def test_a_changed_model_is_refused(model: Path, make_model: Callable[..., Any], pairs: str, tmp_path: Path):
    """The weights come from the checkpoint, but the reference, and what an adapter lies on, would be those of another model."""
    mine = Path(shutil.copytree(model, tmp_path / "model"))
    for lora_rank in (0, 2):
        out = tmp_path / f"run-{lora_rank}"
        stopped_at(2, mine, pairs, out, lora_rank=lora_rank)
        make_model(seed=5).save_pretrained(mine)
        with pytest.raises(RunError, match=rf"the model {mine} has changed since .*step-000002 was begun from it"):
            run("dpo", mine, pairs, out, resume=True, lora_rank=lora_rank)
        shutil.copytree(model, mine, dirs_exist_ok=True)
        assert run("dpo", mine, pairs, out, resume=True, lora_rank=lora_rank).summary["steps"] == 6


def test_another_number_of_threads_and_another_version_are_noted(
    folders: tuple[Path, Path], killed: Path, model: Path, pairs: str, monkeypatch: pytest.MonkeyPatch
):
    same = SAME | {"cache_dir": folders[0].parent / "cache"}

    def stop_after(step: int) -> list[str]:
        with pytest.raises(RunStopped):
            run("dpo", model, pairs, killed, callbacks=[StopAfter(step)], resume=True, **same)
        differences: list[str] = manifest_of(killed)["resumed"][-1]["differences"]
        return differences

    found = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "9.9" if name == "torch" else found(name))
    torch.set_num_threads(2)
    try:
        there = ["device was CPU (1 threads), is CPU (2 threads)", "num_threads was 1, is 2", f"torch was {found('torch')}, is 9.9"]
        assert stop_after(5) == there
        assert stop_after(6) == []  # as in the piece before, whatever it was in the first
    finally:
        torch.set_num_threads(1)
    monkeypatch.undo()
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, killed, narrator=narrator, resume=True, **same)
    back = ["device was CPU (2 threads), is CPU (1 threads)", "num_threads was 2, is 1", f"torch was 9.9, is {found('torch')}"]
    assert [entry["differences"] for entry in manifest_of(killed)["resumed"]] == [there, [], back]
    assert any(line.startswith(f"note: {'; '.join(back)}. From here on") for line in narrator.said)


def test_reference_values_computed_in_another_order_are_noted(model: Path, pairs: str, tmp_path: Path):
    """The cache that served the beginning of a run was filled by another one, and is gone: the values differ in their last bits."""
    stopped_at(2, model, pairs, tmp_path / "run")
    [path] = (tmp_path / "cache").rglob("*.sqlite")
    with sqlite3.connect(path) as connection:
        for key, value in connection.execute("SELECT key, value FROM logps").fetchall():
            other = np.nextafter(np.frombuffer(value, np.float32), np.float32(0)).tobytes()
            connection.execute(
                "UPDATE logps SET value = ?, checksum = ? WHERE key = ?", (other, xxhash.xxh3_64_intdigest(other) - 2**63, key)
            )
    connection.close()
    run("dpo", model, pairs, tmp_path / "run", resume=True)
    assert manifest_of(tmp_path / "run")["resumed"][0]["differences"] == ["the reference's values were computed anew, in another order"]


class StopAfter(prefopt.Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_start(self, run: RunStart) -> None:
        self.stop = run.stop

    def on_step(self, row: Mapping[str, float]) -> None:
        if row["step"] == self.step:
            self.stop()


def stopped_at(step: int, model: Path, data: str, out: Path, **settings: Any) -> None:
    with pytest.raises(RunStopped, match=f"stopped after step {step} "):
        run("dpo", model, data, out, callbacks=[StopAfter(step)], **settings)


# A run that has finished.


def test_a_finished_run_is_not_touched(folders: tuple[Path, Path], model: Path, pairs: str, tmp_path: Path):
    out = Path(shutil.copytree(folders[0], tmp_path / "run"))
    before = everything(out)
    calls: list[str] = []

    class Listener(prefopt.Callback):
        def on_start(self, run: RunStart) -> None:
            calls.append("start")

        def on_end(self, summary: Mapping[str, Any]) -> None:
            calls.append("end")

    narrator = Asks(lambda done: None)
    for changed in ({}, {"early_stop": 1}, {"eval_every_steps": 1, "samples": 0}):
        result = run("dpo", model, pairs, out, narrator=narrator, callbacks=[Listener()], resume=True, **SAME | changed)
        assert result.summary == json.loads((out / "summary.json").read_text())
        assert result.model_dir == out / "model"
        assert everything(out) == before
    assert calls == []
    assert narrator.said.count(f"this run has finished before, and stays as it is: {out}") == 3


@pytest.mark.parametrize("lost", ["model", "summary.json", "status.json"])
def test_what_is_missing_of_a_finished_run_is_made_again(folders: tuple[Path, Path], model: Path, pairs: str, tmp_path: Path, lost: str):
    out = Path(shutil.copytree(folders[0], tmp_path / "run"))
    (shutil.rmtree if lost == "model" else Path.unlink)(out / lost)
    run("dpo", model, pairs, out, resume=True, **SAME)
    assert weights(out) == weights(folders[0])
    assert figures(out) == figures(folders[0])
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out, folders[0]))
    assert {name: summary[name] for name in ("steps", "loss", "after", "best", "watch")} == {
        name: expected[name] for name in ("steps", "loss", "after", "best", "watch")
    }


def test_what_ended_early_may_go_on_without(model: Path, pairs: str, tmp_path: Path, server: Server):
    """The summary of the early end is not taken for that of the later one, whenever the run is killed."""
    settings = {"eval_fraction": 0.33, "epochs": 6, "eval_every_steps": 1, "learning_rate": 0.1}
    out = tmp_path / "run"
    ended = run("dpo", model, pairs, out, early_stop=2, **settings).summary
    assert ended["steps"] < ended["num_steps"] == 14
    again = run("dpo", model, pairs, out, early_stop=2, resume=True, **settings).summary
    assert again == json.loads((out / "summary.json").read_text())
    words = flags("dpo", model, pairs, out, resume=True, **settings)
    assert server.start(words, blow=Blow(r"open run/\.model\.new/config.json")).wait() == -9
    summary = run("dpo", model, pairs, out, resume=True, **settings).summary
    assert (summary["steps"], summary["model_step"]) == (14, 14)
    run("dpo", model, pairs, tmp_path / "whole", **settings)
    assert figures(out) == figures(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


# The same run again.


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4, "learning_rate": 1e-2}, {"method": "sft"}], ids=["full", "lora", "sft"])
def test_its_config_gives_the_same_bits_elsewhere(server: Server, model: Path, pairs: str, tmp_path: Path, settings: dict[str, Any]):
    """In a process of its own, by the command line, with nothing but the file; the caches are empty there."""
    method = settings.get("method", "dpo")
    own = {name: value for name, value in settings.items() if name != "method"}
    run(method, model, pairs, tmp_path / "first", **SAME | own)
    for place, cache in enumerate((tmp_path / "cache", tmp_path / "other" / "cache")):
        out = tmp_path / "again" / str(place)
        server.run(["train", "--config", str(tmp_path / "first" / "config.yaml"), "--out", str(out), "--cache-dir", str(cache)])
        assert figures(out) == figures(tmp_path / "first")
        assert weights(out) == weights(tmp_path / "first")
        for name in ("held_out.jsonl", "samples.jsonl", "watch.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
        first, second = (without_times(manifest_of(folder)) for folder in (tmp_path / "first", out))
        assert second["settings"].pop("cache_dir") == str(cache)
        first["settings"].pop("cache_dir")
        assert second == first
        written, rewritten = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (tmp_path / "first", out))
        assert rewritten == written | {"out": str(out), "cache_dir": str(cache)}


def without_times(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest, without what differs from start to start."""
    del manifest["started"], manifest["settings"]["out"]
    summary = manifest["data"]["summary"]
    for name in ("seconds", "rows_per_second", "from_cache"):
        del summary[name]
    return manifest


def test_resume_and_overwrite_exclude_each_other(killed: Path, model: Path, pairs: str):
    before = everything(killed)
    with pytest.raises(ConfigError, match="resume and overwrite exclude each other"):
        train_with("dpo", narrator=Quiet(), model=str(model), data=pairs, out=killed, resume=True, overwrite=True)
    assert everything(killed) == before
