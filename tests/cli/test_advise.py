"""`prefopt advise`: end to end, with and without a model, and what is said when it cannot be done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import prefopt, refused

import prefopt as prefopt_package
from prefopt.config import read_yaml
from prefopt.models.load import choose_precision
from prefopt.models.settings import ModelSettings
from prefopt.pipeline.advise import ask, signs
from prefopt.pipeline.advise.facts import Count

SHARED = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def pairs(count: int = 24) -> list[dict[str, str]]:
    return [
        {"prompt": f"How wide is sea {n}?", "chosen": f" It is {n} miles wide.", "rejected": f" I do not know {n}."} for n in range(count)
    ]


def test_the_settings_that_it_writes_run(tmp_path: Path, model_folder: Callable[..., Path]):
    config, out = tmp_path / "advice.yaml", tmp_path / "run"
    said = prefopt("advise", written(tmp_path, pairs(60)), "--model", str(model_folder()), "--write", str(config)).check()
    assert said.code == 0, said.err
    values = read_yaml(config)
    assert values["stages"] == ["sft", "ipo"]  # a model of random weights: each token costs it log of the vocabulary
    assert values["ipo"] == {"beta": 0.1, "learning_rate": 5e-5}
    assert values["sft"] == {"learning_rate": 2e-3}
    assert values["text_as"] == "chat"
    assert values["epochs"] == 3.0
    assert " weights, reads 512 tokens, a chat template" in " ".join(said.out.split())
    ran = prefopt("train", "--config", str(config), "--out", str(out), "--samples", "0").check()
    assert ran.code == 0, ran.err
    assert (out / "ipo" / "model" / "config.json").is_file()
    summary = json.loads((out / "ipo" / "summary.json").read_text())
    assert summary["after"]


def test_without_a_model_the_settings_run_with_one(tmp_path: Path, model_folder: Callable[..., Path]):
    config, out = tmp_path / "advice.yaml", tmp_path / "run"
    rows = [{"prompt": f"How wide is sea {n}?", "completion": f" It is {n} miles wide.", "label": n % 3 == 0} for n in range(24)]
    assert prefopt("advise", written(tmp_path, rows), "--write", str(config)).check().code == 0
    assert read_yaml(config)["balance"] is True
    ran = prefopt("train", "--config", str(config), "--model", str(model_folder()), "--out", str(out), "--samples", "0").check()
    assert ran.code == 0, ran.err


def test_pairs_beside_demonstrations_run_as_two_stages_that_each_read_their_own(tmp_path: Path, model_folder: Callable[..., Path]):
    config, out = tmp_path / "advice.yaml", tmp_path / "run"
    judged, good = written(tmp_path, pairs(60)), tmp_path / "good.jsonl"
    long = " ".join(f"Mile {n} is one more." for n in range(20))
    good.write_text("".join(json.dumps({"prompt": f"Tell me of sea {n}.", "completion": f" {long} {n}"}) + "\n" for n in range(80, 110)))
    advice = prefopt("advise", judged, str(good), "--model", str(model_folder()), "--write", str(config)).check()
    assert advice.code == 0, advice.err
    values = read_yaml(config)
    assert (values["stages"], values["data"], values["ipo"]["data"]) == (["sft", "ipo"], [judged, str(good)], [judged])
    ran = prefopt("train", "--config", str(config), "--out", str(out), "--samples", "0", "--max-steps", "1").check()
    assert ran.code == 0, ran.err
    about = {stage: json.loads((out / stage / "manifest.json").read_text())["data"] for stage in ("sft", "ipo")}
    assert {stage: found["summary"]["num_trees"] for stage, found in about.items()} == {"sft": 90, "ipo": 60}
    held = {stage: {line["row"] for line in lines_of(out / stage / "held_out.jsonl")} for stage in about}
    assert held["ipo"]
    assert held["ipo"] <= held["sft"]  # no pair that is held out was learned before


def test_from_python_the_figures_and_the_advice_are_at_hand(tmp_path: Path):
    advice = prefopt_package.advise(written(tmp_path, pairs()))
    assert advice.facts.num_examples == 24
    assert advice.facts.lengths.longer_chosen == Count(24, 24)
    assert advice.method == "ipo"
    assert advice.decision.method.because == "24 pairs, fewer than 1,000"
    assert advice.config["data"] == [str(tmp_path / "pairs.jsonl")]


def test_a_model_is_asked_about_good_answers(tmp_path: Path, model_folder: Callable[..., Path]):
    data, folder = written(tmp_path, pairs()), str(model_folder())
    facts = prefopt_package.advise(data, model=folder, ask=8).facts
    assert facts.model is not None
    assert facts.model.num_asked == 8
    assert 5 < facts.model.nats < 7  # random weights: log 384 is 5.95
    assert facts.model.has_template
    assert facts.model.num_parameters < 100_000
    assert facts.lengths.unit == "tokens"
    assert [way.name for way in facts.model.ways] == ["full"]
    silent = prefopt_package.advise(data, model=folder, ask=0).facts.model
    assert silent is not None
    assert (silent.nats, silent.silent) == (None, "as you say")


def test_a_model_of_which_there_is_the_config_only_is_not_asked(tmp_path: Path, model_folder: Callable[..., Path]):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder().iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    said = prefopt("advise", written(tmp_path, pairs()), "--model", str(folder)).check()
    assert said.code == 0, said.err
    assert "not asked: " in said.out


def test_where_memory_is_short_an_adapter_is_advised(tmp_path: Path, model_folder: Callable[..., Path]):
    data, folder = written(tmp_path, pairs()), str(model_folder())
    short = prefopt_package.advise(data, model=folder, ask=0, memory="0.001MB")
    assert short.facts.model.chosen == ""
    assert [way.name for way in short.facts.model.ways] == ["full", "LoRA 16", "QLoRA 16"]
    assert [verdict.rule.then for verdict in short.decision.warnings] == ["a smaller model, or more memory: nothing fits"]
    assert short.config == {}
    assert short.facts.model.room == "0 MB (as given)"
    roomy = prefopt_package.advise(data, model=folder, ask=0, memory="64GB")
    assert roomy.facts.model.room == "64.0 GB (as given)"
    assert roomy.facts.model.chosen == "full"


def test_the_cost_of_good_answers_is_a_mean_over_their_tokens(tmp_path: Path, model_folder: Callable[..., Path]):
    import torch
    from transformers import AutoModelForCausalLM

    from prefopt.trees import Completion, PromptTree, token_ids

    good = Completion(token_ids([5, 6, 7]), rank=0)
    tree = PromptTree(token_ids([1, 2]), (good, Completion(token_ids([8]), rank=1)))
    down = PromptTree(token_ids([1, 2]), (Completion(token_ids([9]), label=False),))
    (alone,) = ask.with_good_alone([tree, down])
    assert alone.completions == (good,)
    folder = model_folder()
    nats = ask.cost_per_token(
        [alone, alone], ModelSettings(model=str(folder)), choose_precision("float32", torch.device("cpu"), adapter=True)
    )
    with torch.no_grad():
        logps = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[1, 2, 5, 6, 7]])).logits.log_softmax(-1)
    by_hand = -sum(float(logps[0, place, token]) for place, token in ((1, 5), (2, 6), (3, 7))) / 3
    assert nats == pytest.approx(by_hand, rel=1e-4)


def test_a_micro_batch_holds_the_longest_ranking():
    assert ask.with_room_for({"max_tokens": 2048, "lora_rank": 16}, 3000) == {"max_tokens": 3000, "lora_rank": 16}
    assert ask.with_room_for({"max_tokens": 4096}, 3000) == {"max_tokens": 4096}
    assert ask.with_room_for({}, 3000) == {}


def test_rankings_are_asked_about_as_they_are(tmp_path: Path, model_folder: Callable[..., Path]):
    rows = [{"prompt": f"How wide is sea {n}?", "completions": [f" {n}.", " 1.", " 2."], "scores": [3, 2, 1]} for n in range(3, 13)]
    config, out = tmp_path / "advice.yaml", tmp_path / "run"
    said = prefopt("advise", written(tmp_path, rows), "--model", str(model_folder()), "--write", str(config)).check()
    assert said.code == 0, said.err
    assert read_yaml(config)["dpo"]["plackett_luce"] is True
    ran = prefopt("train", "--config", str(config), "--out", str(out), "--samples", "0", "--max-steps", "2").check()
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--data: is required"),
        (("none.jsonl",), "none.jsonl does not exist"),
        (("x.jsonl", "--have", "luck"), "--have"),
        (("x.jsonl", "--memory", "8GB"), "memory say something about a model: give model too"),
        (("-", "--model", "m"), "standard input (`-`) can be read once: give a file"),
        (("x.jsonl", "--on-bad-row", "drop"), "--on-bad-row: no such flag"),
        (("x.jsonl", "--sample", "1"), "--sample: must be greater than or equal to 10"),
    ],
)
def test_mistakes_are_told(words: tuple[str, ...], says: str):
    assert says in refused("advise", *words)


def test_files_that_hold_nothing_are_told(tmp_path: Path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl is empty" in refused("advise", str(empty))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n" * 5)
    assert "not recognised" in refused("advise", str(broken)) or "invalid_json" in refused("advise", str(broken))
    assert "none of the 3 rows can be used (blank_answer 3)" in refused(
        "advise", written(tmp_path, [{"prompt": "q", "chosen": " ", "rejected": "x"}] * 3)
    )


def test_bad_rows_are_counted_and_do_not_stop(tmp_path: Path):
    path = written(tmp_path, pairs())
    with open(path, "a") as file:
        file.write('{"prompt": "cut off\n')
    said = prefopt("advise", path).check()
    assert said.code == 0
    assert "left out    invalid_json 1" in said.out
    assert "1 of 25 rows (4 %) cannot be used" in said.out


def test_nothing_to_train_is_not_written(tmp_path: Path):
    path = written(tmp_path, [{"prompt": f"How wide is sea {n}?"} for n in range(20)])
    said = prefopt("advise", path).check()
    assert said.code == 0
    assert "There is nothing to train yet." in said.out
    unwritten = prefopt("advise", path, "--write", str(tmp_path / "a.yaml")).check()
    assert unwritten.code == 2
    assert "is not written: there is nothing to train yet" in unwritten.err
    assert unwritten.out == said.out
    assert not (tmp_path / "a.yaml").exists()
    assert "cannot write" in refused("advise", written(tmp_path, pairs()), "--write", str(tmp_path / "none" / "a.yaml"))


def test_a_file_that_has_no_place_is_told_before_anything_is_read(tmp_path: Path):
    said = refused("advise", "none.jsonl", "--write", str(tmp_path / "none" / "a.yaml"))
    assert f"there is no folder {tmp_path / 'none'}. Make it, or give another path as --write." in said
    assert "it is a folder. Give a file as --write" in refused("advise", "none.jsonl", "--write", str(tmp_path))


def test_advice_is_told_where_its_settings_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, text: str, **how: Any) -> int:
        raise OSError(28, "No space left on device")

    data = written(tmp_path, pairs())
    monkeypatch.setattr(Path, "write_text", full)
    said = prefopt("advise", data, "--write", str(tmp_path / "a.yaml")).check()
    monkeypatch.undo()
    assert said.code == 2
    assert "advice: ipo" in said.out
    assert "a.yaml has them" not in said.out
    assert "No space left on device" in said.err
    done = prefopt("advise", data, "--write", str(tmp_path / "a.yaml")).check()
    assert done.code == 0
    assert "a.yaml has them" in done.out


def test_a_model_for_which_memory_runs_out_is_not_asked(tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    def none_left(*given: Any, **more: Any) -> float:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(ask, "cost_per_token", none_left)
    facts = prefopt_package.advise(written(tmp_path, pairs()), model=str(model_folder())).facts
    assert facts.model is not None
    assert (facts.model.nats, facts.model.num_asked, facts.model.silent) == (None, 0, "memory ran out")


def test_another_error_while_asking_is_not_hidden(tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ask, "cost_per_token", lambda *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefopt_package.advise(written(tmp_path, pairs()), model=str(model_folder()))


def test_the_limit_of_length_is_the_one_that_was_counted_with(tmp_path: Path, model_folder: Callable[..., Path]):
    data, folder = written(tmp_path, pairs()), str(model_folder())
    short = prefopt_package.advise(data, model=folder, ask=0, max_length=18, text_as="raw").facts
    assert short.lengths.limit == 18
    assert short.lengths.too_long.share > 0.5
    assert "have more than 18 tokens" in signs.is_too_long(short)
    assert prefopt_package.advise(data, model=folder, ask=0).facts.lengths.limit == 512  # what the model reads


REAL = {
    "hh-rlhf/harmless-base.jsonl.gz": ("dpo", 1794, "blank_answer 4, prompts_differ 2"),
    "ukp-convarg": ("dpo", 5872, "the longer one wins in 78 %"),
    "llamafactory-demo/dpo_en_demo.json": ("ipo", 300, "5 of 300 examples (1.7 %) repeat an earlier one"),
    "llamafactory-demo/dpo_zh_demo.json": ("ipo", 300, "Han 86 %"),
    "llamafactory-demo/kto_en_demo.json": ("kto", 300, "150 up, 150 down (50 % up)"),
    "rasbt-dpo/instruction-data-with-preference.json": ("dpo", 1094, "same_answers 6"),
    "gsm8k/example_model_solutions.jsonl": ("kto", 5276, "all 5,276 examples bring the right answer"),
    "open-assistant/en_100_tree.jsonl": ("dpo", 212, "57 of 2, 117 of 3"),
    "tulu-human-eval/eval_annotations_tulu_1.xlsx": ("robust", 773, "agree in 71 of 100 couples (71 %): about 18 %"),
    "pandalm/testset-v1.json": ("ipo", 836, "votes for an answer agree in 2,482 of 2,620 couples (95 %)"),
    "ifeval/input_data.jsonl": (None, 541, "all 541 examples name constraints"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str):
    method, number, says = REAL[name]
    advice = prefopt_package.advise(str(SHARED / name))
    assert advice.method == method
    assert advice.facts.num_examples == number
    assert says in " ".join(" ".join(advice.lines()).split())
