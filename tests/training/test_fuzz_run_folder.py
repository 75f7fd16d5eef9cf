"""Folders of runs damaged at random, then resumed: on whole weights and to the same numbers, or refused in a sentence.

Checkpoints are damaged by the hundred and looked at. A few runs are resumed in full, each with all notes of its folder damaged.
"""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.command_line import prefopt
from tests.training.runs import Asks, figures, run, weights
from torch import nn

from prefopt.data.dataset import load
from prefopt.data.settings import DataSettings
from prefopt.errors import PrefoptError, RunError, RunStopped
from prefopt.models.reference_cache import CacheContext, ReferenceCache
from prefopt.report.files import RunFiles
from prefopt.training.optimizer import make_optimizer
from prefopt.training.record.checkpoint import Checkpoints, Progress, restore

STEPS = (2, 4, 6)


# Checkpoints.


def policy_at(step: int) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """A small model and its optimizer after that many steps."""
    torch.manual_seed(step)
    parameters = {name: nn.Parameter(torch.randn(3, 2)) for name in ("a.weight", "b.weight")}
    optimizer = make_optimizer(list(parameters.items()), weight_decay=0.0)
    for parameter in parameters.values():
        parameter.grad = torch.randn(3, 2)
    optimizer.step()
    return parameters, optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in STEPS:
        facts = {"settings": {"method": "dpo", "seed": 0}, "data": "abc", "opening": {}, "training_seconds": 1.5, "best": None}
        Checkpoints(folder, keep=3).save(*policy_at(step), Progress(step, {"shift": step / 10}), facts)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damage(path: Path, draw: random.Random) -> None:
    """Flip, cut, empty, double, mix up or replace a file, or let it be gone."""
    content = bytearray(path.read_bytes())
    way = draw.choice(["flip", "flip", "flip", "cut", "cut", "empty", "gone", "folder", "junk", "link", "insert", "zeros", "neighbour"])
    path.unlink()
    if way == "gone":
        return
    if way == "folder":
        path.mkdir()
        return
    if way == "link":
        path.symlink_to(path.name)
        return
    place = draw.randrange(max(1, len(content)))
    if way == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del content[place:]
    elif way == "empty":
        content.clear()
    elif way == "junk":
        content = bytearray(draw.randbytes(draw.randrange(200)))
    elif way == "insert":
        content[place:place] = draw.randbytes(draw.randrange(1, 9))
    elif way == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif way == "neighbour":
        other = draw.choice(sorted(path.parent.parent.glob(f"*/{path.name}")) or [path.parent])
        content = bytearray(other.read_bytes()) if other.is_file() else content
    path.write_bytes(content)


def edit_json(path: Path, draw: random.Random) -> None:
    """Change one value of a `state.json` so that it is still JSON, as a person would who wants to cheat."""
    state = json.loads(path.read_text())
    holder, key = draw.choice([(inner, name) for inner in (state, state["checksums"], state["settings"]) for name in inner])
    holder[key] = draw.choice([None, 0, 7, "x", [], {}, 0.5, "deadbeef" * 4])
    if draw.random() < 0.2:
        del holder[key]
    path.write_text(json.dumps(draw.choice([state, [state], {}, None, 3, state, state, state])))


