"""Runs the steps, and writes down what each gave: python -m bench.gpu."""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import bench.gpu
from bench.gpu.bars import table
from bench.gpu.steps import ROOT, STEPS, Setup, Step

FILE, LOG, TABLE = "gpu.jsonl", "gpu.log", "gpu.md"
GRACE_S = 10.0
"""How long a step that is told to end may take to end what it has started."""

LEAST_S = 20.0
"""A step is not begun with less than that."""

REHEARSED_LONGER = 6
"""How much longer a step may take in a rehearsal, on a CPU that may have other work."""

LAST_LINES = 400
"""Lines of a step's output that are kept."""


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(prog="bench/gpu.sh", description=bench.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = made.add_argument
    parts = sorted({str(step.part) for step in STEPS})
    flag("--part", choices=(*parts, "all"), default="all", help="steps of one call, the most important ones first")
    flag("--only", help="steps by name, separated by commas, in place of a part")
    flag("--seconds", type=float, default=470.0, help="for all steps together; what does not fit is listed as not run")
    flag("--out", type=Path, default=ROOT / "bench" / "results", help=f"folder for {FILE}, {LOG} and {TABLE}, which are added to")
    flag("--rehearse", action="store_true", help="on the CPU, tiny: whether every step runs, not how fast")
    flag("--list", action="store_true", help="the steps, and nothing else")
    flag("--table", nargs="*", type=Path, metavar="FILE", help=f"no steps: the table from such {FILE}, to --to or the terminal")
    flag("--to", type=Path, help="file for that table")
    flag("--wheels", type=Path, help="folder of wheels that are installed first, for this call only (bench/gpu.sh does it)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.table is not None:
        text = table(read(given.table), title=f"GPU, {date.today().isoformat()}", command=table_command(given))
        if given.to:
            given.to.write_text(text, encoding="utf-8")
        else:
            print(text)
        return 0
    try:
        steps = chosen(given.part, given.only)
    except ValueError as error:
        print(f"bench/gpu.sh: {error}", file=sys.stderr)
        return 2
    if given.list:
        for step in steps:
            print(f"{step.part}  {step.name:16s} up to {step.limit_s:3.0f} s  {step.says}")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    with working_folder() as work:
        setup = setup_for(work, rehearse=given.rehearse)
        if setup is None:
            print("bench/gpu.sh: torch finds no GPU here. --rehearse runs the steps on the CPU.", file=sys.stderr)
            return 2
        return run(steps, setup, given)


def table_command(given: argparse.Namespace) -> str:
    """The command as others can give it."""
    return shlex.join(["bench/gpu.sh", "--table", *(file.name for file in given.table), *(["--to", given.to.name] if given.to else [])])


def chosen(part: str, only: str | None) -> list[Step]:
    """The steps of the command line, in their order.

    Raises:
        ValueError: an unknown name.
    """
    if only is None:
        return [step for step in STEPS if part in ("all", str(step.part))]
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in [step.name for step in STEPS]]:
        raise ValueError(f"there is no step {', '.join(unknown)}. There are {', '.join(step.name for step in STEPS)}.")
    return [step for step in STEPS if step.name in names]


def setup_for(work: Path, *, rehearse: bool) -> Setup | None:
    """What the steps run on; None: no GPU."""
    import torch

    from prefopt.training.settings import RunSettings

    settings = frozenset(RunSettings.model_fields)
    if rehearse:
        return Setup("cpu", 0.0, work, settings)
    if not torch.cuda.is_available():
        return None
    return Setup("cuda", torch.cuda.get_device_properties(0).total_memory / 1e9, work, settings)


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder for models and data: in memory where there is room for one of 7 billion weights, because disks may be slow."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and shutil.disk_usage(memory).free > 40e9 else None
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=place) as folder:
        yield Path(folder)


