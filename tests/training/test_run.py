"""A run from its settings to its results: what it leaves, and that its numbers do not depend on how it was done."""

import itertools
import json
import math
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tests.training.runs import Asks, figures, losses, pair_rows, rows, run, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt
from prefopt.config import Setting, read_yaml
from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.errors import ConfigError, DataError, ModelError, RunError
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.methods.method import DefaultRates, LossOutput, Method, MethodSettings, Needs, Term, one_per_example
from prefopt.methods.sft import SFT, SFTSettings
from prefopt.models.load import Precision, load_model
from prefopt.models.policy import EnginePath, Policy
from prefopt.models.settings import ModelSettings
from prefopt.training.run import train, train_with
from prefopt.training.settings import RunSettings
from prefopt.training.terminal.narrator import Quiet
from prefopt.trees import Completion, PromptTree, token_ids

LOG_2 = math.log(2)
PAIR_METRICS = {"rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen", "logps/rejected", "kl"}


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder()


@pytest.fixture(scope="module")
def finished(model: Path, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done: six steps, a held-out split, evaluated every two steps, three checkpoints kept."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run("dpo", model, pairs, out, eval_fraction=0.33, epochs=3, eval_every_steps=2, save_every_steps=2, keep_checkpoints=3)
    return out


@pytest.fixture(scope="module")
def plain_losses(model: Path, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run with nothing special about it."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run("dpo", model, pairs, out)
    return losses(out)


# What a run leaves.


def test_the_files_of_a_run(finished: Path):
    notes = ["config.yaml", "held_out.jsonl", "manifest.json", "metrics.jsonl", "status.json", "summary.json"]
    found = sorted(path.name for path in finished.iterdir() if path.name != "watch.jsonl")  # a run this small gives it something to say
    assert found == sorted(["checkpoints", "model", *notes])
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step-000004", "step-000006", "step-000007"]
    suffixes = {path.suffix for path in (finished / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_one_line_of_metrics_per_step(finished: Path):
    found = rows(finished)
    assert [row["step"] for row in found] == list(range(1, 8))
    for row in found:
        assert {"loss", "epoch", "grad_norm", "learning_rate", "tokens_per_second", "seconds", "memory_gb", *PAIR_METRICS} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > 0
        assert row["rewards/margin"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)
        assert 0 <= row["rewards/accuracy"] <= 1
        assert row["logps/chosen"] < 0
        assert row["kl"] >= 0
    assert found[-1]["epoch"] == pytest.approx(3)
    evaluated = [row["step"] for row in found if "eval/loss" in row]
    assert evaluated == [2, 4, 6, 7]
    assert {name for name in found[1] if name.startswith("eval/")} == {"eval/loss", *(f"eval/{name}" for name in PAIR_METRICS)}


def test_the_first_step_is_at_log_two(finished: Path):
    first = rows(finished)[0]
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert first["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert first["logps/chosen"] != first["logps/rejected"]


def test_the_summary(finished: Path, model: Path):
    summary = json.loads((finished / "summary.json").read_text())
    last = rows(finished)[-1]
    assert (summary["method"], summary["model"], summary["steps"], summary["num_processes"]) == ("dpo", str(model), 7, 1)
    assert summary["loss"] == last["loss"]
    assert summary["last_step"] == last
    assert summary["after"] == {name: value for name, value in last.items() if name.startswith("eval/")}
    assert summary["before"]["eval/loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert summary["before"]["eval/rewards/accuracy"] == pytest.approx(0.5)
    assert summary["start_difference"] < 1e-5
    assert (summary["data"]["num_train"], summary["data"]["num_held_out"]) == (9, 3)
    assert summary["data"]["summary"]["num_rows"] == 12
    assert summary["engine"] == "flat, chunked head"
    assert summary["epochs"] == 3
    assert summary["versions"]["prefopt"] == prefopt.__version__
    assert summary["training_seconds"] > 0
    assert summary["examples_per_second"] == pytest.approx(27 / summary["training_seconds"], rel=0.05)


def test_the_config_runs_again_and_gives_the_same(finished: Path, tmp_path: Path):
    values = read_yaml(finished / "config.yaml")
    assert values["batch_size"] == 4
    assert values["beta"] == 0.1
    assert "resume" not in values
    method = values.pop("method")
    train_with(method, narrator=Quiet(), **values | {"out": str(tmp_path / "again")})
    assert figures(tmp_path / "again") == figures(finished)
    assert weights(tmp_path / "again") == weights(finished)


def test_the_model_in_transformers_is_the_trained_policy(model: Path, pairs: str, tmp_path: Path):
    """Its log-probabilities are those that an evaluation on the last weights gave."""
    out = tmp_path / "run"
    run("dpo", model, pairs, out, eval_data=pairs)
    last = rows(out)[-1]
    trained = AutoModelForCausalLM.from_pretrained(out / "model")
    assert mean_logps(trained, out / "model") == pytest.approx([last["eval/logps/chosen"], last["eval/logps/rejected"]], abs=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert mean_logps(base, model)[0] < last["eval/logps/chosen"] - 0.1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_adapter_in_peft_is_the_trained_policy(model: Path, pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    run("dpo", model, pairs, out, eval_data=pairs, lora_rank=4, learning_rate=1e-2)
    last = rows(out)[-1]
    trained = AutoPeftModelForCausalLM.from_pretrained(out / "model")
    assert mean_logps(trained, out / "model") == pytest.approx([last["eval/logps/chosen"], last["eval/logps/rejected"]], abs=1e-4)
    assert not (out / "model" / "model.safetensors").exists()


def mean_logps(trained: torch.nn.Module, folder: Path) -> list[float]:
    """Mean log-probability of chosen and rejected, by nothing but transformers. The tokenizer merges nothing across the boundary."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    means = []
    for side in ("chosen", "rejected"):
        sums = []
        for row in pair_rows():
            prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            answer = [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logps = trained.eval()(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            sums.append(sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer)))
        means.append(sum(sums) / len(sums))
    return means


def test_training_learns_what_can_be_learned(model: Path, tmp_path: Path):
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(24))
    out = tmp_path / "run"
    summary = run("dpo", model, data, out, epochs=4, batch_size=8, learning_rate=5e-3, eval_fraction=0.2, lr_schedule="linear").summary
    found = losses(out)
    assert found[-1] < 0.5 * found[0]
    assert summary["after"]["eval/rewards/margin"] > 0.5
    assert summary["after"]["eval/rewards/accuracy"] == 1
    assert summary["after"]["eval/loss"] < summary["before"]["eval/loss"] - 0.1


def test_the_learning_rate_moves_the_weights(model: Path, pairs: str, tmp_path: Path):
    """Adam's first step moves a weight by the learning rate, and no later one by more than 3.2 times that."""
    run("dpo", model, pairs, tmp_path / "run", max_steps=10, warmup_ratio=0.9, save_every_steps=1, keep_checkpoints=10)
    rates = [row["learning_rate"] for row in rows(tmp_path / "run")]
    assert rates[:9] == pytest.approx([1e-3 * step / 9 for step in range(1, 10)])
    weights_by_step = [load_file(path / "policy.safetensors") for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    weights_by_step = [
        load_file(model / "model.safetensors"),
        *({name[6:]: value for name, value in one.items()} for one in weights_by_step),
    ]
    moved = [
        max((after[name] - before[name]).abs().max().item() for name in after) for before, after in itertools.pairwise(weights_by_step)
    ]
    assert moved[0] == pytest.approx(rates[0], rel=0.01)
    assert moved[8] > 4 * rates[0]
    assert all(distance < 3.2 * rate for distance, rate in zip(moved, rates, strict=True))


def test_what_is_told(model: Path, pairs: str, tmp_path: Path):
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, tmp_path / "run", narrator=narrator, eval_fraction=0.3, max_steps=2, beta=0.25)
    said = "\n".join(narrator.said)
    for part in (
        "12 rows",
        "── chosen",
        "LlamaForCausalLM, 43,168 parameters, trains all weights; float32 on CPU",
        "prompts are shared (flat)",
        "dpo: 2 steps of 4",
        "learning rate 0.001 (cosine, 10% warm-up), beta 0.25",
        "reference: computed before training, and kept",
        "held out, before: loss 0.6931",
        "held out, after:",
        f"model: {tmp_path / 'run' / 'model'}",
    ):
        assert part in said, part


# The same numbers.


def test_the_seed_decides(model: Path, pairs: str, tmp_path: Path, plain_losses: list[float]):
    torch.rand(3)  # what the caller drew does not matter
    run("dpo", model, pairs, tmp_path / "again")
    assert losses(tmp_path / "again") == plain_losses
    run("dpo", model, pairs, tmp_path / "other", seed=1)
    assert losses(tmp_path / "other") != plain_losses
    run("dpo", model, pairs, tmp_path / "large", seed=10**30, lora_rank=2, max_steps=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"reference_cache": False},
        {"gradient_checkpointing": True},
        {"sharing": "plain"},
        {"max_tokens": 90},
        {"max_tokens": 60, "reference_cache": False, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_how_it_is_done_does_not_matter(model: Path, pairs: str, tmp_path: Path, plain_losses: list[float], settings: dict[str, Any]):
    run("dpo", model, pairs, tmp_path / "run", **settings)
    assert losses(tmp_path / "run") == pytest.approx(plain_losses, abs=1e-5)


def test_the_model_named_as_its_own_reference(model: Path, pairs: str, tmp_path: Path, plain_losses: list[float]):
    for cache in (True, False):
        run("dpo", model, pairs, tmp_path / f"run-{cache}", reference=str(model), reference_cache=cache)
        assert losses(tmp_path / f"run-{cache}") == pytest.approx(plain_losses, abs=1e-5)


def test_another_reference(model: Path, model_folder, make_model, chat_tokenizer, pairs: str, tmp_path: Path):
    """Also one that cannot share prompts, and whose head is of another shape."""
    make_model("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8, seed=3).save_pretrained(tmp_path / "mamba")
    chat_tokenizer.save_pretrained(tmp_path / "mamba")
    for reference in (model_folder("llama", 1), tmp_path / "mamba"):
        first = []
        for cache in (True, False):
            out = tmp_path / f"{reference.name}-{reference.parent.name}-{cache}"
            run("dpo", model, pairs, out, reference=str(reference), reference_cache=cache, max_steps=2)
            first.append(losses(out))
        assert first[0] == pytest.approx(first[1], abs=1e-5)
        assert abs(first[0][0] - LOG_2) > 1e-4
        row = rows(out)[0]
        by_hand = [
            0.1 * (own - other) for own, other in zip(means(model, pairs, tmp_path, 4), means(reference, pairs, tmp_path, 4), strict=True)
        ]
        assert [row["rewards/chosen"], row["rewards/rejected"]] == pytest.approx(by_hand, abs=1e-5)


def means(folder: Path, pairs: str, tmp_path: Path, batch_size: int) -> list[float]:
    """Mean log-probabilities of the first batch's chosen and rejected under a model, in plain rows."""
    from prefopt.data.dataset import load
    from prefopt.data.settings import DataSettings
    from prefopt.training.order import DataOrder

    settings = ModelSettings(model=str(folder))
    loaded = load_model(settings, precision=Precision(None, torch.float32), device=torch.device("cpu"), seed=0)
    trees = load([pairs], DataSettings(data=[pairs], cache_dir=tmp_path / "cache", max_length=128), loaded.tokenizer, kind="pair").trees
    batch = pack([trees[index] for index in DataOrder(len(trees), batch_size, 0).examples(0)], sharing="plain")
    with torch.no_grad():
        chosen, rejected = Policy(loaded.model, EnginePath("plain", None))(batch).sum().view(-1, 2).unbind(1)
    return [chosen.mean().item(), rejected.mean().item()]


def test_a_reference_that_reads_other_tokens_is_refused(model: Path, pairs: str, tmp_path: Path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["y"], vocabulary["n"] = vocabulary["n"], vocabulary["y"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ModelError, match=r"reads other tokens than .*: . of those in the data have another number or none there \(such as 'n', 'y'\)"
    ):
        run("dpo", model, pairs, tmp_path / "run", reference=str(other))


@pytest.fixture(scope="module")
def adapter(model: Path, demonstrations: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter from SFT."""
    out = tmp_path_factory.mktemp("sft") / "run"
    run("sft", model, demonstrations, out, lora_rank=4, learning_rate=1e-2)
    return out


def test_lora_with_and_without_the_cache(model: Path, pairs: str, tmp_path: Path):
    found = []
    for cache in (True, False):
        run("dpo", model, pairs, tmp_path / str(cache), lora_rank=4, learning_rate=1e-2, reference_cache=cache)
        found.append(losses(tmp_path / str(cache)))
    assert found[0][0] == pytest.approx(LOG_2, abs=1e-6)
    assert found[0][-1] < found[0][0] - 0.01
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_going_on_from_an_adapter_refers_to_it(model: Path, adapter: Path, pairs: str, tmp_path: Path):
    """With the cache, with a frozen copy of the adapter, and whichever way the adapter is named."""
    found = []
    for name, settings in {
        "cached": {"model": adapter},
        "in memory": {"model": adapter, "reference_cache": False},
        "named": {"model": model, "adapter": str(adapter / "model"), "reference_cache": False, "gradient_checkpointing": True},
        "as reference": {"model": adapter, "reference": str(adapter)},
    }.items():
        run("dpo", settings.pop("model"), pairs, tmp_path / name, learning_rate=1e-2, **settings)
        found.append(losses(tmp_path / name))
    assert found[0][0] == pytest.approx(LOG_2, abs=1e-6)
    assert found[0][-1] < found[0][0] - 0.01
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)
    saved = json.loads((tmp_path / "cached" / "model" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(model)


def test_sums_in_the_data_are_as_good_as_computed_ones(model: Path, tmp_path: Path, plain_losses: list[float]):
    loaded = load_model(ModelSettings(model=str(model)), precision=Precision(None, torch.float32), device=torch.device("cpu"), seed=0)
    policy, tokenizer = Policy(loaded.model, EnginePath("flat", HeadShape())), loaded.tokenizer
    given = []
    for row in pair_rows():
        prompt = token_ids(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
        answers = [
            [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for side in ("chosen", "rejected")
        ]
        tree = PromptTree(prompt, tuple(Completion(token_ids(answer)) for answer in answers))
        with torch.no_grad():
            chosen, rejected = policy(pack([tree], sharing="flat")).sum().tolist()
        given.append(row | {"reference_chosen_logp": chosen, "reference_rejected_logp": rejected})
    narrator = Asks(lambda done: None)
    run("dpo", model, write_rows(tmp_path / "pairs.jsonl", given), tmp_path / "run", narrator=narrator)
    assert "reference: the sums that come with the data" in narrator.said
    assert losses(tmp_path / "run") == pytest.approx(plain_losses, abs=1e-5)
    assert "kl" not in rows(tmp_path / "run")[0]  # sums do not tell it
    # They are believed: another reference gives another loss.
    wrong = [row | {"reference_chosen_logp": row["reference_chosen_logp"] - 5} for row in given]
    narrator = Asks(lambda done: None)
    run("dpo", model, write_rows(tmp_path / "wrong.jsonl", wrong), tmp_path / "wrong", max_steps=1, narrator=narrator)
    assert any("note: before the first step policy and reference differ by" in line for line in narrator.said)
    assert losses(tmp_path / "wrong")[0] == pytest.approx(math.log1p(math.exp(-0.1 * 5)), abs=1e-5)
    some = [given[0], *pair_rows()[1:]]
    with pytest.raises(DataError, match="2 of 24 completions bring a reference log-probability"):
        run("dpo", model, write_rows(tmp_path / "some.jsonl", some), tmp_path / "some")


def test_examples_without_any_weight_are_refused(model: Path, tmp_path: Path):
    data = write_rows(tmp_path / "pairs.jsonl", [row | {"weight": 0} for row in pair_rows()])
    with pytest.raises(DataError, match="every example to train on has weight 0"):
        run("dpo", model, data, tmp_path / "run")


def test_weights_of_examples_reach_the_loss(model: Path, tmp_path: Path):
    """An example of weight 2 is one that stands there twice; one of weight 0 is not there."""
    first, second, third = pair_rows(3)
    data = {
        "weighted": [first | {"weight": 2.0}, second, third | {"weight": 0}],
        "repeated": [first, first, second],
        "plain": [first, second],
    }
    found = {}
    for name, given in data.items():
        # Two epochs of one batch each, without warm-up: the second loss shows what the first step did.
        run("dpo", model, write_rows(tmp_path / f"{name}.jsonl", given), tmp_path / name, batch_size=len(given), max_steps=2)
        found[name] = figures(tmp_path / name)[-1]
    for metric in ("loss", "rewards/margin", "logps/chosen", "grad_norm"):
        assert found["weighted"][metric] == pytest.approx(found["repeated"][metric], abs=1e-5), metric
        assert found["weighted"][metric] != pytest.approx(found["plain"][metric], abs=1e-4), metric


def test_prompts_with_one_chosen_and_several_rejected(model: Path, tmp_path: Path):
    """Their trees share a completion, and all values of the reference are there."""
    row = pair_rows(1)[0]
    data = [row | {"rejected": f" no {word}"} for word in ("way", "idea", "more", "less")]
    run("dpo", model, write_rows(tmp_path / "pairs.jsonl", data), tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(LOG_2, abs=1e-6)


def test_bf16_starts_near_log_two(model: Path, pairs: str, tmp_path: Path):
    for cache in (True, False):
        run("dpo", model, pairs, tmp_path / str(cache), precision="bf16", reference_cache=cache, max_steps=3)
        assert losses(tmp_path / str(cache))[0] == pytest.approx(LOG_2, abs=5e-3)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / str(cache) / "model")
        assert saved.dtype == torch.float32


def test_supervised_fine_tuning(model: Path, demonstrations: str, pairs: str, tmp_path: Path):
    summary = run("sft", model, demonstrations, tmp_path / "run", epochs=4, learning_rate=5e-3, eval_fraction=0.3).summary
    found = losses(tmp_path / "run")
    assert 4 < found[0] < math.log(384) + 0.5
    assert found[-1] < 0.8 * found[0]
    assert summary["after"]["eval/loss"] < summary["before"]["eval/loss"]
    assert "start_difference" not in summary
    assert "rewards/margin" not in rows(tmp_path / "run")[0]
    run("sft", model, pairs, tmp_path / "of-pairs", max_steps=2)  # pairs serve as demonstrations of their chosen answers
    run("sft", model, demonstrations, tmp_path / "of-demonstrations", max_steps=2)
    assert losses(tmp_path / "of-pairs") == losses(tmp_path / "of-demonstrations")


# A method of one's own.


class HingeSettings(MethodSettings):
    gap: float = Setting(1.0, gt=0, help="How far apart.")


class Hinge(Method):
    """A researcher's own: max(0, gap − Δ)², with a state that counts pairs."""

    name = "hinge"
    settings_class = HingeSettings
    needs = Needs(completions="pair", reference=True)
    units = {"pairs": one_per_example}
    rates = DefaultRates(full=1e-3, adapter=1e-2)

    def initial_state(self):
        return {"seen": 0.0}

    def next_state(self, state, sums):
        return {"seen": state["seen"] + sums["pairs"]}

    def loss(self, policy, reference, batch, *, statistics, state):
        chosen_B, rejected_B = (policy.sum() - reference.sum()).view(-1, 2).unbind(1)
        loss_B = (self.settings.gap - (chosen_B - rejected_B)).clamp(min=0).square()
        seen_B = torch.full_like(loss_B, state["seen"]).detach()
        return LossOutput((Term(loss_B, "pairs"),), {"seen": seen_B}, {"pairs": batch.weight_B.sum()})


def test_a_method_object_of_one_s_own(model: Path, pairs: str, tmp_path: Path):
    settings = {"model": model, "data": pairs, "batch_size": 4, "epochs": 2, "precision": "float32", "cache_dir": tmp_path / "cache"}
    result = prefopt.train(Hinge(HingeSettings(gap=2.0)), out=tmp_path / "run", **settings)
    assert result.folder == tmp_path / "run"
    found = rows(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(4.0, abs=1e-4)
    assert found[-1]["loss"] < 4.0
    assert [row["seen"] for row in found] == [4.0 * index for index in range(6)]
    assert max(row["learning_rate"] for row in found) == pytest.approx(0.1)  # its usual rate, for a model as small as this
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["gap"] == 2.0
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["method_state"] == {"seen": 24.0}
    with pytest.raises(RunError, match=r"these settings differ from those of .*: gap was 2.0, is 3.0"):
        prefopt.train(Hinge(HingeSettings(gap=3.0)), out=tmp_path / "run", resume=True, **settings)


def test_a_method_of_the_table_as_an_object(model: Path, pairs: str, tmp_path: Path, plain_losses: list[float]):
    settings = RunSettings(
        model=model, data=pairs, out=tmp_path / "run", batch_size=4, epochs=2, learning_rate=1e-3, precision="float32", cache_dir=tmp_path
    )
    train(DPO(DPOSettings(beta=0.1)), settings, narrator=Quiet())
    assert losses(tmp_path / "run") == plain_losses


def test_a_method_object_has_the_settings_that_its_needs_bring(model: Path, pairs: str, tmp_path: Path):
    settings = {"model": model, "data": pairs, "max_steps": 1, "batch_size": 4, "cache_dir": tmp_path / "cache"}
    prefopt.train(DPO(DPOSettings()), out=tmp_path / "with", reference_cache=False, **settings)
    assert not (tmp_path / "cache" / "reference").exists()
    with pytest.raises(ConfigError, match="reference_cache"):
        prefopt.train(SFT(SFTSettings()), out=tmp_path / "without", reference_cache=False, **settings)


# Going on.


@pytest.fixture
def stopped(tmp_path: Path, model: Path, pairs: str) -> Callable[..., Path]:
    """Makes a run that was killed in the middle: what it had written by then, copied while it ran."""

    def stop(after: int, **settings: Any) -> Path:
        out, copied = tmp_path / "whole", tmp_path / "stopped"

        def at(done: int) -> None:
            if done == after:
                shutil.copytree(out, copied, ignore=shutil.ignore_patterns(".lock"))

        run(settings.pop("method", "dpo"), settings.pop("model", model), settings.pop("data", pairs), out, narrator=Asks(at), **settings)
        return copied

    return stop


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_rank": 4, "learning_rate": 1e-2},
        {"lora_rank": 4, "learning_rate": 1e-2, "modules_to_save": ["lm_head"], "reference_cache": False},
        {"gradient_checkpointing": True, "precision": "bf16", "lr_schedule": "linear", "weight_decay": 0.1},
        {"method": "sft"},
    ],
    ids=str,
)
def test_a_run_that_goes_on_makes_the_same_numbers(stopped, model: Path, pairs: str, tmp_path: Path, settings: dict[str, Any]):
    same = {"save_every_steps": 2, "eval_fraction": 0.3, "eval_every_steps": 3} | settings
    copied = stopped(5, **same)  # the checkpoint is of step 4, a fifth line of metrics is there
    assert len(rows(copied)) == 5
    assert not (copied / "summary.json").exists()
    narrator = Asks(lambda done: None)
    result = run(same.pop("method", "dpo"), model, pairs, copied, resume=True, narrator=narrator, **same)
    assert any(line.startswith(f"resumed from {copied}") and "4 of 5 steps" in line for line in narrator.said)
    assert figures(copied) == figures(tmp_path / "whole")
    assert weights(copied) == weights(tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for name in ("loss", "after", "steps", "epochs", *(name for name in ("before", "start_difference") if name in summary)):
        assert result.summary[name] == summary[name], name


def test_what_does_not_decide_the_numbers_may_change(stopped, model: Path, pairs: str, tmp_path: Path):
    copied = stopped(4, save_every_steps=1)
    run("dpo", model, pairs, copied, resume=True, max_tokens=60, save_every_steps=3, keep_checkpoints=1, cache_dir=tmp_path / "other")
    assert losses(copied) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_a_changed_setting_is_named(stopped, model: Path, pairs: str):
    copied = stopped(3, save_every_steps=1)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    changed = {"beta": 0.2, "learning_rate": 2e-3, "epochs": 3}
    says = r"differ from those of .*step-00000.: beta was 0.1, is 0.2; epochs was 2.0, is 3.0; learning_rate was 0.001, is 0.002"
    with pytest.raises(RunError, match=says):
        run("dpo", model, pairs, copied, resume=True, **changed)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_another_method_is_named(stopped, model: Path, pairs: str):
    copied = stopped(3, save_every_steps=1)
    with pytest.raises(RunError, match="method was dpo, is sft"):
        run("sft", model, pairs, copied, resume=True)


def test_changed_data_is_refused(stopped, model: Path, tmp_path: Path):
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    copied = stopped(3, save_every_steps=1, data=data)
    changed = pair_rows()
    changed[7]["chosen"] += "!"
    write_rows(tmp_path / "pairs.jsonl", changed)
    with pytest.raises(RunError, match=r"the data is not what .*step-00000. was trained on. Give the same files"):
        run("dpo", model, data, copied, resume=True)


def test_a_finished_run_stays_as_it_is(finished: Path, tmp_path: Path):
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    values = read_yaml(copied / "config.yaml") | {"out": str(copied)}
    result = train_with(values.pop("method"), narrator=Quiet(), resume=True, **values)
    assert result.summary == json.loads((finished / "summary.json").read_text())
    for name in ("summary.json", "metrics.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        assert (copied / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_run_that_was_killed_before_its_model_was_saved(finished: Path, tmp_path: Path):
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(copied / "model")
    (copied / "summary.json").unlink()
    values = read_yaml(copied / "config.yaml") | {"out": str(copied)}
    summary = train_with(values.pop("method"), narrator=Quiet(), resume=True, **values).summary
    expected = json.loads((finished / "summary.json").read_text())
    assert weights(copied) == weights(finished)
    for name in ("loss", "after", "before", "last_step", "steps"):
        assert summary[name] == expected[name]


def test_where_there_is_nothing_to_go_on_from(model: Path, pairs: str, tmp_path: Path):
    with pytest.raises(RunError, match=r"there is nothing to resume in .*: no checkpoint was saved. Start the run anew, without --resume"):
        run("dpo", model, pairs, tmp_path / "none", resume=True)
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "config.yaml").touch()
    with pytest.raises(RunError, match=r"Start the run anew, with --overwrite in place of --resume"):
        run("dpo", model, pairs, tmp_path / "started", resume=True)


# Where a run may go.


def test_a_folder_that_holds_something_is_left_alone(finished: Path, model: Path, pairs: str, tmp_path: Path):
    with pytest.raises(RunError, match=r"is not empty. Give another folder as out, --resume to go on with its run, or --overwrite"):
        run("dpo", model, pairs, finished)
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is not empty" if not overwrite else "no run of prefopt"):
            run("dpo", model, pairs, mine, overwrite=overwrite)
    assert [path.name for path in mine.iterdir()] == ["model"]
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"is a file. Give a folder|cannot make the folder"):
            run("dpo", model, pairs, out)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(RunError, match="cannot make the folder"):
        run("dpo", model, pairs, tmp_path / ("long" * 100))
    with pytest.raises(ConfigError, match="resume and overwrite exclude each other"):
        run("dpo", model, pairs, finished, resume=True, overwrite=True)


def test_overwriting_replaces_the_run_and_nothing_else(finished: Path, model: Path, pairs: str, tmp_path: Path):
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    (copied / "notes.txt").write_text("mine")
    (copied / "dropped.jsonl").write_text("of the run before")
    run("dpo", model, pairs, copied, overwrite=True, max_steps=2)
    assert len(rows(copied)) == 2
    assert json.loads((copied / "summary.json").read_text())["steps"] == 2
    assert [path.name for path in (copied / "checkpoints").iterdir()] == ["step-000002"]
    assert (copied / "notes.txt").read_text() == "mine"
    assert not (copied / "dropped.jsonl").exists()


@pytest.mark.parametrize("mistake", ["model", "data", "max_tokens"])
def test_a_mistake_does_not_cost_the_run_that_would_be_replaced(finished: Path, model: Path, pairs: str, tmp_path: Path, mistake: str):
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    settings = {"model": model, "data": pairs} | {
        mistake: {"model": "/no/model", "data": str(tmp_path / "none.jsonl"), "max_tokens": 16}[mistake]
    }
    with pytest.raises(prefopt.errors.PrefoptError):
        run("dpo", settings.pop("model"), settings.pop("data"), copied, overwrite=True, **settings)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_model_is_not_deleted_before_it_is_trained(finished: Path, model: Path, pairs: str, tmp_path: Path):
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    for settings in ({"model": copied}, {"model": copied / "model"}, {"model": model, "reference": str(copied)}):
        with pytest.raises(RunError, match=r"lies in .*, and --overwrite would delete it before it is trained"):
            run("dpo", settings.pop("model"), pairs, copied, overwrite=True, **settings)
    assert weights(copied) == weights(finished)


def test_nor_is_the_base_of_an_adapter_that_is_trained(model: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run("sft", model, pairs, tmp_path / "base", max_steps=1)
    run("dpo", tmp_path / "base", pairs, tmp_path / "adapter", max_steps=1, lora_rank=2)
    before = weights(tmp_path / "base")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (tmp_path / "adapter", "~/base/model"):
        with pytest.raises(RunError, match=r"base.* lies in .*, and --overwrite would delete it before it is trained"):
            run("dpo", name, pairs, tmp_path / "base", overwrite=True, max_steps=1)
    assert weights(tmp_path / "base") == before


def test_a_run_that_is_refused_keeps_its_dropped_rows(model: Path, tmp_path: Path):
    one, other = ({"prompt": "a", "chosen": answer, "rejected": answer} for answer in ("b", "c"))
    first = write_rows(tmp_path / "first.jsonl", [*pair_rows(), one])
    second = write_rows(tmp_path / "second.jsonl", [*pair_rows()[1:], other])
    run("dpo", model, first, tmp_path / "run", on_bad_row="drop", max_steps=1)
    before = (tmp_path / "run" / "dropped.jsonl").read_bytes()
    for how in ({"resume": True}, {"overwrite": True, "max_tokens": 16}):
        with pytest.raises(RunError):
            run("dpo", model, second, tmp_path / "run", on_bad_row="drop", max_steps=1, **how)
        assert (tmp_path / "run" / "dropped.jsonl").read_bytes() == before


def test_dropped_rows_lie_beside_the_run(model: Path, tmp_path: Path):
    data = write_rows(tmp_path / "pairs.jsonl", [*pair_rows(), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(RunError, match="max_tokens"):  # too late for the file, which does not stand in the way of the next try
        run("dpo", model, data, tmp_path / "run", on_bad_row="drop", max_tokens=16)
    summary = run("dpo", model, data, tmp_path / "run", on_bad_row="drop", eval_data=data, max_steps=1).summary
    assert summary["data"]["summary"]["dropped"] == {"same_answers": 1}
    for name in ("dropped.jsonl", "dropped-eval.jsonl"):
        [line] = (tmp_path / "run" / name).read_text().splitlines()
        assert "pairs.jsonl:13" in line


# Trouble on the way.


def test_a_reference_that_is_another_function_is_found_before_the_first_step(model: Path, pairs: str, tmp_path: Path):
    import numpy as np
    import xxhash

    run("dpo", model, pairs, tmp_path / "first", max_steps=1)
    [path] = (tmp_path / "cache").rglob("*.sqlite")
    with sqlite3.connect(path) as connection:
        for key, value in connection.execute("SELECT key, value FROM logps").fetchall():
            wrong = (np.frombuffer(value, np.float32) + 0.01).tobytes()
            connection.execute(
                "UPDATE logps SET value = ?, checksum = ? WHERE key = ?", (wrong, xxhash.xxh3_64_intdigest(wrong) - 2**63, key)
            )
    connection.close()
    with pytest.raises(RunError, match=r"before the first step policy and reference differ by 0.01 nats per token on pairs.jsonl:\d+ and"):
        run("dpo", model, pairs, tmp_path / "second", max_steps=1)
    run("dpo", model, pairs, tmp_path / "third", max_steps=1, reference_cache=False)
    assert losses(tmp_path / "third") == pytest.approx(losses(tmp_path / "first"), abs=1e-6)


def test_a_cache_that_cannot_be_written_costs_warnings(model: Path, pairs: str, tmp_path: Path, plain_losses: list[float]):
    (tmp_path / "file").touch()
    with (
        pytest.warns(UserWarning, match="the reference cache .* cannot be used"),
        pytest.warns(UserWarning, match="tokens cannot be cached"),
    ):
        run("dpo", model, pairs, tmp_path / "run", cache_dir=tmp_path / "file")
    assert losses(tmp_path / "run") == plain_losses


def test_the_cache_serves_the_next_run(model: Path, pairs: str, tmp_path: Path):
    first, second = Asks(lambda done: None), Asks(lambda done: None)
    run("dpo", model, pairs, tmp_path / "first", max_steps=1, batch_size=4, narrator=first)
    run("dpo", model, pairs, tmp_path / "second", max_steps=1, batch_size=6, beta=0.5, seed=3, lora_rank=2, narrator=second)
    assert "reference: computed before training, and kept" in first.said
    [line] = [line for line in second.said if line.startswith("reference:")]
    served = int(line.split()[1])
    assert 0 < served <= 8  # what one step of four pairs needed


def test_a_loss_that_is_not_finite_stops_the_run(model: Path, pairs: str, tmp_path: Path):
    with pytest.raises(
        RunError, match=r"of step \d is .*; the weights were not changed. Examples whose own loss is not finite: pairs.json"
    ):
        run("dpo", model, pairs, tmp_path / "run", learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e30, save_every_steps=1)
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run"))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_example_that_is_larger_than_a_micro_batch_is_named(model: Path, tmp_path: Path):
    data = pair_rows()
    data[4]["prompt"] += " or so" * 20
    with pytest.raises(
        RunError, match=r"example pairs.jsonl:5 takes \d+ tokens, and a micro-batch may hold max_tokens = 64. Raise max_tokens to"
    ):
        run("dpo", model, write_rows(tmp_path / "pairs.jsonl", data), tmp_path / "run", max_tokens=64)
    assert list((tmp_path / "run").iterdir()) == []  # so that the next try finds nothing in its way


def test_a_disk_that_fills_up_is_said_and_costs_nothing(stopped, model: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copied = stopped(4, save_every_steps=2)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != "config.yaml"}
    write = Path.write_text

    def full(self: Path, text: str, **settings: Any) -> int:
        if self.name == ".metrics.jsonl.new":
            raise OSError(28, "No space left on device")
        return write(self, text, **settings)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space left on device. Make room, and go on with --resume"):
        run("dpo", model, pairs, copied, resume=True, save_every_steps=2)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in before} == before
    run("dpo", model, pairs, copied, resume=True, save_every_steps=2)
    assert losses(copied) == losses(tmp_path / "whole")


def test_settings_are_checked_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"betta: no such setting \(did you mean beta\?\)"):
        train_with("dpo", model="m", data="d", out=tmp_path, betta=1)
