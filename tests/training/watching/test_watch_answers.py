"""The watch's rules about answers: by which length figures are divided, on what KL is measured, what a change of length is put down to."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from tests.training.runs import pair_rows, run, write_rows
from tests.training.watching.test_watch import BEFORE, HELD_OUT, SAMPLED, dpo, evaluated, held_out, replay, steps

from prefopt.report.files import read_lines
from prefopt.training.examples import mean_lengths
from prefopt.trees import Completion, PromptTree, token_ids


def test_figures_of_held_out_answers_are_divided_by_their_own_length():
    """Held-out answers are twice as long as those trained on, so that the same fall is half as much per token."""
    longer = replace(held_out(), data=HELD_OUT | {"held_out_lengths": {"mean_chosen": 80.0, "mean_rejected": 72.0}})
    assert replay(longer, evaluated(steps(30), eval_logps_chosen=-57.9)) == [], "7.9 nats in 80 tokens"
    (found,) = replay(longer, evaluated(steps(30), eval_logps_chosen=-60.0))
    assert found.values["per_token"] == pytest.approx(-10 / 80)
    known = replace(longer, before=longer.before | {"eval/logps/chosen": -399.0})
    assert replay(known, []) == [], "4.99 nats per token"
    (found,) = replay(replace(longer, before=longer.before | {"eval/logps/chosen": -400.0}), [])
    assert found.values["nats_per_token"] == pytest.approx(5.0)
    long = replace(longer, data=HELD_OUT | {"held_out_lengths": {"mean_chosen": 400.0}})
    assert replay(long, evaluated(steps(30), eval_kl=39.0)) == [], "the budget is 0.1 nats per held-out token"


def test_the_surprise_of_the_first_step_is_divided_by_the_length_of_its_answers():
    assert replay(dpo(first_length=80.0), steps(1, logps_chosen=-399.0)) == []
    (found,) = replay(dpo(first_length=80.0), steps(1, logps_chosen=-480.0))
    assert found.values["nats_per_token"] == pytest.approx(6.0)
    assert replay(dpo(first_length=None), steps(1, logps_chosen=-480.0)) == []


def test_the_distance_on_its_own_answers_counts_where_it_is_measured():
    """The data's answers may be what the model never says: 46 nats there, next to none on its own."""
    run = replace(held_out(more={"eval_every_steps": 30}), before=BEFORE | SAMPLED | {"samples/kl": 0.0})
    assert replay(run, evaluated(steps(30, kl=46.0), eval_kl=46.0, samples_kl=0.01)) == []
    (found,) = replay(run, evaluated(steps(30, kl=1.0), eval_kl=1.0, samples_kl=25.0))
    assert "25 nats per completion from the reference (KL on 16 of its own answers)" in found.what
    (found,) = replay(held_out(), evaluated(steps(30), eval_kl=25.0))
    assert "(KL as estimated on held-out pairs)" in found.what
    at_the_end_only = replace(run, settings={name: value for name, value in run.settings.items() if name != "eval_every_steps"})
    (found,) = replay(at_the_end_only, steps(20, kl=46.0))
    assert "(KL as estimated on the pairs of the last steps)" in found.what
    long = replace(run, data=HELD_OUT | {"held_out_lengths": {"mean_chosen": 1000.0}})
    (found,) = replay(long, evaluated(steps(30), samples_kl=25.0))
    assert found.values["budget"] == 20.0, "samples are cut at 128 tokens, so the length of the data's answers gives no more"


@pytest.mark.parametrize(("chosen", "now", "asked"), [(40.0, 90.0, True), (40.0, 15.0, False), (18.5, 15.0, True), (18.5, 90.0, False)])
def test_a_change_of_length_is_put_down_to_the_pairs_only_where_they_ask_for_it(chosen: float, now: float, asked: bool):
    run = replace(held_out(), data=HELD_OUT | {"summary": {"mean_chosen": chosen, "mean_rejected": 36.0}})
    (found,) = replay(run, evaluated(steps(30), samples_length=now))
    assert f"{chosen:.3g} tokens, rejected ones 36" in found.what
    assert ("length does" in found.what, "the pairs do not ask for it" in found.what) == (asked, not asked)
    assert ("leave out pairs" in found.do, "lower --learning-rate (now 5e-06)" in found.do) == (asked, not asked)


