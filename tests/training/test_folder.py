"""The folder of a run: links in it, and that it may vanish."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.training.runs import Asks, run, weights

from prefopt.disk import remove
from prefopt.errors import RunError
from prefopt.training.record.checkpoint import Checkpoints
from prefopt.training.record.folder import RunFolder


def test_what_a_link_leads_to_stays(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    for name in ("link", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / ("elsewhere" if name == "link" else "nowhere"))
        remove(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    remove(tmp_path / "nothing")
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"
    remove(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["checkpoints", "model", "tensorboard"])
def test_a_run_whose_folders_are_links_is_overwritten(model_folder: Callable[..., Path], pairs: str, tmp_path: Path, name: str):
    """Someone keeps them on a larger disk. The links go, and nothing that they lead to."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run("dpo", model_folder(), pairs, out)
    first = weights(out)
    if name == "tensorboard":
        elsewhere.mkdir()
    else:
        (out / name).rename(elsewhere)
    (out / name).symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    run("dpo", model_folder(), pairs, out, overwrite=True)
    assert weights(out) == first
    assert sorted(elsewhere.rglob("*")) == before
    assert not (out / name).is_symlink()
    assert [path.name for path in out.glob(".*")] == []


def test_a_link_that_leads_nowhere_is_in_no_way(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    run("dpo", model_folder(), pairs, out)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").symlink_to(tmp_path / "gone")
    run("dpo", model_folder(), pairs, out, overwrite=True)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000006"]


def test_checkpoints_on_another_disk(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """The link leads to a folder: it is written there, resumed from there, and old ones go there."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run("dpo", model_folder(), pairs, out)
    (out / "checkpoints").rename(elsewhere)
    (out / "checkpoints").symlink_to(elsewhere)
    (out / "summary.json").unlink()
    run("dpo", model_folder(), pairs, out, resume=True)
    assert (out / "summary.json").is_file()
    assert [path.name for path in elsewhere.iterdir()] == ["step-000006"]


def test_one_checkpoint_that_is_a_link_goes_as_a_link(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-000001").symlink_to(tmp_path / "elsewhere")
    (folder / "step-000002").mkdir()
    Checkpoints(folder, keep=1).tidy(folder / "step-000002")
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_folder_that_vanishes_is_named(model_folder: Callable[..., Path], pairs: str, tmp_path: Path, how: str):
    out = tmp_path / "run"

    def at(done: int) -> None:
        if done == 3:
            shutil.rmtree(out) if how == "removed" else out.rename(tmp_path / "moved")

    with pytest.raises(RunError) as caught:
        run("dpo", model_folder(), pairs, out, narrator=Asks(at), save_every_steps=1)
    assert "is gone: it was removed or moved while the run went" in str(caught.value)
    assert "--overwrite" not in str(caught.value)
    assert not out.exists()
    if how == "moved":
        (tmp_path / "moved").rename(out)
        run("dpo", model_folder(), pairs, out, resume=True)
        assert (out / "summary.json").is_file()


def test_a_disk_that_is_read_only_is_another_matter(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: Is a directory\. See to it .* start anew with --overwrite"):
        RunFolder(tmp_path).add_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
