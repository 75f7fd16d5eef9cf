"""Which charts there are, and how they are drawn."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.report.made import FINDINGS, make_run

from prefopt.report.charts import Chart, groups, marks
from prefopt.report.curves import column
from prefopt.report.draw import COLOURS, bin_edges, draw_chart, draw_spread, histogram, short
from prefopt.report.examples import Spread, spread
from prefopt.report.record import read_run


def charts_of(run: Path) -> dict[str, Chart]:
    return {chart.key: chart for group in groups(read_run(run)) for chart in group.charts}


def add_to_rows(run: Path, name: str, values: list[float]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, name: value}) + "\n" for row, value in zip(rows, values, strict=True)))


def test_a_run_on_pairs_has_all_charts_in_order(tmp_path: Path):
    record = read_run(make_run(tmp_path / "run"))
    assert {group.title: [chart.key for chart in group.charts] for group in groups(record)} == {
        "Does it learn?": ["loss", "accuracy", "margin", "rewards"],
        "What does it cost?": ["kl", "logps", "length", "entropy", "repetition"],
        "Does it run smoothly?": ["grad_norm", "learning_rate", "tokens_per_second"],
    }


def test_the_distance_on_its_own_answers_stands_beside_that_on_the_data_s(tmp_path: Path):
    run = make_run(tmp_path / "run")
    assert [line.label for line in charts_of(run)["kl"].lines] == ["trained on", "held out"]
    add_to_rows(run, "samples/kl", [0.01 * step for step in range(120)])
    assert [line.label for line in charts_of(run)["kl"].lines] == ["trained on", "held out", "its own answers"]
    assert "other-samples/kl" not in charts_of(run)


def test_a_run_without_pairs_has_no_empty_charts(tmp_path: Path):
    record = read_run(make_run(tmp_path / "run", method="sft"))
    found = {group.title: [chart.key for chart in group.charts] for group in groups(record)}
    assert found["Does it learn?"] == ["loss", "logps"]
    assert found["How does it answer?"] == ["length", "entropy", "repetition"]
    assert {line.label for line in charts_of(record.folder)["logps"].lines} == {"trained on", "held out"}


def test_trained_and_held_out_share_a_chart_and_held_out_begins_before_the_first_step(tmp_path: Path):
    accuracy = charts_of(make_run(tmp_path / "run"))["accuracy"]
    trained, held_out = accuracy.lines
    assert (trained.label, trained.is_held_out, len(trained.curve)) == ("trained on", False, 120)
    assert (held_out.label, held_out.is_held_out) == ("held out", True)
    assert list(held_out.curve.steps) == [0, 20, 40, 60, 80, 100, 120]
    assert held_out.curve.values[0] == 0.5
    assert "held out: 50\u00a0% at step 0" in accuracy.description


def test_without_held_out_data_there_is_one_line(tmp_path: Path):
    assert [line.label for line in charts_of(make_run(tmp_path / "run", num_held_out=0))["loss"].lines] == ["trained on"]


def test_no_rows_no_charts(tmp_path: Path):
    assert groups(read_run(make_run(tmp_path / "run", state="running", done=0, num_held_out=0))) == []


def test_figures_of_a_method_of_the_users_own_are_drawn_too(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=20)
    add_to_rows(run, "zeal", [float(step) for step in range(20)])
    assert charts_of(run)["other-zeal"].title == "zeal"


def test_the_lowest_held_out_loss_and_peaks_beyond_the_axis_are_told(tmp_path: Path):
    run = make_run(tmp_path / "run")
    add_to_rows(run, "grad_norm", [1.0 + 0.01 * (step % 7) for step in range(119)] + [1000.0])
    found = charts_of(run)
    assert re.fullmatch(r"Held out it was lowest, 0\.\d{3}, at step \d+\.", found["loss"].beyond)
    assert found["grad_norm"].beyond == "Beyond the axis: 1,000.0 at step 120."
    paths = re.findall(r'd="M ([^"]+)"', draw_chart(found["grad_norm"], []))
    heights = [float(number) for path in paths for number in path.replace("L", "").replace("z", "").split()[1::2]]
    assert min(heights) >= 17  # nothing is drawn above the chart


def test_a_budget_is_a_level_and_one_far_away_a_remark(tmp_path: Path):
    near = charts_of(make_run(tmp_path / "near", settings={"kl_budget": 3.0}))["kl"]
    assert [(level.value, level.label) for level in near.levels] == [(3.0, "kl_budget")]
    far = charts_of(make_run(tmp_path / "far", settings={"kl_budget": 50.0}))["kl"]
    assert far.levels == ()
    assert far.beyond == "Beyond the axis: kl_budget is 50.00."


def test_findings_mark_their_step_and_those_of_the_start_mark_none(tmp_path: Path):
    record = read_run(make_run(tmp_path / "run", findings=[*FINDINGS, {**FINDINGS[1], "step": 60}, {**FINDINGS[1], "step": 7}]))
    assert [(mark.step, mark.numbers, mark.is_warning) for mark in marks(record)] == [(7, (4,), False), (60, (1, 3), True)]
    drawing = draw_chart(charts_of(record.folder)["loss"], marks(record))
    assert ">1,3</text>" in drawing
    assert ">4</text>" in drawing
    assert "var(--warning)" in drawing
    assert "var(--note)" in drawing


def test_numbers_of_findings_side_by_side_do_not_run_into_each_other(tmp_path: Path):
    found = [{**FINDINGS[0], "step": step} for step in (60, 61, 63, 90)]
    record = read_run(make_run(tmp_path / "run", findings=found))
    drawing = draw_chart(charts_of(record.folder)["loss"], marks(record))
    assert ">1,2,3</text>" in drawing
    assert ">4</text>" in drawing
    assert drawing.count("var(--warning)") == 4 + 2  # a line each, and two texts


@pytest.mark.parametrize("key", ["loss", "rewards", "logps", "learning_rate", "length"])
def test_a_drawing_stands_by_itself_in_the_pages_colours(tmp_path: Path, key: str):
    drawing = draw_chart(charts_of(make_run(tmp_path / "run"))[key], [])
    root = ElementTree.fromstring(drawing)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert "http" not in drawing
    assert " id=" not in drawing
    assert "font-family" not in drawing
    assert not any(colour in drawing for colour in COLOURS.values())
    assert set(re.findall(r"(?:stroke|fill): ?([^;\"]+)", drawing)) <= {f"var(--{name})" for name in COLOURS} | {"none"}
    assert root.findall(".//text")


def test_the_same_chart_is_drawn_the_same_every_time(tmp_path: Path):
    chart = charts_of(make_run(tmp_path / "run"))["loss"]
    assert draw_chart(chart, []) == draw_chart(chart, [])


def test_strips_tell_the_values_of_their_step(tmp_path: Path):
    root = ElementTree.fromstring(draw_chart(charts_of(make_run(tmp_path / "run", num_steps=40))["accuracy"], []))
    strips = root.findall(".//g[@class='bands']/rect")
    assert len(strips) == 40
    words = (strips[24].findtext("title") or "").split("\n")
    assert words[0] == "step 25"
    assert words[1].startswith("trained on: ")
    assert words[2].endswith("(step 20)")
    widths = [float(strip.get("width", "0")) for strip in strips]
    assert sum(widths) == pytest.approx(480 - 56 - 12, abs=2)


def test_long_runs_have_few_strips_and_few_points(tmp_path: Path):
    drawing = draw_chart(charts_of(make_run(tmp_path / "run", num_steps=5000, every=1000))["loss"], [])
    assert drawing.count("<rect") == 60
    assert len(drawing) < 40_000


@pytest.mark.parametrize("done", [1, 2, 3, 29, 30])
def test_the_shortest_runs_can_be_drawn(tmp_path: Path, done: int):
    for chart in charts_of(make_run(tmp_path / "run", num_steps=done, every=1)).values():
        assert "<path" in draw_chart(chart, [])


@pytest.mark.parametrize(("done", "named"), [(1, "1"), (2, "1"), (3, "1"), (7, None), (120, None)])
@pytest.mark.parametrize("num_held_out", [0, 60])
def test_steps_are_whole_numbers(tmp_path: Path, done: int, named: str | None, num_held_out: int):
    run = make_run(tmp_path / "run", num_steps=done, done=done, every=1, num_held_out=num_held_out, samples=0)
    for chart in charts_of(run).values():
        root = ElementTree.fromstring(draw_chart(chart, []))
        across = [text for text in root.findall(".//text") if text.get("text-anchor") != "end" and float(text.get("y", 0)) > 220]
        names = ["".join(text.itertext()).removeprefix("step ") for text in across]
        assert names
        assert all(name.isdigit() and int(name) <= done for name in names), (chart.key, names)
        assert len(set(names)) == len(names) <= 8
        assert named is None or named in names


def test_names_of_metrics_are_text_in_a_drawing(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=5)
    add_to_rows(run, '"><script>alert(1)</script>', [1.0, 2.0, 3.0, 4.0, 5.0])
    drawing = draw_chart(charts_of(run)['other-"><script>alert(1)</script>'], [])
    assert "<script" not in drawing
    assert not ElementTree.fromstring(drawing).findall(".//script")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.25, "0.25"), (-190.0, "−190"), (12000.0, "12k"), (2.5e6, "2.5M"), (-0.0, "0"), (3e9, "3G")]
)
def test_numbers_on_axes_are_short(value: float, shown: str):
    assert short(value) == shown


def test_no_bar_holds_values_of_both_sides_of_zero():
    edges = bin_edges(-0.7, 2.3, has_sides=True, num=60)
    assert 0.0 in edges
    assert edges[0] <= -0.7
    assert edges[-1] >= 2.3
    assert np.diff(edges) == pytest.approx(edges[1] - edges[0])
    assert len(bin_edges(0.0, 0.0, has_sides=True, num=3)) > 2


def test_every_example_is_in_a_bar():
    values = column([-0.7, -0.1, 0.0, 0.1, 2.3])
    assert sum(histogram(values, bin_edges(-0.7, 2.3, has_sides=True, num=5))) == 5
    assert sum(histogram(values, bin_edges(-0.7, 2.3, has_sides=False, num=5))) == 5


def test_margins_of_before_are_a_line_where_all_are_the_same_and_an_outline_where_not(tmp_path: Path):
    found = spread(read_run(make_run(tmp_path / "run")))
    assert found is not None
    drawing = draw_spread(found)
    assert "before: all 0</text>" in drawing
    assert drawing.count("var(--chosen)") > 2
    assert drawing.count("var(--rejected)") > 1
    outlined = draw_spread(Spread("Margins", "", (0.1, -0.2, 0.3), (1.0, -2.0, 3.0), True, ("says",)))
    assert "before: all" not in outlined
    assert 'aria-label="Margins. says"' in outlined


@pytest.mark.parametrize("after", [(0.0,), (1.0, 1.0), (-3.0,), (0.0, 1e-12), (1e9, -1e9)])
def test_odd_spreads_can_be_drawn(after: tuple[float, ...]):
    for has_sides in (True, False):
        assert "<path" in draw_spread(Spread("Margins", "", (), after, has_sides, ()))
