"""Where figures go beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow.

A reporter is a callback around a library that is imported when it is asked for. What goes wrong in it after the start,
above all a network that is gone, is said once and never ends the run: the run's own files have everything.

A resumed run makes the steps after its last checkpoint again. TensorBoard is told to forget them; the others keep what they
have of them, and get what comes after.
"""

import importlib
import json
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError, RunStopped
from prefopt.training.record.callbacks import Callback, RunStart
from prefopt.training.watching.watched import Finding

Say = Callable[[str], None]
Scalar = str | int | float | bool

PROJECT = "prefopt"
"""Project or experiment, where the library's own variables name none."""


def make_reporters(names: Sequence[str], folder: Path, say: Say | None = None) -> list[Callback]:
    """A callback for each name.

    Args:
        names: tensorboard, wandb, mlflow.
        folder: of the run, in which what they keep on this machine goes.
        say: takes a sentence when one of them fails; the default is a warning.

    Raises:
        ConfigError: there is no such reporter, or its library is not installed.
    """
    if unknown := [name for name in names if name not in REPORTERS]:
        raise ConfigError(f"report_to: there is no {', '.join(unknown)}. There are: {', '.join(REPORTERS)}.")
    speak = say or (lambda line: warnings.warn(line, stacklevel=2))
    return [Careful(name, REPORTERS[name](folder, speak), speak) for name in dict.fromkeys(names)]


def library(name: str, extra: str) -> Any:
    """A module of a library that is not always there.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # half-installed libraries fail in ways of their own
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({_one_line(error)})"
        raise ConfigError(
            f"report_to: {extra} was asked for and {reason}. Install it with pip install 'prefopt[{extra}]', or leave it out."
        ) from None


class Careful(Callback):
    """Keeps what goes wrong in a reporter away from the run.

    Args:
        name: of the reporter.
        inner: the reporter.
        say: takes a sentence, the first time that something goes wrong.
    """

    def __init__(self, name: str, inner: Callback, say: Say) -> None:
        self.name, self.inner, self.say = name, inner, say
        self.has_started = False
        self.has_spoken = False

    def on_start(self, run: RunStart) -> None:
        """A reporter that cannot start is left alone from then on."""
        self.has_started = self._try(lambda: self.inner.on_start(run))

    def on_step(self, row: Mapping[str, float]) -> None:
        """Handed on."""
        self._go_on(lambda: self.inner.on_step(row))

    def on_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Handed on."""
        self._go_on(lambda: self.inner.on_samples(samples))

    def on_finding(self, finding: Finding) -> None:
        """Handed on."""
        self._go_on(lambda: self.inner.on_finding(finding))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Handed on."""
        self._go_on(lambda: self.inner.on_end(summary))

    def on_failure(self, error: BaseException) -> None:
        """Handed on."""
        self._go_on(lambda: self.inner.on_failure(error))

    def _go_on(self, call: Callable[[], None]) -> None:
        if self.has_started:
            self._try(call)

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # of libraries, networks and disks
            if not self.has_spoken:
                self.say(f"note: {self.name} failed: {_one_line(error)}. The run goes on; metrics.jsonl has all its figures.")
            self.has_spoken = True
            return False
        return True


class TensorBoard(Callback):
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder / "tensorboard"
        self.module = library("torch.utils.tensorboard", "tensorboard")
        self.writer: Any = None
        self.settings: Mapping[str, Any] = {}

    def on_start(self, run: RunStart) -> None:
        """Go on in the same folder, from the step that comes next; a new run's folder holds nothing of an older one."""
        if run.step == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.settings = run.manifest.get("settings", {})
        purge_step = run.step + 1 if run.step else None
        self.writer = self.module.SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=20)
        if run.step == 0:
            self.writer.add_text("manifest", _as_code(json.dumps(run.manifest, indent=2, default=str)), 0)

    def on_step(self, row: Mapping[str, float]) -> None:
        """Every figure as a curve."""
        for name, value in _figures(row).items():
            self.writer.add_scalar(name, value, int(row["step"]))

    def on_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Each prompt has a text of its own, with a slider over the steps."""
        for sample in samples:
            text = f"{_as_code(str(sample['prompt']))}\n\n**answer**\n\n{_as_code(str(sample['text']))}"
            self.writer.add_text(f"samples/{sample['row']}", text, int(sample["step"]))

    def on_finding(self, finding: Finding) -> None:
        """A text per rule."""
        self.writer.add_text(f"watch/{finding.rule}", f"{finding.severity}: {finding.what}\n\n{finding.do}", finding.step)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The settings with the last figures: the page HPARAMS, where runs are compared."""
        settings = {name: value if isinstance(value, Scalar) else json.dumps(value, default=str) for name, value in self.settings.items()}
        last = _figures(summary.get("last_step") or {})
        if settings and last:
            summaries = importlib.import_module("torch.utils.tensorboard.summary").hparams(settings, last)
            for part in summaries:
                self.writer.file_writer.add_summary(part)
        self.writer.close()

    def on_failure(self, error: BaseException) -> None:
        """Write what there is."""
        self.writer.close()


