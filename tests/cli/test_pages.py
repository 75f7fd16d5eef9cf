"""The generated pages: up to date, and nothing missing."""

from pathlib import Path

import pytest

from prefopt.cli.entry import main
from prefopt.cli.method_page import index_page
from prefopt.cli.pages import makers, settings_page, write
from prefopt.methods.table import METHODS, MethodRow
from prefopt.training.assemble import settings_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings() -> str:
    return settings_page()


@pytest.mark.parametrize("page", sorted(makers()), ids=str)
def test_pages_are_up_to_date(page: Path):
    assert (ROOT / page).read_text(encoding="utf-8") == makers()[page](), f"{page} is stale: run make docs"


@pytest.mark.parametrize("method", [row.name for row in METHODS])
def test_every_setting_is_explained(method: str, settings: str):
    for name, info in settings_for(next(row for row in METHODS if row.name == method).load()).model_fields.items():
        assert info.description, f"{name} needs help"
        assert f"| `{name}` | " in settings
        assert f"| {info.description} |" in settings


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_method_has_its_page(row: MethodRow, capsys: pytest.CaptureFixture[str]):
    page = makers()[Path(f"docs/methods/{row.name}.md")]()
    for part in (row.summary, "**When to use it:**", "**What to watch:**", "**Deviations", f"`prefopt train {row.name}`"):
        assert part in page
    assert "Shapes:" not in page
    assert f"[{row.name}]({row.name}.md)" in index_page()
    assert main(["methods", row.name]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert row.summary in shown
    assert "settings.md" not in shown  # nobody can follow a link there


def test_a_method_that_there_is_not(capsys: pytest.CaptureFixture[str]):
    assert main(["methods", "ipoo"]) == 2
    assert "ipoo: no such method (did you mean ipo?)" in capsys.readouterr().err


def test_a_stale_page_is_noticed_then_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert write(only_check=True) == 1
    assert capsys.readouterr().out.splitlines() == [f"{page} is stale: run make docs" for page in makers()]
    assert write(only_check=False) == 0
    assert write(only_check=True) == 0
    assert (tmp_path / "docs/settings.md").read_text(encoding="utf-8") == (ROOT / "docs/settings.md").read_text(encoding="utf-8")
