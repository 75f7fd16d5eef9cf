"""Reward models: made of a language model, run by the engine, saved, and read by transformers with the same scores."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.architectures import ARCHITECTURES, COMMON
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from prefopt.engine.batch import pack
from prefopt.errors import ModelError
from prefopt.models.load import LoadedModel, Precision, load_model
from prefopt.models.padding import choose_padding
from prefopt.models.policy import EnginePath, Policy, score_head_of, set_attention
from prefopt.models.proof import prove
from prefopt.models.read import START, read_model
from prefopt.models.save import save_model
from prefopt.models.scorer import TreeScorer
from prefopt.models.settings import ModelSettings
from prefopt.trees import Completion, PromptTree, token_ids

CPU = torch.device("cpu")
FLOAT32 = Precision(None, torch.float32)
FAMILIES = [
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "qwen3_moe",
        "smollm3",
    ),
    *("bloom", "falcon", "gptj", "opt", "stablelm"),
]


def trees(end: int, vocabulary: int = 90) -> list[PromptTree]:
    """Prompts with two and three completions of many lengths, each with the token that ends it."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(5, vocabulary, (length,), generator=generator).tolist()

    return [
        PromptTree(token_ids(draw(prompt)), tuple(Completion(token_ids([*draw(length), end])) for length in lengths))
        for prompt, lengths in ((9, (14, 6)), (17, (3, 7, 1)), (1, (2, 5)))
    ]


def own_scores(model: PreTrainedModel, given: list[PromptTree], pad: int) -> Tensor:
    """By the model's own forward: all completions in one batch, padded on the right."""
    rows = [[*tree.prompt_ids.tolist(), *completion.ids.tolist()] for tree in given for completion in tree.completions]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    set_attention(model, None)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


def engine_scores(model: PreTrainedModel, path: EnginePath, given: list[PromptTree]) -> Tensor:
    batch = pack(given, sharing=path.sharing)
    with torch.no_grad():
        return Policy(model, path)(batch).last_scalars(batch.last_C)


def load(source: Path | str, seed: int = 0, **settings: Any) -> LoadedModel:
    return load_model(ModelSettings(model=str(source), **settings), precision=FLOAT32, device=CPU, seed=seed, kind="reward")


