"""Packed files, long arrays, tab-separated tables and spreadsheets as rows with their places."""

import gzip
import json
import random
import sys
import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.broken import json_values
from tests.data.broken_files import ROWS, read, values, whole, zstd

from prefopt.data import json_array, sources
from prefopt.data.rows import Dropped, Row
from prefopt.data.tables import is_quoted
from prefopt.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        [sources.read(place).rows() for place in sources.find([str(path)]).places]
    return str(caught.value)


# Packed.


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_is_read_packed(folder: Path, kind: str):
    content = b"prompt\tchosen\tn\nq\ta\t1\n" if kind == ".tsv" else whole(kind)
    for ending, packed in ((".gz", gzip.compress(content)), (".zst", zstd(content)), (".ZST", zstd(content))):
        path = folder / f"packed{kind}{ending}"
        path.write_bytes(packed)
        assert values(read(path) or []) == ([{"prompt": "q", "chosen": "a", "n": "1"}] if kind == ".tsv" else ROWS)


def test_frames_one_after_another_are_one_file(folder: Path):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    path = folder / "frames.jsonl.zst"
    path.write_bytes(b"".join(zstd(line) for line in lines))
    assert values(read(path) or []) == ROWS


@pytest.mark.parametrize("content", [b"{}\n", gzip.compress(b"{}\n", mtime=0), zstd(b'{"a": 1}\n')[:-1], zstd(b'{"a": 1}\n') + b"more"])
def test_what_is_no_whole_zstandard_file_is_named(folder: Path, content: bytes):
    path = folder / "broken.jsonl.zst"
    path.write_bytes(content)
    assert f"{path} is not a whole zstandard file" in refused(path)


# Arrays.


@pytest.fixture(params=[1, 7, 64, 2**18])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that are read at a time."""
    monkeypatch.setattr(json_array, "PART", request.param)
    return int(request.param)


ITEMS: list[Any] = [
    {"a": "x" * 50, "é\u2028": [1, {"b": None}]},
    {},
    12345,
    -1.5e-7,
    "text, ]",
    [1, [2]],
    True,
    None,
    {"a": "\ud83e\udd8a ä"},
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_item_by_item_however_it_is_cut(folder: Path, part: int, ascii_only: bool, indent: int | None):
    path = folder / "items.json"
    items = json.loads(json.dumps(ITEMS))
    path.write_text(" \n" + json.dumps(items, ensure_ascii=ascii_only, indent=indent) + "\n\n", encoding="utf-8")
    rows = read(path) or []
    assert [row.location for row in rows] == [f"items.json:item {number}" for number in range(1, len(items) + 1)]
    assert [row.value if isinstance(row, Row) else row.row for row in rows] == items


def test_no_array_is_longer_than_memory(folder: Path):
    def peak(number: int) -> int:
        path = folder / "long.json"
        with path.open("w") as file:
            file.write("[" + ",\n".join(json.dumps({"text": f"{index} " + "word " * 200}) for index in range(number)) + "]")
        tracemalloc.start()
        (place,) = sources.find([str(path)]).places
        assert sum(1 for _ in sources.read(place).stream()) == number
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(1000), peak(8000)
    assert many < few * 1.2 + 100_000  # the files have 1 and 8 MB


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"a": 1}, {"a": 2]', "Expecting ',' delimiter at character 19, in or behind item 2"),
        ('[{"a": 1}, {"a": "' + "x" * 100, "Unterminated string at character 18, in or behind item 2"),
        ('[{"a": 1} {"a": 2}]', "a comma or the closing bracket is missing at character 11, in or behind item 1"),
        ('[{"a": 1},', "Expecting value at character 11, in or behind item 2"),
        ('[{"a": 1}', "a comma or the closing bracket is missing at character 10, in or behind item 1"),
        ('[{"a": 1}] {', "something follows the array at character 12, in or behind item 1"),
        ("[", "Expecting value at character 2, in or behind item 1"),
        ('[{"a": 1},]', "Expecting value at character 11, in or behind item 2"),
        ('[{"a": ' + "[" * 100_000, "it is nested too deeply"),
        ('[{"a": ' + "9" * 5000 + "}]", "Exceeds the limit"),
    ],
)
def test_a_fault_in_an_array_is_told_with_its_item(folder: Path, part: int, content: str, says: str):
    path = folder / "fault.json"
    path.write_text(content)
    said = refused(path)
    assert said.startswith("fault.json is not valid JSON: ")
    assert says in said
    assert said.endswith("Allowed are an array of objects, or one object per line.")


def test_broken_utf8_in_an_array_is_told_with_its_byte(folder: Path, part: int):
    path = folder / "latin.json"
    path.write_bytes('[{"a": "ä'.encode() + b'\xe4"}]')
    assert "it is not UTF-8 at byte 11" in refused(path)


@settings(max_examples=200)
@given(items=st.lists(json_values, max_size=6), indent=st.sampled_from([None, 0, 3]), size=st.integers(1, 40), data=st.data())
def test_arrays_of_anything_are_what_the_whole_is(folder: Path, items: list[Any], indent: int | None, size: int, data: st.DataObject):
    text = json.dumps(items, indent=indent)
    if data.draw(st.booleans(), label="damaged"):
        place = data.draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + data.draw(st.sampled_from(["", "]", ",", '"', "{", "x", "1", "\\"]))
            + text[place + data.draw(st.integers(0, 3)) :]
        )
    path = folder / "any.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        whole_value = json.loads(text)
    except ValueError:
        whole_value = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "PART", size)
        rows = read(path)
    if isinstance(whole_value, list) and whole_value:
        assert rows is not None
        assert json.dumps([row.value if isinstance(row, Row) else row.row for row in rows]) == json.dumps(whole_value)
    elif not isinstance(whole_value, dict):
        assert rows is None or text.lstrip().startswith("{")


# Tabs.


def test_quotes_between_tabs_are_characters_where_no_cell_stands_in_them(folder: Path):
    (folder / "plain.tsv").write_text('a\tb\n"To be," he said\tx\n1\t"or not\n\n"\t"q"\n')
    assert values(read(folder / "plain.tsv") or []) == [
        {"a": '"To be," he said', "b": "x"},
        {"a": "1", "b": '"or not'},
        {"a": '"', "b": '"q"'},
    ]


def test_quotes_between_tabs_hold_cells_together_where_a_program_wrote_them(folder: Path):
    for name in ("quoted.tsv", "quoted.csv"):
        (folder / name).write_text('a\tb\n"two\nlines"\tx\n1\t"or ""not"""\n"a\ttab"\ty\n')
        assert values(read(folder / name) or []) == [{"a": "two\nlines", "b": "x"}, {"a": "1", "b": 'or "not"'}, {"a": "a\ttab", "b": "y"}]


