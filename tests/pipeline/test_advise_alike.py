"""Near copies: found where they are, with likenesses that can be counted by hand."""

import random
from itertools import combinations

import numpy as np
import pytest

from prefopt.pipeline.advise.alike import NEAR, WORDS, clusters, likeness, runs_of


def text_of(numbers: list[int]) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_runs_are_counted_once_and_case_and_marks_do_not_matter():
    assert len(runs_of(text_of(list(range(50))))) == 50 - WORDS + 1
    assert len(runs_of("a b")) == 1
    assert len(runs_of("")) == 1
    assert np.array_equal(runs_of("One, two; THREE four five!"), runs_of("one two three four five"))


def test_a_word_in_fifty_leaves_41_of_51_runs():
    one = list(range(50))
    other = [*one[:25], 999, *one[26:]]
    assert likeness(runs_of(text_of(one)), runs_of(text_of(other))) == pytest.approx(41 / 51)
    assert clusters([text_of(one), text_of(other)]) == [0, 0]
    further = [*one[:15], 998, *one[16:25], 999, *one[26:]]
    assert likeness(runs_of(text_of(one)), runs_of(text_of(further))) == pytest.approx(36 / 56)
    assert clusters([text_of(one), text_of(further)]) == [0, 1]


def test_scripts_without_spaces_are_cut_into_characters():
    text = "我今天很高兴因为天气很好我们去公园散步然后回家吃饭最后睡觉"
    other = text.replace("公园", "学校")
    assert 0.3 < likeness(runs_of(text), runs_of(other)) < 0.7
    assert likeness(runs_of(text), runs_of(text)) == 1


def test_clusters_are_those_of_comparing_each_with_each():
    rng = random.Random(0)
    texts = []
    for number in range(120):
        base = [1000 * number + place for place in range(60)]
        texts.append(text_of(base))
        for _ in range(rng.randrange(3)):
            changed = [word if rng.random() > 0.01 else -word - 1 for word in base]
            texts.append(text_of(changed))
    rng.shuffle(texts)
    runs = [runs_of(text) for text in texts]
    root = list(range(len(texts)))
    for one, other in combinations(range(len(texts)), 2):
        if likeness(runs[one], runs[other]) >= NEAR:
            first, second = sorted((root[one], root[other]))
            root = [first if place == second else place for place in root]
    assert len(set(root)) < len(texts) - 20
    assert clusters(texts) == root


def test_of_nothing_there_are_no_clusters():
    assert clusters([]) == []
    assert clusters(["one"]) == [0]