def test_answers_that_lost_their_end_did_not_grow():
    """They have run into the limit, which is for the rule about endings to say."""
    for ended, length in ((0.0, 128.0), (0.25, 110.0)):
        found = replay(held_out(), evaluated(steps(30), samples_length=length, samples_ended=ended))
        assert [finding.rule for finding in found] == ["endings"]


@pytest.mark.parametrize(
    ("rule", "figures", "limit"),
    [
        ("lengths", {"samples_length": 24.0 - 1.0}, 40 / math.exp(2.5 * 0.6 * math.sqrt(1 / 8))),
        ("endings", {"samples_ended": 0.0}, 10 / 16),
        ("repetition", {"samples_repetition": 0.5}, 0.05 + 0.75 / 4),
        ("entropy", {"samples_entropy": 0.1}, 0.75),
        ("entropy", {"samples_entropy": 6.0}, 4.5),
        ("displacement", {"eval_logps_chosen": -70.0}, -4.0),
    ],
)
def test_a_finding_says_where_its_rule_begins_to_speak(rule: str, figures: dict[str, float], limit: float):
    (found,) = replay(held_out(), evaluated(steps(30), **figures))
    assert (found.rule, found.values["limit"]) == (rule, pytest.approx(limit))


def test_mean_lengths_are_of_scored_tokens_and_by_weight():
    def tree(weight: float, *lengths: int) -> PromptTree:
        return PromptTree(token_ids([1]), tuple(Completion(token_ids(range(length))) for length in lengths), weight=weight)

    assert mean_lengths([tree(1.0, 10, 4), tree(3.0, 2, 8)]) == {"mean_chosen": 4.0, "mean_rejected": 7.0}
    masked = PromptTree(token_ids([1]), (Completion(token_ids(range(4)), scored=np.array([False, True, True, False])),))
    assert mean_lengths([tree(1.0, 4), masked]) == {"mean_answer": 3.0}
    assert mean_lengths([]) == mean_lengths([tree(0.0, 3)]) == {}


def test_nats_per_token_of_a_real_run_are_those_of_its_held_out_examples(tmp_path: Path, model_folder: Callable[..., Path]):
    """The held-out chosen answers are more than twice as long as those trained on; the model is not trained and knows neither."""
    short = [row | {"chosen": " Aye."} for row in pair_rows(8)]
    long = [row | {"chosen": " The sea is wide and deep, and the sailors sleep."} for row in pair_rows(3)]
    data, held = write_rows(tmp_path / "pairs.jsonl", short), write_rows(tmp_path / "held_out.jsonl", long)
    settings = {"max_steps": 1, "batch_size": 4, "samples": 0, "report": False}
    for name, more in (("held", {"eval_data": held}), ("first", {})):
        folder = run("dpo", model_folder(), data, tmp_path / name, **settings, **more).folder
        (found,) = [line for line in read_lines(folder / "watch.jsonl") if line["rule"] == "untrained_reference"]
        assert 5.5 < found["values"]["nats_per_token"] < 6.5, "about log 384, whatever the length"
    folder = tmp_path / "held"
    lines, summary = read_lines(folder / "held_out.jsonl"), json.loads((folder / "summary.json").read_text())
    expected = -sum(line["before"]["logps/chosen"] for line in lines) / sum(line["lengths"][0] for line in lines)
    (found,) = [line for line in read_lines(folder / "watch.jsonl") if line["rule"] == "untrained_reference"]
    assert found["values"]["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert summary["data"]["held_out_lengths"]["mean_chosen"] == fmean(line["lengths"][0] for line in lines)
    assert summary["data"]["held_out_lengths"]["mean_chosen"] > 2 * summary["data"]["summary"]["mean_chosen"]
