"""Which reference a run compares with, and its values before training.

By default the reference is the policy as it is at the start. With the cache on it is run once over the data before the
first step, and no second model is ever in memory; the values stay on disk for the next run.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from prefopt.data.store import Sizes
from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.logps import TokenLogps
from prefopt.errors import ModelError, RunError
from prefopt.methods.method import Method
from prefopt.models.load import LoadedModel, Precision, load_model
from prefopt.models.policy import EnginePath, Policy
from prefopt.models.proof import prove
from prefopt.models.quantise import quantisation_of
from prefopt.models.reference import (
    AdapterOff,
    CachedReference,
    DataReference,
    FrozenAdapter,
    FrozenCopy,
    Reference,
    data_has_reference,
)
from prefopt.models.reference_cache import CacheContext, ReferenceCache, weights_digest
from prefopt.training.assemble import as_reference, reference_settings
from prefopt.training.cut import cut
from prefopt.training.group.processes import Processes
from prefopt.training.group.sharding import Parallel, shard
from prefopt.training.precompute import precompute
from prefopt.training.settings import RunSettings
from prefopt.training.terminal.narrator import Narrator
from prefopt.trees import PromptTree, TokenIds

SAME_FUNCTION = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Mean difference per token, in nats, above which policy and reference are not the same function at the start. Two
orders of a float32 sum differ by 1e-6, of bf16 products by up to 9e-3; a wrong template, adapter or dropout by 0.1 and more."""

ADAPTER_SHAPE = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""What an adapter computes beside its weights: above all their scale."""

ELSEWHERE = ("_name_or_path", "dtype", "transformers_version", "use_cache", "quantization_config")
"""Entries of a model's config that do not change its function, or stand in the context by themselves."""


def start_reference(policy: Policy, loaded: LoadedModel, *, in_place: bool) -> Reference:
    """The policy as it is now.

    Args:
        policy: before the first step.
        loaded: its model and adapter.
        in_place: it is read before training changes anything, so that no copy is needed.
    """
    if loaded.adapter is not None and loaded.adapter_is_new:
        return AdapterOff(policy, loaded.adapter)
    if in_place:
        return InPlace(policy)
    return FrozenAdapter(policy, loaded.adapter) if loaded.adapter is not None else FrozenCopy.of(policy)


class InPlace:
    """The policy itself, while nothing has changed it."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def logps(self, batch: TreeBatch) -> TokenLogps:
        """The policy's log-probabilities."""
        return self.policy(batch)


def other_reference(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, trees: Sequence[PromptTree], precision: Precision, processes: Processes
) -> tuple[FrozenCopy, LoadedModel, str]:
    """A model that the user names, run the fastest way that is right on it, and the sentence that says which.

    Raises:
        ModelError: it cannot be loaded, or reads other tokens than the policy.
    """
    name = reference_settings(settings).reference
    assert name is not None
    apart = settings.parallel == "fsdp" and processes.count > 1
    where = torch.device("cpu") if apart else processes.device
    loaded = load_model(as_reference(settings, name), precision=precision, device=where, seed=0, frozen=True)
    used = used_ids(trees)
    theirs = loaded.tokenizer.get_vocab()
    if other := sorted(token for token, index in tokenizer.get_vocab().items() if index in used and theirs.get(token) != index):
        raise ModelError(
            f"the reference {name} reads other tokens than {settings.model}: {len(other)} of those in the data have another number "
            f"or none there (such as {', '.join(map(repr, other[:3]))}). Give a reference with the same tokenizer."
        )
    sizes = Sizes.of(trees)
    longest = int((sizes.prompt + sizes.longest).max())
    proof = prove(loaded.model, max_length=longest, autocast=precision.autocast, apart=processes.device if apart else None)
    return FrozenCopy(Policy(loaded.model, proof.path)), loaded, f"reference: {name}; {proof.sentence()}"


def used_ids(trees: Iterable[PromptTree]) -> set[int]:
    """All tokens of the trees."""
    used: set[int] = set()
    several: list[TokenIds] = []
    for number, tree in enumerate(trees):
        several += (tree.prompt_ids, *(completion.ids for completion in tree.completions))
        if number % 1000 == 0:
            used.update(np.unique(np.concatenate(several)).tolist())
            several = []
    return used.union(np.unique(np.concatenate(several)).tolist()) if several else used