@pytest.fixture(scope="module")
def language_folder(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Any) -> Callable[[str], Path]:
    from transformers import AutoModelForCausalLM

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            own = ARCHITECTURES[name].config if name in ARCHITECTURES else {}
            config = CONFIG_MAPPING[name](**(COMMON | {"vocab_size": len(chat_tokenizer) + 8} | own))
            with torch.random.fork_rng():
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
            chat_tokenizer.save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_scores_as_transformers_does_and_reads_it_back(language_folder: Callable[[str], Path], tmp_path: Path, name: str):
    loaded = load(language_folder(name))
    loaded.model.eval()
    pad, end = loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id
    assert choose_padding(loaded, {end}) == repr("<pad>")
    given = trees(end)
    proof = prove(loaded.model, max_length=64)
    assert proof.path.scores
    if name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt"):
        assert proof.path.sharing == "flat"
    found = engine_scores(loaded.model, proof.path, given)
    assert found.std() > 1e-3
    torch.testing.assert_close(found, own_scores(loaded.model, given, pad), rtol=1e-4, atol=1e-5)
    save_model(loaded, tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert again.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.config.get_text_config().pad_token_id == tokenizer.pad_token_id == pad
    torch.testing.assert_close(own_scores(again, given, pad), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", ["flat", "fork", "plain"])
def test_each_way_of_sharing_gives_the_same_scores_and_gradients(language_folder: Callable[[str], Path], sharing: str):
    loaded = load(language_folder("llama"))
    given = trees(2)
    gradients = {}
    for way in ("plain", sharing):
        batch = pack(given, sharing=way)
        found = Policy(loaded.model, EnginePath(way, None, scores=True))(batch)
        assert len(found.values_N) == 0
        weights = torch.linspace(-1, 1, len(batch.last_C))
        loaded.model.zero_grad()
        (found.last_scalars(batch.last_C) * weights).sum().backward()
        gradients[way] = torch.cat([parameter.grad.flatten() for parameter in loaded.model.parameters()])
    assert gradients["plain"].norm() > 0.01
    torch.testing.assert_close(gradients[sharing], gradients["plain"], rtol=1e-4, atol=1e-6)


def test_the_new_score_layer_is_small_and_follows_the_seed(language_folder: Callable[[str], Path]):
    weights = [score_head_of(load(language_folder("llama"), seed=seed).model).weight.detach() for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (1, 32)
    assert weights[0].std().item() == pytest.approx(START / 33**0.5, rel=0.4)
    body = [load(language_folder("llama"), seed=seed).model.model.layers[0].mlp.up_proj.weight for seed in (3, 4)]
    assert torch.equal(body[0], body[1])


def test_a_reward_model_goes_on_as_it_is(language_folder: Callable[[str], Path], tmp_path: Path):
    loaded = load(language_folder("llama"), seed=1)
    choose_padding(loaded, {2})
    save_model(loaded, tmp_path / "rm")
    again = load(tmp_path / "rm", seed=2)
    assert torch.equal(score_head_of(again.model).weight, score_head_of(loaded.model).weight)


def test_scores_are_not_rounded_to_bf16(language_folder: Callable[[str], Path]):
    precision = Precision(torch.bfloat16, torch.bfloat16)
    settings = ModelSettings(model=str(language_folder("llama")), lora_rank=2)
    loaded = load_model(settings, precision=precision, device=CPU, seed=0, kind="reward")
    assert loaded.model.model.embed_tokens.weight.dtype == torch.bfloat16
    batch = pack(trees(2), sharing="plain")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = Policy(loaded.model, EnginePath("plain", None, scores=True))(batch).last_scalars(batch.last_C)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_a_score_layer_stays_float32_where_weights_are_trained_in_bf16(language_folder: Callable[[str], Path]):
    precision = Precision(torch.bfloat16, torch.float32, trained=torch.bfloat16)
    loaded = load_model(ModelSettings(model=str(language_folder("llama"))), precision=precision, device=CPU, seed=0, kind="reward")
    assert loaded.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert score_head_of(loaded.model).weight.dtype == torch.float32


def test_an_adapter_has_the_score_layer(language_folder: Callable[[str], Path], tmp_path: Path):
    loaded = load(language_folder("llama"), lora_rank=2)
    assert loaded.adapter is not None
    assert loaded.kind == "reward"
    with torch.no_grad():
        for name, parameter in loaded.adapter.named_parameters():
            if "lora_B" in name or "score.modules_to_save" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    given, path = trees(2), EnginePath("flat", None, scores=True)
    loaded.model.eval()
    found = engine_scores(loaded.model, path, given)
    save_model(loaded, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    again = load(tmp_path / "adapter", seed=9)
    again.model.eval()
    torch.testing.assert_close(engine_scores(again.model, path, given), found)


def test_an_adapter_is_of_one_kind(language_folder: Callable[[str], Path], tmp_path: Path):
    of_language = load_model(ModelSettings(model=str(language_folder("llama")), lora_rank=2), precision=FLOAT32, device=CPU, seed=0)
    save_model(of_language, tmp_path / "language")
    with pytest.raises(
        ModelError, match=r"is an adapter of a language model, and a reward model needs one with a score layer.*prefopt merge"
    ):
        load(tmp_path / "language")
    save_model(load(language_folder("llama"), lora_rank=2), tmp_path / "reward")
    with pytest.raises(ModelError, match="holds a reward model, which scores answers and cannot write any"):
        load_model(ModelSettings(model=str(tmp_path / "reward")), precision=FLOAT32, device=CPU, seed=0)


def test_a_reward_model_is_no_language_model(language_folder: Callable[[str], Path], tmp_path: Path):
    loaded = load(language_folder("llama"))
    save_model(loaded, tmp_path / "rm")
    with pytest.raises(ModelError, match=r"holds a reward model.*prefopt score.*prefopt train reward"):
        read_model(str(tmp_path / "rm"), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"is a language model, and gives no scores\. Train a reward model of it"):
        TreeScorer.load(str(language_folder("llama")))


def test_a_classifier_of_several_labels_is_refused(language_folder: Callable[[str], Path], tmp_path: Path):
    model = AutoModelForSequenceClassification.from_pretrained(language_folder("llama"), num_labels=3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(language_folder("llama")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a classifier of 3 labels; a reward model gives one number"):
        load(tmp_path)


def test_an_architecture_without_a_class_is_named(language_folder: Callable[[str], Path]):
    with pytest.raises(ModelError, match=r"transformers has no sequence-classification class for granite models.*llama, mistral"):
        load(language_folder("granite"))


def test_weights_that_are_missing_are_still_missed(language_folder: Callable[[str], Path], tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(language_folder("llama"), tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of the model's weights"):
        load(folder)


def test_padding_never_ends_an_answer(language_folder: Callable[[str], Path]):
    loaded = load(language_folder("llama"))
    tokenizer = loaded.tokenizer
    tokenizer.pad_token = tokenizer.eos_token  # as many published tokenizers have it
    chosen = choose_padding(loaded, {tokenizer.eos_token_id})
    assert chosen == repr("<begin>")
    assert loaded.model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id
    assert tokenizer.padding_side == "right"
    given = trees(tokenizer.eos_token_id)
    loaded.model.eval()
    found = engine_scores(loaded.model, EnginePath("flat", None, scores=True), given)
    torch.testing.assert_close(own_scores(loaded.model, given, tokenizer.pad_token_id), found, rtol=1e-4, atol=1e-5)


def test_what_texts_begin_with_pads_only_where_nothing_else_does(language_folder: Callable[[str], Path]):
    loaded = load(language_folder("llama"))
    tokenizer = loaded.tokenizer
    ids = tokenizer.get_vocab()
    tokenizer.pad_token = tokenizer.eos_token
    chosen = choose_padding(loaded, {tokenizer.eos_token_id}, {tokenizer.bos_token_id})
    assert chosen == repr("<pad>")
    assert loaded.model.config.pad_token_id == ids["<pad>"]
    assert choose_padding(loaded, {tokenizer.eos_token_id}, set(ids.values())) == repr("<pad>")  # all are used: the first that ends nothing


def test_where_nothing_else_pads_it_is_the_byte_that_no_text_holds(language_folder: Callable[[str], Path]):
    loaded = load(language_folder("llama"))
    taken = {index for _, index in loaded.tokenizer.get_added_vocab().items()} | {*loaded.tokenizer.all_special_ids}
    assert choose_padding(loaded, taken) == repr("Ā")
    assert loaded.tokenizer.decode([loaded.tokenizer.pad_token_id]) in ("\x00", "Ā")
    with pytest.raises(ModelError, match="the tokenizer has no token that could pad"):
        choose_padding(loaded, set(range(len(loaded.tokenizer))))
