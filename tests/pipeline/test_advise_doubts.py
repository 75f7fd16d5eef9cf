"""What advice does not conclude from data, because the data does not say it."""

from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.test_advise_look import looked, pair

from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.decide import decide
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
    assert signs.may_be_verdicts(found).startswith("328 of 800 examples (41 %) equal an earlier one in every column")
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
