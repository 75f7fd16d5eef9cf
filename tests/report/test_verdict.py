"""The verdict claims what the figures carry, and no more."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.report.made import FINDINGS, make_run

from prefopt.report.figures import Change
from prefopt.report.record import read_run
from prefopt.report.state import RunState
from prefopt.report.verdict import Verdict, heading, judge, log_probabilities, lowered, pairs_learned, verdict


def verdict_of(run: Path, state: str = "finished", step: int = 120, message: str = "") -> Verdict:
    found = verdict(read_run(run), RunState(state, step, 120, message))  # type: ignore[arg-type]
    return Verdict(found.headline, found.tone, *(text.replace("\u00a0", " ") for text in (found.learned, found.cost, found.advice)))


def pairs(before: float, after: float, error: float, num: int = 200, **others: Any) -> dict[str, Change]:
    return {"rewards/accuracy": Change("rewards/accuracy", before, after, error, error, num), **others}


@pytest.mark.parametrize(
    ("after", "outcome", "says"),
    [
        (0.7, "learned", "well beyond what chance would give"),
        (0.59, "perhaps", "more than chance would give, though not by much"),
        (0.53, "nothing", "which chance alone may give"),
        (0.5, "nothing", "which chance alone may give"),
        (0.40, "worse", "which is worse than before"),
    ],
)
def test_a_gain_is_judged_by_its_standard_error(after: float, outcome: str, says: str):
    figures = pairs(0.5, after, 0.035)
    assert judge(figures) == outcome
    assert says in pairs_learned(figures, outcome)


def test_losses_without_an_error_go_by_their_direction_and_with_examples_by_theirs():
    assert judge({"loss": Change("loss", 4.0, 3.0)}) == "learned"
    assert judge({"loss": Change("loss", 4.0, 4.1)}) == "worse"
    assert judge({"loss": Change("loss", 4.0, 4.0)}) == "nothing"
    unsure = Change("logps/chosen", -100.0, -99.0, 5.0, 0.9)
    assert judge({"loss": Change("loss", 4.0, 3.96), "logps/chosen": unsure}) == "nothing"
    sure = Change("logps/chosen", -100.0, -90.0, 5.0, 0.9)
    assert judge({"loss": Change("loss", 4.0, 3.6), "logps/chosen": sure}) == "learned"
    assert judge({}) == "open"
    assert judge({"loss": Change("loss", None, 3.0)}) == "open"


def test_few_pairs_are_called_few():
    assert "though 20 pairs are few" in pairs_learned(pairs(0.5, 0.9, 0.07, num=20), "learned")
    assert "few" not in pairs_learned(pairs(0.5, 0.9, 0.02, num=200), "learned")


def test_a_loss_that_rose_beside_a_better_accuracy_is_explained():
    figures = pairs(0.5, 0.7, 0.03, loss=Change("loss", 0.693, 0.705))
    assert "the loss went from 0.693 to 0.705, so some of the pairs that it gets wrong it gets wrong with confidence" in pairs_learned(
        figures, "learned"
    )
    fell = pairs(0.5, 0.7, 0.03, loss=Change("loss", 0.705, 0.693))
    assert "confidence" not in pairs_learned(fell, "learned")


def test_a_good_run_is_told_in_three_sentences(tmp_path: Path):
    found = verdict_of(make_run(tmp_path / "run"))
    assert (found.headline, found.tone) == ("It learned what it was shown", "good")
    assert found.learned == (
        "Of 60 held-out pairs the chosen answer now has the higher reward in 73 % (standard error 6 %), against 50 % before training, "
        "well beyond what chance would give; the margin went from 0 to 0.446 and the loss from 0.693 to 0.545."
    )
    assert found.cost == (
        "It moved 2.20 nats per answer away from its reference (KL on the data's answers); the chosen answers' log-probability fell "
        "by 1.8 nats, that of the rejected fell by 6.2 nats; its own answers went from 12 to 29 tokens (4 prompts); 120 steps took "
        "7 min 12 s and at most 1.88 GB."
    )
    assert found.advice.startswith("Nothing that the watch looks at speaks against it; read the answers below")
    assert [sentence.count(". ") for sentence in (found.learned, found.cost, found.advice)] == [0, 0, 0]
    assert all(sentence.endswith(".") and sentence[0].isupper() for sentence in (found.learned, found.cost, found.advice))


def test_a_run_that_learned_nothing_or_the_wrong_thing_is_not_praised(tmp_path: Path):
    nothing = verdict_of(make_run(tmp_path / "nothing", gain=0.0))
    assert (nothing.headline, nothing.tone) == ("No more learned than chance would give", "mixed")
    assert "no reason yet to prefer it" in nothing.advice
    worse = verdict_of(make_run(tmp_path / "worse", gain=-1.0))
    assert (worse.headline, worse.tone) == ("Worse than before training", "bad")
    assert "Keep the model that it started from" in worse.advice


def test_warnings_come_first_in_the_advice_and_into_the_headline(tmp_path: Path):
    found = verdict_of(make_run(tmp_path / "run", findings=[{**FINDINGS[1], "severity": "warning"}, FINDINGS[0]]))
    assert (found.headline, found.tone) == ("It learned what it was shown, with 2 warnings", "mixed")
    # What came of the run, before a setting that is odd.
    assert found.advice == (
        "Before you rely on it, see to what the watch warns of: lower the learning rate, raise `beta`, or add a term that holds the chosen "
        "answers up; look at the answers below first."
    )
    noted = verdict_of(make_run(tmp_path / "noted", findings=FINDINGS[1:]))
    assert (noted.headline, noted.tone) == ("It learned what it was shown", "good")


@pytest.mark.parametrize(
    ("state", "headline", "tone", "advice"),
    [
        ("running", "Still training: step 50 of 120", "open", "It is still going, and so far the watch warns of nothing"),
        ("failed", "Failed after step 50 of 120", "bad", "It ended in an error and left no model: the loss of step 51 is nan."),
        (
            "stopped",
            "Stopped after step 50 of 120",
            "mixed",
            "It is not finished; go on from its newest checkpoint with the command below.",
        ),
        ("broken off", "Ended without a word after step 50 of 120", "bad", "It is not finished; go on from its newest checkpoint"),
    ],
)
def test_a_run_that_is_not_finished_is_called_so(tmp_path: Path, state: str, headline: str, tone: str, advice: str):
    run = make_run(tmp_path / "run", state="stopped", done=50)
    found = verdict_of(run, state, 50, "the loss of step 51 is nan.")
    assert (found.headline, found.tone) == (headline, tone)
    assert found.advice.startswith(advice)


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path):
    found = verdict_of(make_run(tmp_path / "run", state="running", done=5), "broken off", 5)
    assert found.advice == "It is not finished; start it anew: no checkpoint was saved."


def test_where_nothing_was_held_out_no_claim_is_made(tmp_path: Path):
    found = verdict_of(make_run(tmp_path / "run", num_held_out=0))
    assert (found.headline, found.tone) == ("Trained, but not judged", "open")
    assert found.learned.startswith(
        "Nothing was held out, so these figures cannot say whether anything carries over to new prompts; on the "
    )
    assert found.learned.endswith("which learning them by heart gives too.")
    assert "eval_fraction" in found.advice


def test_the_distance_is_that_on_its_own_answers_where_it_was_measured(tmp_path: Path):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"after": summary["after"] | {"samples/kl": 0.01}}))
    assert verdict_of(run).cost.startswith("It moved 0.01 nats per answer away from its reference (KL on its own answers); the chosen")
    moving = make_run(tmp_path / "moving", settings={"sync_reference_every_steps": 8})
    assert "nats per answer away from its reference, which has followed it (KL on" in verdict_of(moving).cost


def test_a_single_step_has_not_moved_by_nothing(tmp_path: Path):
    """Metrics are measured before the step, so the first row's KL is 0 whatever the step did."""
    for done, words in ((1, ""), (2, "It was 0.06 nats per answer away from its reference (KL on the data's answers) about step 2; ")):
        run = make_run(tmp_path / str(done), state="stopped", num_held_out=0, done=done)
        rows = [json.loads(line) | {"kl": 0.06 * place} for place, line in enumerate((run / "metrics.jsonl").read_text().splitlines())]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cost = verdict_of(run, "failed", done).cost
        assert cost.startswith(f"{words}{done} step" if words else "1 step took"), cost
        assert "moved" not in cost


