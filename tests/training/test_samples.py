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
from prefopt.models.reference import FrozenCopy
from prefopt.rollout.sample import sample
from prefopt.training.group.processes import Processes
from prefopt.training.record.logbook import Logbook
from prefopt.training.samples import Sampler, choose_prompts, make_sampler, means, repetition, shown_prompt, shown_text
from prefopt.training.watching.watched import WatchedRun
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


def test_a_prompt_is_shown_as_the_model_reads_it(chat_tokenizer):
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Is tea hot? " * 500},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    whole = chat_tokenizer.apply_chat_template(chat[2:], add_generation_prompt=True, tokenize=False)
    assert whole == "<begin><turn>assistant\nYes.<end>\n<turn>user\nWhy?<end>\n<turn>assistant\n"
    assert shown_prompt(chat_tokenizer, token_ids(chat_tokenizer(whole, add_special_tokens=False)["input_ids"])) == whole
    long = chat_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    shown = shown_prompt(chat_tokenizer, token_ids(chat_tokenizer(long, add_special_tokens=False)["input_ids"]))
    assert len(shown) == 4007
    assert shown.startswith("<begin><turn>system\nBe kind.<end>\n<turn>user\nIs tea hot?")
    assert shown.endswith(whole.removeprefix("<begin>"))


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (" Yes.<end>", "Yes."),
        ("Yes.<end><pad><pad>", "Yes."),
        ("Yes.", "Yes."),
        ("Yes.<end>\n<turn>user\nWhy?<end>", "Yes.<end>\n<turn>user\nWhy?"),  # turns are not run together
        ("<turn><turn>a<end>", "<turn><turn>a"),
        ("<end>", ""),
    ],
)
def test_an_answer_is_shown_without_its_end_and_with_what_it_should_not_hold(tokenizer, written: str, shown: str):
    assert shown_text(tokenizer, token_ids(tokenizer(written, add_special_tokens=False)["input_ids"])) == shown


def test_the_files_of_a_chat_run_hold_prompts_as_the_model_read_them(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    run("dpo", model_folder(), pairs, out, max_steps=1, text_as="chat", eval_fraction=0.3, samples=1, sample_tokens=4)
    questions = {f"<begin><turn>user\n{row['prompt']}<end>\n<turn>assistant\n" for row in pair_rows()}
    held_out = lines(out / "held_out.jsonl")
    assert {line["prompt"] for line in [*held_out, *lines(out / "samples.jsonl")]} <= questions
    assert all("<" not in text for line in held_out for text in line["completions"])


def test_the_entropy_is_that_of_the_model_s_distributions(make_model, tokenizer):
    model = make_model().eval()
    policy = Policy(model, prove(model, max_length=64).path)
    sampler = Sampler([tree(5, 6, 7, row="r")], None, tokenizer, {2}, 6, 0, None, ONE)
    (answer,) = sampler.answers(policy, 3)
    assert (answer["step"], answer["row"], answer["num_tokens"] <= 6) == (3, "r", True)
    assert sampler.answers(policy, 3) == [answer]  # the same draws each time
    with policy.generating() as plain:
        ((ids,),) = sample(plain, [token_ids([5, 6, 7])], eos_ids={2}, max_new_tokens=6, seed=0)
        logits = plain(input_ids=torch.tensor([[5, 6, 7, *ids.tolist()]])).logits[0, 2:-1]
    logps = logits.log_softmax(-1)
    assert answer["entropy"] == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-5)
    assert answer["ended"] == (int(ids[-1]) == 2)


def test_the_kl_is_that_of_its_own_answers(make_model, tokenizer):
    model = make_model().eval()
    policy = Policy(model, prove(model, max_length=64).path)
    start = FrozenCopy.of(policy)
    sampler = Sampler([tree(5, 6, 7, row="r"), tree(9, 4, row="s")], start, tokenizer, {2}, 6, 0, None, ONE)
    before = sampler.answers(policy, 0)
    assert [answer["kl"] for answer in before] == [0.0, 0.0]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.3)
    answers = sampler.answers(policy, 1)
    with policy.generating() as plain:
        drawn = sample(plain, [token_ids([5, 6, 7]), token_ids([9, 4])], eos_ids={2}, max_new_tokens=6, seed=0)
    for answer, prompt, (ids,) in zip(answers, ([5, 6, 7], [9, 4]), drawn, strict=True):
        row = torch.tensor([[*prompt, *ids.tolist()]])
        logps = []
        for one in (policy, start.policy):
            with one.generating() as plain:
                logits = plain(input_ids=row).logits[0, len(prompt) - 1 : -1].double()
            logps.append(logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0])
        x = logps[0] - logps[1]
        assert answer["kl"] == pytest.approx(((-x).exp() - 1 + x).sum().item(), rel=1e-4)
        assert answer["kl"] > 0.01
    assert means(answers)["samples/kl"] == pytest.approx(np.mean([answer["kl"] for answer in answers]))


def test_no_sampler_where_there_is_nothing_to_answer(make_model, tokenizer):
    model = make_model()
    policy = Policy(model, prove(model, max_length=64).path)
    same = {"max_new_tokens": 8, "max_length": 16, "seed": 0, "autocast": None, "processes": ONE}
    assert make_sampler(policy, None, [tree(1, 2)], tokenizer, {2}, num=0, **same) is None
    assert make_sampler(policy, None, [tree(*range(1, 12))], tokenizer, {2}, num=4, **same) is None
    assert make_sampler(policy, None, [tree(1, 2)], tokenizer, {2}, num=4, **same) is not None


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


@pytest.mark.parametrize(
    ("settings", "there"),
    [({"lora_rank": 2}, True), ({"reference_cache": False}, True), ({}, False), ({"lora_rank": 2, "reference_cache": False}, True)],
)
def test_the_kl_is_there_wherever_the_reference_can_be_asked(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, settings: dict[str, object], there: bool
):
    run("dpo", model_folder(), pairs, tmp_path / "run", max_steps=2, learning_rate=1e-2, samples=2, sample_tokens=6, **settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert ("samples/kl" in summary["before"]) == ("samples/kl" in summary["after"]) == there
    if there:
        assert abs(summary["before"]["samples/kl"]) < 1e-6
        assert summary["after"]["samples/kl"] > 1e-4


def test_the_watch_counts_the_answers_that_there_are(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All rows have one prompt, so that there is one answer, however many were asked for: far too little to say that none ends."""
    watched: list[WatchedRun] = []
    monkeypatch.setattr(Logbook, "follow", lambda book, run: watched.append(run))
    data = write_rows(tmp_path / "pairs.jsonl", [row | {"prompt": "Is it good?"} for row in pair_rows()])
    run("dpo", model_folder(), data, tmp_path / "run", max_steps=1, samples=4, sample_tokens=4)
    assert len(lines(tmp_path / "run" / "samples.jsonl")) == 2
    assert [found.num_samples for found in watched] == [1]


def test_without_held_out_data_training_prompts_are_answered(model_folder: Callable[..., Path], tmp_path: Path):
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    run("dpo", model_folder(), data, tmp_path / "run", max_steps=1, samples=1, sample_tokens=4)
    answers = lines(tmp_path / "run" / "samples.jsonl")
    assert [answer["step"] for answer in answers] == [0, 1]
    assert answers[0]["prompt"] in {row["prompt"] for row in pair_rows()}
    assert not (tmp_path / "run" / "held_out.jsonl").exists()
