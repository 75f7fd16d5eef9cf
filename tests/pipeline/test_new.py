"""A model from nothing: what transformers loads is what was made."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from prefopt.config import check
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.pipeline.new import new_model, strings_of
from prefopt.pipeline.new_settings import NewSettings

TEXT = "The film about a sailor is superb. The film about a widow is dull.\nI saw it by the sea, and it didn't matter.\n" * 20
HARD = [
    "e\u0301 and é", "日本語 ✓ 😀\u200d👩", "\x00\x7f \t\r\n  two  spaces ",
    "don't , stop . it's", "12345 ｆｕｌｌ", "ﬁ \u2028 \u0130", "",
]  # fmt: skip

Make = Callable[..., Path]


def texts_file(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(**given: object) -> Path:
        small = {"vocabulary": 320, "hidden": 16, "layers": 2, "heads": 2, "context": 64}
        values = {"text": [str(texts_file(tmp_path))], "out": tmp_path / "model", **small, **given}
        return new_model(check(NewSettings, values), say=lambda line: None)

    return make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    made = NewSettings(text=[str(texts_file(folder))], out=folder / "model", vocabulary=320, hidden=16, layers=1, heads=2, context=64)
    return AutoTokenizer.from_pretrained(new_model(made, say=lambda line: None))


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral", "gpt2"])
def test_transformers_loads_it(make: Make, architecture: str) -> None:
    folder = make(architecture=architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == architecture
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert (folder / "model.safetensors").is_file()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    # AutoTokenizer puts another class in place of the saved one for some model types; then texts are cut otherwise.
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == saved
    for text in HARD:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert torch.isfinite(model(**tokenizer("The film", return_tensors="pt")).logits).all()


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_every_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_tokenizer_learned_from_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer(" sailor", add_special_tokens=False).input_ids) <= 2
    assert len(tokenizer(" zebra", add_special_tokens=False).input_ids) > 3


def test_special_tokens_and_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == "<|begin|><|turn|>user\nHello<|end|>\n<|turn|>assistant\nHi<|end|>\n"
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|begin|><|turn|>user\nHello<|end|>\n<|turn|>assistant\n"
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<|begin|>", "<|turn|>", "<|end|>", "<|pad|>"]
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer(whole, add_special_tokens=False).input_ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def test_the_seed_fixes_the_weights(make: Make, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    files = [make(seed=seed, out=tmp_path / name) / "model.safetensors" for name, seed in [("a", 1), ("b", 1), ("c", 2)]]
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_reads_plain_json_and_packed_text(make: Make, tmp_path: Path) -> None:
    pair = {"prompt": [{"role": "user", "content": "qqqqqqqq"}], "chosen": "zzzzzzzz", "score": 3, "none": None}
    assert list(strings_of(pair)) == ["user", "qqqqqqqq", "zzzzzzzz"]
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress((json.dumps(pair) + "\n\n").encode() * 5))
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "xxxxxxxx"}] * 5), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(make(text=[str(tmp_path / "pairs.jsonl.gz"), str(tmp_path / "texts.json")]))
    for learned in ("qqqqqqqq", "zzzzzzzz", "xxxxxxxx"):
        assert len(tokenizer(learned, add_special_tokens=False).input_ids) == 1


def test_says_what_was_made(tmp_path: Path) -> None:
    lines: list[str] = []
    text = tmp_path / "text.txt"
    text.write_text("abc abc\n", encoding="utf-8")
    shape = {"vocabulary": 1000, "hidden": 16, "layers": 1, "heads": 2, "intermediate": 32, "context": 64}
    new_model(NewSettings(text=[str(text)], out=tmp_path / "m", **shape), say=lines.append)
    # Tokens: 260 bytes and special ones, and the merges ab, abc, " abc". Embeddings 263·16; attention 4·16·16 + 2·8;
    # feed-forward 3·16·32; norms 3·16: 4208 + 1040 + 1536 + 48.
    assert lines == [f"{tmp_path / 'm'}: qwen3, 6,832 parameters, 263 tokens (of 1,000 asked: the text has no more pairs to merge)"]


def test_leaves_what_is_there_alone(make: Make, tmp_path: Path) -> None:
    folder = make()
    with pytest.raises(RunError, match=r"already holds a model.*overwrite"):
        make()
    make(overwrite=True, hidden=32)
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("do not delete")
    with pytest.raises(RunError, match="holds no model"):
        make(out=other, overwrite=True)
    assert (other / "chapter.txt").read_text() == "do not delete"
    with pytest.raises(RunError, match="cannot write"):
        make(out=other / "chapter.txt" / "model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text in .*empty.txt"),
        ("blank.txt", b" \n\n \n", "no text in"),
        ("numbers.jsonl", b'{"a": 1}\n', "no text in"),
        ("broken.jsonl", b'{"a": "b"}\n{"a\n', "broken.jsonl:2 is not JSON"),
        ("latin.txt", "tea\ncaf\xe9".encode("latin-1"), "latin.txt:2 is not UTF-8 .byte 4 is 0xe9"),
        ("damaged.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:-20], "cannot read .*damaged"),
    ],
)
def test_refuses_files_without_text(make: Make, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        make(text=[str(file)])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("out", [".", "/"])
def test_refuses_a_folder_without_a_name(make: Make, out: str) -> None:
    with pytest.raises(RunError, match="is no folder that can be replaced by another"):
        make(out=out)


def test_refuses_a_missing_file(make: Make) -> None:
    with pytest.raises(DataError, match=r"no file nowhere\.txt"):
        make(text=["nowhere.txt"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden": 30, "heads": 4}, r"hidden \(30\) must be a multiple of heads \(4\): take 28"),
        ({"hidden": 18, "heads": 2}, "must be even"),
        ({"heads": 4, "kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"architecture": "gpt2", "kv_heads": 1}, "gpt2 has as many"),
        ({"vocabulary": 200}, "vocabulary.*260"),
        ({"architecture": "qwen2"}, "architecture"),
        ({"text": []}, "text"),
    ],
)
def test_refuses_shapes_that_do_not_fit(make: Make, given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**given)
