"""Scores of a reward model: of the answers in files, and of answers that are given in Python.

Answers are rendered as the model's run rendered its examples, and its score is read at the token that ends an answer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefopt.data.dataset import Dataset, load
from prefopt.data.examples import Answer, Conversation, Example, Message
from prefopt.data.rows import RowFault
from prefopt.data.show import decode
from prefopt.data.template import chat_of
from prefopt.data.tokenize import Grower, TreeOptions
from prefopt.errors import DataError, RunError
from prefopt.methods.comparisons import pairs_of
from prefopt.models.scorer import TreeScorer
from prefopt.pipeline.score_settings import ScoreSettings
from prefopt.pipeline.trained import Trained, look_up
from prefopt.training.terminal.narrator import Terminal
from prefopt.trees import PromptTree

Turns = str | Sequence[Mapping[str, str]]
"""A text, or the turns of a chat: each a mapping with `role` and `content`."""

LIKE_TRAINING = ("max_length", "template_args", "too_long")
"""Settings that are those of the model's run where they are not given; its tokenizer has its chat template."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A reward model with the way in which its run rendered prompts and answers.

    Attributes:
        scorer: the model.
        grower: makes trees of texts.
    """

    scorer: TreeScorer
    grower: Grower

    @classmethod
    def load(cls, model: str, **settings: Any) -> "Scorer":
        """Read a reward model and what is known of its run.

        Args:
            model: folder of a run, of a model or of an adapter, or a hub name.
            settings: as `TreeScorer.load`.

        Raises:
            ModelError: it cannot be found or read, or is no reward model.
            DataError: its chat template cannot be used.
        """
        trained = look_up(str(settings.get("adapter") or model))
        scorer = TreeScorer.load(model, **{"load_in_4bit": trained.in_4bit, **settings})
        return cls(scorer, grower_for(scorer, trained))

    def score(self, prompt: Turns, completions: Sequence[Turns]) -> list[float]:
        """A score for each completion: higher is better, and only differences between answers to one prompt mean something.

        Args:
            prompt: text, or the turns of a chat.
            completions: answers to it, each a text or turns.

        Raises:
            DataError: an answer is empty or does not fit, or a turn is not as chats are.
        """
        given = [self.tree(prompt, completion) for completion in completions]
        trees: list[PromptTree] = []
        for tree in given:  # a prompt that was cut for one answer may be longer for another
            last = trees[-1] if trees else None
            if last is not None and np.array_equal(last.prompt_ids, tree.prompt_ids):
                trees[-1] = PromptTree(last.prompt_ids, (*last.completions, *tree.completions))
            else:
                trees.append(tree)
        return [float(score) for score in self.scorer.scores(trees).tolist()]

    def tree(self, prompt: Turns, completion: Turns) -> PromptTree:
        """Prompt and answer as tokens.

        Raises:
            DataError: they cannot be.
        """
        content: str | Conversation = turns_of(prompt)
        answer = turns_of(completion)
        if not isinstance(content, str) and isinstance(answer, str):
            answer = (Message("assistant", answer),)
        if isinstance(content, str) and not isinstance(answer, str):
            raise DataError("the prompt is text and the answer a chat: give both as text, or the prompt as turns too")
        [grown] = self.grower.grow([Example(content, (Answer(answer, label=True),))])
        if isinstance(grown.tree, RowFault):
            raise DataError(f"the answer cannot be scored: {grown.tree.detail}")
        return grown.tree


def score(model: "str | Scorer", prompt: Turns, completions: Sequence[Turns]) -> list[float]:
    """What `prefopt.score` does."""
    return (Scorer.load(model) if isinstance(model, str) else model).score(prompt, completions)


def turns_of(given: Turns) -> str | Conversation:
    """Text as it is, turns checked.

    Raises:
        DataError: a turn has no role or no content.
    """
    if isinstance(given, str):
        return given
    try:
        return tuple(Message(turn["role"], turn["content"]) for turn in given)
    except (KeyError, TypeError):
        raise DataError('a chat is a list of turns, each with "role" and "content"') from None


def grower_for(scorer: TreeScorer, trained: Trained) -> Grower:
    """Makes trees as the model's run did."""
    config, tokenizer = trained.config, scorer.tokenizer
    text_as, _ = trained.meant("auto", tokenizer)
    chat = chat_of(tokenizer, None, trained.template_args) if text_as == "chat" or tokenizer.chat_template else None
    limits = [limit for limit in (config.get("max_length"), scorer.context) if isinstance(limit, int)]
    return Grower(tokenizer, chat, TreeOptions("completion", text_as, min(limits, default=2**31 - 1), "cut"))


