"""Tokenisation alone: the same rows again and again, each round a stretch.

prefopt goes its whole way, from the file to trees, the entry in the token cache included; of TRL only `_prepare_dataset` is
timed, on rows that are in memory already.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.versus.turns import Turns


def play(spec: Mapping[str, Any], turns: Turns) -> None:
    """Round after round, until the driver ends the process."""
    if spec["side"] == "prefopt":
        play_prefopt(spec, turns)
    else:
        play_trl(spec, turns)


def play_prefopt(spec: Mapping[str, Any], turns: Turns) -> None:
    from transformers import AutoTokenizer

    import prefopt
    from prefopt.data.dataset import load
    from prefopt.data.settings import DataSettings

    turns.facts(import_seconds=turns.start_seconds, versions={"prefopt": prefopt.__version__})
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    turns.enter("tokenise")
    while True:
        with tempfile.TemporaryDirectory(dir=spec["out"]) as cache:
            settings = DataSettings(
                data=[spec["pairs"]],
                on_bad_row="drop",
                data_format="text_pair",
                max_length=spec["max_length"],
                cache_dir=Path(cache),
                **spec["settings"],
            )
            dataset = load([spec["pairs"]], settings, tokenizer, kind="pair")
            turns.cut(rows=dataset.summary.num_rows)


def play_trl(spec: Mapping[str, Any], turns: Turns) -> None:
    import datasets
    import trl
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    turns.facts(import_seconds=turns.start_seconds, versions={"trl": trl.__version__})
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    config = DPOConfig(
        output_dir=spec["out"], max_length=spec["max_length"], use_cpu=True, bf16=False, report_to="none", **spec["settings"]
    )
    rows = [json.loads(line) for line in Path(spec["pairs"]).read_text(encoding="utf-8").split("\n") if line]
    dataset = datasets.Dataset.from_list(rows)
    stand_in = SimpleNamespace(_tokenizer=tokenizer)  # all that the method reads of a trainer
    turns.enter("tokenise")
    while True:
        DPOTrainer._prepare_dataset(stand_in, dataset, tokenizer, config, "train")
        turns.cut(rows=len(dataset))
