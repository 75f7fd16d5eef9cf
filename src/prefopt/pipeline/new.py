"""A small model and tokenizer made from nothing but text.

For testing a pipeline, for a class room, for the quickstart: the result is an ordinary folder that
`transformers` loads. The tokenizer is a byte-level BPE, so every text can be written and read back;
the weights are random, the embeddings tied to the head.

A text begins with `<|begin|>`. Turns of a conversation are written in the ChatML manner,

    <|begin|><|turn|>user\\nHow are you?<|end|>\\n<|turn|>assistant\\nFine.<|end|>\\n

where `<|end|>` ends a turn and a text alike: it is the one token at which generation stops.
"""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from prefopt.disk import draft_of, replace_folder
from prefopt.errors import DataError, RunError
from prefopt.pipeline.new_settings import NUM_SPECIAL_TOKENS, NewSettings

BEGIN, TURN, END, PAD = "<|begin|>", "<|turn|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BEGIN, TURN, END, PAD)
assert len(SPECIAL_TOKENS) == NUM_SPECIAL_TOKENS

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|turn|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
INITIAL_STD = 0.02
"""Standard deviation of the random weights; what these families use at small widths."""

Say = Callable[[str], None]


def new_model(settings: NewSettings, *, say: Say = print) -> Path:
    """Train a tokenizer on the text, make a model with random weights, and save both.

    The same settings and text give the same folder, byte for byte.

    Args:
        settings: what to make.
        say: takes a line about what was made.

    Returns:
        The folder, which `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        DataError: a file is missing, is not UTF-8 or JSON, or there is no text in any.
        RunError: `out` holds a model and `overwrite` is off, or holds something else, or cannot be written.
    """
    check_out(settings)
    tokenizer = train_tokenizer(read_texts(settings.text), vocabulary=settings.vocabulary, context=settings.context)
    model = random_model(settings, tokenizer)
    try:
        save(model, tokenizer, settings.out)
    except OSError as error:
        raise RunError(f"cannot write the model to {settings.out}: {error}. Make room, or give another folder as `out`.") from None
    shortfall = "" if len(tokenizer) == settings.vocabulary else f" (of {settings.vocabulary:,} asked: the text has no more pairs to merge)"
    say(f"{settings.out}: {settings.architecture}, {model.num_parameters():,} parameters, {len(tokenizer):,} tokens{shortfall}")
    return settings.out


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write both; the folder appears whole or not at all, in place of what it held."""
    draft = draft_of(out)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    with no_progress_bars():
        model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    replace_folder(draft, out)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers without its bars, which for small models are noise; they are as before afterwards."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def check_out(settings: NewSettings) -> None:
    """Whether the folder can be written, before any work is done.

    Raises:
        RunError: it exists and is not empty, and is not a model that may be overwritten; or it has no name that can be given to a folder.
    """
    out = settings.out
    if not out.name:
        raise RunError(f"{out} is no folder that can be replaced by another. Give the name of a folder as `out`.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file():
        raise RunError(f"{out} exists and holds no model, so it is left alone. Give another folder as `out`.")
    if not settings.overwrite:
        raise RunError(f"{out} already holds a model. Give another folder as `out`, or `overwrite` to replace it.")


def read_texts(paths: list[str]) -> Iterator[str]:
    """The text of the files, in pieces: lines of plain text, strings of JSON.

    Raises:
        DataError: a file is missing, is not UTF-8, gzip or JSON, or no file holds any text.
    """
    found = False
    for path in map(Path, paths):
        try:
            for piece in pieces_of_file(path):
                found = found or not piece.isspace()
                yield piece
        except FileNotFoundError:
            raise DataError(f"there is no file {path}. Give the paths of text, .jsonl or .json files, each also as .gz.") from None
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read {path}: {error}") from None
    if not found:
        raise DataError(f"no text in {', '.join(paths)}: a tokenizer needs some to learn from.")


def pieces_of_file(path: Path) -> Iterator[str]:
    """The pieces of text in one file, none empty.

    Raises:
        DataError: it is not UTF-8 or JSON.
        OSError, EOFError: it cannot be read or unpacked.
    """
    name = path.name.removesuffix(".gz")
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        if name.endswith(".json"):
            yield from strings_of(parse(decode(file.read(), str(path)), str(path)))
            return
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = decode(line, where)
            if not name.endswith(".jsonl"):
                yield text
            elif text.strip():
                yield from strings_of(parse(text, where))


def decode(content: bytes, where: str) -> str:
    """The text.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        fault = f"byte {error.start + 1} is {content[error.start]:#04x}"
        raise DataError(f"{where} is not UTF-8 ({fault}). Convert the file to UTF-8.") from None


def parse(text: str, where: str) -> Any:
    """The JSON value.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}. Give a file of plain text another ending, such as .txt.") from None


def strings_of(value: Any) -> Iterator[str]:
    """All strings inside a JSON value but the names of fields, so that texts, pairs and conversations are all read."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


def train_tokenizer(texts: Iterator[str], *, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most that many tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def random_model(settings: NewSettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model with weights drawn by the seed; the caller's random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config(settings, tokenizer), dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def model_config(settings: NewSettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The settings in the words of the architecture; no dropout anywhere."""
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "initializer_range": INITIAL_STD,
    }
    if settings.architecture == "gpt2":
        return GPT2Config(
            n_embd=settings.hidden,
            n_layer=settings.layers,
            n_head=settings.heads,
            n_inner=settings.num_intermediate,
            n_positions=settings.context,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            **common,
        )
    kind = {"qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig}[settings.architecture]
    config: PreTrainedConfig = kind(
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.hidden // settings.heads,
        intermediate_size=settings.num_intermediate,
        max_position_embeddings=settings.context,
        **common,
    )
    return config
