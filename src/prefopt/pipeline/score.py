"""Scores of a reward model: of the answers in files, and of answers that are given in Python.

Answers are rendered as the model's run rendered its examples, and its score is read at the token that ends an answer.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefopt.data.dataset import Dataset, load
from prefopt.data.examples import Answer, Conversation, Example, Message, check_answer, conversation_of, text_of
from prefopt.data.prompts import NO_LIMIT
from prefopt.data.rows import RowFault, clip
from prefopt.data.show import decode
from prefopt.data.template import chat_of
from prefopt.data.tokenize import Grower, TreeOptions
from prefopt.disk import draft_of, flush
from prefopt.errors import DataError, RunError
from prefopt.methods.comparisons import pairs_of
from prefopt.models.scorer import TreeScorer
from prefopt.pipeline.score_settings import ScoreSettings
from prefopt.pipeline.trained import Trained, look_up
from prefopt.pipeline.voices import explaining_out_of_memory
from prefopt.training.terminal.narrator import Terminal
from prefopt.trees import PromptTree

Turns = str | Sequence[Mapping[str, str]]
"""A text, or the turns of a chat: each a mapping with `role` and `content`."""


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
    def load(cls, model: str | Path, **settings: Any) -> "Scorer":
        """Read a reward model and what is known of its run.

        Args:
            model: folder of a run, of a model or of an adapter, or a hub name.
            settings: as `TreeScorer.load`; prompts that are longer than `max_length`, or than the run's, are cut from their left.

        Raises:
            ModelError: it cannot be found or read, or is no reward model.
            DataError: its chat template cannot be used.
        """
        trained = look_up(str(settings.get("adapter") or model))
        how = as_trained(trained, settings)
        held = {"load_in_4bit": how["load_in_4bit"], "max_length": how.get("max_length")}
        scorer = TreeScorer.load(str(model), **{**settings, **held})
        text_as, _ = trained.meant(how["text_as"], scorer.tokenizer)
        chat = chat_of(scorer.tokenizer, None, how["template_args"]) if text_as == "chat" or scorer.tokenizer.chat_template else None
        limit = scorer.max_length if "max_length" in how else scorer.context or NO_LIMIT
        return cls(scorer, Grower(scorer.tokenizer, chat, TreeOptions("completion", text_as, limit, how["too_long"])))

    def score(self, prompt: Turns, completions: Sequence[Turns]) -> list[float]:
        """A score for each completion: higher is better, and only differences between answers to one prompt mean something.

        Args:
            prompt: text, or the turns of a chat.
            completions: answers to it, each a text or turns.

        Raises:
            DataError: an answer is empty or does not fit, a turn is not as chats are, or there is no list of answers.
        """
        if isinstance(completions, str | Mapping) or not isinstance(completions, Iterable):
            raise DataError(f"the answers are {clip(completions)}, and must be a list, also where there is but one: [answer]")
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
        content, answer = turns_of(prompt, "prompt"), turns_of(completion, "answer")
        if not isinstance(content, str) and isinstance(answer, str):
            answer = (Message("assistant", answer),)
        if isinstance(content, str) and not isinstance(answer, str):
            raise DataError("the prompt is text and the answer a chat: give both as text, or the prompt as turns too")
        try:
            check_answer(answer, "answer")
        except RowFault as fault:
            raise DataError(f"the answer cannot be scored: {fault.detail}") from None
        [grown] = self.grower.grow([Example(content, (Answer(answer, label=True),))])
        if isinstance(grown.tree, RowFault):
            raise DataError(f"the answer cannot be scored: {grown.tree.detail}")
        return grown.tree


def score(model: "str | Path | Scorer", prompt: Turns, completions: Sequence[Turns]) -> list[float]:
    """What `prefopt.score` does."""
    return (model if isinstance(model, Scorer) else Scorer.load(model)).score(prompt, completions)


def turns_of(given: Turns, name: str) -> str | Conversation:
    """Text or turns, checked as those of files are.

    Args:
        given: either.
        name: what it is called in messages.

    Raises:
        DataError: a turn is none.
    """
    try:
        if isinstance(given, str):
            return text_of(given, name)
        turns = [given] if isinstance(given, Mapping) or not isinstance(given, Iterable) else given
        return conversation_of([dict(turn) if isinstance(turn, Mapping) else turn for turn in turns], name)
    except RowFault as fault:
        raise DataError(f'{fault.detail}. Give text, or a list of turns, each with "role" and "content".') from None


def as_trained(trained: Trained, given: Mapping[str, Any]) -> dict[str, Any]:
    """How weights are held and texts rendered: as was asked, and where nothing was, as in the model's run.

    Args:
        trained: what is known of the run.
        given: settings by name, as far as somebody gave them; null is as good as nothing.

    Returns:
        `load_in_4bit`, `text_as` (`auto` where nobody knows), `template_args`, `too_long`, `max_length` where the run or somebody has
        said it, and all that was given.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    of_run = {name: trained.config[name] for name in ("max_length", "too_long") if name in trained.config}
    return {
        "load_in_4bit": trained.in_4bit,
        "text_as": trained.text_as or "auto",
        "template_args": trained.args_for(asked.get("chat_template")),
        "too_long": "cut",
        **of_run,
        **asked,
    }


@explaining_out_of_memory("Lower max_tokens.")
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
    how = as_trained(trained, {name: getattr(settings, name) for name in settings.model_fields_set})
    scorer = TreeScorer.load(
        settings.model,
        max_length=how.get("max_length", settings.max_length),
        adapter=settings.adapter,
        precision=settings.precision,
        device=settings.device,
        load_in_4bit=how["load_in_4bit"],
        trust_remote_code=settings.trust_remote_code,
    )
    text_as, _ = trained.meant(how["text_as"], scorer.tokenizer)
    settings = settings.model_copy(update={**how, "text_as": text_as, "max_length": scorer.max_length})
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


def by_tree(trees: Sequence[PromptTree], scores: Sequence[float]) -> Iterator[tuple[PromptTree, list[float]]]:
    """Each tree with the scores of its completions."""
    start = 0
    for tree in trees:
        end = start + len(tree.completions)
        yield tree, list(scores[start:end])
        start = end


def write_rows(out: Path, dataset: Dataset, scores: Sequence[float], tokenizer: PreTrainedTokenizerBase) -> None:
    """One JSON object per prompt: where its row stood, and each answer with its score, in the data's order of preference.

    The file appears whole or not at all. Answers are as a tokenizer decodes them, lone surrogates of broken text included.

    Raises:
        RunError: the file cannot be written; what it held is as it was.
    """
    draft = draft_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
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
        flush(draft)  # some disks say only now that they are full
        draft.replace(out)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
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
