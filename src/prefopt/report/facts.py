"""Data, settings and manifest as tables of a name and a value, and the commands that go on from a run."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from prefopt.data.summary import DataSummary
from prefopt.methods.table import METHODS
from prefopt.report.record import RunRecord, listed, mapping
from prefopt.report.state import RunState
from prefopt.report.text import base_name, clock_time, count, duration, integer, model_label, moment, number, plain, rate, share

Rows = list[tuple[str, str]]
"""Names and values."""

SHORTEST = 300
"""Characters beyond which a setting's value is cut: templates may be pages long, and `config.yaml` has them whole."""


def source_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Each source: its name, rows, what it was read as, and why."""
    found = []
    for source in listed(summary.get("sources")):
        fields = mapping(source)
        unread = listed(fields.get("unread_columns"))
        because = str(fields.get("because", "")) + (f"; columns not read: {', '.join(map(str, unread))}" if unread else "")
        read_as = f"{fields.get('says', '')} ({fields.get('format', '')})"
        found.append((base_name(str(fields.get("name", ""))), count(number(fields.get("num_rows"))), read_as, because))
    return found


def data_rows(record: RunRecord) -> Rows:
    """What became of the rows."""
    summary = mapping(record.data.get("summary"))
    rows: Rows = []
    if summary:
        rows += [
            ("rows read", count(number(summary.get("num_rows")))),
            ("examples made of them", count(number(summary.get("num_trees")))),
            ("rows left out", dropped_words(summary)),
        ]
    rows += [
        ("examples trained on", count(number(record.data.get("num_train")))),
        ("examples held out", count(number(record.data.get("num_held_out")))),
    ]
    if summary:
        rows += [
            ("tokens, each prompt counted once", count(number(summary.get("num_tokens")))),
            ("mean length of a prompt", tokens(summary.get("mean_prompt"))),
            ("mean length of an answer", tokens(summary.get("mean_answer"))),
            ("mean length of a chosen answer", tokens(summary.get("mean_chosen") or None)),
            ("mean length of a rejected answer", tokens(summary.get("mean_rejected") or None)),
            ("mean length of a chosen answer, held out", tokens(mapping(record.data.get("held_out_lengths")).get("mean_chosen"))),
            ("longest prompt with answer", f"{count(number(summary.get('longest')))} tokens"),
            ("share of prompt, without sharing", share(number(summary.get("prompt_share")))),
        ]
    rows.append(("fingerprint", str(record.data.get("fingerprint") or "")))
    return [(name, value) for name, value in rows if value and not value.startswith("–")]


def tokens(length: Any) -> str:
    """A mean length; a dash where it is not known."""
    return f"{plain(number(length), 1)} tokens"


def dropped_words(summary: Mapping[str, Any]) -> str:
    """How many rows were left out, and why: `12: too_long 10, no_prompt 2`."""
    reasons = {str(reason): amount for reason, entry in mapping(summary.get("dropped")).items() if (amount := integer(entry))}
    if not reasons:
        return "none"
    return f"{count(sum(reasons.values()))}: {', '.join(f'{reason} {count(amount)}' for reason, amount in reasons.items())}"


def data_notes(record: RunRecord) -> list[str]:
    """What the user was told about the data while it was read."""
    summary = mapping(record.data.get("summary"))
    try:
        found = DataSummary.from_dict(summary)
    except (KeyError, TypeError, AttributeError):  # of another version
        return [str(note) for note in listed(summary.get("notes"))]
    return [f"{count(amount)} {words}" for amount, words in found.remarks() if amount] + list(found.notes)


def adapter_words(settings: Mapping[str, object]) -> str:
    """The kind of a new adapter."""
    kind = " and ".join(word for name, word in (("dora", "DoRA"), ("rslora", "rsLoRA")) if settings.get(name) is True)
    return f"an adapter ({kind})" if kind else "an adapter"


def key_settings(record: RunRecord) -> Rows:
    """The settings that decide most, in words; those of the method are the ones that come first in its config."""
    settings, resolved = record.settings, record.resolved
    usual = number(resolved.get("usual_learning_rate"))
    learning_rate = (
        number(resolved.get("learning_rate"))
        or number(settings.get("learning_rate"))
        or max(record.metrics.curve("learning_rate").values, default=None)
    )
    rank = integer(settings.get("lora_rank"))
    trains = "all weights" if not record.is_adapter else f"{adapter_words(settings)} of rank {rank}" if rank else "an adapter"
    if packed := mapping(record.manifest.get("model")).get("quantisation"):
        trains += f" on a base in {packed}"
    schedule = settings.get("lr_schedule")
    batch_size = resolved.get("batch_size") or settings.get("batch_size")  # no step takes more than all examples
    rows: Rows = [
        ("method", record.method),
        ("model", model_label(record.model_name)),
        ("trains", trains if settings else ""),
        ("beta", plain_or_empty(settings.get("beta"))),
        ("reference", record.reference_words),
        (
            "learning rate",
            rate(learning_rate) + (f" (usual here: {rate(usual)})" if usual and usual != learning_rate else "") if learning_rate else "",
        ),
        ("schedule", f"{schedule}, {share(number(settings.get('warmup_ratio')) or 0.0)} warm-up" if schedule else ""),
        ("batch", f"{batch_size} examples per step" if batch_size else ""),
        ("steps", count(number(resolved.get("num_steps"))) if resolved.get("num_steps") else ""),
        ("epochs", plain_or_empty(settings.get("epochs")) if settings.get("max_steps") is None else ""),
        ("optimizer", str(settings.get("optim") or "")),
        ("precision", str(resolved.get("precision") or settings.get("precision") or "")),
        ("engine", str(resolved.get("engine") or record.summary.get("engine") or "")),
        ("seed", str(settings.get("seed", ""))),
    ]
    return [(name, value) for name, value in rows if value]


def plain_or_empty(value: Any) -> str:
    """A number without needless zeros; empty where it is none."""
    found = number(value)
    return "" if found is None else f"{found:g}"


def all_settings(record: RunRecord) -> Rows:
    """Every setting as the run had it."""
    return [(name, worded(value)) for name, value in record.settings.items()]


def worded(value: Any) -> str:
    """A setting's value as users write it."""
    if value is None or value in ([], {}, ""):
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        text = ", ".join(worded(item) for item in value)
    elif isinstance(value, dict):
        text = ", ".join(f"{name}={worded(item)}" for name, item in value.items())
    else:
        text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return text if len(text) <= SHORTEST else f"{text[:SHORTEST]} […]"


