"""Every method from rows to a report: on a tiny model, with what it writes about itself."""

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.runs import Asks, figures, losses, pair_rows, rows, run, write_rows

from prefopt.methods.pair_method import pair_methods
from prefopt.methods.table import METHODS
from prefopt.training.loop import Trainer

KINDS: dict[str, dict[str, Any]] = {row.name: {} for row in METHODS}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, settings) for name, settings in KINDS.items()},
    "dpo with options": ("dpo", {"label_smoothing": 0.1, "sft_weight": 0.2, "wpo": True, "ld_alpha": 0.5, "f_divergence": "js"}),
    "mix": ("ipo", {"mix": {"bco": {"weight": 0.5, "beta": 0.3}, "orpo": 0.1, "sft": 0.1}, "reduction": "sum"}),
    "discopop with a wide change": ("discopop", {"tau": 0.5}),
    "kto on thumbs": ("kto", {"balance": True}),
    "bco on thumbs": ("bco", {"unpaired": True}),
    "dpo on orders": ("dpo", {"plackett_luce": True}),
    "ipo on all pairs": ("ipo", {"all_pairs": True}),
    "reward on orders": ("reward", {"plackett_luce": True, "center_weight": 0.01}),
    "reward on all pairs": ("reward", {"all_pairs": True}),
}


def thumb_rows() -> list[dict[str, Any]]:
    sides = [(row, side) for place, row in enumerate(pair_rows(12)) for side in (("chosen", "rejected") if place % 3 else ("rejected",))]
    return [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row, side in sides]


