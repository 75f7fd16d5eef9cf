"""Held-out examples one by one, and the model's own answers."""

import json
import re
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from typing import Any

from tests.report.made import make_run

from prefopt.report.answers import dialogues, figures_of, introduction, sides, spaced
from prefopt.report.examples import best_and_worst, loss_words, margin_words, spread
from prefopt.report.page import report_html
from prefopt.report.record import read_run


def with_margins(path: Path, margins: list[float], **settings: Any) -> Path:
    run = make_run(path, num_held_out=len(margins), **settings)
    lines = [
        {
            "row": f"row {place}",
            "prompt": "p",
            "completions": ["c", "r"],
            "step": 120,
            "before": {"rewards/margin": 0.0},
            "after": {"rewards/margin": margin},
        }
        for place, margin in enumerate(margins)
    ]
    (run / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_best_and_the_worst_are_those_with_the_largest_and_the_smallest_margin(tmp_path: Path):
    best, worst = best_and_worst(read_run(with_margins(tmp_path / "run", [0.3, -2.0, 5.0, 0.1, 0.2, -0.5, 1.0, 0.4, 0.5, 0.6, 0.7, 0.8])))
    assert [item.score for item in best] == [5.0, 1.0, 0.8, 0.7, 0.6]
    assert [item.score for item in worst] == [-2.0, -0.5, 0.1, 0.2, 0.3]
    assert (best[0].shown, worst[0].shown, worst[0].example.row) == ("5.00", "−2.00", "row 1")


def test_no_example_is_both_best_and_worst(tmp_path: Path):
    for num in range(1, 12):
        best, worst = best_and_worst(read_run(with_margins(tmp_path / str(num), [float(place) for place in range(num)])))
        assert not {item.example.row for item in best} & {item.example.row for item in worst}
        assert len(best) >= 1


def test_examples_are_named_by_what_sets_their_prompts_apart(tmp_path: Path):
    run = with_margins(tmp_path / "run", [2.0, 1.0, -1.0])
    rows = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    before, after = f"<turn>system\n{'Be kind. ' * 400}<end>\n<turn>user\n", "<end>\n<turn>assistant\n"
    for row, question in zip(rows, ("How do I fry an egg?", "How do I boil one?", "Why?"), strict=True):
        row["prompt"] = f"{before}{question}{after}"
    (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best, worst = best_and_worst(read_run(run))
    assert [item.title for item in (*best, *worst)] == ["How do I fry an egg?", "Why?"]
    page = report_html(run, now=datetime(2026, 11, 21, tzinfo=UTC))
    assert re.findall(r'class="start" dir="auto">([^<]*)<', page) == ["How do I fry an egg?", "Why?"]
    # In full it is the text that the model read; of a very long one the end stays, where the question is.
    prompts = re.findall(r'<b>Prompt</b><span>row \d</span></p>\s*<div class="text" dir="auto">([^<]*)</div>', page)
    assert [unescape(prompt)[-len(after) - 4 :] for prompt in prompts] == [f"egg?{after}", f"Why?{after}"]
    assert all("characters left out" in prompt and prompt.startswith("&lt;turn&gt;system\nBe kind.") for prompt in prompts)


def test_a_long_prompt_of_an_answer_shows_its_end_and_more_when_asked(tmp_path: Path):
    middle = "the middle of the system prompt"
    long = f"<turn>system\n{'Be kind. ' * 200}{middle}{'Be brief. ' * 200}<end>\n<turn>user\nWhy is that so?<end>\n<turn>assistant\n"
    text = report_html(make_run(tmp_path / "run", texts=[long, "Short?"], samples=2), now=datetime(2026, 11, 21, tzinfo=UTC))
    first, second = text.split('<article class="card dialogue">')[1:3]
    shown, whole = re.findall(r'<div class="text " dir="auto">([^<]*)</div>|<div class="text" dir="auto">([^<]*)</div>', first)[:2]
    assert middle not in "".join(shown)
    assert "Why is that so?" in "".join(shown)
    assert len("".join(shown)) < 900
    assert unescape("".join(whole)) == long
    assert f"More of the prompt, {len(long):,} characters" in first
    assert "More of the prompt" not in second


def test_margins_are_told_in_words():
    words = margin_words((0.0, 0.0, 0.0, 0.0), (1.0, -1.0, 2.0, 0.0))
    assert [word.replace("\u00a0", " ") for word in words] == [
        "2 of 4 pairs (50 %) have a margin above 0, the chosen answer ahead, 1 exactly 0.",
        "Before training it was 0 for all of them, as it must be where the model is its reference.",
        "The middle one is 0.500; a tenth lie below −0.700 and a tenth above 1.700.",
    ]
    assert margin_words((1.0, -1.0), (1.0, 2.0))[1] == "Before training that held for 1."


def test_losses_are_told_in_words(tmp_path: Path):
    assert loss_words((4.0, 4.0, 4.0), (3.0, 2.0, 5.0))[0] == "2 of 3 examples have a lower loss than before training."
    found = spread(read_run(make_run(tmp_path / "run", method="sft")))
    assert found is not None
    assert not found.has_sides
    assert len(found.before) == len(found.after) == 60


def test_examples_without_pairs_are_ranked_by_how_far_their_likelihood_rose(tmp_path: Path):
    run = make_run(tmp_path / "run", method="sft", num_held_out=2)
    lines = [
        {
            "row": "far",
            "prompt": "p",
            "completions": ["c"],
            "lengths": [10],
            "step": 120,
            "before": {"logps/chosen": -50},
            "after": {"logps/chosen": -20},
        },
        {
            "row": "near",
            "prompt": "p",
            "completions": ["c"],
            "lengths": [100],
            "step": 120,
            "before": {"logps/chosen": -90},
            "after": {"logps/chosen": -50},
        },
    ]
    (run / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    best, worst = best_and_worst(read_run(run))
    assert [(item.example.row, round(item.score, 3)) for item in (*best, *worst)] == [("far", 3.0), ("near", 0.4)]


def test_before_the_first_evaluation_there_is_nothing_to_rank(tmp_path: Path):
    record = read_run(make_run(tmp_path / "run", state="running", done=5))
    assert spread(record) is None
    assert best_and_worst(record) == ([], [])


def test_answers_are_side_by_side_and_over_time(tmp_path: Path):
    found = dialogues(read_run(make_run(tmp_path / "run")))
    assert len(found) == 4
    first, newest = found[0].first, found[0].newest
    assert first is not None
    assert newest is not None
    assert (first.step, newest.step) == (0, 120)
    assert [answer.step for answer in found[0].on_the_way] == [0, 20, 40, 60, 80, 100, 120]


def test_many_evaluations_are_thinned_with_the_first_and_the_last():
    assert spaced(range(100), 8) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert spaced([0, 5], 8) == [0, 5]


def test_only_the_answer_from_before_training_is_no_newest_one(tmp_path: Path):
    found = dialogues(read_run(make_run(tmp_path / "run", state="running", done=5)))
    assert found[0].first is not None
    assert found[0].newest is None


def test_an_answer_given_twice_at_a_step_is_shown_once(tmp_path: Path):
    run = make_run(tmp_path / "run", samples=1)
    with (run / "samples.jsonl").open("a") as file:
        file.write((run / "samples.jsonl").read_text().splitlines()[-1].replace('"text": "', '"text": "again ') + "\n")
    (found,) = dialogues(read_run(run))
    assert len(found.on_the_way) == 7
    assert found.newest is not None
    assert found.newest.text.startswith("again ")


def test_what_the_left_column_is_is_said(tmp_path: Path):
    same = read_run(make_run(tmp_path / "same"))
    assert introduction(same).endswith("Before training the model is the reference itself.")
    assert sides(same)[0][0] == "before training: the reference"
    other = read_run(make_run(tmp_path / "other", settings={"reference": "/home/somebody/other"}))
    assert introduction(other).endswith("not the reference (other).")
    moving = read_run(make_run(tmp_path / "moving", settings={"sync_reference_every_steps": 8}))
    assert introduction(moving).endswith("not the reference (the model before training, moved towards the policy every 8 steps).")
    assert sides(moving)[0][0] == "before training"
    assert sides(other)[0][0] == "before training"
    assert "This method has no reference" in introduction(read_run(make_run(tmp_path / "sft", method="sft")))
    assert "held-out prompts" in introduction(same)


def test_figures_of_an_answer_are_told_as_far_as_they_are_known(tmp_path: Path):
    record = read_run(make_run(tmp_path / "run"))
    assert figures_of(record.answers[0]) == "6 tokens, ended by itself, entropy 2.10"
    assert figures_of(record.answers[3]) == "3 tokens, cut off, entropy 2.10"
    (tmp_path / "run" / "samples.jsonl").write_text('{"step": 3, "text": "x"}\n')
    assert figures_of(read_run(tmp_path / "run").answers[0]) == ""
