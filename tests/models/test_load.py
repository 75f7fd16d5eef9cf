"""What can be loaded, how it is made ready, and what is said where it cannot."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn

from prefopt.errors import ModelError
from prefopt.models import load
from prefopt.models.load import LoadedModel, Precision, choose_precision, load_model, load_tokenizer, locate
from prefopt.models.policy import trained_parameters
from prefopt.models.read import read_model
from prefopt.models.save import save_model
from prefopt.models.settings import ModelSettings

CPU = torch.device("cpu")
FLOAT32 = Precision(None, torch.float32)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def loaded(model: Path | str, *, precision: Precision = FLOAT32, seed: int = 0, **settings: object) -> LoadedModel:
    return load_model(ModelSettings(model=str(model), **settings), precision=precision, device=CPU, seed=seed)


@pytest.fixture
def folder(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(model_folder(), tmp_path / "own"))


@pytest.fixture
def adapter_folder(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A saved LoRA adapter of the model folder, all its weights other than at the start."""
    trained = loaded(model_folder(), lora_rank=2)
    with torch.no_grad():
        for _, parameter in trained_parameters(trained.model):
            parameter.normal_(std=0.1)
    save_model(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def adapted(model: nn.Module) -> set[str]:
    """Names of the layers that have an adapter."""
    return {name.split(".")[-4] for name, _ in model.named_parameters() if name.endswith("lora_A.default.weight")}


# Where a model is.


def test_a_folder_a_run_and_a_hub_name_are_located(model_folder, tmp_path: Path):
    model = model_folder()
    run = tmp_path / "run"
    shutil.copytree(model, run / "model")
    assert locate(str(model)) == (str(model), None)
    assert locate(str(run)) == (str(run / "model"), None)
    assert locate("org/model") == ("org/model", None)
    assert locate("gpt2") == ("gpt2", None)


def test_home_is_understood(model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(model_folder(), tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/mine") == (str(tmp_path / "mine"), None)


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../model", "~/no-such-model", "a/b/c"])
def test_a_path_that_is_not_there(name: str):
    with pytest.raises(ModelError, match=rf"no folder {name}. Give the folder of a model, or a hub name such as org/model"):
        locate(name)


def test_a_file_is_no_folder(folder: Path):
    with pytest.raises(ModelError, match=r"model.safetensors is a file. Give the folder that holds the model's config.json"):
        locate(str(folder / "model.safetensors"))


def test_a_folder_without_a_model(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no model: there is no config.json in it"):
        locate(str(tmp_path))


def test_an_adapter_leads_to_its_base(adapter_folder: Path, model_folder):
    assert locate(str(adapter_folder)) == (str(model_folder()), str(adapter_folder))


@pytest.mark.parametrize(
    ("base", "says"),
    [
        (None, "does not name its base model. Give the base as model and this folder as adapter"),
        ("/moved/away", "is an adapter of /moved/away: no folder /moved/away.*If the base has moved, give it as model"),
    ],
)
def test_an_adapter_whose_base_is_not_there_can_be_given_beside_its_base(adapter_folder: Path, model_folder, base: str | None, says: str):
    change_json(adapter_folder / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ModelError, match=says):
        locate(str(adapter_folder))
    one = loaded(model_folder(), adapter=str(adapter_folder))
    assert not one.adapter_is_new
    assert adapted(one.model) == LINEAR


def test_an_adapter_of_an_adapter_is_refused(adapter_folder: Path, tmp_path: Path):
    other = Path(shutil.copytree(adapter_folder, tmp_path / "other"))
    change_json(other / "adapter_config.json", base_model_name_or_path=str(adapter_folder))
    with pytest.raises(ModelError, match=r"which holds no model. Give a whole model as model"):
        locate(str(other))
    change_json(other / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match="which holds no model"):
        locate(str(other))


def test_a_broken_adapter_config_is_named(adapter_folder: Path):
    (adapter_folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json cannot be read.*The folder is damaged"):
        locate(str(adapter_folder))


# Reading weights.


def test_truncated_weights(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"cannot load a model from .*own: .*config.json and \*.safetensors"):
        read_model(str(folder), dtype=torch.float32)


def test_weights_that_are_missing_would_start_at_random(folder: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights \(model.layers.1.mlp.up_proj.weight, .*start at random"):
        read_model(str(folder), dtype=torch.float32)


def test_weights_of_another_shape(folder: Path):
    change_json(folder / "config.json", intermediate_size=48)
    with pytest.raises(ModelError, match="cannot load a model from"):
        read_model(str(folder), dtype=torch.float32)


def test_pickled_weights_are_refused(folder: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (folder / "run",))

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load a model from"):
        read_model(str(folder), dtype=torch.float32)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such"}'])
def test_a_config_that_is_no_causal_language_model(folder: Path, content: str):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot load a model from"):
        read_model(str(folder), dtype=torch.float32)


def test_a_hub_name_that_cannot_be_reached():
    with pytest.raises(ModelError, match=r"there is no folder prefopt-tests/none here, and the hub gave no model of that name"):
        loaded("prefopt-tests/none")


# Tokenizers.


def test_a_folder_without_tokenizer(folder: Path):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no usable tokenizer in .*own: .*needs tokenizer.json and tokenizer_config.json"):
        loaded(folder)


def test_a_broken_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no usable tokenizer in"):
        loaded(folder)


def test_a_tokenizer_that_is_larger_than_the_embeddings(folder: Path, model_folder):
    tokenizer = load_tokenizer(ModelSettings(model=str(folder)))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"has 385 tokens and the model's embeddings 384: they do not belong together. Resize"):
        loaded(folder)


def test_an_adapter_s_own_tokenizer_comes_first(adapter_folder: Path):
    tokenizer = load_tokenizer(ModelSettings(model=str(adapter_folder)))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter_folder)
    assert load_tokenizer(ModelSettings(model=str(adapter_folder))).chat_template == tokenizer.chat_template


def test_remote_code_is_warned_of(model_folder):
    with pytest.warns(UserWarning, match="trust_remote_code is on: Python code from"):
        load_tokenizer(ModelSettings(model=str(model_folder()), trust_remote_code=True))


# Ready to train.


def test_full_fine_tuning_trains_every_weight_in_float32(model_folder, make_model):
    one = loaded(model_folder())
    assert one.adapter is None
    assert one.model.training
    named = dict(one.model.named_parameters())
    assert dict(trained_parameters(one.model)).keys() == named.keys()
    assert {parameter.dtype for parameter in named.values()} == {torch.float32}
    for name, parameter in make_model().named_parameters():
        assert torch.equal(named[name], parameter), name


def test_a_run_s_folder_is_a_model(model_folder, tmp_path: Path):
    shutil.copytree(model_folder(), tmp_path / "run" / "model")
    one, other = loaded(tmp_path / "run"), loaded(model_folder())
    assert torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)
    assert len(one.tokenizer) == len(other.tokenizer)


def test_lora_takes_every_linear_layer_but_the_head_at_twice_the_rank(model_folder):
    one = loaded(model_folder(), lora_rank=4)
    assert one.adapter_is_new
    assert adapted(one.model) == LINEAR
    config = one.adapter.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)
    assert all("lora_" in name for name, _ in trained_parameters(one.model))
    assert one.model.model.layers[0].self_attn.q_proj.scaling["default"] == 2.0
    assert loaded(model_folder(), lora_rank=4, lora_alpha=1).model.model.layers[0].self_attn.q_proj.scaling["default"] == 0.25


def test_target_modules_and_modules_to_save(model_folder):
    one = loaded(model_folder(), lora_rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert adapted(one.model) == {"q_proj"}
    trained = [name for name, _ in trained_parameters(one.model) if "lora_" not in name]
    assert trained == ["lm_head.modules_to_save.default.weight"]


def test_an_unknown_target_lists_the_linear_layers(model_folder):
    with pytest.raises(ModelError, match=r"cannot add the adapter: .*Linear layers of this model: down_proj, .*lm_head, .*v_proj\."):
        loaded(model_folder(), lora_rank=2, target_modules=["query"])


def test_trained_weights_are_float32_on_a_bf16_base(model_folder):
    precision = choose_precision("bf16", CPU, adapter=True)
    one = loaded(model_folder(), lora_rank=2, modules_to_save=["lm_head"], precision=precision)
    assert one.model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    trained = dict(trained_parameters(one.model))
    assert any("lm_head" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_the_seed_decides_the_adapter_and_leaves_the_random_state(model_folder):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = dict(trained_parameters(loaded(model_folder(), lora_rank=2, seed=1).model))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(456)
    again = dict(trained_parameters(loaded(model_folder(), lora_rank=2, seed=1).model))
    other = dict(trained_parameters(loaded(model_folder(), lora_rank=2, seed=2).model))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if "lora_A" in name]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_an_existing_adapter_goes_on(adapter_folder: Path, model_folder):
    one = loaded(adapter_folder)
    assert not one.adapter_is_new
    again = loaded(model_folder(), adapter=str(adapter_folder))
    trained, trained_again = dict(trained_parameters(one.model)), dict(trained_parameters(again.model))
    assert trained.keys() == trained_again.keys()
    assert trained
    for name, parameter in trained.items():
        assert torch.equal(parameter, trained_again[name])
        assert 0.02 < parameter.std() < 0.2  # as it was saved


def test_adapter_settings_at_odds(adapter_folder: Path, model_folder, tmp_path: Path):
    with pytest.raises(ModelError, match="is an adapter already: leave lora_rank out to go on from it, or give its base model"):
        loaded(adapter_folder, lora_rank=2)
    with pytest.raises(ModelError, match=r"is an adapter, and so is .*give the base model and one of the two"):
        loaded(adapter_folder, adapter=str(adapter_folder))
    with pytest.raises(ModelError, match=r"holds a whole model, not an adapter. Give it as model, without adapter"):
        loaded(model_folder(), adapter=str(model_folder()))
    with pytest.raises(ModelError, match="no folder /no/such"):
        loaded(model_folder(), adapter="/no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty holds no adapter"):
        loaded(model_folder(), adapter=str(tmp_path / "empty"))


def test_damaged_adapters(adapter_folder: Path):
    from safetensors.torch import load_file, save_file

    weights = adapter_folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"cannot put the adapter .* into the model"):
        loaded(adapter_folder)
    weights.write_bytes(whole)
    some = load_file(weights)
    some.pop(next(name for name in some if "lora_B" in name))
    save_file(some, weights)
    with pytest.raises(ModelError, match=r"cannot put the adapter .* into the model: Found missing adapter keys"):
        loaded(adapter_folder)
    weights.write_bytes(whole)
    more = load_file(weights)
    stray = next(name for name in more if "lora_B" in name)
    save_file(more | {stray.replace("layers.0", "layers.9"): more[stray].clone()}, weights)
    with pytest.raises(ModelError, match=r"was not made for .*: 1 of its weights belong to layers that it does not have \(.*layers\.9"):
        loaded(adapter_folder)
    weights.unlink()
    torch.save({}, adapter_folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"lacks adapter_model.safetensors. Weights are read from safetensors only"):
        loaded(adapter_folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_adds_tokens_is_refused(model_folder, tmp_path: Path, make_model):
    model = make_model()
    model.name_or_path = str(model_folder())
    prefix = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prefix.save_pretrained(tmp_path / "prefix")
    with pytest.raises(ModelError, match=r"cannot put the adapter .*prompt learning"):
        loaded(model_folder(), adapter=str(tmp_path / "prefix"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_dropout_is_off_in_the_model_and_in_an_adapter(make_model, chat_tokenizer, tmp_path: Path):
    model = make_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    model.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(
        tmp_path / "lora"
    )
    one = loaded(tmp_path / "lora").model
    assert one.training
    rates = [module.p for module in one.modules() if isinstance(module, nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}
    ids = torch.arange(4, 24)[None]
    assert torch.equal(one(ids).logits, one(ids).logits)
    llama = make_model(attention_dropout=0.5)
    llama.save_pretrained(tmp_path / "llama")
    chat_tokenizer.save_pretrained(tmp_path / "llama")
    again = loaded(tmp_path / "llama").model
    assert torch.equal(again(ids).logits, again(ids).logits)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_gradient_checkpointing(model_folder, lora_rank: int):
    assert not loaded(model_folder(), lora_rank=lora_rank).model.model.gradient_checkpointing
    one = loaded(model_folder(), lora_rank=lora_rank, gradient_checkpointing=True)
    assert all(layer.gradient_checkpointing for layer in one.model.model.layers)
    one.model(torch.arange(4, 24)[None]).logits.square().mean().backward()
    assert all(parameter.grad is not None for _, parameter in trained_parameters(one.model))


@pytest.mark.parametrize(
    ("wanted", "hardware", "adapter", "expected"),
    [
        ("auto", True, False, Precision(torch.bfloat16, torch.float32)),
        ("auto", True, True, Precision(torch.bfloat16, torch.bfloat16)),
        ("auto", False, False, FLOAT32),
        ("auto", False, True, FLOAT32),
        ("bf16", False, False, Precision(torch.bfloat16, torch.float32)),
        ("bf16", False, True, Precision(torch.bfloat16, torch.bfloat16)),
        ("float32", True, False, FLOAT32),
        ("float32", True, True, FLOAT32),
    ],
)
def test_precision(monkeypatch: pytest.MonkeyPatch, wanted: str, hardware: bool, adapter: bool, expected: Precision):
    monkeypatch.setattr(load, "_has_bf16", lambda device: hardware)
    assert choose_precision(wanted, CPU, adapter=adapter) == expected


def test_precision_in_words():
    assert str(FLOAT32) == "float32"
    assert str(Precision(torch.bfloat16, torch.float32)) == "bf16, trained weights in float32"