@pytest.mark.parametrize(
    ("lines", "quoted"),
    [
        (["a\tb\n", "x\ty\n"], None),
        (["a\tb\n", '"x"\ty\n'], True),
        (["a\tb\n", '"x" z\ty\n'], False),
        (["a\tb\n", '"x\n', 'z"\ty\n'], True),
        (["a\tb\n", '"x"\ty\n', '"x\ty\n'], False),
        (["a\tb\n", '"x"\t"y"\n', '"x\ty\n'], True),
        (["a\n", '"x\n', "y\n"], False),
        ([""], None),
    ],
)
def test_what_tells_the_two_customs_apart(lines: list[str], quoted: bool | None):
    for otherwise in (True, False):
        assert is_quoted(lines, otherwise=otherwise) is (otherwise if quoted is None else quoted)


def test_a_line_of_another_length_and_broken_bytes_are_named(folder: Path):
    (folder / "cells.tsv").write_bytes(b"a\tb\r\n1\t2\t3\r\n\xff\t2\r\n\r\n4\t5")
    rows = read(folder / "cells.tsv") or []
    found = [(row.location, row.reason if isinstance(row, Dropped) else row.value) for row in rows]
    assert found == [("cells.tsv:2", "wrong_cells"), ("cells.tsv:3", "not_utf8"), ("cells.tsv:5", {"a": "4", "b": "5"})]
    (folder / "twice.tsv").write_text("a\ta\n1\t2\n")
    assert "more than once" in refused(folder / "twice.tsv")


# Spreadsheets.


def saved(path: Path, *sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for rows in sheets:
        sheet = book.create_sheet()
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_a_sheet_gives_its_rows_and_blank_ones_are_none(folder: Path):
    rows = [[None, None], ["prompt", "n", None, "day"], ["q", 2.0, None, date(2026, 1, 2)], [], [None, 0.5], ["=1+1", True]]
    found = read(saved(folder / "sheet.xlsx", [], rows)) or []
    assert [(row.location, row.value) for row in found if isinstance(row, Row)] == [
        ("sheet.xlsx:row 3", {"prompt": "q", "n": 2, "": None, "day": "2026-01-02T00:00:00"}),
        ("sheet.xlsx:row 5", {"prompt": None, "n": 0.5, "": None, "day": None}),
        ("sheet.xlsx:row 6", {"prompt": None, "n": True, "": None, "day": None}),  # what a formula gave was never saved
    ]


def test_what_is_wrong_with_a_sheet_is_told(folder: Path):
    (row,) = read(saved(folder / "wide.xlsx", [["a"], ["1", "2"]])) or []
    assert isinstance(row, Dropped)
    assert (row.reason, row.location) == ("wrong_cells", "wide.xlsx:row 2")
    assert "several sheets with rows (Sheet, Sheet1)" in refused(saved(folder / "two.xlsx", [["a"], ["1"]], [["b"], ["1"]]))
    assert "names a more than once" in refused(saved(folder / "twice.xlsx", [["a", "a"], ["1", "2"]]))
    assert "has no rows" in refused(saved(folder / "none.xlsx", [["a"]]))
    assert "has no rows" in refused(saved(folder / "empty.xlsx", []))


def test_a_sheet_that_is_damaged_is_named_or_says_what_is_left(folder: Path):
    content = saved(folder / "good.xlsx", [["prompt"], *([f"q{number}"] for number in range(20))]).read_bytes()
    path = folder / "damaged.xlsx"
    draw = random.Random(0)
    for size in range(0, len(content), 61):
        path.write_bytes(content[:size])
        assert read(path) is None
    for _ in range(150):
        start = draw.randrange(len(content))
        path.write_bytes(content[:start] + bytes(draw.randrange(256) for _ in range(draw.choice([1, 4]))) + content[start + 4 :])
        rows = read(path)
        assert rows is None or values(rows) == [{"prompt": f"q{number}"} for number in range(20)]
    path.write_bytes(b"no zip")
    assert "damaged.xlsx is not a whole spreadsheet of the kind .xlsx" in refused(path)


def test_without_the_library_a_sheet_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(folder / "sheet2.xlsx", [["a"], ["1"]])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert 'needs openpyxl, which is not installed: pip install "prefopt[xlsx]"' in refused(path)
