"""Near copies among texts, found without comparing each with each (MinHash: Broder 1997; bands: Indyk and Motwani 1998).

A text is the set of its runs of five words, or of characters where it has no spaces. The share of runs that two texts have in common,
Jaccard's index, is the chance that the smallest of all hashed runs is the same in both; `NUM_HASHES` such draws, in bands, say which
texts to compare, and those are compared in full.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from xxhash import xxh64_intdigest

NEAR = 0.8
"""Share of common runs from which on two texts are near copies: two of 50 words that differ in one word have 41 of 51 in common."""

WORDS, CHARACTERS = 5, 8
"""Length of a run, in words or in characters."""

NUM_HASHES, ROWS = 64, 4
"""Draws, and how many make a band: a pair at 0.8 agrees in one of the 16 bands with probability 0.9998, one at 0.3 with 0.12."""

UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Thai, Lao, Burmese, Khmer, Kana and Han: scripts that put no spaces between words."""

LONGEST = 4000
"""Runs of a text that are looked at; of a longer one, as many spread over it evenly."""

Runs = npt.NDArray[np.uint64]


def runs_of(text: str) -> Runs:
    """The text's runs as sorted hashes, each once; a text shorter than a run is one run."""
    words = re.findall(r"\w+", text.lower())
    plain = "".join(words)
    if 2 * len(UNSPACED.findall(plain)) > len(plain):
        runs = [plain[place : place + CHARACTERS] for place in range(max(1, len(plain) - CHARACTERS + 1))]
    else:
        runs = [" ".join(words[place : place + WORDS]) for place in range(max(1, len(words) - WORDS + 1))]
    if len(runs) > LONGEST:
        runs = runs[:: -(-len(runs) // LONGEST)]
    return np.unique(np.array([xxh64_intdigest(run.encode(errors="surrogatepass")) for run in runs], dtype=np.uint64))


def likeness(one: Runs, other: Runs) -> float:
    """The share of runs that are in both, in [0, 1]."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def clusters(texts: Sequence[str], *, near: float = NEAR) -> list[int]:
    """For each text the place of the first of its cluster; texts are in one cluster where near copies lead from one to the other.

    Args:
        texts: any number; time grows with it, not with its square.
        near: likeness from which on two are near copies.
    """
    runs = [runs_of(text) for text in texts]
    parent = list(range(len(texts)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for one, other in _candidates(runs):
        first, second = sorted((root(one), root(other)))
        if first != second and likeness(runs[one], runs[other]) >= near:
            parent[second] = first
    return [root(place) for place in range(len(texts))]


def _candidates(runs: Sequence[Runs]) -> Iterator[tuple[int, int]]:
    """Pairs of places that agree in a band. In a band of many each is compared with the one before and with the first."""
    if not runs:
        return
    rng = np.random.default_rng(0)
    factor_H = rng.integers(1, 2**63, NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    added_H = rng.integers(0, 2**63, NUM_HASHES, dtype=np.uint64)
    # Products wrap around at 2^64, which is the modulus; the upper half of the bits is well mixed.
    smallest_TH = np.stack([((own[:, None] * factor_H + added_H) >> np.uint64(32)).min(0) for own in runs])
    for band in range(0, NUM_HASHES, ROWS):
        keys = [row.tobytes() for row in smallest_TH[:, band : band + ROWS]]
        found: dict[bytes, list[int]] = {}
        for place, key in enumerate(keys):
            found.setdefault(key, []).append(place)
        for places in found.values():
            yield from pairwise(places)
            yield from ((places[0], place) for place in places[2:])
