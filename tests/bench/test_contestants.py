"""Who takes part, as the command line names them."""

import pytest
from bench.versus.contestants import CONTESTANTS, UsageError, choose, divisors_to_try

WORKLOADS = ("hh", "k2", "k8")


def test_contestants_are_chosen_by_name():
    chosen = choose("prefopt, trl-best,prefopt@k2", [], WORKLOADS)
    assert [(entry.label, entry.side, entry.workload) for entry in chosen] == [
        ("prefopt", "prefopt", ""),
        ("trl-best", "trl", ""),
        ("prefopt@k2", "prefopt", "k2"),
    ]
    assert chosen[1].settings == {"precompute_ref_log_probs": True}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("prefop", "did you mean prefopt"),
        ("prefopt,prefopt", "given twice"),
        ("prefopt@k3", "no such workload"),
        ("trl,prefopt-warm", "name that one too"),
        (" , ", "there is no contestant"),
    ],
)
def test_mistakes_are_told(names: str, words: str):
    with pytest.raises(UsageError, match=words):
        choose(names, [], WORKLOADS)


def test_settings_reach_those_whose_name_begins_alike_and_the_longer_name_wins():
    chosen = choose("prefopt,prefopt-plain,trl", ["prefopt-plain:max_tokens=1024", "prefopt:max-tokens=4096", "trl:optim=sgd"], WORKLOADS)
    assert [entry.settings for entry in chosen] == [{"max_tokens": 4096}, {"sharing": "plain", "max_tokens": 1024}, {"optim": "sgd"}]


def test_settings_of_one_run_do_not_stay_for_the_next():
    choose("prefopt", ["prefopt:max_tokens=1"], WORKLOADS)
    assert CONTESTANTS["prefopt"].settings == {}


@pytest.mark.parametrize("given", ["max_tokens=4096", "prefopt:max_tokens", "prefopt:=3"])
def test_settings_of_another_form_are_refused(given: str):
    with pytest.raises(UsageError, match="must be NAME:setting=value"):
        choose("prefopt", [given], WORKLOADS)


def test_settings_for_nobody_are_refused():
    with pytest.raises(UsageError, match="no contestant is called trl"):
        choose("prefopt", ["trl:bf16=false"], WORKLOADS)


def test_the_tried_passes_divide_the_batch():
    assert divisors_to_try(8) == [1, 2, 4, 8]
    assert divisors_to_try(12) == [1, 2, 4, 12]
    assert divisors_to_try(128) == [1, 2, 4, 8, 16, 32, 64]
