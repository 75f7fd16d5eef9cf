"""Small finished runs of each kind, made once per session: what merge, generate and chat are asked about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.runs import pair_rows, run, write_rows


def chat_rows() -> list[dict[str, Any]]:
    """The pairs as conversations."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in pair_rows()
    ]


@pytest.fixture(scope="session")
def full_run(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPO of all weights on raw text."""
    folder = tmp_path_factory.mktemp("full")
    run("dpo", model_folder(), write_rows(folder / "pairs.jsonl", pair_rows()), folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def lora_run(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPO of a new adapter on raw text, some of it held out."""
    folder = tmp_path_factory.mktemp("lora")
    data = write_rows(folder / "pairs.jsonl", pair_rows())
    run("dpo", model_folder(), data, folder / "run", lora_rank=4, learning_rate=3e-2, eval_fraction=0.3)
    return folder / "run"


@pytest.fixture(scope="session")
def continued_run(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPO that went on with the adapter of `lora_run`."""
    folder = tmp_path_factory.mktemp("continued")
    run("dpo", lora_run / "model", write_rows(folder / "pairs.jsonl", pair_rows()), folder / "run", learning_rate=3e-2)
    return folder / "run"


@pytest.fixture(scope="session")
def chat_run(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPO of a new adapter on conversations."""
    folder = tmp_path_factory.mktemp("chat")
    run("dpo", model_folder(), write_rows(folder / "chats.jsonl", chat_rows()), folder / "run", lora_rank=2, learning_rate=1e-2)
    return folder / "run"


@pytest.fixture(scope="session")
def reward_run(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on raw text, of at most 128 tokens."""
    folder = tmp_path_factory.mktemp("reward")
    run("reward", model_folder(), write_rows(folder / "pairs.jsonl", pair_rows()), folder / "run", learning_rate=3e-3)
    return folder / "run"


@pytest.fixture(scope="session")
def sft_run(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT of all weights, which has no reference."""
    folder = tmp_path_factory.mktemp("sft")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows()]
    run("sft", model_folder(), write_rows(folder / "answers.jsonl", rows), folder / "run")
    return folder / "run"
