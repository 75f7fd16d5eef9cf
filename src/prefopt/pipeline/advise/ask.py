"""What a model makes of the data: lengths in its tokens, what of its training fits, and what it thinks of the answers.

It is asked about the answers as they are: nothing is generated. Per token of the good answers it gives its own probability, and the
entropy of its prediction, which is what a token drawn from itself would cost on average. Answers of its own cost it about that;
answers of somebody who writes otherwise cost more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from prefopt.data.dataset import Dataset, load
from prefopt.data.kinds import Kind
from prefopt.data.rows import LENGTH_REASONS
from prefopt.data.settings import DataSettings
from prefopt.data.store import Sizes
from prefopt.engine.batch import pack
from prefopt.errors import ModelError, PrefoptError
from prefopt.machine import prepare_environment
from prefopt.models.load import choose_precision, load_model, load_tokenizer, locate
from prefopt.models.policy import Policy, transformers_logging_at
from prefopt.models.proof import prove
from prefopt.models.quantise import num_parameters
from prefopt.models.settings import ModelSettings
from prefopt.pipeline.advise.facts import Count, Facts, Lengths, Model, Said, Way
from prefopt.pipeline.advise.gauge import in_tokens
from prefopt.pipeline.advise.settings import AdviseSettings
from prefopt.pipeline.plan import CUDA_ITSELF, plan
from prefopt.pipeline.plan_settings import PlanSettings
from prefopt.training.cut import cut, needed_positions
from prefopt.training.memory.available import available_memory
from prefopt.training.memory.estimate import size
from prefopt.training.memory.skeleton import build
from prefopt.trees import PromptTree

METHOD_OF: Mapping[Kind, str] = {"pair": "dpo", "ranked": "dpo", "thumbs": "kto", "demonstration": "sft"}
"""Whose memory is looked at; methods on one kind of data differ little."""

POSITIONS = 4096
"""Positions of a forward pass; longer examples are not asked about."""

Sum = dict[str, float]


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
    count, context = _sizes(given, source)
    has_template = bool(tokenizer.chat_template) or settings.chat_template is not None
    model = Model(name, count, adapter is not None, has_template, context, (), "", "")
    dataset: Dataset | None = None
    data = data_settings(settings, replace(facts, model=model))
    if facts.kind != "prompts":
        dataset = _load(data, tokenizer, facts.kind, context)
    ways, chosen, room = _ways(settings, facts, name, data)
    if dataset is not None:
        longest = int(needed_positions(Sizes.of(dataset.trees), "flat").max())
        ways = tuple(replace(way, changes=with_room_for(way.changes, longest)) for way in ways)
    model = replace(model, ways=ways, chosen=chosen, room=room)
    if dataset is None:
        return replace(facts, model=model)
    said, silent = _said(settings, given, dataset, count)
    return replace(facts, model=replace(model, said=said, silent=silent), lengths=_lengths(facts, dataset))


def data_settings(settings: AdviseSettings, facts: Facts) -> dict[str, Any]:
    """How the data is to be read: as was said, and as the rules have it where nothing was."""
    from prefopt.pipeline.advise.signs import is_raw_for_chats

    given = {name: getattr(settings, name) for name in settings.model_fields_set & DataSettings.model_fields.keys()}
    given = {name: value for name, value in given.items() if name not in ("eval_data", "eval_fraction")}
    if "text_as" not in given and is_raw_for_chats(facts):
        given["text_as"] = "chat"
    return {**given, "on_bad_row": "drop"}


def _sizes(given: ModelSettings, source: str) -> tuple[int, int | None]:
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
    return num_parameters(model), getattr(config.get_text_config(), "max_position_embeddings", None)


def _load(data: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, kind: Kind, context: int | None) -> Dataset:
    settings = DataSettings.model_validate(data)
    if context and context < settings.max_length:
        settings = settings.model_copy(update={"max_length": context})
    return load(settings.data, settings, tokenizer, kind=kind)


def _ways(settings: AdviseSettings, facts: Facts, name: str, data: Mapping[str, Any]) -> tuple[tuple[Way, ...], str, str]:
    """What fits, the first that does, and what there is, as `prefopt plan` finds it."""
    of_machine = {
        key: getattr(settings, key) for key in ("memory", "device", "gpus", "trust_remote_code") if key in settings.model_fields_set
    }
    method = "sft" if facts.kind == "prompts" else METHOD_OF[facts.kind]
    own = {} if facts.kind == "prompts" else dict(data)
    said: list[str] = []
    found = plan(PlanSettings.model_validate({"method": method, "model": name, **of_machine, **own}), said.append, timed=False)
    taken = found.process or CUDA_ITSELF  # a process on a CPU holds something in any case
    ways = []
    for way in found.ways:
        changes = dict(way.fit.changes)
        if not way.name.startswith("adapter") and way.fit.settings.lora_rank:
            changes["lora_rank"] = way.fit.settings.lora_rank
        if way.fit.settings.load_in_4bit:
            changes["load_in_4bit"] = True
        ways.append(Way(way.name, way.fit.fits, size(way.fit.estimate.total + taken), changes, way.fit.gpus))
    room = next((line.removeprefix("memory: ") for line in said if line.startswith("memory: ")), "")
    return tuple(ways), found.chosen.name if found.chosen else "", room


def with_room_for(changes: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The changes with micro-batches that hold the longest example: a ranking is longer than the pairs that memory is planned for."""
    return {**changes, "max_tokens": max(longest, changes["max_tokens"])} if "max_tokens" in changes else dict(changes)


