"""The DPO paper's controlled sentiment experiment in miniature, from nothing to an aligned model in minutes.

    write reviews -> a model from nothing -> SFT -> sample and label pairs -> DPO -> compare

As in the paper (2305.18290, section 6.1) the reward is known, pairs are samples of the SFT model, and reward is shown
together with the KL that it cost. Deviations: the reviews come from a grammar, the reward counts words instead
of asking a classifier, the model is made from nothing, and labels are drawn through Bradley–Terry,

    P(a ≻ b) = σ(s · (r(a) − r(b))),

instead of being certain, so that the labels are noisy as people's are.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefopt.engine.batch import pack
from prefopt.errors import RunError
from prefopt.evaluate.kl import KL, estimate_kl
from prefopt.evaluate.reward_accuracy import RewardAccuracy, reward_accuracy
from prefopt.models.load import read_model
from prefopt.models.policy import EnginePath, Policy
from prefopt.pipeline.new import new_model
from prefopt.pipeline.new_settings import NewSettings
from prefopt.pipeline.reviews import Review, prompts, true_reward, write_reviews
from prefopt.rollout.sample import sample
from prefopt.training.loop import peak_memory_gb
from prefopt.training.narrator import Terminal, Ticker
from prefopt.training.run import train_with
from prefopt.trees import Completion, PromptTree, TokenIds, token_ids

MARKER = ".prefopt-quickstart"
"""A file by which the quickstart knows a folder as its own, which it may then delete."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the experiment, chosen so that it takes two to three minutes on two cores.

    Attributes:
        num_reviews: what SFT learns from.
        num_held_out: openings that neither SFT nor DPO sees.
        num_pairs: pairs that are sampled for DPO, before some are dropped.
        samples_per_prompt: samples of each held-out opening that reward and KL are averaged over.
        max_new_tokens: the longest review is shorter.
        label_scale: s of the labels; at 10 a difference in reward of 0.1 is preferred 73 times in 100.
        beta: DPO's β. Larger than the usual 0.1 because the rewards are: with labels of scale s the best policy
            is π_ref·exp(s·r/β), and at 0.1 it would leave the language for the last hundredth of reward.
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
    dpo_learning_rate: float = 1e-4


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion with its opening.

    Attributes:
        prompt: the opening, as text.
        prompt_ids, ids: tokens of opening and completion.
        text: of the completion, without its end-of-turn token.
        ended: whether it ended by itself.
    """

    prompt: str
    prompt_ids: TokenIds
    ids: TokenIds
    text: str
    ended: bool

    @property
    def reward(self) -> float:
        """The true reward of the whole review."""
        return true_reward(self.prompt + self.text)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples of one opening, with a label drawn from their rewards."""

    chosen: Sample
    rejected: Sample

    @property
    def label_is_right(self) -> bool:
        """Whether the label agrees with the true reward."""
        return self.chosen.reward > self.rejected.reward


class Show:
    """What the quickstart says: stages, details, and the runs' progress lines without their many words."""

    def __init__(self, console: Console, num_stages: int) -> None:
        self.console = console
        self.num_stages = num_stages
        self.seconds: dict[str, float] = {}
        self._terminal = Terminal(console.file)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """A stage, named and timed."""
        began = time.perf_counter()
        self.line(f"\n{len(self.seconds) + 1}/{self.num_stages} {title}")
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)

    def line(self, text: str) -> None:
        """A line as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """A line about the stage."""
        self.line(f"    {text}")

    def say(self, line: str) -> None:
        """A run's own words: left out, they are for runs with data that one does not know."""

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Ticker]:
        """A run's progress."""
        return self._terminal.progress(f"    {what}", total, done)


