"""The generated pages: up to date, and nothing missing."""

from pathlib import Path

import pytest

from prefopt.cli.pages import pages, write
from prefopt.methods.table import METHODS
from prefopt.training.assemble import settings_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", sorted(pages()), ids=str)
def test_pages_are_up_to_date(page: Path):
    assert (ROOT / page).read_text(encoding="utf-8") == pages()[page], f"{page} is stale: run make docs"


@pytest.mark.parametrize("method", [row.name for row in METHODS])
def test_every_setting_is_explained(method: str):
    page = pages()[Path("docs/settings.md")]
    for name, info in settings_for(next(row for row in METHODS if row.name == method).load()).model_fields.items():
        assert info.description, f"{name} needs help"
        assert f"| `{name}` | " in page
        assert f"| {info.description} |" in page


def test_a_stale_page_is_noticed_then_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert write(only_check=True) == 1
    assert capsys.readouterr().out.splitlines() == ["docs/settings.md is stale: run make docs", "docs/cli.md is stale: run make docs"]
    assert write(only_check=False) == 0
    assert write(only_check=True) == 0
    assert (tmp_path / "docs/settings.md").read_text(encoding="utf-8") == (ROOT / "docs/settings.md").read_text(encoding="utf-8")