def _lengths(facts: Facts, dataset: Dataset) -> Lengths:
    """The lengths in tokens, and how many examples are too long."""
    sizes = Sizes.of(dataset.trees)
    summary = dataset.summary
    left_out = sum(number for reason, number in (summary.dropped or {}).items() if reason in LENGTH_REASONS)
    answers = [len(completion.ids) for tree in _some(dataset.trees, 20_000, 0) for completion in tree.completions]
    together = sizes.prompt + sizes.longest
    # Of what was cut the characters still say how long it was.
    per_token = facts.lengths.together.median / max(1.0, float(np.median(together)))
    return replace(
        in_tokens(facts.lengths, sizes.prompt.tolist(), answers, together.tolist(), summary.prompt_share),
        too_long=Count(summary.num_cut + left_out, len(dataset.trees) + left_out),
        uncut=round(facts.lengths.together.p99 / max(per_token, 0.1)),
    )


def _some(trees: Sequence[PromptTree], number: int, seed: int) -> list[PromptTree]:
    """At most so many of the trees, drawn by seed."""
    places = range(len(trees))
    if len(trees) > number:
        places = np.sort(np.random.default_rng(seed).choice(len(trees), number, replace=False)).tolist()
    return [trees[place] for place in places]


def _said(settings: AdviseSettings, given: ModelSettings, dataset: Dataset, count: int) -> tuple[Said | None, str]:
    """What the model says of the answers; or why it was not asked."""
    if settings.ask == 0:
        return None, "as you say"
    device = torch.device("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu")
    precision = choose_precision("auto", device, adapter=True)
    needs, free = count * precision.weights.itemsize, available_memory(device)
    if free is not None and needs > 0.8 * free.num_bytes:
        return None, f"its weights take {size(needs)}, and {size(free.num_bytes)} {free.where} are free"
    trees = [tree for tree in _some(dataset.trees, settings.ask, settings.seed) if _positions(tree) <= POSITIONS]
    if not trees:
        return None, f"all examples that were drawn are longer than {POSITIONS:,} tokens"
    try:
        loaded = load_model(given, precision=precision, device=device, seed=0, frozen=True)
    except ModelError as error:  # what its config and tokenizer say is known all the same
        return None, str(error)
    proof = prove(loaded.model, max_length=POSITIONS, autocast=precision.autocast)
    policy = Policy(loaded.model, proof.path)

    def sums(some: Sequence[PromptTree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = pack(some, sharing=proof.path.sharing, device=device)
        with torch.no_grad(), torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None):
            logps = policy(batch, extras=True)
        assert logps.entropy_N is not None
        return logps.sum().cpu(), logps.sum_tokens(logps.entropy_N).cpu(), logps.lengths_C.cpu()

    (parts,) = cut(trees, max_tokens=2 * POSITIONS, sharing=proof.path.sharing)
    said = said_of(sums, [list(part.trees) for part in parts])
    return said, "" if said else "no answer among those that were drawn is good"


def _positions(tree: PromptTree) -> int:
    """Of the example alone, however it is run."""
    return int(needed_positions(Sizes.of([tree]), "plain")[0])


def said_of(
    sums: Callable[[Sequence[PromptTree]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    parts: Sequence[list[PromptTree]],
) -> Said | None:
    """Means per token over all good and over all bad answers; None where no answer is good.

    Args:
        sums: of some trees: log-probability, entropy and scored tokens of each of their completions.
        parts: trees, as they are run together.
    """
    good: list[tuple[float, float, int]] = []
    bad: list[tuple[float, float, int]] = []
    wins = pairs = 0
    for part in parts:
        rows = list(zip(*(values.tolist() for values in sums(part)), strict=True))
        for tree in part:
            own, rows = rows[: len(tree.completions)], rows[len(tree.completions) :]
            for completion, row in zip(tree.completions, own, strict=True):
                is_bad = completion.label is False if completion.label is not None else bool(completion.rank)
                (bad if is_bad else good).append(row)
            if len(own) == 2 and all(row[2] for row in own):
                pairs += 1
                wins += own[0][0] / own[0][2] > own[1][0] / own[1][2]
    if not (of_good := sum(row[2] for row in good)):
        return None
    return Said(
        sum(map(len, parts)),
        good=-sum(row[0] for row in good) / of_good,
        own=sum(row[1] for row in good) / of_good,
        bad=-sum(row[0] for row in bad) / sum(row[2] for row in bad) if bad else None,
        prefers=Count(wins, pairs),
    )
