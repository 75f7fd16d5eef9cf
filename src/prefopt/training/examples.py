"""The examples of a run: read, told, shown, and split."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefopt.data.dataset import Dataset, load, source_of, split
from prefopt.data.store import JoinedTrees, choose
from prefopt.errors import DataError
from prefopt.methods.method import Method, Times
from prefopt.models.load import LoadedModel
from prefopt.models.read import context_of
from prefopt.training.order import DataOrder, Mix
from prefopt.training.settings import RunSettings
from prefopt.training.terminal.narrator import Narrator
from prefopt.trees import PromptTree


@dataclass(frozen=True, slots=True)
class RunData:
    """The examples of a run, as its method reads them.

    Attributes:
        train: the examples, each read from the disk when it is asked for.
        held_out: those that are not trained on, in memory: they are run as one batch, again and again.
        facts: about them, for the summary.
        dropped, dropped_held_out: rows that were left out, as `write_dropped` takes them.
        chat_template, end_of_turn: what the saved tokenizer and model need to know of how they were rendered.
        tokenizer: that cut them.
        mix: how often an epoch takes each example to train on; None: once.
    """

    train: Sequence[PromptTree]
    held_out: Sequence[PromptTree]
    facts: dict[str, Any]
    dropped: Sequence[Mapping[str, Any]]
    dropped_held_out: Sequence[Mapping[str, Any]]
    chat_template: str | None
    end_of_turn: str
    tokenizer: PreTrainedTokenizerBase
    mix: Mix | None = None

    @property
    def times(self) -> Times | None:
        """The same as the methods read it."""
        return None if self.mix is None else self.mix.times


def within_context(settings: RunSettings, loaded: LoadedModel, narrator: Narrator) -> RunSettings:
    """The settings with `max_length` no longer than what the model was made for: beyond it positions are missing or untrained."""
    context = context_of(loaded.model.config)
    if not context or context >= settings.max_length:
        return settings
    narrator.say(f"max_length: {context}, as long as the model can read (the settings say {settings.max_length})")
    return settings.model_copy(update={"max_length": context})


def within_data(settings: RunSettings, num_train: int, narrator: Narrator) -> RunSettings:
    """The settings with a `batch_size` of at most all examples: a step that takes one several times only seems to see more of them."""
    if settings.batch_size <= num_train:
        return settings
    narrator.say(f"batch_size: {num_train}, all examples that there are to train on (the settings say {settings.batch_size})")
    return settings.model_copy(update={"batch_size": num_train})


def load_data(method: Method, settings: RunSettings, loaded: LoadedModel, narrator: Narrator) -> RunData:
    """The run's examples, told and shown.

    Raises:
        DataError: as `prefopt.data.dataset.load`; or every example has weight 0.
    """
    kind = method.needs.completions
    dataset = load(settings.data, settings, loaded.tokenizer, kind=kind)
    held_out: Sequence[PromptTree]
    dropped_held_out: Sequence[Mapping[str, Any]]
    trees, held_out, dropped_held_out = dataset.trees, (), ()
    facts: dict[str, Any] = {"fingerprint": mixed_fingerprint(dataset), "summary": dataset.summary.to_dict()}
    for line in dataset.summary.lines():
        narrator.say(line)
    if settings.eval_data:
        held = load(settings.eval_data, settings, loaded.tokenizer, kind=kind)
        if held.times:
            raise DataError(f"eval_data: {', '.join(held.times)} has a weight, and held-out examples are all looked at once. Leave it out.")
        held_out, dropped_held_out = held.trees, held.dropped_rows
        facts |= {"eval_fingerprint": held.fingerprint, "eval_summary": held.summary.to_dict()}
        for line in held.summary.lines():
            narrator.say(f"held out: {line}")
    elif settings.eval_fraction:
        trees, held_out = split(trees, settings.eval_fraction, settings.seed)
        narrator.say(f"held out by seed {settings.seed}: {len(held_out)} of {len(dataset.trees)} examples")
        if not held_out:
            tell_nothing_held_out(len(dataset.trees), settings, narrator)
    narrator.say(f"the first example:\n{dataset.first_example}")
    if not any(tree.weight > 0 for tree in trees):
        raise DataError("every example to train on has weight 0, so there is nothing to learn. Look at the column `weight`.")
    arranged = method.arrange(trees, seed=settings.seed)
    arranged_held_out = list(method.arrange(held_out, seed=settings.seed)) if held_out else []
    mix = mix_of(dataset, arranged, narrator)
    for line in method.remarks(arranged, times=None if mix is None else mix.times):
        narrator.say(line)
    lengths = mean_lengths([method.in_loss(tree) for tree in arranged_held_out])
    facts |= {"num_train": len(arranged), "num_held_out": len(arranged_held_out), "held_out_lengths": lengths}
    return RunData(
        arranged,
        arranged_held_out,
        facts,
        dataset.dropped_rows,
        dropped_held_out,
        template_to_save(dataset, loaded),
        dataset.end_of_turn,
        loaded.tokenizer,
        mix,
    )


def tell_nothing_held_out(num: int, settings: RunSettings, narrator: Narrator) -> None:
    """Say why `eval_fraction` holds nothing out, and what does not happen for that reason.

    Args:
        num: of examples.
        settings, narrator: of the run.

    Raises:
        DataError: `early_stop` was asked for, which would have nothing to look at.
    """
    why = "there is one example"
    if num > 1:
        why = f"all {num:,} examples open with the same text, and those with one opening stay on one side"
    if settings.early_stop is not None:
        raise DataError(
            f"early_stop looks at the held-out loss, and eval_fraction can hold nothing out: {why}. "
            "Give eval_data, or leave early_stop out."
        )
    narrator.say(
        f"note: nothing is held out: {why}. So there are no held-out figures, and no best checkpoint is kept by them. "
        "Give eval_data for that"
    )


def mixed_fingerprint(dataset: Dataset) -> str:
    """The digest of the examples, and of how often each is taken: a run that goes on must take them in the same order."""
    if not dataset.times:
        return dataset.fingerprint
    return sha256(json.dumps([dataset.fingerprint, sorted(dataset.times.items())]).encode()).hexdigest()[:40]


def mix_of(dataset: Dataset, trees: Sequence[PromptTree], narrator: Narrator) -> Mix | None:
    """How often an epoch takes each tree, told by source; None: each of them once."""
    if not dataset.times:
        return None
    mix = Mix.of(np.array(dataset.times_of(trees)))
    for name, number in Counter(map(source_of, trees)).items():
        times = dataset.times.get(name, 1.0)
        share = number * times / mix.num_per_epoch
        narrator.say(f"{name}: {number:,} examples to train on, each {times:g} times in an epoch: {share:.0%} of it")
    return mix


def mean_lengths(trees: Sequence[PromptTree]) -> dict[str, float]:
    """What log-probabilities of these examples are divided by to get nats per token: mean scored tokens, by weight as in the metrics.

    Args:
        trees: as the method reads them; of pairs the chosen answer is the first.

    Returns:
        `mean_chosen` and `mean_rejected` of pairs, `mean_answer` of others; empty where no example has weight.
    """
    total = sum(tree.weight for tree in trees)
    if not total:
        return {}
    is_pairs = all(len(tree.completions) == 2 for tree in trees)
    return {
        name: sum(tree.weight * tree.completions[place].num_scored for tree in trees) / total
        for place, name in enumerate(("mean_chosen", "mean_rejected") if is_pairs else ("mean_answer",))
    }


def template_to_save(dataset: Dataset, loaded: LoadedModel) -> str | None:
    """The chat template that training used, where the tokenizer does not have it: whoever generates needs the same."""
    return dataset.chat_template if dataset.chat_template != loaded.tokenizer.chat_template else None


def needed_trees(order: DataOrder, data: RunData) -> Sequence[PromptTree]:
    """The examples that the run will look at: with few steps on much data the reference need not see all of it."""
    if order.num_taken >= len(data.train):
        return JoinedTrees(data.train, data.held_out)
    taken = np.zeros(len(data.train), dtype=np.bool_)
    for step in range(order.num_steps):
        taken[order.examples(step)] = True
    return JoinedTrees(choose(data.train, np.flatnonzero(taken)), data.held_out)
