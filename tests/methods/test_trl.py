"""Against TRL: the loss of each of six full-batch AdamW steps, for every loss that both have.

What agrees, what differs and what only TRL has, and why, is the table under "Losses" in docs/coming-from.md: this file reads it and
checks every line.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.docs.pages import ROOT
from tests.training.runs import losses, pair_rows, rows, run, write_rows

from prefopt.methods.thumbs import WithPartners

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 6
RATE = 1e-3
CLOSE = 1e-5
"""Both compute in float32, where the losses of six steps were found to differ by 4e-6 at most."""
CLOSE_OF_LARGE = 5e-6
"""The same of losses above 2, as a share: SPPO's are 50 and IPO's 25, and a digit of float32 is 4e-6 there; found were 1e-4 and 6e-6."""

Ours = tuple[str, dict[str, Any]]
Theirs = dict[str, Any]
"""Arguments of a TRL config; `trainer` says which one, DPO's by default."""

MOSTLY_UP = {"desirable_weight": 2.0, "undesirable_weight": 0.1}

SAME: dict[str, tuple[Ours, Theirs]] = {
    "sigmoid": (("dpo", {}), {}),
    "hinge": (("hinge", {}), {"loss_type": "hinge"}),
    "ipo": (("ipo", {}), {"loss_type": "ipo"}),
    "sigmoid_norm": (("ln-dpo", {"beta": 5.0}), {"loss_type": "sigmoid_norm", "beta": 5.0}),
    "robust": (("robust", {"label_smoothing": 0.2}), {"loss_type": "robust", "label_smoothing": 0.2}),
    "exo_pair": (("exo", {"label_smoothing": 0.01}), {"loss_type": "exo_pair", "label_smoothing": 0.01}),
    "nca_pair": (("nca", {}), {"loss_type": "nca_pair"}),
    "sppo_hard": (("sppo", {}), {"loss_type": "sppo_hard"}),
    "apo_zero": (("apo-zero", {}), {"loss_type": "apo_zero"}),
    "apo_down": (("apo-down", {}), {"loss_type": "apo_down"}),
    "discopop": (("discopop", {}), {"loss_type": "discopop"}),
    "sigmoid and sft": (("dpo", {"sft_weight": 0.5}), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "sigmoid and ipo": (("dpo", {"mix": {"ipo": 0.1}}), {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.1]}),
    "use_weighting": (("dpo", {"wpo": True, "wpo_clamp": False}), {"use_weighting": True}),
    "ld_alpha": (("dpo", {"ld_alpha": 0.3}), {"ld_alpha": 0.3}),
    "forward_kl": (("dpo", {"f_divergence": "forward-kl"}), {"f_divergence_type": "forward_kl"}),
    "js_divergence": (("dpo", {"f_divergence": "js"}), {"f_divergence_type": "js_divergence"}),
    "alpha_divergence": (
        ("dpo", {"f_divergence": "alpha", "f_alpha": 0.3}),
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "sync_ref_model": (
        ("dpo", {"sync_reference_every_steps": 2, "sync_reference_weight": 0.6}),
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
    ),
    "CPO": (("cpo", {"sft_weight": 0.5}), {"trainer": "cpo", "cpo_alpha": 0.5}),
    "SimPO": (
        ("simpo", {"beta": 2.0, "gamma": 0.8}),
        {"trainer": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.8},
    ),
    "ORPO": (("orpo", {"odds_weight": 0.2}), {"trainer": "orpo", "beta": 0.2}),
    # mostly thumbs up, so that everything becomes likelier and z0 is above 0
    "KTO": (("kto", MOSTLY_UP), {"trainer": "kto", **MOSTLY_UP}),
    "SFT": (("sft", {}), {"trainer": "sft"}),
    "Reward": (("reward", {}), {"trainer": "reward"}),
    "Reward with margin": (("reward", {"margin_from_scores": True}), {"trainer": "reward", "margin": True}),
    "center_rewards_coefficient": (("reward", {"center_weight": 0.1}), {"trainer": "reward", "center_rewards_coefficient": 0.1}),
}
"""Losses that agree: how the table calls them, and both sides."""

DIFFERENT: dict[str, tuple[Ours, Theirs, bool]] = {
    "sigmoid with label_smoothing": (("dpo", {"label_smoothing": 0.2}), {"label_smoothing": 0.2}, True),
    "bco_pair": (("bco", {}), {"loss_type": "bco_pair"}, True),
    "KTO's partners": (("kto", MOSTLY_UP), {"trainer": "kto", **MOSTLY_UP}, True),
}
"""Losses that do not: both sides, and whether the first step still agrees."""


THEIRS_ONLY = {
    "aot, aot_unpaired", "CPO with alpha (AlphaPO)", "CPO with hinge", "CPO with ipo", "KTO with apo_zero_unpaired", "SFT with dft",
}  # fmt: skip
"""Losses that we have not."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Pairs of which half have a longer chosen answer, and half a longer rejected one; without and with a column `margin`."""
    made = pair_rows(8)
    for place, row in enumerate(made):
        row["chosen" if place % 2 else "rejected"] += " and so on and on"
    folder = tmp_path_factory.mktemp("trl")
    with_margin = [{**row, "margin": 0.25 * place} for place, row in enumerate(made)]
    return {False: write_rows(folder / "pairs.jsonl", made), True: write_rows(folder / "margins.jsonl", with_margin)}


def theirs(model: Path, data: dict[bool, str], out: Path, given: Theirs) -> list[float]:
    """TRL's losses before each step."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    given = dict(given)
    kind = given.pop("trainer", "dpo")
    if kind == "cpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    elif kind == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    elif kind == "kto":
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer
    elif kind == "sft":
        from trl import SFTConfig as Config
        from trl import SFTTrainer as Trainer
    elif kind == "reward":
        from trl import RewardConfig as Config
        from trl import RewardTrainer as Trainer
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    found: list[float] = []

    class Heard(Trainer):
        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            found.append(float(loss))
            return loss

    file = data[given.pop("margin", False)]
    given_rows = load_dataset("json", data_files=file, split="train", cache_dir=str(out / "datasets"))
    if kind == "kto":
        from trl import unpair_preference_dataset

        given_rows = unpair_preference_dataset(given_rows)
    made: Any = AutoModelForCausalLM
    if kind == "sft":
        given_rows = given_rows.remove_columns("rejected").rename_column("chosen", "completion")
    if kind == "reward":  # it wants whole texts
        given_rows = given_rows.map(
            lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}, remove_columns=["prompt"]
        )
        made = AutoModelForSequenceClassification
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = None  # the older trainers put one before every prompt
    config = Config(
        output_dir=str(out / "trl"), per_device_train_batch_size=len(given_rows), num_train_epochs=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, max_length=128, **given,
    )  # fmt: skip
    trainer = Heard(model=made.from_pretrained(model), args=config, train_dataset=given_rows, processing_class=tokenizer)
    trainer.train()
    return found


def ours(model: Path, data: dict[bool, str], out: Path, given: Ours) -> list[float]:
    method, settings = given
    file = data["margin_from_scores" in settings]
    thumbs = method == "kto"
    more = {"batch_size": 16 if thumbs else 8, "epochs": STEPS, "learning_rate": RATE, "lr_schedule": "constant", "warmup_ratio": 0.0}
    result = run(method, model, file, out / "ours", **more, **settings)
    if thumbs:
        assert rows(result.folder)[-1]["z0"] > 0.01
    return losses(result.folder)


@pytest.fixture
def their_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's partner of a thumb is the one before it; its data has all that are up, then all that are down."""
    original = WithPartners.__init__

    def before(self: WithPartners, trees: Any, *, seed: int) -> None:
        original(self, trees, seed=seed)
        self.longest = 128  # take all of it
        order = [*range(0, len(trees), 2), *range(1, len(trees), 2)]
        for place, own in enumerate(order):
            self.partners[own] = order[place - 1]

    monkeypatch.setattr(WithPartners, "__init__", before)


@pytest.mark.parametrize("name", SAME)
def test_six_steps_agree(model_folder: Callable[..., Path], data: dict[bool, str], tmp_path: Path, their_partners: None, name: str):
    mine, other = SAME[name]
    model = model_folder()
    if mine[0] == "reward":  # both begin with the same score layer
        model = run("reward", model, data[False], tmp_path / "begun", max_steps=1).model_dir
    expected = theirs(model, data, tmp_path, other)
    found = ours(model, data, tmp_path, mine)
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, abs=CLOSE, rel=CLOSE_OF_LARGE)
    assert abs(found[0] - found[-1]) > 1e-3  # it went somewhere


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_said_to_differ_does(model_folder: Callable[..., Path], data: dict[bool, str], tmp_path: Path, name: str):
    mine, other, begins_alike = DIFFERENT[name]
    expected = theirs(model_folder(), data, tmp_path, other)
    found = ours(model_folder(), data, tmp_path, mine)
    assert (found[0] == pytest.approx(expected[0], rel=1e-4)) == begins_alike
    assert found != pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_table_says_what_was_tested():
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    section = page.split("## Losses")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("| ")][1:]
    said = {re.sub("`", "", cells[0]): cells[2] for cells in lines}
    assert {name for name, verdict in said.items() if verdict.startswith("same")} == set(SAME)
    assert {name for name, verdict in said.items() if verdict.startswith("differs")} == set(DIFFERENT)
    assert {name for name, verdict in said.items() if re.match("theirs only: .{20}", verdict)} == THEIRS_ONLY  # with the reason
    assert said.keys() == {*SAME, *DIFFERENT, *THEIRS_ONLY}


