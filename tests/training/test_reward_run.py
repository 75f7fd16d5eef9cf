"""A reward model from rows to scores: trained, resumed, merged, scored, planned and refused where it cannot serve."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.runs import Asks, figures, losses, pair_rows, rows, run, weights, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import prefopt
from prefopt.cli import main
from prefopt.errors import DataError, ModelError
from prefopt.models.policy import score_head_of
from prefopt.models.quantise import four_bit_layers
from prefopt.models.scorer import TreeScorer
from prefopt.pipeline.merge import merge
from prefopt.pipeline.merge_settings import MergeSettings
from prefopt.trees import Completion, PromptTree, token_ids

SETTINGS: dict[str, Any] = {"eval_fraction": 0.25, "eval_every_steps": 2, "learning_rate": 3e-3, "epochs": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows(24))


@pytest.fixture(scope="module")
def trained(model_folder: Callable[..., Path], data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights."""
    out = tmp_path_factory.mktemp("full") / "run"
    run("reward", model_folder(), data, out, report=True, **SETTINGS)
    return out


@pytest.fixture(scope="module")
def adapted(model_folder: Callable[..., Path], data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter."""
    out = tmp_path_factory.mktemp("lora") / "run"
    run("reward", model_folder(), data, out, lora_rank=4, report=True, **SETTINGS | {"learning_rate": 2e-2})
    return out


def scores_by_hand(model: Any, tokenizer: Any, texts: list[str]) -> list[float]:
    """As anybody would use it: one padded batch through transformers."""
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        found: list[float] = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1).tolist()
    return found


ANSWERS = [" yes, it is of course", " no, it is not again", " yes"]
TEXTS = [f"Is number 3 good?{answer}<end>" for answer in ANSWERS]


def test_it_learns_which_answer_is_better(trained: Path):
    lines = rows(trained)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.05)  # the score layer begins small
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["after"]["eval/loss"] < 0.5 < summary["before"]["eval/loss"]
    assert summary["after"]["eval/rewards/accuracy"] == 1.0
    assert summary["after"]["eval/rewards/margin"] > 0.5
    assert summary["after"]["eval/scores/spread"] == pytest.approx(summary["after"]["eval/rewards/margin"] / 2, rel=0.2)
    assert summary["engine"] == "flat, scores"
    assert not any(name.startswith("samples/") for row in lines for name in row)


def test_transformers_reads_the_same_scores(trained: Path):
    model = AutoModelForSequenceClassification.from_pretrained(trained / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    found = scores_by_hand(model, tokenizer, TEXTS)
    alone = [scores_by_hand(model, tokenizer, [text])[0] for text in TEXTS]
    assert found == pytest.approx(alone, abs=1e-5)
    tokenizer.padding_side = "left"  # against what was saved, and right all the same
    assert scores_by_hand(model, tokenizer, TEXTS) == pytest.approx(alone, abs=1e-5)
    assert found[0] > found[1]
    assert prefopt.score(str(trained), "Is number 3 good?", ANSWERS) == pytest.approx(found, abs=1e-4)


def test_its_held_out_figures_are_those_of_the_saved_model(trained: Path):
    scorer = prefopt.Scorer.load(str(trained))
    held_out = [json.loads(line) for line in (trained / "held_out.jsonl").read_text().splitlines()]
    by_row = {row["prompt"]: row for row in pair_rows(24)}
    found = []
    for line in held_out:
        row = next(row for prompt, row in by_row.items() if prompt in line["prompt"])
        chosen, rejected = scorer.score(row["prompt"], [row["chosen"], row["rejected"]])
        found.append(chosen - rejected)
        assert chosen - rejected == pytest.approx(line["after"]["rewards/margin"], abs=1e-4)
    assert len(found) >= 3


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}, {"center_weight": 0.1, "label_smoothing": 0.1}])
def test_a_run_that_was_stopped_goes_on_to_the_bit(model_folder: Callable[..., Path], data: str, tmp_path: Path, settings: dict[str, Any]):
    common = {"save_every_steps": 2, "keep_checkpoints": 10, "max_steps": 6, **settings}
    whole = run("reward", model_folder(), data, tmp_path / "whole", **common)
    half = Path(shutil.copytree(tmp_path / "whole", tmp_path / "half"))
    for path in (half / "checkpoints").iterdir():
        if path.name > "step-000002":
            shutil.rmtree(path)
    (half / "summary.json").unlink()
    again = run("reward", model_folder(), data, half, resume=True, **common)
    assert losses(again.folder) == losses(whole.folder)
    assert figures(again.folder) == figures(whole.folder)
    assert weights(again.folder) == weights(whole.folder)


def test_the_seed_decides_the_score_layer(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    found = [
        losses(run("reward", model_folder(), data, tmp_path / f"{place}", max_steps=1, seed=seed).folder)
        for place, seed in enumerate((0, 0, 1))
    ]
    assert found[0] == found[1] != found[2]


def test_it_goes_on_from_a_reward_model(trained: Path, data: str, tmp_path: Path):
    again = run("reward", trained / "model", data, tmp_path / "again", max_steps=2)
    assert rows(again.folder)[0]["rewards/accuracy"] == 1.0
    assert rows(again.folder)[0]["loss"] < 0.5


def test_an_adapter_goes_on_and_merges_into_the_same_scores(adapted: Path, data: str, tmp_path: Path):
    found = prefopt.Scorer.load(str(adapted), precision="float32").score("Is number 3 good?", ANSWERS)
    assert found[0] > found[1]
    again = run("reward", adapted / "model", data, tmp_path / "again", max_steps=1)
    assert rows(again.folder)[0]["rewards/accuracy"] == 1.0
    said: list[str] = []
    result = merge(MergeSettings(adapter=str(adapted), out=tmp_path / "merged"), say=said.append)
    assert result.comparison.kind == "reward"
    assert result.comparison.merged < 1e-4 < result.comparison.effect
    assert any("the adapter moves scores by" in line for line in said)
    assert not any("nats" in line for line in said)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert scores_by_hand(model, tokenizer, TEXTS) == pytest.approx(found, abs=1e-4)


def test_the_card_says_how_it_is_used(trained: Path, adapted: Path):
    card = (trained / "model" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "- reward-model" in card
    assert "AutoModelForSequenceClassification.from_pretrained(folder)" in card
    assert "generate" not in card
    assert "num_labels=1" in (adapted / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(trained / "model"))
    scope: dict[str, Any] = {"print": lambda value: scope.setdefault("seen", value)}
    exec(compile(code, "card", "exec"), scope)
    assert scope["seen"].shape == (2,)


def test_the_report_speaks_of_scores(trained: Path):
    page = (trained / "report.html").read_text()
    assert "Mean scores of chosen and of rejected answers" in page
    assert "Scores of the answers" in page
    assert "than under the reference" not in page.split("Rewards")[1][:400]


def test_samples_are_off_with_a_word(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    heard = Asks(lambda done: None)
    run("reward", model_folder(), data, tmp_path / "run", narrator=heard, max_steps=1, samples=2)
    assert "note: no answers are sampled: a reward model scores answers and writes none" in heard.said
    assert any(line.startswith("padding: '<pad>', which ends no answer") for line in heard.said)
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_margins_come_from_the_data(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    scored = [row | {"score_chosen": 5.0, "score_rejected": 5.0 - place % 3} for place, row in enumerate(pair_rows())]
    with_scores = write_rows(tmp_path / "scored.jsonl", scored)
    plain = run("reward", model_folder(), with_scores, tmp_path / "plain", max_steps=1)
    margins = run("reward", model_folder(), with_scores, tmp_path / "margins", max_steps=1, margin_from_scores=True)
    assert losses(margins.folder)[0] > losses(plain.folder)[0] + 0.2
    with pytest.raises(DataError, match="brings no score of its answers"):
        run("reward", model_folder(), data, tmp_path / "none", max_steps=1, margin_from_scores=True)


def test_a_scorer_takes_trees_in_batches(trained: Path):
    scorer = TreeScorer.load(str(trained))
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Any:
        return token_ids(torch.randint(4, 300, (length,), generator=generator).tolist())

    trees = [PromptTree(draw(length), tuple(Completion(draw(own)) for own in (5, 3, 9))) for length in (4, 11, 1, 7)]
    whole = scorer.scores(trees)
    assert whole.shape == (12,)
    torch.testing.assert_close(scorer.scores(trees, max_tokens=1), whole, rtol=1e-4, atol=1e-5)
    single = [scorer.scores([PromptTree(tree.prompt_ids, (own,))]) for tree in trees for own in tree.completions]
    torch.testing.assert_close(torch.cat(single), whole, rtol=1e-4, atol=1e-5)
    assert scorer.scores([]).tolist() == []
    assert not any(parameter.requires_grad for parameter in scorer.policy.parameters())


def test_chats_and_repeated_answers_are_scored(trained: Path):
    scorer = prefopt.Scorer.load(str(trained))
    turns = [{"role": "user", "content": "Is number 3 good?"}]
    one, two, three = scorer.score(turns, ["yes, it is", [{"role": "assistant", "content": "yes, it is"}], "no"])
    assert one == pytest.approx(two, abs=1e-5)
    assert one != pytest.approx(three, abs=1e-5)
    with pytest.raises(DataError, match="the answer cannot be scored"):
        scorer.score("Is number 3 good?", [""])
    with pytest.raises(DataError, match="give both as text"):
        scorer.score("Is number 3 good?", [turns])
    with pytest.raises(DataError, match='each with "role" and "content"'):
        scorer.score([{"who": "user"}], ["yes"])


def test_a_base_in_four_bits_keeps_its_score_layer(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    result = run("reward", model_folder(), data, tmp_path / "run", lora_rank=4, load_in_4bit=True, **SETTINGS | {"learning_rate": 2e-2})
    assert rows(result.folder)[-1]["eval/rewards/accuracy"] == 1.0
    scorer = prefopt.Scorer.load(str(result.folder), precision="float32")
    model = scorer.scorer.policy.model
    assert [name for name, _ in four_bit_layers(model)]
    assert score_head_of(model).modules_to_save["default"].weight.dtype == torch.float32
    better, worse = scorer.score("Is number 3 good?", ANSWERS[:2])
    assert better > worse


# The command line.


def test_from_flags_to_scores_in_a_file(
    model_folder: Callable[..., Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: Path
):
    words = ["train", "reward", "--model", str(model_folder()), "--data", data, "--out", str(tmp_path / "run"), "--max-steps", "2"]
    assert main([*words, "--precision", "float32", "--batch-size", "4", "--center-weight", "0.01"]) == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    capsys.readouterr()
    scores = tmp_path / "scores.jsonl"
    assert main(["score", str(trained), "--data", data, "--out", str(scores)]) == 0
    said = capsys.readouterr()
    assert "48 answers to 24 prompts: mean score" in said.out + said.err
    assert "of 24 pairs of answers it orders 100.0% as the data does" in said.out + said.err
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [answer["rank"] for answer in lines[0]["answers"]] == [0, 1]
    row = pair_rows(24)[0]
    expected = prefopt.score(str(trained), row["prompt"], [row["chosen"], row["rejected"]])
    assert [answer["score"] for answer in lines[0]["answers"]] == pytest.approx(expected, abs=1e-4)
    assert [answer["text"] for answer in lines[0]["answers"]] == [row["chosen"], row["rejected"]]
    assert main(["score", str(trained), "--data", data, "--out", str(scores)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_it_cannot_be_asked_to_write(trained: Path, adapted: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str):
    more = ["--prompt", "hello"] if command == "generate" else []
    assert main([command, str(trained if kind == "full" else adapted), *more]) == 2
    err = capsys.readouterr().err
    assert "holds a reward model, which scores answers and cannot write any" in err
    assert "prefopt score" in err
    assert "Traceback" not in err


def test_no_other_method_begins_with_it(trained: Path, data: str, tmp_path: Path, model_folder: Callable[..., Path]):
    with pytest.raises(ModelError, match="holds a reward model"):
        run("dpo", trained / "model", data, tmp_path / "run")
    with pytest.raises(ModelError, match="holds a reward model"):
        run("dpo", model_folder(), data, tmp_path / "run", reference=str(trained / "model"))


def test_a_language_model_gives_no_scores(model_folder: Callable[..., Path], data: str, capsys: pytest.CaptureFixture[str]):
    assert main(["score", str(model_folder()), "--data", data]) == 2
    assert "is a language model, and gives no scores" in capsys.readouterr().err


def test_it_is_planned_and_swept(model_folder: Callable[..., Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(model_folder()), "--data", data, "--max-length", "64", "--device", "cpu"]
    assert main(["plan", "--method", "reward", *words, "--memory", "8GB", "--precision", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "prefopt train reward" in said
    assert "?" not in next(line for line in said.splitlines() if line.startswith("LoRA"))  # its time is known as well
    swept = prefopt.sweep(
        "reward", {"center_weight": [0.0, 0.1]}, model=str(model_folder()), data=data, out=tmp_path / "sweep", eval_fraction=0.25,
        max_steps=2, batch_size=4, max_length=64, report=False, memory_check=False, precision="float32", device="cpu",
    )  # fmt: skip
    assert swept is not None


def test_the_estimate_knows_that_there_is_no_vocabulary_to_compute(model_folder: Callable[..., Path], data: str, tmp_path: Path):
    from prefopt.training.assemble import method_named, own_settings, settings_for
    from prefopt.training.memory.estimate import estimate_memory

    sizes = {}
    for name in ("simpo", "reward"):
        kind = method_named(name)
        settings = settings_for(kind)(model=str(model_folder()), data=[data], out=tmp_path, precision="float32")
        method = kind(own_settings(kind, settings))
        sizes[name] = estimate_memory(method, settings, positions=400, device=torch.device("cpu"))
    trained_bytes = {name: next(part.num_bytes for part in found.parts if part.name == "trained weights") for name, found in sizes.items()}
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=1)
    assert trained_bytes["reward"] == sum(parameter.nbytes for parameter in model.parameters())
    assert trained_bytes["reward"] < trained_bytes["simpo"]
    assert sizes["reward"].total < sizes["simpo"].total
