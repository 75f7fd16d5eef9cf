"""The reference's values before training: from the cache where they are, computed by all processes where they are not."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from prefopt.engine.batch import pack
from prefopt.engine.logps import TokenLogps
from prefopt.models.policy import EnginePath
from prefopt.models.reference import CachedReference, Reference, completion_keys, prompt_key, split_by_key
from prefopt.models.reference_cache import ReferenceCache
from prefopt.models.reference_values import ReferenceValues
from prefopt.training.cut import MicroBatch, cut
from prefopt.training.group.processes import Processes
from prefopt.training.terminal.narrator import Narrator
from prefopt.trees import PromptTree

PORTION = 20_000
"""Examples whose values are computed at a time: enough to pack them by length, and few enough to be held in memory."""

SENT_AT_ONCE = 2**24
"""Values that one process sends another at a time: 64 MiB."""

Values = dict[bytes, npt.NDArray[np.float32]]


def precompute(
    reference: Reference,
    trees: Sequence[PromptTree],
    cache: ReferenceCache,
    *,
    path: EnginePath,
    max_tokens: int,
    autocast: torch.dtype | None,
    processes: Processes,
    narrator: Narrator,
) -> CachedReference:
    """The reference's values of all trees.

    What the main process lacks is computed, by all processes in as many passes each (a model that is cut runs on all or on
    none), and everything is sent to those who lack it. So they need not see the same cache, nor see it at the same moment.

    Args:
        reference: computes.
        trees: all that will be asked for.
        cache: gives what it has, and keeps what is computed.
        path: how the reference's model is run.
        max_tokens, autocast, processes, narrator: of the run.
    """
    values = ReferenceValues(cache)
    num_parts = -(-len(trees) // PORTION)
    for number in range(num_parts):
        places = range(number * PORTION, min((number + 1) * PORTION, len(trees)))
        part = Portion(reference, [trees[place] for place in places], cache, path, max_tokens, autocast, processes, narrator)
        found = part.compute(f"reference, part {number + 1} of {num_parts}" if num_parts > 1 else "reference")
        if num_parts > 1:
            processes.wait()  # whoever leaves values to the cache must find them there
        values.add(found)
    return CachedReference(values)


@dataclass(frozen=True, slots=True)
class Portion:
    """Some of the trees: as many as are held in memory at a time; the rest is as in `precompute`."""

    reference: Reference
    trees: Sequence[PromptTree]
    cache: ReferenceCache
    path: EnginePath
    max_tokens: int
    autocast: torch.dtype | None
    processes: Processes
    narrator: Narrator

    def compute(self, name: str) -> Values:
        """Their values.

        Args:
            name: what is shown while they are computed.
        """
        trees, cache, processes = self.trees, self.cache, self.processes
        lengths = {key: length for tree in trees for key, length in value_lengths(tree).items()}
        values = cache.get(lengths)
        self.narrator.say(
            f"{name}: {len(values)} of {len(lengths)} values come from the cache {cache.path}"
            if values
            else f"{name}: computed before training, and kept"
        )
        missing = [trees[place] for place in processes.share(lacking(trees, values))]
        to_come = {key for tree in missing for key in value_lengths(tree)}
        hand_out({key: length for key, length in lengths.items() if key not in to_come}, values, processes)
        if missing:
            plan = cut(missing, max_tokens=self.max_tokens, sharing=self.path.sharing, num_processes=processes.count)
            self._run(plan[processes.rank], values, name)
            exchange(plan, values, processes)
        if processes.count > 1 and processes.local_rank == 0:  # for the next run on this machine
            there = cache.get(lengths)
            cache.put({key: values[key] for key in lengths if key not in there})
        return values

    def _run(self, mine: Sequence[MicroBatch], values: Values, name: str) -> None:
        device = self.processes.device
        with self.narrator.progress(name, len(mine)) as ticker:
            for done, micro_batch in enumerate(mine, 1):
                batch = pack(micro_batch.trees, sharing=self.path.sharing, device=device)
                with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
                    logps = self.reference.logps(batch)
                assert isinstance(logps, TokenLogps)
                # What is there stays: an answer beside others is not summed up in the same order, and one more method, or one more
                # answer to a prompt, is not to change the last digits of runs that were done before.
                fresh = {key: value for key, value in split_by_key(batch, logps).items() if key not in values}
                values.update(fresh)
                self.cache.put(fresh)
                ticker.step(done, {})


def lacking(trees: Sequence[PromptTree], values: Container[bytes]) -> list[int]:
    """Places of trees that together hold all values that are not there; one that adds nothing to those before it is left out."""
    found: list[int] = []
    claimed: set[bytes] = set()
    for place, tree in enumerate(trees):
        keys = value_lengths(tree)
        if any(key not in values and key not in claimed for key in keys):
            found.append(place)
            claimed.update(keys)
    return found


def value_lengths(tree: PromptTree) -> dict[bytes, int]:
    """Keys of all values of a tree, and how many tokens each covers."""
    lengths = {key: completion.num_scored for key, completion in zip(completion_keys(tree), tree.completions, strict=True)}
    if tree.prompt_scored is not None and (key := prompt_key(tree)) is not None:
        lengths[key] = int(tree.prompt_scored.sum())
    return lengths


def hand_out(lengths: Mapping[bytes, int], values: Values, processes: Processes) -> None:
    """The main process has these values; what another one lacks of them all are sent."""
    if processes.count == 1 or not lengths:
        return
    lacked = torch.tensor([key not in values for key in lengths], dtype=torch.float32, device=processes.device)
    wanted = [key for key, is_lacked in zip(lengths, processes.add_up(lacked).tolist(), strict=True) if is_lacked]
    send({key: lengths[key] for key in wanted}, values, processes, source=0)


def exchange(plan: Sequence[Sequence[MicroBatch]], values: Values, processes: Processes) -> None:
    """Each process sends the others the values of its share of the plan."""
    for rank in range(processes.count if processes.count > 1 else 0):
        trees = [tree for micro_batch in plan[rank] if micro_batch.counts for tree in micro_batch.trees]
        send({key: length for tree in trees for key, length in value_lengths(tree).items()}, values, processes, source=rank)


def send(lengths: Mapping[bytes, int], values: Values, processes: Processes, *, source: int) -> None:
    """One process's values to all, some megabytes at a time."""
    for part in portions(lengths):
        ends = np.cumsum([lengths[key] for key in part])
        flat = np.concatenate([values[key] for key in part]) if processes.rank == source else np.empty(ends[-1], dtype=np.float32)
        sent = processes.send(torch.from_numpy(flat), source).cpu().numpy()
        if processes.rank != source:
            values.update((key, sent[end - lengths[key] : end].copy()) for key, end in zip(part, ends.tolist(), strict=True))


def portions(lengths: Mapping[bytes, int]) -> Iterable[list[bytes]]:
    """The keys in parts of at most `SENT_AT_ONCE` values, or of one key."""
    part: list[bytes] = []
    size = 0
    for key, length in lengths.items():
        if part and size + length > SENT_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(key)
        size += length
    if part:
        yield part
