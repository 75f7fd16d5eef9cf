"""Reference log-probabilities on disk, shared by runs.

One SQLite file per context (weights, dtype, attention path, engine version): SQLite lets several processes read and
write at once, and survives being killed. One row per completion: its key is a digest of the prompt's and the
completion's token ids and mask, its value float32 log-probabilities per token. So the values serve the next run, the
next epoch and every β of a sweep, in any order. Each value carries a checksum; a damaged one is computed again.
"""

import json
import os
import sqlite3
import warnings
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from prefopt.trees import TokenIds, TokenMask

ENGINE_VERSION = 1
"""Raised whenever the engine's numbers change beyond float32 noise."""

DAMAGE = (sqlite3.Error, UnicodeDecodeError)
"""What comes of a damaged file; the second where its table's own text is broken."""

Values = Mapping[bytes, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class CacheContext:
    """Everything but the tokens that reference values depend on.

    Attributes:
        weights: digest of weights and adapter.
        compute: dtype of the forward pass, and of the weights where it differs.
        quantisation: how the weights are compressed; empty: not at all.
        path: how prompts are shared and how the head runs.
        device: kind of device.
    """

    weights: str
    compute: str
    quantisation: str
    path: str
    device: str
    engine: int = ENGINE_VERSION

    def digest(self) -> str:
        """Name of the file that holds the values."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of parameters and buffers as they are in memory, whatever file they came from."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def key_of(prompt_ids: TokenIds, completion_ids: TokenIds, scored: TokenMask | None) -> bytes:
    """Key of a completion after its prompt."""
    digest = blake2b(digest_size=16)
    digest.update(len(prompt_ids).to_bytes(8, "little"))
    digest.update(prompt_ids.tobytes())
    digest.update(completion_ids.tobytes())
    digest.update(b"" if scored is None else b"mask" + scored.tobytes())
    return digest.digest()


class ReferenceCache:
    """The values of one context.

    Args:
        folder: the cache's folder; made when missing.
        context: what the values depend on.

    A folder that cannot be written to, or a file that is damaged beyond reading, costs a warning and the time to
    compute the values, never a run.
    """

    def __init__(self, folder: Path, context: CacheContext) -> None:
        self.path = folder / f"{context.digest()}.sqlite"
        self.context = context
        self.usable = self._create()

    def get(self, keys: Iterable[bytes]) -> dict[bytes, npt.NDArray[np.float32]]:
        """The values that are there and whole."""
        found: dict[bytes, npt.NDArray[np.float32]] = {}
        wanted = list(dict.fromkeys(keys))
        if not self.usable:
            return found
        try:
            with closing(self._connect()) as connection:
                for start in range(0, len(wanted), 500):
                    part = dict.fromkeys(wanted[start : start + 500])
                    rows = connection.execute(f"SELECT key, value, checksum FROM logps WHERE key IN ({','.join('?' * len(part))})", [*part])
                    whole = [(key, value) for key, value, checksum in rows if key in part and _is_whole(value, checksum)]
                    found.update((key, np.frombuffer(value, np.float32)) for key, value in whole)
        except DAMAGE as error:
            self._recover(error)
        return found

    def put(self, values: Values) -> None:
        """Keep the values; those of other processes stay."""
        if not self.usable or not values:
            return
        rows = [(key, value.tobytes(), _checksum(value.tobytes())) for key, value in values.items()]
        try:
            with closing(self._connect()) as connection, connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?, ?)", rows)
        except DAMAGE as error:
            self._recover(error)

    def _create(self) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._create_tables()
            os.utime(self.path)  # so that what is in use is not pruned
        except OSError as error:
            return self._give_up(error)
        except DAMAGE as error:
            return self._recover(error)
        return True

    def _recover(self, error: Exception) -> bool:
        """A damaged file is put aside and made anew; after anything else (locked for a minute, read-only, full) the cache is left alone."""
        self.usable = False
        if isinstance(error, sqlite3.OperationalError):
            return self._give_up(error)
        damaged = self.path.with_suffix(".damaged")
        try:
            self.path.replace(damaged)
            self._create_tables()
        except (OSError, *DAMAGE) as further:
            return self._give_up(further)
        warnings.warn(f"the reference cache {self.path} was damaged ({error}) and is made anew; the old file is {damaged}", stacklevel=5)
        self.usable = True
        return True

    def _create_tables(self) -> None:
        with closing(self._connect()) as connection, connection:
            # At once for writing: two processes that both begin by reading and then want to write get "locked" without any wait,
            # and so do two that switch a new file to write-ahead logging. SQLite's own journal is safe when killed as well.
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, value BLOB, checksum INTEGER) WITHOUT ROWID")
            connection.execute("CREATE TABLE IF NOT EXISTS context (json TEXT PRIMARY KEY)")
            connection.execute("INSERT OR IGNORE INTO context VALUES (?)", (json.dumps(asdict(self.context)),))

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def _give_up(self, error: Exception) -> bool:
        self.usable = False
        warnings.warn(f"the reference cache {self.path} cannot be used ({error}); the run goes on without it", stacklevel=5)
        return False


def _is_whole(value: object, checksum: object) -> bool:
    """Whether a value is what was written; in a damaged file it need not even be bytes."""
    return isinstance(value, bytes) and _checksum(value) == checksum


def _checksum(value: bytes) -> int:
    return xxhash.xxh3_64_intdigest(value) - 2**63  # SQLite's integers are signed
