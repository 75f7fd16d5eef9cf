"""Rows of the workloads: real data in its own formats, and made-up texts of exact lengths."""

import gzip
import json
from pathlib import Path

import pytest
from bench.versus import workloads
from bench.versus.contestants import UsageError


@pytest.fixture(scope="module")
def made_tokenizer():
    return workloads.train_tokenizer(workloads.tokenizer_texts("k2", None), vocabulary=2048)


def test_hh_transcripts_are_cut_before_the_last_answer(tmp_path: Path):
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} because", "rejected": f"{start} no"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: other\n\nAssistant: b"},
    ]
    (tmp_path / "hh.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert list(workloads.hh_rows(tmp_path / "hh.gz")) == [{"prompt": start, "chosen": " because", "rejected": " no"}]


def test_ukp_labels_say_which_argument_is_chosen(tmp_path: Path):
    lines = ["#id\tlabel\ta1\ta2", 'x\ta2\tweak "quote\tstrong', "y\ta1\tstrong\tweak"]
    (tmp_path / "plastic-bottles_no-bad.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    prompt = "plastic bottles: no bad\n\nArgument:"
    assert list(workloads.ukp_rows(tmp_path)) == [
        {"prompt": prompt, "chosen": " strong", "rejected": ' weak "quote'},
        {"prompt": prompt, "chosen": " strong", "rejected": " weak"},
    ]


def test_sharegpt_turns_become_a_transcript(tmp_path: Path):
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."}}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    expected = {"prompt": "\n\nSystem: Be brief.\n\nHuman: Why?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."}
    assert list(workloads.sharegpt_rows(tmp_path / "rows.json")) == [expected]


def test_missing_data_is_told(tmp_path: Path):
    with pytest.raises(UsageError, match="--data, or in PREFOPT_SHARED"):
        workloads.real_rows("hh", tmp_path)


def test_made_up_rows_have_the_lengths_that_were_asked_for(made_tokenizer, tmp_path: Path):
    lengths = [(1, (5, 9)), (40, (2, 30)), (7, (3, 4))]
    rows = workloads.made_rows(lengths, made_tokenizer, seed=0)
    found = workloads.choose_rows("made", rows, 3, 2, tmp_path, made_tokenizer, max_length=100)
    assert found.lengths == tuple(lengths)
    assert len(found.pairs.read_text().splitlines()) == 3
    assert [tuple(map(len, row)) for row in found.ids] == [(prompt, *completions) for prompt, completions in lengths]


def test_an_example_of_four_completions_is_two_rows(made_tokenizer, tmp_path: Path):
    rows = workloads.made_rows([(6, (4, 5, 6, 7))] * 2, made_tokenizer, seed=1)
    found = workloads.choose_rows("made", rows, 2, 4, tmp_path, made_tokenizer, max_length=100)
    assert found.lengths == ((6, (4, 5, 6, 7)),) * 2
    assert [list(found.rows_of(example)) for example in range(2)] == [[0, 1], [2, 3]]
    assert rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]


def test_rows_that_do_not_fit_are_left_out_and_counted(made_tokenizer, tmp_path: Path):
    rows = workloads.made_rows([(5, (5, 5)), (50, (5, 5)), (6, (5, 5))], made_tokenizer, seed=2)
    found = workloads.choose_rows("made", rows, 2, 2, tmp_path, made_tokenizer, max_length=20)
    assert [prompt for prompt, _ in found.lengths] == [5, 6]
    assert found.account["left_out"] == {"too_long": 1}
    with pytest.raises(UsageError, match="2 examples fit within 20 tokens, and the run takes 3"):
        workloads.choose_rows("made", rows, 3, 2, tmp_path, made_tokenizer, max_length=20)


def test_lengths_are_read_as_they_are_written(made_tokenizer, tmp_path: Path):
    lengths = [(number + 1, (number + 2, 3)) for number in range(30)]
    rows = workloads.made_rows(lengths, made_tokenizer, seed=3)
    found = workloads.choose_rows("made", rows, 2, 2, tmp_path, made_tokenizer, max_length=100)
    file = tmp_path / "lengths.json"
    assert workloads.write_lengths(found, file, max_length=100) == 30
    assert workloads.lengths_in_file(file) == lengths
    file.write_text('{"lengths": [[1, 2]]}')
    with pytest.raises(UsageError, match="holds no lengths"):
        workloads.lengths_in_file(file)


def test_the_committed_lengths_are_those_of_pairs():
    file = Path(__file__).parents[2] / "bench" / "lengths" / "hh.json"
    lengths = workloads.lengths_in_file(file)
    assert len(lengths) == 1794
    assert all(prompt >= 1 and min(completions) >= 2 for prompt, completions in lengths)
