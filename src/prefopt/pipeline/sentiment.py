"""The parts of the controlled sentiment experiment: a model that writes reviews, labelled pairs of them, figures before and after.

Shapes: N tokens of C completions, one completion after the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefopt.engine.batch import pack
from prefopt.evaluate.kl import KL, estimate_kl
from prefopt.evaluate.reward_accuracy import RewardAccuracy, reward_accuracy
from prefopt.models.policy import EnginePath, Policy
from prefopt.models.read import read_model
from prefopt.pipeline.reviews import true_reward
from prefopt.rollout.sample import sample
from prefopt.trees import Completion, PromptTree, TokenIds, token_ids

SAMPLED_AT_ONCE = 256
SCORED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion with its opening.

    Attributes:
        prompt: the opening, as text.
        prompt_ids, ids: tokens of opening and completion.
        text: of the completion, without its end-of-turn token.
        ended: whether it ended by itself, rather than at the limit of tokens.
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


@dataclass(frozen=True, slots=True)
class Writer:
    """A trained model that writes reviews, and says how likely they are.

    Attributes:
        policy: the model, on the engine.
        tokenizer: its tokenizer.
        max_new_tokens: where a review is cut.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int

    @classmethod
    def load(cls, folder: Path, *, max_new_tokens: int) -> "Writer":
        """From the folder of a trained model.

        Raises:
            ModelError: it cannot be read.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = read_model(str(folder), dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]  # a device by name
        # Plain is right for every model without proof, and fast enough for some hundreds of short texts.
        return cls(Policy(model, EnginePath("plain", None)), AutoTokenizer.from_pretrained(folder), max_new_tokens)

    def write(self, openings: Sequence[str], *, num_per_prompt: int, seed: int) -> list[list[Sample]]:
        """Samples of each opening, from the model's own distribution."""
        prompt_ids = [token_ids(self.tokenizer(opening)["input_ids"]) for opening in openings]
        end = self.tokenizer.eos_token_id
        with self.policy.generating() as model:
            completions = sample(
                model,
                prompt_ids,
                eos_ids={end},
                num_per_prompt=num_per_prompt,
                max_new_tokens=self.max_new_tokens,
                seed=seed,
                batch_size=SAMPLED_AT_ONCE,
            )
        return [
            [
                Sample(opening, prompt, ids, str(self.tokenizer.decode(ids, skip_special_tokens=True)), bool(ids[-1] == end))
                for ids in of_prompt
            ]
            for opening, prompt, of_prompt in zip(openings, prompt_ids, completions, strict=True)
        ]

    @torch.no_grad()
    def logps(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N] of the completions' tokens in nats, float32, and the completions' lengths [C]."""
        values, lengths = [], []
        for start in range(0, len(samples), SCORED_AT_ONCE):
            trees = [PromptTree(item.prompt_ids, (Completion(item.ids),)) for item in samples[start : start + SCORED_AT_ONCE]]
            logps = self.policy(pack(trees, sharing="plain", device=self.policy.model.device))
            values.append(logps.values_N.cpu())
            lengths.append(logps.lengths_C.cpu())
        return torch.cat(values), torch.cat(lengths)

    def sums(self, samples: Sequence[Sample]) -> Tensor:
        """Log-probability of each completion, [C], in nats, float32."""
        values_N, lengths_C = self.logps(samples)
        return torch.stack([part.sum() for part in torch.split(values_N, lengths_C.tolist())])


@dataclass(frozen=True, slots=True)
class Labelled:
    """Pairs, and what could not be one: number of prompts by reason."""

    pairs: list[Pair]
    dropped: dict[str, int]

    @property
    def labels_right(self) -> float:
        """Share of the pairs whose label agrees with the true reward."""
        return mean(pair.label_is_right for pair in self.pairs)


def preference(reward: float, other_reward: float, *, scale: float) -> float:
    """Bradley–Terry: the probability that the first is preferred, σ(scale · (reward − other_reward))."""
    return 1 / (1 + math.exp(-scale * (reward - other_reward)))


def label(samples: Sequence[Sequence[Sample]], *, scale: float, seed: int) -> Labelled:
    """One pair of each prompt's two samples, the label drawn through Bradley–Terry.

    Left out and counted: samples that did not end or are blank, twice the same text, and ties, whose label would say nothing.
    """
    uniforms = np.random.default_rng(seed).random(len(samples))
    pairs: list[Pair] = []
    dropped = {"unfinished or blank": 0, "twice the same text": 0, "the same true reward": 0}
    for (one, other), uniform in zip(samples, uniforms, strict=True):
        if not (one.ended and other.ended and one.text.strip() and other.text.strip()):
            dropped["unfinished or blank"] += 1
        elif one.text == other.text:
            dropped["twice the same text"] += 1
        elif one.reward == other.reward:
            dropped["the same true reward"] += 1
        else:
            pairs.append(Pair(one, other) if uniform < preference(one.reward, other.reward, scale=scale) else Pair(other, one))
    return Labelled(pairs, dropped)


@dataclass(frozen=True, slots=True)
class Figures:
    """Before and after DPO.

    Attributes:
        before, after: samples of the SFT and the DPO model, of the same openings and from the same random numbers.
        kl: of the DPO model from the SFT model.
        accuracy: of the implicit reward on held-out pairs.
        labels_right: share of those pairs whose label agrees with the true reward; knowing the reward scores no higher.
    """

    before: list[Sample]
    after: list[Sample]
    kl: KL
    accuracy: RewardAccuracy
    labels_right: float

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
            "ended_before": mean(item.ended for item in self.before),
            "ended_after": mean(item.ended for item in self.after),
        }


def compare(
    sft: Writer, dpo: Writer, openings: Sequence[str], held_out: Labelled, *, num_per_prompt: int, beta: float, seed: int
) -> Figures:
    """Sample both models and score what they wrote; score the held-out pairs.

    Args:
        sft: the reference, which sampled the pairs.
        dpo: the policy.
        openings: prompts that neither has seen.
        held_out: pairs of such prompts.
        num_per_prompt: samples of each opening.
        beta: of the DPO run.
        seed: of the samples.
    """
    before, after = (list(chain(*writer.write(openings, num_per_prompt=num_per_prompt, seed=seed))) for writer in (sft, dpo))
    policy_N, lengths_C = dpo.logps(after)
    reference_N, _ = sft.logps(after)
    chosen, rejected = [pair.chosen for pair in held_out.pairs], [pair.rejected for pair in held_out.pairs]
    return Figures(
        before=before,
        after=after,
        kl=estimate_kl(policy_N, reference_N, lengths_C),
        accuracy=reward_accuracy(dpo.sums(chosen), dpo.sums(rejected), sft.sums(chosen), sft.sums(rejected), beta=beta),
        labels_right=held_out.labels_right,
    )


def reward_of(samples: Sequence[Sample]) -> tuple[float, float]:
    """Mean true reward, and its standard error."""
    rewards = np.array([item.reward for item in samples])
    return float(rewards.mean()), float(rewards.std(ddof=1) / math.sqrt(len(rewards)))
