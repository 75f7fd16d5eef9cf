"""The DPO paper's controlled sentiment experiment in miniature, from nothing to an aligned model in minutes.

    write reviews -> a model from nothing -> SFT -> sample and label pairs -> DPO -> compare

As in the paper (2305.18290, section 6.1) the reward is known, the pairs are samples of the SFT model, and the reward is
shown together with the KL that it cost. Deviations: the reviews come from a grammar, the reward counts words
instead of asking a classifier, the model is made from nothing, and labels are drawn through Bradley–Terry,

    P(a ≻ b) = σ(s · (r(a) − r(b))),

instead of being certain, so that they are noisy as people's are.
"""

import json
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TextIO, cast

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.errors import RunError
from prefopt.pipeline.new import new_model
from prefopt.pipeline.new_settings import NewSettings
from prefopt.pipeline.reviews import Review, prompts, true_reward, write_reviews
from prefopt.pipeline.sentiment import Figures, Labelled, Sample, Writer, compare, label
from prefopt.report.files import RunFiles
from prefopt.training.loop import peak_memory_gb
from prefopt.training.run import train_with
from prefopt.training.terminal.narrator import Terminal, Ticker, console_on
from prefopt.training.terminal.outlet import Outlet
from prefopt.training.watching.watched import Finding

MARKER = ".prefopt-quickstart"
"""A file by which the quickstart knows a folder as its own, which it may then delete."""

NUM_STAGES = 6
CONTEXT = 256
SHOWN_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the experiment, chosen so that it takes two to three minutes on two cores.

    Attributes:
        num_reviews: what SFT learns from.
        num_held_out: openings that neither SFT nor DPO sees.
        num_pairs: pairs that are sampled for DPO, before some are dropped.
        samples_per_prompt: samples of each held-out opening that reward and KL are averaged over.
        max_new_tokens: nearly all reviews are shorter.
        label_scale: s of the labels; at 10 a difference in reward of 0.1 is preferred 73 times in 100.
        beta: DPO's β. Larger than the usual 0.1 because the labels are surer: the best policy is π_ref·exp(s·r/β), and at
            0.1 it would leave the language for the last hundredth of reward.
    """

    num_reviews: int = 5000
    num_held_out: int = 200
    num_pairs: int = 1500
    samples_per_prompt: int = 2
    max_new_tokens: int = 80
    vocabulary: int = 1024
    hidden: int = 192
    layers: int = 4
    sft_batch_size: int = 16
    sft_learning_rate: float = 2e-3
    label_scale: float = 10.0
    beta: float = 0.5
    dpo_batch_size: int = 16
    dpo_epochs: float = 2.0
    dpo_learning_rate: float = 2e-4


class Show:
    """What the quickstart says: stages, details, and the runs' progress lines without their many words."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._terminal = Terminal(cast(TextIO | Outlet, console.file))  # rich says IO[str], and means what print writes to

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """A stage, named and timed."""
        began = time.perf_counter()
        self.line(f"\n{len(self.seconds) + 1}/{NUM_STAGES} {title}")
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)

    def line(self, text: str = "") -> None:
        """A line as it is; a terminal gets it broken between words."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def detail(self, text: str) -> None:
        """A line about the stage."""
        self.line(f"    {text}")

    def say(self, line: str) -> None:
        """A run's own words: left out, they are for runs on data that one does not know."""

    def finding(self, finding: Finding) -> None:
        """What the watch says of a run."""
        self._terminal.finding(finding)

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Ticker]:
        """A run's progress."""
        return self._terminal.progress(f"    {what}", total, done)


