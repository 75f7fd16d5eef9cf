"""How long the texts are that a reward model scores: as long as the way to run it was proved on, and no longer."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from prefopt.errors import DataError
from prefopt.models import scorer as scoring
from prefopt.models.load import Precision, load_model
from prefopt.models.read import context_of
from prefopt.models.save import save_model
from prefopt.models.scorer import TreeScorer, length_unasked
from prefopt.models.settings import ModelSettings
from prefopt.trees import Completion, PromptTree, token_ids


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that reads 512 tokens; nobody trained it."""
    made = load_model(
        ModelSettings(model=str(model_folder())),
        precision=Precision(None, torch.float32),
        device=torch.device("cpu"),
        seed=0,
        kind="reward",
    )
    path = tmp_path_factory.mktemp("reward") / "model"
    save_model(made, path)
    return path


def tree(prompt: int, *completions: int) -> PromptTree:
    return PromptTree(token_ids(range(5, 5 + prompt)), tuple(Completion(token_ids(range(7, 7 + length))) for length in completions))


LONG = {"max_position_embeddings": 131_072}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"max_position_embeddings": 512}, 512),
    ("llama", LONG, 131_072),
    ("mistral", {**LONG, "sliding_window": 4096}, 4096),
    ("mistral", {**LONG, "sliding_window": 100}, 131_072),  # a short window is crossed in any case
    ("mistral", {"max_position_embeddings": 2048, "sliding_window": 4096}, 2048),
]


@pytest.mark.parametrize(("architecture", "config", "expected"), CASES)
def test_unasked_texts_are_as_long_as_the_model_reads_but_cross_no_long_window(architecture: str, config: dict[str, Any], expected: int):
    assert length_unasked(AutoConfig.for_model(architecture, **config)) == expected


def test_a_context_is_what_the_config_says_or_unknown():
    assert context_of(AutoConfig.for_model("llama", max_position_embeddings=300)) == 300
    assert context_of(AutoConfig.for_model("gpt2", n_positions=77)) == 77
    for nothing in (0, -1, None, "many"):
        text = SimpleNamespace(max_position_embeddings=nothing)
        assert context_of(SimpleNamespace(get_text_config=lambda text=text: text)) is None  # type: ignore[arg-type]
    bloom = AutoConfig.for_model("bloom")
    assert context_of(bloom) is None
    assert length_unasked(bloom) == scoring.MAX_LENGTH


@pytest.mark.parametrize(("asked", "proved"), [(None, 512), (300, 300), (8192, 512)])
def test_it_is_proved_on_texts_as_long_as_will_be_scored(folder: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None, proved: int):
    right, lengths = scoring.prove, []

    def prove(model: Any, *, max_length: int, **more: Any) -> Any:
        lengths.append(max_length)
        return right(model, max_length=max_length, **more)

    monkeypatch.setattr(scoring, "prove", prove)
    assert TreeScorer.load(str(folder), max_length=asked, precision="float32").max_length == proved
    assert lengths == [proved]


def test_longer_texts_are_refused_whatever_they_hold(folder: Path):
    scorer = TreeScorer.load(str(folder), max_length=40, precision="float32")
    assert scorer.scores([tree(30, 10, 4), tree(3, 2)]).shape == (3,)
    with pytest.raises(DataError, match=r"has 41 tokens, and .* was proved on texts of up to 40\. Load it with max_length=41, or give"):
        scorer.scores([tree(3, 2), tree(30, 4, 11)])
    with pytest.raises(DataError, match=r"has 513 tokens, and the model reads 512\. Give shorter texts\."):
        scorer.scores([tree(1, 512)])