def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(whole: Path, tmp_path: Path):
    before = contents(whole)
    draw = random.Random(0)
    folder = tmp_path / "checkpoints"
    outcomes: dict[int | None, int] = dict.fromkeys((*STEPS, None), 0)
    for _ in range(250):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        for _ in range(draw.choice([1, 1, 2, 5])):
            path = draw.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()])
            if path.name == "state.json" and draw.random() < 0.4:
                try:
                    edit_json(path, draw)
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # what was damaged before is no JSON to edit
            else:
                damage(path, draw)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                path, state = Checkpoints(folder, keep=3).newest_state()
            except RunError as error:
                outcomes[None] += 1
                taken, message = None, str(error)
            else:
                taken, message = state["step"], ""
                outcomes[taken] += 1
        passed_over = [step for step in STEPS if taken is None or step > taken]
        for step in passed_over:  # each with a warning, but where the folder is gone
            name = f"step-{step:06d}"
            assert contents(folder / name) != contents(whole / name) or any(entry.is_symlink() for entry in (folder / name).iterdir())
            assert any(name in str(warning.message) and "is damaged" in str(warning.message) for warning in told)
        if taken is None:
            assert "there is no checkpoint to resume from" in message
            continue
        assert path == folder / f"step-{taken:06d}"
        name = path.name
        for file in ("policy.safetensors", "optimizer.safetensors"):
            assert (path / file).read_bytes() == before[f"{name}/{file}"]
        original = json.loads(before[f"{name}/state.json"])
        assert state == {key: value for key, value in original.items() if key != "checksum"}
        parameters, optimizer = policy_at(1)
        progress = restore(path, state, parameters, optimizer)
        assert progress == Progress(taken, {"shift": taken / 10})
        for parameter, right in zip(parameters.values(), policy_at(taken)[0].values(), strict=True):
            assert torch.equal(parameter, right)
    assert all(outcomes.values()), outcomes  # each of them did happen


def test_a_state_nested_without_end_is_damage(whole: Path, tmp_path: Path):
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoints"))
    (folder / "step-000006" / "state.json").write_text("[" * 100_000)
    with pytest.warns(UserWarning, match=r"step-000006 is damaged \(state.json\)"):
        assert Checkpoints(folder, keep=3).newest_state()[1]["step"] == 4


# Caches.


def flipped(content: bytes, draw: random.Random) -> bytes:
    """The content with some bits flipped, cut short, or another."""
    new = bytearray(content)
    for _ in range(draw.choice([1, 4, 40])):
        new[draw.randrange(len(new))] ^= 1 << draw.randrange(8)
    return bytes(draw.choice([new, new, new, new[: draw.randrange(len(new))], draw.randbytes(64), b""]))


def test_a_damaged_token_cache_is_made_anew(chat_tokenizer: Any, pairs: str, tmp_path: Path):
    settings = DataSettings(data=[pairs], cache_dir=tmp_path)
    whole = load([pairs], settings, chat_tokenizer, kind="pair")
    [path] = tmp_path.rglob("*.trees")
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        path.write_bytes(new := flipped(content, draw))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            again = load([pairs], settings, chat_tokenizer, kind="pair")
        assert again.fingerprint == whole.fingerprint
        assert [tree.row_id for tree in again.trees] == [tree.row_id for tree in whole.trees]
        assert again.summary.from_cache == (new == content)
        assert any("are damaged and are made anew" in str(warning.message) for warning in told) == (new != content)


def test_a_damaged_reference_cache_gives_no_value_that_was_not_put_in(tmp_path: Path):
    context = CacheContext(weights="w", compute="float32", quantisation="", path="flat", device="cpu")
    values = {bytes([number] * 16): np.arange(number + 1, dtype=np.float32) for number in range(60)}
    ReferenceCache(tmp_path, context).put(values)
    [path] = tmp_path.glob("*.sqlite")
    content = path.read_bytes()
    draw = random.Random(0)
    gone = 0
    for _ in range(80):
        for left in tmp_path.iterdir():
            left.unlink()
        path.write_bytes(flipped(content, draw))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = ReferenceCache(tmp_path, context)
            found = cache.get(values)
            cache.put({key: value for key, value in values.items() if key not in found})
        for key, value in found.items():
            assert np.array_equal(value, values[key])
        gone += len(values) - len(found)
    assert gone > 0


# Whole runs.


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder()


SETTINGS = {"eval_fraction": 0.2, "eval_every_steps": 2, "save_every_steps": 2, "keep_checkpoints": 3, "samples": 1, "sample_tokens": 4}