class WandB(Callback):
    """A run of Weights & Biases. Its own variables are respected: WANDB_MODE, WANDB_PROJECT, WANDB_NAME and the others."""

    SETTINGS: dict[str, Any] = {"console": "off", "init_timeout": 30.0, "finish_timeout": 300.0}
    """Its hold on the terminal would be in the live view's way; and a network that is gone must not keep the run waiting for good."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say = folder, say
        self.wandb = library("wandb", "wandb")
        self.run: Any = None
        self.next_step = 0
        self.findings: list[list[Any]] = []

    def on_start(self, run: RunStart) -> None:
        """A new run, or the one that was interrupted. Where it cannot be reached, what would be sent is kept in the folder."""
        named = {} if os.environ.get("WANDB_PROJECT") else {"project": PROJECT}
        named |= {} if os.environ.get("WANDB_NAME") else {"name": self.folder.resolve().name}
        arguments: dict[str, Any] = {
            **named,
            "id": _own_id(self.folder / "wandb" / "prefopt-run-id", is_new=run.step == 0),
            "resume": "allow",
            "dir": str(self.folder),
            "config": dict(run.manifest),
            "settings": self._settings(),
        }
        try:
            self._require_key()
            self.run = self.wandb.init(**arguments)
        except Exception as error:  # no key, no network, no permission
            self.say(
                f"note: wandb cannot be reached ({_one_line(error)}); what it would get is kept for wandb sync in {self.folder / 'wandb'}"
            )
            self.wandb.teardown()  # its background process still holds the id
            self.run = self.wandb.init(**arguments, mode="offline")
        self.next_step = int(self.run.step) if run.step else 0

    def on_step(self, row: Mapping[str, float]) -> None:
        """The row at its step; one that it has already it does not take again."""
        self._log(int(row["step"]), _figures(row))

    def on_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """A table per evaluation."""
        if samples:
            columns = list(samples[0])
            table = self.wandb.Table(columns=columns, data=[[sample.get(name) for name in columns] for sample in samples])
            self._log(int(samples[0]["step"]), {"samples": table})

    def on_finding(self, finding: Finding) -> None:
        """One table of all of them, longer by one."""
        self.findings.append([finding.step, finding.severity, finding.rule, finding.what, finding.do])
        table = self.wandb.Table(columns=["step", "severity", "rule", "what", "do"], data=list(self.findings))
        self._log(max(finding.step, self.next_step), {"watch": table})

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The final figures."""
        self.run.summary.update(flat({name: value for name, value in summary.items() if name != "last_step"}))
        self.run.finish(exit_code=0)

    def on_failure(self, error: BaseException) -> None:
        """A run that was asked to stop did not fail."""
        self.run.finish(exit_code=0 if isinstance(error, RunStopped) else 1)

    def _require_key(self) -> None:
        """Left to itself the library asks at the terminal where it has no key, and a run that waits for an answer is a run that hangs.

        Raises:
            LookupError: there is none.
        """
        if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
            return
        try:
            has_key = self.wandb.login(prompt=False)
        except TypeError:  # older versions cannot be told not to ask
            has_key = bool(self.wandb.api.api_key)
        if not has_key:
            raise LookupError("it has no key; wandb login asks for one")

    def _settings(self) -> Any:
        known = getattr(self.wandb.Settings, "model_fields", self.SETTINGS)  # not every version has all of them
        return self.wandb.Settings(**{name: value for name, value in self.SETTINGS.items() if name in known})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self.next_step:  # steps cannot go back there
            self.run.log(dict(values), step=step)
            self.next_step = step


