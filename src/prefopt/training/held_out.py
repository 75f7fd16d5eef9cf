"""The held-out examples one by one: text, and figures before training and now. What the report's lists are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.training.loop import Evaluation
from prefopt.training.samples import shown_text
from prefopt.trees import PromptTree


class HeldOutLines:
    """The lines of `held_out.jsonl`.

    Args:
        trees: the held-out examples.
        tokenizer: turns them into text.
        known: the lines that an earlier part of the run left: their figures from before training still hold.
    """

    def __init__(self, trees: Sequence[PromptTree], tokenizer: PreTrainedTokenizerBase, known: Sequence[Mapping[str, Any]]) -> None:
        self.before: dict[str, Any] = {
            row["row"]: row["before"] for row in known if isinstance(row.get("row"), str) and isinstance(row.get("before"), dict)
        }
        self.texts: list[dict[str, Any]] = [
            {
                "row": tree.row_id,
                "prompt": shown_text(tokenizer, tree.prompt_ids),
                "completions": [shown_text(tokenizer, completion.ids) for completion in tree.completions],
                "lengths": [len(completion.ids) for completion in tree.completions],
                "weight": tree.weight,
            }
            for tree in trees
        ]

    def after(self, step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
        """The lines after an evaluation; the first of all is the one before training."""
        lines = []
        for place, text in enumerate(self.texts):
            figures = {name: values[place] for name, values in evaluation.examples.items()}
            if step == 0:
                self.before[text["row"]] = figures
            lines.append({**text, "step": step, "before": self.before.get(text["row"], {}), "after": figures})
        return lines
