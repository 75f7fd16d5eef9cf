"""What models are compared on: the run's own examples as it read them, else anything the tokenizer knows."""

import shutil
from pathlib import Path

import yaml
from tests.training.runs import pair_rows
from transformers import AutoTokenizer

from prefopt.pipeline.texts import MAX_TOKENS, NUM_TREES, few, positions, texts_for
from prefopt.pipeline.trained import look_up
from prefopt.report.files import RunFiles, read_lines
from prefopt.trees import Completion, PromptTree, token_ids


def texts(folder: Path):
    return texts_for(look_up(str(folder)), AutoTokenizer.from_pretrained(folder / "model"), num_tokens=384)


def with_config(folder: Path, out: Path, **values: object) -> Path:
    copied = Path(shutil.copytree(folder, out))
    config = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump(config | values))
    return copied


def test_held_out_examples_come_first_and_are_the_runs_own_tokens(lora_run: Path):
    found = texts(lora_run)
    noted = read_lines(RunFiles(lora_run).held_out)
    assert {tree.row_id for tree in found.trees} == {row["row"] for row in noted}
    assert found.are_pairs
    assert found.origin == f"{len(noted)} held-out examples of the run"
    lengths = {row["row"]: row["lengths"] for row in noted}
    tokenizer = AutoTokenizer.from_pretrained(lora_run / "model")
    for tree in found.trees:
        assert [len(completion.ids) for completion in tree.completions] == lengths[tree.row_id]
        row = pair_rows()[int(tree.row_id.rpartition(":")[2]) - 1]
        assert tokenizer.decode(tree.completions[0].ids) == row["chosen"] + "<end>"


def test_without_held_out_ones_the_examples_of_training(full_run: Path, chat_run: Path, sft_run: Path):
    assert texts(full_run).origin == "12 examples of the run"
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "model")
    assert tokenizer.decode(texts(chat_run).trees[0].prompt_ids).startswith("<begin><turn>user\n")
    demonstrations = texts(sft_run)
    assert not demonstrations.are_pairs
    assert {len(tree.completions) for tree in demonstrations.trees} == {1}


def test_without_the_data_texts_are_drawn(full_run: Path, tmp_path: Path):
    for name, values in {"gone": {"data": ["/no/such/file.jsonl"]}, "piped": {"data": ["-"]}, "other": {"max_length": "long"}}.items():
        found = texts(with_config(full_run, tmp_path / name, **values))
        assert found.origin == "texts drawn from the tokenizer's vocabulary"
        assert not found.are_pairs
        assert len(found.trees) == NUM_TREES
    special = set(AutoTokenizer.from_pretrained(full_run / "model").all_special_ids)
    used = {int(index) for tree in found.trees for ids in (tree.prompt_ids, tree.completions[0].ids) for index in ids}
    assert max(used) < 384
    assert not used & special
    assert len(used) > 200


def test_few_take_from_everywhere_and_leave_long_ones_out():
    def tree(length: int) -> PromptTree:
        return PromptTree(token_ids(range(length)), (Completion(token_ids([1])),), row_id=str(length))

    many = [tree(10) for _ in range(100)]
    assert few(many) == tuple(many[:: 100 // NUM_TREES][:NUM_TREES])
    assert few([]) == ()
    assert [chosen.row_id for chosen in few([tree(MAX_TOKENS * 2)])] == [str(MAX_TOKENS * 2)]  # better than none
    mixed = few([tree(3000), tree(2000), tree(1500), tree(10)])
    assert [chosen.row_id for chosen in mixed] == ["10", "1500", "2000"]
    assert sum(map(positions, mixed)) <= MAX_TOKENS
