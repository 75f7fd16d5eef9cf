"""The quickstart's world, shared by all methods of a seed: what they start from, learn from and are judged by.

Seeds are to be a thousand apart: what is drawn in a world takes its seed and the numbers after it.
"""

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, flock
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from bench.methods.contenders import Contender
from bench.versus.contestants import UsageError
from rich.console import Console
from torch import Tensor

from prefopt.disk import draft_of, remove, replace_folder
from prefopt.errors import RunError
from prefopt.evaluate.kl import estimate_kl
from prefopt.methods.method import Completions
from prefopt.models.scorer import TreeScorer
from prefopt.pipeline.new import new_model
from prefopt.pipeline.quickstart import CONTEXT, Plan, Show, make_pairs, new_settings, train_stage, write_jsonl
from prefopt.pipeline.reviews import prompts, write_reviews
from prefopt.pipeline.sentiment import Labelled, Sample, Writer, label, reward_of
from prefopt.training.run import train_with
from prefopt.training.terminal.narrator import Quiet
from prefopt.trees import Completion, PromptTree

RANKED = 4
"""Answers of a ranking."""

AT_ONCE = 128
"""Openings whose answers are sampled together, until there are rankings enough."""

SAMPLES_OF_THE_START = 5
"""How many times as many samples the SFT model gives as others: the best that can be had at a KL is made of them."""

EXAMPLES_PER_PAIR: Mapping[Completions, float] = {"pair": 1, "demonstration": 1, "thumbs": 2, "ranked": 2 / RANKED}
"""Examples of a kind that show as many answers as a pair (a demonstration: as many prompts, of each the better answer)."""

Figures = dict[str, Any]


