"""A run's folder, read: whatever of its files is there, of a run in any state.

Nothing here fails because a file is missing, half written or of an older version: what cannot be read is left out, and
counted where it should have been there. Only a folder that holds no run at all is an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config import from_yaml
from prefopt.errors import ConfigError
from prefopt.report.files import RunFiles, read_json, read_lines
from prefopt.report.metrics import Metrics, read_metrics
from prefopt.report.text import base_name, integer, number


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out example, as `held_out.jsonl` has it.

    Attributes:
        row: where it comes from.
        prompt: its text as the model read it, special tokens included.
        completions: their texts; of a pair the chosen one first.
        lengths: their tokens.
        weight: of the example in all means.
        before, after: its figures before training and at the newest evaluation; empty where there are none.
    """

    row: str
    prompt: str
    completions: tuple[str, ...]
    lengths: tuple[float, ...]
    weight: float
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that the model gave at an evaluation, as `samples.jsonl` has it; None where a figure is not there."""

    step: int
    row: str
    prompt: str
    text: str
    num_tokens: float | None
    ended: bool | None
    repetition: float | None
    entropy: float | None


@dataclass(frozen=True, slots=True)
class Finding:
    """What the watch found, as `watch.jsonl` has it."""

    rule: str
    step: int
    is_warning: bool
    what: str
    do: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything that a run's folder says.

    Attributes:
        folder: of the run, as it was given.
        manifest, status, config, summary: those files; empty where they are not there.
        metrics: of all steps.
        held_out, answers, findings, bad_rows: one entry per line of those files.
        held_out_step: of the evaluation that the held-out figures are from; None where none was after training began.
        opening: what the newest checkpoint noted before the first step; `summary` has the same once the run has ended.
        host: the machine that the run says it is on; empty where it does not say.
        has_checkpoint: whether there is something to resume from.
        has_model: whether the trained model was saved.
    """

    folder: Path
    manifest: Mapping[str, Any]
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Metrics
    held_out: tuple[HeldOut, ...]
    answers: tuple[Answer, ...]
    findings: tuple[Finding, ...]
    bad_rows: tuple[Mapping[str, Any], ...]
    held_out_step: int | None
    opening: Mapping[str, Any]
    host: str
    has_checkpoint: bool
    has_model: bool

    @property
    def files(self) -> RunFiles:
        """Their names."""
        return RunFiles(self.folder)

    @property
    def settings(self) -> Mapping[str, Any]:
        """All settings of the run, the method's own among them."""
        return mapping(self.manifest.get("settings")) or self.config

    @property
    def resolved(self) -> Mapping[str, Any]:
        """What was chosen where the settings left it open."""
        return mapping(self.manifest.get("resolved"))

    @property
    def method(self) -> str:
        """The method's name; empty where no file says it."""
        return next((str(place["method"]) for place in (self.manifest, self.summary, self.config) if place.get("method")), "")

    @property
    def model_name(self) -> str:
        """The model that training began with; empty where no file says it."""
        names = (mapping(self.manifest.get("model")).get("name"), self.settings.get("model"), self.summary.get("model"))
        return next((str(name) for name in names if name), "")

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and not the model itself: a new one, or one that the settings name, as `model` too."""
        found = mapping(self.manifest.get("model")).get("adapter")
        return bool(self.settings.get("lora_rank") or self.settings.get("adapter")) if found is None else bool(found)

    @property
    def peak_memory_gb(self) -> float | None:
        """The most memory of any of its processes: one that resumed the run counts anew."""
        return max(self.metrics.curve("memory_gb").values, default=None)

    @property
    def seconds(self) -> float | None:
        """What all steps took."""
        return number(self.summary.get("training_seconds")) or sum(self.metrics.curve("seconds").values) or None

    @property
    def data(self) -> Mapping[str, Any]:
        """What is known of the data: fingerprint, summary, counts."""
        return mapping(self.manifest.get("data")) or mapping(self.summary.get("data"))

    @property
    def num_held_out(self) -> int:
        """Held-out examples."""
        return int(number(self.data.get("num_held_out")) or len(self.held_out))

    @property
    def base_name(self) -> str:
        """The whole model under what training began with: the same but where that was an adapter."""
        return str(mapping(self.manifest.get("model")).get("base") or self.model_name)

    @property
    def has_reference(self) -> bool:
        """Whether the method compares with a reference; only such methods have the setting."""
        return "reference" in self.settings

    @property
    def reference_is_start(self) -> bool:
        """Whether the reference is the model as it was before training, and stays it."""
        is_own = self.has_reference and self.settings.get("reference") is None and self.resolved.get("reference") != "data"
        return is_own and self.reference_moves_every is None

    @property
    def reference_moves_every(self) -> int | None:
        """Steps after which the reference moves towards the policy; None where it stays."""
        return integer(self.settings.get("sync_reference_every_steps"))

    @property
    def reference_words(self) -> str:
        """Which reference it is; empty where the method has none."""
        if self.reference_is_start:
            return "the model before training"
        if not self.has_reference:
            return ""
        if every := self.reference_moves_every:
            return f"the model before training, moved towards the policy every {every} steps"
        named = self.settings.get("reference")
        return base_name(str(named)) if named is not None else "sums of log-probabilities that came with the data"

    @property
    def model_step(self) -> int:
        """The step that the saved model is of: not the last where the run ended early and went back to its best."""
        return int(number(self.summary.get("model_step")) or self.metrics.last_step)

    @property
    def is_pairs(self) -> bool:
        """Whether examples are pairs of a chosen and a rejected answer."""
        if any(name.removeprefix("eval/") == "rewards/margin" for name in self.metrics.curves):
            return True
        return any(len(example.completions) > 1 for example in self.held_out[:1])

    @property
    def is_reward_model(self) -> bool:
        """Whether a reward model was trained, which scores answers and writes none."""
        return str(mapping(self.manifest.get("model")).get("architecture") or "").endswith("ForSequenceClassification")

    @property
    def is_thumbs(self) -> bool:
        """Whether examples are single answers, each with a thumb up or down."""
        return any(name.removeprefix("eval/") in ("rewards/desirable", "rewards/undesirable") for name in self.metrics.curves)

    def held_out_figures(self, before: bool) -> dict[str, float]:
        """The means on held-out examples, by metric without `eval/`: before training, or at the newest evaluation.

        The newest are those of the saved model, where the run has ended. Of a run that has not, those from before training may
        be in no file but that of the examples.
        """
        if before:
            found = mapping(self.summary.get("before")) or mapping(self.opening.get("before"))
        else:
            newest = {name: curve.values[-1] for name, curve in self.metrics.curves.items() if name.startswith(("eval/", "samples/"))}
            found = mapping(self.summary.get("after")) or newest
        figures = {name.removeprefix("eval/"): value for name, entry in found.items() if (value := number(entry)) is not None}
        if before and not any(name.startswith("samples/") for name in figures):
            figures |= sample_means([answer for answer in self.answers if answer.step == 0])
        looked_at = before or self.held_out_step is not None
        rows = [(example.before if before else example.after, example.weight) for example in self.held_out if looked_at]
        names = {name for values, _ in rows for name in values} - {"loss"}  # of an example it is a sum over its unit
        means = {
            name: mean
            for name in sorted(names)
            if (mean := weighted_mean([(values.get(name), weight) for values, weight in rows])) is not None
        }
        return means | figures


def weighted_mean(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """The mean of the values that are there; None where none has weight."""
    known = [(value, weight) for value, weight in pairs if value is not None and weight > 0]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def sample_means(answers: Iterable[Answer]) -> dict[str, float]:
    """The means of answers as the metrics name them."""
    rows = list(answers)
    columns: dict[str, list[float | None]] = {
        "samples/length": [answer.num_tokens for answer in rows],
        "samples/repetition": [answer.repetition for answer in rows],
        "samples/entropy": [answer.entropy for answer in rows],
        "samples/ended": [None if answer.ended is None else float(answer.ended) for answer in rows],
    }
    return {name: mean for name, values in columns.items() if (mean := weighted_mean((value, 1.0) for value in values)) is not None}


def read_run(folder: Path) -> RunRecord:
    """What the folder says of its run.

    Raises:
        ConfigError: it holds no run; says what it is and what to give instead.
    """
    check_is_run(folder)
    files = RunFiles(folder)
    lines = read_lines(files.held_out)
    checkpoints = sorted(files.checkpoints.glob("step-*/state.json"))
    newest = read_json(checkpoints[-1]) if checkpoints else None
    return RunRecord(
        folder=folder,
        manifest=read_json(files.manifest) or {},
        status=read_json(files.status) or {},
        config=read_config(files.config),
        summary=read_json(files.summary) or {},
        metrics=read_metrics(files.metrics),
        held_out=tuple(held_out_of(line) for line in lines),
        answers=tuple(answer_of(line) for line in read_lines(files.samples)),
        findings=tuple(finding_of(line) for line in read_lines(files.watch)),
        bad_rows=tuple(read_lines(files.bad_batch)),
        held_out_step=max((int(step) for line in lines if (step := number(line.get("step"))) and line.get("after")), default=None),
        opening=mapping((newest or {}).get("opening")),
        host=str((read_json(files.lock) or {}).get("host") or ""),
        has_checkpoint=bool(checkpoints),
        has_model=files.model.is_dir(),
    )


def check_is_run(folder: Path) -> None:
    """Whether there is anything to report on.

    Raises:
        ConfigError: there is not, or it cannot be read.
    """
    give = "Give the folder that a run was given as out."
    try:
        if is_run(folder):
            return
        around = next((parent for parent in (folder.parent, folder.parent.parent) if parent != folder and is_run(parent)), None)
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_run(path)) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"cannot read {folder}: {error.strerror}. {give}") from None
    if not folder.exists():
        raise ConfigError(f"there is no folder {folder}. {give}")
    if around:
        raise ConfigError(f"{folder} is part of the run {around}. Give that.")
    if inside:
        raise ConfigError(f"{folder} holds no run itself, but runs: {', '.join(inside[:8])}. Give one of them, as {folder / inside[0]}.")
    what = "holds no run: there is no config.yaml, manifest.json or metrics.jsonl in it" if folder.is_dir() else "is a file"
    raise ConfigError(f"{folder} {what}. {give}")


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run of any age, in any state."""
    files = RunFiles(folder)
    return any(path.is_file() for path in (files.config, files.manifest, files.metrics))