def score_files(settings: ScoreSettings) -> None:
    """Score the answers of files, say the figures, and write the scores.

    Raises:
        PrefoptError: the settings, the data, the model, or the file.
    """
    narrator = Terminal()
    out = None if settings.out is None else settings.out.expanduser()
    if out is not None and out.exists() and not settings.overwrite:
        raise RunError(f"{out} is there already. Give another file as out, or --overwrite.")
    trained = look_up(settings.adapter or settings.model)
    scorer = TreeScorer.load(
        settings.model,
        adapter=settings.adapter,
        precision=settings.precision,
        device=settings.device,
        load_in_4bit=trained.in_4bit if settings.load_in_4bit is None else settings.load_in_4bit,
        trust_remote_code=settings.trust_remote_code,
    )
    settings = like_training(settings, trained, scorer)
    dataset = load(settings.data, settings, scorer.tokenizer, kind=settings.kind)
    for line in [*dataset.summary.lines(), f"reward model: {settings.model}; {scorer.words}"]:
        narrator.say(line)
    scores = scorer.scores(dataset.trees, max_tokens=settings.max_tokens).tolist()
    if out is not None:
        write_rows(out, dataset, scores, scorer.tokenizer)
    for line in figures(dataset.trees, scores):
        narrator.say(line)
    if out is not None:
        narrator.say(f"scores: {out}")


def like_training(settings: ScoreSettings, trained: Trained, scorer: TreeScorer) -> ScoreSettings:
    """The settings with what the model's run had where nothing else was asked for, and no longer than the model can read."""
    given = settings.model_fields_set
    changes = {name: trained.config[name] for name in LIKE_TRAINING if name not in given and name in trained.config}
    if "text_as" not in given:
        changes["text_as"], _ = trained.meant("auto", scorer.tokenizer)
    length = changes.get("max_length", settings.max_length)
    if scorer.context is not None and length > scorer.context:
        changes["max_length"] = scorer.context
    return settings.model_copy(update=changes)


def by_tree(trees: Sequence[PromptTree], scores: Sequence[float]) -> Iterator[tuple[PromptTree, list[float]]]:
    """Each tree with the scores of its completions."""
    start = 0
    for tree in trees:
        end = start + len(tree.completions)
        yield tree, list(scores[start:end])
        start = end


def write_rows(out: Path, dataset: Dataset, scores: Sequence[float], tokenizer: PreTrainedTokenizerBase) -> None:
    """One JSON object per prompt: where its row stood, and each answer with its score, in the data's order of preference.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8", newline="\n") as file:
            for tree, own in by_tree(dataset.trees, scores):
                answers = [
                    {
                        "text": tokenizer.decode(completion.ids.tolist(), skip_special_tokens=True),
                        "score": round(value, 6),
                        **({} if completion.rank is None else {"rank": completion.rank}),
                        **({} if completion.label is None else {"label": completion.label}),
                    }
                    for completion, value in zip(tree.completions, own, strict=True)
                ]
                line = {"row": tree.row_id, "prompt": decode(tree.prompt_ids, tokenizer), "answers": answers}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}. Give another file as out.") from None


def figures(trees: Sequence[PromptTree], scores: Sequence[float]) -> list[str]:
    """What the scores come to, in words: their mean and spread, and how often they order two answers as the data does."""
    values = np.array(scores)
    lines = [f"{len(values):,} answers to {len(trees):,} prompts: mean score {values.mean():.3f}, standard deviation {values.std():.3f}"]
    right = total = 0.0
    for tree, own in by_tree(trees, scores):
        pairs = [] if len(own) < 2 else pairs_of(tree)
        total += len(pairs)
        right += sum(1.0 if own[better] > own[worse] else 0.5 if own[better] == own[worse] else 0.0 for better, worse in pairs)
    if total:
        error = float(np.sqrt(right / total * (1 - right / total) / total))
        lines.append(f"of {total:,.0f} pairs of answers it orders {right / total:.1%} as the data does (standard error {error:.1%})")
    return lines
