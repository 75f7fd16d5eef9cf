"""The known faults of real data, where the shared folder is there."""

from pathlib import Path

import pytest

from prefopt.data.dataset import load
from prefopt.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


def loaded(settings, tokenizer, name, kind, **given):
    return load([str(SHARED / name)], settings(on_bad_row="drop", max_length=1_000_000, **given), tokenizer, kind=kind)


def test_hh_faults_are_found_where_they_are(settings, tokenizer, tmp_path):
    path = str(SHARED / "hh-rlhf" / "harmless-base.jsonl.gz")
    with pytest.raises(DataError) as caught:
        load([path], settings(), tokenizer, kind="pair")
    places = [line.strip().split(": ")[:2] for line in str(caught.value).split("\n")[1:7]]
    lines = [
        ("blank_answer", 87),
        ("blank_answer", 517),
        ("blank_answer", 926),
        ("blank_answer", 1104),
        ("prompts_differ", 1255),
        ("prompts_differ", 1689),
    ]
    assert places == [[f"harmless-base.jsonl.gz:{line}", reason] for reason, line in lines]


@pytest.mark.parametrize(
    ("name", "kind", "given", "form", "num_rows", "dropped", "num_duplicates"),
    [
        ("llamafactory-demo/dpo_en_demo.json", "pair", {}, "sharegpt_pair", 300, {}, 5),
        ("llamafactory-demo/dpo_zh_demo.json", "pair", {}, "sharegpt_pair", 300, {}, 11),
        ("rasbt-dpo/instruction-data-with-preference.json", "pair", {}, "instruction_pair", 1100, {"same_answers": 6}, None),
        ("llamafactory-demo/v1_sft_demo.jsonl", "demonstration", {}, "messages", 500, {}, None),
        (
            "llamafactory-demo/v1_dpo_demo.jsonl",
            "pair",
            {"columns": {"chosen": "chosen_messages", "rejected": "rejected_messages"}},
            "conversation_pair",
            10,
            {},
            None,
        ),
    ],
)
def test_counts(settings, tokenizer, name, kind, given, form, num_rows, dropped, num_duplicates):
    summary = loaded(settings, tokenizer, name, kind, **given).summary
    assert (summary.sources[0].format, summary.num_rows, dict(summary.dropped)) == (form, num_rows, dropped)
    if num_duplicates is not None:
        assert summary.num_duplicates == num_duplicates


@pytest.mark.parametrize(
    ("name", "kind", "form", "num_trees", "dropped", "facts"),
    [
        ("llamafactory-demo/kto_en_demo.json", "thumbs", "messages_label", 300, {}, {"num_up": 150, "num_down": 150}),
        ("llamafactory-demo/kto_en_demo.json", "demonstration", "messages_label", 150, {"thumbs_down": 150}, {}),
        ("gsm8k/example_model_solutions.jsonl", "thumbs", "gsm8k_solutions", 5276, {}, {"num_up": 2001, "num_down": 3275}),
        (
            "open-assistant/en_100_tree.jsonl",
            "ranked",
            "message_tree",
            212,
            {},
            {"branches": {"2": 57, "3": 117, "4": 27, "5": 3, "6": 6, "8": 1, "9": 1}, "num_ties": 0},
        ),
        ("open-assistant/en_100_tree.jsonl", "thumbs", "message_tree", 430, {"no_label": 10}, {"num_up": 334, "num_down": 96}),
        ("open-assistant/en_100_tree.jsonl", "pair", "message_tree", 754, {}, {}),
        (
            "tulu-human-eval/eval_annotations_tulu_1.xlsx",
            "pair",
            "comparison",
            773,
            {"tie": 337, "same_answers": 40},
            {"num_rows": 1150},
        ),
        (
            "tulu-human-eval/eval_annotations_tulu_1.xlsx",
            "thumbs",
            "comparison",
            2220,
            {"same_answers": 40},
            {"num_up": 1751, "num_down": 469},
        ),
        ("pandalm/testset-v1.json", "pair", "votes", 836, {"tie": 103, "blank_answer": 54, "wrong_type": 6}, {"num_rows": 999}),
        ("ukp-convarg", "pair", "arguments", 5872, {}, {"num_rows": 5872}),
        ("hh-rlhf/harmless-base.jsonl.gz", "thumbs", "hh", 3588, {"blank_answer": 4, "prompts_differ": 2}, {"num_up": 1794}),
    ],
)
def test_thumbs_rankings_and_verdicts(settings, bos_tokenizer, name, kind, form, num_trees, dropped, facts):
    summary = loaded(settings, bos_tokenizer, name, kind).summary
    assert {source.format for source in summary.sources} == {form}
    assert (summary.num_trees, dict(summary.dropped)) == (num_trees, dropped)
    assert {key: getattr(summary, key) for key in facts} == facts


def test_mostly_invalid_json_is_not_guessed_at(settings, tokenizer, tmp_path):
    copy = tmp_path / "ko.jsonl"
    copy.write_bytes((SHARED / "malformed" / "ko_harmless_base_test.txt").read_bytes())
    with pytest.raises(DataError, match="rows cannot be parsed"):
        load([str(copy)], settings(on_bad_row="drop"), tokenizer, kind="pair")
    with pytest.raises(DataError, match="not read"):
        load([str(SHARED / "malformed" / "ko_harmless_base_test.txt")], settings(), tokenizer, kind="pair")
