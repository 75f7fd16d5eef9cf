"""What a model makes of the data: lengths in its tokens, what of its training fits, and what the good answers cost it.

It is asked about the answers as they are: nothing is generated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from prefopt.data.dataset import Dataset, load
from prefopt.data.kinds import Kind
from prefopt.data.rows import LENGTH_REASONS
from prefopt.data.settings import DataSettings
from prefopt.data.store import Sizes
from prefopt.engine.batch import pack
from prefopt.errors import ModelError, PrefoptError
from prefopt.machine import prepare_environment
from prefopt.models.load import Precision, choose_precision, load_model, load_tokenizer, locate
from prefopt.models.policy import EnginePath, Policy, transformers_logging_at
from prefopt.models.quantise import num_parameters
from prefopt.models.read import context_of
from prefopt.models.settings import ModelSettings
from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.facts import Count, Facts, Lengths, Model, Spread, Way
from prefopt.pipeline.advise.settings import AdviseSettings
from prefopt.pipeline.plan import CUDA_ITSELF, plan
from prefopt.pipeline.plan_settings import PlanSettings
from prefopt.training.cut import cut, needed_positions
from prefopt.training.memory.available import available_memory
from prefopt.training.memory.estimate import size
from prefopt.training.memory.out_of_memory import is_out_of_memory
from prefopt.training.memory.skeleton import build
from prefopt.trees import PromptTree

METHOD_OF: Mapping[Kind, str] = {"pair": "dpo", "ranked": "dpo", "thumbs": "kto", "demonstration": "sft"}
"""Whose memory is looked at; methods on one kind of data differ little."""

CPU = torch.device("cpu")

POSITIONS = 4096
"""Positions of a forward pass; longer examples are not asked about."""

MOST_ON_A_CPU = 1_000_000_000
"""Weights up to which a model is asked on a CPU: of that size 32 pairs of 500 tokens take it a minute at 1 TFLOP/s."""


def ask(settings: AdviseSettings, facts: Facts, name: str) -> Facts:
    """The facts with what the model adds to them.

    Args:
        settings: of the advice.
        facts: of the data.
        name: folder or hub name of the model.

    Raises:
        PrefoptError: the model's config or tokenizer cannot be read, or the data cannot be made into its tokens.
    """
    prepare_environment()
    given = ModelSettings(model=name, trust_remote_code=settings.trust_remote_code)
    source, adapter = locate(name)
    tokenizer = load_tokenizer(given)
    count, context = sizes_of(given, source)
    has_template = bool(tokenizer.chat_template) or settings.chat_template is not None
    model = Model(name, count, adapter is not None, has_template, context, (), "", "")
    data = data_settings(settings, replace(facts, model=model))
    if facts.kind == "prompts":
        return replace(facts, model=replace(model, silent="there are no answers"))
    read = within_context(DataSettings.model_validate(data), context)
    dataset = load(read.data, read, tokenizer, kind=facts.kind)
    longest = longest_of(dataset)
    if facts.beside.sources:  # SFT on all of them comes first
        longest = max(longest, longest_of(load(settings.data, read, tokenizer, kind="demonstration")))
    model = with_ways(model, settings, METHOD_OF[facts.kind], data, longest)
    nats, num_asked, silent = cost_of_good(settings, given, dataset, count)
    model = replace(model, nats=nats, num_asked=num_asked, silent=silent)
    return replace(facts, model=model, lengths=in_tokens(facts.lengths, dataset, read.max_length))


def longest_of(dataset: Dataset) -> int:
    """Positions of the longest example."""
    return int(needed_positions(Sizes.of(dataset.trees), "flat").max())


def data_settings(settings: AdviseSettings, facts: Facts) -> dict[str, Any]:
    """How the data is to be read: as was said, and as the rules have it where nothing was."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set & DataSettings.model_fields.keys()}
    given = {name: value for name, value in given.items() if name not in ("eval_data", "eval_fraction")}
    if "text_as" not in given and signs.is_raw_for_chats(facts):
        given["text_as"] = "chat"
    if facts.beside.sources:
        given["data"] = list(facts.data)
    return {**given, "on_bad_row": "drop"}


def sizes_of(given: ModelSettings, source: str) -> tuple[int, int | None]:
    """Weights of the whole model, and how many tokens it reads.

    Raises:
        ModelError: its config cannot be read.
    """
    try:
        with transformers_logging_at("ERROR"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=given.trust_remote_code)
        model, _ = build(given, choose_precision("float32", torch.device("cpu"), adapter=False))
    except PrefoptError:
        raise
    except Exception as error:  # the library lets errors of many kinds through; all mean that there is no config to read
        raise ModelError(f"cannot read the config of {source}: {' '.join(str(error).split())[:300]}") from None
    return num_parameters(model), context_of(config)


def within_context(settings: DataSettings, context: int | None) -> DataSettings:
    """The settings with examples no longer than the model reads."""
    return settings.model_copy(update={"max_length": min(settings.max_length, context or settings.max_length)})