LOSSES_OF_TRL = {
    "trl.trainer.dpo_trainer": "",
    "trl.trainer.kto_trainer": "KTO",
    "trl.experimental.cpo.cpo_trainer": "CPO",
}
"""Where TRL branches by `loss_type`, and what stands before its name in the table."""


@pytest.mark.parametrize("module", LOSSES_OF_TRL)
def test_every_loss_that_trl_has_is_in_the_table(module: str):
    theirs = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(importlib.import_module(module))))
    assert len(theirs) > 1
    named = [*SAME, *DIFFERENT, *THEIRS_ONLY]
    before = LOSSES_OF_TRL[module]
    # What is called like its trainer is that trainer's own loss; SimPO has a line of its own.
    own = {"CPO": {"sigmoid", "simpo", "kto_pair"}, "KTO": {"kto"}, "": set()}[before]
    for loss in theirs - own:
        assert any(re.search(rf"\b{loss}\b", name) and name.startswith(before) for name in named), loss


def test_every_loss_of_sft_that_trl_has_is_in_the_table():
    from trl import SFTConfig

    (choices,) = [one.metadata["choices"] for one in dataclasses.fields(SFTConfig) if one.name == "loss_type"]
    assert set(choices) == {"nll", "chunked_nll", "dft"}  # the second is the first by another way
