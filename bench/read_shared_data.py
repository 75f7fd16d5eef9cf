"""What the data room makes of each file in the shared folder, as a markdown table.

    python bench/read_shared_data.py [FOLDER]

The tokenizer is trained here, on the texts themselves, so that nothing is downloaded.
"""

import gzip
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefopt.data.dataset import load
from prefopt.data.settings import DataSettings
from prefopt.errors import DataError

V1_PAIRS = {"chosen": "chosen_messages", "rejected": "rejected_messages"}
FILES: list[tuple[str, str, dict[str, Any]]] = [
    ("hh-rlhf/harmless-base.jsonl.gz", "pair", {}),
    ("hh-rlhf/harmless-base.jsonl.gz", "demonstration", {}),
    ("llamafactory-demo/dpo_en_demo.json", "pair", {}),
    ("llamafactory-demo/dpo_zh_demo.json", "pair", {}),
    ("llamafactory-demo/v1_dpo_demo.jsonl", "pair", {"columns": V1_PAIRS}),
    ("llamafactory-demo/v1_sft_demo.jsonl", "demonstration", {}),
    ("llamafactory-demo/alpaca_en_demo.json", "demonstration", {}),
    ("llamafactory-demo/kto_en_demo.json", "demonstration", {}),
    ("rasbt-dpo/instruction-data-with-preference.json", "pair", {}),
    ("rasbt-dpo/instruction-data-with-preference.json", "demonstration", {}),
    ("gsm8k/train.jsonl", "demonstration", {"columns": {"prompt": "question", "completion": "answer"}}),
    ("imdb/reviews.jsonl.gz", "demonstration", {}),
    ("imdb/reviews-test.jsonl.gz", "demonstration", {}),
    ("xstest/xstest_v2_completions_gpt4.csv", "demonstration", {}),
    ("do-not-answer/annotated_response_vicuna-7b.csv", "demonstration", {"columns": {"prompt": "question", "completion": "response"}}),
    ("pandalm/testset-v1.json", "pair", {}),
    ("open-assistant/en_100_tree.jsonl", "pair", {}),
    ("ukp-convarg/evolution-vs-creation_evolution.csv.gz", "pair", {}),
    ("malformed/ko_harmless_base_test.txt", "pair", {}),
]


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


def row_of(file: Path, kind: str, given: dict[str, Any], tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> list[str]:
    settings = DataSettings(data=[str(file)], on_bad_row="drop", cache_dir=cache_dir, **given)
    try:
        summary = load([str(file)], settings, tokenizer, kind=kind).summary  # type: ignore[arg-type]
    except DataError as error:
        return [f"refused: {str(error).split(chr(10))[0].replace(str(file), file.name)[:110]}", *[""] * 7]
    dropped = ", ".join(f"{reason} {count}" for reason, count in (summary.dropped or {}).items()) or "none"
    return [
        summary.sources[0].format,
        f"{summary.num_rows:,}",
        f"{summary.num_trees:,}",
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
    tokenizer = trained_tokenizer(sorted({folder / name for name, _, _ in FILES}))
    print("| file | read as | format | rows | examples | dropped | prompts cut | duplicates | prompt share | rows/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache_dir:
        for name, kind, given in FILES:
            columns = f" with columns {given['columns']}" if given else ""
            print(
                "|",
                " | ".join([f"`{name}`{columns}", kind, *row_of(folder / name, kind, given, tokenizer, Path(cache_dir))]),
                "|",
                flush=True,
            )


if __name__ == "__main__":
    main()
