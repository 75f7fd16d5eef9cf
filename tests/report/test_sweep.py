"""What is said of a sweep: which run is best, how sure that is, the table, the charts, the page."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from tests.report.made import FINDINGS, make_run

from prefopt.errors import ConfigError
from prefopt.pipeline.sweep.shown import show_sweep
from prefopt.report.figures import Change
from prefopt.report.record import Finding, HeldOut, RunRecord, read_run
from prefopt.report.sweep.best import find_best, headline, paired_error, parts, sentences
from prefopt.report.sweep.charts import sweep_charts
from prefopt.report.sweep.draw import draw_sweep_chart
from prefopt.report.sweep.page import sweep_html
from prefopt.report.sweep.record import SweepRecord, SweptRun, read_sweep
from prefopt.report.sweep.table import best_row, columns, fitting, reasons

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return read_run(make_run(tmp_path_factory.mktemp("run") / "a", num_held_out=4))


def swept(blank: RunRecord, beta: float, right: Sequence[float], kl: float = 1.0, **values: Any) -> SweptRun:
    """A run whose held-out pairs came out as given: 1 where the chosen answer has the higher reward."""
    examples = tuple(
        HeldOut(f"row {place}", f"prompt {place}", ("a", "b"), (1.0, 1.0), 1.0, {"rewards/accuracy": 0.5}, {"rewards/accuracy": value})
        for place, value in enumerate(right)
    )
    mean = sum(right) / len(right)
    figures = {
        "rewards/accuracy": Change("rewards/accuracy", 0.5, mean, 0.1, 0.1, len(right)),
        "kl": Change("kl", 0.0, kl, 0.1, 0.1, len(right)),
        "loss": Change("loss", 0.69, 0.6, None, None, len(right)),
    }
    record = replace(blank, held_out=examples, held_out_step=blank.model_step)
    return SweptRun(f"beta-{beta}", {"beta": beta, **values}, "finished", "", record, figures, ())


def sweep_of(*runs: SweptRun) -> SweepRecord:
    values: Mapping[str, tuple[Any, ...]] = {name: tuple(dict.fromkeys(run.values[name] for run in runs)) for name in runs[0].values}
    return SweepRecord(Path("s"), "dpo", values, runs)


# Which is best.


def test_the_error_of_a_difference_is_that_of_the_same_examples(blank: RunRecord):
    one, other = swept(blank, 0.1, [1, 1, 1, 0]), swept(blank, 0.3, [1, 1, 0, 0])
    # Differences 0, 0, 1, 0: variance 1/4 with n - 1, over 4 examples.
    assert paired_error("rewards/accuracy", one, other) == pytest.approx(0.25)
    assert paired_error("rewards/accuracy", one, one) == 0.0


def test_of_other_examples_it_is_as_if_they_had_nothing_in_common(blank: RunRecord):
    one, other = swept(blank, 0.1, [1, 1, 1, 0]), swept(blank, 0.3, [1, 1, 0])
    assert paired_error("rewards/accuracy", one, other) == pytest.approx(0.02**0.5)
    assert other.record is not None
    elsewhere = replace(other, record=replace(other.record, held_out_step=1))
    assert paired_error("rewards/accuracy", elsewhere, elsewhere) == pytest.approx(0.02**0.5)


def test_a_loss_per_token_has_the_error_of_its_sums(blank: RunRecord):
    """Two tokens each: sums 2 and 4 against 2 and 2, so means 1.5 and 1 per token; the difference 0.5 has an error of 0.5."""

    def run(beta: float, sums: Sequence[float]) -> SweptRun:
        examples = tuple(HeldOut(f"{n}", f"{n}", ("a",), (2.0,), 1.0, {}, {"loss": value}) for n, value in enumerate(sums))
        figures = {"loss": Change("loss", 2.0, sum(sums) / 4, None, None, 2)}
        record = replace(blank, held_out=examples, held_out_step=blank.model_step)
        return SweptRun(f"x-{beta}", {"learning_rate": beta}, "finished", "", record, figures, ())

    one, other = run(0.1, [2, 2]), run(0.3, [2, 4])
    assert paired_error("loss", one, other) == pytest.approx(0.5)
    best = find_best(sweep_of(other, one))
    assert best is not None
    assert best.run is one
    assert sentences(sweep_of(other, one))[0].startswith("learning_rate 0.1 has the lowest loss on held-out examples: 1.000 on 2 ")


def test_a_clear_winner_is_called_one(blank: RunRecord):
    record = sweep_of(swept(blank, 0.1, [1] * 90 + [0] * 10), swept(blank, 0.3, [1] * 50 + [0] * 50))
    assert headline(record) == ("beta 0.1 is best", "good")
    assert sentences(record) == [
        "beta 0.1 has the highest accuracy on held-out pairs: 90 % ± 10 % on 100 held-out examples, 50 % before training.".replace(
            " %", "\u00a0%"
        ),
        "Each of the others is worse by two standard errors or more; the nearest is beta 0.3 (40.0 ± 4.9 points behind).",
    ]


def test_what_chance_would_give_is_not_called_better(blank: RunRecord):
    near = [1.0] * 58 + [0.0] * 42
    record = sweep_of(swept(blank, 0.1, [1] * 60 + [0] * 40, kl=9.0), swept(blank, 0.2, near, kl=3.0), swept(blank, 0.3, [0.0] * 100))
    assert headline(record) == ("beta 0.1 is ahead, with 1 run close behind", "good")
    said = sentences(record)
    assert said[1] == (
        "Not clearly worse, by less than two standard errors of the difference on the same examples: beta 0.2 (2.0 ± 1.4 points behind)."
    )
    assert "It is not clearly better than the model before training either." in said  # 60 % with an error of 10 %
    assert "Of these beta 0.2 moved least from its reference: KL 3.00 nats per answer on the data's answers, against 9.00." in said


def test_equal_runs_are_told_apart_by_what_they_cost(blank: RunRecord):
    record = sweep_of(swept(blank, 0.1, [1, 0, 1, 1], kl=5.0), swept(blank, 0.3, [1, 0, 1, 1], kl=2.0))
    best = find_best(record)
    assert best is not None
    assert (best.run.name, best.cheapest, best_row(record)) == ("beta-0.3", None, None)
    assert headline(record) == ("The runs came out equal", "mixed")
    assert "beta 0.1 (equal)" in sentences(record)[1]
    assert "4 held-out examples are few: hold more out before you choose." in sentences(record)


@pytest.mark.parametrize(("best", "says"), [(0.1, "smallest value tried: what lies below"), (0.2, ""), (0.3, "largest value tried")])
def test_a_best_value_at_the_end_asks_for_more(blank: RunRecord, best: float, says: str):
    record = sweep_of(*(swept(blank, beta, [1.0] * 50 + [float(beta == best)] * 50) for beta in (0.1, 0.2, 0.3)))
    found = [line for line in sentences(record) if "value tried" in line]
    assert len(found) == bool(says)
    assert says in " ".join(found)


def test_what_the_watch_says_of_all_runs_is_said_once(blank: RunRecord):
    everywhere, own = (Finding(rule, 1, True, "", "", {}) for rule in ("learning_rate", "endings"))
    one, other = replace(swept(blank, 0.1, [1, 1]), findings=(everywhere, own)), replace(swept(blank, 0.3, [1, 0]), findings=(everywhere,))
    record = sweep_of(one, other)
    assert "The watch warns of every run: learning_rate; their pages say what to do." in sentences(record)
    assert "Do not take beta 0.1 unseen: the watch warns that its own answers have suffered (endings)." in sentences(record)
    assert next(column.cells for column in columns(record) if column.title == "watch") == ("endings", "")


def test_one_run_is_not_called_the_best(blank: RunRecord):
    record = sweep_of(swept(blank, 0.1, [1, 1, 1, 0]))
    assert headline(record) == ("Only beta 0.1 can be judged", "mixed")
    assert sentences(record)[0].startswith("beta 0.1 has no other to be compared with: accuracy 75")
    assert best_row(record) is None


def test_failed_and_waiting_runs_are_named_and_not_compared(blank: RunRecord):
    failed = replace(swept(blank, 0.3, [1] * 4), state="failed", message="the loss is nan. More words.", figures={})
    waiting = replace(failed, values={"beta": 0.5}, state="waiting", message="", record=None)
    record = sweep_of(swept(blank, 0.1, [1, 0, 0, 0]), failed, waiting)
    assert headline(record) == ("So far beta 0.1 is ahead", "open")
    assert sentences(record)[-2:] == ["One run failed and cannot be compared: beta 0.3.", "One run is not finished: beta 0.5."]
    assert reasons(record) == [("beta 0.3", "the loss is nan.")]
    assert headline(sweep_of(failed)) == ("No run came to its end", "bad")
    assert headline(sweep_of(waiting)) == ("Nothing to compare yet", "open")
    assert sweep_charts(sweep_of(failed)) == []


# The table.


def test_the_table_has_a_row_per_run(blank: RunRecord):
    record = sweep_of(swept(blank, 0.1, [1, 1, 1, 0]), swept(blank, 0.3, [1, 0, 0, 0]))
    found = {column.title: column.cells for column in columns(record)}
    assert list(found) == ["beta", "steps", "accuracy", "loss", "KL", "time"]
    assert found["beta"] == ("0.1", "0.3")
    assert [cell.replace("\u00a0", " ") for cell in found["accuracy"]] == ["75 % ± 10 %", "25 % ± 10 %"]
    assert found["loss"] == ("0.6000", "0.6000")


def test_a_narrow_terminal_gets_what_matters_most(blank: RunRecord):
    record = sweep_of(swept(blank, 0.1, [1, 1, 1, 0]), swept(blank, 0.3, [1, 0, 0, 0]))
    for width, there, gone in (
        (120, {"beta", "steps", "accuracy", "loss", "KL", "time"}, set()),
        (40, {"beta", "accuracy", "KL"}, {"steps"}),
    ):
        page = StringIO()
        show_sweep(record, Console(file=page, width=width, force_terminal=True, color_system=None))
        head, first = page.getvalue().splitlines()[1:3]
        assert there <= set(head.split())
        assert not gone & set(head.split())
        assert len(head.rstrip()) <= width
        assert first.rstrip().endswith("<- best")
    page = StringIO()
    show_sweep(record, Console(file=page, width=20))  # a file
    assert {"beta", "steps", "accuracy", "loss", "KL", "time"} <= set(page.getvalue().splitlines()[1].split())


def test_columns_that_must_stay_stay(blank: RunRecord):
    found = columns(sweep_of(swept(blank, 0.1, [1, 0])))
    assert [column.title for column in fitting(found, lambda _: False)] == ["beta", "accuracy", "KL"]


# The charts.


def test_charts_stand_over_the_setting_with_the_most_values(blank: RunRecord):
    runs = [swept(blank, beta, [1, 1, 0, 0], epochs=epochs) for epochs in (1, 2) for beta in (0.3, 0.05, 0.1)]
    accuracy, *_ = sweep_charts(sweep_of(*runs))
    assert (accuracy.title, accuracy.across, accuracy.ticks) == ("Accuracy", "beta", ("0.05", "0.1", "0.3"))
    assert [series.label for series in accuracy.series] == ["epochs 1", "epochs 2"]
    assert [[point.x for point in series.points] for series in accuracy.series] == [[0, 1, 2], [0, 1, 2]]
    assert accuracy.series[0].points[0].error == 0.1


def test_the_frontier_has_a_point_per_run(blank: RunRecord):
    record = sweep_of(swept(blank, 0.1, [1, 1, 1, 0], kl=5.0), swept(blank, 0.3, [1, 1, 0, 0], kl=2.0))
    chart = sweep_charts(record)[-1]
    assert [(point.x, point.y, point.name) for point in chart.series[0].points] == [(2.0, 0.5, "0.3"), (5.0, 0.75, "0.1")]


def test_charts_are_drawn_in_the_page_s_colours_and_escaped(blank: RunRecord):
    record = sweep_of(*(swept(blank, beta, [1, 0, 1, 1], kl=beta, **{"<b>": "&"}) for beta in (0.1, 0.2, 0.3)))
    for chart in sweep_charts(record):
        svg = draw_sweep_chart(chart)
        root = ElementTree.fromstring(svg)
        assert root.get("viewBox") == "0 0 480 236"
        assert "#0100" not in svg
        assert len(list(root.iter("rect"))) == 3
        assert "NaN" not in svg
    texts = [element.text for element in ElementTree.fromstring(draw_sweep_chart(sweep_charts(record)[0])).iter("text")]
    assert {"beta 0.1", "0.2", "0.3"} <= set(texts)


@pytest.mark.parametrize("num", [1, 2, 30])
def test_few_and_many_runs_can_be_drawn(blank: RunRecord, num: int):
    record = sweep_of(*(swept(blank, 0.1 + place / 100, [1, 0, 1, 1], kl=1.0) for place in range(num)))
    charts = sweep_charts(record)
    assert len(charts) == (2 if num == 1 else 3)
    for chart in charts:
        root = ElementTree.fromstring(draw_sweep_chart(chart))
        assert len(list(root.iter("text"))) < 25


# The page.


def make_sweep(folder: Path, **state_of: str) -> Path:
    """A sweep over three values of β; `state_of`: of the run whose gain is not usual."""
    entries = []
    for beta, gain in ((0.05, 1.0), (0.1, 1.2), (0.3, 0.1)):
        make_run(folder / f"beta-{beta}", gain=gain, settings={"beta": beta}, findings=FINDINGS[:1] if beta == 0.3 else (), samples=0)
        (folder / f"beta-{beta}" / "report.html").write_text("")
        entries.append({"name": f"beta-{beta}", "values": {"beta": beta}, "state": "finished", "message": ""})
    entries[-1] |= state_of
    values = {"method": "dpo", "swept": {"beta": [0.05, 0.1, 0.3]}, "runs": entries}
    (folder / "sweep.json").write_text(json.dumps(values))
    return folder


def page_of(folder: Path) -> str:
    return " ".join(sweep_html(read_sweep(folder), now=NOW).replace("\u00a0", " ").split())


def test_the_page_shows_table_charts_and_what_came_of_it(tmp_path: Path):
    page = page_of(make_sweep(tmp_path / "s"))
    assert "DPO: qwen-small on pairs.jsonl, over beta" in page
    assert page.count("<svg") == 4
    assert '<a href="beta-0.05/report.html">0.05</a>' in page
    assert "beta 0.1 has the highest accuracy on held-out pairs" in page
    assert '<tr class="best">' in page
    assert "prefopt sweep --config" in page
    assert "src=" not in page
    assert "http" not in re.sub(r"<meta[^>]*>", "", page)
    assert sweep_html(read_sweep(tmp_path / "s"), now=NOW) == sweep_html(read_sweep(tmp_path / "s"), now=NOW)


def test_what_runs_say_is_escaped(tmp_path: Path):
    page = page_of(make_sweep(tmp_path / "s", state="failed", message="<script>alert(1)</script> \u202e"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "\\u202e" in page
    assert "Finished, not all of it" in page
    assert "One run failed and cannot be compared: beta 0.3." in page


def test_a_run_whose_process_is_gone_is_not_called_running(tmp_path: Path):
    folder = make_sweep(tmp_path / "s", state="running")
    status = folder / "beta-0.3" / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "running", "pid": 2**22 + 1}))
    assert [run.state for run in read_sweep(folder).runs] == ["finished", "finished", "stopped"]
    assert "Not finished" in page_of(folder)


def test_a_sweep_of_demonstrations_is_judged_by_its_loss(tmp_path: Path):
    entries = []
    for rate, gain in ((1e-5, 0.5), (5e-5, 1.0)):
        make_run(tmp_path / f"learning-rate-{rate}", method="sft", gain=gain)
        entries.append({"name": f"learning-rate-{rate}", "values": {"learning_rate": rate}, "state": "finished"})
    (tmp_path / "sweep.json").write_text(json.dumps({"method": "sft", "swept": {"learning_rate": [1e-5, 5e-5]}, "runs": entries}))
    page = page_of(tmp_path)
    assert "learning_rate 5e-5 has the lowest loss on held-out examples" in page
    assert "Accuracy" not in page


@pytest.mark.parametrize("text", ["", "[]", "{", '{"swept": 3, "runs": []}'])
def test_a_damaged_book_is_said_to_be_one(tmp_path: Path, text: str):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match="holds no sweep that can be read"):
        read_sweep(tmp_path)


def test_odd_entries_are_no_traceback(tmp_path: Path):
    (tmp_path / "sweep.json").write_text('{"swept": {"beta": 1}, "runs": [3, {}, {"name": "x", "state": 7}]}')
    assert parts(read_sweep(tmp_path))
    assert "Nothing to compare yet" in page_of(tmp_path)
