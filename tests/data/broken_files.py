"""Files of every kind that hold the same few rows, how they are damaged, and how they are read."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from pyarrow import parquet

from prefopt.data import sources
from prefopt.data.rows import REASONS, Dropped, Row
from prefopt.errors import DataError

ROWS = [{"prompt": f"Is {number} good?\nSäy", "chosen": f'yes, "{number}"', "rejected": f"no {number},"} for number in range(6)]
KINDS = [".jsonl", ".json", ".csv", ".parquet"]
PACKED = [*KINDS, *(kind + ".gz" for kind in KINDS), ".jsonl.zst", ".csv.zst"]


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    lines = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    return "".join(",".join('"{}"'.format(cell.replace('"', '""')) for cell in line) + "\r\n" for line in lines).encode()


def parquet_of(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, write_page_checksum=True, row_group_size=2)
    return buffer.getvalue()


def whole(kind: str) -> bytes:
    """The rows as a file of that kind."""
    content = {
        ".jsonl": lambda: b"".join(json.dumps(row).encode() + b"\n" for row in ROWS),
        ".json": lambda: json.dumps(ROWS).encode(),
        ".csv": lambda: csv_of(ROWS),
        ".parquet": lambda: parquet_of(pa.Table.from_pylist(ROWS)),
    }[kind.removesuffix(".gz").removesuffix(".zst")]()
    return gzip.compress(content, mtime=0) if kind.endswith(".gz") else zstd(content) if kind.endswith(".zst") else content


def zstd(content: bytes) -> bytes:
    """The content packed by zstandard with a checksum, as its own program does; arrow's packs without."""
    packed = bytearray(pa.compress(content, codec="zstd", asbytes=True))
    packed[4] |= 4  # the frame's header: a checksum stands behind it
    return bytes(packed) + (xxhash.xxh64(content).intdigest() & 0xFFFFFFFF).to_bytes(4, "little")


def read(path: Path) -> list[Row | Dropped] | None:
    """The rows of a file; None where the file as a whole is refused, in words that name it."""
    message = None
    try:
        rows = [row for place in sources.find([str(path)]).places for row in sources.read(place).rows()]
    except DataError as error:
        message = str(error)
    if message is not None:
        assert path.name in message
        assert all(char.isprintable() or char == "\n" for char in message)
        return None
    assert all(isinstance(row, Row) or row.reason in REASONS for row in rows)
    assert len({row.location for row in rows}) == len(rows)
    return rows


def values(rows: list[Row | Dropped]) -> list[Any]:
    return [row.value for row in rows if isinstance(row, Row)]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with some bytes flipped, left out, doubled or put in between."""
    new = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        start = draw.randrange(len(new))
        size = draw.choice([1, 1, 2, 16])
        some = bytes(draw.choice([*range(256), *b'"\n,{}[]\\\0'] * 2) for _ in range(size))
        way = draw.randrange(4)
        new[start : start + size] = (some, b"", new[start : start + size] * 2, some + new[start : start + size])[way]
        if not new:
            return b"\n"
    return bytes(new)
