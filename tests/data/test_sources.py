"""Files, folders, streams and datasets as rows with their places."""

import gzip
import io
import json
import sys

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from prefopt.data import sources
from prefopt.data.rows import Dropped, Row
from prefopt.errors import DataError


def rows_of(*given):
    return [row for place in sources.find([str(item) for item in given]).places for row in sources.read(place).rows()]


def places_and_values(*given):
    return [(row.location, row.value if isinstance(row, Row) else row.reason) for row in rows_of(*given)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(write, name):
    path = write(name, [b"\xef\xbb\xbf" + b'{"text": "one"}', "", {"text": "line\u2028sep\u0085"}, '{"text": "three"}\r'])
    assert places_and_values(path) == [
        (f"{name}:1", {"text": "one"}),
        (f"{name}:3", {"text": "line\u2028sep\u0085"}),
        (f"{name}:4", {"text": "three"}),
    ]


def test_broken_lines_keep_their_place_and_text(write):
    path = write("a.jsonl", ['{"text": ', b'{"text": "\xff"}', "[1]", "9" * 5000, "[" * 100_000, {"text": "ok"}])
    broken = rows_of(path)
    assert [row.reason for row in broken[:5]] == ["invalid_json", "not_utf8", "not_an_object", "invalid_json", "invalid_json"]
    assert (broken[0].row, broken[1].row) == ('{"text": ', '{"text": "\\xff"}')
    assert "byte 11 is 0xff" in broken[1].detail
    assert broken[5] == Row("a.jsonl:6", {"text": "ok"})


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_array_items_are_numbered(write, name):
    path = write(name, ['[{"text": "one"},', "2,", '{"text": "three"}]'])
    assert places_and_values(path) == [
        (f"{name}:item 1", {"text": "one"}),
        (f"{name}:item 2", "not_an_object"),
        (f"{name}:item 3", {"text": "three"}),
    ]


def test_json_that_holds_lines_or_one_object(write):
    assert places_and_values(write("lines.json", [{"a": 1}, "{", {"a": 2}])) == [
        ("lines.json:1", {"a": 1}),
        ("lines.json:2", "invalid_json"),
        ("lines.json:3", {"a": 2}),
    ]
    assert places_and_values(write("one.json", ['{"a":', "1}"])) == [("one.json:item 1", {"a": 1})]


@pytest.mark.parametrize("content", ["[1, 2", "3", '"text"', "nonsense", b"\xff"])
def test_json_that_is_neither(write, content):
    with pytest.raises(DataError, match=r"a\.json.*Allowed are an array of objects"):
        rows_of(write("a.json", [content]))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv(write, name):
    path = write(name, ["\ufeffprompt,chosen", '"two\nlines, ""quoted""",a\x00b', "one", "1,2,3", b"\xff,x", "", "last,y"])
    assert places_and_values(path) == [
        (f"{name}:2", {"prompt": 'two\nlines, "quoted"', "chosen": "a\x00b"}),
        (f"{name}:4", "wrong_cells"),
        (f"{name}:5", "wrong_cells"),
        (f"{name}:6", "not_utf8"),
        (f"{name}:8", {"prompt": "last", "chosen": "y"}),
    ]


def test_csv_long_cells_and_tabs(write):
    assert rows_of(write("long.csv", ["text", "x" * 200_000]))[0].value == {"text": "x" * 200_000}
    assert rows_of(write("tabs.csv", ["text\tlabel", "a, b\t1"]))[0].value == {"text": "a, b", "label": "1"}


def test_csv_quote_that_never_closes_is_counted(write):
    rows = rows_of(write("a.csv", ["text", "fine", '"never closed', "swallowed"]))
    assert [(row.location, getattr(row, "reason", None)) for row in rows] == [("a.csv:2", None), ("a.csv:3", "wrong_cells")]
    assert "up to line" in rows[1].detail


@pytest.mark.parametrize("header", ["", "a,a", ","])
def test_csv_without_a_usable_header(write, header):
    with pytest.raises(DataError, match=r"first line of distinct column names|has no rows"):
        rows_of(write("a.csv", [header, "1,2"]))


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path, name):
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": "q"}]}, {"messages": None}]), buffer)
    path = tmp_path / name
    path.write_bytes(gzip.compress(buffer.getvalue()) if name.endswith(".gz") else buffer.getvalue())
    assert places_and_values(path) == [
        (f"{name}:row 1", {"messages": [{"role": "user", "content": "q"}]}),
        (f"{name}:row 2", {"messages": None}),
    ]