def run(steps: Sequence[Step], setup: Setup, given: argparse.Namespace) -> int:
    """All steps, one after the other; how many did not come to their end."""
    until = time.monotonic() + given.seconds
    not_done = 0
    for step in steps:
        record = one_step(step, setup, until - time.monotonic(), given.out / LOG)
        not_done += record["outcome"] != "done" and not record["outcome"].startswith("left out")
        print(f"{step.name}: {record['outcome']} after {record['seconds']:.0f} s", flush=True)
        with (given.out / FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        title = "Rehearsal of the GPU's table" if setup.rehearses else "GPU"
        (given.out / TABLE).write_text(table(read([given.out / FILE]), title=title, command="bench/gpu.sh"), encoding="utf-8")
        for folder in ("versus/out", "versus/caches", "longest-trl"):  # room for the next; models and data serve again
            shutil.rmtree(setup.work / folder, ignore_errors=True)
    return 1 if not_done else 0


def one_step(step: Step, setup: Setup, left_s: float, log: Path) -> dict[str, Any]:
    """Run a step within its limit and what is left, and read what it measured."""
    record: dict[str, Any] = {"step": step.name, "device": setup.device, "seconds": 0.0, "found": None}
    if step.needs and not setup.named(step.needs):
        return record | {"outcome": f"left out: prefopt has no setting {step.needs}"}
    most = step.limit_s * (REHEARSED_LONGER if setup.rehearses else 1)
    limit = min(most, left_s - GRACE_S)
    if limit < min(LEAST_S, most):
        return record | {"outcome": "not run: no time was left"}
    began = time.monotonic()
    output = setup.work / f"{step.name}.log"
    command = step.command(setup)
    outcome = run_command(command, output, limit)
    last = "\n".join(output.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")[-LAST_LINES:])
    with log.open("a", encoding="utf-8") as lines:
        lines.write(f"\n== {step.name}: {outcome} after {time.monotonic() - began:.0f} s\n{shlex.join(command)}\n{last}\n")
    return record | {"outcome": outcome, "seconds": time.monotonic() - began, "found": result_of(setup.result(step.name))}


def run_command(command: Sequence[str], output: Path, limit_s: float) -> str:
    """Run it to its end or to the limit: `done`, or how it ended. Nothing that it has started is left."""
    surroundings = os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PREFOPT_REHEARSE": "1",
    }
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        code = process.wait(timeout=limit_s)
        return "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        return f"ended at its limit of {limit_s:.0f} s"
    finally:
        end_with_all(process)


def end_with_all(process: "subprocess.Popen[bytes]") -> None:
    """End the process and what it has started, some of which are in sessions of their own.

    As Ctrl-C does, because pytest then writes down what it has until then.
    """
    if process.poll() is not None:
        return
    own = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid, born in own:
        if birth(pid) == born:  # the number may be another process's by now
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[tuple[int, str]]:
    """All processes below it and when each was born, from /proc; none where there is no /proc."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return [(child, birth(child)) for child in found]


def birth(pid: int) -> str:
    """When a process was born, in the kernel's ticks; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def result_of(file: Path) -> Any:
    """What a step wrote, whatever of the three forms it has; None: nothing, or nothing whole."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return None
    if text.startswith("<?xml"):
        return of_tests(text)
    try:
        return json.loads(text)
    except ValueError:
        pass
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last one, where the step was ended
            continue
    return {"rows": rows} if rows else None


def of_tests(text: str) -> dict[str, Any] | None:
    """Counts, failures and the figures that tests noted, from pytest's file."""
    try:
        cases = list(Xml.fromstring(text).iter("testcase"))
    except Xml.ParseError:
        return None
    failures = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    return {
        "tests": {"passed": len(cases) - len(failures) - skipped, "failed": len(failures), "skipped": skipped},
        "failures": [f"{case.get('name')}: {(child.get('message') or '').strip().split(chr(10))[0][:200]}" for case, child in failures],
        "figures": {
            str(case.get("name")): {str(each.get("name")): each.get("value") for each in case.iter("property")}
            for case in cases
            if case.find("properties") is not None
        },
    }


def read(files: Sequence[Path]) -> Mapping[str, Mapping[str, Any]]:
    """The last record of each step, one that was measured before one that was not."""
    known: dict[str, dict[str, Any]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["found"] or not (known.get(record["step"]) or {}).get("found"):
                known[record["step"]] = record
    return known


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step that runs is ended
    # A script's background process is born deaf to it, and so would be the steps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
