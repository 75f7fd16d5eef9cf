"""What advice reads off rows, counted by hand on made-up data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prefopt
from prefopt.data.examples import Answer, Example
from prefopt.errors import ConfigError, DataError
from prefopt.pipeline.advise import look as looking
from prefopt.pipeline.advise import signs
from prefopt.pipeline.advise.content import latin_language
from prefopt.pipeline.advise.decide import decide
from prefopt.pipeline.advise.facts import Beside, Count, Facts
from prefopt.pipeline.advise.look import SPACE, Sample, digest, group_of, look
from prefopt.pipeline.advise.page import page
from prefopt.pipeline.advise.settings import AdviseSettings

WORDS = tuple(f"word{letter}" for letter in "abcdefghijklmnopqrstuvwx")


def sentence(number: int, length: int = 12) -> str:
    """A sentence that shares no run of words with those of other numbers."""
    return " ".join(f"{WORDS[(number * 7 + place * (1 + number % 5)) % len(WORDS)]}{number}" for place in range(length))


def written(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(number: int, chosen: str = "", rejected: str = "") -> dict[str, Any]:
    return {
        "prompt": sentence(number),
        "chosen": chosen or sentence(number + 10_000),
        "rejected": rejected or sentence(number + 20_000),
    }


def looked(folder: Path, rows: list[dict[str, Any]], **given: Any) -> Facts:
    return look(AdviseSettings(data=[written(folder, rows)], **given))


def test_pairs_and_their_lengths(tmp_path: Path):
    found = looked(tmp_path, [pair(number) for number in range(30)])
    assert (found.kind, found.num_examples, found.num_rows, found.sampled) == ("pair", 30, 30, 30)
    assert found.content.raw == Count(30, 30)
    assert found.content.repeated == Count(0, 30)
    assert found.lengths.prompt.median == pytest.approx(len(sentence(1)), abs=15)


def test_verdicts_both_ways_are_counted_and_copies_are_no_verdicts(tmp_path: Path):
    good, bad = sentence(501), sentence(502)
    rows = [pair(number) for number in range(20)]
    rows += [pair(50, good, bad) | {"who": "a"}, pair(50, bad, good) | {"who": "b"}, pair(51) | {"who": "a"}, pair(51) | {"who": "b"}]
    rows += [pair(3), pair(3)]  # the same in every column
    found = looked(tmp_path, rows)
    assert (found.agreement.agree, found.agreement.couples, found.agreement.pairs, found.agreement.contradicted) == (1, 2, 22, 1)
    assert found.content.repeated == Count(2, 26)  # a second verdict that agrees is no copy


def test_demonstrations_with_the_same_texts_are_copies_whatever_else_a_row_says(tmp_path: Path):
    rows = [{"prompt": sentence(n % 4), "completion": sentence(n % 4 + 100), "id": n} for n in range(10)]
    assert looked(tmp_path, rows).content.repeated == Count(6, 10)
    judged = looked(tmp_path, [row | {"label": n % 2} for n, row in enumerate(rows)])
    assert judged.content.repeated == Count(0, 10)


def test_thumbs_weigh_what_their_rows_say_as_often_as_an_epoch_takes_them(tmp_path: Path):
    rows = [{"prompt": sentence(n), "completion": sentence(n + 100), "label": True} for n in range(8)]
    ups = written(tmp_path, [row | {"weight": 1.5} for row in rows], "ups.jsonl")
    downs = written(tmp_path, [row | {"label": False} for row in rows], "downs.jsonl")
    found = look(AdviseSettings(data=[f"{ups}:4", downs]))
    assert (found.counts.num_up, found.counts.num_down) == (8, 8)
    assert (found.thumbs.up, found.thumbs.down) == (48.0, 8.0)
    assert signs.is_unbalanced(found) == "8 up weigh 48, 8 down 8: up weighs 6 times what down weighs"
    assert not signs.is_unbalanced(look(AdviseSettings(data=[f"{ups}:2", f"{downs}:2.5"])))  # 24 and 20


def test_prompts_with_a_good_and_a_bad_answer_are_counted_with_their_pairs(tmp_path: Path):
    labels = {0: (1, 1, 0), 1: (1, 0, 0), 2: (1, 1), 3: (0,), 4: (1, 1, 0, 0)}
    rows = [
        {"prompt": sentence(n), "completion": sentence(n * 9 + k + 100), "label": label}
        for n, own in labels.items()
        for k, label in enumerate(own)
    ]
    found = looked(tmp_path, rows)
    assert (found.thumbs.graded, found.thumbs.num_pairs) == (Count(3, 5), 1 + 1 + 2)
    assert signs.is_graded(found) == "3 of 5 prompts (60 %) have a good and a bad answer, which gives 4 pairs"


def test_votes_agree_within_rows(tmp_path: Path):
    def voted(number: int, *votes: int) -> dict[str, Any]:
        answers = {"instruction": sentence(number), "response1": sentence(number + 100), "response2": sentence(number + 200)}
        return answers | {f"annotator{place}": vote for place, vote in enumerate(votes, 1)}

    found = looked(tmp_path, [voted(1, 1, 1, 1), voted(2, 2, 2, 1), voted(3, 1, 0, 1), voted(4, 0, 0, 0)])
    assert found.agreement.of_voters
    assert (found.agreement.agree, found.agreement.couples) == (3 + 1 + 1, 3 + 3 + 1)
    assert (found.agreement.pairs, found.agreement.contradicted) == (3, 1)
    assert found.passed == {"tie": 1}
    assert found.agreement.ties == 4
    line = " ".join(" ".join(page(found, decide(AdviseSettings(data=["x"]), found))).split())
    assert "votes for an answer agree in 5 of 7 couples (71 %)" in line
    assert "4 votes for neither are left out" in line


def test_blank_and_same_answers_are_faults_and_ties_are_not(tmp_path: Path):
    rows = [pair(number) for number in range(6)]
    rows += [{**pair(7), "chosen": " "}, {**pair(8), "chosen": "x", "rejected": "x"}]
    found = looked(tmp_path, rows)
    assert found.faults == {"blank_answer": 1, "same_answers": 1}
    assert found.num_examples == 6


def test_the_longer_answer_wins(tmp_path: Path):
    found = looked(tmp_path, [pair(n, sentence(n + 100, 20), sentence(n + 200, 10)) for n in range(40)])
    assert found.lengths.longer_chosen == Count(40, 40)
    assert signs.is_longer_better(found)
    mixed = looked(tmp_path, [pair(n, sentence(n + 100, 20 if n % 2 else 10), sentence(n + 200, 10 if n % 2 else 20)) for n in range(40)])
    assert mixed.lengths.longer_chosen == Count(20, 40)
    assert not signs.is_longer_better(mixed)


def test_small_edits_are_seen(tmp_path: Path):
    def edited(number: int) -> dict[str, Any]:
        words = [f"{number}w{place}" for place in range(60)]
        return pair(number, " ".join(words), " ".join([*words[:30], "changed", *words[31:]]))

    found = looked(tmp_path, [edited(number) for number in range(8)] + [pair(number) for number in range(20, 22)])
    assert found.content.alike == Count(8, 10)


def test_near_copies_of_whole_examples_in_each_part(tmp_path: Path):
    one = pair(1, sentence(700, 60), sentence(800, 60))
    near = {**one, "chosen": one["chosen"] + " once more", "rejected": one["rejected"] + " again"}
    turned = {**one, "chosen": near["rejected"], "rejected": near["chosen"]}  # the verdict the other way is no copy
    found = looked(tmp_path, [one, near, turned, pair(2)])
    assert found.content.near == Count(1, 4)
    assert found.content.repeated == Count(0, 4)


def test_held_out_data_has_to_be_there(tmp_path: Path):
    held = written(tmp_path, [pair(0)], "held.jsonl")
    assert looked(tmp_path, [pair(number) for number in range(10)], eval_data=[held]).has_eval
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        looked(tmp_path, [pair(1)], eval_data=["none.jsonl"])


def test_thumbs_rankings_and_demonstrations(tmp_path: Path):
    thumbs = looked(tmp_path, [{"prompt": sentence(n), "completion": sentence(n + 100), "label": n % 4 == 0} for n in range(20)])
    assert (thumbs.kind, thumbs.counts.num_up, thumbs.counts.num_down) == ("thumbs", 5, 15)
    ranked = looked(
        tmp_path,
        [{"prompt": sentence(n), "completions": [sentence(n * 3 + k + 100) for k in range(3)], "ranks": [1, 2, 3]} for n in range(9)],
    )
    assert (ranked.kind, ranked.num_examples) == ("ranked", 9)
    assert ranked.content.alike == Count(0, 27)
    demonstrations = looked(tmp_path, [{"prompt": sentence(n), "completion": sentence(n + 100)} for n in range(7)])
    assert (demonstrations.kind, demonstrations.num_examples) == ("demonstration", 7)


def test_sources_of_several_kinds_serve_as_what_they_have_in_common(tmp_path: Path):
    pairs = written(tmp_path, [pair(number) for number in range(5)], "pairs.jsonl")
    thumbs = written(tmp_path, [{"prompt": sentence(9), "completion": sentence(8), "label": 1}], "thumbs.jsonl")
    found = look(AdviseSettings(data=[pairs, thumbs]))
    assert found.kind == "thumbs"
    assert found.num_examples == 11
    assert (found.counts.num_up, found.counts.num_down) == (6, 5)


def test_demonstrations_beside_pairs_are_a_stage_of_their_own_each_file_where_it_belongs(tmp_path: Path):
    folder = tmp_path / "more"
    folder.mkdir()
    good = [{"prompt": sentence(n), "completion": sentence(n + 100)} for n in range(300, 330)]
    pairs = written(folder, [pair(number) for number in range(60)], "pairs.jsonl")
    written(folder, good[:10], "good.jsonl")
    better = written(tmp_path, good[10:], "better.jsonl")
    advice = prefopt.advise([str(folder), f"{better}:2"])
    assert (advice.facts.kind, advice.facts.num_examples, advice.facts.num_rows) == ("pair", 60, 90)
    assert advice.facts.beside == Beside(("good.jsonl", "better.jsonl"), 30, 50)
    assert advice.config["stages"] == ["sft", "ipo"]
    assert advice.config["data"] == [str(folder), f"{better}:2"]
    assert advice.config["ipo"]["data"] == [pairs]
    assert "and nothing that says better or worse" not in " ".join(advice.lines())


def test_rankings_and_thumbs_together_are_read_as_what_most_files_can_be(tmp_path: Path):
    ranked = [{"prompt": sentence(n), "completions": [sentence(n * 3 + k + 100) for k in range(3)], "ranks": [1, 2, 3]} for n in range(5)]
    thumbs = [{"prompt": sentence(n), "completion": sentence(n + 900), "label": n % 2} for n in range(60, 66)]
    files = written(tmp_path, ranked, "ranked.jsonl"), written(tmp_path, thumbs, "thumbs.jsonl")
    found = look(AdviseSettings(data=list(files)))
    assert (found.kind, found.data, found.passed) == ("ranked", files[:1], {"thumbs_down": 3})
    assert found.beside == Beside(("thumbs.jsonl",), 3, 3)
    more = written(tmp_path, [pair(number) for number in range(4)], "pairs.jsonl"), written(tmp_path, thumbs, "more.jsonl")
    found = look(AdviseSettings(data=[*files, *more]))
    assert (found.kind, found.data) == ("thumbs", (files[1], *more))
    assert found.beside == Beside(("ranked.jsonl",), 5, 5)


def test_rows_of_another_kind_in_a_file_are_told(tmp_path: Path):
    good = [{"prompt": sentence(n), "completion": sentence(n + 100)} for n in range(300, 330)]
    pairs = [pair(number) for number in range(40)]
    found = looked(tmp_path, [*pairs, *good, {**pair(50), "chosen": " "}])
    assert (found.kind, found.num_examples, found.strays) == ("pair", 40, {"demonstration": 30})
    assert found.faults == {"missing_field": 30, "blank_answer": 1}
    mixed = [row for both in zip(pairs[:30], good, strict=True) for row in both]
    with pytest.raises(DataError, match="several kinds of data: of the first 60 rows 30 are pairs, 30 are demonstrations"):
        looked(tmp_path, mixed)


def test_prompts_alone_are_told_from_columns_that_need_a_name(tmp_path: Path):
    found = looked(tmp_path, [{"prompt": sentence(n), "instruction_id_list": ["length"]} for n in range(5)])
    assert found.kind == "prompts"
    assert signs.can_be_checked(found) == "all 5 examples name constraints that a program can check"
    with pytest.raises(DataError, match=r"perhaps: columns: \{completion: answer\}"):
        looked(tmp_path, [{"prompt": sentence(n), "answer": sentence(n + 100)} for n in range(5)])


@pytest.mark.parametrize(
    ("answer", "where"),
    [("So 3 + 4 = 7.\n#### 7", "numeric"), (r"Hence \boxed{\frac{1}{2}}", "numeric"), ("```python\nprint(1)\n```", "code")],
)
def test_answers_that_a_program_could_check(tmp_path: Path, answer: str, where: str):
    found = looked(tmp_path, [{"prompt": sentence(n), "completion": f"{sentence(n + 50)} {answer}"} for n in range(6)])
    assert getattr(found.content, where) == Count(6, 6)


def test_languages_by_letters_and_by_frequent_words(tmp_path: Path):
    rows = [{"prompt": "你好吗", "completion": "我很好"}, {"prompt": "what is this", "completion": "it is the sea"}]
    han, latin = 6, len("whatisthisitisthesea")
    found = looked(tmp_path, rows).content.languages
    assert found == {"English": pytest.approx(latin / (latin + han)), "Han": pytest.approx(han / (latin + han))}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Das ist nicht der Hund, den ich mit dir gesehen habe.", "German"),
        ("Le chat est dans la maison et les souris sont sur le toit.", "French"),
        ("El perro que vive en la casa no es mío, es de los vecinos.", "Spanish"),
        ("Não sei o que é isso, mas parece uma casa do outro lado da rua.", "Portuguese"),
        ("Il gatto è nella casa del vicino e gli piace il latte.", "Italian"),
        ("De kat zit op het dak en dat is niet goed voor een kat.", "Dutch"),
        ("Xyzzy plugh quux.", "Latin"),
    ],
)
def test_languages_in_latin_letters(text: str, language: str):
    assert latin_language(text) == language


def test_a_sample_keeps_all_or_nothing_of_a_prompt_and_counts_everything(tmp_path: Path):
    rows = [{**pair(number, rejected=sentence(5000 + number)), "prompt": sentence(number % 100, 5 + number % 100)} for number in range(600)]
    found = looked(tmp_path, rows, sample=60)
    assert found.num_examples == 600
    assert 30 <= found.sampled <= 60
    assert found.sampled % 6 == 0
    again = looked(tmp_path, rows, sample=60)
    assert again == found


def slowly(most: int, given: list[Example]) -> list[Example]:
    """What a sample keeps, by its definition: as long as there are too many, the prompt with the largest digest goes, for good."""
    kept: list[Example] = []
    below = SPACE
    for one in given:
        if digest(group_of(one)) >= below:
            continue
        kept.append(one)
        while len(kept) > most:
            places = {digest(group_of(entry)) for entry in kept}
            if len(places) == 1:
                kept.pop()
                break
            below = max(places)
            kept = [entry for entry in kept if digest(group_of(entry)) < below]
    return kept


@pytest.mark.parametrize(("most", "prompts"), [(10, 1), (10, 3), (50, 40), (50, 5000), (2000, 100)])
def test_a_sample_is_what_it_says_and_looks_at_each_example_twice_at_most(most: int, prompts: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    given = [Example(sentence(int(rng.integers(prompts)), 5), (Answer(str(place)),), location=str(place)) for place in range(1500)]
    looks: list[Example] = []
    right = looking.characters
    monkeypatch.setattr(looking, "characters", lambda example: (looks.append(example), right(example))[1])
    sample = Sample(most)
    for one in given:
        sample.add(one, {"place": one.location})
    assert sample.examples() == slowly(most, given)
    assert sample.num_kept == len(sample.examples())
    assert sample.num_characters == sum(right(example) for example in sample.examples())
    assert len(looks) <= 2 * len(given)


def test_a_sample_holds_no_more_text_than_it_may(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(looking, "CHARACTERS_HELD", 100)
    sample = Sample(10)
    for place, length in enumerate((30, 30, 30, 30, 200, 30)):
        sample.add(Example(f"prompt {place}", (Answer("x" * length),)), {})
    assert sample.num_characters <= 100
    assert sample.num_characters == sum(looking.characters(example) for example in sample.examples())
    alone = Sample(10)
    for _ in range(2):
        alone.add(Example("the only one", (Answer("x" * 200),)), {})
    assert (alone.examples(), alone.num_characters, alone.num_kept) == ([], 0, 0)
    alone.add(Example("another", (Answer("x"),)), {})
    assert len(alone.examples()) == 1


def test_one_prompt_alone_may_fill_the_sample(tmp_path: Path):
    found = looked(tmp_path, [{**pair(number), "prompt": "the same"} for number in range(40)], sample=10)
    assert (found.num_examples, found.sampled) == (40, 10)


def test_prompts_alone_are_read_under_the_names_that_were_given(tmp_path: Path):
    rows = [{"ask": sentence(n), "prompt": "not this", "tests": ["a"]} for n in range(5)]
    found = looked(tmp_path, rows, columns={"prompt": "ask"})
    assert (found.kind, found.num_examples) == ("prompts", 5)
    assert found.lengths.prompt.median == pytest.approx(len(sentence(1)), abs=15)
    assert found.lengths.prompt.median > len("not this")
    named = looked(tmp_path, [{"ask": sentence(n)} for n in range(5)], columns={"prompt": "ask"})
    assert named.kind == "prompts"
    with pytest.raises(DataError, match=r"no row has a column asked \(did you mean ask\?\)"):
        looked(tmp_path, rows, columns={"prompt": "asked"})
    with pytest.raises(DataError, match="no format has a field promt"):
        looked(tmp_path, rows, columns={"promt": "ask"})


def test_contradicted_pairs_are_told_of_all_pairs_of_answers(tmp_path: Path):
    answers = [sentence(place + 100) for place in range(3)]
    rows = [{"prompt": sentence(1), "completions": answers, "ranks": ranks, "who": ranks[0]} for ranks in ([1, 2, 3], [3, 2, 1])]
    found = looked(tmp_path, rows)
    assert (found.num_examples, found.agreement.pairs, found.agreement.contradicted) == (2, 3, 3)
    assert signs.is_noise_seen(found) == "all 3 pairs of answers have verdicts both ways"


def test_weights_of_sources_say_what_an_epoch_takes(tmp_path: Path):
    one = written(tmp_path, [pair(number) for number in range(40)], "one.jsonl")
    other = written(tmp_path, [pair(number) for number in range(100, 300)], "other.jsonl")
    found = look(AdviseSettings(data=[f"{one}:2.5", f"{other}:0.01"]))
    assert (found.num_examples, found.num_per_epoch) == (240, 102)
    assert look(AdviseSettings(data=[one, other])).num_per_epoch == 240
    assert look(AdviseSettings(data=[f"{one}:0.001"])).num_per_epoch == 1


def test_a_share_to_hold_out_is_known_where_it_was_given(tmp_path: Path):
    rows = [pair(number) for number in range(10)]
    assert looked(tmp_path, rows).eval_fraction is None
    assert looked(tmp_path, rows, eval_fraction=0.0).eval_fraction == 0.0
    assert looked(tmp_path, rows, eval_fraction=0.5).eval_fraction == 0.5


def test_from_python(tmp_path: Path):
    advice = prefopt.advise(written(tmp_path, [pair(number) for number in range(30)]))
    assert advice.method == "ipo"
    assert advice.config["batch_size"] == 8
    assert advice.facts.num_examples == 30
    assert any("30 pairs" in line for line in advice.lines())
    with pytest.raises(ConfigError, match=r"modell: no such setting \(did you mean model\?\)"):
        prefopt.advise("x.jsonl", modell="m")
    with pytest.raises(ConfigError, match="memory say something about a model: give model too"):
        prefopt.advise("x.jsonl", memory="8GB")
    with pytest.raises(ConfigError, match="on_bad_row is not for advice"):
        prefopt.advise("x.jsonl", on_bad_row="drop")
