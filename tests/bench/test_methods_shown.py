"""What the comparison of all methods shows: tables and pictures."""

from xml.etree import ElementTree

import pytest
from bench.methods.__main__ import SEEDS, TRIAL_SEED
from bench.methods.choice import run_line, trial_lines
from bench.methods.contenders import CONTENDERS
from bench.methods.picture import clouds, rows
from bench.methods.tables import page
from tests.bench.found import LINES, found_for, shown, world_line

SVG = "{http://www.w3.org/2000/svg}"
WORLDS = [line for line in LINES if line["kind"] == "world"]


def cells_of(text: str, name: str) -> list[str]:
    return next([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_the_table_has_means_and_spread_of_the_seeds_best_first_and_says_what_to_know():
    text = page(shown(LINES), WORLDS, [], SEEDS)
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names[:4] == ["method", "(the SFT model)", "dpo", "dpo, js"]
    assert cells_of(text, "(the SFT model)")[2:5] == ["0.500 ± 0.000", "", "0.00 ± 0.00"]
    js = cells_of(text, "dpo, js")
    assert js[1] == "learning_rate 0.0002, f_divergence js, beta 2"
    assert js[2:5] == ["0.850 ± 0.071", "1.000 ± 0.000", "3.00 ± 1.41"]
    assert js[8:] == ["162 ± 0", "9 ± 0", "2 of 3 seeds"]
    # All its trials went too far, so that the nearest was taken; one of its seeds did too.
    assert cells_of(text, "dpo")[-1] == "KL above 8 in 1 of 3; beta: highest of those tried"
    assert "| dpo | beta | 0.125: 0.990 at 9.0 | 0.25: 0.970 at 12.0 | **0.5: 0.950 at 8.5** |  |" in text
    assert "| 0 | 1,000 | 93% | 2,000 | 1,000 | 500 | 2,000 |" in text


def test_a_run_that_failed_is_named_with_its_reason():
    failed = run_line("dpo", CONTENDERS["dpo"], 0, {"beta": 0.5}) | {"failed": "the loss is nan"}
    text = page(shown(LINES), WORLDS, [failed], SEEDS)
    assert "- dpo, seed 0, beta 0.5: the loss is nan" in text


def test_a_reward_model_stands_last_with_its_accuracy():
    own = CONTENDERS["reward"]
    lines = [line | {"accuracy": 0.7, "steps": 162} for line in trial_lines("reward", own, TRIAL_SEED)]
    lines += [run_line("reward", own, 0, own.trials()[0]) | {"accuracy": 0.9, "steps": 162, "cpu_seconds": 20.0, "seconds": 21.0}]
    text = page(shown([*LINES, *lines]), WORLDS, [], SEEDS)
    assert cells_of(text, "reward")[2:] == [
        "",
        "",
        "",
        "0.90",
        "",
        "",
        "162",
        "20",
        "learning rate: lowest of those tried; 1 of 3 seeds",
    ]
    assert ElementTree.fromstring(rows(shown([*LINES, *lines]), [world_line(0)])) is not None
    assert text.index("| dpo, js |") < text.index("| reward |")


def dots(group: ElementTree.Element, *, trials: bool) -> list[tuple[float, float]]:
    return [
        (float(each.get("cx", 0)), float(each.get("cy", 0)))
        for each in group.iter(f"{SVG}circle")
        if (each.get("class") == "trial") == trials
    ]


def test_the_rows_have_a_dot_for_each_seed_and_a_ring_for_each_trial_where_their_values_are():
    root = ElementTree.fromstring(rows(shown(LINES), [world_line(0)]))
    assert "dpo 0.94 at 7.0; dpo, js 0.85 at 3.0" in root.get("aria-label", "")
    filled, rings = dots(root, trials=False), dots(root, trials=True)
    assert (len(filled), len(rings)) == (2 * 5, 2 * 7)
    across = [x for x, _ in filled]
    rewards = [0.95, 0.93, 0.94]
    step = (across[0] - across[1]) / (rewards[0] - rewards[1])
    assert [across[0] + step * (reward - rewards[0]) for reward in rewards] == pytest.approx(across[:3], abs=0.2)
    width = float(root.get("viewBox", "").split()[2])
    assert all(0 < x < width for x, _ in [*filled, *rings])


def test_the_axis_of_rewards_follows_the_data():
    low = found_for("hinge", trials=[(0.1, 1.0)] * 3, runs=[(0.12, 1.0), (0.3, 1.0), (0.2, 1.0)], chosen=0)
    root = ElementTree.fromstring(rows(shown([*LINES, *low]), [world_line(0)]))
    across = [x for x, y in dots(root, trials=False) if y == max(y for _, y in dots(root, trials=False))]
    assert len(set(across[:3])) == 3  # none is clipped to the end
    assert "0.2" in [text.text for text in root.iter(f"{SVG}text")]


def test_each_small_chart_has_its_own_points_and_all_behind_them():
    root = ElementTree.fromstring(clouds(shown(LINES), [world_line(0)]))
    [behind] = [group for group in root.iter(f"{SVG}g") if group.get("id") == "all"]
    assert len(dots(behind, trials=False)) == 12
    charts = [group for group in root.iter(f"{SVG}g") if group.get("transform")]
    assert [chart.findtext(f"{SVG}text") for chart in charts] == ["dpo", "dpo, js"]
    assert [(len(dots(chart, trials=False)), len(dots(chart, trials=True))) for chart in charts] == [(3, 3), (2, 4)]
    # Its best run and the same one among all are in the same place.
    assert dots(charts[0], trials=False)[0] in dots(behind, trials=False)


Box = tuple[float, float, float, float]


def boxes_of(root: ElementTree.Element) -> list[Box]:
    """Left, right, top and bottom of every text, by a generous letter of 13 pixels (16 of titles)."""
    found = []

    def collect(element: ElementTree.Element, x: float, y: float) -> None:
        if moved := element.get("transform"):
            dx, dy = map(float, moved[len("translate(") : -1].split())
            x, y = x + dx, y + dy
        if element.tag == f"{SVG}text":
            wide = (8.8 if element.get("class") == "title" else 7.0) * len(element.text or "")
            left = x + float(element.get("x", 0)) - {"middle": wide / 2, "end": wide}.get(element.get("text-anchor", ""), 0)
            base = y + float(element.get("y", 0))
            found.append((left, left + wide, base - 10, base + 3))
        for child in element:
            collect(child, x, y)

    collect(root, 0, 0)
    return found


@pytest.mark.parametrize("picture", [rows, clouds])
def test_no_words_lie_over_one_another_or_leave_the_picture(picture):
    every = [
        line
        for name, contender in CONTENDERS.items()
        if not contender.scores
        for line in found_for(
            name, trials=[(0.9 - 0.1 * nth, 3.0 - nth / 2) for nth in range(len(contender.values))], runs=[(0.9, 300.0)] * 3, chosen=0
        )
    ]
    root = ElementTree.fromstring(picture(shown(every), [world_line(0)]))
    boxes = boxes_of(root)
    assert len(boxes) > len(CONTENDERS)
    over = [
        (one, other)
        for place, one in enumerate(boxes)
        for other in boxes[:place]
        if one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
    ]
    assert over == []
    width, height = map(float, root.get("viewBox", "").split()[2:])
    assert all(left >= 0 and right <= width and top >= 0 and bottom <= height for left, right, top, bottom in boxes)
