"""`merge` from a run to a folder: the saved model is the one that was trained, or nothing is saved."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.errors import ModelError, RunError
from prefopt.models.load import LoadedModel, Precision, load_model
from prefopt.models.merge import MERGED, Change, ModuleChange
from prefopt.models.settings import ModelSettings
from prefopt.pipeline import merge as merging
from prefopt.pipeline.merge import MergeResult, merge
from prefopt.pipeline.merge_check import Comparison, Unmerged, compare
from prefopt.pipeline.merge_settings import MergeSettings
from prefopt.pipeline.merge_words import card, loses_too_much, loss_lines
from prefopt.pipeline.texts import Texts
from prefopt.pipeline.trained import look_up
from prefopt.trees import Completion, PromptTree, token_ids

IDS = torch.arange(4, 40)[None]


def merged(adapter: Path | str, out: Path, **settings: Any) -> tuple[MergeResult, str]:
    said: list[str] = []
    result = merge(MergeSettings(adapter=str(adapter), out=out, **settings), say=said.append)
    return result, "\n".join(said)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return found


def trained(run: Path) -> LoadedModel:
    return load_model(ModelSettings(model=str(run)), precision=Precision(None, torch.float32), device=torch.device("cpu"), seed=0)


def weak(run: Path, out: Path, scale: float) -> Path:
    """The run with an adapter that does `scale` times as much."""
    copied = Path(shutil.copytree(run, out))
    weights = load_file(copied / "model" / "adapter_model.safetensors")
    save_file(
        {name: tensor * scale if "lora_B" in name else tensor for name, tensor in weights.items()},
        copied / "model" / "adapter_model.safetensors",
    )
    return copied


@pytest.mark.parametrize("which", ["lora_run", "continued_run", "chat_run"])
def test_a_run_becomes_a_model_that_transformers_loads(which: str, request: pytest.FixtureRequest, tmp_path: Path):
    run: Path = request.getfixturevalue(which)
    result, said = merged(run, tmp_path / "out")
    with torch.no_grad():
        expected = trained(run).model.eval()(IDS).logits
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-5)
    assert result.folder == tmp_path / "out"
    assert result.comparison.merged < result.comparison.allowed == 1e-4
    assert result.comparison.saved_largest < 1e-4 < result.comparison.effect
    assert result.comparison.margins_moved is not None
    assert "examples of the run" in said
    assert "changes 14 layers" in said
    assert "WARNING" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_lies_beside_the_weights(chat_run: Path, lora_run: Path, tmp_path: Path):
    merged(chat_run, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(chat_run / "model").chat_template
    assert json.loads((tmp_path / "chat" / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert look_up(str(tmp_path / "chat")).text_as == "chat"
    merged(lora_run, tmp_path / "raw")
    assert look_up(str(tmp_path / "raw")).text_as == "raw"  # though its tokenizer has a chat template
    page = (tmp_path / "raw" / "README.md").read_text()
    head = yaml.safe_load(page.split("---")[1])
    assert head["library_name"] == "transformers"
    assert "lora" not in head["tags"]
    assert "AutoModelForCausalLM.from_pretrained(folder)" in page
    assert "AutoPeft" not in page
    for part in ("One model of a trained adapter and its base", "## How it was merged", "## Training data", "## Results", "## Limits"):
        assert part in page
    assert str(tmp_path) not in page
    assert "merged in float32 by prefopt and saved in float32" in page
    notes = json.loads((tmp_path / "raw" / MERGED).read_text())
    assert notes["comparison"]["merged"] < 1e-4
    assert not any((tmp_path / "raw" / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors"))


def test_an_adapter_without_a_run(lora_run: Path, tmp_path: Path):
    adapter = Path(shutil.copytree(lora_run / "model", tmp_path / "adapter"))
    result, said = merged(adapter, tmp_path / "out")
    assert "texts drawn from the tokenizer's vocabulary" in said
    assert result.comparison.margins_moved is None
    page = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(page.split("---")[1]) == {"library_name": "transformers"}
    assert "## Results" not in page
    with torch.no_grad():
        assert torch.allclose(logits(tmp_path / "out"), trained(lora_run).model.eval()(IDS).logits, atol=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink(missing_ok=True)
    merged(adapter, tmp_path / "bare")
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").chat_template  # the base's


# Fewer bits.


def test_rounding_is_measured_and_warned_of_where_it_takes_much(lora_run: Path, tmp_path: Path):
    strong, said = merged(lora_run, tmp_path / "strong", precision="bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "strong" / "model.safetensors").values()} == {torch.bfloat16}
    assert 0 < strong.change.lost < 0.1
    assert "WARNING" not in said
    assert "what saving in bf16 loses" in said
    small, said = merged(weak(lora_run, tmp_path / "weak", 3e-4), tmp_path / "small", precision="bf16")
    assert small.change.lost > 1
    assert small.comparison.saved_mean > 0.5 * small.comparison.effect
    assert "WARNING: bf16 loses a good part of what was learned: rounding the base, which is kept in more bits" in said
    assert "Save in float32 (leave --precision out), or serve the base as it is with the adapter beside it." in said
    kept, said = merged(tmp_path / "weak", tmp_path / "kept", precision="float16")
    assert kept.change.lost < small.change.lost / 4


def test_on_a_base_that_is_kept_in_bf16_a_small_change_vanishes(lora_run: Path, model_folder: Callable[..., Path], tmp_path: Path):
    base = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    run = weak(lora_run, tmp_path / "run", 1e-4)
    result, said = merged(run, tmp_path / "out", model=str(base), precision="bf16")
    assert result.change.base_is_rounded
    assert result.change.vanished > 0.95
    assert result.change.lost == pytest.approx(1, abs=0.05)
    assert (
        "WARNING: bf16 loses a good part of what was learned: the base is kept in bf16, and whatever is smaller than half the gap" in said
    )
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 0.95 < float((after[name] == before[name]).float().mean()) < 1
    full, _ = merged(run, tmp_path / "full", model=str(base))  # the same in float32 keeps it
    assert full.comparison.saved_largest < 1e-5
    assert not torch.equal(logits(tmp_path / "full"), logits(base))


def test_weights_beyond_float16_are_refused(lora_run: Path, model_folder: Callable[..., Path], tmp_path: Path):
    base = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][0] = 1e6  # of padding, which no text holds
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"float16 cannot hold all weights: model.embed_tokens.weight has numbers beyond its largest"):
        merged(lora_run, tmp_path / "out", model=str(base), precision="float16")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_nothing_is_said(lora_run: Path, tmp_path: Path):
    result, said = merged(weak(lora_run, tmp_path / "run", 0.0), tmp_path / "out", precision="bf16")
    assert result.change.is_nothing
    assert "the adapter changes no weight at all" in said
    assert "WARNING" not in said


# What does not fit together.


def changed_adapter(run: Path, out: Path, **values: object) -> Path:
    copied = Path(shutil.copytree(run / "model", out))
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | values))
    return copied


def test_a_base_that_has_moved_is_asked_for_and_can_be_given(lora_run: Path, model_folder: Callable[..., Path], tmp_path: Path):
    adapter = changed_adapter(lora_run, tmp_path / "adapter", base_model_name_or_path="/old/model")
    with pytest.raises(ModelError, match=r"is an adapter of /old/model, which is not there any more. Give its place with --model.$"):
        merged(adapter, tmp_path / "out")
    _, said = merged(adapter, tmp_path / "out", model=str(model_folder()))
    assert "note" not in said  # it is called the same
    other = changed_adapter(lora_run, tmp_path / "other", base_model_name_or_path="/old/qwen")
    _, said = merged(other, tmp_path / "noted", model=str(model_folder()))
    assert "note: the adapter names /old/qwen as its base" in said
    nameless = changed_adapter(lora_run, tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(ModelError, match=r"does not name its base. Give the model that it was trained on with --model"):
        merged(nameless, tmp_path / "never")


def test_another_base_of_the_same_shapes_is_seen_by_what_the_run_noted(lora_run: Path, model_folder: Callable[..., Path], tmp_path: Path):
    sharper = Path(shutil.copytree(model_folder("llama", seed=1), tmp_path / "model"))
    weights = load_file(sharper / "model.safetensors")
    weights["lm_head.weight"] *= 20
    save_file(weights, sharper / "model.safetensors", metadata={"format": "pt"})
    _, said = merged(lora_run, tmp_path / "out", model=str(sharper))
    *_, warned, last = said.splitlines()  # not lost above the figures, which look well
    assert last == f"model: {tmp_path / 'out'}"
    doubt = (
        r"is probably not the model that the adapter was trained on: its log-probs differ by (\d\.\d\d) nats per token from those that "
        r"the run noted before its first step"
    )
    found = re.match(f"WARNING: {re.escape(str(sharper))} {doubt}", warned)
    assert found is not None
    assert "Give that model with --model, and --overwrite to replace this one." in warned
    assert "note:" not in said
    page = (tmp_path / "out" / "README.md").read_text()
    assert re.search(rf"\*\*WARNING: `model` {doubt}", page.split("## How it was merged")[1].split("```")[0])
    assert str(tmp_path) not in page
    notes = json.loads((tmp_path / "out" / MERGED).read_text())
    assert f"{notes['base_moved']:.2f}" == found[1]
    merged(lora_run, tmp_path / "right")
    assert "WARNING" not in (tmp_path / "right" / "README.md").read_text()
    assert json.loads((tmp_path / "right" / MERGED).read_text())["base_moved"] < 1e-4


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("full_run", r"holds a whole model: there is no adapter to merge, and it can be used as it is"),
        ("nothing", r"holds no adapter: there is no adapter_config.json in it. Give the folder of a run or of an adapter"),
        ("absent", r"no folder .*absent"),
    ],
)
def test_what_is_no_adapter(which: str, says: str, request: pytest.FixtureRequest, tmp_path: Path):
    (tmp_path / "nothing").mkdir()
    given = request.getfixturevalue(which) if which == "full_run" else tmp_path / which
    with pytest.raises(ModelError, match=says):
        merged(given, tmp_path / "out")


def test_an_adapter_as_base_is_refused(lora_run: Path, continued_run: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"is an adapter itself. Give the whole model"):
        merged(continued_run, tmp_path / "out", model=str(lora_run))


def test_a_damaged_config_is_named(lora_run: Path, tmp_path: Path):
    adapter = Path(shutil.copytree(lora_run / "model", tmp_path / "adapter"))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json cannot be read. The folder is damaged"):
        merged(adapter, tmp_path / "out")


# Nothing wrong is ever published.


def test_a_merge_that_goes_wrong_is_refused(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = merging.merge_weights

    def wrong(loaded: LoadedModel, dtype: torch.dtype) -> Any:
        model, change = right(loaded, dtype)
        dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"].data.mul_(1.01)
        return model, change

    monkeypatch.setattr(merging, "merge_weights", wrong)
    with pytest.raises(ModelError, match=r"did not give the same model: log-probs differ by up to .* arithmetic alone explains 0.0001"):
        merged(lora_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_back_otherwise_is_refused(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = merging.write_model

    def wrong(model: Any, tokenizer: Any, folder: Path, **settings: Any) -> None:
        right(model, tokenizer, folder, **settings)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.weight"] *= 3
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_model", wrong)
    with pytest.raises(ModelError, match="the model read back from disk is not the one that was written"):
        merged(lora_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Where it is written.


def test_a_folder_that_holds_something_is_left_alone(lora_run: Path, tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"mine is not empty. Give another folder as out, or --overwrite"):
        merged(lora_run, mine)
    with pytest.raises(RunError, match=rf"mine holds no merged model \(no {MERGED}\), so --overwrite does not replace it"):
        merged(lora_run, mine, overwrite=True)
    with pytest.raises(RunError, match=r"is a file. Give a folder as out"):
        merged(lora_run, mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    merged(lora_run, empty)
    assert (empty / "model.safetensors").is_file()


def test_a_merged_model_is_replaced_when_asked_and_only_by_a_whole_one(
    lora_run: Path, chat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    merged(lora_run, out)
    before = (out / "model.safetensors").read_bytes()
    (out / "left-over").write_text("of the old one")
    with pytest.raises(RunError, match="or --overwrite to replace the merged model in it"):
        merged(chat_run, out)

    def broken(*args: Any) -> None:
        raise RunError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_notes", broken)
        with pytest.raises(RunError, match="no room"):
            merged(chat_run, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    merged(chat_run, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert not (out / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_base_in_the_folder_is_not_overwritten(lora_run: Path, tmp_path: Path):
    out = tmp_path / "out"
    merged(lora_run, out)
    with pytest.raises(RunError, match=r"out lies in .*out, and --overwrite would delete it"):
        merged(lora_run, out, model=str(out), overwrite=True)


def test_too_little_room_is_seen_before_any_work(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(
        RunError, match=r"the model takes 0.00 GB, and 0.00 GB are free in .*Make room, give another folder as out, or save"
    ):
        merged(lora_run, tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_merge_leaves_nothing_in_the_way(lora_run: Path, tmp_path: Path):
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / "half.safetensors").write_text("of a model")
    merged(lora_run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The figures, by hand.

PAIRS = Texts(
    tuple(PromptTree(token_ids([1]), (Completion(token_ids([2, 3])), Completion(token_ids([4])))) for _ in range(2)), True, "two pairs"
)


def test_figures_by_hand():
    # Tokens: chosen a, chosen b, rejected; of two pairs.
    alone = torch.tensor([-1.0, -1.0, -1.0, -2.0, -2.0, -3.0])
    trained = torch.tensor([-0.5, -1.0, -1.5, -2.0, -1.9, -3.0])
    saved = torch.tensor([-0.7, -1.0, -1.4, -2.0, -2.2, -3.0])
    unmerged = Unmerged(PAIRS, trained, alone, noise=1e-6)
    found = compare(unmerged, trained + 1e-6, saved)
    assert found.num_tokens == 6
    assert found.effect == pytest.approx((0.5 + 0.5 + 0.1) / 6)
    assert found.merged == pytest.approx(1e-6, rel=0.2)
    assert found.saved_largest == pytest.approx(0.3)
    assert found.saved_mean == pytest.approx((0.2 + 0.1 + 0.3) / 6)
    # Margins moved by +1.0 and +0.1 in training, by +0.7 and −0.2 as saved.
    assert found.margins_moved == pytest.approx((0.3 + 0.3) / (1.0 + 0.1))
    assert (found.preferences_lost, found.num_pairs) == (1, 2)


def test_the_noise_of_the_arithmetic_decides_what_is_the_same():
    zero = torch.zeros(6)
    assert Unmerged(PAIRS, zero, zero, noise=1e-7).allowed == 1e-4
    assert Unmerged(PAIRS, zero, zero, noise=1e-4).allowed == pytest.approx(8e-4)
    assert Unmerged(PAIRS, zero, zero, noise=1.0).allowed == 1e-2
    with pytest.raises(ModelError, match="differ by up to inf"):
        Unmerged(PAIRS, zero, zero, noise=0.0).refuse_other(torch.tensor([float("nan")]), torch.zeros(1), "broken")


@pytest.mark.parametrize(
    ("saved_mean", "margins", "lost", "warns"),
    [(0.009, 0.09, 0.49, False), (0.011, 0.09, 0.0, True), (0.009, 0.11, 0.0, True), (0.009, None, 0.51, True), (0.009, None, 0.0, False)],
)
def test_when_to_warn(saved_mean: float, margins: float | None, lost: float, warns: bool):
    comparison = Comparison("texts", 6, 1e-6, 1e-4, 0.1, 1e-6, saved_mean, 0.1, margins, 0, 2)
    change = Change((ModuleChange("layer.weight", 1.0, lost, 10, 5, False),))
    assert loses_too_much(comparison, change) is warns
    assert any("WARNING" in line for line in loss_lines(comparison, change, "bf16")) is warns
    assert not any("WARNING" in line for line in loss_lines(comparison, change, "float32"))


def test_a_hub_base_is_named_on_the_page():
    comparison = Comparison("texts", 6, 1e-6, 1e-4, 0.1, 1e-6, 0.0, 0.0, None, 0, 0)
    page = card(
        "org/base", "/somewhere/runs/dpo/model", None, "float32", comparison, Change((ModuleChange("layer.weight", 1, 0, 1, 0, True),))
    )
    assert yaml.safe_load(page.split("---")[1]) == {"library_name": "transformers", "base_model": "org/base"}
    assert "`org/base` with the adapter `dpo` in its weights" in page
