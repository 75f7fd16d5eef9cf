"""Answers at evaluations: always to the same prompts, with figures that a reader can check by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.runs import pair_rows, run, write_rows

from prefopt.models.policy import Policy
from prefopt.models.proof import prove
from prefopt.training.processes import Processes
from prefopt.training.samples import Sampler, choose_prompts, make_sampler, means, repetition, shown_text
from prefopt.trees import Completion, PromptTree, token_ids

ONE = Processes(0, 1, torch.device("cpu"))


def tree(*prompt: int, row: str = "") -> PromptTree:
    return PromptTree(token_ids(prompt), (Completion(token_ids([5])),), row_id=row)


def test_repetition_counts_the_stretches_that_came_before():
    assert repetition(token_ids([1, 2, 3])) == 0  # too short to hold a stretch
    assert repetition(token_ids([1, 2, 3, 4, 5, 6])) == 0
    # 1212, 2121, 1212, 2121, 1212: two different ones in five
    assert repetition(token_ids([1, 2, 1, 2, 1, 2, 1, 2])) == pytest.approx(3 / 5)
    assert repetition(token_ids([7] * 10)) == pytest.approx(6 / 7)


def test_prompts_differ_fit_and_depend_on_the_seed_alone():
    trees = [tree(1, 2, row="a"), tree(1, 2, row="b"), tree(3, row="c"), tree(*range(1, 30), row="long"), tree(4, row="d")]
    chosen = choose_prompts(trees, num=10, room=10, seed=0)
    assert len(chosen) == 3
    assert {one.row_id for one in chosen} in ({"a", "c", "d"}, {"b", "c", "d"})
    assert choose_prompts(trees, num=10, room=10, seed=0) == chosen
    assert len(choose_prompts(trees, num=2, room=10, seed=0)) == 2
    assert choose_prompts(trees, num=2, room=0, seed=0) == []
    orders = {tuple(one.row_id for one in choose_prompts(trees, num=3, room=10, seed=seed)) for seed in range(20)}
    assert len(orders) > 2


def test_means_are_those_of_the_metrics():
    answers = [
        {"num_tokens": 2, "ended": True, "repetition": 0.0, "entropy": 1.0},
        {"num_tokens": 5, "ended": False, "repetition": 0.5, "entropy": 2.0},
    ]
    assert means(answers) == {"samples/length": 3.5, "samples/ended": 0.5, "samples/repetition": 0.25, "samples/entropy": 1.5}


def test_texts_are_cut_where_they_are_very_long(tokenizer):
    short = token_ids(tokenizer("  a text ", add_special_tokens=False)["input_ids"])
    assert shown_text(tokenizer, short) == "a text"
    long = shown_text(tokenizer, np.tile(short, 2000))
    assert long.endswith(" [...]")
    assert len(long) == 4006


def test_the_entropy_is_that_of_the_model_s_distributions(make_model, tokenizer):
    model = make_model().eval()
    policy = Policy(model, prove(model, max_length=64).path)
    sampler = Sampler([tree(5, 6, 7, row="r")], tokenizer, {2}, 6, 0, None, ONE)
    (answer,) = sampler.answers(policy, 3)
    assert (answer["step"], answer["row"], answer["num_tokens"] <= 6) == (3, "r", True)
    assert sampler.answers(policy, 3) == [answer]  # the same draws each time
    with policy.generating() as plain:
        from prefopt.rollout.sample import sample

        ((ids,),) = sample(plain, [token_ids([5, 6, 7])], eos_ids={2}, max_new_tokens=6, seed=0)
        logits = plain(input_ids=torch.tensor([[5, 6, 7, *ids.tolist()]])).logits[0, 2:-1]
    logps = logits.log_softmax(-1)
    assert answer["entropy"] == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-5)
    assert answer["ended"] == (int(ids[-1]) == 2)


def test_no_sampler_where_there_is_nothing_to_answer(make_model, tokenizer):
    model = make_model()
    policy = Policy(model, prove(model, max_length=64).path)
    same = {"max_new_tokens": 8, "max_length": 16, "seed": 0, "autocast": None, "processes": ONE}
    assert make_sampler(policy, [tree(1, 2)], tokenizer, {2}, num=0, **same) is None
    assert make_sampler(policy, [tree(*range(1, 12))], tokenizer, {2}, num=4, **same) is None
    assert make_sampler(policy, [tree(1, 2)], tokenizer, {2}, num=4, **same) is not None


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_answers_and_held_out_examples_at_each_evaluation(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out, without = tmp_path / "run", tmp_path / "without"
    same = {"eval_fraction": 0.3, "eval_every_steps": 2}
    run("dpo", model_folder(), pairs, out, samples=2, sample_tokens=8, **same)
    run("dpo", model_folder(), pairs, without, **same)
    answers = lines(out / "samples.jsonl")
    assert [answer["step"] for answer in answers] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert len({answer["prompt"] for answer in answers}) == 2
    assert all(answer["num_tokens"] <= 8 for answer in answers)
    metrics = lines(out / "metrics.jsonl")
    assert [row["step"] for row in metrics if "samples/length" in row] == [2, 4, 5]
    assert metrics[-1]["samples/length"] == np.mean([answer["num_tokens"] for answer in answers[-2:]])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["samples/entropy"] == pytest.approx(np.mean([answer["entropy"] for answer in answers[:2]]))
    held_out = lines(out / "held_out.jsonl")
    assert len(held_out) == summary["data"]["num_held_out"]
    for name in ("rewards/margin", "loss", "kl"):
        assert np.mean([row["after"][name] for row in held_out]) == pytest.approx(summary["after"][f"eval/{name}"], abs=1e-6)
        assert np.mean([row["before"][name] for row in held_out]) == pytest.approx(summary["before"][f"eval/{name}"], abs=1e-6)
    row = next(row for row in pair_rows() if row["prompt"] == held_out[0]["prompt"])
    assert [row["chosen"].strip(), row["rejected"].strip()] == held_out[0]["completions"]
    # Answers and evaluations change nothing about training.
    assert [row["loss"] for row in metrics] == [row["loss"] for row in lines(without / "metrics.jsonl")]
    assert not (without / "samples.jsonl").exists()


def test_without_held_out_data_training_prompts_are_answered(model_folder: Callable[..., Path], tmp_path: Path):
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    run("dpo", model_folder(), data, tmp_path / "run", max_steps=1, samples=1, sample_tokens=4)
    answers = lines(tmp_path / "run" / "samples.jsonl")
    assert [answer["step"] for answer in answers] == [0, 1]
    assert answers[0]["prompt"] in {row["prompt"] for row in pair_rows()}
    assert not (tmp_path / "run" / "held_out.jsonl").exists()