def quickstart(
    out: Path = Path("runs/quickstart"), seed: int = 0, *, plan: Plan | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run the experiment and show what came of it.

    Args:
        out: folder of its data, models and `summary.json`; replaced if an earlier quickstart made it.
        seed: of everything drawn at random.
        plan: other sizes, for tests.
        console: where to show; the default is standard output.

    Returns:
        What `summary.json` holds: `true_reward_before` and `true_reward_after` (0 to 1), `kl` (nats per completion),
        `reward_accuracy` (share of held-out pairs), `seconds`, and more.

    Raises:
        RunError: `out` holds something else, or the samples gave no pairs.
    """
    began = time.perf_counter()
    plan, show = plan or Plan(), Show(console or console_on(Outlet(sys.stdout), soft_wrap=False))
    make_folder(out)
    show.line("The controlled sentiment experiment of the DPO paper in miniature: a small model learns to write film reviews, and then")
    show.line(f"to write favourable ones, from noisy preferences between its own samples. All of it is made here, in {out}.")
    openings = prompts()
    random.Random(seed).shuffle(openings)
    held_out, known = openings[: plan.num_held_out], openings[plan.num_held_out :]

    with show.stage("reviews", "Writing reviews of both sentiments"):
        reviews = write_reviews(random.Random(seed + 1).choices(known, k=plan.num_reviews), seed=seed)
        rows = [{"prompt": review.prompt, "completion": review.completion} for review in reviews]
        describe_reviews(show, write_jsonl(out / "reviews.jsonl", rows), reviews)
    with show.stage("new", "Making a small model from nothing"):
        start = new_model(new_settings(out, plan, seed), say=show.detail)
    with show.stage("sft", "SFT: learning to write reviews"):
        sft = train_stage("sft", start, out, plan, seed, show)
    with show.stage("pairs", "Sampling pairs from the SFT model, and drawing preferences from their true rewards"):
        writer = Writer.load(sft, max_new_tokens=plan.max_new_tokens)
        asked = random.Random(seed + 2).choices(known, k=plan.num_pairs)
        pairs = make_pairs(show, out / "pairs.jsonl", writer, asked, plan, seed=seed + 3)
        held_out_pairs = make_pairs(show, out / "held_out_pairs.jsonl", writer, held_out, plan, seed=seed + 4)
    with show.stage("dpo", "DPO: learning from the preferences"):
        dpo = train_stage("dpo", sft, out, plan, seed, show)
    with show.stage("compare", f"Comparing both models on {len(held_out)} openings that neither has seen"):
        aligned = Writer.load(dpo, max_new_tokens=plan.max_new_tokens)
        figures = compare(writer, aligned, held_out, held_out_pairs, num_per_prompt=plan.samples_per_prompt, beta=plan.beta, seed=seed + 5)
        show_figures(show, figures, plan)

    summary = figures.summary() | {
        "seconds": round(time.perf_counter() - began, 1),
        "stage_seconds": show.seconds,
        "peak_memory_gb": round(peak_memory_gb(torch.device("cpu")), 2),
        "num_parameters": writer.policy.model.num_parameters(),
        "num_reviews": len(reviews),
        "num_pairs": len(pairs.pairs),
        "num_pairs_dropped": sum(pairs.dropped.values()),
        "label_scale": plan.label_scale,
        "beta": plan.beta,
        "seed": seed,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show_end(show, summary, sft, out)
    return summary


def make_folder(out: Path) -> None:
    """An empty folder that bears the marker.

    Raises:
        RunError: the path is taken by something that the quickstart did not make, or cannot be written.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            if not (out / MARKER).is_file():
                raise RunError(f"{out} holds files that no quickstart made, so it is left alone. Give another folder as out.")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("Made by prefopt quickstart, which deletes this folder when it runs again.\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error.strerror}. Give another as out.") from None


def describe_reviews(show: Show, path: Path, reviews: Sequence[Review]) -> None:
    """How many, how favourable, and one of each sentiment."""
    rewards = [true_reward(review.prompt + review.completion) for review in reviews]
    show.detail(f"{path}: {len(reviews):,} reviews, mean true reward {mean(rewards):.2f}, for example")
    for side in (1, 0):
        example = next((index for index, reward in enumerate(rewards) if abs(reward - side) < 0.1), 0)
        show.detail(f"  {rewards[example]:.2f}  {reviews[example].prompt}{reviews[example].completion}")


def new_settings(out: Path, plan: Plan, seed: int) -> NewSettings:
    """The model that is made from nothing."""
    return NewSettings(
        text=[str(out / "reviews.jsonl")],
        out=out / "new",
        architecture="qwen3",
        vocabulary=plan.vocabulary,
        hidden=plan.hidden,
        layers=plan.layers,
        heads=4,
        context=CONTEXT,
        seed=seed,
    )


def train_stage(method: str, model: Path, out: Path, plan: Plan, seed: int, show: Show) -> Path:
    """SFT on the reviews or DPO on the pairs; returns the folder of the trained model."""
    own: dict[str, Any] = {"data": [str(out / "reviews.jsonl")], "batch_size": plan.sft_batch_size, "learning_rate": plan.sft_learning_rate}
    if method == "dpo":
        own = {"data": [str(out / "pairs.jsonl")], "batch_size": plan.dpo_batch_size, "learning_rate": plan.dpo_learning_rate}
        own |= {"beta": plan.beta, "epochs": plan.dpo_epochs, "eval_data": [str(out / "held_out_pairs.jsonl")]}
    result = train_with(
        method,
        narrator=show,
        model=str(model),
        out=out / method,
        max_length=CONTEXT,
        data_workers=1,  # there is less to tokenize than it takes to start more
        cache_dir=out / "cache",
        seed=seed,
        **own,
    )
    return result.model_dir


def make_pairs(show: Show, path: Path, writer: Writer, openings: Sequence[str], plan: Plan, *, seed: int) -> Labelled:
    """Sample, label and write pairs; say how many, and what was left out.

    Raises:
        RunError: there is none.
    """
    labelled = label(writer.write(openings, num_per_prompt=2, seed=seed), scale=plan.label_scale, seed=seed)
    if not labelled.pairs:
        raise RunError(f"the SFT model's samples gave no pair ({labelled.dropped}): it did not learn to write reviews. Try another seed.")
    rows = [{"prompt": pair.chosen.prompt, "chosen": pair.chosen.text, "rejected": pair.rejected.text} for pair in labelled.pairs]
    write_jsonl(path, rows)
    left_out = ", ".join(f"{count} {reason}" for reason, count in labelled.dropped.items() if count)
    show.detail(f"{path}: {len(rows):,} pairs, {labelled.labels_right:.0%} labelled as the true reward ranks them")
    if left_out:
        show.detail(f"  left out: {left_out}")
    return labelled


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """One JSON object per line; returns the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def show_figures(show: Show, figures: Figures, plan: Plan) -> None:
    """The figures before and after, and samples side by side."""
    values, accuracy = figures.summary(), figures.accuracy
    rows = [
        ("", "SFT", "DPO"),
        (
            "mean true reward",
            f"{values['true_reward_before']:.3f} ± {values['true_reward_before_error']:.3f}",
            f"{values['true_reward_after']:.3f} ± {values['true_reward_after_error']:.3f}",
        ),
        ("KL from the SFT model, nats", "0", f"{figures.kl.kl:.2f} ± {figures.kl.kl_error:.2f}"),
        ("accuracy on held-out pairs", "0.50", f"{accuracy.accuracy:.2f} ± {accuracy.accuracy_error:.2f}"),
        ("tokens per review", f"{values['tokens_before']:.0f}", f"{values['tokens_after']:.0f}"),
    ]
    for name, before, after in rows:
        show.detail(f"{name:<30}{before:<16}{after}".rstrip())
    noise = f"labels are noisy: the true reward itself scores {figures.labels_right:.2f}"
    show.detail(f"({len(figures.after)} reviews, {accuracy.num_pairs} pairs; {noise})")
    every = plan.samples_per_prompt
    show_samples(show, list(zip(figures.before[::every], figures.after[::every], strict=True))[:SHOWN_SAMPLES])


def show_samples(show: Show, samples: Sequence[tuple[Sample, Sample]]) -> None:
    """Both models' reviews of the same openings: a table on a terminal, plain lines elsewhere."""
    show.line()
    if not show.console.is_terminal:
        for before, after in samples:
            show.detail(f"{before.prompt} ...")
            show.detail(f"  SFT {before.reward:.2f} {before.text}")
            show.detail(f"  DPO {after.reward:.2f} {after.text}")
        return
    table = Table("opening", "SFT (true reward)", "DPO (true reward)", show_lines=True)
    for before, after in samples:
        table.add_row(Text(before.prompt), Text(f"({before.reward:.2f}){before.text}"), Text(f"({after.reward:.2f}){after.text}"))
    show.console.print(table)


def show_end(show: Show, summary: dict[str, Any], sft: Path, out: Path) -> None:
    """Where everything is, and what to try next."""
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    show.line(f"\nDone in {minutes}:{seconds:02d}, with {summary['peak_memory_gb']:.1f} GB of memory.")
    show.line(f"The model: {out / 'dpo' / 'model'}. The figures: {out / 'summary.json'}")
    show.line(f"The run on one page, to open in a browser: {RunFiles(out / 'dpo').report}")
    show.line("\nTry next:")
    again = f"--model {sft} --data {out / 'pairs.jsonl'} --eval-data {out / 'held_out_pairs.jsonl'}"
    show.line(f"  prefopt train dpo {again} --out runs/beta --beta 0.1 --learning-rate 1e-4")
    show.line("and on your own data, one JSON object with prompt, chosen and rejected per line:")
    show.line("  prefopt train dpo --model YOUR_SFT_MODEL --data pairs.jsonl --out runs/dpo")
