"""Tables (CSV, parquet, saved datasets) that are broken in the ways of tables: no word gets lost, and none ends the process."""

import io
import random
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.command_line import prefopt
from tests.data.broken_files import ROWS, damaged, parquet_of, read, values

from prefopt.data import sources
from prefopt.data.rows import Dropped, Row
from prefopt.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_are_read_with_the_separator_of_their_header(folder: Path, separator: str, end: str):
    others = ",\t;".replace(separator, "")
    lines = [["prompt", "chosen", "rejected"], ["q", f'"{others}"', f'"a{separator}b"'], ["q2", "a" + others.replace(",", ""), "c"]]
    (folder / "separated.csv").write_text(end.join(separator.join(line) for line in lines), newline="")
    first, second = values(read(folder / "separated.csv") or [])
    assert first == {"prompt": "q", "chosen": others, "rejected": f"a{separator}b"}
    assert second == {"prompt": "q2", "chosen": "a" + others.replace(",", ""), "rejected": "c"}


# CSV.

word = st.integers(0, 10**6).map(lambda number: f"w{number}")
cells = st.one_of(
    word, word.map(lambda text: f'"{text}"'), word.map(lambda text: f'"{text}\n{text}"'), st.sampled_from(["", '"', '""', "'", "\\", "\0"])
)
separators = st.sampled_from([",", ",", ",", ",", "\n", "\n", "\r\n", "\r", "\t", ";", '"', ' "', '",', '"\n', "\n\n"])


@settings(derandomize=False, database=None, max_examples=3000)
@given(separator=st.sampled_from(",\t;"), body=st.lists(st.tuples(cells, separators), min_size=1, max_size=24))
def test_every_word_of_a_broken_table_is_in_a_row(folder: Path, separator: str, body: list[tuple[str, str]]):
    path = folder / "words.csv"
    text = "".join(cell + end for cell, end in body)
    path.write_text(f"a{separator}b\n" + text, newline="")
    rows = read(path)
    if rows is None:
        assert not text.strip()
        return
    held = repr([row.value if isinstance(row, Row) else row.to_dict()["row"] for row in rows])
    for found in re.findall(r"w\d+", text):
        assert found in held
    for row in rows:
        assert row.detail.isprintable() if isinstance(row, Dropped) else set(row.value) == {"a", "b"}


def test_a_quote_that_never_closes_keeps_what_it_swallowed(folder: Path):
    path = folder / "quote.csv"
    path.write_text('a,b\n1,2\n3,"four\n5,6\n7,8\n')
    good, bad = read(path) or []
    assert isinstance(good, Row)
    assert isinstance(bad, Dropped)
    assert bad.location == "quote.csv:3"
    assert bad.row == '3,"four\n5,6\n7,8\n'


# Parquet and saved datasets.


def table_with(name: str, column: pa.Array) -> pa.Table:
    return pa.table({"prompt": ["q", "q2"], "chosen": ["a", "c"], "rejected": ["b", "d"], name: column})


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**62, 1], pa.timestamp("us")),
        pa.array([1, 2], pa.timestamp("us", tz="Nowhere/At")),
        pa.array([2**30, 1], pa.date32()),
        pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["same", "same"]),
        pa.array([b"\xff", b"a"]),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        pa.nulls(2),
        pa.array([2**64 - 1, 0], pa.uint64()),
    ],
    ids=["year", "zone", "date", "twice", "bytes", "map", "null", "large"],
)
def test_a_column_that_python_has_no_value_for_harms_no_other(folder: Path, column: pa.Array):
    path = folder / "column.parquet"
    path.write_bytes(parquet_of(table_with("extra", column)))
    said = prefopt("data", str(path)).check()
    assert "2 rows -> 2 examples" in said.out
    assert "columns not read: extra" in said.out
    path.write_bytes(parquet_of(table_with("weight", column)))
    said = prefopt("data", str(path), "--on-bad-row", "drop").check()
    assert "bad_number" in said.out + said.err or "2 rows -> 2 examples" in said.out


def test_a_column_that_is_there_twice_is_refused(folder: Path):
    path = folder / "twice.parquet"
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"]), pa.array(["z"])], names=["text", "other", "text"])
    path.write_bytes(parquet_of(table))
    with pytest.raises(DataError, match=r"twice.parquet has text more than once. Give each column a name of its own"):
        sources.read(sources.find([str(path)]).places[0]).rows()


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(("which", "times"), [("*.arrow", 300), ("*.json", 60)])
def test_a_damaged_saved_dataset_is_refused_or_whole(tmp_path: Path, saved: Path, which: str, times: int):
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    hit = [name for name in sorted(files) if Path(name).match(which)]
    copy = tmp_path / "saved"
    copy.mkdir()
    draw = random.Random(which)
    for _ in range(times):
        name = draw.choice(hit)
        for other, content in files.items():
            # Never in place: the library maps the file into memory, and the last table may live on.
            (copy / other).unlink(missing_ok=True)
            (copy / other).write_bytes(damaged(content, draw) if other == name else content)
        rows = read(copy)
        assert rows is None or len(rows) == len(ROWS)


def test_a_saved_dataset_cut_between_two_batches_is_refused(tmp_path: Path):
    schema = pa.schema([("text", pa.string())])
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(folder)
    [file] = folder.glob("*.arrow")
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(pa.table({"text": ["a"]}, schema))
        cut = sink.tell()
        stream.write_table(pa.table({"text": ["b"]}, schema))
    file.write_bytes(sink.getvalue())
    assert values(read(folder) or []) == [{"text": "a"}, {"text": "b"}]
    file.write_bytes(sink.getvalue()[:cut])
    assert read(folder) is None
