"""Files cut short, flipped, mislabelled and in the wrong place: each row of theirs is told of, or the file is."""

import gzip
import io
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.command_line import prefopt, refused
from tests.data.broken import TEXTS
from tests.data.broken_files import PACKED, ROWS, damaged, read, values, whole
from tests.data.conftest import CHATML

from prefopt.cli import main
from prefopt.data import sources
from prefopt.data.dataset import load
from prefopt.data.rows import Dropped, Row, Unreadable
from prefopt.data.settings import DataSettings
from prefopt.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("kind", PACKED)
def test_a_whole_file_gives_its_rows(folder: Path, kind: str):
    path = folder / f"whole{kind}"
    path.write_bytes(whole(kind))
    assert values(read(path) or []) == ROWS


@pytest.mark.parametrize("kind", PACKED)
def test_a_file_cut_anywhere_gives_rows_that_it_has_or_none(folder: Path, kind: str):
    content = whole(kind)
    path = folder / f"cut{kind}"
    for size in range(0, len(content), 3 if ".parquet" in kind else 1):
        path.write_bytes(content[:size])
        rows = read(path)
        if kind not in (".jsonl", ".csv"):
            assert rows is None  # these know their own length
        elif rows is not None:
            assert values(rows[:-1]) == ROWS[: len(rows) - 1]  # nothing is amiss before the last
            assert len(rows) >= content[:size].count(b"no ") - 1


@pytest.mark.parametrize(("kind", "times"), [(kind, 150 if kind == ".parquet" else 400) for kind in PACKED])
def test_a_damaged_file_loses_no_row_in_silence(folder: Path, kind: str, times: int):
    content = whole(kind)
    path = folder / f"damaged{kind}"
    draw = random.Random(kind)
    for _ in range(times):
        new = damaged(content, draw)
        path.write_bytes(new)
        rows = read(path)
        if rows is None:
            continue
        if kind == ".jsonl":
            check_lines(new, rows)
        elif kind.endswith((".gz", ".zst")):
            assert values(rows) == ROWS  # a checksum covers all but the header
        elif kind == ".json":
            # What was put in between may be a value; of two objects that ran into one, that one is told of.
            assert len(rows) >= len(ROWS) or any(isinstance(row, Dropped) for row in rows)
        elif kind != ".csv":
            assert len(rows) == len(ROWS)


