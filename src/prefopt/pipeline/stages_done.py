"""Which stages are done, found without loading anything: as `make` does, by the files that a stage reads.

After a stage `stages.json`, beside the folders of the stages, keeps size and time of each file that the stage has read. While those
and the settings are the same, the stage is passed over. Where anything differs the run itself looks at the contents: it goes on,
stays as it is, or refuses and says why.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefopt.data.given import path_and_rest
from prefopt.disk import write_whole
from prefopt.errors import ModelError
from prefopt.methods.method import Method
from prefopt.report.files import RunFiles, read_json
from prefopt.training.settings import RunSettings

NOTED = "stages.json"


def inputs(settings: RunSettings) -> dict[str, list[int]]:
    """Each file that a run reads, by the setting and its path -> size in bytes and time of its last change in nanoseconds.

    What is on the hub, or is text and no path, has no files.
    """
    given = {name: _folders_of(getattr(settings, name, None)) for name in ("model", "adapter", "reference")}
    given |= {"data": settings.data, "eval_data": settings.eval_data, "chat_template": [settings.chat_template or ""]}
    found: dict[str, list[int]] = {}
    for name, texts in given.items():
        for path in (path for text in texts for path in _files(text)):
            with suppress(OSError):  # gone in this moment
                about = path.stat()
                found[f"{name} {path}"] = [about.st_size, about.st_mtime_ns]
    return found


def is_done(settings: RunSettings, method: Method) -> bool:
    """Whether a stage has finished with these settings, nothing that it reads has changed since, and its model is there."""
    return still_done((read_json(settings.out.parent / NOTED) or {}).get(settings.out.name), settings, method)


def still_done(noted: Any, settings: RunSettings, method: Method) -> bool:
    """Whether a run has finished with these settings, nothing that it reads has changed since, and its model is there.

    Args:
        noted: what `noted_of` gave when it ended; anything else: it is not known to have ended.
        settings, method: of the run, as they are given now.
    """
    files = RunFiles(settings.out)
    manifest, summary = read_json(files.manifest), read_json(files.summary)
    if not isinstance(noted, dict) or manifest is None or summary is None or not files.card.is_file():
        return False
    same_run = noted.get("started") == manifest.get("started") and noted.get("settings") == _deciding(settings, method)
    whole = any(files.model.glob("*.safetensors")) and "-" not in (*settings.data, *settings.eval_data)  # nobody knows what comes there
    return whole and same_run and noted.get("inputs") == inputs(settings)


def note_done(settings: RunSettings, method: Method, read: Mapping[str, list[int]]) -> None:
    """Keep what `is_done` asks for; a disk that cannot be written costs no more than a longer look the next time.

    Args:
        settings, method: of the stage.
        read: what `inputs` gave before it began.
    """
    path = settings.out.parent / NOTED
    with suppress(OSError):
        write_whole(path, json.dumps((read_json(path) or {}) | {settings.out.name: noted_of(settings, method, read)}, indent=2) + "\n")


def noted_of(settings: RunSettings, method: Method, read: Mapping[str, list[int]]) -> dict[str, Any]:
    """What is kept of a run that has ended, for `still_done`; of JSON.

    Args:
        settings, method: of the run.
        read: what `inputs` gave before it began.
    """
    manifest = read_json(RunFiles(settings.out).manifest) or {}
    return {"started": manifest.get("started"), "settings": _deciding(settings, method), "inputs": dict(read)}


def _deciding(settings: RunSettings, method: Method) -> dict[str, Any]:
    """The settings on which it depends whether there is anything left to do."""
    from prefopt.training.record.resume import fixed_settings  # loads torch

    return {**fixed_settings(method, settings), "early_stop": settings.early_stop, "report": settings.report}


def _folders_of(model: str | None) -> list[str]:
    """Where a model's weights and adapter are; nothing where there is none, or none that can be found."""
    from prefopt.models.load import locate  # loads torch

    try:
        return [place for place in locate(model) if place] if model else []
    except ModelError:
        return []


def _files(text: str) -> Iterator[Path]:
    """The file of that name, or all in the folder of that name (its split or weight aside); none where there is neither."""
    if not text:
        return
    try:
        path = Path(path_and_rest(text)[0]).expanduser()
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in found if file.is_file())
    except (OSError, ValueError, RuntimeError):  # too long for a path, no such home folder
        return
