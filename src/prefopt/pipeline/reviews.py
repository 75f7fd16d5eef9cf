"""Short film reviews whose sentiment is known exactly.

The controlled experiment of the DPO paper (2305.18290, section 6.1) needs texts of both sentiments and
a reward that is known. Its reviews are IMDb's and its reward a classifier; ours come from a small
grammar, and the reward counts the grammar's own words of praise and blame:

    true_reward(text) = σ(#praise − #blame)

A review is a neutral opening, the prompt, and a completion:

    The film about a sailor | is moving. The music is superb, but the plot is thin. I laughed a lot.

Each review has a tone: favourable, unfavourable or undecided. Clauses mostly follow it, so that the
mean reward over all reviews is one half by symmetry.
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Polarity = Literal["praise", "blame", "neutral"]

KINDS = ("film", "movie", "drama", "comedy", "thriller", "picture")
SUBJECTS = (
    "a sailor", "two sisters", "a retired spy", "a young cook", "a village doctor", "an old clockmaker", "a lost dog",
    "three friends", "a night train", "a piano teacher", "a mountain guide", "a family of bakers", "a stubborn king",
    "a boxer", "an island", "a lighthouse keeper", "a school choir", "a bank robbery", "a lonely robot", "the first radio",
    "a chess player", "a widow", "a circus", "a small newspaper", "a jazz band", "a border town", "a wedding",
    "a missing painting", "the last ferry", "a beekeeper", "a taxi driver", "a court case",
)  # fmt: skip
PLACES = (
    "", " in Lisbon", " in the north", " by the sea", " in wartime", " in winter", " in a big city", " on the river", " in the desert",
)  # fmt: skip

ASPECTS = (
    "acting", "plot", "music", "camera work", "dialogue", "pacing", "ending", "opening scene", "lead actor", "lead actress",
    "editing", "lighting", "supporting cast", "sound", "set design", "script",
)  # fmt: skip

PRAISE = (
    "superb", "moving", "brilliant", "charming", "gripping", "elegant", "wonderful", "clever", "touching", "excellent",
    "delightful", "memorable", "fresh", "stunning", "graceful", "perfect",
)  # fmt: skip
BLAME = (
    "dull", "clumsy", "tedious", "lifeless", "thin", "awful", "confused", "shallow", "noisy", "predictable",
    "dreary", "wooden", "bland", "tiresome", "hollow", "dreadful",
)  # fmt: skip
NEUTRAL = (
    "slow", "loud", "simple", "familiar", "dark", "plain", "unusual", "brief", "quiet", "long",
    "traditional", "modern", "strange", "serious", "restrained", "busy",
)  # fmt: skip

REMARKS: dict[Polarity, tuple[str, ...]] = {
    "praise": (
        "I loved every minute", "I laughed a lot", "I would gladly see it again", "It deserves a prize", "The audience cheered",
        "I recommend it",
    ),
    "blame": (
        "I was bored", "I left early", "I want my money back", "It wastes a good idea", "The audience yawned",
        "I regret going",
    ),
    "neutral": (
        "I saw it on a Monday", "It runs for two hours", "It is based on a book", "It was made in a year", "The room was half full",
        "It has four songs",
    ),
}  # fmt: skip
REMARK_EVIDENCE: dict[Polarity, tuple[str, ...]] = {
    "praise": ("loved", "laughed", "gladly", "deserves", "cheered", "recommend"),
    "blame": ("bored", "left early", "money back", "wastes", "yawned", "regret"),
}
"""The words by which a remark is recognised, one each."""

WORDS: dict[Polarity, tuple[str, ...]] = {"praise": PRAISE, "blame": BLAME, "neutral": NEUTRAL}

TONES: tuple[dict[Polarity, float], ...] = (
    {"praise": 0.70, "blame": 0.12, "neutral": 0.18},
    {"praise": 0.12, "blame": 0.70, "neutral": 0.18},
    {"praise": 0.30, "blame": 0.30, "neutral": 0.40},
)
"""How often a clause praises, blames or does neither, in a favourable, unfavourable and undecided review; equally often each."""

SENTENCES = (2, 5)
"""Fewest and most sentences after the first."""


@dataclass(frozen=True, slots=True)
class Review:
    """One review; its text is the two parts one after the other.

    Attributes:
        prompt: the neutral opening, without a space at its end.
        completion: the rest, beginning with a space.
    """

    prompt: str
    completion: str


def true_reward(text: str) -> float:
    """How favourable a text is, between 0 and 1: σ(#praise − #blame), and 0.5 where neither is found."""
    return 1 / (1 + math.exp(count(text, "blame") - count(text, "praise")))


def count(text: str, polarity: Literal["praise", "blame"]) -> int:
    """How many pieces of praise or blame a text holds; whole words, whatever their case."""
    return len(re.findall(EVIDENCE[polarity], text.lower()))


def pattern_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """Matches each of the phrases as whole words."""
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b")


EVIDENCE = {polarity: pattern_of(WORDS[polarity] + REMARK_EVIDENCE[polarity]) for polarity in ("praise", "blame")}


def prompts() -> list[str]:
    """Every neutral opening, each once, in a fixed order."""
    return [f"The {kind} about {subject}{place}" for kind in KINDS for subject in SUBJECTS for place in PLACES]


def write_reviews(openings: Sequence[str], *, seed: int) -> list[Review]:
    """One review per opening; the same openings and seed give the same reviews."""
    draw = random.Random(seed)
    return [Review(opening, write_completion(draw)) for opening in openings]


def write_completion(draw: random.Random) -> str:
    """The rest of a review after its opening, in a tone drawn at random."""
    tone = draw.choice(TONES)
    first = f" is {draw.choice(WORDS[polarity_of(tone, draw)])}."
    return first + "".join(f" {write_sentence(tone, draw)}." for _ in range(draw.randint(*SENTENCES)))


def write_sentence(tone: dict[Polarity, float], draw: random.Random) -> str:
    """A remark, or one or two aspects with a verdict on each."""
    shape = draw.random()
    first = polarity_of(tone, draw)
    if shape < 0.3:
        return draw.choice(REMARKS[first])
    aspect = draw.choice(ASPECTS)
    clause = f"The {aspect} is {draw.choice(WORDS[first])}"
    if shape < 0.65:
        return clause
    second = polarity_of(tone, draw)
    other = draw.choice([name for name in ASPECTS if name != aspect])
    link = ", but" if {first, second} == {"praise", "blame"} else " and"
    return f"{clause}{link} the {other} is {draw.choice(WORDS[second])}"


def polarity_of(tone: dict[Polarity, float], draw: random.Random) -> Polarity:
    """Whether a clause praises, blames or does neither."""
    return draw.choices(list(tone), weights=list(tone.values()))[0]
