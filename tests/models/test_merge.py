"""Merged and unmerged are the same function, whatever kind of adapter it is; and what rounding costs is measured rightly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from prefopt.errors import ModelError, RunError
from prefopt.models.load import ADAPTER_WEIGHTS
from prefopt.models.merge import (
    Change,
    ModuleChange,
    adapter_off,
    cast_weights,
    load_to_merge,
    measure,
    merge_weights,
    token_values,
    write_model,
)
from prefopt.trees import Completion, PromptTree, token_ids

# Of peft about transformers, where tests use it themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CPU = torch.device("cpu")
TREES = [PromptTree(token_ids(range(4, 12)), (Completion(token_ids(range(40, 60))), Completion(token_ids([90, 33, 12]))))]
ALL_LINEAR = "all-linear"

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL_LINEAR},
    "rslora": {"target_modules": ALL_LINEAR, "use_rslora": True},
    "dora": {"target_modules": ALL_LINEAR, "use_dora": True},
    "ranks and scales by layer": {"target_modules": ALL_LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [50, 51, 90]},
    "bias": {"target_modules": ["v_proj", "o_proj"], "lora_bias": True},
}


def make_adapter(base: Path, out: Path, *, std: float = 0.05, **config: Any) -> Path:
    """An adapter on the model in `base`, all of its weights other than at the start."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **config))
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=std)
    adapter.save_pretrained(str(out), save_embedding_layers=False)
    return out


def merged(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Change, torch.Tensor, torch.Tensor]:
    """The merged model, its change, and log-probs of base with adapter and of the base alone."""
    loaded = load_to_merge(str(base), str(adapter), device=CPU)
    trained = token_values(loaded.model, TREES)
    with adapter_off(loaded) as alone:
        before = token_values(alone, TREES)
    model, change = merge_weights(loaded, dtype)
    return model, change, trained, before


