"""The examples of a run: read, told, shown, and split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.dataset import Dataset, load, split
from prefopt.errors import DataError
from prefopt.methods.method import Method
from prefopt.models.load import LoadedModel
from prefopt.training.folder import RunFolder
from prefopt.training.narrator import Narrator
from prefopt.training.order import DataOrder
from prefopt.training.settings import RunSettings
from prefopt.trees import PromptTree


@dataclass(frozen=True, slots=True)
class RunData:
    """The examples of a run, as its method reads them.

    Attributes:
        train, held_out: the examples.
        facts: about them, for the summary.
        dropped: the files of dropped rows that were written.
        chat_template, end_of_turn: what the saved tokenizer and model need to know of how they were rendered.
        tokenizer: that cut them.
    """

    train: Sequence[PromptTree]
    held_out: Sequence[PromptTree]
    facts: dict[str, Any]
    dropped: tuple[Path, ...]
    chat_template: str | None
    end_of_turn: str
    tokenizer: PreTrainedTokenizerBase


def within_context(settings: RunSettings, loaded: LoadedModel, narrator: Narrator) -> RunSettings:
    """The settings with `max_length` no longer than what the model was made for: beyond it positions are missing or untrained."""
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if not context or context >= settings.max_length:
        return settings
    narrator.say(f"max_length: {context}, as long as the model can read (the settings say {settings.max_length})")
    return settings.model_copy(update={"max_length": context})


def load_data(method: Method, settings: RunSettings, loaded: LoadedModel, folder: RunFolder | None, narrator: Narrator) -> RunData:
    """The run's examples, told and shown; rows that are dropped are written into the folder, where there is one.

    Raises:
        DataError: as `prefopt.data.dataset.load`; or every example has weight 0.
    """
    kind = method.needs.completions
    dataset = load(settings.data, settings, loaded.tokenizer, kind=kind, dropped_file=folder.files.dropped if folder else None)
    held_out: Sequence[PromptTree]
    trees, held_out = dataset.trees, ()
    dropped = [folder.files.dropped] if folder and dataset.summary.num_dropped else []
    facts: dict[str, Any] = {"fingerprint": dataset.fingerprint, "summary": dataset.summary.to_dict()}
    for line in dataset.summary.lines():
        narrator.say(line)
    if settings.eval_data:
        held = load(
            settings.eval_data, settings, loaded.tokenizer, kind=kind, dropped_file=folder.files.dropped_held_out if folder else None
        )
        held_out = held.trees
        facts |= {"eval_fingerprint": held.fingerprint, "eval_summary": held.summary.to_dict()}
        if folder and held.summary.num_dropped:
            dropped.append(folder.files.dropped_held_out)
        for line in held.summary.lines():
            narrator.say(f"held out: {line}")
    elif settings.eval_fraction:
        trees, held_out = split(trees, settings.eval_fraction, settings.seed)
        narrator.say(f"held out by seed {settings.seed}: {len(held_out)} of {len(dataset.trees)} examples")
    narrator.say(f"the first example:\n{dataset.first_example}")
    if not any(tree.weight > 0 for tree in trees):
        raise DataError("every example to train on has weight 0, so there is nothing to learn. Look at the column `weight`.")
    facts |= {"num_train": len(trees), "num_held_out": len(held_out)}
    arranged, arranged_held_out = (list(method.arrange(part, seed=settings.seed)) for part in (trees, held_out))
    return RunData(
        arranged, arranged_held_out, facts, tuple(dropped), template_to_save(dataset, loaded), dataset.end_of_turn, loaded.tokenizer
    )


def template_to_save(dataset: Dataset, loaded: LoadedModel) -> str | None:
    """The chat template that training used, where the tokenizer does not have it: whoever generates needs the same."""
    return dataset.chat_template if dataset.chat_template != loaded.tokenizer.chat_template else None


def needed_trees(order: DataOrder, data: RunData) -> list[PromptTree]:
    """The examples that the run will look at: with few steps on much data the reference need not see all of it."""
    if order.num_taken >= len(data.train):
        return [*data.train, *data.held_out]
    seen = sorted({int(index) for step in range(order.num_steps) for index in order.examples(step)})
    return [*(data.train[index] for index in seen), *data.held_out]
