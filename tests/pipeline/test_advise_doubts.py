"""What advice does not conclude from data, because the data does not say it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.test_advise import content, decided, facts, model
from tests.pipeline.test_advise_look import looked, pair, sentence, written

import prefopt
from prefopt.data.counts import Counts
from prefopt.errors import DataError, PrefoptError
from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.ask import some_with_good_alone
from prefopt.pipeline.advise.decide import decide
from prefopt.pipeline.advise.facts import Count, Thumbs, Way
from prefopt.pipeline.advise.look import look
from prefopt.pipeline.advise.page import commands, page, write, yaml_of
from prefopt.pipeline.advise.settings import AdviseSettings
from prefopt.trees import Completion, PromptTree, token_ids


def judged_twice(num: int, wrong: int, *, who: bool) -> list[dict[str, Any]]:
    """Pairs judged by two, of whom the second is wrong about the first so many."""
    rows = []
    for number in range(num):
        right = pair(number)
        turned = right | {"chosen": right["rejected"], "rejected": right["chosen"]}
        two = right, turned if number < wrong else right
        rows += [row | ({"who": judge} if who else {}) for judge, row in zip("ab", two, strict=True)]
    return rows


def test_equal_rows_among_verdicts_may_be_verdicts_and_give_no_rate(tmp_path: Path):
    found = looked(tmp_path, judged_twice(400, 72, who=False))
    assert (found.agreement.agree, found.agreement.couples, found.agreement.contradicted) == (0, 72, 72)
    assert found.agreement.if_verdicts == pytest.approx(0.1)
    assert signs.is_chance(found) == signs.is_noise_known(found) == signs.has_copies(found) == ""
    assert signs.may_be_verdicts(found).startswith("328 of 800 examples (41 %) equal an earlier one, and 72 of 400")
    said = " ".join(" ".join(page(found, decide(AdviseSettings(data=["x"]), found))).split())
    assert "how many are wrong cannot be told; if all are verdicts, about 10 % is wrong" in said
    assert "coins" not in said
    assert "keep one of each" not in said


def test_where_verdicts_that_agree_were_removed_there_is_no_rate(tmp_path: Path):
    rows = judged_twice(400, 72, who=False)
    found = looked(tmp_path, [row for place, row in enumerate(rows) if row not in rows[:place]])
    assert (found.agreement.agree, found.agreement.couples, found.agreement.if_verdicts) == (0, 72, None)
    assert signs.is_chance(found) == signs.is_noise_known(found) == ""
    assert signs.is_noise_seen(found) == "72 of 400 pairs of answers (18 %) have verdicts both ways"
    said = " ".join(" ".join(page(found, decide(AdviseSettings(data=["x"]), found))).split())
    assert "so how many are wrong cannot be told" in said
    assert "50 %" not in said
    assert signs.is_chance(looked(tmp_path, judged_twice(72, 72, who=False)))  # all are contradicted, whatever was removed


def test_with_a_column_for_who_judged_equal_rows_are_copies(tmp_path: Path):
    rows = judged_twice(400, 72, who=True)
    found = looked(tmp_path, [*rows, *rows[:100]])
    assert found.agreement.if_verdicts is None
    assert (found.agreement.agree, found.agreement.couples) == (328, 400)
    assert found.agreement.error == pytest.approx(0.1)
    assert signs.may_be_verdicts(found) == ""
    assert signs.has_copies(found).startswith("100 of 900 examples (11 %) repeat")
    alone = looked(tmp_path, [pair(number) for number in range(60)] * 2)  # nothing is contradicted: copies
    assert alone.agreement.if_verdicts is None


def test_sft_before_thumbs_is_sized_by_the_thumbs_up():
    thumbs = facts("thumbs", 1500, counts=Counts(125, 1375), thumbs=Thumbs(125, 1375), model=model(nats=7.0))
    decision = decided(thumbs)
    assert decision.config["stages"] == ["sft", "kto"]
    assert (decision.config["epochs"], decision.config["batch_size"]) == (1.0, 32)
    sft = decision.config["sft"]
    assert (sft["epochs"], sft["batch_size"]) == (3.0, 8)  # of 119 that are not held out, 45 steps
    lines = page(thumbs, decision)
    assert any(line.split() == ["sft:", "epochs", "3", "125", "good", "answers"] for line in lines)
    assert not any("orpo" in line for line in lines)
    pairs = facts(model=model(nats=7.0))
    assert any("orpo" in line for line in page(pairs, decided(pairs)))


def test_without_prompts_there_is_no_chat_to_make(tmp_path: Path):
    rows = [{"a1": sentence(n + 100), "a2": sentence(n + 200), "label": "a1", "#id": n} for n in range(20)]
    found = looked(tmp_path, rows, data_format="arguments")
    assert found.content.unprompted == Count(20, 20)
    unprompted = facts(content=content(raw=Count(5000, 5000), unprompted=Count(5000, 5000)), model=model())
    assert signs.is_raw_for_chats(unprompted) == ""
    assert "text_as" not in decided(unprompted).config


def said_of(folder: Path, rows: list[dict[str, Any]], **given: Any) -> str:
    return " ".join(" ".join(prefopt.advise(written(folder, rows), **given).lines()).split())


def test_a_column_that_looks_like_a_verdict_and_is_not_read_is_told_before_any_advice(tmp_path: Path):
    rows = [{"prompt": sentence(n), "completion": sentence(n + 100), "id": n, "userRating": n % 5} for n in range(60)]
    said = said_of(tmp_path, rows)
    assert "not read columns id, userRating" in said
    assert said.index("warning: a column looks like a verdict and is not read") < said.index("advice: sft")
    assert "Not read: userRating; read as a thumb is a column label or kto_tag" in said
    assert "nothing that says better or worse" not in said
    told = decided(looked(tmp_path, rows))
    assert yaml_of(told).startswith("# Written by `prefopt advise`.\n# Warning: a column looks like a verdict")
    plain = said_of(tmp_path, [{"prompt": row["prompt"], "completion": row["completion"], "id": row["id"]} for row in rows])
    assert "warning" not in plain
    assert "nothing that says better or worse" in plain


@pytest.mark.parametrize("name", ["label", "is_correct", "overall_score", "Rank", "votes", "helpfulness-rating", "isCorrect", "thumbs"])
def test_names_of_verdicts(name: str):
    assert signs.looks_like_a_verdict(name)
    assert not any(
        map(signs.looks_like_a_verdict, ("id", "source", "topic", "model", "date", "incorporate", "franking", "messages[].name"))
    )


def test_words_that_say_neither_up_nor_down_are_told(tmp_path: Path):
    rows = [{"prompt": sentence(n), "completion": sentence(n + 100), "label": ("maybe", "perhaps")[n % 2]} for n in range(60)]
    assert "Not read: label" in said_of(tmp_path, rows)


def test_scores_against_the_order_are_told_before_any_advice(tmp_path: Path):
    rows = [pair(n) | {"chosen_score": 1 if n < 6 else 5, "rejected_score": 5 if n < 6 else 1} for n in range(60)]
    said = said_of(tmp_path, rows)
    assert said.index("In 6 of 60 rows (10 %) a worse answer has the higher score") < said.index("advice:")
    assert "warning" not in said_of(tmp_path, rows[6:])


def test_of_weights_that_are_all_0_nothing_is_learned(tmp_path: Path):
    advice = prefopt.advise(written(tmp_path, [pair(n) | {"weight": 0} for n in range(60)]))
    assert advice.config == {}
    assert advice.decision.method.because == "the weights of all 60 examples are 0"
    assert not any("Worth a try" in line for line in advice.lines())
    assert prefopt.advise(written(tmp_path, [pair(n) | {"weight": n % 2} for n in range(60)])).config


def test_lists_of_one_answer_are_no_prompts_without_answers(tmp_path: Path):
    rows = [{"prompt": sentence(n), "completions": [sentence(n + 100)], "ranks": [1]} for n in range(20)]
    with pytest.raises(DataError, match="columns seen: prompt, completions, ranks"):
        prefopt.advise(written(tmp_path, rows))
    assert prefopt.advise(written(tmp_path, [row | {"completions": []} for row in rows])).facts.kind == "prompts"


def test_where_nothing_fits_there_are_no_settings_and_no_command(tmp_path: Path):
    ways = (Way("full", False, "40.0 GB", {}), Way("LoRA 16", False, "9.0 GB", {}))
    tight = facts(model=model(ways=ways, chosen=""))
    decision = decided(tight)
    assert decision.config == {}
    lines = page(tight, decision)
    assert lines[-1] == "Nothing that could be trained fits."
    assert "warning: a smaller model, or more memory: nothing fits" in lines
    assert commands(decision, tmp_path / "a.yaml", written=False, has_model=True) == []
    with pytest.raises(PrefoptError, match=r"nothing that could be trained fits\. A smaller model, or more memory"):
        write(tmp_path / "a.yaml", decision)
    assert not (tmp_path / "a.yaml").exists()
    with pytest.raises(PrefoptError, match="there is nothing to train yet"):
        write(tmp_path / "a.yaml", decided(facts("prompts", have=("no-judge",))))


def test_shaped_rewards_leave_a_reward_model_of_pairs_and_nothing_of_dpo_s_kin():
    shaped = facts(num=400, have=("shaped-rewards",), model=model(nats=7.0))
    decision = decided(shaped)
    assert decision.config["stages"] == ["sft", "reward"]
    lines = page(shaped, decision)
    assert "until then: reward, a reward model of the pairs, as one of the rewards" in lines
    assert not any("Worth a try" in line or "orpo" in line for line in lines)
    assert decided(facts("ranked", have=("shaped-rewards",))).method.rule.method == "reward"


@pytest.mark.parametrize("judge", ["checker", "reward-model"])
def test_no_judge_and_a_judge_are_refused_together(judge: str):
    with pytest.raises(ValueError, match=f"have says no-judge and {judge}, which judge answers: leave one of them out"):
        AdviseSettings(data=["x"], have=["no-judge", judge])


def test_without_a_judge_what_is_judged_is_used_and_that_is_said():
    thumbs = facts("thumbs", have=("no-judge",))
    said = " ".join(" ".join(page(thumbs, decided(thumbs))).split())
    assert "that there is no judge does not matter here: what is judged already is used (there are 5,000 thumbs)" in said


def test_a_model_is_asked_about_good_answers_however_few_there_are():
    trees = [PromptTree(token_ids([1]), (Completion(token_ids([5, place]), label=place % 100 == 7),)) for place in range(600)]
    drawn = some_with_good_alone(trees, 4)
    assert len(drawn) == 4
    assert all(tree.completions[0].label for tree in drawn)
    assert len(some_with_good_alone(trees, 32)) == 6


def test_of_graded_thumbs_it_is_said_why_kto_leads():
    graded = facts("thumbs", thumbs=Thumbs(2500, 2500, Count(700, 1300), 950))
    said = " ".join(" ".join(page(graded, decided(graded))).split())
    assert "KTO leads because it reads all thumbs as they are" in said
    assert "no difference was told apart" in said


def test_rows_that_all_open_alike_are_told_and_nothing_of_them_is_held_out(tmp_path: Path):
    rows = [{"prompt": "Why?", "chosen": f"Because {place}.", "rejected": f"No {place}."} for place in range(300)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = look(AdviseSettings(data=[str(path)]))
    decision = decided(found)
    assert not {"eval_fraction", "eval_every_steps", "early_stop"} & decision.config.keys()
    assert "All 300 examples open with the same" in " ".join(" ".join(page(found, decision)).split())
    path.write_text(json.dumps(rows[0] | {"prompt": "How?"}) + "\n" + path.read_text())
    assert {"eval_fraction", "early_stop"} <= decided(look(AdviseSettings(data=[str(path)]))).config.keys()
