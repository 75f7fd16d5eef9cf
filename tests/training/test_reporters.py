"""What TensorBoard, Weights & Biases and MLflow are told of a run."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import ConfigError, RunStopped
from prefopt.training.record import reporters
from prefopt.training.record.callbacks import Callback, RunStart
from prefopt.training.record.folder import RunFolder
from prefopt.training.record.reporters import flat, make_reporters
from prefopt.training.watching.watched import Finding

MANIFEST = {
    "method": "dpo",
    "settings": {"beta": 0.1, "data": ["pairs.jsonl"], "lora_rank": 8},
    "resolved": {"learning_rate": 1e-5},
    "model": {"name": "m", "adapter": True},
}
FINDING = Finding("kl_budget", 2, "warning", "The KL is 40 nats.", "Raise beta.", {"kl": 40.0})
SAMPLE = {"step": 2, "row": "pairs.jsonl:3", "prompt": "Is <b>it</b> good?", "text": " yes *it* is", "num_tokens": 4}


def row(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "rewards/margin": 2 * loss, "eval/loss": loss + 1}


def start(folder: Path, step: int = 0) -> RunStart:
    return RunStart(folder, MANIFEST, step, lambda: None)


def go_through(reporter: Callback, folder: Path, rows: list[dict[str, float]], *, step: int = 0, end: BaseException | None = None) -> None:
    """A run of those rows, with a sample and a finding after the second."""
    reporter.on_start(start(folder, step))
    for each in rows:
        if each["step"] == 2:
            reporter.on_samples([SAMPLE])
        reporter.on_step(each)
        if each["step"] == 2:
            reporter.on_finding(FINDING)
    if end is None:
        reporter.on_end({"steps": rows[-1]["step"], "last_step": rows[-1], "after": {"eval/loss": 0.5}})
    else:
        reporter.on_failure(end)


def test_none_are_made_unasked(tmp_path: Path):
    assert make_reporters([], tmp_path) == []


def test_unknown_names_and_missing_libraries_end_the_run_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"there is no neptune\. There are: tensorboard, wandb, mlflow"):
        make_reporters(["neptune"], tmp_path)
    for name, module in (("wandb", "wandb"), ("mlflow", "mlflow.tracking"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(ConfigError, match=rf"{name} was asked for and is not installed.*pip install 'prefopt\[{name}\]'"):
            make_reporters([name], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_broken_is_named_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(name: str) -> Any:
        raise TypeError("descriptors cannot be created directly")

    monkeypatch.setattr(reporters.importlib, "import_module", broken)
    with pytest.raises(ConfigError, match=r"wandb was asked for and cannot be imported \(descriptors cannot be created directly\)"):
        make_reporters(["wandb"], tmp_path)


class Events:
    """What TensorBoard reads in a folder."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()

    def scalars(self, name: str) -> list[tuple[int, float]]:
        return [(event.step, round(event.value, 4)) for event in self.found.Scalars(name)]

    def text(self, name: str) -> tuple[int, str]:
        event = self.found.Tensors(f"{name}/text_summary")[0]
        return event.step, event.tensor_proto.string_val[0].decode()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_has_the_figures_the_answers_and_what_the_watch_said(tmp_path: Path):
    (reporter,) = make_reporters(["tensorboard", "tensorboard"], tmp_path)
    go_through(reporter, tmp_path, [row(1, 0.7), row(2, 0.6), row(3, 0.5)])
    events = Events(tmp_path / "tensorboard")
    assert events.scalars("loss") == [(1, 0.7), (2, 0.6), (3, 0.5)]
    assert events.scalars("eval/loss") == [(1, 1.7), (2, 1.6), (3, 1.5)]
    assert "step" not in events.found.Tags()["scalars"]
    assert events.text("samples/pairs.jsonl:3") == (2, "    Is <b>it</b> good?\n\n**answer**\n\n     yes *it* is")
    assert events.text("watch/kl_budget") == (2, "warning: The KL is 40 nats.\n\nRaise beta.")
    assert json.loads(events.text("manifest")[1]) == MANIFEST
    hparams = events.found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"lora_rank" in hparams


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_forgets_the_steps_that_a_resumed_run_makes_again(tmp_path: Path):
    go_through(make_reporters(["tensorboard"], tmp_path)[0], tmp_path, [row(1, 0.7), row(2, 0.6), row(3, 9.0)], end=RuntimeError("killed"))
    go_through(make_reporters(["tensorboard"], tmp_path)[0], tmp_path, [row(3, 0.5), row(4, 0.4)], step=2)
    assert Events(tmp_path / "tensorboard").scalars("loss") == [(1, 0.7), (2, 0.6), (3, 0.5), (4, 0.4)]
    go_through(make_reporters(["tensorboard"], tmp_path)[0], tmp_path, [row(1, 0.1)])  # another run, in place of that one
    assert Events(tmp_path / "tensorboard").scalars("loss") == [(1, 0.1)]


