"""The watch on real runs: small ones that provoke each rule, and healthy ones on which it says nothing."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.training.runs import pair_rows, run, write_rows

from prefopt.report.files import read_lines
from prefopt.training.watching.rules import RULES

Rows = list[dict[str, Any]]
Findings = dict[str, dict[str, Any]]
provoked: set[str] = set()
"""Rules that spoke in the tests of this file."""


class Bench:
    """Runs in a folder, each with what the watch said of it, by rule."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.count = folder, model, 0

    def run(self, method: str, model: Path, data: Rows, **settings: Any) -> Findings:
        """What the watch said in a run on the data; its model is in `self.out / "model"`."""
        self.count += 1
        self.out = self.folder / str(self.count)
        path = write_rows(self.folder / f"{self.count}.jsonl", data)
        usual = {"batch_size": 8, "sample_tokens": 24, "samples": 8, "report": False}
        run(method, model, path, self.out, **usual | settings)
        findings = {line["rule"]: line for line in read_lines(self.out / "watch.jsonl")}
        provoked.update(findings)
        return findings

    def trained(self, data: Rows, **settings: Any) -> Path:
        """A model after SFT on the data, of which the watch has nothing to say."""
        assert self.run("sft", self.model, data, **{"learning_rate": 1e-2, "epochs": 6} | settings) == {}
        return self.out / "model"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Bench:
    return Bench(tmp_path_factory.mktemp("watch"), model_folder())


@pytest.fixture(scope="module")
def answers(bench: Bench) -> Path:
    """A model that answers yes and no equally often."""
    return bench.trained(both_answers(96), eval_fraction=0.1, eval_every_steps=20)


def both_answers(num: int) -> Rows:
    """Demonstrations, every second one of a rejected answer."""
    return [{"prompt": row["prompt"], "completion": row["chosen" if place % 2 else "rejected"]} for place, row in enumerate(pair_rows(num))]


def noisy(rows: Rows, share: float) -> Rows:
    """The pairs, a share of them turned round."""
    draws = random.Random(0)
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} if draws.random() < share else row for row in rows]


def words(draws: random.Random, num: int) -> str:
    return " " + " ".join(draws.choice(["sea", "wide", "deep", "sings", "sailors", "sleep", "water", "minutes", "egg"]) for _ in range(num))


HEALTHY: dict[str, Any] = {"learning_rate": 3e-4, "epochs": 2, "eval_fraction": 0.2, "eval_every_steps": 6}


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_rank": 8, "learning_rate": 1e-3}, {"beta": 0.3, "samples": 4}, {"eval_fraction": 0.0}],
    ids=["full", "lora", "beta", "all"],
)
def test_a_healthy_run_hears_nothing(bench: Bench, answers: Path, settings: dict[str, Any]):
    """SFT first, pairs of which one in seven is labelled wrong, sane settings."""
    assert bench.run("dpo", answers, noisy(pair_rows(160), 0.15), **HEALTHY | settings) == {}


def test_a_rate_far_too_high_moves_all_weight_away_from_the_answers(bench: Bench, answers: Path):
    settings = {"learning_rate": 3e-3, "epochs": 3, "eval_fraction": 0.2, "eval_every_steps": 6, "reference_cache": False}
    found = bench.run("dpo", answers, pair_rows(96), **settings)
    assert found.keys() >= {"learning_rate", "displacement", "kl", "endings"}
    assert found["learning_rate"]["step"] == 0
    assert found["displacement"]["severity"] == "warning"
    assert found["displacement"]["values"]["chosen"] < -2
    assert found["displacement"]["values"]["rejected"] < found["displacement"]["values"]["chosen"]
    assert found["kl"]["values"]["kl"] > found["kl"]["values"]["budget"] == 20
    assert found["endings"]["values"]["now"] < found["endings"]["values"]["before"]


def test_a_budget_of_the_users_own(bench: Bench, answers: Path):
    found = bench.run("dpo", answers, noisy(pair_rows(160), 0.15), **HEALTHY, kl_budget=0.5)
    assert found.keys() == {"kl"}
    assert found["kl"]["values"]["budget"] == 0.5


