"""Parts of an answer that are not learned: what the losses are of, compared with log-probabilities that are worked out apart."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.command_line import prefopt
from tests.training.runs import rows, run, write_rows
from transformers import AutoTokenizer

from prefopt.data.dataset import load
from prefopt.data.settings import DataSettings
from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.methods.dpo import dpo_loss
from prefopt.methods.sft import sft_loss
from prefopt.models.policy import EnginePath, Policy
from prefopt.trees import PromptTree

THOUGHT = {"type": "text", "text": "Let me think about the sea.", "train": False}
QUESTIONS = ["Is the sea wide?", "Is it deep?", "Is France wide?", "Who sings?"]


def answered(text: str, masked: bool = True) -> list[dict]:
    return [{"role": "assistant", "content": [THOUGHT if masked else {**THOUGHT, "train": True}, {"type": "text", "text": text}]}]


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


PAIRS = [
    {
        "prompt": asked(question),
        "chosen": answered(f" Yes, {number} it is."),
        "rejected": answered(" I do not know.", masked=number % 2 == 0),
    }
    for number, question in enumerate(QUESTIONS)
]


@pytest.fixture
def trees(model_folder: Callable[..., Path], tmp_path: Path) -> list[PromptTree]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return list(load([path], DataSettings(data=[path], cache_dir=tmp_path / "cache"), tokenizer, kind="pair").trees)


def by_hand(model: torch.nn.Module, tree: PromptTree, place: int, *, of_all: bool = False) -> torch.Tensor:
    """The sum of the log-probabilities of a completion's tokens that count, from one forward of prompt and completion."""
    completion = tree.completions[place]
    ids = torch.tensor([[*tree.prompt_ids.tolist(), *completion.ids.tolist()]])
    logps = model(ids).logits.log_softmax(-1)[0, len(tree.prompt_ids) - 1 : -1]
    own = logps.gather(1, ids[0, len(tree.prompt_ids) :, None])[:, 0]
    counted = torch.ones(len(own), dtype=torch.bool) if completion.scored is None or of_all else torch.tensor(completion.scored)
    return own[counted].sum()


def test_losses_and_gradients_are_those_of_the_tokens_that_count(make_model, trees):
    assert all(tree.completions[0].scored is not None and not tree.completions[0].scored.all() for tree in trees)
    assert [tree.completions[1].scored is None for tree in trees] == [False, True, False, True]
    model, other = (make_model("gpt2", seed=seed, initializer_range=0.2).double().eval() for seed in (0, 1))
    policy = Policy(model, EnginePath("flat", HeadShape()))
    sums = policy(pack(trees, sharing="flat")).sum()
    with torch.no_grad():
        reference = torch.stack([by_hand(other, tree, place) for tree in trees for place in (0, 1)])
    num_chosen = sum(tree.completions[0].num_scored for tree in trees)
    parameters = list(model.parameters())

    def losses(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sft = sft_loss(values[0::2]).sum() / num_chosen
        return sft, dpo_loss(values[0::2], values[1::2], reference[0::2], reference[1::2], beta=0.1).mean()

    of_engine = [(loss, torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses(sums)]
    policy.use_path(EnginePath("plain", None))
    expected = torch.stack([by_hand(model, tree, place) for tree in trees for place in (0, 1)])
    whole = torch.stack([by_hand(model, tree, place, of_all=True) for tree in trees for place in (0, 1)])
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    assert (whole - expected)[0::2].max() < -1  # the masked parts would weigh in
    for (loss, gradients), (own, all_of_it) in zip(of_engine, zip(losses(expected), losses(whole), strict=True), strict=True):
        assert loss.item() == pytest.approx(own.item(), rel=1e-6)
        assert abs(loss.item() - all_of_it.item()) > 1e-3
        for gradient, by_rule in zip(gradients, torch.autograd.grad(own, parameters, retain_graph=True), strict=True):
            torch.testing.assert_close(gradient, by_rule, rtol=1e-4, atol=1e-6)


def test_a_run_says_the_log_probabilities_of_what_counts(model_folder, trees, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder()).eval()
    result = run("dpo", model_folder(), str(tmp_path / "pairs.jsonl"), tmp_path / "dpo", max_steps=1)
    first = rows(result.folder)[0]
    with torch.no_grad():
        chosen, rejected = (torch.stack([by_hand(model, tree, place) for tree in trees]).mean() for place in (0, 1))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["logps/chosen"] == pytest.approx(float(chosen), rel=1e-4)
    assert first["logps/rejected"] == pytest.approx(float(rejected), rel=1e-4)


def test_the_command_line_from_rows_to_a_trained_model(model_folder, trees, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder()).eval()
    data = write_rows(tmp_path / "sft.jsonl", [{"messages": [*row["prompt"], *row["chosen"]]} for row in PAIRS])
    shown = prefopt("data", data, "--kind", "demonstration", "--model", str(model_folder()), "--cache-dir", str(tmp_path / "cache"))
    assert shown.code == 0, shown.err
    assert "⟦Let me think about the sea.⟧ Yes, 0 it is.<end>" in shown.out
    words = ["train", "sft", "--model", str(model_folder()), "--data", data, "--out", str(tmp_path / "sft"), "--max-steps", "2"]
    said = prefopt(*words, "--batch-size", "4", "--precision", "float32", "--learning-rate", "1e-3", "--epochs", "2")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    with torch.no_grad():
        total = sum(float(by_hand(model, tree, 0)) for tree in trees)
    assert lines[0]["loss"] == pytest.approx(-total / sum(tree.completions[0].num_scored for tree in trees), rel=1e-4)
    assert lines[1]["loss"] < lines[0]["loss"]