def test_parquet_with_broken_text(tmp_path):
    array = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"a\xff")]
    )
    parquet.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    assert places_and_values(tmp_path / "a.parquet") == [("a.parquet:row 1", {"text": "a"}), ("a.parquet:row 2", "not_utf8")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.parquet.gz"])
def test_damaged_files_are_named(tmp_path, name):
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    (tmp_path / name).write_bytes(whole[:-20])
    with pytest.raises(DataError, match=rf"{name} is not a whole (gzip|parquet) file"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_empty_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name} is empty"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize(("name", "lines"), [("a.jsonl", [""]), ("a.json", ["[]"]), ("a.csv", ["text"])])
def test_files_without_rows_are_named(write, name, lines):
    with pytest.raises(DataError, match=rf"{name} has no rows"):
        rows_of(write(name, lines))


def test_a_folder_is_read_in_order_and_the_rest_is_named(write, tmp_path):
    write("b.jsonl", [{"text": "b"}])
    write("a.csv", ["text", "a"])
    write("notes.md", ["hello"])
    write("._b.jsonl", ["left by a file manager"])
    found = sources.find([str(tmp_path)])
    assert [place.name for place in found.places] == ["a.csv", "b.jsonl"]
    assert found.ignored == (str(tmp_path / "._b.jsonl"), str(tmp_path / "notes.md"))


def test_a_folder_without_data(write, tmp_path):
    write("notes.md", ["hello"])
    with pytest.raises(DataError, match=r"holds no data file \(it holds notes.md\)"):
        sources.find([str(tmp_path)])


def test_files_of_one_name_stay_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(json.dumps({"text": folder}))
    assert [row.location for row in rows_of(tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl")] == ["a.jsonl(1):1", "a.jsonl(2):1"]


def test_near_names_are_suggested(write, tmp_path):
    write("pairs.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"does not exist \(did you mean .*pairs\.jsonl\?\)"):
        sources.find([str(tmp_path / "pair.jsonl")])
    with pytest.raises(DataError, match="nor does the folder"):
        sources.find([str(tmp_path / "nowhere" / "at" / "pairs.jsonl")])


def test_a_forgotten_suffix_is_not_sought_on_the_hub(write, tmp_path, monkeypatch):
    write("pairs.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(DataError, match=r"does not exist \(did you mean .*pairs\.jsonl\?\)"):
        sources.find([f"{tmp_path.name}/pairs"])


def test_other_suffixes_say_what_is_allowed(write):
    with pytest.raises(DataError, match=r"end in \.txt are not read.*\.jsonl, \.json, \.csv, \.tsv, \.parquet.*renamed to \.jsonl"):
        sources.find([str(write("a.txt", ["hello"]))])


def test_nothing_and_standard_input_twice():
    with pytest.raises(DataError, match="no data was given"):
        sources.find([])
    with pytest.raises(DataError, match="more than once"):
        sources.find(["-", "-"])


class Stdin(io.TextIOWrapper):
    """Standard input with a content, or a terminal's."""

    def __init__(self, content: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content))
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b'{"text": "a"}\n'))
    assert places_and_values("-") == [("stdin:1", {"text": "a"})]


@pytest.mark.parametrize(("content", "terminal", "says"), [(b"", False, "is empty"), (b"", True, "nothing is piped in")])
def test_standard_input_without_content(monkeypatch, content, terminal, says):
    monkeypatch.setattr(sys, "stdin", Stdin(content, terminal))
    with pytest.raises(DataError, match=says):
        rows_of("-")


def test_saved_dataset(tmp_path):
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(tmp_path / "saved")
    assert [row.value for row in rows_of(tmp_path / "saved")] == [{"text": "a"}, {"text": "b"}]


def test_saved_dataset_with_splits(tmp_path):
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("test", "train")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert [row.value for row in rows_of(tmp_path / "saved")] == [{"text": "train"}]
    assert [row.value for row in rows_of(f"{tmp_path / 'saved'}:test")] == [{"text": "test"}]
    with pytest.raises(DataError, match="has no split dev; there are test, train"):
        rows_of(f"{tmp_path / 'saved'}:dev")


def test_damaged_saved_dataset(tmp_path):
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match="looks like a saved dataset and cannot be read"):
        rows_of(tmp_path / "saved")


def test_hub_names(monkeypatch):
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert places_and_values("org/name:test") == [("org/name:test:row 1", {"text": "test"})]
    assert [row.value for row in rows_of("org/name")] == [{"text": "train"}]
    assert [row.value for row in rows_of("org/name:config:test")] == [{"text": "test"}]
    assert asked == [("org/name",), ("org/name",), ("org/name", "config")]


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*names):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"org/name is no file or folder here .*ConnectionError: no route"):
        rows_of("org/name")


def test_digest_follows_the_content(write):
    digests = {
        sources.read(place).digest for place in sources.find([str(write("a.jsonl", [{"a": 1}])), str(write("b.jsonl", [{"a": 1}]))]).places
    }
    assert len(digests) == 1
    assert isinstance(rows_of(write("c.jsonl", ["{"]))[0], Dropped)
