"""What the data room makes of each file in the shared folder, as a markdown table.

    python bench/read_shared_data.py [FOLDER]

The tokenizer is trained here, on the texts themselves, so that nothing is downloaded.
"""

import gzip
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefopt.data.dataset import load
from prefopt.data.settings import DataSettings
from prefopt.errors import DataError
from prefopt.training.order import Mix

V1_PAIRS = {"chosen": "chosen_messages", "rejected": "rejected_messages"}
GSM8K = {"prompt": "question", "completion": "answer"}
DO_NOT_ANSWER = {"prompt": "question", "completion": "response"}
FILES: list[tuple[tuple[str, ...], str, dict[str, Any]]] = [
    (("hh-rlhf/harmless-base.jsonl.gz",), "pair", {}),
    (("hh-rlhf/harmless-base.jsonl.gz",), "thumbs", {}),
    (("hh-rlhf/harmless-base.jsonl.gz",), "demonstration", {}),
    (("ukp-convarg",), "pair", {}),
    (("llamafactory-demo/dpo_en_demo.json",), "pair", {}),
    (("llamafactory-demo/dpo_zh_demo.json",), "pair", {}),
    (("llamafactory-demo/kto_en_demo.json",), "thumbs", {}),
    (("llamafactory-demo/kto_en_demo.json",), "demonstration", {}),
    (("llamafactory-demo/kto_en_demo.json",), "pair", {}),
    (("llamafactory-demo/v1_dpo_demo.jsonl",), "pair", {"columns": V1_PAIRS}),
    (("llamafactory-demo/v1_sft_demo.jsonl",), "demonstration", {}),
    (("llamafactory-demo/alpaca_en_demo.json",), "demonstration", {}),
    (("open-assistant/en_100_tree.jsonl",), "ranked", {}),
    (("open-assistant/en_100_tree.jsonl",), "pair", {}),
    (("open-assistant/en_100_tree.jsonl",), "thumbs", {}),
    (("open-assistant/en_100_tree.jsonl",), "demonstration", {}),
    (("tulu-human-eval/eval_annotations_tulu_1.xlsx",), "pair", {}),
    (("tulu-human-eval/eval_annotations_tulu_1.xlsx",), "thumbs", {}),
    (("tulu-human-eval/eval_annotations_tulu_1.xlsx",), "ranked", {}),
    (("pandalm/testset-v1.json",), "pair", {}),
    (("rasbt-dpo/instruction-data-with-preference.json",), "pair", {}),
    (("rasbt-dpo/instruction-data-with-preference.json",), "demonstration", {}),
    (("gsm8k/train.jsonl",), "demonstration", {"columns": GSM8K}),
    (("gsm8k/example_model_solutions.jsonl",), "thumbs", {}),
    (("ifeval/input_data.jsonl",), "demonstration", {}),
    (("xstest/xstest_prompts.csv",), "demonstration", {}),
    (("xstest/xstest_v2_completions_gpt4.csv",), "demonstration", {}),
    (("xstest/xstest_v2_completions_mistralinstruct.csv",), "demonstration", {}),
    (("do-not-answer/annotated_response_vicuna-7b.csv",), "demonstration", {"columns": DO_NOT_ANSWER}),
    (("do-not-answer/do_not_answer_en.csv",), "demonstration", {}),
    (("harmbench/harmbench_behaviors_text_all.csv",), "demonstration", {}),
    (("imdb/reviews.jsonl.gz",), "demonstration", {}),
    (("imdb/reviews-test.jsonl.gz",), "demonstration", {}),
    (("tinyshakespeare/input.txt",), "demonstration", {}),
    (("malformed/ko_harmless_base_test.txt",), "pair", {}),
    (("hh-rlhf/harmless-base.jsonl.gz:0.5", "llamafactory-demo/dpo_en_demo.json:2"), "pair", {}),
]
"""What is given together, the kind that it is read as, and settings. Files without answers stand here too: they are to be refused with
a reason."""


def trained_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 16,384 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_384, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator((text_of(file) for file in files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def text_of(file: Path) -> str:
    content = file.read_bytes()
    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode(errors="replace").replace("\\n", "\n")[:500_000]


def row_of(given: Sequence[str], kind: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> list[str]:
    """The cells of a row behind what was given and as what it was read."""
    asked = DataSettings(data=list(given), on_bad_row="drop", cache_dir=cache_dir, **settings)
    try:
        dataset = load(list(given), asked, tokenizer, kind=kind)  # type: ignore[arg-type]
    except DataError as error:
        said = str(error).split("\n")[0]
        for path in given:
            said = said.replace(path, Path(path).name)
        return [f"refused: {said[:160]}", *[""] * 7]
    summary = dataset.summary
    dropped = ", ".join(f"{reason} {count}" for reason, count in (summary.dropped or {}).items()) or "none"
    examples = f"{summary.num_trees:,}"
    if dataset.times:
        examples += f"; {Mix.of(np.array(dataset.times_of(dataset.trees))).num_per_epoch:,} in an epoch"
    return [
        ", ".join(dict.fromkeys(source.format for source in summary.sources)),
        f"{summary.num_rows:,}",
        examples,
        dropped,
        str(summary.num_cut),
        str(summary.num_duplicates),
        f"{summary.prompt_share:.0%}",
        f"{summary.rows_per_second:,.0f}",
    ]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        sys.exit(f"{folder} is no folder. Give the folder of the shared data.")
    paths = {folder / name.partition(":")[0] for names, _, _ in FILES for name in names}
    tokenizer = trained_tokenizer(sorted(path for path in paths if path.is_file() and path.suffix != ".xlsx"))
    print(f"{date.today()}, {os.cpu_count()} cores; python {platform.python_version()}, tokenizers {tokenizers.__version__}\n")
    print("| given | read as | format | rows | examples | dropped | prompts cut | duplicates | prompt share | rows/s |")
    print("|---" * 10 + "|")
    with tempfile.TemporaryDirectory() as cache_dir:
        for names, kind, given in FILES:
            columns = f" with columns {given['columns']}" if given else ""
            shown = " + ".join(f"`{name}`" for name in names) + columns
            cells = row_of([str(folder / name) for name in names], kind, given, tokenizer, Path(cache_dir))
            print("|", " | ".join([shown, kind, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
