"""`prefopt train --config RUN/manifest.json`: the same run again, with what was chosen for it, on the same examples and weights."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command_line import Said, prefopt
from tests.training.runs import figures, pair_rows, weights, write_rows
from tests.training.test_same_start import scale_every_other

from prefopt.errors import ConfigError
from prefopt.training.record.again import read_config
from prefopt.training.record.manifest import absolute_paths
from prefopt.training.settings import RunSettings

SMALL = "--batch-size 4 --max-length 4096 --device cpu --samples 0 --report off --memory-check off --max-steps 4 --eval-fraction 0.3"
"""Learning rate, precision and length are left to be chosen."""


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder()


@pytest.fixture(autouse=True)
def elsewhere(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model and pairs, named by relative paths, in which the run is started."""
    shutil.copytree(model, tmp_path / "here" / "model")
    write_rows(tmp_path / "here" / "pairs.jsonl", pair_rows())
    monkeypatch.chdir(tmp_path / "here")


def first(*words: str) -> Said:
    said = prefopt(
        "train", "dpo", "--model", "model", "--data", "pairs.jsonl", "--out", "run", "--cache-dir", "cache", *SMALL.split(), *words
    )
    assert said.code == 0, said.err
    return said


def again(manifest: Path | str, *words: str) -> Said:
    return prefopt("train", "--config", str(manifest), *words)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("words", [(), ("--lora-rank", "2"), ("--reference", "model", "--reference-cache", "off")])
def test_the_same_bits_come_out_wherever_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]):
    first(*words)
    was = read(Path("run/manifest.json"))
    assert was["settings"]["learning_rate"] is None
    monkeypatch.chdir(tmp_path)
    said = again("here/run/manifest.json", "--out", "second", "--cache-dir", "other")
    assert said.code == 0, said.err
    assert weights(tmp_path / "second") == weights(tmp_path / "here" / "run")
    assert figures(tmp_path / "second") == figures(tmp_path / "here" / "run")
    now = read(tmp_path / "second" / "manifest.json")
    assert now["resolved"] == was["resolved"]
    assert now["settings"]["learning_rate"] == was["resolved"]["learning_rate"]
    assert now["settings"]["data"] == [str(tmp_path / "here" / "pairs.jsonl")]
    assert now["settings"]["precision"] in ("bf16", "float32")
    assert "last digits" not in said.err
    assert "was run with" not in said.err
    # The method may be named too, and must be the right one.
    assert prefopt("train", "dpo", "--config", "here/run/manifest.json", "--out", "third").code == 0
    assert weights(tmp_path / "third") == weights(tmp_path / "second")
    assert "is for the method dpo" in prefopt("train", "sft", "--config", "here/run/manifest.json", "--out", "fourth").err


def change_data() -> None:
    write_rows(Path("pairs.jsonl"), pair_rows(13))


CHANGES: Mapping[str, tuple[Callable[[], object], str]] = {
    "data": (change_data, "the data is not what"),
    "model": (lambda: scale_every_other(Path("model")), "model is not what"),
    "reference": (lambda: scale_every_other(Path("reference")), "reference is not what"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_content_is_refused(what: str):
    """The files have the names that they had, and the config.yaml would take them."""
    shutil.copytree("model", "reference")
    first("--reference", "reference")
    change, says = CHANGES[what]
    change()
    said = again("run/manifest.json", "--out", "second")
    assert said.code == 2
    assert says in said.err
    assert "run/config.yaml, which asks for no content" in " ".join(said.err.split())
    assert not list(Path("second").glob("*.json*"))


def test_what_is_replaced_on_purpose_is_only_noted():
    first()
    change_data()
    said = again("run/manifest.json", "--data", "pairs.jsonl", "--out", "second")
    assert said.code == 0, said.err
    assert "note: the data is not what run/manifest.json was run with (data given beside it)" in said.err
    said = again("run/manifest.json", "--epochs", "2", "--out", "third")
    assert "the data is not what" in said.err
    assert said.code == 2


def test_another_machine_is_noted():
    first()
    torch.set_num_threads(2)
    try:
        said = again("run/manifest.json", "--out", "second")
    finally:
        torch.set_num_threads(1)
    assert said.code == 0, said.err
    assert "note: device was CPU (1 threads), is CPU (2 threads); num_threads was 1, is 2. The figures may differ from those of" in said.err


def test_a_run_goes_on_from_its_own_manifest_or_from_that_of_another():
    first("--save-every-steps", "2")
    shutil.copytree("run", "whole")

    def lose_the_end(folder: str) -> None:
        shutil.rmtree(f"{folder}/model")
        shutil.rmtree(f"{folder}/checkpoints/step-000004")
        Path(folder, "summary.json").unlink()

    lose_the_end("run")
    said = again("run/manifest.json", "--resume")
    assert said.code == 0, said.err
    assert "2 of 4 steps are done" in said.err
    assert weights(Path("run")) == weights(Path("whole"))
    assert again("run/manifest.json", "--out", "second").code == 0
    lose_the_end("second")
    said = again("run/manifest.json", "--out", "second", "--resume")
    assert said.code == 0, said.err
    assert weights(Path("second")) == weights(Path("whole"))


def test_its_own_folder_is_not_written_over_by_accident():
    first()
    said = again("run/manifest.json")
    assert said.code == 2
    assert "is not empty" in said.err


@pytest.mark.parametrize("name", ["settings", "resolved", "model", "data", "environment"])
def test_a_damaged_manifest_says_so(name: str):
    first()
    manifest = read(Path("run/manifest.json"))
    for value in ({}, [], None, "text"):
        Path("m.json").write_text(json.dumps(manifest | {name: value}))
        said = again("m.json", "--out", "second")
        assert said.code == 2
        assert "Traceback" not in said.err
        assert "m.json is damaged: it lacks what is needed to run it again" in " ".join(said.err.split())
    with pytest.raises(ConfigError):
        read_config(Path("nowhere.json"))


def test_only_what_is_relative_and_there_is_kept_as_a_path(tmp_path: Path):
    here = tmp_path / "here"
    made = RunSettings(
        model="model", data=["pairs.jsonl", "org/name", "-", str(here / "pairs.jsonl")], out=Path("o"), chat_template="{{ x }}"
    )
    assert absolute_paths(made) == {
        "model": str(here / "model"),
        "data": [str(here / "pairs.jsonl"), "org/name", "-", str(here / "pairs.jsonl")],
        "out": str(here / "o"),
    }
    assert absolute_paths(RunSettings(model="org/name", data=["~/a.jsonl"], out=tmp_path)) == {}
