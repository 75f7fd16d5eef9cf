"""The command line: python -m bench.versus."""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import bench.versus
from bench.versus import results, tables
from bench.versus.contestants import CONTESTANTS, Contestant, UsageError, choose, divisors_to_try
from bench.versus.match import ROOT, Player, Rounds
from bench.versus.plan import CHECKPOINTING, USUAL_LENGTH, Plan, examples_of_steps, plan_from, player_for, prepare, shortened, spec_for
from bench.versus.shapes import SHAPES, MatrixRate
from bench.versus.workloads import MADE, WORKLOADS, Workload, write_lengths
from rich.console import Console

from prefopt.errors import PrefoptError

PAIRS = "prefopt,prefopt-again,prefopt-warm,trl,trl-best"
OURS = "prefopt,prefopt-again,prefopt-plain"
SEARCH_BLOCKS = 2
CLEARLY_SLOWER = 0.85
"""Share of the best speed below which the search for TRL's best batch ends."""


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(
        prog="python -m bench.versus", description=bench.versus.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = made.add_argument
    flag("--workload", choices=WORKLOADS, default="hh", help="what is trained on; hh, ukp and dpo_en need --data")
    flag("--shape", choices=SHAPES, default="32m", help="of the model; weights are random")
    flag(
        "--contestants",
        help=f"any of {', '.join(CONTESTANTS)}; NAME@WORKLOAD runs one on other data. The default is {PAIRS}, on made-up workloads {OURS}",
    )
    flag("--set", action="append", default=[], metavar="NAME:SETTING=VALUE", help="of one contestant, and of those called NAME-...")
    flag("--batch", type=int, default=8, help="examples of an optimizer step")
    flag("--blocks", type=int, default=10, help="measured blocks of each contestant; one more warms up")
    flag("--block-steps", type=int, default=2, help="optimizer steps of a block")
    flag("--precision", choices=("auto", "bf16", "float32"), default="auto")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flag("--checkpointing", choices=CHECKPOINTING, default="off", help="of activations: for all, or each trainer's own default")
    flag("--max-length", type=int, help=f"longest prompt with completion; longer rows are left out; default {USUAL_LENGTH} or more")
    flag("--learning-rate", type=float, default=1e-5)
    flag("--lora-rank", type=int, default=0, help="train an adapter of this rank; 0: all weights")
    flag("--prompt-tokens", type=int, help="of made-up workloads")
    flag("--completion-tokens", type=int, help="of made-up workloads")
    flag("--data", type=Path, help="folder of real data; or PREFOPT_SHARED; or shared/data beside the checkout")
    flag("--lengths", type=Path, help="file of lengths for the workload of that name")
    flag("--only", choices=("tokenise", "lengths"), help="measure tokenisation alone; or write the workload's lengths to --out")
    flag("--apart", action="store_true", help="one contestant after the other: where they do not fit into the memory together")
    flag("--threads", type=int, default=0, help="of each process; the default is the libraries' own choice")
    flag("--limit", type=float, default=1800, help="seconds after which a silent contestant has failed")
    flag("--seed", type=int, default=0, help="of weights and of the choice of pairs")
    flag("--trl-python", help="python of an environment that has TRL; the default is this one")
    flag("--work", type=Path, help="folder for models, data and logs, kept; the default is a temporary one")
    flag("--name", help="of the result's file, after the date")
    flag("--out", type=Path, help="JSON file of the result, with the table beside it as .md; default: bench/results/DATE-NAME.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    # No narrower than the table where nobody looks.
    console = Console(width=None if sys.stdout.isatty() else 160)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestants are ended
    if given.threads:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = command_line(sys.argv[1:] if arguments is None else arguments)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    try:
        with working_folder(given.work) as work:
            return run(given, work, command, console, say)
    except (UsageError, PrefoptError) as error:
        print(f"bench.versus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the contestants are ended, nothing is written", file=sys.stderr)
        return 130


@contextmanager
def working_folder(given: Path | None) -> Any:
    """A folder for all files: as given and kept, or one that is gone afterwards."""
    if given is not None:
        own = given.resolve() / "versus"  # of its own: two folders in it are emptied
        own.mkdir(parents=True, exist_ok=True)
        for name in ("out", "caches"):  # so that a cold contestant is cold
            shutil.rmtree(own / name, ignore_errors=True)
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="versus-") as folder:
        yield Path(folder)


def run(given: argparse.Namespace, work: Path, command: str, console: Console, say: Callable[[str], None]) -> int:
    plan = plan_from(given, work)
    default = OURS if plan.workload in MADE else PAIRS
    chosen = choose(given.contestants or ("prefopt,prefopt-again,trl" if given.only == "tokenise" else default), given.set, WORKLOADS)
    say(f"preparing {plan.workload} for {plan.shape} on {plan.device} in {plan.precision}")
    model, workloads = prepare(plan, [plan.workload, *(entry.workload for entry in chosen if entry.workload)])
    name = given.name or "-".join(filter(None, (given.only, plan.workload, plan.shape, plan.device)))
    out = given.out or ROOT / "bench" / "results" / f"{date.today().isoformat()}-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if given.only == "lengths":
        say(f"{write_lengths(workloads[plan.workload], out, max_length=plan.max_length)} lengths in {out}")
        return 0
    if given.only == "tokenise":
        found = tokenise(plan, chosen, workloads[plan.workload], model, say)
    else:
        found = train(plan, chosen, workloads, model, say)
    found = {"name": name, "date": date.today().isoformat(), "command": command, **found}
    tables.show(found, console)
    tables.write(found, out, hidden=(str(work), str(ROOT)))
    say(f"written: {out} and {out.with_suffix('.md').name}")
    return 1 if any(entry["failure"] for entry in found["contestants"]) else 0


def train(
    plan: Plan, chosen: Sequence[Contestant], workloads: dict[str, Workload], model: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train with all contestants in turns; everything that was measured."""
    caches = {entry.label: plan.work / "caches" / entry.file_name for entry in chosen}
    search: list[dict[str, Any]] = []
    for entry in chosen:
        if entry.side == "trl":
            spec_for(plan, entry, workloads[entry.workload or plan.workload], model, caches)  # refuses before anything runs
        if entry.name == "trl-best" and plan.lora_rank:
            entry.settings.setdefault("model_init_kwargs", {"dtype": "bfloat16"})
    for entry in chosen:
        if entry.name == "trl-best" and "per_device_train_batch_size" not in entry.settings:
            search = find_best_pass(plan, entry, workloads[entry.workload or plan.workload], model, say)
            if fastest := max((row for row in search if row["pairs_per_second"]), key=lambda row: row["pairs_per_second"], default=None):
                entry.settings["per_device_train_batch_size"] = fastest["pairs_per_pass"]
    specs = {entry.label: spec_for(plan, entry, workloads[entry.workload or plan.workload], model, caches) for entry in chosen}
    players = {entry.label: player_for(plan, entry, specs[entry.label]) for entry in chosen}
    probe = matrix_rate(plan, workloads[plan.workload])
    rounds = Rounds(plan.blocks + 1, probe.measure, say)
    rates = play(plan, rounds, chosen, players, "train")
    return results.of_training(plan, chosen, workloads, players, rates, search)


def play(plan: Plan, rounds: Rounds, chosen: Sequence[Contestant], players: dict[str, Player], phase: str) -> dict[str, list[float]]:
    """Let them take turns, and end them whatever happens; the machine's rates by contestant."""
    try:
        if plan.apart:
            return rounds.apart([players[entry.label] for entry in sorted(chosen, key=lambda entry: entry.warm)], phase)
        first = [players[entry.label] for entry in chosen if not entry.warm]
        later = [players[entry.label] for entry in chosen if entry.warm]
        rates = rounds.interleaved(first, later, phase)
        return dict.fromkeys(players, rates)
    finally:
        for player in players.values():
            player.end()


def find_best_pass(plan: Plan, entry: Contestant, workload: Workload, model: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """How fast TRL is by pairs per forward pass, at the same optimizer batch: fewer pad less, more fill the device.

    From small to large on a CPU, from large to small on a GPU, until it becomes clearly slower.
    """
    short = shortened(plan, SEARCH_BLOCKS)
    found: list[dict[str, Any]] = []
    for size in sorted(divisors_to_try(plan.batch_size), reverse=plan.device == "cuda"):
        tried = replace(entry, name=f"{entry.name}-{size}", settings=entry.settings | {"per_device_train_batch_size": size})
        player = player_for(short, tried, spec_for(short, tried, workload, model, {tried.label: plan.work / "caches" / tried.file_name}))
        play(short, Rounds(SEARCH_BLOCKS + 1, unmeasured, lambda line: None), [tried], {tried.label: player}, "train")
        blocks = player.of("train")[1:]
        speed = 0.0
        if blocks and not player.failure:
            reference = sum(part.seconds for part in player.of("reference")) / (short.steps * plan.batch_size)
            speed = 1 / (sum(block.seconds for block in blocks) / len(blocks) / plan.batch_size + reference)
        best = max((row["pairs_per_second"] for row in found), default=0.0)
        found.append({"pairs_per_pass": size, "pairs_per_second": speed, "failure": player.failure})
        say(f"{entry.label} with {size} pairs per pass: " + (f"{speed:.3g} pairs/s" if speed else f"failed: {player.failure}"))
        if 0 < speed < CLEARLY_SLOWER * best:
            break
    return found


def matrix_rate(plan: Plan, workload: Workload) -> MatrixRate:
    """The probe of this machine's rate at the model's own sizes, for the tokens of a mean batch."""
    import torch

    steps = examples_of_steps(plan, workload)
    examples = [workload.lengths[example] for step in steps for example in step]
    scored = sum(sum(completions) for _, completions in examples) / len(steps)
    positions = scored + sum(prompt for prompt, _ in examples) / len(steps)
    most = 8192 if plan.device == "cpu" else 32768
    return MatrixRate(
        plan.model_shape,
        positions=min(most, round(positions)),
        scored=min(most, round(scored)),
        dtype=torch.bfloat16 if plan.precision == "bf16" else torch.float32,
        device=torch.device(plan.device),
    )


def tokenise(plan: Plan, chosen: Sequence[Contestant], workload: Workload, model: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokenise all candidate rows, round after round, in turns."""
    players = {}
    for entry in chosen:
        folder = plan.work / "out" / entry.file_name
        folder.mkdir(parents=True, exist_ok=True)
        spec = {
            "what": "tokenise",
            "side": entry.side,
            "device": "cpu",
            "gives_memory_back": False,
            "model": str(model),
            "out": str(folder),
            "pairs": str(workload.pairs.with_name("candidates.jsonl")),
            "max_length": plan.max_length,
            "settings": entry.settings,
        }
        players[entry.label] = player_for(plan, entry, spec)
    play(plan, Rounds(plan.blocks + 1, unmeasured, say), [replace(entry, warm=False) for entry in chosen], players, "tokenise")
    return results.of_tokenising(plan, chosen, workload, players)


def unmeasured() -> float:
    """Where the machine's rate does not matter."""
    return 0.0


def command_line(arguments: Sequence[str]) -> str:
    """The command as others can give it: folders of this machine by their last name."""
    words = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        path = value if equals and flag.startswith("--") else word
        words.append(word.replace(path, Path(path).name) if path.startswith("/") else word)
    return shlex.join(["python", "-m", "bench.versus", *words])


if __name__ == "__main__":
    sys.exit(main())
