"""The proof that a tokenizer may encode the stretches of a text one by one; see `prefopt.data.words` for the law.

No list of good names decides. First, what the tokenizer is made of: parts that can see far (a regular expression that looks
back, an added token that swallows spaces, merges drawn at random) and parts that nobody here knows are refused; and where
texts reach the model unsplit, no token of the vocabulary may span a border: then no merge ever does. Second, the law is tried
out on some thousand texts made of all kinds of characters around a border. What fails reads whole texts.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefopt.data.words import ANCHOR, LETTERS, MARKS, Border, NotLocal, Words

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

CROSSING: dict[Border, str] = {"space": r"[^\s▁ĠĊ][ ▁Ġ]", "stop": rf"[^\s▁ĠĊ!-@\[-`{{-~][{MARKS}\nĊ]"}
"""What spans a border, as vocabularies write it: spaces as ▁ or Ġ, line breaks as Ċ too."""

NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled"})
NORMALIZERS_AT_ENDS = frozenset({"Prepend", "Strip"})
"""They touch the first and last characters of a text: a first stretch has that first one, and a border's neighbours are no spaces."""

SPLITTERS = frozenset(
    {"ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Metaspace", "BertPreTokenizer", "CharDelimiterSplit"}
)

FAR_SIGHTED = re.compile(r"\(\?<|\(\?>|\(\?R|\(\?[a-z]*m|\(\?[=!][^)]*[*+{.]|\\[bBAGKZz<>k0-9]|(?<![\[\\])\^|(?<!\\)\$")
"""What makes a regular expression look behind a match, far ahead, or to where the text begins or ends."""

NUM_TRIED = 500
PLAIN = ("a", "s", "T", "é", "1", "'", ".", ",", "(", "-", "好", " ", "\n")
PIECES = (
    "a",
    "s",
    "T",
    "é",
    "я",
    "1",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'",
    ".",
    ",",
    "(",
    "-",
    "_",
    "▁",
    "Ġ",
    "好",
    "ह",
    "́",
    "😀",
    "\u00a0",
    "ﬁ",
)
"""Characters of all kinds, to make texts of."""


def words_of(tokenizer: "PreTrainedTokenizerBase") -> Words | None:
    """How to encode by stretches, the finest way that is proved; None where there is none.

    Args:
        tokenizer: fast or slow. A fast one has been called before, so that its backend neither pads nor truncates.
    """
    if not is_stock(tokenizer):
        return None
    backend = tokenizer.backend_tokenizer
    # Behind an added token a text begins anew, which some tokenizers treat in a way of its own.
    ends = "".join(sorted({token.content[-1] for token in backend.get_added_tokens_decoder().values() if token.content}))
    if ANCHOR in ends:
        return None
    finest: tuple[Border, ...] = ("space", "stop")
    for borders in (finest, finest[:1]):
        words = Words(backend, borders, ends, separator_of(backend))
        if sees_near(backend, borders) and keeps_law(words):
            return words
    return None


def separator_of(backend: "Tokenizer") -> str:
    """An added token that stands for itself wherever it stands; empty where there is none."""
    for token in backend.get_added_tokens_decoder().values():
        plain = (
            token.special
            and token.content != getattr(backend.model, "unk_token", None)
            and not (token.single_word or token.lstrip or token.rstrip or token.normalized)
        )
        if plain and backend.encode(token.content, add_special_tokens=False).ids == [backend.token_to_id(token.content)]:
            return str(token.content)
    return ""


def is_stock(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether calling the tokenizer comes to calling its backend, and nothing else."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, ...)
        for name in ("__call__", "_encode_plus", "backend_tokenizer")
    )


def sees_near(backend: "Tokenizer", borders: Sequence[Border]) -> bool:
    """Whether it is made of nothing that could see beyond such a border, or span it."""
    for token in backend.get_added_tokens_decoder().values():
        if token.single_word or token.rstrip or spans(token.content, borders):
            return False
    try:
        parts = [json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    except Exception:  # a part in Python cannot be written out
        return False
    return all(is_local(part) for whole in parts for part in parts_of(whole)) and model_is_local(backend, borders)


def parts_of(whole: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of a normalizer or splitter, its sequences unfolded."""
    if whole["type"] != "Sequence":
        yield whole
    for part in (*whole.get("normalizers", ()), *whole.get("pretokenizers", ())):
        yield from parts_of(part)


def is_local(part: Mapping[str, Any]) -> bool:
    """Whether a normalizer or splitter does to a stretch what it does to it within a text."""
    if part["type"] in ("Split", "Replace"):
        pattern = part["pattern"]
        far = FAR_SIGHTED.search(pattern["Regex"]) if "Regex" in pattern else re.search(f"[{LETTERS}]", pattern["String"])
        return far is None
    return part["type"] in NORMALIZERS | NORMALIZERS_AT_ENDS | SPLITTERS


def model_is_local(backend: "Tokenizer", borders: Sequence[Border]) -> bool:
    """Whether the model never sees both sides of a border at once, or can join nothing across it."""
    from tokenizers import models

    model = backend.model
    if getattr(model, "dropout", None) or getattr(model, "nbest_size", None) or getattr(model, "alpha", None):
        return False
    if splits_at(backend, borders):
        return isinstance(model, models.BPE | models.Unigram | models.WordPiece | models.WordLevel)
    if not isinstance(model, models.BPE) or model.ignore_merges or (model.fuse_unk and not model.byte_fallback):
        return False
    if model.end_of_word_suffix or model.continuing_subword_prefix:
        return False
    return not spans("\t".join(backend.get_vocab(with_added_tokens=False)), borders)  # a tab on either side is nothing that spans


def splits_at(backend: "Tokenizer", borders: Sequence[Border]) -> bool:
    """Whether texts are split at such borders before the model sees them; tried out."""
    splitter = backend.pre_tokenizer
    if splitter is None:
        return False
    for left, right in around(borders, 100, PLAIN):
        text = left + right if backend.normalizer is None else backend.normalizer.normalize_str(left + right)
        if any(spans(piece, borders) for piece, _ in splitter.pre_tokenize_str(text)):
            return False
    return True


def spans(text: str, borders: Sequence[Border]) -> bool:
    """Whether a token of such a text would span a border."""
    return any(re.search(CROSSING[border], text) for border in borders)


def keeps_law(words: Words) -> bool:
    """Whether the law holds on texts of all kinds."""
    added = sorted(token.content for token in words.backend.get_added_tokens_decoder().values())
    tried = around(words.borders, NUM_TRIED, (*PIECES, *added[:4]))
    whole = [entry.ids for entry in words.backend.encode_batch_fast([left + right for left, right in tried], add_special_tokens=False)]
    try:
        return words.ids([left + right for left, right in tried]) == whole
    except NotLocal:
        return False


def around(borders: Sequence[Border], number: int, pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Texts of such pieces in two parts, with a border between them; the same ones every time."""
    rng = random.Random(0)

    def some(most: int) -> str:
        return "".join(rng.choices(pieces, k=rng.randint(0, most)))

    made = []
    for turn in range(number):
        if borders[turn % len(borders)] == "space":
            left, right = rng.choice("asTéя1'.,(-_"), " " + rng.choice("asTéя1'(-_")
        else:
            left, right = rng.choice("asTéя"), rng.choice(MARKS + "\n")
        made.append((some(4) + left, right + some(4)))
    return made
