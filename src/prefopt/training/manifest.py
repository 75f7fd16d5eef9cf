"""The manifest of a run: what was run, on what, by which versions. Written once, before the first step."""

from datetime import UTC, datetime
from typing import Any

import prefopt
from prefopt.methods.method import Method
from prefopt.models.policy import trained_parameters
from prefopt.training.environment import environment
from prefopt.training.prepare import Prepared
from prefopt.training.processes import Processes
from prefopt.training.resume import config_values
from prefopt.training.sharding import weights_sample


def make_manifest(method: Method, ready: Prepared, processes: Processes) -> dict[str, Any]:
    """What `manifest.json` holds; under `resolved` the values that were chosen for the user."""
    return {
        "prefopt": prefopt.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": method.name,
        "settings": config_values(method, ready.given),
        "resolved": {
            "learning_rate": ready.learning_rate,
            "usual_learning_rate": ready.usual_learning_rate,
            "precision": str(ready.precision),
            "engine": str(ready.policy.path),
            "num_steps": ready.order.num_steps,
            "max_length": ready.settings.max_length,
        },
        "model": {
            "name": ready.given.model,
            "architecture": type(ready.loaded.model).__name__,
            "num_parameters": sum(parameter.numel() for parameter in ready.loaded.model.parameters()),
            "num_trained": sum(parameter.numel() for _, parameter in trained_parameters(ready.loaded.model)),
            "adapter": ready.loaded.adapter is not None,
            "fingerprint": weights_sample(ready.loaded.model),
        },
        "data": ready.data.facts,
        "environment": environment(processes),
    }
