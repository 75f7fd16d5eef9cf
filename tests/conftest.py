"""What tests share: an offline, quiet environment, a tiny tokenizer, and tiny random models.

A test asks for `tokenizer` or `chat_tokenizer`, for `make_model`, which draws a model, or for `model_folder`,
which holds model and tokenizer as `transformers` saves them. All of it is made once per session, from the texts
in this file.
"""

import gc
import os
import signal
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before torch and transformers are imported, by whichever test does it first; child processes inherit it too.
_caches = tempfile.TemporaryDirectory(prefix="prefopt-tests-")
os.environ["PREFOPT_CACHE"] = _caches.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the command line sets it
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors; and sums differ in the last bits with the number of threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings as hypothesis_settings  # noqa: E402

hypothesis_settings.register_profile("prefopt", deadline=None, max_examples=50, derandomize=True)  # a slow machine is not a bug
hypothesis_settings.load_profile("prefopt")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MakeModel = Callable[..., "PreTrainedModel"]


def pytest_collection_finish() -> None:
    """What is there before the first test stays: searching torch and thousands of tests for garbage takes a tenth of all time."""
    gc.collect()
    gc.freeze()


TEXTS = [
    "How do I boil an egg? Put it into boiling water for eight minutes.",
    "What is the capital of France? The capital of France is Paris.",
    "Write a poem about the sea. The sea is wide, the sea is deep, it sings the sailors all to sleep.",
    "I do not know. I am sorry, I cannot help you with that.",
    "Human: hello there\n\nAssistant: hello, how are you?",
    "user system assistant prompt chosen rejected good bad better worse yes no 0 1 2 3 4 5 6 7 8 9",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
VOCABULARY = 384
"""A token per byte, the special ones, and some merges."""


@cache
def _tokenizer(chat_template: str | None) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<begin>", "<end>", "<turn>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<begin>", eos_token="<end>", model_max_length=512
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level tokenizer with <begin>, <end> and <pad>, and without a chat template."""
    return _tokenizer(None)


@pytest.fixture(scope="session")
def chat_tokenizer() -> "PreTrainedTokenizerFast":
    """The same tokenizer with a chat template; a turn ends in <end>."""
    return _tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def gpu() -> "torch.device":
    """What tests marked `gpu` run on: the GPU, or with PREFOPT_REHEARSE the CPU, so that they are known to run before there is one."""
    import torch

    if torch.cuda.is_available():
        torch._dynamo.config.recompile_limit = 64  # tests of many models share a process, which would fall back to uncompiled kernels
        return torch.device("cuda")
    if os.environ.get("PREFOPT_REHEARSE"):
        return torch.device("cpu")
    pytest.skip("there is no GPU here; PREFOPT_REHEARSE=1 runs it on the CPU")


def _model(architecture: str, seed: int, config: dict[str, Any]) -> "PreTrainedModel":
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(None)
    tiny: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **(tiny | config)), dtype=torch.float32
        )
    return model


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """make_model("llama", seed=0, **config): a new random float32 model of hidden size 32 and two layers."""

    def make(architecture: str = "llama", *, seed: int = 0, **config: Any) -> "PreTrainedModel":
        return _model(architecture, seed, config)

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """model_folder("llama", seed=0): such a model and `chat_tokenizer`, saved; one folder for all who ask, so none writes into it."""

    @cache
    def folder(architecture: str = "llama", seed: int = 0) -> Path:
        path = tmp_path_factory.mktemp(f"{architecture}-{seed}") / "model"
        _model(architecture, seed, {}).save_pretrained(path)
        _tokenizer(CHAT_TEMPLATE).save_pretrained(path)
        return path

    return folder
