"""The held-out examples one by one: text, and figures before training and now. What the report's lists are made of."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.training.loop import Evaluation
from prefopt.training.samples import shown_prompt, shown_text
from prefopt.trees import PromptTree


class HeldOutLines:
    """The lines of `held_out.jsonl`.

    Args:
        trees: the held-out examples.
        tokenizer: turns them into text.
        known: the lines that an earlier part of the run left: their figures from before training still hold.
    """

    def __init__(self, trees: Sequence[PromptTree], tokenizer: PreTrainedTokenizerBase, known: Sequence[Mapping[str, Any]]) -> None:
        self.texts = described(trees, tokenizer)
        self.before = {_key(row): row["before"] for row in known if isinstance(row.get("before"), dict)}

    @property
    def num_unknown(self) -> int:
        """Examples whose figures from before training are not known."""
        return sum(_key(text) not in self.before for text in self.texts)

    def after(self, step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
        """The lines after an evaluation; the first of all is the one before training."""
        lines = []
        for place, text in enumerate(self.texts):
            own = {name: values[place] for name, values in evaluation.examples.items()}
            figures = {name: value for name, value in own.items() if name == "loss" or not math.isnan(value)}  # it has no such metric
            if step == 0:
                self.before[_key(text)] = figures
            lines.append({**text, "step": step, "before": self.before.get(_key(text), {}), "after": figures})
        return lines


def described(trees: Sequence[PromptTree], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Examples as people read them, one mapping each."""
    return [
        {
            "row": tree.row_id,
            "prompt": shown_prompt(tokenizer, tree.prompt_ids),
            "completions": [shown_text(tokenizer, completion.ids) for completion in tree.completions],
            "lengths": [len(completion.ids) for completion in tree.completions],
            "weight": tree.weight,
        }
        for tree in trees
    ]


def _key(line: Mapping[str, Any]) -> str:
    """What an example is known by when the run goes on: its text. The file that it stands in may have another name by then."""
    return json.dumps([line.get(name) for name in ("prompt", "completions", "lengths")])
