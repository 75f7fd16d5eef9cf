"""Trees on disk, by content: the same rows, settings, template and tokenizer give the same file.

A file is a digest line and a safetensors payload: flat arrays of ids, and the summary and dropped
rows as JSON; nothing is pickled. A file whose digest does not match is not used. Writing is atomic,
and a cache that cannot be written is no reason to stop.
"""

import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prefopt.trees import Completion, PromptTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 3
"""Raise it whenever the same rows would give other trees or another file."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept: the trees, and a JSON object about them."""

    trees: tuple[PromptTree, ...]
    about: dict[str, Any]


def cache_folder(given: Path | None) -> Path:
    """The folder of all caches: the setting's, $PREFOPT_CACHE's, or ~/.cache/prefopt."""
    return (given or Path(os.environ.get("PREFOPT_CACHE") or Path.home() / ".cache" / "prefopt")).expanduser()


def key_of(parts: dict[str, Any]) -> str:
    """The name of an entry: a digest of everything that decides it."""
    return sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True, default=str).encode(errors="surrogatepass")).hexdigest()[:40]


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of how the tokenizer turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        rules = json.loads(backend.to_str()) if backend is not None else {}
    except Exception:  # a backend with parts in Python cannot be written out
        rules = {}
    # Set by the last call that padded or truncated; they do not touch the ids that are asked for here.
    for passing in ("padding", "truncation"):
        rules.pop(passing, None)
    about = {
        "class": type(tokenizer).__name__,
        "rules": rules or sorted(tokenizer.get_vocab().items()),
        "added": sorted(tokenizer.get_added_vocab().items()),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return sha256(json.dumps(about, sort_keys=True, default=str).encode(errors="surrogatepass")).hexdigest()


def load(folder: Path, key: str) -> Entry | None:
    """The entry, or None where there is none or it is damaged (then with a warning)."""
    path = folder / f"{key}.trees"
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, _, payload = content.partition(b"\n")
    if digest != sha256(payload).hexdigest().encode():
        warnings.warn(f"the cached tokens in {path} are damaged and are made anew", stacklevel=2)
        return None
    from safetensors.numpy import load as load_arrays

    arrays = load_arrays(payload)
    return Entry(unpack(arrays), json.loads(arrays["about"].tobytes()))


def save(folder: Path, key: str, entry: Entry) -> None:
    """Keeps an entry; where that fails it warns and goes on."""
    from safetensors.numpy import save as save_arrays

    about = np.frombuffer(json.dumps(entry.about, default=str).encode(), dtype=np.uint8)
    payload = save_arrays({**pack(entry.trees), "about": about})
    temporary: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_drafts(folder)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(sha256(payload).hexdigest().encode() + b"\n")
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(folder / f"{key}.trees")
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(
            f"tokens cannot be cached in {folder} ({error.strerror}); going on without. Set cache_dir to another folder.", stacklevel=2
        )


def fingerprint(trees: Sequence[PromptTree]) -> str:
    """A digest of what the trees hold but for where their rows stand: the same data, the same digest."""
    digest = sha256()
    for name, array in sorted(pack(trees).items()):
        if name != "row_ids":
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:40]


def remove_drafts(folder: Path) -> None:
    """Clear away what processes that were killed while writing left behind: what nobody has written to for a day."""
    for left in folder.glob("*.partial"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                left.unlink()


def pack(trees: Sequence[PromptTree]) -> Arrays:
    """The trees as flat arrays; NaN and −1 stand for None."""
    completions = [completion for tree in trees for completion in tree.completions]
    masks = [completion.scored for completion in completions]
    return {
        "prompt_ids": flat([tree.prompt_ids for tree in trees], np.int32),
        "prompt_lengths": np.array([len(tree.prompt_ids) for tree in trees], dtype=np.int64),
        "completion_ids": flat([completion.ids for completion in completions], np.int32),
        "completion_lengths": np.array([len(completion.ids) for completion in completions], dtype=np.int64),
        "branches": np.array([len(tree.completions) for tree in trees], dtype=np.int64),
        "masked": np.array([mask is not None for mask in masks], dtype=np.bool_),
        "masks": flat([mask for mask in masks if mask is not None], np.bool_),
        "labels": np.array([-1 if completion.label is None else int(completion.label) for completion in completions], dtype=np.int8),
        "ranks": np.array([-1 if completion.rank is None else completion.rank for completion in completions], dtype=np.int32),
        "rewards": optional([completion.reward for completion in completions]),
        "reference_logps": optional([completion.reference_logp for completion in completions]),
        "weights": np.array([tree.weight for tree in trees], dtype=np.float64),
        "row_ids": texts([tree.row_id for tree in trees]),
        "openings": texts([tree.opening for tree in trees]),
    }


def unpack(arrays: Arrays) -> tuple[PromptTree, ...]:
    """The trees that `pack` flattened; their ids are views of the arrays."""
    for array in arrays.values():
        array.flags.writeable = False
    ids = split(arrays["completion_ids"], arrays["completion_lengths"])
    mask_of = iter(split(arrays["masks"], arrays["completion_lengths"][arrays["masked"]]))
    prompts = split(arrays["prompt_ids"], arrays["prompt_lengths"])
    completions = iter(
        Completion(
            one,
            scored=next(mask_of) if masked else None,
            label=None if label < 0 else bool(label),
            rank=None if rank < 0 else rank,
            reward=None if reward != reward else reward,
            reference_logp=None if logp != logp else logp,
        )
        for one, masked, label, rank, reward, logp in zip(
            ids, *(arrays[name].tolist() for name in ("masked", "labels", "ranks", "rewards", "reference_logps")), strict=True
        )
    )
    return tuple(
        PromptTree(prompt, tuple(next(completions) for _ in range(branches)), weight=weight, row_id=row_id, opening=opening)
        for prompt, branches, weight, row_id, opening in zip(
            prompts,
            arrays["branches"].tolist(),
            arrays["weights"].tolist(),
            json.loads(arrays["row_ids"].tobytes()),
            json.loads(arrays["openings"].tobytes()),
            strict=True,
        )
    )


def flat(parts: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The parts one after another."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def texts(values: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Texts, as the bytes of a JSON list."""
    return np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)


def optional(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    """Numbers, NaN where there is none."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def split(array: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """The parts of these lengths."""
    ends = np.cumsum(lengths).tolist()
    return [array[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