def manifest_rows(record: RunRecord, state: RunState) -> Rows:
    """Versions, machine and digests."""
    model = mapping(record.manifest.get("model"))
    trained, total = number(model.get("num_trained")), number(model.get("num_parameters"))
    rows: Rows = [
        ("model", model_label(record.model_name)),
        ("architecture", str(model.get("architecture") or "")),
        ("parameters", count(total) if total else ""),
        ("of them trained", f"{count(trained)} ({share(trained / total)})" if trained and total else ""),
        ("model fingerprint", str(model.get("fingerprint") or "")),
        ("reference fingerprint", str(mapping(record.manifest.get("reference")).get("fingerprint") or "")),
        ("data fingerprint", str(record.data.get("fingerprint") or "")),
    ]
    environment = mapping(record.manifest.get("environment")) or {
        **mapping(record.summary.get("versions")),
        "device": record.summary.get("device"),
    }
    if record.manifest.get("prefopt"):
        environment = {"prefopt": record.manifest["prefopt"], **environment}
    rows += [
        (name.replace("num_", "number of ").replace("_", " "), worded(value)) for name, value in environment.items() if value is not None
    ]
    rows += [("started", clock_time(moment(record.manifest.get("started")) or state.started)), ("last written", clock_time(state.updated))]
    rows += [("resumed", resumed_words(mapping(entry))) for entry in listed(record.manifest.get("resumed"))]
    return [(name, value) for name, value in rows if value and value != "–"]


def resumed_words(entry: Mapping[str, Any]) -> str:
    """Where a run was taken up again, when, and what was different from then on."""
    differences = [str(words) for name in ("differences", "settings") for words in listed(entry.get(name))]
    step = integer(entry.get("step"))
    return joined([f"after step {count(step)}", clock_time(moment(entry.get("time"))), *differences]) if step is not None else ""


def commands(record: RunRecord, state: RunState) -> list[tuple[str, str]]:
    """What can be typed to go on from here: a sentence and a command each."""
    config = shlex.quote(str(record.files.config))
    found = []
    can_start = record.files.config.is_file() and record.method in {row.name for row in METHODS}  # one of the user's own begins in Python
    if can_start and state.name in ("stopped", "broken off", "failed") and record.has_checkpoint:
        found.append(("Go on from the newest checkpoint", f"prefopt train --config {config} --resume"))
    if can_start:
        found.append(
            ("Run it again, with the same settings and data, in another folder", f"prefopt train --config {config} --out NEW_FOLDER")
        )
    found.append(("Make this page again", f"prefopt report {shlex.quote(str(record.folder))}"))
    return found


def time_words(record: RunRecord, state: RunState) -> str:
    """When it began, and how long the steps took."""
    seconds = number(record.summary.get("training_seconds"))
    parts = [f"started {clock_time(state.started)}" if state.started else "", f"trained for {duration(seconds)}" if seconds else ""]
    return joined(parts)


def joined(parts: Iterable[str]) -> str:
    """Those that say something, with commas."""
    return ", ".join(filter(None, parts))
