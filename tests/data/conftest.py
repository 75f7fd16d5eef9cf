"""Tokenizers and files that the tests of this room make for themselves."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prefopt.data.settings import ConversationSettings, DataSettings

SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Human: Assistant: system user assistant",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "good bad better worse yes no red blue green long short",
]

Write = Callable[..., Path]


def byte_bpe(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))])
    special = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", additional_special_tokens=special)


def word_level(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word, none for anything else."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", *SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", additional_special_tokens=special
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe(adds_bos=True)


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    made = byte_bpe()
    made.chat_template = CHATML
    return made


class EverySetting(DataSettings, ConversationSettings):
    """What a run on demonstrations can be told about its data."""


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., DataSettings]:
    """Settings whose cache belongs to the test."""

    def make(**given: Any) -> DataSettings:
        return EverySetting(**{"data": ["-"], "cache_dir": tmp_path / "cache", **given})

    return make


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows as JSON lines (text and bytes as they are), packed where the name says so."""

    def to_file(name: str, rows: Iterable[Any]) -> Path:
        lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
        content = b"".join(line + b"\n" for line in lines)
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return to_file
