"""What is known about a model from its folder: how its prompts were written, and what it was compared with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.training.runs import pair_rows, run, write_rows
from transformers import PreTrainedTokenizerFast

from prefopt.errors import ModelError
from prefopt.models.speakers import Weights
from prefopt.pipeline.trained import Trained, look_up


def test_a_run_and_its_model_tell_the_same(lora_run: Path):
    known = look_up(str(lora_run))
    assert known.files is not None
    assert known.config["lora_rank"] == 4
    inside = look_up(str(lora_run / "model"))
    assert inside.config == known.config
    assert inside.text_as == known.text_as == "raw"


def test_what_is_no_run_tells_nothing(model_folder: Callable[..., Path], tmp_path: Path):
    (tmp_path / "config.yaml").write_text("learning: [unclosed")
    for name in (str(model_folder()), str(tmp_path), "org/model", "/no/such/folder"):
        known = look_up(name)
        assert (known.files, dict(known.config), known.text_as) == (None, {}, None)


def test_how_training_read_its_prompts(full_run: Path, chat_run: Path, sft_run: Path, model_folder: Callable[..., Path], tmp_path: Path):
    assert look_up(str(full_run)).text_as == "raw"
    assert look_up(str(sft_run)).text_as == "raw"
    assert look_up(str(chat_run)).text_as == "chat"
    run("dpo", model_folder(), write_rows(tmp_path / "pairs.jsonl", pair_rows()), tmp_path / "as-chat", text_as="chat", max_steps=1)
    assert look_up(str(tmp_path / "as-chat")).text_as == "chat"
    for name in ("manifest.json", "summary.json"):  # an old run, or one whose notes were deleted
        (tmp_path / "as-chat" / name).unlink(missing_ok=True)
    assert look_up(str(tmp_path / "as-chat")).text_as == "chat"


def test_raw_or_chat_as_asked_as_in_training_or_by_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
):
    assert Trained(text_as="raw").meant("auto", chat_tokenizer) == ("raw", "as in training")
    assert Trained(text_as="raw").meant("chat", chat_tokenizer) == ("chat", "as asked")
    assert Trained().meant("auto", chat_tokenizer) == ("chat", "for the tokenizer has a chat template")
    assert Trained().meant("auto", tokenizer) == ("raw", "for the tokenizer has no chat template")


# What it was compared with.


def reference(folder: Path) -> Weights | None:
    return look_up(str(folder)).reference(Weights.of(str(folder)))


def test_the_reference_is_where_the_run_began(
    full_run: Path, lora_run: Path, continued_run: Path, sft_run: Path, model_folder: Callable[..., Path]
):
    base = str(model_folder())
    assert reference(full_run) == Weights(base, None)
    assert reference(lora_run) == Weights(base, None)
    began = reference(continued_run)
    assert began is not None
    assert (began.source, began.adapter) == (base, str(lora_run / "model"))
    assert reference(sft_run) is None


def test_another_reference_and_an_adapter_beside_its_base(lora_run: Path, model_folder: Callable[..., Path], tmp_path: Path):
    other = str(shutil.copytree(model_folder("llama", seed=1), tmp_path / "other"))
    folder = Path(shutil.copytree(lora_run, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"reference": other}))
    assert reference(folder) == Weights(other, None)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"lora_rank": 0, "adapter": str(lora_run)}))
    began = reference(folder)
    assert began is not None
    assert (began.source, began.adapter) == (str(model_folder()), str(lora_run / "model"))


def test_relative_paths_are_meant_from_where_the_run_was_started(
    full_run: Path, model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(model_folder(), tmp_path / "project" / "models" / "start")
    folder = Path(shutil.copytree(full_run, tmp_path / "project" / "runs" / "dpo"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"out": "runs/dpo", "model": "models/start"}))
    elsewhere = reference(folder)
    assert elsewhere is not None
    assert elsewhere.source == str(tmp_path / "project" / "models" / "start")
    monkeypatch.chdir(tmp_path / "project")
    assert reference(Path("runs/dpo")) == Weights("models/start", None)
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    assert look_up(str(moved)).from_where_it_ran("models/start") == "models/start"


def test_a_start_that_is_gone_is_said(full_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(full_run, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"model": "/moved/away"}))
    with pytest.raises(ModelError, match="no folder /moved/away"):
        reference(folder)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "a" * 300])
def test_names_that_no_folder_can_have_tell_nothing(name: str):
    assert look_up(name) == Trained()
