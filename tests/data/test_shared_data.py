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


def test_mostly_invalid_json_is_not_guessed_at(settings, tokenizer, tmp_path):
    copy = tmp_path / "ko.jsonl"
    copy.write_bytes((SHARED / "malformed" / "ko_harmless_base_test.txt").read_bytes())
    with pytest.raises(DataError, match="rows cannot be parsed"):
        load([str(copy)], settings(on_bad_row="drop"), tokenizer, kind="pair")
    with pytest.raises(DataError, match="not read"):
        load([str(SHARED / "malformed" / "ko_harmless_base_test.txt")], settings(), tokenizer, kind="pair")
