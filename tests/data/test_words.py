"""Texts put together from the ids of their stretches: always the ids of the whole text, or not at all."""

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.conftest import SENTENCES, byte_bpe, word_level
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefopt.data import encode, words
from prefopt.data.encode import Encoder, ids_of
from prefopt.data.locality import FAR_SIGHTED, words_of
from prefopt.data.pieces import Piece
from prefopt.data.rows import RowFault
from prefopt.data.template import Rendered
from prefopt.data.words import NotLocal, Words

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [*SENTENCES, "I don't know. It's 3.14, isn't it?\n\nHuman: «Да», сказал он: café (naïve).\n\nAssistant: 好的 ok!"] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>" if "<unk>" in backend.get_vocab() else None
    )


def byte_level(
    regex: str | None, *, ignore_merges: bool = False, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_only])
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    )
    return wrap(backend)


def sentencepiece_bpe(normalizer: normalizers.Normalizer | None, splitter: pre_tokenizers.PreTokenizer | None) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: learned from words, bytes where a character is unknown."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<eos>", *BYTES], show_progress=False))

    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = Tokenizer(models.BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None:
        backend.pre_tokenizer = splitter
    return wrap(backend)


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "<eos>"], unk_token="<unk>", show_progress=False)
    )
    return wrap(backend)


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", "<eos>"], show_progress=False))
    return wrap(backend)


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: byte_level(None),
    "qwen": lambda: byte_level(QWEN, normalizer=normalizers.NFC()),
    "llama3": lambda: byte_level(LLAMA3, ignore_merges=True),
    "o200k": lambda: byte_level(O200K),
    "llama2 legacy": lambda: sentencepiece_bpe(LEGACY, None),
    "llama2": lambda: sentencepiece_bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "gemma": lambda: sentencepiece_bpe(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    "unigram": unigram,
    "word piece": word_piece,
}
TOKENIZERS = {name: make() for name, make in KINDS.items()}
PROVED = {name: words_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}

CHARACTERS = st.sampled_from(
    [
        *"aesT019.,;:!?'\"()-_/ é я ß 好 한 ह ",
        " ",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "́",
        "️",
        "😀",
        "\u00a0",
        "\u200b",
        "▁",
        "Ġ",
        "ﬁ",
        "İ",
        "\x1c",
        "\x85",
    ]
)
PHRASES = st.sampled_from(
    ["don't", " the", "capital of", "Human:", "\n\nAssistant:", " 3.14", "<eos>", "<eos> the", " It's", "e.g. ", "café", " Да", "word"]
)
TEXT = st.lists(CHARACTERS | PHRASES | st.characters(codec="utf-8"), max_size=25).map("".join)


