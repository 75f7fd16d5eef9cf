"""Reference values in memory and left to their cache are the same values."""

from pathlib import Path

import numpy as np
import pytest

from prefopt.models import reference_values
from prefopt.models.reference import CachedReference
from prefopt.models.reference_cache import CacheContext, ReferenceCache
from prefopt.models.reference_values import ReferenceValues

CONTEXT = CacheContext("weights", "float32", "", "flat", "cpu")
VALUES = {
    (bytes([number % 251]) * 14 + (number * 256).to_bytes(2, "little")): np.arange(number % 5 + 1, dtype=np.float32) - number
    for number in range(100)
}
"""Some keys end in zeros, which numpy would leave out."""


def parts() -> list[dict[bytes, np.ndarray]]:
    names = list(VALUES)
    return [{key: VALUES[key] for key in names[start : start + 40]} for start in range(0, 100, 30)]  # some come twice


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReferenceValues:
    """Values that are too many for memory, from the second part on."""
    monkeypatch.setattr(reference_values, "HELD", 45 * 320)
    monkeypatch.setattr(reference_values, "AT_ONCE", 7)
    cache = ReferenceCache(tmp_path, CONTEXT)
    values = ReferenceValues(cache)
    for number, part in enumerate(parts()):
        cache.put(part)
        values.add(part)
        assert values.are_held == (number == 0)
    return values


def test_they_are_the_same_either_way(left: ReferenceValues):
    held = CachedReference(VALUES)
    assert not left.are_held
    assert held.values.are_held
    assert list(left.keys()) == list(held.values.keys()) == sorted(VALUES)
    assert CachedReference(left).digest() == held.digest()
    sample = held.sample(num=10)
    assert CachedReference(left).sample(num=10) == sample
    assert CachedReference(left).sample([*sample, "00" * 16]) == sample
    found = left.get([*list(VALUES)[:50], b"?" * 16])
    assert {key: value.tolist() for key, value in found.items()} == {key: VALUES[key].tolist() for key in list(VALUES)[:50]}


def test_what_the_cache_lacks_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference_values, "HELD", 1000)
    values = ReferenceValues(ReferenceCache(tmp_path, CONTEXT))
    values.add(VALUES)
    assert values.are_held
    assert len(values.get([])) == len(VALUES)