@pytest.fixture(scope="session")
def tied_folder(make_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("tied") / "model"
    model = make_model("llama", seed=2, tie_word_embeddings=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.mul_(10)
    model.save_pretrained(path)
    chat_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def biased_folder(make_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("biased") / "model"
    make_model("llama", seed=2, attention_bias=True).save_pretrained(path)
    chat_tokenizer.save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.filterwarnings("ignore:.*tied.*")
@pytest.mark.filterwarnings("ignore:.*have invalid shape.*")  # peft means an adapter's own bias, which has one dimension
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_base_with_adapter_in_memory_and_on_disk(kind: str, tied: bool, tied_folder, model_folder, biased_folder, tmp_path: Path):
    base = biased_folder if kind == "bias" else tied_folder if tied else model_folder()
    adapter = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    model, change, trained, before = merged(base, adapter)
    assert (trained - before).abs().mean() > 1e-3  # it does something
    assert (token_values(model, TREES) - trained).abs().max() < 1e-5
    assert not any("lora" in name or "base_layer" in name or "modules_to_save" in name for name in model.state_dict())
    assert not change.is_nothing
    assert change.lost == 0.0  # float32 is what it was merged in
    tokenizer = AutoTokenizer.from_pretrained(base)
    write_model(model, tokenizer, tmp_path / "out", end_of_turn="<end>")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert read.dtype == torch.float32
    assert (token_values(read.eval(), TREES) - trained).abs().max() < 1e-5
    own_weights = read.get_input_embeddings().weight.data_ptr() != read.get_output_embeddings().weight.data_ptr()
    apart = kind in ("embeddings", "head", "embeddings in full", "head in full", "some tokens")
    assert own_weights == (not tied or apart or kind == "bias")


def test_layers_of_gpt2_are_stored_the_other_way_round(model_folder, tmp_path: Path):
    adapter = make_adapter(model_folder("gpt2"), tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model, _, trained, before = merged(model_folder("gpt2"), adapter)
    assert (trained - before).abs().mean() > 1e-3
    assert (token_values(model, TREES) - trained).abs().max() < 1e-5


def test_the_arithmetic_is_float32_also_on_a_base_that_is_kept_in_bf16(model_folder, tmp_path: Path):
    base = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", std=1e-4, target_modules=["q_proj"])
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    delta = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"] * (8 / 4)
    before = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    model, change, *_ = merged(base, adapter, torch.bfloat16)
    after = dict(model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(after, before + delta, atol=1e-8, rtol=0)
    assert not torch.equal(after, before)
    assert change.base_is_rounded
    layer = next(module for module in change.modules if module.name == "model.layers.0.self_attn.q_proj.weight")
    rounded = (before + delta).bfloat16().float()
    assert layer.change == pytest.approx(float(delta.norm()), rel=1e-3)
    assert layer.lost == pytest.approx(float((rounded - before - delta).norm() / delta.norm()), rel=1e-2)
    assert layer.num_vanished == int((rounded == before).sum())
    assert 0.5 < layer.num_vanished / layer.num_changed < 1


def test_rounding_by_hand():
    # Between 1 and 2 neighbours in bf16 are 1/128 apart: the first change vanishes, the second becomes one gap, the third is exact.
    before = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    after = torch.tensor([[1.0 + 1 / 512, 1.0 + 3 / 512, 1.0 + 1 / 128, 1.0]])
    found = measure("layer.weight", before, after, torch.bfloat16)
    assert (found.num_changed, found.num_vanished) == (3, 1)
    assert found.change == pytest.approx((1 + 9 + 16) ** 0.5 / 512)
    assert found.rounding == pytest.approx((1 + 1) ** 0.5 / 512)
    assert found.lost == pytest.approx((2 / 26) ** 0.5)
    assert found.base_is_rounded
    assert not measure("layer.weight", after, before, torch.bfloat16).base_is_rounded


def test_layers_together_by_hand():
    small = ModuleChange("small", change=3.0, rounding=0.3, num_changed=10, num_vanished=1, base_is_rounded=True)
    large = ModuleChange("large", change=4.0, rounding=0.4, num_changed=30, num_vanished=11, base_is_rounded=False)
    still = ModuleChange("still", change=0.0, rounding=0.0, num_changed=0, num_vanished=0, base_is_rounded=True)
    change = Change((small, large, still))
    assert change.lost == pytest.approx(0.5 / 5.0)
    assert change.vanished == pytest.approx(12 / 40)
    assert change.worst.name in ("small", "large")
    assert not change.base_is_rounded
    assert Change((still,)).is_nothing
    assert (Change((still,)).lost, Change((still,)).vanished) == (0.0, 0.0)


def test_an_adapter_from_before_training_changes_nothing(model_folder, tmp_path: Path):
    adapter = make_adapter(model_folder(), tmp_path / "adapter", std=0.0, target_modules=ALL_LINEAR)
    model, change, trained, before = merged(model_folder(), adapter, torch.bfloat16)
    assert change.is_nothing
    assert torch.equal(trained, before)
    assert torch.equal(token_values(model, TREES), before)


def test_rounding_leaves_alone_what_loading_computes_anew(model_folder, tmp_path: Path):
    adapter = make_adapter(model_folder(), tmp_path / "adapter", target_modules=ALL_LINEAR)
    model, *_ = merged(model_folder(), adapter)
    positions = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cast_weights(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert positions
    assert all(torch.equal(buffer, positions[name]) for name, buffer in model.named_buffers())
    write_model(model, AutoTokenizer.from_pretrained(model_folder()), tmp_path / "out", end_of_turn="")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


# What cannot be merged.


def test_a_base_of_other_shapes_is_refused(model_folder, make_model, chat_tokenizer, tmp_path: Path):
    adapter = make_adapter(model_folder(), tmp_path / "adapter", target_modules=ALL_LINEAR)
    wide = make_model("llama", hidden_size=48)
    wide.save_pretrained(tmp_path / "wide")
    chat_tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match=r"adapter was not made for .*wide: its layers have other shapes or names. Give the model"):
        load_to_merge(str(tmp_path / "wide"), str(adapter), device=CPU)
    with pytest.raises(ModelError, match=r"was not made for"):
        load_to_merge(str(model_folder("gpt2")), str(adapter), device=CPU)


def test_a_base_with_fewer_layers_is_refused(model_folder, make_model, chat_tokenizer, tmp_path: Path):
    adapter = make_adapter(model_folder(), tmp_path / "adapter", target_modules=ALL_LINEAR)
    make_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "short")
    chat_tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(ModelError, match=r"was not made for .*short: 14 of its weights belong to layers that it does not have"):
        load_to_merge(str(tmp_path / "short"), str(adapter), device=CPU)


def test_an_adapter_that_adds_inputs_is_refused(model_folder, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(str(tmp_path / "prefix"))
    with pytest.raises(ModelError, match=r"adapter of the type PREFIX_TUNING, which adds inputs instead of changing weights"):
        load_to_merge(str(model_folder()), str(tmp_path / "prefix"), device=CPU)


def test_numbers_that_are_not_finite_are_refused(model_folder, tmp_path: Path):
    adapter = make_adapter(model_folder(), tmp_path / "adapter", target_modules=ALL_LINEAR)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    weights[next(iter(weights))][0, 0] = float("nan")
    save_file(weights, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(ModelError, match="adapter cannot be merged: NaNs detected"):
        merge_weights(load_to_merge(str(model_folder()), str(adapter), device=CPU), torch.float32)


# What is written.


def test_generation_stops_at_the_end_of_turn_and_a_config_that_cannot_be_saved_is_mended(model_folder, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    model.generation_config = GenerationConfig(eos_token_id=7, temperature=0.6, top_p=0.9)  # as published models have it
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    write_model(model, tokenizer, tmp_path / "out", end_of_turn="<end>")
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert written.eos_token_id == [7, tokenizer.convert_tokens_to_ids("<end>")]
    assert (written.do_sample, written.temperature, written.top_p) == (True, 0.6, 0.9)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_full_disk_is_a_sentence_and_leaves_nothing(model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_pretrained(model_folder())

    def full(*args: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(model_folder())), "save_pretrained", full)
    with pytest.raises(RunError, match=r"cannot write the merged model in .*No space left on device. Make room"):
        write_model(model, AutoTokenizer.from_pretrained(model_folder()), tmp_path / "out", end_of_turn="")
    assert list(tmp_path.iterdir()) == []
