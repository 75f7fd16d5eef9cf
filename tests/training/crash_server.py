"""Command lines in processes of their own, without the seconds that imports take: they are forked from one that has imported
everything and run nothing.

A child can be told where to die: `sys.addaudithook` sees every file that Python opens for writing, every folder made, every
rename and removal, so "before the fifth removal in the second save" is a place that a test can name and find again. A limit on
the size of files (RLIMIT_FSIZE) cuts a write short in the middle, where no line of Python runs. SIGKILL from outside does the rest.
"""

import json
import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "sqlite3.connect"}
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Blow:
    """What strikes a child, and where.

    Attributes:
        at: pattern of the event, as `traced` writes it; the blow falls before it takes place.
        nth: which of those that match, from 1.
        do: `kill`: SIGKILL; `cut`: the next write that makes a file longer than `size` bytes ends the process in its middle;
            `interrupt`: so many SIGINT as `size` says, one after the other; `wait`: writes a file `struck` beside the run's folder
            and waits until there is a file `go`; `pause`: a second in which others have their turn; `fill`: the disk that the
            event is about gets so full that `size` bytes are left.
        size: for `cut`, beside what the file that is opened holds already, and for `interrupt`.
    """

    at: str
    nth: int = 1
    do: str = "kill"
    size: int = 0


@dataclass
class Child:
    """A command line that runs."""

    server: "Server"
    pid: int
    log: Path
    code: int | None = None

    def wait(self, timeout_s: float = 120.0) -> int:
        """Its exit code; negative: the signal that ended it."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout_s} s: {self.said}")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})["code"]
        return self.code

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; too late is no error."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """What it has written to standard output and standard error."""
        return self.log.read_text()


@dataclass
class Server:
    """The process that forks; the test's end of it."""

    process: "subprocess.Popen[str]"
    logs: Path
    num: int = field(default=0)

    def start(
        self, words: Sequence[str], *, blow: Blow | None = None, trace: Path | None = None, prelude: str = "", base: Path | None = None
    ) -> Child:
        """A command line, `prefopt` left out.

        Args:
            words: of the command line.
            blow: what strikes it.
            trace: where it writes its file events, one a line, when it ends by itself.
            prelude: Python that runs first.
            base: folder whose files are watched; the default is the one in which the run's folder is.
        """
        self.num += 1
        log = self.logs / f"{self.num}.log"
        asked = {
            "words": list(words),
            "blow": asdict(blow) if blow else None,
            "trace": str(trace or ""),
            "log": str(log),
            "prelude": prelude,
            "base": str(base or ""),
        }
        return Child(self, self.ask(asked)["pid"], log)

    def run(self, words: Sequence[str], *, code: int = 0, **how: Any) -> str:
        """Run a command line to its end, which must have that exit code; what it said."""
        child = self.start(words, **how)
        found = child.wait()
        assert found == code, f"exit code {found}, not {code}: {child.said}"
        return child.said

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One line there, one back."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server is gone"
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def serving(logs: Path, *, under: Sequence[str] = ()) -> Iterator[Server]:
    """A server, until the end of the block; `under`: words before its command."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [*under, sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        try:
            yield Server(process, logs)
        finally:
            process.kill()


# What follows runs in the server and in its children.


def serve() -> None:
    """Answer questions until there are no more."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup make test` children would inherit that it is ignored
    import_everything()
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            answer = {"code": exit_code(question["poll"], children)}
        else:
            answer = {"pid": fork(question)}
            children[answer["pid"]] = None
        print(json.dumps(answer), flush=True)


def import_everything() -> None:
    """What a run imports, late imports included. Nothing is run: threads do not survive a fork."""
    import jinja2.loaders  # noqa: F401
    import peft  # noqa: F401
    import transformers.generation.utils
    import transformers.models.llama.modeling_llama  # noqa: F401

    import prefopt.cli.train
    import prefopt.cli.train_method
    import prefopt.data.dataset
    import prefopt.methods.dpo
    import prefopt.methods.sft
    import prefopt.report.draw
    import prefopt.report.page
    import prefopt.training.run  # noqa: F401

    with suppress(ImportError):  # a table of patterns that transformers compiles when it loads its first model
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")


