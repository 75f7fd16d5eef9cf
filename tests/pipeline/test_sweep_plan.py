"""Which runs a sweep comes to, and every way in which it can be asked for wrongly; nothing runs here."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import refused

from prefopt.errors import ConfigError
from prefopt.pipeline.sweep.plan import NOT_SWEPT, SweepPlan, folder_name, plan_sweep, takes_several
from prefopt.training.assemble import method_named, settings_for

SHARED: dict[str, Any] = {"model": "m", "data": "d.jsonl", "out": "runs/s", "eval_fraction": 0.1}


def plan(sweep: dict[str, Any], method: str = "dpo", **values: Any) -> SweepPlan:
    return plan_sweep(method, sweep, SHARED | values)


def test_each_value_is_a_run_with_a_folder_of_its_own():
    found = plan({"beta": ["0.05", " 0.1", "1"]}, epochs=2)
    assert [run.name for run in found.runs] == ["beta-0.05", "beta-0.1", "beta-1"]
    assert [run.settings.beta for run in found.runs] == [0.05, 0.1, 1.0]
    assert [run.settings.out for run in found.runs] == [Path("runs/s") / run.name for run in found.runs]
    assert {run.settings.epochs for run in found.runs} == {2.0}
    assert found.swept == {"beta": (0.05, 0.1, 1.0)}


def test_several_settings_make_a_grid_whose_last_one_changes_fastest():
    found = plan({"beta": [0.1, 0.3], "learning_rate": ["1e-6", "5e-06"]})
    assert [(run.settings.beta, run.settings.learning_rate) for run in found.runs] == [(0.1, 1e-6), (0.1, 5e-6), (0.3, 1e-6), (0.3, 5e-6)]
    assert [run.name for run in found.runs][1:3] == ["beta-0.1_learning-rate-5e-6", "beta-0.3_learning-rate-1e-6"]


def test_values_need_not_be_numbers():
    found = plan({"lr_schedule": ["cosine", "constant"], "gradient_checkpointing": ["on", False]})
    assert [run.name for run in found.runs] == [
        f"lr-schedule-{schedule}_gradient-checkpointing-{switch}" for schedule in ("cosine", "constant") for switch in ("on", "off")
    ]
    assert [run.settings.gradient_checkpointing for run in found.runs] == ["on", "off", "on", "off"]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        *((0.1, "x-0.1"), (1e-6, "x-1e-6"), (5e-07, "x-5e-7"), (1.0, "x-1"), (1e30, "x-1e30"), (0.1 + 0.2, "x-0.30000000000000004")),
        *((True, "x-on"), (None, "x-none"), (3, "x-3"), ("a/../b c", "x-a-..-b-c")),
    ],
)
def test_names_of_folders_can_be_read_and_typed(value: Any, name: str):
    assert folder_name({"x": value}) == name


def test_another_method_has_other_settings():
    assert [run.settings.epochs for run in plan({"epochs": [1, 2]}, method="sft").runs] == [1.0, 2.0]
    with pytest.raises(ConfigError, match="beta: no such setting"):
        plan({"beta": [0.1]}, method="sft")


def test_home_is_understood(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert plan({"beta": [0.1]}, out="~/s").runs[0].settings.out == Path("/home/me/s/beta-0.1")


def test_how_it_starts_is_the_sweep_s_business_and_not_its_runs():
    found = plan({"beta": [0.1]}, resume=True)
    assert found.resume
    assert not found.runs[0].settings.resume


@pytest.mark.parametrize(
    ("sweep", "values", "says"),
    [
        ({}, {}, "nothing is swept: give a setting and its values, as beta=0.05,0.1,0.3"),
        ({"betta": ["1"]}, {}, r"betta: no such setting \(did you mean beta\?\)"),
        (
            {"beta": ["-1", "0.1", "x"]},
            {},
            r"(?s)2 mistakes.*beta: must be greater than 0 \(given: -1\).*beta: must be a number \(given: x\)",
        ),
        ({"beta": ["0.1", "0.10"]}, {}, "beta: 0.1 and 0.10 are the same value: give it once"),
        ({"beta": ["0.1", "0.1"]}, {}, "beta: 0.1 is given twice: give it once"),
        ({"beta": ["0.1", ""]}, {}, r"beta: one of its values is empty \(given: 0.1, \)"),
        ({"beta": []}, {}, r"beta: needs a list of values, as \[0.05, 0.1\] \(given: \[\]\)"),
        ({"beta": 0.1}, {}, r"beta: needs a list of values"),
        ({"beta": [0.1]}, {"beta": 0.2}, "beta: is swept, and beta gives it a value as well: leave one of the two out"),
        ({"out": ["a", "b"]}, {}, "out: cannot be swept: it is the folder of the sweep"),
        ({"model": ["a", "b"]}, {}, "model: cannot be swept: it is what margins and KL are measured from"),
        ({"max_length": [64, 128]}, {}, "max_length: cannot be swept: it decides what the examples are"),
        (
            {"load_in_4bit": ["on", "off"]},
            {"lora_rank": 8},
            "load_in_4bit: cannot be swept: it decides how the start and its ref",
        ),
        ({"precision": ["bf16", "float32"]}, {}, "precision: cannot be swept: it decides how the start and its reference are"),
        ({"optim": ["adamw", "adamw-bf16"]}, {}, "optim: adamw-bf16 starts from the model rounded to bf16, and so does its reference"),
        ({"beta": [0.1, 1], "optim": ["adamw-bf16", "adamw-8bit"]}, {}, "optim: adamw-bf16 starts from the model rounded to bf16"),
        ({"lora_rank": [0, 8]}, {}, "lora_rank: 0 trains all weights, .* Sweep ranks above 0, or give precision float32"),
        ({"plackett_luce": ["on", "off"]}, {}, "plackett_luce: cannot be swept: it decides what the examples are"),
        ({"target_modules": ["a", "b"]}, {}, "target_modules: cannot be swept: it takes several values in one run"),
        ({"samples": ["1", "2"]}, {}, "samples: cannot be swept: it changes what is noted of a run"),
        ({"seed": ["1", "2"]}, {}, "seed: cannot be swept beside eval_fraction, because it also draws which examples are held out"),
        ({"beta": [0.1]}, {"eval_fraction": 0}, r"eval_fraction: a sweep compares its runs on held-out examples, and nothing is held out"),
        ({"sync_reference_weight": [0.5, 1]}, {}, "sync_reference_weight: cannot be swept: it is what margins and KL are measured from"),
        ({"beta": [0.1]}, {"sync_reference_every_steps": 8}, "with a reference that follows the policy each run would measure them from"),
        ({"beta": [0.1]}, {"data": "-"}, "data: standard input .* put it into a file"),
        ({"beta": [0.1]}, {"epochs": -1, "batchsize": 2}, r"(?s)2 mistakes.*epochs: must be.*batchsize: no such setting"),
        ({"beta": [0.1]}, {"max_runs": 0}, "max_runs: must be greater than or equal to 1"),
        ({"early_stop": [1, 2]}, {}, "early_stop looks at the held-out loss on the way: give eval_every_steps too"),
        (
            {"beta": [index / 50 for index in range(1, 41)], "epochs": [1, 2, 3, 4, 5]},
            {},
            r"200 runs \(40 of beta x 5 of epochs\), and max_runs is 64\. .* allow so many with max_runs 200",
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(sweep: dict[str, Any], values: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        plan(sweep, **values)


def test_all_mistakes_are_told_at_once_and_each_once():
    sweep = {"betta": ["1"], "beta": ["-1", "0.1"], "learning_rate": ["x", "y"], "out": ["o"]}
    with pytest.raises(ConfigError) as caught:
        plan_sweep("dpo", sweep, {"eval_fraction": 0.1, "batchsize": 3})
    lines = str(caught.value).splitlines()
    assert lines[0] == "9 mistakes in the settings:"
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == sorted(
        ["betta", "out", "beta", "learning_rate", "learning_rate", "model", "data", "out", "batchsize"]
    )


def test_many_runs_can_be_asked_for():
    assert len(plan({"beta": [index / 100 for index in range(1, 101)]}, max_runs=100).runs) == 100


def test_a_seed_may_be_swept_where_it_draws_no_held_out_examples():
    found = plan_sweep("dpo", {"seed": [0, 1]}, {"model": "m", "data": "d", "out": "o", "eval_data": "e"})
    assert [run.settings.seed for run in found.runs] == [0, 1]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_every_setting_is_swept_or_refused_with_a_reason(method: str):
    """What is refused is there: a setting that was renamed would otherwise be swept unnoticed."""
    fields = settings_for(method_named(method)).model_fields
    of_some = {
        "score",
        "reference",
        "sync_reference_every_steps",
        "sync_reference_weight",
        "kl_budget",
        "pairs_of_ranks",
    }
    assert {name for name in NOT_SWEPT if name not in fields} <= of_some
    swept = {name for name, info in fields.items() if name not in NOT_SWEPT and not takes_several(info)}
    assert {"learning_rate", "epochs", "batch_size", "weight_decay", "seed", "optim"} <= swept
    assert {"lora_rank", "lora_alpha", "rslora", "dora"} <= swept  # a new adapter starts as the model itself, whatever its shape
    assert {"load_in_4bit", "precision"}.isdisjoint(swept)


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ({"optim": ["adamw", "adamw-8bit"]}, {}),
        ({"optim": ["adamw-bf16"], "learning_rate": [1e-6, 1e-5]}, {}),
        ({"lora_rank": [8, 16], "rslora": ["on", "off"], "lora_alpha": [8, 16], "dora": ["on", "off"]}, {}),
        ({"lora_rank": [0], "learning_rate": [1e-6, 1e-5]}, {}),
        ({"lora_rank": [0, 8]}, {"precision": "float32"}),
    ],
)
def test_what_leaves_the_start_as_it_is_may_be_swept(sweep: dict[str, Any], values: dict[str, Any]):
    found = plan(sweep, **values)
    assert len(found.runs) == math.prod(map(len, sweep.values()))


def test_planning_does_not_load_torch():
    code = (
        "import sys; from prefopt.pipeline.sweep.plan import plan_sweep; "
        f"plan_sweep('dpo', {{'beta': [0.1]}}, {SHARED}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The words of the command line.

NEEDED = ("--model", "m", "--data", "d.jsonl", "--out", "runs/s", "--eval-fraction", "0.1")


def planned(monkeypatch: pytest.MonkeyPatch, *words: str) -> SweepPlan:
    """What `prefopt sweep WORDS` would run."""
    from prefopt.cli import main

    found: list[SweepPlan] = []
    monkeypatch.setattr("prefopt.pipeline.sweep.run.run_sweep", lambda plan, **_: found.append(plan))
    assert main(["sweep", *words]) == 0
    return found[0]


@pytest.mark.parametrize(
    "words",
    [
        ("dpo", "beta=0.05,0.1", *NEEDED),
        ("beta=0.05,0.1", *NEEDED),
        (*NEEDED, "beta=0.05,0.1"),
        ("beta=0.05,", "0.1", *NEEDED),
        ("beta=0.05", ",0.1", *NEEDED),
        ("beta=0.05, 0.1", *NEEDED),
    ],
)
def test_dpo_is_meant_where_no_method_is_named_and_spaces_do_not_matter(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    found = planned(monkeypatch, *words)
    assert found.method.name == "dpo"
    assert found.swept == {"beta": (0.05, 0.1)}


def test_a_file_says_what_is_swept_and_words_beside_it_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sweep.yaml"
    shared = "method: dpo\nmodel: m\ndata: d\nout: o\neval-fraction: 0.1\nlabel_smoothing: 0.2\n"
    path.write_text(f"{shared}sweep:\n  beta: [0.1, 0.3]\n  batch-size: [8, 16]\n")
    assert planned(monkeypatch, "--config", str(path)).swept == {"beta": (0.1, 0.3), "batch_size": (8, 16)}
    found = planned(monkeypatch, "--config", str(path), "beta=0.5", "label-smoothing=0,0.1")
    assert found.swept == {"beta": (0.5,), "batch_size": (8, 16), "label_smoothing": (0.0, 0.1)}
    assert "betta: no such setting (did you mean beta?)" in refused("sweep", "--config", str(path), "betta=1,2")
    said = refused("sweep", "--config", str(path), "--beta", "0.1")
    assert "beta: is swept, and --beta gives it a value as well" in said


def test_files_of_other_kinds_are_named_as_such(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("stages: [sft, dpo]\nmodel: m\nout: o\n")
    assert "runs stages, which cannot be swept" in refused("sweep", "--config", str(path), "beta=0.1,0.2")
    path.write_text("method: sft\nmodel: m\n")
    assert "is for the method sft, and the command says dpo" in refused("sweep", "dpo", "--config", str(path), "beta=0.1,0.2")
    path.write_text("method: dpo\nsweep: {beta: [0.1]}\n")
    for words in (("--config", str(path)), ("dpo", "--config", str(path))):
        assert f"is for a sweep, not for one run: prefopt sweep --config {path}" in refused("train", *words)
    path.write_text("method: dpo\nsweep: 3\n")
    assert "sweep: must hold settings and their values, as {beta: [0.05, 0.1]} (given: 3)" in refused("sweep", "--config", str(path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("dop", "beta=0.1,0.2"), "dop: no such method (did you mean dpop?)"),
        (("beta=0.1,0.2", "dpo", *NEEDED), "dpo: stands first: prefopt sweep METHOD"),
        (("beta=0.1,0.2", "beta=0.3", *NEEDED), "beta: is swept twice: give all values at once"),
        (("beta=0.1,,0.2", *NEEDED), "beta: one of its values is empty (given: 0.1, , 0.2)"),
        (("beta=", *NEEDED), "beta: one of its values is empty"),
        (("=0.1", *NEEDED), "=0.1: says nothing to sweep"),
        (("beta", *NEEDED), "beta: no such method"),
        ((*NEEDED, "beta"), "beta: says nothing to sweep, as beta=0.05,0.1 does"),
        (("--beta", "0.1,0.3", *NEEDED), "nothing is swept"),
        (("--model", "m", "--out", "o", "--data", "d.jsonl", "beta=0.1,0.2"), "beta=0.1,0.2: stands behind --data, which takes all words"),
        (("beta=0.1,0.2", "--betta", "3", *NEEDED), "--betta: no such flag (did you mean --beta?)"),
        (("beta=0.1,0.2", "--beta", "3", *NEEDED), "beta: is swept, and --beta gives it a value as well"),
        (("beta=0.1,0.2",), "--model: is required"),
        (("beta=0.1,0.2", "--max-runs", "1", *NEEDED), "2 runs (2 of beta), and max_runs is 1"),
    ],
)
def test_words_that_say_nothing_are_refused(words: tuple[str, ...], says: str):
    assert says in refused("sweep", *words)
