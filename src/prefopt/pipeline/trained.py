"""What is known about a model from the folder that it lies in: the run that made it, how its prompts were rendered, and
what it was compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.config import read_yaml
from prefopt.data.given import path_and_rest
from prefopt.data.prompts import TextAs
from prefopt.errors import ConfigError
from prefopt.models.merge import MERGED
from prefopt.models.speakers import Weights
from prefopt.report.files import RunFiles, read_json


@dataclass(frozen=True, slots=True)
class Trained:
    """What is known about a model.

    Attributes:
        files: of the run that made it; None: none is known.
        config: the run's settings; empty where no run is known.
        text_as: how training read prompts that are plain text; None: not known.
        template_args: further arguments of the chat template in training.
    """

    files: RunFiles | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    text_as: TextAs | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_4bit(self) -> bool:
        """Whether the run's base was in four bits while its adapter was trained."""
        return self.config.get("load_in_4bit") is True

    @property
    def has_reference(self) -> bool:
        """Whether the run compared its model with another: only then its settings have a reference, set or not."""
        return "reference" in self.config and not self.reference_came_with_data

    @property
    def reference_came_with_data(self) -> bool:
        """Whether the reference was no model here, but sums that stand in the data."""
        resolved = (read_json(self.files.manifest) or {}).get("resolved") if self.files is not None else None
        return isinstance(resolved, dict) and resolved.get("reference") == "data"

    @property
    def beta(self) -> float | None:
        """β of the run, where its method has one."""
        beta = self.config.get("beta")
        return float(beta) if isinstance(beta, int | float) else None

    def args_for(self, chat_template: str | None) -> Mapping[str, Any]:
        """Arguments of the chat template where nobody gives any: those of training, but not for another template, which has its own."""
        return self.template_args if chat_template is None else {}

    def meant(self, given: str, tokenizer: PreTrainedTokenizerBase) -> tuple[TextAs, str]:
        """How prompts that are plain text are to be read, and the reason in words.

        Args:
            given: `raw` or `chat` as asked for, or `auto`.
            tokenizer: decides where nothing else is known.
        """
        if given in ("raw", "chat"):
            return ("raw" if given == "raw" else "chat"), "as asked"
        if self.text_as is not None:
            return self.text_as, "as in training"
        if tokenizer.chat_template:
            return "chat", "for the tokenizer has a chat template"
        return "raw", "for the tokenizer has no chat template"

    def reference(self, policy: Weights) -> Weights | None:
        """What the run compared its model with: the model that it started from, unless its settings name another.

        Raises:
            ModelError: it is not there any more.
        """
        if not self.has_reference:
            return None
        named = self.config["reference"]
        if named is None and self.config.get("lora_rank"):  # the adapter began as nothing
            return Weights(policy.source, None)
        adapter = self.config.get("adapter") if named is None else None
        model = self.from_where_it_ran(str(named or self.config["model"]))
        return Weights.of(model, None if adapter is None else self.from_where_it_ran(str(adapter)))

    def from_where_it_ran(self, name: str) -> str:
        """A path of the run's settings as it is seen from here: relative ones were meant from where the run was started."""
        given, rest = path_and_rest(name)
        path = Path(given).expanduser()
        out = Path(str(self.config.get("out", "")))
        if self.files is None or path.is_absolute() or path.exists() or out.is_absolute():
            return name
        own = self.files.path.resolve()
        above = own.parents[len(out.parts) - 1] if 0 < len(out.parts) <= len(own.parents) else None
        if above is None or above / out != own or not (above / path).exists():
            return name
        return str(above / path) + rest


def look_up(name: str) -> Trained:
    """What is known about a model, from its name.

    Args:
        name: folder of a run, of its model, or of a merged model; anything else tells nothing.
    """
    try:
        return look_at(Path(name).expanduser())
    except (OSError, RuntimeError):  # no name that a folder can have: whoever loads the model says so
        return Trained()


def look_at(path: Path) -> Trained:
    """What a folder tells of the model in it."""
    for folder in (path, path.parent) if path.name == "model" else (path,):
        files = RunFiles(folder)
        try:
            config = read_yaml(files.config) if files.config.is_file() else {}
        except ConfigError:  # not ours
            continue
        if "method" in config and "model" in config:
            args = config.get("template_args")
            return Trained(files, config, text_as_in(files, config), args if isinstance(args, dict) else {})
    merged = read_json(path / MERGED) or {}
    args = merged.get("template_args")
    known: TextAs | None = "raw" if merged.get("text_as") == "raw" else "chat" if merged.get("text_as") == "chat" else None
    return Trained(text_as=known, template_args=args if isinstance(args, dict) else {})


def text_as_in(files: RunFiles, config: Mapping[str, Any]) -> TextAs | None:
    """How the run read plain text: as chats where a template wrote its examples, as it is where none did."""
    if config.get("text_as") == "chat":
        return "chat"
    for path in (files.manifest, files.summary):
        about = (read_json(path) or {}).get("data")
        summary = about.get("summary") if isinstance(about, dict) else None
        template = summary.get("template") if isinstance(summary, dict) else None
        if isinstance(template, str):
            return "chat" if template else "raw"
    return None