def quickstart(out: Path = Path("runs/quickstart"), seed: int = 0, *, plan: Plan | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run the experiment and show what came of it.

    Args:
        out: folder of its data, models and `summary.json`; replaced if an earlier quickstart made it.
        seed: of everything drawn at random.
        plan: other sizes, for tests.
        console: where to show; the default is standard output.

    Returns:
        What `summary.json` holds: `true_reward_before` and `true_reward_after` (0 to 1), `kl` (nats per completion),
        `reward_accuracy` (held-out pairs), `seconds`, and more.

    Raises:
        RunError: `out` holds something else.
    """
    began = time.perf_counter()
    plan, show = plan or Plan(), Show(console or Console(), num_stages=6)
    make_folder(out)
    show.line("The controlled sentiment experiment of the DPO paper in miniature: a model learns to write film reviews, then to")
    show.line(f"write favourable ones, from preferences between its own samples. Everything is made here, in {out}.")
    openings = prompts()
    random.Random(seed).shuffle(openings)
    held_out, known = openings[: plan.num_held_out], openings[plan.num_held_out :]

    with show.stage("reviews", "Writing reviews of both sentiments"):
        reviews = write_reviews(random.Random(seed + 1).choices(known, k=plan.num_reviews), seed=seed)
        rows = [{"prompt": review.prompt, "completion": review.completion} for review in reviews]
        describe_reviews(show, write_jsonl(out / "reviews.jsonl", rows), reviews)
    with show.stage("new", "Making a small model from nothing (prefopt new)"):
        start = new_model(new_settings(out, plan, seed), say=show.detail)
    with show.stage("sft", "SFT: learning to write reviews (prefopt train sft)"):
        sft = run_sft(start, out, plan, seed, show)
    with show.stage("pairs", "Sampling pairs of reviews from the SFT model, and drawing preferences from their true rewards"):
        writer = Writer.load(sft, plan)
        pairs = make_pairs(show, out / "pairs.jsonl", writer, random.Random(seed + 2).choices(known, k=plan.num_pairs), seed=seed + 3)
        held_out_pairs = make_pairs(show, out / "held_out_pairs.jsonl", writer, held_out, seed=seed + 4)
    with show.stage("dpo", "DPO on these pairs (prefopt train dpo)"):
        dpo = run_dpo(sft, out, plan, seed, show)
    with show.stage("compare", f"Comparing both models on {len(held_out)} openings that neither has seen"):
        figures = Figures.take(writer, Writer.load(dpo, plan), held_out, held_out_pairs, seed=seed + 5)

    summary = figures.summary() | {
        "seconds": round(time.perf_counter() - began, 1),
        "stage_seconds": show.seconds,
        "peak_memory_gb": round(peak_memory_gb(torch.device("cpu")), 2),
        "num_parameters": writer.policy.model.num_parameters(),
        "num_reviews": len(reviews),
        "num_pairs": len(pairs),
        "beta": plan.beta,
        "seed": seed,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show_figures(show, figures, summary, sft, out)
    return summary


def make_folder(out: Path) -> None:
    """An empty folder that bears the marker.

    Raises:
        RunError: the path is taken by something that the quickstart did not make, or cannot be written.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            if not (out / MARKER).is_file():
                raise RunError(f"{out} holds files that no quickstart made, so it is left alone. Give another folder with --out, or move them away.")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("Made by prefopt quickstart, which deletes this folder when it runs again.\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error.strerror}. Give another with --out.") from None


def describe_reviews(show: Show, path: Path, reviews: Sequence[Review]) -> None:
    """How many, how favourable, and one of each end."""
    rewards = [true_reward(review.prompt + review.completion) for review in reviews]
    show.detail(f"{path}: {len(reviews):,} reviews, mean true reward {mean(rewards):.2f}, for example")
    for index in (rewards.index(max(rewards)), rewards.index(min(rewards))):
        show.detail(f"  {rewards[index]:.2f}  {reviews[index].prompt}{reviews[index].completion}")


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
        context=256,
        seed=seed,
    )


def run_sft(model: Path, out: Path, plan: Plan, seed: int, show: Show) -> Path:
    """SFT on the reviews; returns the model's folder."""
    result = train_with(
        "sft",
        narrator=show,
        model=str(model),
        data=[str(out / "reviews.jsonl")],
        out=out / "sft",
        batch_size=plan.sft_batch_size,
        learning_rate=plan.sft_learning_rate,
        max_length=256,
        data_workers=1,
        cache_dir=out / "cache",
        seed=seed,
    )
    return result.model_dir


def run_dpo(model: Path, out: Path, plan: Plan, seed: int, show: Show) -> Path:
    """DPO on the pairs, from the SFT model; returns the model's folder."""
    result = train_with(
        "dpo",
        narrator=show,
        model=str(model),
        data=[str(out / "pairs.jsonl")],
        out=out / "dpo",
        beta=plan.beta,
        batch_size=plan.dpo_batch_size,
        learning_rate=plan.dpo_learning_rate,
        epochs=plan.dpo_epochs,
        max_length=256,
        data_workers=1,
        cache_dir=out / "cache",
        seed=seed,
    )
    return result.model_dir


