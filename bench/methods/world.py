"""The quickstart's world, shared by all methods of a seed: what they start from, learn from and are judged by."""

import math
import os
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from bench.methods.contenders import Contender
from rich.console import Console

from prefopt.evaluate.kl import estimate_kl
from prefopt.pipeline.new import new_model
from prefopt.pipeline.quickstart import CONTEXT, Plan, Show, make_pairs, new_settings, train_stage, write_jsonl
from prefopt.pipeline.reviews import prompts, write_reviews
from prefopt.pipeline.sentiment import Labelled, Sample, Writer, reward_of
from prefopt.training.run import train_with


@dataclass
class World:
    """What all methods of a seed share.

    Attributes:
        folder: its files.
        plan: sizes.
        seed: of everything drawn.
        sft: folder of the SFT model.
        writer: the SFT model.
        held_out: openings that nobody has seen.
        held_out_pairs: pairs of such openings.
        before: what the SFT model writes about them.
    """

    folder: Path
    plan: Plan
    seed: int
    sft: Path
    writer: Writer
    held_out: list[str]
    held_out_pairs: Labelled
    before: list[Sample]

    @classmethod
    def make(cls, folder: Path, plan: Plan, seed: int) -> "World":
        """As the quickstart does; the SFT model of an earlier start is taken up again."""
        show = Show(Console(file=sys.stderr))
        folder.mkdir(parents=True, exist_ok=True)
        openings = prompts()
        random.Random(seed).shuffle(openings)
        held_out, known = openings[: plan.num_held_out], openings[plan.num_held_out :]
        sft = folder / "sft" / "model"
        if not (folder / "made").exists():
            reviews = write_reviews(random.Random(seed + 1).choices(known, k=plan.num_reviews), seed=seed)
            write_jsonl(folder / "reviews.jsonl", [{"prompt": review.prompt, "completion": review.completion} for review in reviews])
            sft = train_stage("sft", new_model(new_settings(folder, plan, seed), say=show.detail), folder, plan, seed, show)
        writer = Writer.load(sft, max_new_tokens=plan.max_new_tokens)
        asked = random.Random(seed + 2).choices(known, k=plan.num_pairs)
        if not (folder / "made").exists():
            make_pairs(show, folder / "pairs.jsonl", writer, asked, plan, seed=seed + 3)
            write_ranked(folder / "ranked.jsonl", writer, asked[: plan.num_pairs // 2], plan, seed=seed + 6)
        held_out_pairs = make_pairs(show, folder / "held_out_pairs.jsonl", writer, held_out, plan, seed=seed + 4)
        (folder / "made").touch()
        before = list(chain(*writer.write(held_out, num_per_prompt=plan.samples_per_prompt, seed=seed + 5)))
        return cls(folder, plan, seed, sft, writer, held_out, held_out_pairs, before)

    def run(self, name: str, contender: Contender, settings: Mapping[str, Any]) -> dict[str, float]:
        """Trains, and says what came of it. `seconds` are the processor's, of all threads: other work on the machine does not count."""
        plan, out = self.plan, self.folder / "runs" / name
        data = "ranked.jsonl" if contender.ranked else "pairs.jsonl"
        began = time.process_time()
        result = train_with(
            contender.method,
            narrator=Show(Console(file=open(os.devnull, "w"))),  # noqa: SIM115 (closed with the process)
            model=str(self.sft),
            data=[str(self.folder / data)],
            out=out,
            overwrite=True,
            max_length=CONTEXT,
            data_workers=1,
            cache_dir=self.folder / "cache",
            seed=self.seed,
            report=False,
            **{"batch_size": plan.dpo_batch_size, "epochs": plan.dpo_epochs, **settings},
        )
        seconds = time.process_time() - began
        return self.figures(Writer.load(result.model_dir, max_new_tokens=plan.max_new_tokens)) | {"seconds": seconds}

    def figures(self, policy: Writer) -> dict[str, float]:
        """True reward, KL from the SFT model, accuracy on held-out pairs, length."""
        after = list(chain(*policy.write(self.held_out, num_per_prompt=self.plan.samples_per_prompt, seed=self.seed + 5)))
        policy_N, lengths_C = policy.logps(after)
        reference_N, _ = self.writer.logps(after)
        chosen, rejected = ([getattr(pair, side) for pair in self.held_out_pairs.pairs] for side in ("chosen", "rejected"))
        # Of all methods alike, those without a reference too: does the policy's log-ratio rank the pair as people did?
        margins = (policy.sums(chosen) - self.writer.sums(chosen)) - (policy.sums(rejected) - self.writer.sums(rejected))
        accuracy = float(((margins > 0).float() + (margins >= 0).float()).mean() / 2)
        return {
            "true_reward": reward_of(after)[0],
            "kl": estimate_kl(policy_N, reference_N, lengths_C).kl,
            "accuracy": accuracy,
            "tokens": mean(len(item.ids) for item in after),
            "ended": mean(item.ended for item in after),
        }


def write_ranked(path: Path, writer: Writer, openings: list[str], plan: Plan, *, seed: int) -> None:
    """Four samples of each opening, ranked by reward with the noise of the pairs' labels (Plackett-Luce, as the pairs are Bradley-Terry):
    the order of reward times scale plus a Gumbel draw."""
    draw = random.Random(seed)
    rows = []
    for samples in writer.write(openings, num_per_prompt=4, seed=seed):
        kept = {item.text: item for item in samples if item.ended and item.text.strip()}
        if len(kept) > 1:
            scores = {text: plan.label_scale * item.reward + gumbel(draw) for text, item in kept.items()}
            texts = sorted(kept, key=scores.__getitem__, reverse=True)
            rows.append({"prompt": samples[0].prompt, "completions": texts, "ranks": list(range(len(texts)))})
    write_jsonl(path, rows)


def gumbel(draw: random.Random) -> float:
    """A standard Gumbel variable: of independent ones, the order of score + draw is Plackett-Luce."""
    return -math.log(-math.log(max(draw.random(), 1e-300)))
