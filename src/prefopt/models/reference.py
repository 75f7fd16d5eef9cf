"""The reference policy, behind one face: what the log-probabilities were before training.

    FrozenCopy       a second model in memory
    AdapterOff       the policy with its new adapter switched off: the model before training, at no memory
    FrozenAdapter    the policy with a frozen copy of the adapter that it started from. After LoRA SFT the base alone is
                     not the model that was fine-tuned, so switching the adapter off would be another reference
    MovingReference  one of the two copies, which follows the policy (models/moving.py)
    CachedReference  values computed before training, or by an earlier run
    DataReference    sums that came with the data

Shapes: C completions, B trees, N scored tokens.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from peft import PeftModel
from torch import nn

from prefopt.data.store import Sizes
from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.logps import CompletionLogps, ReferenceLogps, TokenLogps
from prefopt.errors import DataError
from prefopt.models.policy import Policy
from prefopt.models.reference_cache import key_of
from prefopt.models.reference_values import ReferenceValues
from prefopt.trees import PromptTree

START_ADAPTER = "prefopt_start"
"""Name of the frozen copy of the adapter that training began with. It is never saved."""


class Reference(Protocol):
    """Gives the reference's log-probabilities of a batch, without gradients."""

    def logps(self, batch: TreeBatch) -> ReferenceLogps:
        """The reference's log-probabilities of the batch's scored tokens."""


class FrozenCopy:
    """A second model in memory: a copy of the policy as it is now, or any other model.

    Args:
        policy: run as it is; give `Policy(copy.deepcopy(model), path)` for a copy.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy.eval().requires_grad_(False)

    @classmethod
    def of(cls, policy: Policy) -> "FrozenCopy":
        """A copy of the policy as it is at this moment, whatever was done to it in memory."""
        return cls(copy.deepcopy(policy))

    @torch.no_grad()
    def logps(self, batch: TreeBatch) -> TokenLogps:
        """The copy's log-probabilities. Another model may share prompts another way than the policy; tokens stand in the same order."""
        if batch.sharing != self.policy.path.sharing:
            batch = pack(batch.trees, sharing=self.policy.path.sharing, device=batch.input_ids.device)
        return self.policy(batch)


class AdapterOff:
    """The policy without its adapter."""

    def __init__(self, policy: Policy, adapter: PeftModel) -> None:
        self.policy, self.adapter = policy, adapter

    @torch.no_grad()
    def logps(self, batch: TreeBatch) -> TokenLogps:
        """The base model's log-probabilities."""
        with self.adapter.disable_adapter():
            return self.policy(batch)


class FrozenAdapter:
    """The policy with the adapter that it started from."""

    def __init__(self, policy: Policy, adapter: PeftModel) -> None:
        self.policy, self.adapter = policy, adapter
        self.active = adapter.active_adapter
        with torch.random.fork_rng(devices=[]):  # its weights are drawn, and then replaced
            adapter.add_adapter(START_ADAPTER, copy.deepcopy(adapter.peft_config[self.active]))
        with torch.no_grad():
            for _, own, of_policy in self.pairs():
                own.copy_(of_policy)
        self._activate(self.active)

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Name, weight of the frozen adapter and of the policy's, for every weight of an adapter."""
        named = dict(self.adapter.named_parameters())
        for name, parameter in named.items():
            if _belongs(name, START_ADAPTER):
                of_policy = ".".join(self.active if part == START_ADAPTER else part for part in name.split("."))
                yield of_policy, parameter, named[of_policy]

    @torch.no_grad()
    def logps(self, batch: TreeBatch) -> TokenLogps:
        """The log-probabilities at the start of training."""
        with self._at_start():
            return self.policy(batch)

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        self._activate(START_ADAPTER)
        try:
            yield
        finally:
            self._activate(self.active)

    def _activate(self, name: str) -> None:
        self.adapter.set_adapter(name)
        for parameter_name, parameter in self.adapter.named_parameters():
            if _belongs(parameter_name, START_ADAPTER):
                parameter.requires_grad_(False)
            elif _belongs(parameter_name, self.active):
                parameter.requires_grad_(True)


def _belongs(parameter_name: str, adapter: str) -> bool:
    """Whether a parameter is that adapter's: `….lora_A.default.weight`, on embeddings `….lora_embedding_A.default`."""
    return adapter in parameter_name.split(".")


