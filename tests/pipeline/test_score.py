"""Scores of a reward model: what is given in Python is checked as files are, and both are rendered as the model's run rendered."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import prefopt, refused
from tests.training.runs import pair_rows, write_rows
from transformers import AutoTokenizer

import prefopt as prefopt_package
from prefopt.errors import DataError, RunError
from prefopt.models import scorer as scoring
from prefopt.models.merge import MERGED
from prefopt.pipeline import score as pipeline
from prefopt.pipeline.score import Scorer, as_trained, score_files
from prefopt.pipeline.score_settings import ScoreSettings
from prefopt.pipeline.trained import Trained

ASKED = "Is number 3 good?"
USER = {"role": "user", "content": ASKED}

WITH_STYLE = (
    "{{ bos_token }}{{ style | default('plain') }} {% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def scorer(reward_run: Path) -> Scorer:
    return Scorer.load(reward_run, precision="float32")


@pytest.fixture
def merged(reward_run: Path, tmp_path: Path) -> Path:
    """The model alone, with what a merge keeps of its run: that prompts were questions, in a template that was told a style."""
    folder = Path(shutil.copytree(reward_run / "model", tmp_path / "merged"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = WITH_STYLE
    tokenizer.save_pretrained(folder)
    (folder / MERGED).write_text(json.dumps({"text_as": "chat", "template_args": {"style": "terse"}}))
    return folder


# What is given in Python.


@pytest.mark.parametrize(
    ("prompt", "completions", "says"),
    [
        (ASKED, "yes", r"the answers are yes, and must be a list, also where there is but one: \[answer\]"),
        ([USER], {"role": "assistant", "content": "yes"}, "must be a list, also where there is but one"),
        (ASKED, None, "the answers are None, and must be a list"),
        (
            [USER],
            [[{"role": "assistant", "content": None}]],
            r"`answer\.content` is null .*, and must be text\. Give text, or a list of turns",
        ),
        ([{"role": "user", "content": None}], ["yes"], r"`prompt\.content` is null"),
        (
            [USER],
            [[{"role": "assistant", "content": "yes"}, USER]],
            "`answer` ends with a turn of the user, and must end with the assistant's",
        ),
        ([{"role": "judge", "content": "?"}], ["yes"], "has the role judge; known are system, developer, user, human"),
        ([USER], [" "], "the answer cannot be scored: `answer` has a blank answer"),
        ([], ["yes"], "`prompt` is an empty list"),
        (None, ["yes"], "`prompt` holds null"),
        (ASKED, ["a lone \ud800 surrogate"], "`answer` holds a lone surrogate"),
    ],
)
def test_mistakes_are_told(scorer: Scorer, prompt: Any, completions: Any, says: str):
    with pytest.raises(DataError, match=says):
        scorer.score(prompt, completions)


def test_roles_have_the_names_that_files_know(scorer: Scorer):
    expected = scorer.score([USER], ["yes, it is"])
    assert scorer.score([{"from": "human", "value": ASKED}], [[{"from": "gpt", "value": "yes, it is"}]]) == expected
    assert scorer.score((USER,), ({"role": "assistant", "content": [{"type": "text", "text": "yes, it is"}]},)) == expected


def test_a_folder_may_be_given_as_a_path(reward_run: Path, scorer: Scorer):
    answers = [" yes, it is", " no, it is not"]
    assert prefopt_package.score(reward_run, ASKED, answers) == pytest.approx(
        prefopt_package.score(str(reward_run), ASKED, answers), abs=1e-6
    )
    assert prefopt_package.score(scorer, ASKED, iter(answers)) == scorer.score(ASKED, answers)


# As in the model's run.


def test_what_nobody_asks_for_is_as_in_the_run():
    trained = Trained(
        config={"max_length": 64, "too_long": "drop", "load_in_4bit": True, "template_args": {"style": "terse"}},
        text_as="chat",
        template_args={"style": "terse"},
    )
    of_run = {"load_in_4bit": True, "text_as": "chat", "template_args": {"style": "terse"}, "too_long": "drop", "max_length": 64}
    assert as_trained(trained, {}) == of_run
    assert as_trained(trained, {"load_in_4bit": None, "max_length": None}) == of_run
    asked = {"load_in_4bit": False, "text_as": "raw", "template_args": {"style": "long"}, "too_long": "cut", "max_length": 32}
    assert as_trained(trained, asked) == asked
    # Another template does not know the arguments of the run's.
    assert as_trained(trained, {"chat_template": "t"}) == {**of_run, "chat_template": "t", "template_args": {}}
    nothing = {"load_in_4bit": False, "text_as": "auto", "template_args": {}, "too_long": "cut"}
    assert as_trained(Trained(), {}) == nothing


def test_a_merged_model_renders_as_its_run_in_python_and_in_files(merged: Path, tmp_path: Path):
    scorer = Scorer.load(merged, precision="float32")
    row = pair_rows()[3]
    text = scorer.scorer.tokenizer.decode(scorer.tree(row["prompt"], row["chosen"]).prompt_ids.tolist())
    assert text.startswith("<begin>terse <turn>user\n")
    out = tmp_path / "scores.jsonl"
    settings = ScoreSettings(model=str(merged), data=[write_rows(tmp_path / "data.jsonl", [row])], out=out, precision="float32")
    score_files(settings)
    (line,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert line["prompt"] == text
    assert [answer["score"] for answer in line["answers"]] == pytest.approx(
        scorer.score(row["prompt"], [row["chosen"], row["rejected"]]), abs=1e-4
    )


def test_a_template_of_ones_own_gets_no_arguments_of_the_run(merged: Path, tmp_path: Path):
    out, template = tmp_path / "scores.jsonl", WITH_STYLE.replace("{{ style | default('plain') }}", "mine")
    data = write_rows(tmp_path / "data.jsonl", pair_rows()[:1])
    score_files(ScoreSettings(model=str(merged), data=[data], out=out, chat_template=template))
    assert json.loads(out.read_text())["prompt"].startswith("<begin>mine <turn>user\n")


@pytest.mark.parametrize(("given", "proved"), [({}, 128), ({"max_length": 400}, 400), ({"max_length": 8192}, 512)])
def test_the_way_to_run_it_is_proved_on_texts_as_long_as_are_scored(
    reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, int], proved: int
):
    right, lengths, read = scoring.prove, [], []

    def prove(model: Any, *, max_length: int, **more: Any) -> Any:
        lengths.append(max_length)
        return right(model, max_length=max_length, **more)

    def load(data: Any, settings: Any, *rest: Any, **more: Any) -> Any:
        read.append(settings.max_length)
        return loads(data, settings, *rest, **more)

    loads = pipeline.load
    monkeypatch.setattr(scoring, "prove", prove)
    monkeypatch.setattr(pipeline, "load", load)
    score_files(ScoreSettings(model=str(reward_run), data=[write_rows(tmp_path / "data.jsonl", pair_rows()[:2])], **given))
    loaded = Scorer.load(reward_run, **given)
    assert lengths == [proved, proved]
    assert read == [proved]
    assert loaded.grower.options.max_length == loaded.scorer.max_length == proved


def test_without_a_run_nothing_is_cut_that_the_model_reads(merged: Path):
    loaded = Scorer.load(merged)
    assert (loaded.grower.options.max_length, loaded.scorer.max_length) == (512, 512)


# The file of scores.


def scored(reward_run: Path, folder: Path, out: Path, **given: Any) -> None:
    data = write_rows(folder / "data.jsonl", pair_rows()[:3])
    score_files(ScoreSettings(model=str(reward_run), data=[data], out=out, precision="float32", **given))


def test_answers_that_are_no_unicode_are_written(reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "decode", lambda ids, tokenizer: "broken \ud800")
    out = tmp_path / "new" / "scores.jsonl"
    scored(reward_run, tmp_path, out)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["broken \ud800"] * 3


def test_a_file_that_is_broken_off_leaves_the_old_one(reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "scores.jsonl"
    out.write_text("old")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "flush", full)
    with pytest.raises(RunError, match=r"cannot write .*No space left on device"):
        scored(reward_run, tmp_path, out, overwrite=True)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "scores.jsonl"]
    monkeypatch.undo()
    scored(reward_run, tmp_path, out, overwrite=True)
    assert len(out.read_text().splitlines()) == 3


def test_memory_that_runs_out_is_no_bug(reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none_left(*given: Any, **more: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(pipeline.TreeScorer, "scores", none_left)
    data = write_rows(tmp_path / "data.jsonl", pair_rows()[:2])
    assert "memory ran out. Lower max_tokens." in refused("score", str(reward_run), "--data", data)
    monkeypatch.undo()
    assert prefopt("score", str(reward_run), "--data", data).check().code == 0
