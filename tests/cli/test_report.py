"""`prefopt report`: at any time, of any run."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.report.made import make_run

from prefopt.cli import main


def test_the_page_is_written_into_the_run_and_its_path_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run", num_steps=20)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_page_can_be_written_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run", num_steps=20)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none"], "there is no folder none. Give the folder that a run was given as out."),
        ([], "--run: is required, and was not given"),
        (["a", "b"], "takes one value (given: a b)"),
        (["a", "--outt", "b"], "--outt: no such flag (did you mean --out?)"),
    ],
)
def test_mistakes_are_told_in_a_sentence(capsys: pytest.CaptureFixture[str], words: list[str], says: str):
    assert main(["report", *words]) == 2
    assert says in capsys.readouterr().err


def test_neither_help_nor_a_report_loads_torch(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=5)
    script = (
        "import sys; from prefopt.cli import main; assert main(['report', '--help']) == 0; "
        "assert not {'torch', 'matplotlib', 'jinja2'} & set(sys.modules); "
        f"assert main(['report', {str(run)!r}]) == 0; assert 'torch' not in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, timeout=120)