class CachedReference:
    """Values per token that were computed before.

    Args:
        values: by `key_of`, float32 [tokens scored].
    """

    def __init__(self, values: ReferenceValues | Mapping[bytes, npt.NDArray[np.float32]]) -> None:
        self.values = values if isinstance(values, ReferenceValues) else ReferenceValues(values=values)

    def digest(self) -> str:
        """Tells whether the values are the same to the last bit; the order in which they were computed makes them differ there."""
        digest = xxhash.xxh3_64()
        for key, value in self.values.in_order():
            digest.update(key)
            digest.update(value.tobytes())
        return digest.hexdigest()

    def sample(self, keys: Iterable[str] | None = None, *, num: int = 64) -> dict[str, float]:
        """Mean values per token, in nats, of some texts by their key: what tells rounding from another function.

        Args:
            keys: of the texts, as this gave them before; those that are not there are left out. None: some of all.
            num: how many, where no keys are given.
        """
        if keys is None:
            all_keys = self.values.keys()
            wanted = [all_keys[place] for place in range(0, len(all_keys), max(1, -(-len(all_keys) // num)))]
        else:
            wanted = list(map(bytes.fromhex, keys))
        found = self.values.get(wanted)
        return {key.hex(): float(found[key].mean(dtype=np.float64)) for key in wanted if key in found and len(found[key])}

    def logps(self, batch: TreeBatch) -> TokenLogps:
        """The values of the batch's completions and scored prompts.

        Raises:
            DataError: a completion was never computed.
        """
        keys = [key for tree in batch.trees for key in completion_keys(tree)]
        keys += [key for tree in batch.trees if (key := prompt_key(tree)) is not None]
        found = self.values.get(keys)
        try:
            parts = [found[key] for key in keys]
        except KeyError:
            raise DataError(
                "the reference was not computed for an example of this batch: the data, or the cache, changed while the run was going on"
            ) from None
        values_N = torch.from_numpy(np.concatenate(parts)).to(batch.input_ids.device, non_blocking=True)
        return TokenLogps(values_N, batch.lengths_C, batch.prompt_lengths_B, batch.num_completion_tokens)


class DataReference:
    """Sums that came with the data, one per completion."""

    def logps(self, batch: TreeBatch) -> CompletionLogps:
        """The data's sums."""
        sums = [completion.reference_logp for completion in batch.completions]
        return CompletionLogps(torch.tensor(sums, dtype=torch.float32, device=batch.input_ids.device), batch.lengths_C)


def data_has_reference(trees: Sequence[PromptTree]) -> bool:
    """Whether every completion brings its reference's sum.

    Raises:
        DataError: some do and some do not.
    """
    sizes = Sizes.of(trees)
    given, num = int(sizes.references.sum()), int(sizes.branches.sum())
    if 0 < given < num:
        raise DataError(
            f"{given} of {num} completions bring a reference log-probability. Give it for all of them, or for none "
            "(columns reference_chosen_logp and reference_rejected_logp)."
        )
    return given > 0


def completion_keys(tree: PromptTree) -> list[bytes]:
    """Keys of a tree's completions, in order."""
    return [key_of(tree.prompt_ids, completion.ids, completion.scored) for completion in tree.completions]


def prompt_key(tree: PromptTree) -> bytes | None:
    """Key of a prompt's own scored tokens; None where none is scored."""
    return (
        None
        if tree.prompt_scored is None or not tree.prompt_scored.any()
        else key_of(tree.prompt_ids, tree.prompt_ids[:0], tree.prompt_scored)
    )


def split_by_key(batch: TreeBatch, logps: TokenLogps) -> dict[bytes, npt.NDArray[np.float32]]:
    """A batch's values as the cache holds them."""
    values = logps.values_N.detach().float().cpu().numpy()
    lengths = [*logps.lengths_C.tolist(), *(length for length in logps.prompt_lengths_B.tolist() if length)]
    keys = [key for tree in batch.trees for key in completion_keys(tree)]
    keys += [key for tree in batch.trees if (key := prompt_key(tree)) is not None]
    edges = np.cumsum([0, *lengths])
    return {key: values[edges[index] : edges[index + 1]].copy() for index, key in enumerate(keys)}
