"""A base in four bits: which layers, how many bytes, the adapter's gradients, and what is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.errors import ConfigError, ModelError
from prefopt.models import quantise
from prefopt.models.load import LoadedModel, Precision, choose_precision, load_model
from prefopt.models.policy import EnginePath, Policy, trained_parameters
from prefopt.models.proof import prove
from prefopt.models.quantise import (
    FOUR_BITS,
    four_bit_layers,
    in_4bit,
    kept_in_4bit,
    need_bitsandbytes,
    num_parameters,
    pack_layers,
    packed_bytes,
    quantisation_of,
    to_be_packed,
)
from prefopt.models.reference import AdapterOff
from prefopt.models.settings import ModelSettings
from prefopt.training.group.processes import ALONE
from prefopt.training.references import cache_context
from prefopt.trees import Completion, PromptTree, token_ids

bitsandbytes = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
FLOAT32, BF16 = Precision(None, torch.float32), Precision(torch.bfloat16, torch.bfloat16)
FLAT = EnginePath("flat", HeadShape())


def loaded(folder: Path, precision: Precision = FLOAT32, *, frozen: bool = False, **settings: Any) -> LoadedModel:
    settings = {"load_in_4bit": True, "lora_rank": 0 if frozen else 4} | settings
    return load_model(ModelSettings(model=str(folder), **settings), precision=precision, device=CPU, seed=3, frozen=frozen)


def trees() -> list[PromptTree]:
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> Any:
        return token_ids(torch.randint(4, 380, (count,), generator=draw).tolist())

    return [PromptTree(ids(prompt), (Completion(ids(one)), Completion(ids(other)))) for prompt, one, other in ((12, 5, 7), (4, 3, 9))]


def with_plain_weights(model: nn.Module) -> nn.Module:
    """A copy whose layers hold in float32 what the four bits stand for."""
    plain = copy.deepcopy(model)
    for name, layer in list(four_bit_layers(plain)):
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        linear.weight = nn.Parameter(weight.float(), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        plain.set_submodule(name, linear)
    assert not in_4bit(plain)
    return plain


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every token another way, with respect to the adapter."""
    logps = Policy(model, FLAT)(pack(trees(), sharing="flat"))
    weights = torch.linspace(-1.0, 2.0, len(logps.values_N))
    parameters = dict(trained_parameters(model))
    found = torch.autograd.grad((weights * logps.values_N).sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_the_adapters_gradients_are_those_over_a_base_written_out(model_folder: Callable[..., Path], architecture: str):
    model = loaded(model_folder(architecture)).model
    with torch.no_grad():  # a new adapter is the identity, and half its gradients are 0
        for name, parameter in trained_parameters(model):
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    found, expected = gradients(model), gradients(with_plain_weights(model))
    assert found.keys() == expected.keys()
    assert len(found) == 2 * len(list(four_bit_layers(model)))
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_every_linear_layer_but_the_head_is_packed(model_folder: Callable[..., Path]):
    model = loaded(model_folder(), frozen=True).model
    names = {name for name, _ in four_bit_layers(model)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert names == linear - {"lm_head"}
    assert len(names) == 14
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    assert num_parameters(model) == num_parameters(loaded(model_folder(), frozen=True, load_in_4bit=False).model)
    assert quantisation_of(model) == FOUR_BITS


@pytest.mark.parametrize("precision", [FLOAT32, BF16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_packing_a_model_that_is_there_is_reading_it_packed(model_folder: Callable[..., Path], architecture: str, precision: Precision):
    """To the bit: the packed weights, the levels' scales, and what the model gives."""
    read = loaded(model_folder(architecture), precision, frozen=True).model
    model = loaded(model_folder(architecture), precision, frozen=True, load_in_4bit=False).model
    pack_layers(model, [name for name, _ in four_bit_layers(read)], precision.autocast or torch.float32)
    expected = dict(four_bit_layers(read))
    assert dict(four_bit_layers(model)).keys() == expected.keys()
    for name, layer in four_bit_layers(model):
        assert torch.equal(layer.weight, expected[name].weight), name
        assert torch.equal(layer.weight.quant_state.absmax, expected[name].weight.quant_state.absmax), name
        assert layer.support_avx512bf16_for_cpu is False
    batch = pack(trees(), sharing="flat")
    with torch.no_grad(), torch.autocast("cpu", dtype=precision.autocast, enabled=precision.autocast is not None):
        found, wanted = (Policy(one.train(False), FLAT)(batch).values_N for one in (model, read))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_would_be_packed_is_known_without_reading_it(
    make_model: Callable[..., Any], model_folder: Callable[..., Path], architecture: str
):
    packed = [layer.weight for _, layer in four_bit_layers(loaded(model_folder(architecture), frozen=True).model)]
    expected = to_be_packed(make_model(architecture))
    assert sorted(quantise.num_weights(weight) for weight in packed) == sorted(weight.numel() for weight in expected)
    for weight in packed:
        state = weight.quant_state
        held = weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        assert packed_bytes(quantise.num_weights(weight)) == held
    assert packed_bytes(4096 * 4096) * 8 / 4096**2 == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("precision", [FLOAT32, BF16])
def test_policy_and_reference_are_the_same_before_the_first_step(model_folder: Callable[..., Path], precision: Precision):
    """Whether the model trains or is looked at: bitsandbytes would multiply otherwise in evaluation mode on some CPUs."""
    mine = loaded(model_folder(), precision)
    assert mine.adapter is not None
    policy = Policy(mine.model, FLAT)
    batch = pack(trees(), sharing="flat")
    found = []
    with torch.autocast("cpu", dtype=precision.autocast, enabled=precision.autocast is not None):
        for training in (True, False, True):
            policy.train(training)
            with torch.no_grad():
                found += [policy(batch).values_N, AdapterOff(policy, mine.adapter).logps(batch).values_N]
        found.append(policy(batch).values_N.detach())
    for values in found[1:]:
        assert torch.equal(values, found[0])


@pytest.mark.parametrize("precision", [FLOAT32, BF16])
def test_sharing_is_proved_on_it(model_folder: Callable[..., Path], precision: Precision):
    proof = prove(loaded(model_folder(), precision).model, max_length=64, autocast=precision.autocast)
    assert proof.path == FLAT


def test_it_is_another_function_and_its_values_are_kept_apart(model_folder: Callable[..., Path]):
    packed, whole = (loaded(model_folder(), load_in_4bit=bits) for bits in (True, False))
    one, other = (cache_context(model, FLAT, FLOAT32, ALONE) for model in (packed, whole))
    assert (one.quantisation, other.quantisation) == (FOUR_BITS, "")
    assert one.digest() != other.digest()
    assert replace(one, weights=other.weights).digest() != other.digest()  # by the quantisation alone
    assert cache_context(loaded(model_folder()), FLAT, FLOAT32, ALONE) == one  # packing is the same every time
    with torch.no_grad():
        values = [Policy(model.model, FLAT)(pack(trees(), sharing="flat")).values_N for model in (packed, whole)]
    adapters = [{name: tensor for name, tensor in model.model.state_dict().items() if "lora_" in name} for model in (packed, whole)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())  # drawn the same
    assert 1e-4 < float((values[0] - values[1]).abs().mean()) < 0.1


def test_all_weights_cannot_be_trained_in_4_bits(model_folder: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ModelError, match=r"in 4 bits cannot be trained itself: .* Give lora_rank too"):
        loaded(model_folder(), lora_rank=0)
    loaded(model_folder(), frozen=True).model.save_pretrained(tmp_path)  # nor where the folder itself is packed
    mine = loaded(model_folder(), frozen=True)
    mine.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="which is kept in 4 bits cannot be trained itself"):
        loaded(tmp_path, lora_rank=0, load_in_4bit=False)
    assert kept_in_4bit(AutoConfig.from_pretrained(tmp_path))
    assert not kept_in_4bit(AutoConfig.from_pretrained(model_folder()))
    again = loaded(tmp_path, load_in_4bit=False)  # an adapter on it can
    assert quantisation_of(again.model) == FOUR_BITS
    assert gradients(again.model)


def test_a_packed_layer_cannot_be_trained_beside_the_adapter_but_the_head_can(model_folder: Callable[..., Path]):
    with pytest.raises(ModelError, match=r"modules_to_save: q_proj, mlp is held in 4 bits and cannot be trained in full"):
        loaded(model_folder(), modules_to_save=["q_proj", "mlp", "lm_head"])
    model = loaded(model_folder(), BF16, modules_to_save=["lm_head"]).model
    trained = dict(trained_parameters(model))
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_without_the_library_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path]):
    monkeypatch.setattr(quantise, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(ConfigError) as caught:
        loaded(model_folder())
    assert str(caught.value).endswith("Install it: pip install 'prefopt[bits]'")
    with pytest.raises(ConfigError, match=r"^--load-in-4bit needs the library bitsandbytes, which is not installed"):
        need_bitsandbytes("--load-in-4bit")


def test_the_arithmetic_is_the_runs(model_folder: Callable[..., Path]):
    assert choose_precision("bf16", CPU, adapter=True) == BF16
    for precision, expected in ((FLOAT32, torch.float32), (BF16, torch.bfloat16)):
        model = loaded(model_folder(), precision).model
        assert {layer.compute_dtype for _, layer in four_bit_layers(model)} == {expected}
        assert model.model.embed_tokens.weight.dtype == expected
        assert {parameter.dtype for _, parameter in trained_parameters(model)} == {torch.float32}