@dataclass(frozen=True, slots=True)
class Writer:
    """A trained model that writes reviews and is asked how likely they are."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    plan: Plan

    @classmethod
    def load(cls, folder: Path, plan: Plan) -> "Writer":
        """From the folder of a trained model."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = read_model(str(folder), dtype=torch.float32).to(device).eval()
        # Plain is right for every model without proof, and fast enough for some hundreds of short texts.
        return cls(Policy(model, EnginePath("plain", None)), AutoTokenizer.from_pretrained(folder), plan)

    def write(self, openings: Sequence[str], *, num_per_prompt: int, seed: int) -> list[list[Sample]]:
        """Samples of each opening at temperature 1."""
        prompt_ids = [token_ids(self.tokenizer(opening)["input_ids"]) for opening in openings]
        end = self.tokenizer.eos_token_id
        with self.policy.generating() as model:
            completions = sample(
                model,
                prompt_ids,
                eos_ids={end},
                num_per_prompt=num_per_prompt,
                max_new_tokens=self.plan.max_new_tokens,
                seed=seed,
                batch_size=128,
            )
        return [
            [Sample(opening, prompt, ids, self.tokenizer.decode(ids, skip_special_tokens=True), bool(ids[-1] == end)) for ids in of_prompt]
            for opening, prompt, of_prompt in zip(openings, prompt_ids, completions, strict=True)
        ]

    @torch.no_grad()
    def logps(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Log-probability of each completion's tokens, one completion after the other, and the completions' lengths."""
        values, lengths = [], []
        for start in range(0, len(samples), 64):
            trees = [PromptTree(item.prompt_ids, (Completion(item.ids),)) for item in samples[start : start + 64]]
            logps = self.policy(pack(trees, sharing="plain", device=self.policy.model.device))
            values.append(logps.values_N.cpu())
            lengths.append(logps.lengths_C.cpu())
        return torch.cat(values), torch.cat(lengths)

    def sums(self, samples: Sequence[Sample]) -> Tensor:
        """Log-probability of each completion, [C]."""
        values_N, lengths_C = self.logps(samples)
        return torch.stack([part.sum() for part in values_N.split(lengths_C.tolist())])


def make_pairs(show: Show, path: Path, writer: Writer, openings: Sequence[str], *, seed: int) -> list[Pair]:
    """Two samples of each opening as a pair with a drawn label, written to a file; what cannot be a pair is counted and said."""
    uniforms = np.random.default_rng(seed).random(len(openings))
    pairs: list[Pair] = []
    dropped = {"unfinished or blank": 0, "twice the same text": 0, "the same reward": 0}
    for (one, other), uniform in zip(writer.write(openings, num_per_prompt=2, seed=seed), uniforms, strict=True):
        if not (one.ended and other.ended and one.text.strip() and other.text.strip()):
            dropped["unfinished or blank"] += 1
        elif one.text == other.text:
            dropped["twice the same text"] += 1
        elif one.reward == other.reward:
            dropped["the same reward"] += 1
        else:
            first_wins = uniform < preference(one.reward, other.reward, scale=writer.plan.label_scale)
            pairs.append(Pair(one, other) if first_wins else Pair(other, one))
    if not pairs:
        raise RunError(f"the model's samples gave no pair of different rewards ({dropped}): SFT did not learn to write reviews. Try another --seed.")
    write_jsonl(path, [{"prompt": pair.chosen.prompt, "chosen": pair.chosen.text, "rejected": pair.rejected.text} for pair in pairs])
    left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    right = mean(pair.label_is_right for pair in pairs)
    show.detail(f"{path}: {len(pairs):,} pairs, {right:.0%} of them labelled as the true reward ranks them" + (f"; left out: {left_out}" if left_out else ""))
    return pairs


def preference(reward: float, other_reward: float, *, scale: float) -> float:
    """Bradley–Terry: the probability that the first is preferred, σ(scale · (reward − other_reward))."""
    return 1 / (1 + math.exp(-scale * (reward - other_reward)))


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """One JSON object per line; returns the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True)
class Figures:
    """Before and after.

    Attributes:
        before, after: samples of the SFT and the DPO model, of the same openings and from the same random numbers.
        kl: of the DPO model from the SFT model.
        accuracy: of the implicit reward on held-out pairs.
        labels_right: share of those pairs whose label agrees with the true reward; nothing can be expected to score higher.
    """

    before: list[Sample]
    after: list[Sample]
    kl: KL
    accuracy: RewardAccuracy
    labels_right: float

    @classmethod
    def take(cls, sft: Writer, dpo: Writer, openings: Sequence[str], pairs: Sequence[Pair], *, seed: int) -> "Figures":
        """Sample both models and score what they wrote."""
        before, after = ([item for of_prompt in writer.write(openings, num_per_prompt=sft.plan.samples_per_prompt, seed=seed) for item in of_prompt] for writer in (sft, dpo))
        policy_N, lengths_C = dpo.logps(after)
        reference_N, _ = sft.logps(after)
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        return cls(
            before=before,
            after=after,
            kl=estimate_kl(policy_N, reference_N, lengths_C),
            accuracy=reward_accuracy(dpo.sums(chosen), dpo.sums(rejected), sft.sums(chosen), sft.sums(rejected), beta=sft.plan.beta),
            labels_right=mean(pair.label_is_right for pair in pairs),
        )

    def summary(self) -> dict[str, Any]:
        """As numbers for `summary.json`."""
        before, before_error = reward_of(self.before)
        after, after_error = reward_of(self.after)
        return {
            "true_reward_before": before,
            "true_reward_before_error": before_error,
            "true_reward_after": after,
            "true_reward_after_error": after_error,
            "kl": self.kl.kl,
            "kl_error": self.kl.kl_error,
            "kl_k3": self.kl.k3,
            "reward_accuracy": self.accuracy.accuracy,
            "reward_accuracy_error": self.accuracy.accuracy_error,
            "held_out_loss": self.accuracy.loss,
            "held_out_margin": self.accuracy.margin,
            "num_held_out_pairs": self.accuracy.num_pairs,
            "labels_right": self.labels_right,
            "tokens_before": mean(len(item.ids) for item in self.before),
            "tokens_after": mean(len(item.ids) for item in self.after),
            "ended_after": mean(item.ended for item in self.after),
        }


