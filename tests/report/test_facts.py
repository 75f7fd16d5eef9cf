"""The tables of a page."""

import json
from pathlib import Path

from tests.report.made import make_run

from prefopt.report.facts import data_rows
from prefopt.report.record import read_run


def test_the_lengths_of_both_sides_of_pairs_are_shown_where_they_are_known(tmp_path: Path):
    run = make_run(tmp_path / "run")
    names = [name for name, _ in data_rows(read_run(run))]
    assert "mean length of an answer" in names
    assert not any("chosen" in name or "rejected" in name for name in names)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"]["summary"] |= {"mean_chosen": 18.47, "mean_rejected": 78.5}
    manifest["data"]["held_out_lengths"] = {"mean_chosen": 20.0, "mean_rejected": 80.0}
    (run / "manifest.json").write_text(json.dumps(manifest))
    rows = dict(data_rows(read_run(run)))
    assert rows["mean length of a chosen answer"] == "18.5 tokens"
    assert rows["mean length of a rejected answer"] == "78.5 tokens"
    assert rows["mean length of a chosen answer, held out"] == "20.0 tokens"
    manifest["data"]["summary"] |= {"mean_chosen": 0.0, "mean_rejected": 0.0}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "mean length of a rejected answer" not in dict(data_rows(read_run(run))), "0 says that there are no pairs"
