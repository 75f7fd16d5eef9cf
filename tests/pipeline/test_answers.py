"""`generate`: the answers that sampling gives, beside each other, in files and for people, the same every time."""

import json
import shutil
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.training.runs import write_rows
from transformers import AutoTokenizer

from prefopt.config import check
from prefopt.errors import ConfigError, DataError, ModelError, RunError
from prefopt.models.load import Precision, load_model
from prefopt.models.settings import ModelSettings
from prefopt.pipeline import answers
from prefopt.pipeline.answer_settings import GenerateSettings
from prefopt.pipeline.answers import GROUP, derived, generate, stepped
from prefopt.rollout.sample import sample
from prefopt.trees import token_ids

ASKED = ["Is number 1 good?", "Is number 2 good or very good?", "What is the capital of France?"]


def answered(model: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    small = {"prompt": ASKED, "max_new_tokens": 8, "precision": "float32", "device": "cpu"}
    if "prompts" in settings:
        del small["prompt"]
    generate(check(GenerateSettings, {"model": str(model), "out": out} | small | settings))
    return [json.loads(line) for line in out.read_text().splitlines()]


def model_of(name: Path) -> Any:
    return load_model(ModelSettings(model=str(name)), precision=Precision(None, torch.float32), device=torch.device("cpu"), seed=0)


def test_answers_are_what_sampling_gives_of_each_model(full_run: Path, model_folder: Any, tmp_path: Path):
    rows = answered(full_run, tmp_path / "out.jsonl", seed=5)
    assert [row["prompt"] for row in rows] == ASKED
    assert [row["row"] for row in rows] == ["prompt 1", "prompt 2", "prompt 3"]
    for role, folder in (("policy", full_run / "model"), ("reference", model_folder())):
        loaded = model_of(folder)
        prompts = [token_ids(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ASKED]
        drawn = sample(loaded.model, prompts, eos_ids={2}, max_new_tokens=8, seed=5)
        assert [row[role] for row in rows] == [loaded.tokenizer.decode(ids, skip_special_tokens=True) for (ids,) in drawn]
        assert [row["tokens"][role] for row in rows] == [len(ids) for (ids,) in drawn]
        assert [row["ended"][role] for row in rows] == [ids[-1] == 2 for (ids,) in drawn]
    assert "logps" not in rows[0]
    assert "sample" not in rows[0]


def test_the_same_seed_the_same_answers_however_many_at_once(lora_run: Path, tmp_path: Path):
    first = answered(lora_run, tmp_path / "1", num_per_prompt=3, batch_size=32)
    assert [(row["row"], row["sample"]) for row in first] == [(f"prompt {number}", copy) for number in (1, 2, 3) for copy in range(3)]
    assert answered(lora_run, tmp_path / "2", num_per_prompt=3, batch_size=2) == first
    assert answered(lora_run, tmp_path / "3", num_per_prompt=3, seed=1) != first
    assert len({row["policy"] for row in first}) > 3


def test_a_new_adapter_answers_beside_its_base_and_a_continued_one_beside_where_it_began(
    lora_run: Path, continued_run: Path, model_folder: Any, tmp_path: Path
):
    base = [row["policy"] for row in answered(model_folder(), tmp_path / "base", text_as="raw")]
    first = answered(lora_run, tmp_path / "first")
    second = answered(continued_run, tmp_path / "second")
    assert [row["reference"] for row in first] == base
    assert [row["reference"] for row in second] == [row["policy"] for row in first]
    assert [row["policy"] for row in first] != base
    assert [row["policy"] for row in second] != [row["policy"] for row in first]


def test_who_answers_beside_it_can_be_chosen(full_run: Path, sft_run: Path, lora_run: Path, tmp_path: Path):
    assert "reference" not in answered(full_run, tmp_path / "1", reference="none")[0]
    assert "reference" not in answered(sft_run, tmp_path / "2")[0]
    rows = answered(full_run, tmp_path / "3", reference=str(lora_run))
    assert [row["reference"] for row in rows] == [row["policy"] for row in answered(lora_run, tmp_path / "4")]


def test_scores_are_log_probabilities_under_both(lora_run: Path, model_folder: Any, tmp_path: Path):
    rows = answered(lora_run, tmp_path / "out", logps=True, num_per_prompt=2)
    policy, reference = model_of(lora_run / "model"), model_of(model_folder())
    for row in rows:
        prompt = policy.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        for of in ("policy", "reference"):
            if not row["ended"][of]:
                continue  # its last token may be half a character, and text does not tell
            ids = [*prompt, *policy.tokenizer(row[of], add_special_tokens=False)["input_ids"], 2]
            if len(ids) != len(prompt) + row["tokens"][of]:
                continue  # the text could be cut into other tokens too
            for under, loaded in (("policy", policy), ("reference", reference)):
                with torch.no_grad():
                    logps = loaded.model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
                by_hand = sum(float(logps[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
                assert row["logps"][of][under] == pytest.approx(by_hand, abs=1e-4)
        for of in ("policy", "reference"):
            ratio = row["logps"][of]["policy"] - row["logps"][of]["reference"]
            assert row["log_ratio"][of] == pytest.approx(ratio)
            assert row["reward"][of] == pytest.approx(0.1 * ratio)  # β of the run
    assert any(abs(row["log_ratio"]["policy"]) > 1e-3 for row in rows)


def test_the_policy_alone_is_scored_without_a_ratio(full_run: Path, tmp_path: Path):
    (row, *_) = answered(full_run, tmp_path / "out", logps=True, reference="none")
    assert row["logps"]["policy"].keys() == {"policy"}
    assert "log_ratio" not in row


# How they are asked.


def test_prompts_are_written_as_in_training(lora_run: Path, chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    raw = answered(lora_run, tmp_path / "raw")
    assert "prompts: plain text is continued as it is, as in training" in capsys.readouterr().err
    assert answered(lora_run, tmp_path / "asked", text_as="raw") == raw
    assert "as asked" in capsys.readouterr().err
    assert answered(lora_run, tmp_path / "other", text_as="chat") != raw
    capsys.readouterr()
    chat = answered(chat_run, tmp_path / "chat")
    assert "prompts: plain text is a question in the tokenizer's chat template, as in training" in capsys.readouterr().err
    assert answered(chat_run, tmp_path / "chat2", text_as="chat") == chat
    assert answered(chat_run, tmp_path / "brief", system="Be brief.") != chat
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ASKED]
    from_file = answered(chat_run, tmp_path / "file", prompts=write_rows(tmp_path / "rows.jsonl", rows))
    assert [row["policy"] for row in from_file] == [row["policy"] for row in chat]
    assert from_file[0]["prompt"] == rows[0]["messages"]


def test_the_merged_model_is_asked_like_the_run(lora_run: Path, tmp_path: Path):
    from prefopt.pipeline.merge import merge
    from prefopt.pipeline.merge_settings import MergeSettings

    merge(MergeSettings(adapter=str(lora_run), out=tmp_path / "merged"), say=lambda line: None)
    rows = answered(lora_run, tmp_path / "1")
    assert [row["policy"] for row in answered(tmp_path / "merged", tmp_path / "2")] == [row["policy"] for row in rows]


def test_training_files_and_standard_input_serve(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write_rows(tmp_path / "pairs.jsonl", [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in ASKED])
    from_pairs = answered(lora_run, tmp_path / "1", prompts=data)
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO("\n".join(ASKED).encode())))
    from_stdin = answered(lora_run, tmp_path / "2", prompts="-")
    assert [row["policy"] for row in from_pairs] == [row["policy"] for row in from_stdin]
    assert [row["row"] for row in from_stdin] == ["stdin:1", "stdin:2", "stdin:3"]


def test_rows_that_cannot_be_asked_stop_or_are_counted(chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"prompt": "fine"}, {"other": 1}, {"prompt": "ends <end> itself"}, {"prompt": "long " * 600}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"1 of 4 rows hold no prompt that can be asked:\n  rows.jsonl:2"):
        answered(chat_run, tmp_path / "1", prompts=data)
    with pytest.raises(
        DataError, match=r"(?s)2 of 3 rows.*rows.jsonl:2: control_token.*rows.jsonl:3: last_turn_too_long: its last turn alone"
    ):
        answered(chat_run, tmp_path / "2", prompts=write_rows(tmp_path / "rows.jsonl", [rows[0], *rows[2:]]))
    capsys.readouterr()
    kept = answered(chat_run, tmp_path / "3", prompts=write_rows(tmp_path / "rows.jsonl", rows), on_bad_row="drop")
    assert [row["prompt"] for row in kept] == ["fine"]
    assert "note: 3 rows left out" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"none of the 1 prompts can be asked. The first, rows.jsonl:1: its last turn alone"):
        answered(chat_run, tmp_path / "4", prompts=write_rows(tmp_path / "rows.jsonl", rows[3:]), on_bad_row="drop")


def test_the_context_bounds_prompt_and_answer(full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long = "Is number 1 good or very good? " * 100
    rows = answered(full_run, tmp_path / "1", prompt=[long, ASKED[0]], max_new_tokens=600, reference="none")
    assert "note: 1 prompt cut on the left: the policy reads 512 tokens" in capsys.readouterr().err
    prompt = AutoTokenizer.from_pretrained(full_run / "model")(ASKED[0], add_special_tokens=False)["input_ids"]
    assert rows[0]["tokens"]["policy"] == 1
    assert rows[1]["ended"]["policy"] or 512 - len(prompt) - 16 < rows[1]["tokens"]["policy"] <= 512 - len(prompt)


def test_prompts_with_little_room_draw_their_own_numbers(full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seeds = []
    right = answers.sample
    monkeypatch.setattr(answers, "sample", lambda *args, **settings: seeds.append(settings["seed"]) or right(*args, **settings))
    same = answered(full_run, tmp_path / "1", prompt=["yes"] * 3 + ["yes " * 40], max_new_tokens=511, reference="none")
    texts = [row["policy"][:40] for row in same]
    assert len(set(texts)) == 4
    assert len(set(seeds)) == len(seeds) == 2


def test_an_answer_is_no_longer_than_all_who_score_it_can_read(full_run: Path, make_model: Any, chat_tokenizer: Any, tmp_path: Path):
    short = tmp_path / "short"
    make_model("gpt2", max_position_embeddings=24).save_pretrained(short)
    chat_tokenizer.save_pretrained(short)
    (row,) = answered(full_run, tmp_path / "1", prompt=["yes"], max_new_tokens=60, reference=str(short), logps=True)
    assert max(row["tokens"].values()) < 24


def test_room_in_steps():
    assert [stepped(room, 100) for room in (100, 99, 96, 17, 16, 3, 1)] == [100, 96, 96, 16, 16, 3, 1]


def test_more_prompts_than_a_group(full_run: Path, tmp_path: Path):
    many = [f"Is number {number} good?" for number in range(GROUP + 3)]
    rows = answered(full_run, tmp_path / "1", prompt=many, max_new_tokens=3)
    assert [row["prompt"] for row in rows] == many
    (later,) = answered(full_run, tmp_path / "2", prompt=[many[GROUP]], max_new_tokens=3, seed=derived(0, GROUP))
    assert later["policy"] == rows[GROUP]["policy"]


# Where they go.


def test_for_people_answers_stand_one_below_the_other(full_run: Path, capsys: pytest.CaptureFixture[str]):
    generate(
        check(
            GenerateSettings,
            {"model": str(full_run), "prompt": ASKED[:2], "max_new_tokens": 4, "logps": True, "precision": "float32", "num_per_prompt": 2},
        )
    )
    out, err = capsys.readouterr()
    assert out.count("── ") == 4
    blocks = out.strip().split("\n\n")
    assert blocks[1].startswith("── 2 of 4: prompt 1, answer 2\nprompt: Is number 1 good?\nreference: ")
    assert "\npolicy: " in blocks[1]
    assert "log-prob -" in out
    assert "under the policy, -" in out
    assert "log-ratio " in out
    assert "policy:    " in err
    assert "4 answers of each model in " in err
    assert "% ended by themselves, log-ratio" in err


def test_a_file_is_never_replaced_unasked(full_run: Path, tmp_path: Path):
    out = tmp_path / "new" / "out.jsonl"
    first = answered(full_run, out)
    with pytest.raises(RunError, match=r"out.jsonl exists. Give another file as out, or --overwrite to replace it"):
        answered(full_run, out, seed=1)
    assert [json.loads(line) for line in out.read_text().splitlines()] == first
    assert answered(full_run, out, seed=1, overwrite=True) != first
    with pytest.raises(RunError, match=r"is a folder. Give a file as out"):
        answered(full_run, tmp_path)


def test_what_was_answered_before_an_interrupt_is_there(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    right = answers.draw

    def draw(*args: Any, seed: int, done: Any) -> Any:
        if seed != 0:
            raise KeyboardInterrupt
        return right(*args, seed=seed, done=done)

    monkeypatch.setattr(answers, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        answered(full_run, tmp_path / "out", prompt=["x"] * (GROUP + 1), max_new_tokens=2)
    assert len((tmp_path / "out").read_text().splitlines()) == GROUP
    assert f"broken off: {GROUP} of {GROUP + 1} answers of each model are written" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence(full_run: Path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(RunError, match=r"cannot write /dev/full: No space left on device. Make room"):
        answered(full_run, Path("/dev/full"), overwrite=True)


# What does not fit together.


def test_settings_that_exclude_each_other(full_run: Path):
    for given in ({}, {"prompt": ["a"], "prompts": "a.txt"}):
        with pytest.raises(ConfigError, match="give prompts as a file"):
            check(GenerateSettings, {"model": str(full_run)} | given)
    with pytest.raises(ConfigError, match="columns and on_bad_row are about a file of prompts"):
        check(GenerateSettings, {"model": "x", "prompt": ["a"], "on_bad_row": "drop"})


def test_a_system_message_needs_a_chat(lora_run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="system: for chats, and these prompts are raw text"):
        answered(lora_run, tmp_path / "out", system="Be brief.")


def test_a_reference_that_is_gone_is_said(full_run: Path, tmp_path: Path):

    folder = Path(shutil.copytree(full_run, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"model": "/moved/away"}))
    with pytest.raises(ModelError, match=r"the reference of the run is not there: no folder /moved/away.*--reference none"):
        answered(folder, tmp_path / "out")
    assert answered(folder, tmp_path / "out", reference="none")


def test_a_run_without_a_model_says_how_to_get_one(full_run: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((full_run / "config.yaml").read_text())
    (tmp_path / "run" / "status.json").write_text('{"state": "stopped"}')
    with pytest.raises(ModelError, match=r"has not saved a model yet \(it is stopped\).*--resume"):
        answered(tmp_path / "run", tmp_path / "out")


def test_models_of_other_tokens_answer_and_are_not_scored(full_run: Path, model_folder: Any, tmp_path: Path):

    other = Path(shutil.copytree(model_folder("llama", seed=1), tmp_path / "other"))
    table = json.loads((other / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(table))
    assert "reference" in answered(full_run, tmp_path / "1", reference=str(other))[0]
    with pytest.raises(ConfigError, match="these two read different tokens"):
        answered(full_run, tmp_path / "2", reference=str(other), logps=True)
