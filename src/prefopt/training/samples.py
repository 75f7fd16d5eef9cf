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

from prefopt.engine.batch import pack
from prefopt.models.policy import Policy
from prefopt.rollout.sample import sample
from prefopt.training.processes import Processes
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
        tokenizer: turns answers into text.
        end_ids: tokens that end an answer.
        max_new_tokens: where an answer is cut.
        seed: of the draws.
        autocast: dtype of matrix products, or None.
        processes: of the run; each makes the same answers.
    """

    prompts: Sequence[PromptTree]
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
                    "prompt": shown_text(self.tokenizer, tree.prompt_ids),
                    "text": shown_text(self.tokenizer, ids),
                    "num_tokens": len(ids),
                    "ended": int(ids[-1]) in self.end_ids,
                    "repetition": repetition(ids),
                    "entropy": self._entropy(policy, tree, ids),
                }
                for tree, (ids,) in zip(self.prompts, drawn, strict=True)
            ]

    @torch.no_grad()
    def _entropy(self, policy: Policy, tree: PromptTree, ids: TokenIds) -> float:
        """Mean entropy, in nats, of the distributions that the tokens were drawn from."""
        answered = PromptTree(tree.prompt_ids, (Completion(ids),))
        logps = policy(pack([answered], sharing=policy.path.sharing, device=self.processes.device), extras=True)
        assert logps.entropy_N is not None
        return float(logps.entropy_N.mean())


def choose_prompts(trees: Sequence[PromptTree], *, num: int, room: int, seed: int) -> list[PromptTree]:
    """Examples with different prompts, drawn by seed, shorter ones where they leave no room for an answer.

    Args:
        trees: to choose from.
        num: how many at most.
        room: tokens of the longest prompt after which an answer still fits.
        seed: of the draw.
    """
    fitting = [index for index, tree in enumerate(trees) if len(tree.prompt_ids) <= room]
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
        trees: whose prompts.
        num: how many of them at most.
        max_length: the longest prompt with answer that the run reads.
        tokenizer, end_ids, max_new_tokens, seed, autocast, processes: as `Sampler`.
    """
    prompts = choose_prompts(trees, num=num, room=max_length - max_new_tokens, seed=seed)
    if not prompts or not isinstance(policy.model, GenerationMixin):
        return None
    return Sampler(prompts, tokenizer, end_ids, max_new_tokens, seed, autocast, processes)


def means(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures of the answers as the metrics have them."""
    names = {"num_tokens": "length", "ended": "ended", "repetition": "repetition", "entropy": "entropy"}
    return {f"samples/{name}": float(np.mean([answer[key] for answer in answers])) for key, name in names.items()}


def repetition(ids: TokenIds) -> float:
    """Share of the answer's stretches of `REPEATED_TOKENS` tokens that it has held before; 0 for one too short to hold two."""
    stretches = [tuple(ids[start : start + REPEATED_TOKENS]) for start in range(len(ids) - REPEATED_TOKENS + 1)]
    return 1 - len(set(stretches)) / len(stretches) if stretches else 0.0


def shown_text(tokenizer: PreTrainedTokenizerBase, ids: TokenIds) -> str:
    """Tokens as people read them, without control tokens, cut where it is very long."""
    text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " [...]"