class MLflow(Callback):
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in `mlruns/` of the run's folder.

    Metrics are sent some seconds' worth at a time. Where they cannot be, they wait, so that a server that comes back gets them.
    """

    EVERY_S, AGAIN_S = 5.0, 60.0
    """Between two sendings; and after one that failed."""

    LIMIT = 100
    """Of parameters in one request; of metrics it is more."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        # A server that does not answer is tried again soon enough by us; the library's own patience would hold up the training.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # since 3.7 it must be asked for
        self.client_class = library("mlflow.tracking", "mlflow").MlflowClient
        self.entities = library("mlflow.entities", "mlflow")
        self.client: Any = None
        self.run_id = ""
        self.past = 0
        self.waiting: list[Any] = []
        self.next_time = 0.0
        self.findings = ""

    def on_start(self, run: RunStart) -> None:
        """A new run, or the one that was interrupted."""
        self.client = self.client_class(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or (self.folder / "mlruns").resolve().as_uri())
        id_file = self.folder / "mlflow-run-id"
        if run.step and id_file.is_file():
            self.run_id = id_file.read_text(encoding="utf-8").strip()
            self.client.update_run(self.run_id, status="RUNNING")
            self.past = max((metric.step for metric in self.client.get_metric_history(self.run_id, "loss")), default=0)
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.run_id = self.client.create_run(experiment_id, run_name=self.folder.resolve().name).info.run_id
        id_file.write_text(self.run_id + "\n", encoding="utf-8")
        parameters = [self.entities.Param(name[:250], str(value)[:500]) for name, value in _parameters(run.manifest).items()]
        for place in range(0, len(parameters), self.LIMIT):
            self.client.log_batch(self.run_id, params=parameters[place : place + self.LIMIT])
        self._text("manifest.json", json.dumps(run.manifest, indent=2, default=str))

    def on_step(self, row: Mapping[str, float]) -> None:
        """The row, unless it was sent before the run was resumed."""
        if row["step"] > self.past:
            now = round(time.time() * 1000)
            self.waiting += [self.entities.Metric(name, value, now, int(row["step"])) for name, value in _figures(row).items()]
            self._send()

    def on_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """A file per evaluation."""
        if samples:
            self._text(f"samples/step-{int(samples[0]['step']):06d}.json", json.dumps(list(samples), indent=2, ensure_ascii=False))

    def on_finding(self, finding: Finding) -> None:
        """One file of all of them."""
        self.findings += f"step {finding.step}, {finding.severity}: {finding.what}\n    {finding.do}\n"
        self._text("watch.txt", self.findings)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The final figures."""
        self._text("summary.json", json.dumps(summary, indent=2, default=str))
        self._finish("FINISHED")

    def on_failure(self, error: BaseException) -> None:
        """A run that was asked to stop did not fail."""
        self._finish("KILLED" if isinstance(error, RunStopped | KeyboardInterrupt) else "FAILED")

    def _finish(self, status: str) -> None:
        self.next_time = 0.0
        self._send()
        self.client.set_terminated(self.run_id, status)

    def _text(self, name: str, text: str) -> None:
        self.client.log_text(self.run_id, text, name)

    def _send(self) -> None:
        while self.waiting and time.monotonic() >= self.next_time:
            batch = self.waiting[: 10 * self.LIMIT]
            self.next_time = time.monotonic() + self.AGAIN_S  # if this fails
            self.client.log_batch(self.run_id, metrics=batch)
            del self.waiting[: len(batch)]
            self.next_time = 0.0 if self.waiting else time.monotonic() + self.EVERY_S


REPORTERS: dict[str, Callable[[Path, Say], Callback]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
"""Name in the settings -> what reports."""


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Scalar]:
    """A nested mapping as one of dotted names; what is no number and no text is written as JSON."""
    found: dict[str, Scalar] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[before + name] = value if isinstance(value, Scalar) else json.dumps(value, default=str)
    return found


def _parameters(manifest: Mapping[str, Any]) -> dict[str, Scalar]:
    """What a run is compared by: its settings by their own names, and what was chosen for them."""
    return flat(manifest.get("settings", {})) | flat({name: manifest.get(name, {}) for name in ("resolved", "model", "environment")})


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def _own_id(path: Path, *, is_new: bool) -> str:
    """The id under which a run is known, kept in its folder so that it goes on under the same one."""
    if not is_new and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    own = secrets.token_hex(4)
    path.write_text(own + "\n", encoding="utf-8")
    return own


def _as_code(text: str) -> str:
    """A text that no reader of Markdown changes."""
    return "\n".join("    " + line for line in text.split("\n"))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
