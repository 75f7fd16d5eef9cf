"""A few answers of the model at each evaluation: what the figures do not show.

The same prompts and the same random numbers every time, so that what changes from one evaluation to the next is the
model. Beside the text there are figures in which trouble shows early: how long answers are, whether they end, how much
of them repeats itself, and how sure the model was of each token.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin, PreTrainedTokenizerBase

from prefopt.data.show import decode
from prefopt.data.store import Sizes
from prefopt.engine.batch import pack
from prefopt.engine.logps import TokenLogps
from prefopt.evaluate.kl import estimate_kl
from prefopt.models.policy import Policy
from prefopt.models.reference import Reference
from prefopt.rollout.sample import sample
from prefopt.training.group.processes import Processes
from prefopt.trees import Completion, PromptTree, TokenIds

REPEATED_TOKENS = 4
"""Length of the stretches of tokens whose return counts as repetition: shorter ones return in any text."""

SHOWN_CHARACTERS = 4000
"""Longer texts are cut in the files that people and the report read."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Answers a few prompts, always the same.

    Attributes:
        prompts: the examples whose prompts are answered.
        reference: what the policy is compared with; None: none that could be asked about new texts.
        tokenizer: turns answers into text.
        end_ids: tokens that end an answer.
        max_new_tokens: where an answer is cut.
        seed: of the draws.
        autocast: dtype of matrix products, or None.
        processes: of the run; each makes the same answers.
    """

    prompts: Sequence[PromptTree]
    reference: Reference | None
    tokenizer: PreTrainedTokenizerBase
    end_ids: Collection[int]
    max_new_tokens: int
    seed: int
    autocast: torch.dtype | None
    processes: Processes

    def answers(self, policy: Policy, step: int) -> list[dict[str, Any]]:
        """The lines of `samples.jsonl` after a step."""
        device = self.processes.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            with policy.generating() as model:
                drawn = sample(
                    model,
                    [tree.prompt_ids for tree in self.prompts],
                    eos_ids=self.end_ids,
                    max_new_tokens=self.max_new_tokens,
                    seed=self.seed,
                )
            return [
                {
                    "step": step,
                    "row": tree.row_id,
                    "prompt": shown_prompt(self.tokenizer, tree.prompt_ids),
                    "text": shown_text(self.tokenizer, ids),
                    "num_tokens": len(ids),
                    "ended": int(ids[-1]) in self.end_ids,
                    "repetition": repetition(ids),
                    **self._distributions(policy, tree, ids),
                }
                for tree, (ids,) in zip(self.prompts, drawn, strict=True)
            ]

    @torch.no_grad()
    def _distributions(self, policy: Policy, tree: PromptTree, ids: TokenIds) -> dict[str, float]:
        """Of the distributions that the tokens were drawn from: mean entropy per token, and KL from the reference per answer, in nats."""
        batch = pack([PromptTree(tree.prompt_ids, (Completion(ids),))], sharing=policy.path.sharing, device=self.processes.device)
        logps = policy(batch, extras=True)
        assert logps.entropy_N is not None
        figures = {"entropy": float(logps.entropy_N.mean())}
        if self.reference is not None:
            reference = self.reference.logps(batch)
            assert isinstance(reference, TokenLogps), "the data has no sums for texts that are new"
            figures["kl"] = estimate_kl(logps.values_N, reference.values_N, logps.lengths_C).k3
        return figures


def choose_prompts(trees: Sequence[PromptTree], *, num: int, room: int, seed: int) -> list[PromptTree]:
    """Examples with different prompts, drawn by seed, shorter ones where they leave no room for an answer.

    Args:
        trees: to choose from.
        num: how many at most.
        room: tokens of the longest prompt after which an answer still fits.
        seed: of the draw.
    """
    fitting = np.flatnonzero(Sizes.of(trees).prompt <= room).tolist()
    chosen: list[PromptTree] = []
    seen: set[bytes] = set()
    for place in np.random.default_rng(seed).permutation(len(fitting)):
        tree = trees[fitting[place]]
        if len(chosen) == num:
            break
        if (key := tree.prompt_ids.tobytes()) not in seen:
            seen.add(key)
            chosen.append(tree)
    return chosen


def make_sampler(
    policy: Policy,
    reference: Reference | None,
    trees: Sequence[PromptTree],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Collection[int],
    *,
    num: int,
    max_new_tokens: int,
    max_length: int,
    seed: int,
    autocast: torch.dtype | None,
    processes: Processes,
) -> Sampler | None:
    """A sampler of some of the prompts; None where none is asked for, none is short enough, or the model cannot generate.

    Args:
        policy: answers.
        reference: to compare it with, where one can be asked.
        trees: whose prompts.
        num: how many of them at most.
        max_length: the longest prompt with answer that the run reads.
        tokenizer, end_ids, max_new_tokens, seed, autocast, processes: as `Sampler`.
    """
    prompts = choose_prompts(trees, num=num, room=max_length - max_new_tokens, seed=seed)
    if not prompts or not isinstance(policy.model, GenerationMixin):
        return None
    return Sampler(prompts, reference, tokenizer, end_ids, max_new_tokens, seed, autocast, processes)


def means(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures of the answers as the metrics have them."""
    names = {"num_tokens": "length", "ended": "ended", "repetition": "repetition", "entropy": "entropy", "kl": "kl"}
    return {f"samples/{name}": float(np.mean([answer[key] for answer in answers])) for key, name in names.items() if key in answers[0]}


def repetition(ids: TokenIds) -> float:
    """Share of the answer's stretches of `REPEATED_TOKENS` tokens that it has held before; 0 for one too short to hold two."""
    stretches = [tuple(ids[start : start + REPEATED_TOKENS]) for start in range(len(ids) - REPEATED_TOKENS + 1)]
    return 1 - len(set(stretches)) / len(stretches) if stretches else 0.0


def shown_prompt(tokenizer: PreTrainedTokenizerBase, ids: TokenIds) -> str:
    """A prompt as the model read it, special tokens included; of a very long one the middle is left out, for its end is the question."""
    text = decode(ids, tokenizer)
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


def shown_text(tokenizer: PreTrainedTokenizerBase, ids: TokenIds) -> str:
    """An answer as people read it, without the special tokens that end it, cut where it is very long.

    Special tokens within it are shown: they part the turns of a dialogue, and a model that writes them by itself is in trouble.
    """
    end = len(ids)
    while end and not tokenizer.decode(ids[end - 1 : end].tolist(), skip_special_tokens=True):
        end -= 1
    text = decode(ids[:end], tokenizer).strip()
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " [...]"
