"""The comparison of all methods: what is in it, how settings are chosen, what is shown."""

from xml.etree import ElementTree

import pytest
from bench.methods.__main__ import MOST_KL, best_trial, table
from bench.methods.contenders import CONTENDERS
from bench.methods.picture import by_reward, picture

from prefopt.config import check
from prefopt.methods.table import METHODS
from prefopt.training.assemble import settings_for

SVG = "{http://www.w3.org/2000/svg}"


def figures(reward: float, kl: float, **settings: float) -> dict:
    return {
        "settings": settings,
        "true_reward": reward,
        "kl": kl,
        "accuracy": 0.8,
        "tokens": 30.0,
        "ended": 1.0,
        "seconds": 9.0,
    }


FOUND = {
    "before": {"0": figures(0.5, 0.0), "1": figures(0.4, 0.0)},
    "trials": {},
    "runs": {
        "kto/0": figures(0.8, 2.0, beta=0.5),
        "kto/1": figures(0.9, 4.0, beta=0.5),
        "dpo & more/0": figures(0.95, 5.0, beta=0.25),
        "dpo & more/1": figures(0.93, 5.0, beta=0.25),
    },
}


def test_every_method_that_trains_a_language_model_is_compared_with_settings_that_it_takes():
    policies = {row.name: row.load() for row in METHODS if row.load().needs.model == "language"}
    assert {contender.method for contender in CONTENDERS.values()} == set(policies)
    for name, contender in CONTENDERS.items():
        for trial in contender.trials:
            given = {"model": "model", "data": ["pairs.jsonl"], "out": "run", **trial}
            checked = check(settings_for(policies[contender.method]), given)
            assert {key: getattr(checked, key) for key in trial} == dict(trial), name


def test_the_best_trial_is_the_highest_reward_that_is_still_language():
    near, far, broken = figures(0.7, 2.0), figures(0.9, MOST_KL), figures(0.99, MOST_KL + 1)
    assert best_trial([near, far, broken]) is far
    assert best_trial([broken, figures(1.0, MOST_KL + 5)]) is broken


def test_the_table_has_means_and_spread_of_the_seeds_best_first():
    rows = [line.split(" | ") for line in table(FOUND).splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["| (SFT)", "| dpo & more", "| kto"]
    assert rows[1][2] == "0.450 ± 0.071"
    assert rows[3][1:4] == ["beta 0.5", "0.850 ± 0.071", "3.00 ± 1.41"]


def test_the_picture_has_a_dot_for_each_seed_where_its_value_is():
    root = ElementTree.fromstring(picture(FOUND))
    assert "dpo & more 0.94 at 5.0; kto 0.85 at 3.0" in root.get("aria-label", "")
    across = [float(dot.get("cx", 0)) for dot in root.iter(f"{SVG}circle")]
    rewards = [own["true_reward"] for each in by_reward(FOUND["runs"]).values() for own in each]
    assert len(across) == 2 * len(rewards)
    step = (across[0] - across[2]) / (rewards[0] - rewards[2])
    assert [across[0] + step * (reward - rewards[0]) for reward in rewards] == pytest.approx(across[:4], abs=0.2)