def check_lines(content: bytes, rows: list[Row | Dropped]) -> None:
    """Each line that says something is a row, under its number; those that the damage spared are what they were."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    told = {f"damaged.jsonl:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    assert [row.location for row in rows] == list(told)
    spared = {json.dumps(row).encode(): row for row in ROWS}
    for row in rows:
        if told[row.location] in spared:
            assert isinstance(row, Row)
            assert row.value == spared[told[row.location]]


@pytest.mark.parametrize("mark", [True, False], ids=["mark", "no mark"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".csv.gz"])
def test_other_encodings_are_named_or_refused(folder: Path, kind: str, encoding: str, mark: bool):
    plain = whole(kind.removesuffix(".gz")).decode()
    content = (("\ufeff" if mark else "") + plain).encode(encoding)
    path = folder / f"encoded{kind}"
    path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    said = refused("data", str(path), "--on-bad-row", "drop")
    assert path.name in said
    if mark:
        assert f"is written in {encoding[:6].upper()}, and only UTF-8 is read. Save it as UTF-8." in said


def test_latin_1_is_named_by_row_and_byte(folder: Path):
    path = folder / "latin.jsonl"
    path.write_bytes(b'{"text": "plain"}\n{"text": "caf\xe9"}\n')
    good, bad = read(path) or []
    assert isinstance(good, Row)
    assert isinstance(bad, Dropped)
    assert (bad.location, bad.reason, bad.row) == ("latin.jsonl:2", "not_utf8", '{"text": "caf\\xe9"}')


@pytest.mark.parametrize("kind", PACKED)
def test_a_file_under_another_ending_is_refused(folder: Path, kind: str):
    for other in PACKED:
        path = folder / f"mislabelled{other}"
        path.write_bytes(whole(kind))
        rows = read(path)
        if kind == other or {kind.removesuffix(".gz"), other.removesuffix(".gz")} == {".json", ".jsonl"}:
            continue  # lines in a .json are understood, and an array in a .jsonl is one line
        assert rows is None or not any(set(row.value) == set(ROWS[0]) for row in rows if isinstance(row, Row))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b\x08", "is not text but packed by gzip: let its name end in .gz"),
        (b"\x28\xb5\x2f\xfd and more", "is not text but packed by zstandard: let its name end in .zst"),
        (b"PAR1 and more", "is not text but parquet: let its name end in .parquet"),
        (
            b"PK\x03\x04 and more",
            "is not text but a zip archive or a spreadsheet: unpack it, or let the name of a spreadsheet end in .xlsx",
        ),
    ],
)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_file_that_is_no_text_says_what_it_is(folder: Path, kind: str, content: bytes, says: str):
    (folder / f"packed{kind}").write_bytes(content)
    assert f"packed{kind} {says}" in refused("data", str(folder / f"packed{kind}"))


def test_line_ends_of_all_kinds_end_no_row_and_lose_none(folder: Path):
    path = folder / "ends.jsonl"
    lines = [b'{"text": "a"}', b'{"text": "\xe2\x80\xa8b\xc2\x85"}', b"", b" \t", b'{"text": "c"}']
    for end in (b"\n", b"\r\n", b"\n\n", b"\n\r\n"):
        path.write_bytes(end.join(lines))
        assert [row["text"] for row in values(read(path) or [])] == ["a", "\u2028b\u0085", "c"]
    path.write_bytes(b"\r".join(lines))
    assert [type(row) for row in read(path) or []] == [Dropped]


def test_a_long_line_and_a_long_cell_are_rows(folder: Path):
    text = "long " * 1_000_000
    for name, content in (("long.jsonl", json.dumps({"text": text})), ("long.csv", f'text\n"{text}"\n')):
        (folder / name).write_text(content)
        assert values(read(folder / name) or []) == [{"text": text}]


# What JSON allows and nobody means.


def test_a_key_given_twice_is_a_bad_row(folder: Path):
    twice = '{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}'
    nested = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}'
    for name, content in (("twice.jsonl", f"{twice}\n{nested}\n"), ("twice.json", f"[{twice}, {nested}]")):
        (folder / name).write_text(content)
        row, other = read(folder / name) or []
        assert isinstance(row, Dropped)
        assert (row.reason, row.detail) == ("invalid_json", "the row is an object that gives `chosen` more than once")
        assert row.to_dict()["row"] == [["prompt", "q"], ["chosen", "a"], ["rejected", "b"], ["chosen", "c"]]
        assert isinstance(other, Row)
        assert isinstance(other.value["messages"][1], Unreadable)
    said = refused("data", str(folder / "twice.json"), "--kind", "demonstration", "--data-format", "messages")
    assert "`messages` holds broken (an object that gives `content` more than once), and must hold turns" in said


def test_a_row_nested_deeper_than_python_goes_is_named(folder: Path):
    path = folder / "deep.jsonl"
    for depth in (50, 400, 800, 900, 940, 960, 980, 1000, 1100, 100_000):
        path.write_text(f'{{"prompt": "q", "chosen": "a", "rejected": {"[" * depth}{"]" * depth}}}\n' + json.dumps(ROWS[0]) + "\n")
        said = prefopt("data", str(path), "--data-format", "text_pair", "--on-bad-row", "drop").check()
        assert "2 rows -> 1 examples" in said.out


# Places.


def test_names_that_no_file_can_have_are_refused_in_words(tmp_path: Path):
    long = str(tmp_path / ("x" * 300))
    for name in [
        long,
        json.dumps(ROWS),
        "x\0y",
        "a\0/b.jsonl",
        "~nobody-of-that-name/x.jsonl",
        "\udcff.jsonl",
        ":",
        "x:",
        "-x",
        "\n",
    ]:
        with pytest.raises(DataError):
            sources.find([name])
    for name in ["", " ", "\t"]:
        with pytest.raises(DataError, match="a name that is empty"):
            sources.find([name])


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rows.jsonl").write_bytes(whole(".jsonl"))
    monkeypatch.chdir(tmp_path)
    assert "must not be empty" in refused("data", "")
    assert "must not be empty" in refused("data", "--data=")


def test_home_is_understood_where_no_shell_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rows.jsonl").write_bytes(whole(".jsonl"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "6 rows -> 6 examples" in prefopt("data", "~/rows.jsonl").check().out


@pytest.mark.parametrize("target", ["pipe", "/dev/null", "/dev/zero"])
def test_what_may_never_end_is_not_read(tmp_path: Path, target: str):
    path = tmp_path / "rows.jsonl"
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    with pytest.raises(DataError, match=r"rows.jsonl is a pipe or a device, not a file. Pipe JSON lines into the command, and give `-`"):
        sources.find([str(path)])


def test_a_file_that_must_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(whole(".jsonl"))

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")  # root reads whatever its mode is

    for method in ("open", "is_dir", "iterdir"):
        given = path.parent if method == "iterdir" else path
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, method, forbidden)
            with pytest.raises(DataError, match="Permission denied"):
                [sources.read(place) for place in sources.find([str(given)]).places]


def test_a_folder_of_junk_gives_its_files_and_lists_the_rest(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(whole(".jsonl"))
    (folder / "b.CSV.GZ").write_bytes(whole(".csv.gz"))
    Path(os.fsdecode(os.fsencode(folder) + b"/c\xff.jsonl")).write_bytes(whole(".jsonl"))
    (folder / ".hidden.jsonl").write_text("{")
    (folder / "notes.txt").write_text("x")
    (folder / "sub.jsonl").mkdir()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.jsonl")
    found = sources.find([str(folder)])
    assert [place.name for place in found.places] == ["a.jsonl", "b.CSV.GZ", "c\\udcff.jsonl"]
    ignored = {Path(name).name for name in found.ignored}
    assert ignored == {".hidden.jsonl", "notes.txt", "sub.jsonl", "loop.jsonl", "gone.jsonl", "up", "pipe.jsonl"}
    assert "18 rows -> 18 examples" in prefopt("data", str(folder)).check().out


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path: Path):
    (tmp_path / "x.jsonl").mkdir()
    assert "holds no data file (it holds nothing)" in refused("data", str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl" / "y.jsonl").write_bytes(whole(".jsonl"))
    assert "y.jsonl: 6 rows" in prefopt("data", str(tmp_path / "x.jsonl")).check().out


@settings(max_examples=150)
@given(
    content=st.one_of(
        st.binary(max_size=60), st.lists(st.sampled_from(TEXTS).map(lambda text: text.encode(errors="surrogatepass"))).map(b"\n".join)
    )
)
def test_whatever_comes_in_by_standard_input_is_counted_or_refused(content: bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        said = prefopt("data", "-", "--data-format", "text_pair", "--on-bad-row", "drop").check()
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert said.code == 2 or f"{sum(bool(line.strip()) for line in lines)} rows ->" in said.out


# What the terminal is told.


def printed(rows: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    path = folder / "named.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    yield from prefopt("data", str(path)).check().out.splitlines()


def test_names_of_columns_are_shown_so_that_a_terminal_survives_them(folder: Path):
    [line] = [line for line in printed([ROWS[0] | {"\x1b[31m\n": 1, "\ud800": 2, "a\u202eb": 3}], folder) if "columns not read" in line]
    assert line == "  columns not read: \\x1b[31m\\n, \\ud800, a\\u202eb"


def test_what_turns_hold_beside_their_words_is_listed_as_not_read(folder: Path):
    thought = {"role": "assistant", "content": "a", "thinking": "hm", "mood": 0, "weight": 1, "name": None}
    rows = [{"prompt": [{"role": "user", "content": "q"}], "chosen": [thought], "rejected": "b"}]
    assert "  columns not read: chosen[].mood, chosen[].thinking" in list(printed(rows, folder))


def test_a_column_that_appears_late_is_listed_as_not_read(folder: Path):
    rows = [ROWS[0] | {"chosen": str(number)} for number in range(150)]
    rows[140]["late"] = 1
    assert "  columns not read: late" in list(printed(rows, folder))


def test_a_terminal_that_lacks_the_characters_gets_them_as_escapes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = folder / "ümlaut.jsonl"
    path.write_bytes(whole(".jsonl"))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["data", str(path)]) == 0
    assert out.buffer.getvalue().startswith(b"\\xfcmlaut.jsonl: 6 rows")


def test_a_chat_template_that_no_row_is_written_with_is_told(folder: Path, chatml: Any):
    path = folder / "plain.jsonl"
    path.write_bytes(whole(".jsonl"))
    settings = DataSettings(data=["-"], cache_dir=folder / "cache", chat_template=CHATML)
    notes = load([str(path)], settings, chatml, kind="pair").summary.notes
    assert "chat_template had nothing to do: no row is a chat; `--text-as chat` makes plain prompts one" in notes
    assert not load([str(path)], settings.model_copy(update={"text_as": "chat"}), chatml, kind="pair").summary.notes
