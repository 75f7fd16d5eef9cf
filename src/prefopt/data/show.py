"""A tree as text for people: what the model will really read, special tokens included."""

from typing import TYPE_CHECKING

from prefopt.data.rows import ascii_controls
from prefopt.trees import Completion, PromptTree, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 1200
"""Characters of one part that are shown; the middle of a longer one is left out."""


def show_tree(tree: PromptTree, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The prompt and the completions, decoded from their ids, each behind a mark with its number of tokens."""
    lines = [f"── prompt, {len(tree.prompt_ids)} tokens ({tree.row_id}) ──", visible(decode(tree.prompt_ids, tokenizer))]
    for index, completion in enumerate(tree.completions):
        lines += [f"── {title(tree, index)}, {len(completion.ids)} tokens ──", show_completion(completion, tokenizer)]
    return "\n".join(lines)


def title(tree: PromptTree, index: int) -> str:
    """What a completion is called."""
    completion = tree.completions[index]
    if is_pair(tree):
        return ("chosen", "rejected")[index]
    name = "completion" if len(tree.completions) == 1 else f"completion {index + 1}"
    said = [] if completion.label is None else [f"thumb {'up' if completion.label else 'down'}"]
    said += [] if completion.rank is None else [f"rank {completion.rank}"]
    said += [] if completion.reward is None else [f"score {completion.reward:g}"]
    return f"{name} ({', '.join(said)})" if said else name


def is_pair(tree: PromptTree) -> bool:
    """Whether it is a chosen answer and a rejected one."""
    return [completion.rank for completion in tree.completions] == [0, 1]


def show_completion(completion: Completion, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A completion's text; stretches that do not count stand in ⟦ ⟧."""
    if completion.scored is None:
        return visible(decode(completion.ids, tokenizer))
    parts: list[str] = []
    start = 0
    for end in range(1, len(completion.ids) + 1):
        if end == len(completion.ids) or completion.scored[end] != completion.scored[start]:
            text = visible(decode(completion.ids[start:end], tokenizer))
            parts.append(text if completion.scored[start] else f"⟦{text}⟧")
            start = end
    return "".join(parts)


def decode(ids: TokenIds, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The ids' text, nothing left out or tidied."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def visible(text: str) -> str:
    """The text with control characters escaped, and the middle of a long one left out."""
    text = ascii_controls(text, keep_newlines=True)
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} … ({len(text) - 2 * half:,} characters) … {text[-half:]}"
