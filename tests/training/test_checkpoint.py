"""Checkpoints bring everything back to the bit, appear whole or not at all, and hold nothing that runs."""

import errno
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tests.training.crash_server import Server, flags
from tests.training.runs import Asks, figures, run, weights
from torch import nn
from torch.optim import AdamW

from prefopt import disk
from prefopt.errors import RunError
from prefopt.training.optimizer import make_optimizer
from prefopt.training.record import checkpoint, folder
from prefopt.training.record.checkpoint import Checkpoints, Progress, restore, verified

FACTS = {"settings": {"method": "dpo", "beta": 0.1}, "data": "fingerprint", "opening": {"before": {"eval/loss": 0.69}}}


def small(seed: int = 0, width: int = 4) -> tuple[nn.Module, dict[str, nn.Parameter], AdamW]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2))
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters.items(), weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return model, parameters, optimizer


def step(model: nn.Module, optimizer: AdamW) -> float:
    """A step on numbers drawn from the global random state."""
    optimizer.zero_grad()
    loss = model(torch.randn(5, 3)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def save(checkpoints: Checkpoints, step_number: int, *, seed: int = 0) -> Path:
    model, parameters, optimizer = small(seed)
    step(model, optimizer)
    return checkpoints.save(parameters, optimizer, Progress(step_number, {}), FACTS)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_comes_back_to_the_bit(tmp_path: Path):
    model, parameters, optimizer = small()
    torch.manual_seed(7)
    for _ in range(3):
        step(model, optimizer)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(parameters, optimizer, Progress(3, {"shift": 0.1 + 0.2}), FACTS)
    later = [step(model, optimizer) for _ in range(3)]

    other, other_parameters, other_optimizer = small(seed=1)
    torch.manual_seed(99)
    path, state = Checkpoints(tmp_path / "checkpoints", keep=2).newest_state()
    progress = restore(path, state, other_parameters, other_optimizer)
    assert progress == Progress(3, {"shift": 0.1 + 0.2})
    assert {name: state[name] for name in FACTS} == FACTS
    assert [step(other, other_optimizer) for _ in range(3)] == later
    for name, parameter in parameters.items():
        assert torch.equal(parameter, other_parameters[name])
        before, after = optimizer.state[parameter], other_optimizer.state[other_parameters[name]]
        assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert other_optimizer.param_groups[0]["weight_decay"] == 0.1


def test_nothing_in_it_is_pickled(tmp_path: Path):
    path = save(Checkpoints(tmp_path, keep=1), 5)
    assert path == tmp_path / "step-000005"
    assert sorted(file.name for file in path.iterdir()) == ["optimizer.safetensors", "policy.safetensors", "state.json"]
    assert set(load_file(path / "policy.safetensors")) == set(small()[1])
    assert json.loads((path / "state.json").read_text())["step"] == 5


def test_the_newest_stay(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (1, 9, 10, 999_999, 1_000_000):
        save(checkpoints, number)
    assert [path.name for path in checkpoints.all()] == ["step-999999", "step-1000000"]
    assert checkpoints.newest_state()[1]["step"] == 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")])
@pytest.mark.parametrize("place", [1, 2])
def test_a_disk_that_fills_up_leaves_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: int):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    before = content(tmp_path)
    calls = []

    def fail(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        save_file(tensors, path)
        if len(calls) == place:
            path.write_bytes(path.read_bytes()[:20])
            raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(
        RunError,
        match=r"cannot write the checkpoint .*step-000002: .*No space left.*go on with --resume: earlier checkpoints are untouched",
    ):
        save(checkpoints, 2)
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path):
    for name in (".step-000001.77", ".step-000003.78"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(RunError, match="there is no checkpoint to resume from"):
        checkpoints.newest_state()
    save(checkpoints, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_path_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*Make room and start anew with --overwrite"):
        save(Checkpoints(tmp_path / "file" / "checkpoints", keep=1), 1)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)


DAMAGE = {"flipped": flip, "cut short": cut_short, "missing": Path.unlink, "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("policy.safetensors", "optimizer.safetensors", "state.json") for damage in DAMAGE.values()),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_text("{}")),
        ("state.json", lambda path: path.write_text('"' + "[" * 100_000)),
    ],
    ids=[*(f"{name} {damage}" for name in ("policy", "optimizer", "state") for damage in DAMAGE), "a list", "no keys", "deep"],
)
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1)
    newest = save(checkpoints, 2)
    damage(newest / name)
    with pytest.warns(UserWarning, match=rf"step-000002 is damaged \({name}\); the one before it is used"):
        path, state = checkpoints.newest_state()
    assert (path.name, state["step"]) == ("step-000001", 1)
    # The run that goes on from there keeps its own checkpoints, not the damaged one.
    kept = Checkpoints(tmp_path, keep=1)
    save(kept, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept.newest_state()[1]["step"] == 1


def test_where_all_are_damaged(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    flip(save(checkpoints, 1) / "policy.safetensors")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(RunError, match="there is no checkpoint to resume from in"):
        checkpoints.newest_state()
    with pytest.raises(RunError, match="there is no checkpoint to resume from in"):
        Checkpoints(tmp_path / "none", keep=1).newest_state()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    path, state = checkpoints.newest_state()
    _, wider, optimizer = small(width=5)
    with pytest.raises(RunError, match="holds other parameters than this run trains: the model or the adapter settings have changed"):
        restore(path, state, wider, optimizer)
    _, fewer, optimizer = small()
    fewer.pop("0.bias")
    with pytest.raises(RunError, match="holds other parameters than this run trains"):
        restore(path, state, fewer, optimizer)


def test_no_character_of_the_state_can_change_unseen(tmp_path: Path):
    """It carries its own checksum: a step, a setting or a checksum that is another one would be believed otherwise."""
    path = save(Checkpoints(tmp_path, keep=1), 1)
    text = (path / "state.json").read_text()
    state, damaged = verified(path)
    assert damaged == []
    for place in range(0, len(text), 3):
        for other in ("7" if text[place] != "7" else "8", " "):
            (path / "state.json").write_text(text[:place] + other + text[place + 1 :])
            found, damaged = verified(path)
            assert damaged == ["state.json"] or (found == state and text[place].isspace())


def test_no_bit_of_the_tensors_can_change_unseen(tmp_path: Path):
    path = save(Checkpoints(tmp_path, keep=1), 1)
    for name in ("policy.safetensors", "optimizer.safetensors"):
        whole = (path / name).read_bytes()
        for place in range(0, len(whole), 41):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            (path / name).write_bytes(changed)
            assert verified(path)[1] == [name]
        (path / name).write_bytes(whole)
    assert verified(path)[1] == []


def test_a_best_one_stays_beside_the_newest(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    model, parameters, optimizer = small()
    step(model, optimizer)
    for number in range(1, 7):
        checkpoints.save(parameters, optimizer, Progress(number, {}), FACTS, best_step=2 if number >= 2 else 1)
    assert [path.name for path in checkpoints.all()] == ["step-000002", "step-000005", "step-000006"]
    checkpoints.save(parameters, optimizer, Progress(7, {}), FACTS, best_step=7)  # a new best: the old one may go
    assert [path.name for path in checkpoints.all()] == ["step-000006", "step-000007"]


def test_one_that_is_being_removed_is_under_its_name_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half of one would be taken for a damaged one, or stay for ever."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    seen: list[list[str]] = []
    remove = checkpoint.shutil.rmtree

    def look(path: Path, **settings: object) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("step-*")))
        remove(path, **settings)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", look)
    save(checkpoints, 2)
    assert seen[-1] == ["step-000002"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_what_a_killed_process_began_is_finished(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    for number in (1, 2, 3, 4):
        save(checkpoints, number)
    for name in (".step-000001.77", ".step-000000.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.safetensors").write_bytes(b"half")
    flip(tmp_path / "step-000004" / "policy.safetensors")
    Checkpoints(tmp_path, keep=2).tidy(tmp_path / "step-000003", best_step=1)
    # The damaged one stays for who wants to look at it, until the next is written.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002", "step-000003", "step-000004"]
    Checkpoints(tmp_path, keep=2).tidy(tmp_path / "step-000003")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003", "step-000004"]


def test_nothing_takes_its_place_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rename may reach the disk before the content does: after a power failure the name would stand for nothing."""
    events: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(disk, "flush", lambda path: events.append(f"flush {path.name.split('.')[0] or 'draft'}"))
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1])
    save(Checkpoints(tmp_path / "checkpoints", keep=1), 1)
    assert sorted(events[:4]) == ["flush draft", "flush optimizer", "flush policy", "flush state"]
    assert events[4:] == ["rename", "flush checkpoints"]


# In a run.

SETTINGS = {"eval_fraction": 0.33, "epochs": 3, "save_every_steps": 1, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def killed(
    model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Callable[..., Path]]:
    """A run in one piece, and what a kill in its sixth step leaves of it: checkpoints of the steps 3, 4 and 5."""
    base = tmp_path_factory.mktemp("killed")

    def at(done: int) -> None:
        if done == 6:
            shutil.copytree(base / "whole", base / "killed", ignore=shutil.ignore_patterns(".lock"))

    run("dpo", model_folder(), pairs, base / "whole", narrator=Asks(at), **SETTINGS)
    return base / "whole", base / "killed", model_folder


@pytest.mark.parametrize("num_damaged", [1, 2])
@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors", "state.json"])
def test_a_run_goes_on_from_the_one_before(killed, pairs: str, tmp_path: Path, name: str, num_damaged: int):
    whole, left, model_folder = killed
    out = Path(shutil.copytree(left, tmp_path / "run"))
    for number in (5, 4)[:num_damaged]:
        (flip if number == 5 else Path.unlink)(out / "checkpoints" / f"step-{number:06d}" / name)
    with pytest.warns(UserWarning, match="is damaged") as caught:
        run("dpo", model_folder(), pairs, out, resume=True, **SETTINGS)
    assert [str(warning.message) for warning in caught] == [
        f"the checkpoint {out}/checkpoints/step-{number:06d} is damaged ({name}); the one before it is used, where there is one"
        for number in (5, 4)[:num_damaged]
    ]
    assert figures(out) == figures(whole)
    assert weights(out) == weights(whole)
    assert [path.name for path in Checkpoints(out / "checkpoints", keep=1).all()] == ["step-000005", "step-000006", "step-000007"]
    assert all(verified(path)[1] == [] for path in (out / "checkpoints").iterdir())


def test_where_every_one_is_damaged_the_command_says_so(server: Server, killed, pairs: str, tmp_path: Path):
    _, left, model_folder = killed
    out = Path(shutil.copytree(left, tmp_path / "run"))
    for path in (out / "checkpoints").iterdir():
        cut_short(path / "optimizer.safetensors")
    before = content(out)
    words = flags("dpo", model_folder(), pairs, out, **SETTINGS)
    *notes, last = server.run([*words, "--resume"], code=2).splitlines()
    assert notes == [
        f"prefopt: note: the checkpoint {out}/checkpoints/step-{number:06d} is damaged (optimizer.safetensors); the one before it is used, "
        "where there is one"
        for number in (5, 4, 3)
    ]
    assert last == (
        f"prefopt: there is no checkpoint to resume from in {out}/checkpoints. Start the run anew: with --overwrite in place of --resume."
    )
    assert content(out) == before


def test_the_lines_are_on_the_disk_before_the_checkpoint_is(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a power failure would leave a checkpoint of more steps than there are lines of metrics."""
    events: list[str] = []
    save_one = Checkpoints.save
    monkeypatch.setattr(folder, "flush", lambda path: events.append(path.name))
    monkeypatch.setattr(Checkpoints, "save", lambda self, *args, **kwargs: (events.append("save"), save_one(self, *args, **kwargs))[1])
    run("dpo", model_folder(), pairs, tmp_path / "run", save_every_steps=3)
    assert events.count("save") == 2
    for place in (place for place, event in enumerate(events) if event == "save"):
        assert events[place - 3 : place] == ["metrics.jsonl", "samples.jsonl", "watch.jsonl"]
