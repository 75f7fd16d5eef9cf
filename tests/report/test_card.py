"""The model card: true, complete, and without a trace of the machine."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.report.made import FINDINGS, make_run
from tests.training.runs import pair_rows, run, write_rows

from prefopt.errors import ConfigError
from prefopt.report.card import escaped, model_card, scrubbed, shared_name
from prefopt.report.record import read_run


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0].replace("\u00a0", " ")


def with_adapter(path: Path) -> Path:
    folder = make_run(path, settings={"lora_rank": 16})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"] |= {"adapter": True}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_card_says_what_was_done_and_what_came_of_it(tmp_path: Path):
    card = model_card(make_run(tmp_path / "run", findings=FINDINGS))
    assert "# qwen-small, trained with DPO" in card
    assert "All weights of `qwen-small` (Qwen2ForCausalLM), trained with prefopt. Direct Preference Optimization" in card
    data = section(card, "Training data")
    assert "| pairs.jsonl | 1,012 | prompt, chosen and rejected as text (text\\_pair) |" in data
    assert "| rows left out | 12: too\\_long 10, same\\_answers 2 |" in data
    assert "| fingerprint | 8177db1f36aa0eeba19f7bbf46630720044eb568 |" in data
    assert "- 4 examples repeat an earlier one exactly (kept)" in data
    settings = section(card, "Settings")
    assert "| beta | 0.1 |" in settings
    assert "label_smoothing: 0" in settings
    results = section(card, "Results")
    assert "Of 60 held-out pairs the chosen answer now has the higher reward in 73 % (standard error 6 %)" in results
    assert "| Accuracy | 50 % | 73 % | 6 % | 60 |" in results
    assert "| Margin | 0 | 0.446 | 0.087 | 60 |" in results
    assert "| Length of sampled answers (tokens) | 12 | 29 | – | 4 |" in results
    watch = section(card, "What the watch found")
    assert watch.count("- **Warning**, after step 60: The chosen answers have become less likely") == 1
    assert "- **Note**, before the first step: The learning rate of 2e-5" in watch
    assert "raise `beta`" in watch
    assert "| torch | 2.13.0 |" in section(card, "Versions")
    limits = section(card, "Limits")
    assert "60 held-out examples of the same kind; on others nothing was measured" in limits
    assert "no proof that its own answers are better" in limits
    assert "No evaluation of safety, truthfulness or bias was run" in limits
    assert "at most 2,048 tokens" in limits


def test_what_is_not_known_is_not_claimed(tmp_path: Path):
    card = model_card(make_run(tmp_path / "run", num_held_out=0, method="sft"))
    assert "Nothing was held out, so these figures cannot say" in section(card, "Results")
    assert "| held out |" not in card
    assert "Nothing was held out: there are no figures" in section(card, "Limits")
    assert "Accuracy" not in section(card, "Limits")
    assert "The rules that watched the training found nothing." in card
    few = model_card(make_run(tmp_path / "few", num_held_out=8))
    assert "8 held-out examples of the same kind, and 8 examples are few" in few


@pytest.mark.parametrize(
    ("model", "adapter", "expected"),
    [
        ("org/base-7b", False, {"library_name": "transformers", "base_model": "org/base-7b", "base_model_relation": "finetune"}),
        ("org/base-7b", True, {"library_name": "peft", "base_model": "org/base-7b", "base_model_relation": "adapter"}),
        ("/home/somebody/base", True, {"library_name": "peft"}),
        ("runs/sft/model", False, {"library_name": "transformers"}),
    ],
)
def test_the_front_matter_names_the_base_only_where_others_can_find_it(tmp_path: Path, model: str, adapter: bool, expected: dict[str, str]):
    folder = with_adapter(tmp_path / "run") if adapter else make_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["name"] = model
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = front_matter(model_card(folder))
    tags = ["prefopt", "dpo", "preference-optimization", *(["lora"] if adapter else [])]
    assert found == {**expected, "pipeline_tag": "text-generation", "tags": tags}


@pytest.mark.parametrize(
    ("base", "named", "own_base", "told"),
    [
        ("/home/somebody/sft/model", None, True, "its base `sft` is not in this folder"),
        ("org/base-7b", None, False, "peft loads its base, `org/base-7b`, too"),
        # Training went on from an adapter, and the adapter's own note says what it belongs on.
        ("/home/somebody/lora/model", "org/base-7b", False, "peft loads its base, `org/base-7b`, too"),
        ("/home/somebody/lora/model", "/home/somebody/sft/model", True, "its base `sft` is not in this folder"),
    ],
)
def test_an_adapter_s_card_says_where_its_base_comes_from(tmp_path: Path, base: str, named: str | None, own_base: bool, told: str):
    folder = with_adapter(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["name"] = base
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if named is not None:
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    found = section(model_card(folder), "How to load it")
    assert told in found
    assert ('AutoModelForCausalLM.from_pretrained("path/to/base")' in found) is own_base
    assert ("AutoPeftModelForCausalLM" in found) is not own_base
    assert "/home" not in found


def test_a_run_in_another_place_does_not_take_a_folder_for_a_hub_model(tmp_path: Path):
    folder = with_adapter(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["name"] = "runs/sft"  # as it was given, in a folder where others do not stand
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/somebody/runs/sft/model"}))
    for card in (model_card(folder), model_card(folder, merged="Merged.")):
        assert "base_model" not in front_matter(card)
        assert "# sft, trained with DPO" in card
        assert "runs/sft" not in card.split("## Settings")[0]


def test_a_folder_that_is_named_like_a_hub_model_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    folder = make_run(tmp_path / "run", settings={"data": ["org/pairs:train", "runs/sft", "/home/somebody/x.jsonl", "-"]})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["name"] = "runs/sft"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    card = model_card(folder)
    assert "base_model" not in front_matter(card)
    assert front_matter(card)["datasets"] == ["org/pairs"]
    assert "# sft, trained with DPO" in card


def test_no_path_of_the_machine_is_in_a_card(tmp_path: Path):
    secret = "/home/some body/secret place/model.v2"
    folder = make_run(
        tmp_path / "run",
        settings={
            "model": secret,
            "data": [f"{secret}/pairs.jsonl", "C:\\Users\\me\\pairs.csv"],
            "reference": "/mnt/private/ref",
            "cache_dir": "/var/x",
        },
        findings=[
            {**FINDINGS[0], "what": f"Look at {secret}/pairs.jsonl and /opt/hidden/file.txt, and/or 3/4 of it.", "do": "See ~/notes/a.md."}
        ],
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["name"] = secret
    manifest["data"]["summary"]["notes"] = [f"ignored {secret}/junk and ./other/thing"]
    manifest["resumed"] = [{"step": 3, "time": "2026-11-21T11:00:00", "differences": ["device was /dev/a0, is b"]}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    card = model_card(folder)
    for leak in ("/home", "some body", "secret", "private", "/var", "/opt", "hidden", "Users", "notes/", "other/", "/dev", str(tmp_path)):
        assert leak not in card, leak
    for kept in ("model.v2", "pairs.jsonl", "pairs.csv", "ref", "file.txt, and/or 3/4 of it", "a.md", "junk", "thing"):
        assert kept in card


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("see /a/b/c.txt.", "see c.txt."),
        ("https://example.org/page and and/or", "https://example.org/page and and/or"),
        ("`/a/b` (/c/d) '/e/f'", "`b` (d) 'f'"),
        ("C:\\a\\b.txt", "b.txt"),
        ("1/2, nats/token, org/name", "1/2, nats/token, org/name"),
    ],
)
def test_paths_in_free_text_are_cut_to_their_last_name(tmp_path: Path, text: str, left: str):
    assert scrubbed(text, read_run(make_run(tmp_path / "run"))) == left


def test_templates_are_no_paths():
    assert shared_name("{{ a / b }}") == "{{ a / b }}"
    assert shared_name("/a/b/") == "b"


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "a | b", "[x](http://y)", "# no heading", "**bold**", "`` ` ``", "line\u202eturn"]
)
def test_foreign_text_is_no_markup_in_a_card(tmp_path: Path, text: str):
    folder = make_run(tmp_path / "run", settings={"chat_template": text}, findings=[{**FINDINGS[0], "what": text, "do": text}])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"]["summary"]["sources"][0] |= {"name": text, "says": text}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    card = model_card(folder)
    fenced = re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    assert "<script" not in re.sub(r"\\<", "", fenced)
    assert "\u202e" not in card
    assert card.count("```") == 4
    rows = [line for line in card.splitlines() if line.startswith("| ") and "1,012 |" in line]
    assert [len(re.split(r"(?<!\\)\|", row)) for row in rows if "text_pair" in row or "text\\_pair" in row] == [5]


def test_marks_are_escaped_and_code_is_kept_where_asked_for():
    assert escaped("a*b_c`d`<e>|") == r"a\*b\_c\`d\`\<e\>\|"
    assert escaped("use `a_b|c` or *d*", code=True) == r"use `a_b\|c` or \*d\*"


def test_a_card_needs_a_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run"):
        model_card(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks transformers for it
@pytest.mark.parametrize(("text_as", "settings"), [("raw", {}), ("chat", {"lora_rank": 2})])
def test_the_code_of_a_card_loads_the_model(
    tmp_path: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str], text_as: str, settings: dict[str, Any]
):
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    base = Path(shutil.copytree(model_folder(), tmp_path / "small"))
    result = run("dpo", base, data, tmp_path / "run", max_steps=1, epochs=1, text_as=text_as, **settings)
    base.rename(tmp_path / "elsewhere")  # as on the machine of whoever gets the model
    card = model_card(result.folder)
    assert front_matter(card)["library_name"] == ("peft" if settings else "transformers")
    assert str(tmp_path) not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert ("apply_chat_template" in code[1]) == (text_as == "chat")
    there = {"path/to/this/folder": str(result.model_dir), "path/to/base": str(tmp_path / "elsewhere"), "tokens=100": "tokens=3"}
    exec(re.sub("|".join(there), lambda found: there[found[0]], code[1]), {})
    assert capsys.readouterr().out
