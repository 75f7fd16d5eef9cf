"""The GPU's steps, table and time limits, without a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench.gpu import bars
from bench.gpu.__main__ import GRACE_S, chosen, descendants, end_with_all, main, of_tests, one_step, parser, read, result_of, run_command
from bench.gpu.steps import STEPS, STEPS_LIMIT_S, TESTS, Setup, Step
from bench.longest import search

ROOT = Path(__file__).parents[2]


def setup_in(folder: Path, *settings: str) -> Setup:
    return Setup("cpu", 0.0, folder, frozenset(settings))


def test_without_measurements_every_bar_is_listed_as_not_measured(tmp_path: Path):
    assert main(["--table", "--to", str(tmp_path / "gpu.md")]) == 0
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == len(bars.BARS) + 1
    assert all(row.endswith(f"| {bars.NOT_MEASURED} |") for row in rows)
    for bar in ("4.5x", "2.5x", "45 %", "below 24 GB", "below 12 GB", "at least TRL's"):
        assert sum(f"| {bar} |" in row for row in rows) >= 1
    assert "No GPU was available" in lines[-1]


def test_every_bar_is_measured_by_a_step():
    steps = {step.name for step in STEPS}
    assert {bar.step for bar in bars.BARS} <= steps
    assert len(steps) == len(STEPS)
    assert [step.part for step in STEPS] == sorted(step.part for step in STEPS)
    assert all((ROOT / file).is_file() for file in TESTS)


def test_the_steps_of_a_part_fit_into_its_time_whatever_they_take():
    for part in {step.part for step in STEPS}:
        assert sum(step.limit_s for step in STEPS if step.part == part) <= STEPS_LIMIT_S
    assert parser().get_default("seconds") >= STEPS_LIMIT_S + GRACE_S


@pytest.mark.parametrize(("memory", "apart"), [(140.0, False), (80.0, True)])
def test_contestants_take_turns_where_they_fit_together(tmp_path: Path, memory: float, apart: bool):
    setup = Setup("cuda", memory, tmp_path, frozenset())
    commands = {step.name: step.command(setup) for step in STEPS if step.name.startswith(("versus", "no-prefix"))}
    assert ("--apart" in commands["versus-0.5b"]) is apart
    assert "--apart" not in commands["no-prefix"]
    assert "--apart" in commands["versus-1.5b"]
    for name in ("versus-0.5b", "versus-1.5b", "no-prefix"):
        assert commands[name][commands[name].index("--blocks") + 1] == "10"
        assert "prefopt-again" in commands[name][commands[name].index("--contestants") + 1]


def test_an_unknown_step_is_named():
    assert [step.name for step in chosen("1", None)][:2] == ["facts", "correct"]
    assert [step.name for step in chosen("all", "head,facts")] == ["facts", "head"]
    with pytest.raises(ValueError, match="no step hed"):
        chosen("all", "hed")


def entry(label: str, **figures: Any) -> dict[str, Any]:
    speed = {"whole_pairs_per_second": figures.get("speed", 1.0), "share": figures.get("share", 0.0)}
    time = {"median": figures.get("times", 1.0), "low": 0.9, "high": 6.0}
    peak = {"peak": figures.get("peak", 0)}
    return {
        "label": label,
        "speed": speed,
        "time_with_reference": time,
        "time_steps": time,
        "memory": peak,
        "loss_difference": {"largest": 0},
        "blocks": [{"seconds": seconds, "tokens": 100} for seconds in figures.get("seconds", (1.0, 1.0))],
    }


def test_bars_are_met_or_not():
    base = entry("prefopt", speed=50, share=0.44, peak=23.9e9)
    found = {"contestants": [base, entry("trl", speed=10, times=5.0), entry("trl-best", speed=25, times=2.4)]}
    record = {"outcome": "done", "seconds": 1.0, "found": found}
    rows = {what: text for what, _, text in bars.rows({"versus-1.5b": record, "memory-7b": record, "memory-7b-4bit": record})}
    assert (
        rows["1.5B in full, 64 pairs per step: pairs/s against TRL as it comes"]
        == "5.00x (0.90-6.00), 2 blocks; 50 against 10 pairs/s: met"
    )
    assert rows["1.5B: pairs/s against TRL's best"].endswith("25 pairs/s: NOT met")
    assert rows["1.5B: share of the measured bf16 rate"] == "44%: NOT met"
    assert rows["7B, LoRA of rank 16 on bf16 weights: peak"] == "23.9 GB allocated: met"
    assert rows["7B, LoRA of rank 16 on 4-bit weights: peak"] == "23.9 GB allocated: NOT met"
    assert rows["0.5B: pairs/s against TRL's best"] == bars.NOT_MEASURED


def test_bars_against_sharing_off():
    def found(plain: float, again: float) -> dict[str, Any]:
        sides = [entry("prefopt", peak=1e9), entry("prefopt-again", times=again), entry("prefopt-plain", times=plain, peak=2e9)]
        return {"found": {"contestants": sides}}

    rows = {what: text for what, _, text in bars.rows({"no-prefix": found(0.95, 1.01), "hybrid": found(1.4, 0.99)})}
    assert rows["0.5B, no shared prefix, against sharing off"] == "1.053 of its time; A/A 1.010 (0.900-6.000): NOT met"
    assert rows["hybrid shape, hh-rlhf lengths, against sharing off"].startswith("1.40x")
    assert rows["hybrid shape, hh-rlhf lengths, against sharing off"].endswith("A/A 0.990 (0.900-6.000); 0.50 of its memory: met")
    rows = {what: text for what, _, text in bars.rows({"no-prefix": found(0.97, 1.01)})}
    assert rows["0.5B, no shared prefix, against sharing off"].endswith(": met")


@pytest.mark.parametrize(("eight", "met"), [(1.09, True), (1.11, False)])
def test_the_cost_of_completions_is_that_of_their_tokens(eight: float, met: bool):
    owns = [entry(f"prefopt@k{count}", seconds=(each,) * 3) for count, each in ((2, 1.0), (4, 1.05), (8, eight))]
    rows = {what: text for what, _, text in bars.rows({"k": {"found": {"contestants": owns}}})}
    text = rows["0.5B, K = 4 and 8 completions against 2: time per token"]
    assert text == f"1.050 with 4, {eight:.3f} with 8 completions: {'met' if met else 'NOT met'}"


def test_a_plan_is_held_against_what_was_measured():
    found = {"0": {"way": "full", "memory": [11.0, 10.0], "step": [0.8, 1.0]}}
    rows = {what: text for what, _, text in bars.rows({"plan": {"found": found}})}
    assert rows["`prefopt plan`, 0.5B: predicted / measured"] == "full memory 1.10, full step 0.80: NOT met"


def test_a_rehearsal_is_no_measurement():
    record = {"outcome": "done", "device": "cpu", "found": {"contestants": [entry("prefopt", peak=1e9)]}}
    rows = {what: text for what, _, text in bars.rows({"memory-7b": record})}
    assert rows["7B, LoRA of rank 16 on bf16 weights: peak"] == "not measured; rehearsed: 1.0 GB allocated"


def test_a_step_without_a_result_says_how_it_ended():
    record = {"outcome": "ended at its limit of 9 s", "seconds": 9.0, "found": None}
    rows = {what: text for what, _, text in bars.rows({"compile": record})}
    assert rows["0.5B, torch.compile of norms and feed-forward parts"] == "not measured (ended at its limit of 9 s)"


@pytest.mark.parametrize(("ours", "theirs", "text"), [(8, 8, "8 against 8 tokens: met"), (7, 8, "7 against 8 tokens: NOT met")])
def test_longest_takes_two_steps(ours: int, theirs: int, text: str):
    records = {f"longest-{side}": {"outcome": "done", "found": {"longest": count}} for side, count in (("prefopt", ours), ("trl", theirs))}
    assert text in [row[2] for row in bars.rows(records)]
    del records["longest-trl"]
    assert f"prefopt {ours} tokens, not measured" in [row[2] for row in bars.rows(records)]


def test_a_step_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path):
    """The grandchild is in a session of its own and ignores SIGTERM."""
    inner = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    outer = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    [(child, _)] = descendants(process.pid)
    end_with_all(process)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.05)
    assert not Path(f"/proc/{child}/cmdline").exists() or Path(f"/proc/{child}/cmdline").read_bytes() == b""
    process.stdout.close()
    assert run_command([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 0.3) == "ended at its limit of 0 s"
    assert run_command([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 20) == "failed with exit code 3"
    assert run_command([sys.executable, "-c", ""], tmp_path / "log", 20) == "done"


def test_a_step_keeps_what_it_wrote_before_it_failed(tmp_path: Path):
    def command(setup: Setup) -> list[str]:
        return [sys.executable, "-c", f"open({str(setup.result('x'))!r}, 'w').write('{{\"a\": 1}}'); print('said'); raise SystemExit(1)"]

    record = one_step(Step("x", 1, "", 30, command), setup_in(tmp_path), 100, tmp_path / "log")
    assert record["outcome"] == "failed with exit code 1"
    assert record["found"] == {"a": 1}
    assert "said" in (tmp_path / "log").read_text()


def test_a_step_without_its_setting_or_without_time_is_left_out(tmp_path: Path):
    step = Step("x", 1, "", 30, lambda setup: ["false"], "load_in_4bit")
    assert one_step(step, setup_in(tmp_path), 100, tmp_path / "log")["outcome"] == "left out: prefopt has no setting load_in_4bit"
    assert one_step(step, setup_in(tmp_path, "load_in_4bit"), 15, tmp_path / "log")["outcome"] == "not run: no time was left"


def test_results_of_all_three_forms(tmp_path: Path):
    file = tmp_path / "r"
    assert result_of(file) is None
    file.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert result_of(file) == {"rows": [{"a": 1}, {"a": 2}]}
    found = of_tests(
        '<?xml version="1.0"?><testsuites><testsuite><testcase name="good"><properties><property name="apart" value="0.1"/></properties>'
        '</testcase><testcase name="bad"><failure message="assert 1&#10;more"/></testcase><testcase name="none"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert found == {
        "tests": {"passed": 1, "failed": 1, "skipped": 1},
        "failures": ["bad: assert 1"],
        "figures": {"good": {"apart": "0.1"}},
    }


def test_what_was_measured_outlives_what_was_not(tmp_path: Path):
    lines = [{"step": "head", "outcome": "done", "found": {"rows": []}}, {"step": "head", "outcome": "not run", "found": None}]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read([tmp_path / "gpu.jsonl"])["head"]["outcome"] == "done"


@pytest.mark.parametrize("border", [20, 63, 64, 100, 1000, 5000])
def test_the_longest_length_is_found_to_a_sixteenth(border: int):
    tried: list[int] = []
    found = search(lambda length: length <= border, 64, 1_000_000, lambda length, fits: tried.append(length))
    assert border * 15 / 17 - 1 <= found <= border
    assert len(tried) < 20
    assert search(lambda length: False, 64, 1000, lambda length, fits: None) == 0
    assert search(lambda length: True, 64, 200, lambda length, fits: None) == 128


def test_the_first_step_runs_from_the_shell(tmp_path: Path):
    """The script, the runner and a step, as a rehearsal."""
    command = ["bash", "bench/gpu.sh", "--rehearse", "--only", "facts", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert record["outcome"] == "done"
    assert record["found"]["bf16_flops"] > 1e6
    assert "rehearsed on a CPU" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_step_runs_in_a_rehearsal(tmp_path: Path):
    command = ["bash", "bench/gpu.sh", "--rehearse", "--seconds", "1700", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1750, check=False)
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    log = (tmp_path / "gpu.log").read_text()
    assert [record["step"] for record in records] == [step.name for step in STEPS], done.stderr
    assert all(record["outcome"] == "done" or record["outcome"].startswith("left out") for record in records), log
    assert all(record["found"] for record in records if record["outcome"] == "done"), log
