"""`prefopt train`: what reaches the training room, and what is said when it cannot."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import prefopt
from prefopt.cli import main
from prefopt.config import check
from prefopt.errors import ConfigError
from prefopt.training.assemble import method_named, settings_for
from prefopt.training.settings import RunSettings

REQUIRED = ["--model", "m", "--data", "a.jsonl", "--out", "o"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, RunSettings]]:
    """What would have been trained, in place of training."""
    runs: list[tuple[Any, RunSettings]] = []
    module = ModuleType("prefopt.training.run")
    module.train = lambda method, settings, callbacks=(), again=None: runs.append((method, settings))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prefopt.training.run", module)
    return runs


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What would have been run in stages."""
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    module = ModuleType("prefopt.pipeline.stages")
    module.run_stages = lambda values, overrides: runs.append((values, overrides))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prefopt.pipeline.stages", module)
    return runs


def config(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_flags_become_settings(trained: list[Any]):
    flags = "--beta 0.2 --batch-size 8 --learning-rate 5e-7 --lr-schedule linear --target-modules q v --lora-rank 4 --resume"
    assert main(["train", "dpo", *REQUIRED, *flags.split()]) == 0
    [(method, settings)] = trained
    assert method == "dpo"
    assert isinstance(settings, RunSettings)
    given = {
        "beta": 0.2,
        "batch_size": 8,
        "learning_rate": 5e-7,
        "lr_schedule": "linear",
        "target_modules": ["q", "v"],
        "lora_rank": 4,
        "resume": True,
    }
    assert settings.model_dump(include=set(given)) == given
    assert (settings.model, settings.data, settings.out, settings.seed) == ("m", ["a.jsonl"], Path("o"), 0)


@pytest.mark.parametrize(("word", "value"), [("on", True), ("off", False), ("true", True), ("false", False)])
@pytest.mark.parametrize("name", ["keep_best", "reference_cache"])
def test_switches_take_on_and_off(trained: list[Any], name: str, word: str, value: bool):
    assert main(["train", "dpo", *REQUIRED, "--" + name.replace("_", "-"), word]) == 0
    assert getattr(trained[0][1], name) is value


@pytest.mark.parametrize(
    ("words", "value"), [((), "on"), (("on",), "on"), (("off",), "off"), (("auto",), "auto"), (("3",), 3), (("false",), "off")]
)
def test_gradient_checkpointing_is_a_switch_or_a_number_of_layers(trained: list[Any], words: tuple[str, ...], value: Any):
    assert main(["train", "dpo", *REQUIRED, "--gradient-checkpointing", *words]) == 0
    assert trained[0][1].gradient_checkpointing == value


def test_flags_win_over_the_file(trained: list[Any], tmp_path: Path):
    path = config(tmp_path, "model: m\ndata: a.jsonl\nout: o\nbeta: 0.3\nbatch-size: 16\nlearning_rate: 5e-7\n")
    assert main(["train", "dpo", "--config", path, "--batch-size", "4", "--data", "b", "c"]) == 0
    settings = trained[0][1]
    assert (settings.batch_size, settings.data, settings.learning_rate, settings.beta) == (4, ["b", "c"], 5e-7, 0.3)


def test_the_file_may_name_the_method(trained: list[Any], tmp_path: Path):
    path = config(tmp_path, "method: dpo\nmodel: m\ndata: a.jsonl\nout: o\n")
    assert main(["train", "--seed", "5", "--config", path]) == 0
    assert main(["train", "dpo", "--config", path]) == 0
    assert [(method, settings.seed) for method, settings in trained] == [("dpo", 5), ("dpo", 0)]


def test_all_mistakes_come_at_once_each_as_it_was_written(trained: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = config(tmp_path, "data: a.jsonl\nout: o\nlabel_smothing: 0.1\nepochs: -1\n")
    said = refused(
        capsys, "train", "dpo", "--config", path, "--betta", "3", "--learning-rate", "-1", "--batch-size", "--lr-schedule", "sine", "x"
    )
    assert said.splitlines() == [
        f"prefopt: 8 mistakes in {path} and the command line:",
        "  --model: is required, and was not given (Folder or hub name of the model that training starts from.)",
        "  epochs: must be greater than 0 (given: -1)",
        "  --learning-rate: must be greater than 0 (given: -1)",
        "  --lr-schedule: must be cosine, linear or constant (given: sine)",
        "  label_smothing: no such setting (did you mean label_smoothing?)",
        "  --batch-size: needs a value (Examples (a pair is one) per optimizer step, however the work is cut.)",
        "  --betta: no such flag (did you mean --beta?)",
        "  x: belongs to no flag",
    ]
    assert trained == []


def test_a_setting_of_another_method_is_no_setting(capsys: pytest.CaptureFixture[str]):
    assert "--beta: no such flag (a setting of dpo, ipo, " in refused(capsys, "train", "sft", *REQUIRED, "--beta", "0.1")
    said = refused(capsys, "train", "ipo", *REQUIRED, "--ld-alpha", "0.1")
    assert "--ld-alpha: no such flag (a setting of dpo, robust, hinge, exo, discopop)" in said
    with pytest.raises(ConfigError, match=r"  penalty: no such setting \(a setting of dpop\)"):
        check(settings_for(method_named("dpo")), {"model": "m", "data": "d", "out": "o", "penalty": 3})


def test_a_method_of_another_name_says_what_it_is_here(capsys: pytest.CaptureFixture[str]):
    assert "cDPO: is called dpo with label_smoothing here" in refused(capsys, "train", "cDPO", *REQUIRED)


def test_settings_at_odds_are_refused(capsys: pytest.CaptureFixture[str]):
    assert "give lora_rank too" in refused(capsys, "train", "dpo", *REQUIRED, "--lora-alpha", "3")


def test_stages_get_the_file_and_the_flags(staged: list[Any], tmp_path: Path):
    path = config(tmp_path, "stages: [sft, dpo]\ndata: a.jsonl\nout: o\nseed: 1\ndpo:\n  label-smoothing: 0.3\n")
    assert main(["train", "--config", path, "--seed", "2", "--data", "b", "--resume", "--beta", "0.2"]) == 0
    in_file = {"stages": ["sft", "dpo"], "data": "a.jsonl", "out": "o", "seed": 1, "dpo": {"label_smoothing": 0.3}}
    assert staged == [(in_file, {"seed": "2", "data": ["b"], "resume": True, "beta": "0.2"})]


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (None, [], "name a method (sft, dpo"),
        (None, ["dppo", "--model", "m"], "dppo: no such method (did you mean dpo?)"),
        (None, ["zzz"], "zzz: no such method. Methods: sft, dpo"),
        ("seed: 1\n", [], "must say what to run"),
        ("stages: [sft]\nmethod: dpo\n", [], "must say what to run"),
        ("method: dppo\n", [], "dppo: no such method (did you mean dpo?)"),
        ("stages: [sft, dpo]\n", ["dpo"], "runs stages, not one method"),
        ("method: sft\n", ["dpo"], "is for the method sft, and the command says dpo"),
        ("stages: [sft]\n", ["--sead", "3"], "--sead: no such flag (did you mean --seed?)"),
    ],
)
def test_what_to_run_must_be_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, words: list[str], says: str):
    file = [] if text is None else ["--config", config(tmp_path, text)]
    assert says in refused(capsys, "train", *words, *file)


def test_a_missing_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = str(tmp_path / "none.yaml")
    assert "cannot read the config" in refused(capsys, "train", "--config", missing)
    assert "cannot read the config" in refused(capsys, "train", "dpo", "--config", missing)


def test_python_takes_the_same_settings(trained: list[Any]):
    prefopt.train("dpo", model=Path("m"), data="a.jsonl", out=Path("o"), beta=0.2, reference_cache=False)
    [(method, settings)] = trained
    assert (method, settings.model, settings.data, settings.beta, settings.reference_cache) == ("dpo", "m", ["a.jsonl"], 0.2, False)


def test_python_gets_the_same_errors(trained: list[Any]):
    with pytest.raises(ConfigError) as caught:
        prefopt.train("dpo", model="m", data="a", out="o", betta=1, batch_size=0)
    assert str(caught.value).splitlines() == [
        "2 mistakes in the settings given to prefopt.train:",
        "  batch_size: must be greater than or equal to 1 (given: 0)",
        "  betta: no such setting (did you mean beta?)",
    ]
    with pytest.raises(ConfigError, match="did you mean dpo"):
        prefopt.train("dppo", model="m", data="a", out="o")