def test_random_labels_are_near_half(bench: Bench, answers: Path):
    found = bench.run("dpo", answers, noisy(pair_rows(96) * 6, 0.5), batch_size=16, epochs=1, learning_rate=3e-4)
    assert found.keys() == {"accuracy_near_half"}
    assert found["accuracy_near_half"]["values"]["accuracy"] < 0.53


def test_a_loss_that_slopes_the_wrong_way_at_first(bench: Bench, answers: Path):
    """DiscoPOP with a small beta: no step carries it over the bump."""
    found = bench.run("discopop", answers, noisy(pair_rows(160), 0.15), learning_rate=1e-4, epochs=3, samples=0)
    assert found.keys() == {"wrong_way"}
    assert found["wrong_way"]["values"]["accuracy"] < 0.4


def test_random_labels_are_overfitted_in_many_epochs(bench: Bench, answers: Path):
    settings = {"epochs": 12, "learning_rate": 1e-3, "eval_fraction": 0.25, "eval_every_steps": 20, "samples": 0}
    found = bench.run("dpo", answers, noisy(pair_rows(96), 0.5), **settings)
    assert "overfitting" in found
    values = found["overfitting"]["values"]
    assert values["now"] > values["best"]
    assert values["training_now"] < values["training_before"]


def test_overfitting_of_sft(bench: Bench, answers: Path):
    draws = random.Random(5)
    data = [{"prompt": row["prompt"], "completion": words(draws, 6)} for row in pair_rows(48)]
    found = bench.run("sft", answers, data, learning_rate=1e-2, epochs=20, eval_fraction=0.3, eval_every_steps=10, samples=0)
    assert found.keys() == {"overfitting"}
    assert found["overfitting"]["values"]["best_step"] > 0
    assert f"--max-steps {found['overfitting']['values']['best_step']}" in found["overfitting"]["do"]


def test_pairs_learned_by_heart_where_nothing_is_held_out(bench: Bench, answers: Path):
    found = bench.run("dpo", answers, noisy(pair_rows(40), 0.5), batch_size=4, epochs=12, learning_rate=3e-3)
    assert found["by_heart"]["values"]["again"] > found["by_heart"]["values"]["new"] + 0.15


def test_a_rate_far_too_low_moves_nothing(bench: Bench, answers: Path):
    found = bench.run("dpo", answers, pair_rows(96), epochs=2, learning_rate=1e-6, eval_fraction=0.2)
    assert found.keys() == {"learning_rate", "no_progress"}
    assert found["no_progress"]["step"] == 11, "half-way after warm-up of 2 of 20 steps"
    found = bench.run("sft", answers, both_answers(96), epochs=2, learning_rate=1e-7, eval_fraction=0.2)
    assert found.keys() == {"learning_rate", "no_progress"}


def test_an_example_of_garbage_is_a_gradient_spike(bench: Bench, answers: Path):
    draws = random.Random(1)
    data = both_answers(96)
    data[70] = {"prompt": "Is it?", "completion": " " + "".join(chr(draws.randrange(0x400, 0x500)) for _ in range(40))}
    found = bench.run("sft", answers, data, batch_size=2, epochs=1, learning_rate=3e-4)
    assert found.keys() == {"gradient_spike"}
    assert found["gradient_spike"]["values"]["grad_norm"] > 10 * found["gradient_spike"]["values"]["median"]


def test_steps_far_too_large_throw_the_weights_off(bench: Bench, answers: Path):
    at_once = bench.run("sft", answers, both_answers(96), batch_size=4, epochs=1, learning_rate=0.3)
    assert at_once.keys() == {"learning_rate", "diverged"}
    later = bench.run("sft", answers, both_answers(192), batch_size=4, epochs=1, learning_rate=0.05, warmup_ratio=0.99)
    assert later.keys() == {"learning_rate", "loss_spike"}
    assert later["loss_spike"]["step"] > 20


def test_pairs_that_a_word_tells_apart(bench: Bench, answers: Path):
    found = bench.run("dpo", answers, pair_rows(400), epochs=1, learning_rate=5e-4)
    assert found["too_easy"]["values"]["accuracy"] >= 0.98
    assert 25 <= found["too_easy"]["step"] <= 50


def test_a_model_without_sft(bench: Bench):
    found = bench.run("dpo", bench.model, pair_rows(24), batch_size=2, epochs=1, learning_rate=3e-4)
    assert found.keys() == {"untrained_reference"}
    assert found["untrained_reference"]["step"] == 1, "nothing is held out, so the first step tells"
    assert 5 < found["untrained_reference"]["values"]["nats_per_token"] < 7, "about log 384"