def reward_of(samples: Sequence[Sample]) -> tuple[float, float]:
    """Mean true reward, and its standard error."""
    rewards = np.array([item.reward for item in samples])
    return float(rewards.mean()), float(rewards.std(ddof=1) / math.sqrt(len(rewards)))


def show_figures(show: Show, figures: Figures, summary: dict[str, Any], sft: Path, out: Path) -> None:
    """The figures, samples side by side, and what to try next."""
    per_prompt = len(figures.after) // max(1, len({item.prompt for item in figures.after}))
    show.line("")
    show.line(f"                             SFT            DPO")
    show.line(f"mean true reward             {summary['true_reward_before']:.2f} ± {summary['true_reward_before_error']:.2f}    {summary['true_reward_after']:.2f} ± {summary['true_reward_after_error']:.2f}")
    show.line(f"KL from the SFT model        0              {figures.kl.kl:.1f} ± {figures.kl.kl_error:.1f} nats per review")
    show.line(f"tokens per review            {summary['tokens_before']:.0f}             {summary['tokens_after']:.0f}")
    show.line(f"accuracy, held-out pairs     0.50           {figures.accuracy.accuracy:.2f} ± {figures.accuracy.accuracy_error:.2f} of {figures.accuracy.num_pairs} (the true reward itself: {figures.labels_right:.2f})")
    show.line("")
    show_samples(show, list(zip(figures.before[::per_prompt], figures.after[::per_prompt], strict=True))[:4])
    show.line(f"\nDone in {summary['seconds']:.0f} s. Figures: {out / 'summary.json'}. Models: {sft}, {out / 'dpo' / 'model'}.")
    show.line("Try next:")
    show.line(f"  prefopt train dpo --model {sft} --data {out / 'pairs.jsonl'} --out runs/beta-0.1 --beta 0.1 --epochs 2 --learning-rate 1e-4")
    show.line("  prefopt train dpo --model YOUR_SFT_MODEL --data YOUR_PAIRS.jsonl --out runs/dpo      rows: prompt, chosen, rejected")
    show.line("  prefopt train dpo --help")


def show_samples(show: Show, samples: Sequence[tuple[Sample, Sample]]) -> None:
    """Both models' reviews of the same openings: a table on a terminal, plain lines elsewhere."""
    if not show.console.is_terminal:
        for before, after in samples:
            show.line(before.prompt)
            show.line(f"  SFT {before.reward:.2f} {before.text}")
            show.line(f"  DPO {after.reward:.2f} {after.text}")
        return
    table = Table("opening", "SFT", "DPO", show_lines=True)
    for before, after in samples:
        table.add_row(before.prompt, f"({before.reward:.2f}){before.text}", f"({after.reward:.2f}){after.text}")
    show.console.print(table, markup=False)
