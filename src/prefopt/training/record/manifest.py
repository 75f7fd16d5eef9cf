"""The manifest of a run: what was run, on what, by which versions. Written once, before the first step."""

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import prefopt
from prefopt.data.given import path_and_rest
from prefopt.methods.method import Method
from prefopt.models.policy import trained_parameters
from prefopt.models.quantise import num_parameters, quantisation_of
from prefopt.training.group.processes import Processes
from prefopt.training.prepare import Prepared
from prefopt.training.record.environment import environment
from prefopt.training.record.resume import PATHS, config_values
from prefopt.training.settings import RunSettings


def make_manifest(method: Method, ready: Prepared, processes: Processes) -> dict[str, Any]:
    """What `manifest.json` holds; under `resolved` the values that were chosen for the user."""
    return {
        "prefopt": prefopt.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": method.name,
        "settings": config_values(method, ready.given),
        "paths": absolute_paths(ready.given),
        "resolved": {
            "learning_rate": ready.learning_rate,
            "usual_learning_rate": ready.usual_learning_rate,
            "precision": str(ready.precision),
            "engine": str(ready.policy.path),
            "num_steps": ready.order.num_steps,
            "max_length": ready.settings.max_length,
            "batch_size": ready.order.batch_size,
        },
        "model": {
            "name": ready.given.model,
            "base": ready.loaded.model.name_or_path,  # where `name` is an adapter, what it stands on
            "architecture": type(ready.loaded.model).__name__,
            "num_parameters": num_parameters(ready.loaded.model),
            "num_trained": sum(parameter.numel() for _, parameter in trained_parameters(ready.loaded.model)),
            "adapter": ready.loaded.adapter is not None,
            "quantisation": quantisation_of(ready.loaded.model),
            "fingerprint": ready.fingerprint,
        },
        "data": ready.data.facts,
        "environment": environment(processes),
    }


def absolute_paths(settings: RunSettings) -> dict[str, Any]:
    """Where the relative ones among the settings' paths lead: elsewhere they would lead to something else, or to nothing.

    Names for the hub, templates that are given as text, and paths that are absolute as they stand are left out.
    """
    found: dict[str, Any] = {}
    for name in (*PATHS, "chat_template"):
        given = getattr(settings, name, None)
        is_made = name in ("out", "cache_dir")  # whether it is there or not
        texts = [str(text) for text in (given if isinstance(given, list) else [given] if given else [])]
        absolute = [_absolute(text, is_made=is_made) for text in texts]
        if absolute != texts:
            found[name] = absolute if isinstance(given, list) else absolute[0]
    return found


def _absolute(text: str, *, is_made: bool) -> str:
    path = Path(text)
    with suppress(OSError, ValueError):  # too long for a path
        if is_made or path.exists() or Path(path_and_rest(text)[0]).exists():  # a source may have a weight or a split behind its path
            return text if path.is_absolute() or text.startswith("~") else str(path.absolute())
    return text