def with_ways(model: Model, settings: AdviseSettings, method: str, data: Mapping[str, Any], longest: int) -> Model:
    """The model with what of its training fits, as `prefopt plan` finds it.

    Args:
        model: which.
        settings: with the memory and the machine.
        method: whose memory is looked at.
        data: settings of the examples.
        longest: positions of the longest example.
    """
    of_machine = {
        key: getattr(settings, key) for key in ("memory", "device", "gpus", "trust_remote_code") if key in settings.model_fields_set
    }
    asked = PlanSettings.model_validate({"method": method, "model": model.name, **of_machine, **data})
    found = plan(asked, lambda line: None, quick=True)
    taken = found.process or CUDA_ITSELF  # a process on a CPU holds something in any case
    ways = []
    for way in found.ways:
        run = way.fit.settings
        changes = with_room_for(way.fit.changes, longest)
        changes |= {"lora_rank": run.lora_rank} if run.lora_rank and not model.is_adapter else {}
        changes |= {"load_in_4bit": True} if run.load_in_4bit else {}
        ways.append(Way(way.name, way.fit.fits, size(way.fit.estimate.total + taken), changes, way.fit.gpus))
    return replace(model, ways=tuple(ways), chosen=found.chosen.name if found.chosen else "", room=f"{size(found.room)} {found.where}")


def with_room_for(changes: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The changes with micro-batches that hold the longest example: a ranking is longer than the pairs that memory is planned for."""
    return {**changes, "max_tokens": max(longest, changes["max_tokens"])} if "max_tokens" in changes else dict(changes)


def in_tokens(lengths: Lengths, dataset: Dataset, limit: int) -> Lengths:
    """The lengths in tokens, and how many examples are too long; which answer is longer stays as the characters say."""
    sizes = Sizes.of(dataset.trees)
    summary = dataset.summary
    left_out = sum(number for reason, number in (summary.dropped or {}).items() if reason in LENGTH_REASONS)
    answers = [len(completion.ids) for tree in some(dataset.trees, 20_000) for completion in tree.completions]
    together = Spread.of((sizes.prompt + sizes.longest).tolist())
    # Of what was cut the characters still say how long it was.
    per_token = lengths.together.median / max(1, together.median)
    return Lengths(
        "tokens",
        Spread.of(sizes.prompt.tolist()),
        Spread.of(answers),
        together,
        summary.prompt_share,
        lengths.longer_chosen,
        Count(summary.num_cut + left_out, len(dataset.trees) + left_out),
        round(lengths.together.p99 / max(per_token, 0.1)),
        limit,
    )


def some(trees: Sequence[PromptTree], number: int) -> list[PromptTree]:
    """At most so many of the trees, drawn by seed."""
    places = range(len(trees))
    if len(trees) > number:
        places = np.sort(np.random.default_rng(0).choice(len(trees), number, replace=False)).tolist()
    return [trees[place] for place in places]


def cost_of_good(settings: AdviseSettings, given: ModelSettings, dataset: Dataset, count: int) -> tuple[float | None, int, str]:
    """What a token of the good answers costs the model, in nats, and of how many examples; or None, and why it was not asked."""
    if settings.ask == 0:
        return None, 0, "as you say"
    device = torch.device("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu")
    if device.type == "cpu" and count > MOST_ON_A_CPU:
        return None, 0, f"a model of {count:.2g} weights takes long on a CPU"
    precision = choose_precision("auto", device, adapter=True)
    needs, free = count * precision.weights.itemsize, available_memory(device)
    if free is not None and needs > 0.8 * free.num_bytes:
        return None, 0, f"its weights take {size(needs)}, and {size(free.num_bytes)} {free.where} are free"
    trees = some_with_good_alone(dataset.trees, settings.ask)
    if not trees:
        return None, 0, f"no example has a good answer within {POSITIONS:,} tokens"
    try:
        return cost_per_token(trees, given, precision, device), len(trees), ""
    except Exception as error:  # what its config and tokenizer say is known all the same
        if is_out_of_memory(error):
            return None, 0, "memory ran out"
        if isinstance(error, ModelError):
            return None, 0, str(error)
        raise


def cost_per_token(trees: Sequence[PromptTree], given: ModelSettings, precision: Precision, device: torch.device = CPU) -> float:
    """The mean of what the answers' tokens cost the model, in nats.

    Raises:
        ModelError: its weights cannot be loaded.
    """
    loaded = load_model(given, precision=precision, device=device, seed=0, frozen=True)
    policy = Policy(loaded.model, EnginePath("plain", None))  # right for every model, and fast enough for so few
    total = 0.0
    (parts,) = cut(trees, max_tokens=POSITIONS, sharing="plain")
    for part in parts:
        batch = pack(list(part.trees), sharing="plain", device=device)
        with torch.no_grad(), torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None):
            total -= float(policy(batch).sum().sum())
    return total / sum(answer.num_scored for tree in trees for answer in tree.completions)


def some_with_good_alone(trees: Sequence[PromptTree], number: int) -> list[PromptTree]:
    """At most so many of the trees that have a good answer, drawn by seed, with those answers alone: of thumbs most may be down."""
    drawn = np.random.default_rng(0).permutation(len(trees))
    return list(islice((alone for place in drawn.tolist() for alone in with_good_alone([trees[place]])), number))


def with_good_alone(trees: Sequence[PromptTree]) -> list[PromptTree]:
    """The trees with what should be given of their answers: the best, what has a thumb up, the one that there is."""
    found = []
    for tree in trees:
        good = tuple(answer for answer in tree.completions if answer.label is not False and not answer.rank)
        if good and int(needed_positions(Sizes.of([alone := replace(tree, completions=good)]), "plain")[0]) <= POSITIONS:
            found.append(alone)
    return found