def exit_code(pid: int, children: dict[int, int | None]) -> int | None:
    """Of a child, or None while it runs."""
    if children[pid] is None:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            children[pid] = os.waitstatus_to_exitcode(status)
    return children[pid]


def fork(question: dict[str, Any]) -> int:
    """A child that runs the command line."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run_child(question)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            multiprocessing.util._exit_function()  # os._exit leaves it out, and the semaphores of pools behind
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_child(question: dict[str, Any]) -> int:
    """The command line, watched; its exit code."""
    from prefopt.cli import entry

    out = Path(question["words"][question["words"].index("--out") + 1])
    events = watch(Path(question["base"]) if question["base"] else out.parent, Blow(**question["blow"]) if question["blow"] else None)
    exec(question["prelude"], {})
    try:
        return entry.main(question["words"])
    finally:
        if question["trace"]:
            Path(question["trace"]).write_text("".join(f"{event}\n" for event in events))


def flags(method: str, model: Path | str, data: str, out: Path, **settings: Any) -> list[str]:
    """The words of a command line that trains: the run of `tests.training.runs.run`, seven steps of it, and the settings on top."""
    tiny = {"batch_size": 4, "epochs": 3, "learning_rate": 1e-3, "max_length": 128, "device": "cpu", "precision": "float32"}
    tiny |= {"memory_check": False, "report": False, "samples": 0, "cache_dir": out.parent / "cache"}
    words = ["train", method, "--model", str(model), "--data", data, "--out", str(out)]
    for name, value in (tiny | settings).items():
        words += [f"--{name.replace('_', '-')}", {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)]
    return words


def watch(base: Path, blow: Blow | None) -> list[str]:
    """Notes every change that Python makes to files below `base` from now on, and strikes."""
    events: list[str] = []
    left = blow.nth if blow else 0
    pattern = re.compile(blow.at) if blow else None

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if name not in WATCHED or (event := traced(base, name, args)) is None:
            return
        events.append(event)
        if pattern is not None and left > 0 and pattern.search(event):
            left -= 1
            if left == 0:
                assert blow is not None
                strike(blow, args[0], base)

    sys.addaudithook(hook)
    return events


def traced(base: Path, name: str, args: tuple[Any, ...]) -> str | None:
    """An event as a line, `os.rename run/.config.yaml.new`; None for what changes nothing below `base`."""
    if name == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return None
    if not isinstance(args[0], str | os.PathLike):
        return None
    path = os.fspath(args[0])
    if isinstance(path, bytes):
        return None
    if not os.path.isabs(path):  # within a folder that is being removed
        return f"{name} .../{path}" if name in ("os.remove", "os.rmdir") else None
    if not path.startswith(f"{base}{os.sep}") or os.path.lexists(path) != (
        name in ("os.remove", "os.rename", "os.rmdir") or os.path.isfile(path)
    ):
        return None
    return f"{name} {os.path.relpath(path, base)}"


def strike(blow: Blow, path: Any, base: Path) -> None:
    """Do what the blow says, to the file that the event is about."""
    if blow.do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif blow.do == "interrupt":
        for _ in range(blow.size):
            signal.raise_signal(signal.SIGINT)
    elif blow.do == "wait":
        (base / "struck").touch()
        while not (base / "go").exists():
            time.sleep(0.01)
    elif blow.do == "pause":
        time.sleep(1)
    elif blow.do == "fill":
        fill(Path(path), blow.size)
    elif blow.do == "cut":
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and the write would only fail
        held = os.path.getsize(path) if os.path.isfile(path) else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (held + blow.size, resource.RLIM_INFINITY))


def fill(path: Path, left: int) -> None:
    """A file `ballast` that takes all but so many bytes of a path's disk."""
    disk = next(parent for parent in path.parents if parent.is_mount())
    with (disk / "ballast").open("wb", buffering=0) as file:
        for block in (1 << 16, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(bytes(block))
        file.truncate(max(0, file.tell() - left))


if __name__ == "__main__":
    serve()