def test_a_model_that_was_tuned_on_something_far_longer(bench: Bench):
    draws = random.Random(2)
    prompts = [row["prompt"] for row in pair_rows(64)]
    essays = [{"prompt": prompt, "completion": words(draws, 100)} for prompt in prompts]
    essayist = bench.trained(essays, epochs=4, samples=0, max_length=400)
    pairs = [{"prompt": prompt, "chosen": words(draws, 2), "rejected": words(draws, 3)} for prompt in prompts]
    found = bench.run("dpo", essayist, pairs, batch_size=4, epochs=1, learning_rate=3e-4, samples=4, sample_tokens=18)
    assert found.keys() == {"untrained_reference"}
    assert found["untrained_reference"]["values"].keys() == {"samples", "sample_tokens", "answer_length"}


def test_too_few_steps(bench: Bench, answers: Path):
    found = bench.run("dpo", answers, pair_rows(24), epochs=1, learning_rate=3e-4)
    assert found.keys() == {"few_steps"}
    assert bench.run("dpo", answers, pair_rows(24), max_steps=3, learning_rate=3e-4) == {}


def test_another_reference_and_a_large_beta(bench: Bench, answers: Path):
    found = bench.run("dpo", answers, pair_rows(24), batch_size=4, reference=str(bench.model), beta=2.0, learning_rate=3e-4)
    assert found.keys() == {"start_difference", "beta"}
    assert "--reference names another model" in found["start_difference"]["what"]


def test_reference_sums_that_come_with_the_data(bench: Bench, answers: Path):
    rows = [row | {"reference_chosen_logp": -90.0, "reference_rejected_logp": -95.0} for row in pair_rows(24)]
    found = bench.run("dpo", answers, rows, batch_size=4, learning_rate=3e-4)
    assert found.keys() == {"start_difference"}
    assert "came with the data" in found["start_difference"]["what"]


@pytest.fixture(scope="module")
def long_and_short(bench: Bench) -> Path:
    """A model whose answers have two to eight words."""
    draws = random.Random(3)
    data = [{"prompt": row["prompt"], "completion": words(draws, draws.choice([2, 3, 4, 6, 8]))} for row in pair_rows(192)]
    return bench.trained(data, epochs=3)


def test_longer_answers_win(bench: Bench, long_and_short: Path):
    draws = random.Random(4)
    pairs = [{"prompt": row["prompt"], "chosen": words(draws, 8), "rejected": words(draws, 2)} for row in pair_rows(96)]
    settings = {"learning_rate": 5e-4, "epochs": 3, "eval_fraction": 0.2, "eval_every_steps": 10, "sample_tokens": 60, "samples": 16}
    found = bench.run("dpo", long_and_short, pairs, **settings)
    assert found.keys() == {"lengths"}
    values = found["lengths"]["values"]
    assert values["now"] > 1.5 * values["before"]
    assert values["mean_chosen"] > 2 * values["mean_rejected"]


def test_one_answer_wins_over_all_others(bench: Bench, long_and_short: Path):
    """The policy comes to say it only, and what it says over and over repeats."""
    draws = random.Random(6)
    pairs = [{"prompt": row["prompt"], "chosen": " sea" * 10, "rejected": words(draws, 8)} for row in pair_rows(96)]
    found = bench.run("dpo", long_and_short, pairs, learning_rate=3e-3, epochs=3, eval_fraction=0.2, eval_every_steps=10, beta=0.05)
    assert found.keys() >= {"entropy", "repetition"}
    assert found["entropy"]["values"]["now"] < 0.5 * found["entropy"]["values"]["before"]
    assert found["repetition"]["values"]["now"] > found["repetition"]["values"]["before"] + 0.15
    assert "over 77" in found["repetition"]["what"], "few examples are named as the cause"


@pytest.fixture(scope="module", autouse=True)
def _every_rule_was_provoked(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    tests = {item.name.partition("[")[0] for item in request.session.items if item.path == Path(__file__)}
    here = {name for name in globals() if name.startswith("test_")}
    if tests == here and not request.session.testsfailed:
        assert provoked == {rule.name for rule in RULES}