def naive(tokenizer: PreTrainedTokenizerFast, example: Rendered, end_id: int) -> object:
    """What must come out, from whole texts alone."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = ids(example.prompt)
    found, merges = [], 0
    for (piece,) in example.branches:
        joint = ids(example.prompt + piece.text)
        merges += joint[: len(prompt)] != prompt
        new = joint[len(prompt) :] if joint[: len(prompt)] == prompt else ids(piece.text)
        while new and new[-1] == end_id:
            new.pop()
        if not new:
            return "blank"
        found.append([*new, end_id])
    return prompt, found, merges


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300)
@given(prompt=TEXT, answers=st.tuples(TEXT, TEXT), as_one=st.booleans())
def test_words_give_the_ids_of_whole_texts(name: str, prompt: str, answers: tuple[str, str], as_one: bool):
    tokenizer = TOKENIZERS[name]
    encoder = Encoder(tokenizer, "<eos>", ())
    proved = PROVED[name]
    assert proved is not None, "so that words are what is tested"
    encoder.words = Words(proved.backend, proved.borders, proved.ends, proved.separator if as_one else "")
    encoder.num_untried_words = 0
    example = Rendered(prompt, False, tuple((Piece(text, ends_turn=True),) for text in answers))
    (seen,) = encoder.by_words([example])
    expected = naive(tokenizer, example, encoder.end_id)
    if isinstance(seen, RowFault):
        assert expected == "blank"
    else:
        assert (seen.prompt.tolist(), [branch.ids.tolist() for branch in seen.branches], seen.merges) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_which_borders_are_proved(name: str):
    found = PROVED[name]
    assert found is not None
    assert found.borders[0] == "space"
    assert found.separator == ("<unk>" if name == "unigram" else "<eos>"), "a unigram model does not name its unknown token"
    assert ("stop" in found.borders) == (name != "unigram"), "a piece of a unigram model may end in a mark"


def spanning() -> PreTrainedTokenizerFast:
    """Its `b c` is one token."""
    vocabulary = {token: index for index, token in enumerate(["<eos>", "a", "b", "c", " ", " c", "b c"])}
    return wrap(Tokenizer(models.BPE(vocabulary, [(" ", "c"), ("b", " c")])))


def changed(**given: object) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(None)
    for name, value in given.items():
        setattr(tokenizer.backend_tokenizer if name != "dropout" else tokenizer.backend_tokenizer.model, name, value)
    return tokenizer


def with_token(**flags: bool) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(None)
    tokenizer.add_tokens(AddedToken("swallow", **flags))
    return tokenizer


def with_words() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(None)
    tokenizer.add_tokens("New York")
    return tokenizer


class Own(PreTrainedTokenizerFast):
    """Does something before its backend does."""

    def _encode_plus(self, text, *args, **options):  # type: ignore[no-untyped-def]
        return super()._encode_plus(text, *args, **options)


class Upper:
    """A part in Python."""

    def normalize(self, text: Any) -> None:
        text.uppercase()


LOOKING_BACK = pre_tokenizers.Split(Regex(r"(?<=Human: \w) ?|\s+"), "isolated")
REFUSED = {
    "a token that spans a border": spanning,
    "an added token that spans a border": with_words,
    "an added token that swallows spaces": lambda: with_token(rstrip=True),
    "an added token that looks at its neighbours": lambda: with_token(single_word=True),
    "a regular expression that looks back": lambda: changed(
        pre_tokenizer=pre_tokenizers.Sequence([LOOKING_BACK, pre_tokenizers.ByteLevel(use_regex=False)])
    ),
    "merges at random": lambda: changed(dropout=0.5),
    "a part in Python": lambda: changed(normalizer=normalizers.Normalizer.custom(Upper())),
    "words split nowhere": lambda: changed(pre_tokenizer=pre_tokenizers.FixedLength(5)),
    "a tokenizer of its own": lambda: Own(tokenizer_object=byte_level(None).backend_tokenizer),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_proved_reads_whole_texts(name: str):
    assert words_of(REFUSED[name]()) is None


@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, O200K, r"\p{N}{1,3}", r"[^\r\n]", r" ?\p{L}+|\s+(?!\S)", r"[一-龥]+", r"\d|[^\^$]"])
def test_usual_expressions_see_near(pattern: str):
    assert FAR_SIGHTED.search(pattern.replace("[^\\^$]", "[^\\^\\$]")) is None


@pytest.mark.parametrize(
    "pattern", [r"(?<=a)b", r"(?<!a)b", r"^a", r"a|^b", r"a$", r"\bword\b", r"(a)\1", r"a(?=.*b)", r"a(?!\s+b)", r"\Ga"]
)
def test_expressions_that_see_far_are_found(pattern: str):
    assert FAR_SIGHTED.search(pattern) is not None


def test_a_text_that_breaks_the_law_after_all_ends_words(monkeypatch: pytest.MonkeyPatch):
    tokenizer = spanning()
    monkeypatch.setattr(encode, "words_of", lambda tokenizer: Words(tokenizer.backend_tokenizer, ("space",)))
    monkeypatch.setattr(encode, "ENOUGH", 1)
    encoder = Encoder(tokenizer, "<eos>", ())
    example = Rendered("a", False, ((Piece("b c", ends_turn=True),),))
    (seen,) = encoder.encode([example])
    assert not isinstance(seen, RowFault)
    assert seen.branches[0].ids.tolist() == tokenizer.convert_tokens_to_ids(["b c", "<eos>"]), "not b and c apart"
    assert encoder.words is None
    assert [ids_of(entry) for entry in encoder.encode([example])] == [ids_of(seen)]
    assert encoder.words is None, "nor is it tried again"


def test_a_stretch_that_changes_what_stands_before_it_is_noticed():
    vocabulary = {token: index for index, token in enumerate(["<eos>", "a", "c", " ", " c", "a c"])}
    tokenizer = wrap(Tokenizer(models.BPE(vocabulary, [(" ", "c"), ("a", " c")])))
    with pytest.raises(NotLocal):
        Words(tokenizer.backend_tokenizer, ("space",)).ids(["a c"])


def test_few_examples_are_not_worth_a_proof_and_many_are():
    example = Rendered("the capital of", False, ((Piece(" France", ends_turn=True),),))
    encoder = Encoder(byte_bpe(), "<eos>", ())
    few = encoder.encode([example] * (encode.ENOUGH - 1))
    assert encoder.words is None
    assert [ids_of(entry) for entry in encoder.encode([example] * encode.ENOUGH)] == [ids_of(few[0])] * encode.ENOUGH
    assert encoder.words is not None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(words, "KEPT", 10)
    found = Words(TOKENIZERS["qwen"].backend_tokenizer, ("space", "stop"))
    long = "x" * (words.LONGEST_KEPT + 1)
    found.ids([f"start word {long} end"])
    found.ids(["one two"])
    assert long not in found.later
    assert "word" in found.later
    for number in range(20):
        found.ids([f"a b{number}"])
    assert len(found.later) <= 11


def test_they_travel_to_another_process_without_what_they_have_learned():
    found = Words(TOKENIZERS["qwen"].backend_tokenizer, ("space", "stop"))
    text = "the capital of France."
    ids = found.ids([text])
    there = pickle.loads(pickle.dumps(found))
    assert (there.borders, there.later) == (found.borders, {})
    assert there.ids([text]) == ids


def test_word_level_tokenizers_may_too():
    tokenizer = word_level(["a", "b"])
    found = words_of(tokenizer)
    assert found is not None
    assert found.ids(["a b x"]) == [tokenizer("a b x", add_special_tokens=False)["input_ids"]]