def test_a_new_run_in_the_same_folder_goes_on_with_nothing_of_the_old_one(tmp_path: Path):
    (tmp_path / "mlflow-run-id").write_text("run-1")
    for name in ("tensorboard", "wandb", "mlruns", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    RunFolder(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


class FakeWandB(types.ModuleType):
    """Takes down what it is told. `fails`: calls of init that fail first; `key`: that the user has logged in with."""

    def __init__(self, *, fails: int = 0, first_step: int = 0, key: str | None = "k") -> None:
        super().__init__("wandb")
        self.fails, self.first_step, self.key = fails, first_step, key
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.ended: list[int] = []
        self.summary: dict[str, Any] = {}

    def login(self, *, prompt: bool = True) -> bool:
        assert self.key is not None or not prompt, "it would ask, and wait for ever"
        return self.key is not None

    def Settings(self, **given: Any) -> dict[str, Any]:  # noqa: N802  # its name there
        return given

    def Table(self, **given: Any) -> dict[str, Any]:  # noqa: N802
        return given

    def teardown(self) -> None:
        if self.inits:
            self.inits[-1]["torn down"] = True

    def init(self, **given: Any) -> Any:
        self.inits.append(given)
        if len(self.inits) <= self.fails:
            raise OSError("No API key configured. Use `wandb login` to log in.")
        run = types.SimpleNamespace(step=self.first_step, summary=self.summary)
        run.log = lambda values, step: self.logged.append((step, values))
        run.finish = lambda **given: self.ended.append(given["exit_code"])
        return run


@pytest.fixture
def no_wandb_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_wandb_variables")
def test_wandb_gets_rows_by_step_and_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "my-run"
    monkeypatch.setitem(sys.modules, "wandb", first := FakeWandB())
    go_through(make_reporters(["wandb"], folder)[0], folder, [row(1, 0.7), row(2, 0.6)], end=RunStopped("asked"))
    (given,) = first.inits
    assert (given["project"], given["name"], given["resume"], given["dir"]) == ("prefopt", "my-run", "allow", str(folder))
    assert given["config"] == MANIFEST
    assert given["settings"] == {"console": "off", "init_timeout": 30.0, "finish_timeout": 300.0}
    assert [(step, sorted(values)) for step, values in first.logged] == [
        (1, ["eval/loss", "loss", "rewards/margin"]),
        (2, ["samples"]),
        (2, ["eval/loss", "loss", "rewards/margin"]),
        (2, ["watch"]),
    ]
    assert first.logged[1][1]["samples"]["data"] == [list(SAMPLE.values())]
    assert first.logged[3][1]["watch"]["data"] == [[2, "warning", "kl_budget", "The KL is 40 nats.", "Raise beta."]]
    assert first.ended == [0]

    monkeypatch.setitem(sys.modules, "wandb", second := FakeWandB(first_step=3))
    go_through(make_reporters(["wandb"], folder)[0], folder, [row(2, 0.6), row(3, 0.5)], step=1)
    assert second.inits[0]["id"] == given["id"]
    assert [step for step, _ in second.logged] == [3, 3]  # what the watch found in step 2 comes late; the rest of step 2 is there
    assert second.summary == {"steps": 3, "after.eval/loss": 0.5}

    monkeypatch.setitem(sys.modules, "wandb", third := FakeWandB())
    go_through(make_reporters(["wandb"], folder)[0], folder, [row(1, 0.7)], end=ValueError("broken"))
    assert third.inits[0]["id"] != given["id"]
    assert third.ended == [1]


@pytest.mark.usefixtures("no_wandb_variables")
def test_wandb_without_a_network_keeps_what_it_would_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandB(fails=1))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    said: list[str] = []
    go_through(make_reporters(["wandb"], tmp_path, said.append)[0], tmp_path, [row(1, 0.7)])
    assert [given.get("mode") for given in wandb.inits] == [None, "offline"]
    assert [given.get("torn down", False) for given in wandb.inits] == [True, False]
    assert "project" not in wandb.inits[0]
    assert len(wandb.logged) == 1
    assert len(said) == 1
    assert "No API key configured" in said[0]
    assert "wandb sync" in said[0]


@pytest.mark.usefixtures("no_wandb_variables")
@pytest.mark.parametrize("is_old", [False, True])
def test_wandb_without_a_key_does_not_ask_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandB(key=None))
    if is_old:
        monkeypatch.setattr(wandb, "login", lambda: pytest.fail("it would ask"), raising=False)
        monkeypatch.setattr(wandb, "api", types.SimpleNamespace(api_key=None), raising=False)
    said: list[str] = []
    go_through(make_reporters(["wandb"], tmp_path, said.append)[0], tmp_path, [row(1, 0.7)])
    assert [given.get("mode") for given in wandb.inits] == ["offline"]
    assert said[0].startswith("note: wandb cannot be reached (it has no key; wandb login asks for one)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    go_through(make_reporters(["wandb"], tmp_path, said.append)[0], tmp_path, [row(1, 0.7)])
    assert "mode" not in wandb.inits[1]


@pytest.mark.usefixtures("no_wandb_variables")
def test_what_fails_is_said_once_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandB(fails=2))
    said: list[str] = []
    go_through(make_reporters(["wandb"], tmp_path, said.append)[0], tmp_path, [row(1, 0.7), row(2, 0.6)])
    assert wandb.logged == []
    assert len(said) == 2
    assert said[1].startswith("note: wandb failed: No API key configured")

    class Broken(Callback):
        def on_step(self, row: Any) -> None:
            raise ConnectionError("the server is gone")

    said.clear()
    go_through(reporters.Careful("broken", Broken(), said.append), tmp_path, [row(1, 0.7), row(2, 0.6)])
    assert said == ["note: broken failed: the server is gone. The run goes on; metrics.jsonl has all its figures."]


