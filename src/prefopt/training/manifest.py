"""The manifest of a run: what was run, on what, by which versions. Written once, before the first step."""

from datetime import UTC, datetime
from typing import Any

import prefopt
from prefopt.methods.method import Method
from prefopt.models.load import LoadedModel
from prefopt.models.policy import trained_parameters
from prefopt.training.environment import environment
from prefopt.training.examples import RunData
from prefopt.training.processes import Processes
from prefopt.training.resume import config_values
from prefopt.training.settings import RunSettings
from prefopt.training.sharding import weights_sample


def make_manifest(method: Method, settings: RunSettings, loaded: LoadedModel, data: RunData, processes: Processes) -> dict[str, Any]:
    """What `manifest.json` holds, but for `resolved`: the values that were chosen for the user."""
    return {
        "prefopt": prefopt.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": method.name,
        "settings": config_values(method, settings),
        "model": {
            "name": settings.model,
            "architecture": type(loaded.model).__name__,
            "num_parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "num_trained": sum(parameter.numel() for _, parameter in trained_parameters(loaded.model)),
            "adapter": loaded.adapter is not None,
            "fingerprint": weights_sample(loaded.model),
        },
        "data": data.facts,
        "environment": environment(processes),
    }