def ranked_rows() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"], " maybe, or maybe not"], "ranks": [3, 1, 2]}
        for row in pair_rows(12)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    made = {"pairs": pair_rows(12), "thumbs": thumb_rows(), "orders": ranked_rows()}
    return {name: write_rows(folder / f"{name}.jsonl", given) for name, given in made.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_tells(model_folder: Callable[..., Path], data: dict[str, str], tmp_path: Path, name: str):
    method, settings = RUNS[name]
    source = data["thumbs" if "thumbs" in name else "orders" if "orders" in name or "all pairs" in name else "pairs"]
    rate = 2e-3 if method not in ("sppo", "ipo") else 5e-4
    held_out = {"eval_data": source} if "thumbs" in name else {"eval_fraction": 0.25}
    more = {"eval_every_steps": 2, "report": True, "learning_rate": rate, **held_out, **settings}
    result = run(method, model_folder(), source, tmp_path / "out", **more)
    before, after = (json.loads((tmp_path / "out" / "summary.json").read_text())[side] for side in ("before", "after"))
    assert all(math.isfinite(value) for row in rows(result.folder) for value in row.values() if value is not None)
    assert after["eval/loss"] < before["eval/loss"]
    if name == "discopop":  # at a margin of 0 its slope points the wrong way, to a hollow at −0.12: see its file
        assert before["eval/rewards/margin"] == 0
        assert -0.15 < after["eval/rewards/margin"] < -0.01
        return
    if (method in pair_methods() or method == "reward") and "thumbs" not in name:
        assert after["eval/rewards/margin"] > before["eval/rewards/margin"]
        assert after["eval/rewards/accuracy"] >= before["eval/rewards/accuracy"]
    elif method != "sft":
        assert {"rewards/desirable", "rewards/undesirable", "rewards/accuracy"} <= set().union(*rows(result.folder))
        assert before["eval/rewards/accuracy"] == 0.5
        assert after["eval/rewards/accuracy"] > 0.5
    page = (result.folder / "report.html").read_text()
    assert page.count("<svg") >= 3
    if "thumbs" in name or name == "kto":
        assert "the reward now agrees with the thumb" in page
        assert "thumb up, held out" in page
        assert "Answer, thumb" in page
    if name == "dpo on orders":
        assert "Answer 3 of 3" in page


def language_models() -> int:
    """How many there are in memory."""
    gc.collect()
    return sum(type(one).__name__.endswith("ForCausalLM") for one in gc.get_objects())


@pytest.mark.parametrize(("method", "settings", "more"), [
    *((name, {}, 1) for name in ("sft", "orpo", "simpo", "cpo")),
    ("dpo", {}, 1),  # its reference's values are in the cache
    ("dpo", {"reference_cache": False}, 2),  # so the count counts
])  # fmt: skip
def test_reference_free_methods_hold_no_reference(
    model_folder: Callable[..., Path],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict,
    more: int,
):
    """Neither a second model in memory at any step, nor values on disk, nor a reference that the trainer was given."""
    seen: list[tuple[int, bool]] = []
    step = Trainer.step

    def looked_at(self: Trainer, *arguments: Any) -> Any:
        seen.append((language_models(), self.reference is None))
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", looked_at)
    before = language_models()
    run(method, model_folder(), data["pairs"], tmp_path / method, max_steps=1, **settings)
    assert seen == [(before + more, method != "dpo")]
    kept = any((tmp_path / "cache").rglob("reference"))
    assert kept == (method == "dpo" and not settings)


@pytest.mark.parametrize("name", ["kto on thumbs", "bco on thumbs", "bco", "mix"])
def test_what_a_method_carries_survives_a_stop(model_folder: Callable[..., Path], data: dict[str, str], tmp_path: Path, name: str):
    method, settings = RUNS[name]
    source = data["thumbs" if "thumbs" in name else "pairs"]
    whole = run(method, model_folder(), source, tmp_path / "whole", **settings)
    half = tmp_path / "half"
    run(method, model_folder(), source, half, save_every_steps=3, keep_checkpoints=10, **settings)
    for folder in sorted((half / "checkpoints").glob("step-*")):
        if folder.name != "step-000003":
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink()
            folder.rmdir()
    again = run(method, model_folder(), source, half, save_every_steps=3, keep_checkpoints=10, resume=True, **settings)
    assert losses(again.folder) == losses(whole.folder)
    assert figures(again.folder) == figures(whole.folder)


def test_balance_reaches_the_loss_by_how_often_an_epoch_takes_each_file(model_folder: Callable[..., Path], tmp_path: Path):
    """Of a file that is taken four times there is four times as much: the run is that with the weights given by hand."""
    sides = {name: [row for row in thumb_rows() if row["label"] == label][:6] for name, label in (("up", True), ("down", False))}
    up, down = (write_rows(tmp_path / f"{name}.jsonl", given) for name, given in sides.items())
    found, said = {}, {}
    for name, given in {"balanced": {"balance": True}, "by hand": {"undesirable_weight": 3.0}, "plain": {}}.items():
        narrator = Asks(lambda done: None)
        result = run("kto", model_folder(), [f"{up}:4", down], tmp_path / name, narrator=narrator, epochs=1, **given)  # type: ignore[arg-type]
        found[name], said[name] = losses(result.folder), narrator.said
    assert len(found["balanced"]) == (4 * 6 + 6 + 3) // 4
    assert found["balanced"] == found["by hand"]
    assert found["balanced"][0] != pytest.approx(found["plain"][0], rel=1e-3)
    told = "thumbs: 6 up, 6 down, which weigh 24 and 6 in an epoch"
    assert f"{told}; balanced by desirable_weight 1 and undesirable_weight 3" in said["balanced"]
    assert any(line.startswith(f"note: {told}; up weighs 4 times what down weighs") for line in said["plain"])
    assert not any(told in line for line in said["by hand"])


def test_the_run_s_seed_draws_the_partners(model_folder: Callable[..., Path], data: dict[str, str], tmp_path: Path):
    """With all examples in each step their order says nothing, and only the partners of z0 depend on the seed."""
    given = {"batch_size": len(thumb_rows()), "epochs": 3, "undesirable_weight": 0.0}  # answers become likelier, and z0 more than 0
    found = []
    for place, seed in enumerate((1, 1, 2)):
        result = run("kto", model_folder(), data["thumbs"], tmp_path / str(place), seed=seed, **given)
        found.append([(row["z0"], row["loss"]) for row in rows(result.folder)])
    assert found[0] == found[1]
    (begun, one), (other_begun, other) = ((entry[0], entry[-1]) for entry in found[1:])
    assert begun == pytest.approx(other_begun, rel=1e-6)
    assert min(one[0], other[0]) > 0.01
    assert abs(one[0] - other[0]) > 1e-3 * one[0]
