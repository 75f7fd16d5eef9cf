"""Who answers: one model in memory where the weights are the same, and each speaker itself whatever the other one did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefopt.errors import ConfigError, ModelError
from prefopt.models.load import LoadedModel, Precision, load_model
from prefopt.models.policy import trained_parameters
from prefopt.models.save import save_model
from prefopt.models.settings import ModelSettings
from prefopt.models.speakers import Speaker, Weights, adapter_folder, device_named, load_speakers
from prefopt.trees import Completion, PromptTree, token_ids

CPU = torch.device("cpu")
IDS = torch.arange(4, 30)[None]
FLOAT32 = Precision(None, torch.float32)


def saved_adapter(base: Path, out: Path, seed: int, **settings: object) -> LoadedModel:
    """A saved LoRA adapter, all its weights other than at the start."""
    made = load_model(ModelSettings(model=str(base), lora_rank=2, **settings), precision=FLOAT32, device=CPU, seed=seed)
    with torch.no_grad():
        for _, parameter in trained_parameters(made.model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)
    save_model(made, out)
    return made


@pytest.fixture
def base(model_folder: Callable[..., Path]) -> Path:
    return model_folder()


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    saved_adapter(base, tmp_path / "adapter", 1, modules_to_save=["lm_head"])
    return tmp_path / "adapter"


@pytest.fixture
def other_adapter(base: Path, tmp_path: Path) -> Path:
    saved_adapter(base, tmp_path / "other", 2, modules_to_save=["lm_head"])
    return tmp_path / "other"


def speakers(policy: Path | str, reference: Path | str | None, **places: str) -> tuple[Speaker, ...]:
    one = Weights.of(str(policy), places.get("adapter"))
    return load_speakers(one, None if reference is None else Weights.of(str(reference)), precision="float32", device=CPU)


def logits(speaker: Speaker) -> torch.Tensor:
    with speaker.speaking() as model:
        found: torch.Tensor = model(IDS).logits
    return found


def expected(base: Path, adapter: Path | None = None) -> torch.Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = load_model(ModelSettings(model=str(adapter)), precision=FLOAT32, device=CPU, seed=0).model
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_an_adapter_and_its_base_are_one_model_in_memory(base: Path, adapter: Path):
    policy, reference = speakers(adapter, base)
    assert policy.model is reference.model
    with_adapter, without = expected(base, adapter), expected(base)
    assert (with_adapter - without).abs().max() > 0.01
    for _ in range(2):  # they take turns
        assert torch.equal(logits(policy), with_adapter)
        assert torch.equal(logits(reference), without)


def test_two_adapters_of_one_base_are_one_model_in_memory(base: Path, adapter: Path, other_adapter: Path):
    policy, reference = speakers(adapter, other_adapter)
    assert policy.model is reference.model
    for _ in range(2):
        assert torch.equal(logits(policy), expected(base, adapter))
        assert torch.equal(logits(reference), expected(base, other_adapter))


def test_the_base_as_policy_beside_its_adapter(base: Path, adapter: Path):
    policy, reference = speakers(base, adapter)
    assert policy.model is reference.model
    assert torch.equal(logits(policy), expected(base))
    assert torch.equal(logits(reference), expected(base, adapter))


def test_two_whole_models_are_two(base: Path, tmp_path: Path):
    other = Path(shutil.copytree(base, tmp_path / "copy"))
    policy, reference = speakers(base, other)
    assert policy.model is not reference.model
    assert torch.equal(logits(policy), logits(reference))
    assert (policy.role, reference.role) == ("policy", "reference")
    assert [speaker.role for speaker in speakers(base, None)] == ["policy"]


def test_one_model_twice_is_one_in_memory(base: Path):
    policy, reference = speakers(base, base)
    assert policy.model is reference.model
    assert (policy.role, reference.role) == ("policy", "reference")


def test_adapters_are_switched_only_when_the_other_one_speaks(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    policy, reference = speakers(adapter, base)
    assert policy.switch is not None
    switched: list[str] = []
    kind = type(policy.switch.adapter.base_model)
    for name in ("disable_adapter_layers", "enable_adapter_layers"):
        right = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda model, name=name, right=right: (switched.append(name), right(model))[1])
    for speaker in (policy, policy, reference, reference, reference, policy):
        logits(speaker)
    assert switched == ["disable_adapter_layers", "enable_adapter_layers"]


def test_a_base_that_was_moved_is_given_beside_its_adapter(base: Path, adapter: Path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/moved/away"}))
    with pytest.raises(ModelError, match="If the base has moved, give it as model and this folder as adapter"):
        speakers(adapter, None)
    (policy,) = speakers(base, None, adapter=str(adapter))
    assert policy.weights.adapter == str(adapter)
    one, other = speakers(base, base, adapter=str(adapter))
    assert torch.equal(logits(one), logits(policy))
    assert one.model is other.model


def test_nothing_is_left_to_train_and_no_mode_is_left_on(base: Path, adapter: Path, other_adapter: Path):
    for speaker in speakers(adapter, other_adapter):
        with speaker.speaking() as model:
            assert not model.training
            assert not any(module.training for module in model.modules())
            assert not model(IDS).logits.requires_grad


def test_log_probabilities_are_the_models_own(base: Path, adapter: Path):
    trees = [
        PromptTree(token_ids([5, 6, 7]), (Completion(token_ids([8, 9])), Completion(token_ids([10])))),
        PromptTree(token_ids([5]), (Completion(token_ids([30, 31, 32])), Completion(token_ids([33, 34])))),
    ]
    policy, reference = speakers(adapter, base)
    for speaker in (policy, reference):
        found = speaker.logps(trees)
        by_hand = []
        for tree in trees:
            for completion in tree.completions:
                ids = torch.tensor([*tree.prompt_ids.tolist(), *completion.ids.tolist()])
                with speaker.speaking() as model:
                    logps = model(ids[None]).logits[0].log_softmax(-1)
                first = len(tree.prompt_ids)
                by_hand.append(sum(float(logps[place - 1, ids[place]]) for place in range(first, len(ids))))
        assert torch.allclose(found, torch.tensor(by_hand), atol=1e-5)


def test_a_run_stands_for_its_adapter(adapter: Path, tmp_path: Path):
    shutil.copytree(adapter, tmp_path / "run" / "model")
    assert adapter_folder(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert adapter_folder(str(adapter)) == str(adapter)
    with pytest.raises(ModelError, match=r"no folder /no/such/adapter"):
        adapter_folder("/no/such/adapter")
    with pytest.raises(ModelError, match="the hub gave no adapter of that name"):
        adapter_folder("nobody/nothing")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto").type == "cpu"
    with pytest.raises(ConfigError, match="device cuda: there is no GPU"):
        device_named("cuda")


def test_what_the_model_says_about_its_limits(base: Path):
    (policy,) = speakers(base, None)
    assert policy.context == 512
    assert policy.end_ids == {policy.tokenizer.eos_token_id}
    policy.model.generation_config.eos_token_id = [7, 9]
    assert policy.end_ids == {7, 9, policy.tokenizer.eos_token_id}
