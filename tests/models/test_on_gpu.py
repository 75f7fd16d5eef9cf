"""Tiny models of many architectures on a GPU, against the plain Hugging Face forward of the same weights on the CPU in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.architectures import ARCHITECTURES, dpo_losses, gradients_of, head_of, pairs, plain_loss, relative_differences, tiny_model

from prefopt.engine.batch import pack
from prefopt.models.load import Precision, load_model
from prefopt.models.policy import Policy, on_device, set_attention, trained_parameters
from prefopt.models.proof import prove
from prefopt.models.quantise import four_bit_layers
from prefopt.models.settings import ModelSettings

pytestmark = pytest.mark.gpu

WIDE: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16},
    "gpt_oss": {"head_dim": 16},
    "deepseek_v3": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16},
}
"""Heads wide enough for FlexAttention, which these need on a GPU."""

CHOSEN = (
    "llama qwen2 qwen3 gemma2 gemma3_text gpt_oss mistral cohere2 phi deepseek_v3 qwen3_moe bloom llama4_text qwen3_next qwen3_5_text lfm2"
)
IN_FLOAT32 = "gpt_oss deepseek_v3 qwen3_moe qwen3_next"
"""Mixtures of experts, whose products torch does not have in float64."""

EXACT = 1e-4
"""Relative difference allowed in float32: a GPU adds up in another order than a CPU, and its exponentials differ in the last bit."""

ROUGH = 0.1
"""And in bf16, where it must not be much worse than the plain forward in bf16 either."""


@dataclass(frozen=True)
class Distances:
    """From the CPU's float64: of the loss, and of all gradients together."""

    loss: float
    gradients: float


def distances(loss: torch.Tensor, gradients: dict[str, torch.Tensor], exact: torch.Tensor, expected: dict[str, torch.Tensor]) -> Distances:
    apart = sum(float((gradients[name].double().cpu() - other).square().sum()) for name, other in expected.items())
    norm = sum(float(other.square().sum()) for other in expected.values())
    return Distances(abs(loss.item() - exact.item()) / abs(exact.item()), (apart / norm) ** 0.5)


@pytest.mark.parametrize("name", CHOSEN.split())
def test_an_architecture(gpu: torch.device, name: str, record_property: Callable[[str, object], None]):
    reference = tiny_model(name, dtype=torch.float32 if name in IN_FLOAT32 else torch.float64, **WIDE.get(name, {}))
    exact = plain_loss(reference)
    expected = gradients_of(reference, exact)

    model = on_device(tiny_model(name, **WIDE.get(name, {})), gpu)
    model.load_state_dict({key: value.to(gpu, torch.float32) for key, value in reference.state_dict().items()})
    proof = prove(model, max_length=64)
    assert (proof.path.sharing, head_of(proof.path)) == (ARCHITECTURES[name].way, ARCHITECTURES[name].head)

    batch = pack(pairs(), sharing=proof.path.sharing, device=gpu)
    loss = dpo_losses(*Policy(model, proof.path)(batch).sum().view(-1, 2).unbind(1)).sum()
    gradients = gradients_of(model, loss)
    found = distances(loss, gradients, exact, expected)
    worst = max(relative_differences({key: value.cpu() for key, value in gradients.items()}, expected).values())
    record_property("float32", f"loss {found.loss:.1e}, gradients {found.gradients:.1e}, worst {worst:.1e}")
    assert found.loss < EXACT
    assert worst < 10 * EXACT

    set_attention(model, None)
    with torch.autocast(gpu.type, dtype=torch.bfloat16):
        plain = plain_loss(model)
        noise = distances(plain, gradients_of(model, plain), exact, expected)
    proof = prove(model, max_length=64, autocast=torch.bfloat16)
    assert proof.path.sharing == ARCHITECTURES[name].way, proof.sentence()
    with torch.autocast(gpu.type, dtype=torch.bfloat16):
        loss = dpo_losses(*Policy(model, proof.path)(batch).sum().view(-1, 2).unbind(1)).sum()
    found = distances(loss, gradients_of(model, loss), exact, expected)
    record_property(
        "bf16", f"loss {found.loss:.1e} (plain {noise.loss:.1e}), gradients {found.gradients:.1e} (plain {noise.gradients:.1e})"
    )
    assert found.loss < max(ROUGH, 3 * noise.loss)
    assert found.gradients < max(ROUGH, 2 * noise.gradients)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_base_in_four_bits_stands_for_the_weights_that_it_does_on_the_cpu(
    gpu: torch.device, model_folder: Callable[..., Path], record_property: Callable[[str, object], None]
):
    """Each weight is at the level at which it is on the CPU, but for a few between two; and the adapter gets the CPU's gradients."""
    from bitsandbytes.functional import dequantize_4bit

    weights, gradients = [], []
    for device in (torch.device("cpu"), gpu):
        settings = ModelSettings(model=str(model_folder()), load_in_4bit=True, lora_rank=4)
        model = load_model(settings, precision=Precision(None, torch.float32), device=device, seed=3).model
        with torch.no_grad():  # a new adapter is the identity, and half its gradients are 0
            for name, parameter in trained_parameters(model):
                if "lora_B" in name:
                    drawn = torch.empty(parameter.shape).normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
                    parameter.copy_(drawn)
        path = prove(model, max_length=64).path
        assert path.sharing == "flat"
        values = [dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu() for _, layer in four_bit_layers(model)]
        weights.append(torch.cat([value.flatten() for value in values]))
        batch = pack(pairs(), sharing="flat", device=device)
        loss = dpo_losses(*Policy(model, path)(batch).sum().view(-1, 2).unbind(1)).sum()
        named = dict(trained_parameters(model))
        gradients.append({name: one.cpu() for name, one in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)})
    moved = float((weights[0] - weights[1]).abs().gt(1e-3 * weights[0].abs().max()).float().mean())
    worst = max(relative_differences(gradients[1], gradients[0]).values())
    record_property("at other levels", moved)
    record_property("gradients", worst)
    assert len(weights[0]) > 10_000
    assert moved < 1e-3
    assert worst < 5e-2
