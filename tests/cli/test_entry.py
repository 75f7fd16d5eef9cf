"""The process: exit codes, and what is printed when something goes wrong."""

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import prefopt
from prefopt.cli import main
from prefopt.cli.entry import show_warning
from prefopt.errors import DataError, RunStopped


def quickstart_that(monkeypatch: pytest.MonkeyPatch, does: Any) -> None:
    module = ModuleType("prefopt.pipeline.quickstart")
    module.quickstart = does  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prefopt.pipeline.quickstart", module)


def raising(error: BaseException) -> Any:
    def run(out: Any, seed: int) -> None:
        raise error

    return run


def test_warnings_are_sentences(capsys: pytest.CaptureFixture[str]):
    show_warning("the cache is gone", UserWarning, "file.py", 3)
    show_warning("old name", FutureWarning, "file.py", 3)
    err = capsys.readouterr().err
    assert err.startswith("prefopt: note: the cache is gone\n")
    assert "file.py:3: FutureWarning: old name" in err


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == prefopt.__version__


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["quickstart", "--sed", "3"], "--sed: no such flag (did you mean --seed?)"),
        (["quickstart", "--seed", "-1"], "--seed: must be greater than or equal to 0 (given: -1)"),
        (["quickstart", "extra"], "extra: belongs to no flag"),
        (["methods", "--foo"], "Unknown option: --foo."),
        (["new", "--out", "x"], "--text: is required"),
    ],
)
def test_mistakes_of_the_command_line_exit_with_2(capsys: pytest.CaptureFixture[str], words: list[str], says: str):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.startswith("prefopt: ")
    assert "Traceback" not in err + out
    assert out == ""


def test_settings_reach_the_command(monkeypatch: pytest.MonkeyPatch):
    got = []
    quickstart_that(monkeypatch, lambda out, seed: got.append((str(out), seed)))
    assert main(["quickstart"]) == 0
    assert main(["quickstart", "--out", "x", "--seed", "3"]) == 0
    assert got == [("runs/quickstart", 0), ("x", 3)]


def test_errors_that_users_can_mend_exit_with_2_and_their_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    quickstart_that(monkeypatch, raising(DataError("row 3 is empty")))
    assert main(["quickstart"]) == 2
    assert capsys.readouterr().err == "prefopt: row 3 is empty\n"


def test_a_run_that_was_stopped_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    quickstart_that(monkeypatch, raising(RunStopped("stopped after step 3; go on with --resume")))
    assert main(["quickstart"]) == 130
    assert capsys.readouterr().err == "prefopt: stopped after step 3; go on with --resume\n"


def test_a_bug_exits_with_1_its_traceback_and_a_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    quickstart_that(monkeypatch, raising(ZeroDivisionError("of a kind")))
    assert main(["quickstart"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: of a kind" in err
    assert "a bug in prefopt. Please report it" in err.splitlines()[-1]


def test_an_interrupt_exits_with_130_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    quickstart_that(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["quickstart"]) == 130
    assert capsys.readouterr().err == "prefopt: stopped\n"


@pytest.mark.parametrize("words", ["train dpo --help", "methods"])
def test_a_reader_that_leaves_gets_no_traceback(words: str):
    command = f"{sys.executable} -m prefopt {words} | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() in ("0", "1")  # 0 where all was written before the reader left
    assert ended.stderr == ""


def test_the_module_is_the_command():
    ended = subprocess.run([sys.executable, "-m", "prefopt", "trian"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("prefopt: Unknown command")
    assert ended.stdout == ""