def cache_context(
    loaded: LoadedModel, path: EnginePath, precision: Precision, processes: Processes, *, fingerprint: str | None = None
) -> CacheContext:
    """What the reference's values depend on, beside the tokens.

    Args:
        loaded, path, precision, processes: the reference's model, and how it is run.
        fingerprint: digest of all its weights, where that is known already: some seconds for a model of 8e9 parameters.
    """
    model, adapter = loaded.model, loaded.adapter
    weights = dict(model.state_dict())
    shape = model.config.to_dict()
    if adapter is not None and loaded.adapter_is_new:  # it is switched off: what remains is the model that full fine-tuning starts from
        base = {name: tensor for name, tensor in weights.items() if "lora_" not in name and ".modules_to_save." not in name}
        weights = {name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor for name, tensor in base.items()}
        fingerprint = None
    elif adapter is not None:
        config = adapter.active_peft_config
        shape["adapter"] = {name: str(getattr(config, name, None)) for name in ADAPTER_SHAPE}
    for name in ELSEWHERE:
        shape.pop(name, None)
    function = blake2b(json.dumps(shape, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    digest = f"{fingerprint or weights_digest(weights)} {function}"
    compute = f"{precision.autocast or torch.float32} over {precision.weights}"
    return CacheContext(digest, compute, quantisation_of(model), str(path), processes.device.type)


@dataclass(frozen=True, slots=True)
class Choice:
    """The reference of a run, before its first use.

    Attributes:
        reference: gives the values. A second model is whole until `ready`.
        path: how its model is run.
        context: what its values depend on; None: they are not kept.
        fingerprint: digest of the weights of a model of its own; None: it is the run's model as it starts, or there is none.
    """

    reference: Reference
    path: EnginePath
    context: CacheContext | None
    fingerprint: str | None = None

    def ready(
        self,
        trees: Sequence[PromptTree],
        *,
        cache_folder: Path,
        max_tokens: int,
        precision: Precision,
        parallel: Parallel,
        processes: Processes,
        narrator: Narrator,
    ) -> Reference:
        """The reference as the steps use it; by now the policy is shared among the processes.

        Args:
            trees: all that will be asked for, held-out ones included.
            cache_folder: where values are kept.
            max_tokens, precision, parallel, processes, narrator: of the run.
        """
        if isinstance(self.reference, FrozenCopy) and parallel == "fsdp" and processes.count > 1:
            shard(self.reference.policy, processes)
        if self.context is None:
            return self.reference
        return precompute(
            self.reference,
            trees,
            ReferenceCache(cache_folder, self.context),
            path=self.path,
            max_tokens=max_tokens,
            autocast=precision.autocast,
            processes=processes,
            narrator=narrator,
        )

    def live(self, ready: Reference) -> Reference | None:
        """The reference where it can be asked about new texts while the policy trains; None where only the data's values are left.

        Args:
            ready: what `ready` gave.
        """
        if isinstance(self.reference, AdapterOff):  # it is there as long as the policy is, whatever was computed before
            return self.reference
        return None if isinstance(ready, CachedReference | DataReference) else ready


def choose_reference(
    method: Method,
    settings: RunSettings,
    policy: Policy,
    loaded: LoadedModel,
    trees: Sequence[PromptTree],
    *,
    fingerprint: str,
    precision: Precision,
    processes: Processes,
    narrator: Narrator,
) -> Choice | None:
    """The reference of a run; None for a method without. Before the processes share the policy: it may be copied here.

    Args:
        method: whether it needs one.
        settings: whether the user names another model, and whether values are kept.
        policy, loaded: before training.
        trees: all that will be asked for, held-out ones included.
        fingerprint: digest of the policy's weights.
        precision, processes, narrator: of the run.

    Raises:
        DataError: some completions bring reference values and some do not.
        ModelError: as `other_reference`.
        RunError: processes have not the same one.
    """
    if not method.needs.reference:
        return None
    if data_has_reference(trees):
        narrator.say("reference: the sums that come with the data")
        return Choice(DataReference(), policy.path, None)
    keeps = reference_settings(settings).reference_cache
    reference: Reference
    path, reference_model, another = policy.path, loaded, None
    if reference_settings(settings).reference is not None:
        reference, reference_model, sentence = other_reference(settings, loaded.tokenizer, trees, precision, processes)
        path = reference.policy.path
        fingerprint = another = weights_digest(reference_model.model.state_dict())
        processes.agree({"the reference": another})
        narrator.say(sentence)
    else:
        reference = start_reference(policy, loaded, in_place=keeps)
    if not keeps:
        narrator.say(f"reference: {DESCRIPTIONS[type(reference)]}, run in every step")
        return Choice(reference, path, None, another)
    return Choice(reference, path, cache_context(reference_model, path, precision, processes, fingerprint=fingerprint), another)


DESCRIPTIONS: dict[type, str] = {
    AdapterOff: "the model without its new adapter",
    FrozenAdapter: "the model with the adapter that it started from",
    FrozenCopy: "a second model in memory",
}


@torch.no_grad()
def check_start(
    policy: Policy,
    reference: Reference,
    trees: Sequence[PromptTree],
    *,
    is_start: bool,
    max_tokens: int,
    autocast: torch.dtype | None,
    processes: Processes,
    narrator: Narrator,
) -> float:
    """At the start policy and reference are the same function, so every margin is 0 and DPO's loss log 2.

    Looking at one micro-batch of the first step catches dropout, a wrong adapter, and mistakes of template and cache. Where
    the reference is another model, or came with the data, a difference may be meant: it is said, and the run goes on.

    Args:
        policy, reference: before the first step.
        trees: of the first step.
        is_start: the reference should be the policy as it is now.
        max_tokens, autocast, processes, narrator: of the run.

    Returns:
        the mean absolute difference per token, in nats.

    Raises:
        RunError: they should be the same and differ by more than arithmetic noise; says what it can be.
    """
    first = cut(trees, max_tokens=max_tokens, sharing=policy.path.sharing)[0][0]
    batch = pack(first.trees, sharing=policy.path.sharing, device=processes.device)
    with torch.autocast(processes.device.type, dtype=autocast, enabled=autocast is not None):
        own, other = policy(batch), reference.logps(batch)
    per_token = own.values_N - other.values_N if isinstance(other, TokenLogps) else own.mean() - other.mean()
    difference = float(per_token.abs().mean())
    if difference <= SAME_FUNCTION[autocast or torch.float32]:  # NaN is not
        return difference
    where = f"on {first.trees[0].row_id} and its neighbours"
    found = f"before the first step policy and reference differ by {difference:.2g} nats per token {where}"
    if is_start and isinstance(other, TokenLogps):
        raise RunError(
            f"{found}, and they should be the same function (margin 0, loss log 2). Usual causes: a layer that draws random numbers in "
            "training mode, or a model that was changed after its reference values were cached. Try --reference-cache off; if that helps, "
            "delete the cache folder."
        )
    narrator.say(
        f"note: {found}, so the loss does not start at log 2. That is right if the reference is meant to be another model; if it is meant "
        "to be this one, its values come from other weights, another template, other truncation, or another precision."
    )
    return difference