def read_config(path: Path) -> dict[str, Any]:
    """What `config.yaml` holds; empty where it cannot be read."""
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mapping(values)


def held_out_of(line: Mapping[str, Any]) -> HeldOut:
    """A line of `held_out.jsonl`."""
    completions = line.get("completions")
    lengths = line.get("lengths")
    weight = number(line.get("weight"))
    return HeldOut(
        row=str(line.get("row", "")),
        prompt=str(line.get("prompt", "")),
        completions=tuple(str(text) for text in completions) if isinstance(completions, list) else (),
        lengths=tuple(number(length) or 0.0 for length in lengths) if isinstance(lengths, list) else (),
        weight=1.0 if weight is None else weight,
        before=numbers(line.get("before")),
        after=numbers(line.get("after")),
    )


def answer_of(line: Mapping[str, Any]) -> Answer:
    """A line of `samples.jsonl`."""
    ended = line.get("ended")
    return Answer(
        step=int(number(line.get("step")) or 0),
        row=str(line.get("row", "")),
        prompt=str(line.get("prompt", "")),
        text=str(line.get("text", "")),
        num_tokens=number(line.get("num_tokens")),
        ended=ended if isinstance(ended, bool) else None,
        repetition=number(line.get("repetition")),
        entropy=number(line.get("entropy")),
    )


def finding_of(line: Mapping[str, Any]) -> Finding:
    """A line of `watch.jsonl`."""
    return Finding(
        rule=str(line.get("rule", "")),
        step=int(number(line.get("step")) or 0),
        is_warning=line.get("severity") == "warning",
        what=str(line.get("what", "")),
        do=str(line.get("do", "")),
        values=numbers(line.get("values")),
    )


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of an object."""
    return {str(name): found for name, entry in mapping(value).items() if (found := number(entry)) is not None}