def test_before_the_first_step_and_after_a_single_one(tmp_path: Path):
    assert verdict_of(make_run(tmp_path / "none", state="running", done=0), "running", 0).learned == (
        "No step is done yet, so there is nothing to judge."
    )
    one = verdict_of(make_run(tmp_path / "one", state="running", done=1), "running", 1)
    assert one.learned.startswith("The held-out examples have not been looked at since training began")
    assert one.learned.endswith("nor can a single step.")


def test_sft_is_judged_by_its_loss(tmp_path: Path):
    found = verdict_of(make_run(tmp_path / "run", method="sft"))
    assert found.headline == "It learned what it was shown"
    assert found.learned == "On 60 held-out examples the loss fell, from 4.250 before training to 2.550."
    assert "KL" not in found.cost
    assert "log-probability" not in found.cost


def test_a_model_that_is_not_of_the_last_step_is_told(tmp_path: Path):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"model_step": 80}))
    assert verdict_of(run).learned.endswith("; the model is that of step 80, where the held-out loss was lowest.")


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (Change("logps/chosen", -100.0, -90.0, 1.0, 0.5), "rose by 10.0 nats"),
        (Change("logps/chosen", -100.0, -100.01, 1.0, 0.5), "stayed where it was"),
        (Change("logps/chosen", -100.0, -99.0, 1.0, 0.5), "rose by 1.0 nats"),
        (Change("logps/chosen", -100.0, -101.5, 1.0, 0.1), "fell by 1.5 nats"),
        (Change("logps/chosen", -100.0, -105.0, 9.0, 9.0), "fell by 5.0 nats"),
    ],
)
def test_chosen_answers_that_fell_a_little_or_by_chance_are_no_reproach(chosen: Change, says: str):
    words = log_probabilities(of_pairs(chosen))
    assert says in words
    assert "less likely" not in words


def test_chosen_answers_that_fell_clearly_are_a_reproach():
    words = log_probabilities(of_pairs(Change("logps/chosen", -100.0, -105.0, 9.0, 0.5)))
    assert words.endswith("so the model grew less likely to give the very answers that it was taught to prefer")


def of_pairs(chosen: Change) -> Mapping[str, Change]:
    return {"logps/chosen": chosen, "logps/rejected": Change("logps/rejected", -120.0, -140.0)}


def test_an_unknown_state_still_has_a_headline():
    assert heading(RunState("unknown", 5, None), "learned", 0) == ("It learned what it was shown", "good")


def test_a_sentence_inside_a_sentence_begins_small_but_names_do_not():
    assert lowered("Lower it") == "lower it"
    assert lowered("KL is high") == "KL is high"
    assert lowered("`beta` first") == "`beta` first"
    assert lowered("") == ""
