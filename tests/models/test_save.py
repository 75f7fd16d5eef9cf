"""What is saved loads in transformers and in peft, and is the model that was trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prefopt.errors import RunError
from prefopt.models.load import LoadedModel, choose_precision, load_model
from prefopt.models.policy import trained_parameters
from prefopt.models.save import save_model
from prefopt.models.settings import ModelSettings

CPU = torch.device("cpu")
IDS = torch.arange(4, 30)[None]


def trained(folder: Path, *, precision: str = "float32", **settings: object) -> LoadedModel:
    wanted = choose_precision(precision, CPU, adapter="lora_rank" in settings)
    loaded = load_model(ModelSettings(model=str(folder), **settings), precision=wanted, device=CPU, seed=0)
    with torch.no_grad():
        for _, parameter in trained_parameters(loaded.model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    return loaded


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_full_model_loads_in_transformers_in_float32(model_folder: Callable[..., Path], tmp_path: Path, precision: str):
    loaded = trained(model_folder(), precision=precision)
    save_model(loaded, tmp_path / "deep" / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "model")
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(loaded.model))
    assert json.loads((tmp_path / "deep" / "model" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_loads_in_peft(model_folder: Callable[..., Path], tmp_path: Path, settings: dict[str, object]):
    loaded = trained(model_folder(), lora_rank=2, **settings)
    save_model(loaded, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    by_itself = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    on_the_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder()), tmp_path / "adapter")
    for again in (by_itself, on_the_base):
        assert torch.equal(logits(again), logits(loaded.model))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in saved.values()) == sum(parameter.numel() for _, parameter in trained_parameters(loaded.model))


def test_the_tokenizer_comes_with_it_and_carries_the_template_of_the_data(model_folder: Callable[..., Path], tmp_path: Path):
    loaded = trained(model_folder())
    own = loaded.tokenizer.chat_template
    save_model(loaded, tmp_path / "own")
    save_model(loaded, tmp_path / "other", chat_template="{{ messages[0]['content'] }}")
    assert loaded.tokenizer.chat_template == own
    message = [{"role": "user", "content": "hello"}]
    assert AutoTokenizer.from_pretrained(tmp_path / "own").apply_chat_template(message, tokenize=False) == "<begin><turn>user\nhello<end>\n"
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert other.apply_chat_template(message, tokenize=False) == "hello"
    assert other("hello there")["input_ids"] == loaded.tokenizer("hello there")["input_ids"]


def test_generation_ends_at_the_end_of_a_turn(model_folder: Callable[..., Path], tmp_path: Path):
    loaded = trained(model_folder())
    turn, end = (loaded.tokenizer.convert_tokens_to_ids(token) for token in ("<turn>", "<end>"))
    save_model(loaded, tmp_path / "model", end_of_turn="<turn>")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id == [end, turn]


def test_what_the_folder_held_is_replaced(model_folder: Callable[..., Path], tmp_path: Path):
    folder = tmp_path / "model"
    save_model(trained(model_folder(), lora_rank=2), folder)
    (folder / "note.txt").touch()
    for left in (".model.new", ".model.old"):  # a process was killed while it was writing
        shutil.copytree(folder, tmp_path / left)
    save_model(trained(model_folder()), folder)
    assert not (folder / "note.txt").exists()
    assert not (folder / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error"), Exception("No space left")])
@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_a_disk_that_fills_up_leaves_what_was_there(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
):
    folder = tmp_path / "model"
    loaded = trained(model_folder())
    save_model(loaded, folder)
    before, template = content(folder), loaded.tokenizer.chat_template

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(getattr(loaded, where)), "save_pretrained", fail)
    with pytest.raises(RunError, match=r"cannot write the model to .*model: .*Make room and go on with --resume: the last checkpoint"):
        save_model(loaded, folder, chat_template="other")
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert loaded.tokenizer.chat_template == template


def test_a_folder_that_cannot_be_put_in_place_leaves_what_was_there(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "model"
    loaded = trained(model_folder())
    save_model(loaded, folder)
    before = content(folder)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == ".model.new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RunError, match="Input/output error"):
        save_model(loaded, folder)
    assert content(folder) == before


def test_a_path_below_a_file(model_folder: Callable[..., Path], tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write the model to .*file/model: .*Not a directory"):
        save_model(trained(model_folder()), tmp_path / "file" / "model")


def test_a_generation_config_that_transformers_would_refuse_is_mended(model_folder: Callable[..., Path], tmp_path: Path):
    loaded = trained(model_folder())
    loaded.model.generation_config = GenerationConfig(eos_token_id=2, temperature=0.6, top_p=0.9)  # as published models have it
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        loaded.model.save_pretrained(tmp_path / "refused")
    save_model(loaded, tmp_path / "model")
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.eos_token_id) == (True, 0.6, 0.9, 2)
    loaded.model.generation_config.num_beams = 0  # nothing that do_sample could mend
    save_model(loaded, tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == 2
