"""What advice does not conclude from data, because the data does not say it."""

from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.test_advise import content, decided, facts, model
from tests.pipeline.test_advise_look import looked, pair, sentence

from prefopt.data.counts import Counts
from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.decide import decide
from prefopt.pipeline.advise.facts import Count, Thumbs
from prefopt.pipeline.advise.page import page
from prefopt.pipeline.advise.settings import AdviseSettings


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