@pytest.fixture(scope="module")
def uninterrupted(model: Path, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("dpo", model, pairs, tmp_path_factory.mktemp("runs") / "whole", **SETTINGS).folder


@pytest.fixture(scope="module")
def stopped(model: Path, pairs: str, uninterrupted: Path) -> Path:
    """A run that was asked to stop after step 4 of 6, or so."""
    folder = uninterrupted.parent / "stopped"
    import signal

    def at(step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(RunStopped):
        run("dpo", model, pairs, folder, narrator=Asks(at), **SETTINGS)
    return folder


JUNK = [None, 0, -1, 3, "x", "3", [], {}, [1], {"a": []}, 1e308, True]


def spoil(value: Any, draw: random.Random) -> Any:
    """JSON with one of its values replaced, left out, or under another name."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        way = draw.randrange(4)
        if way == 0:
            return {name: entry for name, entry in value.items() if name != key}
        if way == 1:
            return {name + "x" if name == key else name: entry for name, entry in value.items()}
        return value | {key: spoil(value[key], draw) if way == 2 else draw.choice(JUNK)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], spoil(value[place], draw), *value[place + 1 :]]
    return draw.choice(JUNK)


def spoil_notes(folder: Path, draw: random.Random) -> None:
    """Damage every note of a run: as bytes, or line by line as JSON that means something else."""
    for path in RunFiles(folder).single:
        if not path.is_file():
            if draw.random() < 0.3:
                path.write_bytes(draw.randbytes(20))
        elif draw.random() < 0.5 or path.suffix not in (".json", ".jsonl"):
            damage(path, draw)
        else:
            rows = (
                [json.loads(line) for line in path.read_text().split("\n") if line]
                if path.suffix == ".jsonl"
                else [json.loads(path.read_text())]
            )
            path.write_text("\n".join(json.dumps(spoil(row, draw)) for row in rows for _ in range(2)))


@pytest.mark.parametrize("seed", range(24))
def test_damaged_notes_do_not_keep_a_run_from_going_on_to_the_same_weights(
    model: Path, pairs: str, uninterrupted: Path, stopped: Path, tmp_path: Path, seed: int
):
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    spoil_notes(folder, random.Random(seed))
    refused = None
    try:
        run("dpo", model, pairs, folder, resume=True, **SETTINGS)
    except PrefoptError as error:
        refused = str(error)
    if refused is not None:
        assert any(path.name in refused for path in RunFiles(folder).single)  # one of them cannot be written
        return
    assert weights(folder) == weights(uninterrupted)
    [last, end] = [figures(path)[-1] for path in (folder, uninterrupted)]
    assert last == end


@pytest.mark.parametrize("seed", range(5))
def test_damaged_checkpoints_are_passed_over_and_the_weights_come_out_the_same(
    model: Path, pairs: str, uninterrupted: Path, stopped: Path, tmp_path: Path, seed: int
):
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    draw = random.Random(seed)
    damage(draw.choice(sorted((folder / "checkpoints" / "step-000004").iterdir())), draw)
    with pytest.warns(UserWarning, match=r"step-000004 is damaged .*the one before it is used"):
        run("dpo", model, pairs, folder, resume=True, **SETTINGS)
    assert weights(folder) == weights(uninterrupted)
    assert [row["step"] for row in figures(folder)] == [1, 2, 3, 4, 5, 6]


def commands(model: Path, pairs: str, folder: Path) -> Iterator[list[str]]:
    """Command lines that read what lies in a run's folder."""
    yield ["train", "dpo", "--config", str(folder / "config.yaml"), "--resume"]
    yield ["train", "dpo", "--model", str(folder), "--data", pairs, "--out", str(folder / "next"), "--max-steps", "1"]
    yield ["report", str(folder)]


def test_a_folder_whose_every_file_is_junk_gives_a_sentence(model: Path, pairs: str, stopped: Path, tmp_path: Path):
    for seed in range(3):
        draw = random.Random(seed)
        folder = Path(shutil.copytree(stopped, tmp_path / f"run{seed}"))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                damage(path, draw)
        for words in commands(model, pairs, folder):
            prefopt(*words).check()
