"""Some layers recompute: the same gradients, less memory, and as many as a run needs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import MakeModel
from tests.training.runs import Asks, run, weights
from torch import Tensor

from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.errors import ConfigError, ModelError
from prefopt.models.load import checkpoint_activations, choose_precision, layers_that_recompute, new_adapter
from prefopt.models.policy import EnginePath, Policy, on_device
from prefopt.models.settings import ModelSettings
from prefopt.training.memory import check as memory
from prefopt.training.memory import estimate
from prefopt.training.memory.available import Available
from prefopt.training.memory.trace import Load, trace_step
from prefopt.trees import Completion, PromptTree, token_ids

DEPTH = 4
CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": DEPTH}

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model(make_model: MakeModel, chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", **SIZES).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def gradients(make_model: MakeModel, layers: int | None, lora_rank: int) -> tuple[list[Tensor], int]:
    """Gradients of a batch in float64, and the bytes that autograd keeps."""
    torch.manual_seed(0)
    model = on_device(make_model("qwen3", head_dim=8, **SIZES), CPU, torch.float64).train()
    if lora_rank:
        new_adapter(model, ModelSettings(model="m", lora_rank=lora_rank), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # at its start an adapter has no gradient in A
        on_device(model, CPU, torch.float64)
    if layers is None or layers:
        checkpoint_activations(model, layers)
    policy = Policy(model, EnginePath("flat", HeadShape()))
    ids = [token_ids([(7 * place + start) % 50 + 1 for place in range(length)]) for start, length in ((0, 12), (3, 5), (9, 8))]
    batch = pack([PromptTree(ids[0], (Completion(ids[1]), Completion(ids[2])))] * 3, sharing="flat")
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = policy(batch)
    logps.values_N.square().sum().backward()
    return [parameter.grad for _, parameter in sorted(model.named_parameters()) if parameter.grad is not None], sum(kept.values())


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradients_are_the_same_whichever_layers_recompute_and_memory_falls_with_each(make_model: MakeModel, lora_rank: int):
    plain, most = gradients(make_model, 0, lora_rank)
    assert plain
    before = most
    for layers in (1, 2, DEPTH, None):
        found, kept = gradients(make_model, layers, lora_rank)
        assert len(found) == len(plain)
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
        assert kept < before or layers is None
        before = kept


def test_the_first_layers_are_those_that_recompute(make_model: MakeModel):
    model = make_model("llama", **SIZES)
    checkpoint_activations(model, 3)
    assert [layer.gradient_checkpointing for layer in layers_that_recompute(model)] == [True, True, True, False]
    checkpoint_activations(model)
    assert all(layer.gradient_checkpointing for layer in layers_that_recompute(model))


def test_more_layers_than_there_are_is_a_mistake(make_model: MakeModel):
    with pytest.raises(ModelError, match=f"9 layers were asked for, and the model has {DEPTH}"):
        checkpoint_activations(make_model("llama", **SIZES), 9)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *[(value, "on") for value in (True, "on", "ON", "true", "yes")],
        *[(value, "off") for value in (False, "off", "false", "no", 0, "0")],
        *[("auto", "auto"), (3, 3), ("12", 12), (1, 1), ("1", 1)],
    ],
)
def test_a_switch_or_a_number(given: Any, expected: Any):
    assert ModelSettings(model="m", gradient_checkpointing=given).gradient_checkpointing == expected


@pytest.mark.parametrize("given", [-1, "-1", 0.5, "half", "1.5", None, [1]])
def test_anything_else_is_a_mistake(given: Any):
    with pytest.raises(ValueError, match="off, on, auto or a number of layers"):
        ModelSettings(model="m", gradient_checkpointing=given)


def test_a_traced_step_takes_less_with_each_layer_that_recomputes(make_model: MakeModel, tmp_path: Path):
    make_model("llama", **(SIZES | {"num_hidden_layers": 12})).save_pretrained(tmp_path)
    settings, precision = ModelSettings(model=str(tmp_path)), choose_precision("float32", CPU, adapter=False)

    def peak(layers: int | None) -> float:
        return trace_step(settings, precision, Load(600, (50, 50, 50), True, layers, "cpu", False), depth=12).peak

    found = [peak(layers) for layers in (0, 1, 4, 6, 9, 12)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.5 * found[-1]
    assert peak(None) == found[-1]


def test_a_run_that_would_not_fit_lets_layers_recompute_says_so_and_comes_to_the_same(
    model: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    monkeypatch.setattr(estimate, "LIBRARIES", 0)  # more than all that so small a model takes
    free = Available(10**12, "of this machine")
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    run("dpo", model, pairs, tmp_path / "roomy", memory_check=True)
    checks: list[memory.MemoryCheck] = []
    real = memory.MemoryCheck.fitting_layers

    def seen(self: memory.MemoryCheck, micro: memory.Micro) -> int | None:
        checks.append(self)
        needed = self.estimate(micro)
        tight = memory.MemoryCheck(self.method, self.settings, 1, self.device, Available(needed.total - 1, "of this machine"))
        return real(tight, micro)

    monkeypatch.setattr(memory.MemoryCheck, "fitting_layers", seen)
    told = Asks(lambda _: None)
    run("dpo", model, pairs, tmp_path / "tight", memory_check=True, narrator=told)
    assert checks
    assert any("recompute their activations" in line for line in told.said), told.said
    assert weights(tmp_path / "tight") == weights(tmp_path / "roomy")
    told.said.clear()
    run("dpo", model, pairs, tmp_path / "off", memory_check=True, narrator=told, gradient_checkpointing="off")
    assert not any("recompute" in line for line in told.said)


def test_offload_on_a_cpu_is_refused(model: Path, pairs: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="nothing would be gained"):
        run("dpo", model, pairs, tmp_path / "out", offload_activations=True)