@dataclass
class World:
    """What all methods of a seed share.

    Attributes:
        folder: its files.
        plan: sizes.
        seed: of everything drawn.
        facts: what `make_files` says of it.
        writer: the SFT model.
        held_out: openings that nobody has seen.
        held_out_pairs: pairs of such openings.
    """

    folder: Path
    plan: Plan
    seed: int
    facts: Figures
    writer: Writer
    held_out: list[str]
    held_out_pairs: Labelled

    @classmethod
    def of(cls, folder: Path, plan: Plan, seed: int) -> "World":
        """The world in that folder, made where it is not there.

        Raises:
            UsageError: as `ensure`.
        """
        facts = ensure(folder, plan, seed)
        held_out, _ = openings_of(plan, seed)
        writer = Writer.load(folder / "sft" / "model", max_new_tokens=plan.max_new_tokens)
        held_out_pairs = label(writer.write(held_out, num_per_prompt=2, seed=seed + 4), scale=plan.label_scale, seed=seed + 4)
        return cls(folder, plan, seed, facts, writer, held_out, held_out_pairs)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of every run."""
        return math.ceil(self.facts["pairs"] * self.plan.dpo_epochs / self.plan.dpo_batch_size)

    def run(self, contender: Contender, settings: Mapping[str, Any], *, num_steps: int | None = None) -> Figures:
        """Trains, and says what came of it.

        All runs take as many steps and, where their data allows it, see as many answers in each. Each begins with empty caches, so that
        each pays for its tokens and its reference.

        Args:
            contender, settings: what is run.
            num_steps: in place of `self.num_steps`.

        Returns:
            `steps`; `cpu_seconds` of the processor, all threads together; `seconds` by the clock; and `figures` or `scores`.
        """
        batch_size = round(EXAMPLES_PER_PAIR[contender.completions] * self.plan.dpo_batch_size)
        data = "ranked.jsonl" if contender.completions == "ranked" else "pairs.jsonl"
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="run-") as scratch:
            cpu_began, began = time.process_time(), time.perf_counter()
            result = train_with(
                contender.method,
                narrator=Quiet(),
                model=str(self.folder / "sft" / "model"),
                data=[str(self.folder / data)],
                out=Path(scratch) / "run",
                cache_dir=Path(scratch) / "cache",
                max_length=CONTEXT,
                max_steps=num_steps or self.num_steps,
                batch_size=batch_size,
                data_workers=1,
                samples=0,
                seed=self.seed,
                report=False,
                **settings,
            )
            took = {"cpu_seconds": time.process_time() - cpu_began, "seconds": time.perf_counter() - began}
            if contender.scores:
                found = self.scores(TreeScorer.load(str(result.model_dir)))
            else:
                found = self.figures(Writer.load(result.model_dir, max_new_tokens=self.plan.max_new_tokens))
        return {"steps": result.summary["steps"], **found, **took}

    def figures(self, policy: Writer) -> Figures:
        """True reward, KL from the SFT model, accuracy on held-out pairs, length."""
        after = list(chain(*policy.write(self.held_out, num_per_prompt=self.plan.samples_per_prompt, seed=self.seed + 5)))
        policy_N, lengths_C = policy.logps(after)
        reference_N, _ = self.writer.logps(after)
        chosen, rejected = sides(self.held_out_pairs)
        ref_chosen, ref_rejected = self.reference_sums
        # Of all methods alike, those without a reference too: does the policy's log-ratio rank the pair as people did?
        margins = (policy.sums(chosen) - ref_chosen) - (policy.sums(rejected) - ref_rejected)
        return written(after) | {"kl": estimate_kl(policy_N, reference_N, lengths_C).kl, "accuracy": share_right(margins)}

    def scores(self, scorer: TreeScorer) -> Figures:
        """Of a reward model: accuracy on the same held-out pairs."""
        trees = [
            PromptTree(pair.chosen.prompt_ids, (Completion(pair.chosen.ids), Completion(pair.rejected.ids)))
            for pair in self.held_out_pairs.pairs
        ]
        scores = scorer.scores(trees).reshape(-1, 2)
        return {"accuracy": share_right(scores[:, 0] - scores[:, 1])}

    @cached_property
    def reference_sums(self) -> tuple[Tensor, Tensor]:
        """What the SFT model gives the two sides of the held-out pairs."""
        chosen, rejected = sides(self.held_out_pairs)
        return self.writer.sums(chosen), self.writer.sums(rejected)


def ensure(folder: Path, plan: Plan, seed: int) -> Figures:
    """Make a world's files as the quickstart does, unless they are there; where another process is making them, wait for it.

    Returns:
        what `make_files` says of it.

    Raises:
        UsageError: the folder holds a world of other sizes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "world.json").is_file():
            remove(draft := draft_of(folder))  # of a process that was stopped
            draft.mkdir()
            facts = make_files(draft, plan, seed)
            (draft / "world.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
            replace_folder(draft, folder)
    facts = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    if facts["plan"] != asdict(plan):
        raise UsageError(f"{folder} holds a world of other sizes. Give another folder as --work, or delete this one.")
    return facts


def openings_of(plan: Plan, seed: int) -> tuple[list[str], list[str]]:
    """Openings that are held out, and all others."""
    openings = prompts()
    random.Random(seed).shuffle(openings)
    return openings[: plan.num_held_out], openings[plan.num_held_out :]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with path.open("w") as file:
        flock(file, LOCK_EX)
        yield


def sides(labelled: Labelled) -> tuple[list[Sample], list[Sample]]:
    """Chosen and rejected answers."""
    return [pair.chosen for pair in labelled.pairs], [pair.rejected for pair in labelled.pairs]


def share_right(margins: Tensor) -> float:
    """Share of pairs with a margin above 0; a tie counts half."""
    return float(((margins > 0).float() + (margins >= 0).float()).mean() / 2)


def written(samples: list[Sample]) -> Figures:
    """What samples say by themselves."""
    return {
        "true_reward": reward_of(samples)[0],
        "tokens": mean(len(item.ids) for item in samples),
        "ended": mean(item.ended for item in samples),
    }


def make_files(folder: Path, plan: Plan, seed: int) -> Figures:
    """Reviews, the SFT model, pairs and rankings; what came of it.

    Returns:
        `plan`, `seed`; `pairs`, `rankings` and their `answers`; `labels_right` of the pairs; what the SFT model writes about held-out
        openings, with all `rewards` of it, for the best that can be had at a KL.
    """
    show = Show(Console(file=sys.stderr))
    held_out, known = openings_of(plan, seed)
    reviews = write_reviews(random.Random(seed + 1).choices(known, k=plan.num_reviews), seed=seed)
    write_jsonl(folder / "reviews.jsonl", [{"prompt": review.prompt, "completion": review.completion} for review in reviews])
    start = new_model(new_settings(folder, plan, seed), say=show.detail)
    sft = train_stage("sft", start, folder, plan, seed, show)
    writer = Writer.load(sft, max_new_tokens=plan.max_new_tokens)
    asked = random.Random(seed + 2).choices(known, k=plan.num_pairs)
    pairs = make_pairs(show, folder / "pairs.jsonl", writer, asked, plan, seed=seed + 3)
    make_pairs(show, folder / "held_out_pairs.jsonl", writer, held_out, plan, seed=seed + 4)
    rankings, num_asked = sample_rankings(writer, known, plan, num=2 * len(pairs.pairs) // RANKED, seed=seed + 10)
    write_jsonl(folder / "ranked.jsonl", rankings)
    show.detail(f"{folder / 'ranked.jsonl'}: {len(rankings):,} rankings of {RANKED}, of {num_asked:,} openings")
    samples = list(chain(*writer.write(held_out, num_per_prompt=SAMPLES_OF_THE_START * plan.samples_per_prompt, seed=seed + 5)))
    return {
        "plan": asdict(plan),
        "seed": seed,
        "pairs": len(pairs.pairs),
        "rankings": len(rankings),
        "answers": {"pair": 2 * len(pairs.pairs), "demonstration": len(pairs.pairs), "ranked": RANKED * len(rankings)},
        "labels_right": pairs.labels_right,
        **written(samples),
        "rewards": [round(item.reward, 5) for item in samples],
    }


def sample_rankings(writer: Writer, known: list[str], plan: Plan, *, num: int, seed: int) -> tuple[list[Figures], int]:
    """As many rankings of four samples as asked; and of how many openings.

    What is no pair (`prefopt.pipeline.sentiment.label`) is no ranking: an answer that did not end or is blank, two that are the same, two
    of the same true reward. The order has the noise of the pairs' labels (Plackett-Luce, as they are Bradley-Terry): that of reward
    times scale plus a Gumbel draw.

    Raises:
        RunError: hardly any four samples make one.
    """
    draw, rows, num_asked = random.Random(seed), [], 0
    while len(rows) < num:
        if num_asked >= 50 * num + AT_ONCE:
            raise RunError(f"of {num_asked} openings only {len(rows)} gave a ranking: the SFT model did not learn to write reviews.")
        openings = draw.choices(known, k=AT_ONCE)
        for samples in writer.write(openings, num_per_prompt=RANKED, seed=seed + 1 + num_asked // AT_ONCE):
            if is_ranking(samples):
                scored = [(plan.label_scale * item.reward + gumbel(draw), item.text) for item in samples]
                texts = [text for _, text in sorted(scored, reverse=True)]
                rows.append({"prompt": samples[0].prompt, "completions": texts, "ranks": list(range(len(texts)))})
        num_asked += AT_ONCE
    return rows[:num], num_asked


def is_ranking(samples: list[Sample]) -> bool:
    """Whether all could be compared with each other."""
    whole = all(item.ended and item.text.strip() for item in samples)
    return whole and len({item.text for item in samples}) == len({item.reward for item in samples}) == len(samples)


def gumbel(draw: random.Random) -> float:
    """A standard Gumbel variable: of independent ones, the order of score + draw is Plackett-Luce."""
    return -math.log(-math.log(max(draw.random(), 1e-300)))