def test_without_a_narrator_it_is_a_warning(tmp_path: Path):
    class Broken(Callback):
        def on_start(self, run: Any) -> None:
            raise ConnectionError("the server is gone")

    reporters.REPORTERS["broken"] = lambda folder, say: Broken()
    try:
        (reporter,) = make_reporters(["broken"], tmp_path)
    finally:
        del reporters.REPORTERS["broken"]
    with pytest.warns(UserWarning, match="broken failed: the server is gone"):
        go_through(reporter, tmp_path, [row(1, 0.7)])


class FakeMLflow:
    """A tracking server. `down`: requests that fail."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, int]] = []
        self.params: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.status: list[str] = []
        self.uris: list[str] = []
        self.num_runs = 0
        self.down = 0

    def __call__(self, tracking_uri: str) -> "FakeMLflow":
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        return f"experiment {name}"

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        self.num_runs += 1
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run-{self.num_runs}"))

    def update_run(self, run_id: str, status: str) -> None:
        self.status.append(f"{run_id} {status}")

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [types.SimpleNamespace(step=step) for name, _, step in self.metrics if name == key]

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        if metrics and self.down:
            self.down -= 1
            raise ConnectionError("no route to the server")
        self.metrics += metrics
        self.params |= dict(params)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self.texts[name] = text

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status.append(f"{run_id} {status}")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch, no_wandb_variables: None) -> FakeMLflow:
    fake = FakeMLflow()
    entities = types.SimpleNamespace(Metric=lambda name, value, time, step: (name, value, step), Param=lambda name, value: (name, value))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", types.SimpleNamespace(MlflowClient=fake))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)  # type: ignore[arg-type]
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "1")  # so that what the reporter sets is unset after the test
    return fake


def test_mlflow_gets_parameters_metrics_and_files_and_goes_on_with_its_run(tmp_path: Path, mlflow: FakeMLflow):
    go_through(make_reporters(["mlflow"], tmp_path)[0], tmp_path, [row(1, 0.7), row(2, 0.6)], end=RunStopped("asked"))
    assert mlflow.uris == [(tmp_path / "mlruns").as_uri()]
    assert mlflow.params["beta"] == "0.1"
    assert mlflow.params["resolved.learning_rate"] == "1e-05"
    assert [metric for metric in mlflow.metrics if metric[0] == "loss"] == [("loss", 0.7, 1), ("loss", 0.6, 2)]
    assert json.loads(mlflow.texts["manifest.json"]) == MANIFEST
    assert json.loads(mlflow.texts["samples/step-000002.json"]) == [SAMPLE]
    assert mlflow.texts["watch.txt"] == "step 2, warning: The KL is 40 nats.\n    Raise beta.\n"
    assert mlflow.status == ["run-1 KILLED"]

    go_through(make_reporters(["mlflow"], tmp_path)[0], tmp_path, [row(2, 0.6), row(3, 0.5)], step=1)
    assert [metric for metric in mlflow.metrics if metric[0] == "loss"] == [("loss", 0.7, 1), ("loss", 0.6, 2), ("loss", 0.5, 3)]
    assert mlflow.status == ["run-1 KILLED", "run-1 RUNNING", "run-1 FINISHED"]
    assert json.loads(mlflow.texts["summary.json"])["steps"] == 3


def test_mlflow_gets_what_could_not_be_sent_when_the_server_is_back(tmp_path: Path, mlflow: FakeMLflow, monkeypatch: pytest.MonkeyPatch):
    seconds = iter(range(0, 10_000, 20))
    monkeypatch.setattr(reporters.time, "monotonic", lambda: float(next(seconds)))
    mlflow.down = 1
    said: list[str] = []
    rows = [row(step, 1 / step) for step in range(1, 9)]
    go_through(make_reporters(["mlflow"], tmp_path, said.append)[0], tmp_path, rows)
    assert [step for name, _, step in mlflow.metrics if name == "loss"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(said) == 1
    assert "no route to the server" in said[0]


def test_nested_values_get_dotted_names():
    assert flat({"a": 1, "b": {"c": "d", "e": {"f": None}}, "g": [1, 2]}) == {"a": 1, "b.c": "d", "b.e.f": "null", "g": "[1, 2]"}
