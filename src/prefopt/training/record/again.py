"""A run that is repeated from its `manifest.json`: the settings with what was chosen for them, on the same data and model, or none.

`config.yaml` says what was asked for, and runs on whatever is there now. The manifest also knows what that came to: the learning
rate, the precision, where relative paths led, and digests of the examples and the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config import read_yaml
from prefopt.data.settings import ConversationSettings, DataSettings, PairSettings
from prefopt.errors import ConfigError, RunError
from prefopt.report.files import read_json

if TYPE_CHECKING:
    from prefopt.training.terminal.narrator import Narrator

SECTIONS = ("settings", "resolved", "model", "data", "environment")
"""What a manifest must hold to be repeated."""

AS_THEY_LIE = ("data", "eval_data", "cache_dir")
"""Paths that may be spelled in another way when a run is resumed."""

OF_MODEL = ("model", "adapter", "lora_rank", "lora_alpha", "rslora", "dora", "target_modules", "modules_to_save", "seed")
"""Settings that decide what the model's weights are at the start."""

_GROUPS = (DataSettings, ConversationSettings, PairSettings)
OF_DATA = {name for group in _GROUPS for name in group.model_fields if name not in ("data_workers", "cache_dir")} | {"model"}
"""Settings that decide what the examples are: of the model its tokenizer."""


@dataclass(frozen=True, slots=True)
class Again:
    """A run that is to be repeated.

    Attributes:
        path: of its manifest.
        manifest: what that holds.
        replaced: settings that the user gives beside it; what depends on them may be another.
    """

    path: Path
    manifest: Mapping[str, Any]
    replaced: frozenset[str]

    def settings(self, *, out: str | None, resume: bool) -> dict[str, Any]:
        """The settings of the run, with the values that were chosen where none were given, and its paths from where it was started.

        Args:
            out: as given beside the manifest.
            resume: whether a run is gone on with. That of the manifest itself knows its settings as they were given.
        """
        given, paths, resolved = self.manifest["settings"], self.manifest.get("paths", {}), self.manifest["resolved"]
        own_folder = self.path.resolve().parent
        if resume and (out is None or Path(out).expanduser().resolve() == own_folder):
            return {**given, **{name: paths[name] for name in AS_THEY_LIE if name in paths}, "out": str(own_folder)}
        given = given | paths
        chosen = {name: resolved[name] for name in ("learning_rate", "max_length")}
        return {**given, **chosen, "precision": "bf16" if str(resolved["precision"]).startswith("bf16") else "float32"}

    def check(self, manifest: Mapping[str, Any], narrator: "Narrator") -> None:
        """Examples and weights must be those of the run; what differs in versions and machine is said.

        Args:
            manifest: of this start; called again once it knows its reference.
            narrator: where it is said.

        Raises:
            RunError: they are others, and no setting was given that could have made them so.
        """
        from prefopt.training.record.environment import differences
        from prefopt.training.record.resume import has_changed, start_of

        before, now = start_of(self.manifest), start_of(manifest)
        if "reference" in manifest:
            if has_changed(before, now, "reference_model", drawn=False):
                self._differs(f"the reference {manifest['reference']['name']}", ("reference", "model"), narrator)
            return
        if before["data"] != now["data"]:
            self._differs("the data", OF_DATA, narrator)
        if before["eval_data"] != now["eval_data"]:
            self._differs("the held-out data", OF_DATA, narrator)
        if has_changed(before, now, "model", drawn=manifest["model"]["adapter"]):
            self._differs(f"the model {manifest['model']['name']}", OF_MODEL, narrator)
        if different := differences(before["environment"], now["environment"]):
            narrator.say(f"note: {'; '.join(different)}. The figures may differ from those of {self.path.parent} in their last digits.")

    def _differs(self, what: str, deciding: "frozenset[str] | set[str] | tuple[str, ...]", narrator: "Narrator") -> None:
        if given := sorted(self.replaced.intersection(deciding)):
            narrator.say(f"note: {what} is not what {self.path} was run with ({', '.join(given)} given beside it)")
            return
        raise RunError(
            f"{what} is not what {self.path} was run with: its content has changed since. Give it as it was. To run the same settings on "
            f"what is there now, take {self.path.with_name('config.yaml')}, which asks for no content."
        )


def is_manifest(values: Mapping[str, Any]) -> bool:
    """Whether a config is the manifest of a run."""
    return all(name in values for name in ("method", "settings", "resolved"))


def read_config(path: Path) -> dict[str, Any]:
    """What `--config` names: a YAML file of settings, or the manifest of a run.

    Raises:
        ConfigError: as `read_yaml`; or a manifest lacks what is needed to repeat it.
    """
    values = read_json(path)
    if values is None or not is_manifest(values):
        return read_yaml(path)
    fingerprints = [isinstance(part := values.get(name), dict) and part.get("fingerprint") for name in ("model", "data")]
    resolved = values["resolved"] if isinstance(values["resolved"], dict) else {}
    lacking = [name for name in SECTIONS if not (isinstance(values.get(name), dict) and values[name])]
    lacking += [f"resolved.{name}" for name in ("learning_rate", "max_length", "precision", "engine") if name not in resolved]
    if lacking or not all(fingerprints) or not isinstance(values.get("paths", {}), dict):
        what = f" ({', '.join(lacking)})" if lacking else ""
        raise ConfigError(f"{path} is damaged: it lacks what is needed to run it again{what}. Take the config.yaml beside it.")
    return values
