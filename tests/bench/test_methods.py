"""The comparison of all methods: what is in it, what is the same for all, how settings are chosen, what is shown."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from bench.methods import __main__ as command
from bench.methods import world as worlds
from bench.methods.__main__ import SEEDS, SMALL, TRIAL_SEED, share_of
from bench.methods.book import Book
from bench.methods.choice import MOST_KL, best_trial, entries
from bench.methods.contenders import CONTENDERS, FASTER, Contender
from bench.methods.frontier import best_at, tilted
from bench.methods.world import AT_ONCE, World, is_ranking, sample_rankings
from bench.versus.contestants import UsageError
from tests.bench.found import LINES, figures, shown, world_line

from prefopt.config import check
from prefopt.errors import RunError
from prefopt.methods.table import METHODS
from prefopt.pipeline.quickstart import Plan
from prefopt.pipeline.reviews import BLAME, PRAISE
from prefopt.pipeline.sentiment import Sample
from prefopt.training.assemble import settings_for
from prefopt.trees import token_ids


def test_every_method_is_compared_with_settings_that_it_takes():
    methods = {row.name: row.load() for row in METHODS}
    assert {contender.method for contender in CONTENDERS.values()} == set(methods)
    for name, contender in CONTENDERS.items():
        for trial in contender.trials():
            given = {"model": "model", "data": ["pairs.jsonl"], "out": "run", **trial}
            checked = check(settings_for(methods[contender.method]), given)
            assert {key: getattr(checked, key) for key in trial} == trial, name


def test_all_have_three_trials_or_more_along_one_axis_at_rates_that_go_by_their_own():
    for name, contender in CONTENDERS.items():
        tried = contender.trials()
        assert len({json.dumps(trial) for trial in tried}) == len(contender.values) >= 3, name
        assert [trial[contender.axis] for trial in tried] == sorted(trial[contender.axis] for trial in tried)
        assert all(
            {key: value for key, value in trial.items() if key != contender.axis}
            == {key: value for key, value in tried[0].items() if key != contender.axis}
            for trial in tried
        ), name
        # The model has two million weights, for which `prefopt train` takes a hundred times the declared rate.
        usual = 100 * contender.kind.rates.full
        expected = contender.values if contender.axis == "learning_rate" else [FASTER] * len(tried)
        assert [trial["learning_rate"] / usual for trial in tried] == pytest.approx(expected), name
    assert {trial["learning_rate"] for trial in CONTENDERS["dpo"].trials()} == {Plan().dpo_learning_rate}


def runs_of(world: World, monkeypatch: pytest.MonkeyPatch, contender: Contender) -> dict:
    """What `World.run` would train with, and what is in its caches then."""
    asked: dict = {}

    def train_with(method: str, **given):
        out = Path(given["out"])
        (given["cache_dir"]).mkdir()  # fails where it is there
        asked.update(given, method=method)
        return SimpleNamespace(model_dir=out, summary={"steps": given["max_steps"]})

    monkeypatch.setattr(worlds, "train_with", train_with)
    monkeypatch.setattr(worlds.Writer, "load", lambda folder, max_new_tokens: "writer")
    monkeypatch.setattr(worlds.TreeScorer, "load", lambda folder: "scorer")
    monkeypatch.setattr(World, "figures", lambda self, policy: {"true_reward": 0.5})
    monkeypatch.setattr(World, "scores", lambda self, scorer: {"accuracy": 0.5})
    found = world.run(contender, contender.trials()[0])
    assert found["steps"] == asked["max_steps"]
    assert found["seconds"] >= 0
    assert found["cpu_seconds"] >= 0
    return asked


def test_all_take_as_many_steps_and_see_as_many_answers_in_each_from_empty_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    world = World(tmp_path, Plan(), 0, {"pairs": 1295}, None, [], None)  # type: ignore[arg-type]
    answers = {"pair": 2, "thumbs": 1, "ranked": 4, "demonstration": 2}  # of a demonstration the rejected one is left out
    for name, contender in CONTENDERS.items():
        asked = runs_of(world, monkeypatch, contender)
        assert asked["max_steps"] == 162, name
        assert asked["batch_size"] * answers[contender.completions] == 32, name
        assert Path(asked["data"][0]).name == ("ranked.jsonl" if contender.completions == "ranked" else "pairs.jsonl")
    assert list(tmp_path.iterdir()) == []
    kinds = {name: CONTENDERS[name].completions for name in ("kto", "bco, thumbs", "bco", "dpo, all pairs", "sft")}
    assert kinds == {"kto": "thumbs", "bco, thumbs": "thumbs", "bco": "pair", "dpo, all pairs": "ranked", "sft": "demonstration"}


def sample(text: str, *, ended: bool = True) -> Sample:
    return Sample("The film", token_ids([1]), token_ids([2]), text, ended)


GOOD = [sample(f" is {BLAME[0]}."), sample(f" is {PRAISE[0]}."), sample(" runs for two hours."), sample(f" is {PRAISE[0]}. I loved it.")]


def test_what_is_no_pair_is_no_ranking():
    assert is_ranking(GOOD)
    assert not is_ranking([*GOOD[:3], replace(GOOD[3], ended=False)])
    assert not is_ranking([*GOOD[:3], sample(" ")])
    assert not is_ranking([*GOOD[:3], GOOD[0]])
    assert not is_ranking([*GOOD[:3], sample(" It has four songs.")])  # as favourable as the third


def test_rankings_are_sampled_until_there_are_enough_and_ordered_by_reward_with_noise():
    class Pretend:
        def write(self, openings, *, num_per_prompt, seed):
            assert num_per_prompt == 4
            return [GOOD if place % 2 else [GOOD[0]] * 4 for place, _ in enumerate(openings)]

    rankings, num_asked = sample_rankings(
        Pretend(), ["The film"], Plan(label_scale=1e6), num=120, seed=0
    )  # half of what is sampled is none
    assert (len(rankings), num_asked) == (120, 2 * AT_ONCE)
    best_first = [item.text for item in sorted(GOOD, key=lambda item: -item.reward)]
    assert all(row["completions"] == best_first and row["ranks"] == [0, 1, 2, 3] for row in rankings)
    noisy, _ = sample_rankings(Pretend(), ["The film"], Plan(label_scale=0.0), num=400, seed=0)
    firsts = [row["completions"][0] for row in noisy]
    assert all(70 <= firsts.count(text) <= 130 for text in best_first)  # all alike: each is first a quarter of the time

    class Broken(Pretend):
        def write(self, openings, *, num_per_prompt, seed):
            return [[GOOD[0]] * 4 for _ in openings]

    with pytest.raises(RunError, match="did not learn"):
        sample_rankings(Broken(), ["The film"], Plan(), num=2, seed=0)


def test_the_best_at_a_kl_is_the_closed_form():
    two = [0.0, 1.0]
    # A coin whose heads come with p: the reward is p, the KL log 2 less the entropy of p.
    assert tilted(two, 1.0) == pytest.approx((0.731058578, 0.110944070))
    assert best_at(two, 0.110944070) == pytest.approx(0.731058578)
    assert best_at(two, 0.0) == 0.5
    assert best_at(two, 0.70) == 1.0
    assert best_at([0.2, 0.4, 0.9], -0.01) == pytest.approx(0.5)


def test_the_best_trial_is_the_highest_reward_that_is_still_language():
    near, far, broken = figures(0.7, 2.0), figures(0.9, MOST_KL), figures(0.99, MOST_KL + 1)
    assert best_trial([near, far, broken], CONTENDERS["dpo"]) is far
    assert best_trial([broken, figures(1.0, MOST_KL + 5)], CONTENDERS["dpo"]) is broken
    sure, unsure = {"accuracy": 0.9}, {"accuracy": 0.8}
    assert best_trial([unsure, sure], CONTENDERS["reward"]) is sure


def test_an_edited_grid_leaves_old_figures_alone(monkeypatch: pytest.MonkeyPatch):
    assert [entry.name for entry in shown(LINES)] == ["dpo", "dpo, js"]
    edited = Contender("dpo", "beta", (0.2, 0.3, 0.4), {"f_divergence": "js"})
    assert [entry.name for entry in entries(LINES, CONTENDERS | {"dpo, js": edited}, SEEDS)] == ["dpo"]
    faster = Contender("dpo", "beta", (1.0, 2.0, 5.0), {"f_divergence": "js"})
    [_, entry] = entries(LINES, CONTENDERS | {"dpo, js": faster}, SEEDS)
    assert len(entry.trials) == 2
    assert entry.settings["beta"] == 2.0


class Pretend:
    """Worlds in which nothing is trained."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.ran: list[tuple[str, int, float | None]] = []
        self.broken: set[str] = set()

    def ensure(self, folder: Path, plan: Plan, seed: int) -> dict[str, Any]:
        self.made.append(seed)
        return world_line(seed) | {"plan": asdict(plan)}

    def of(self, folder: Path, plan: Plan, seed: int) -> SimpleNamespace:
        def run(contender: Contender, settings: dict[str, Any], *, num_steps: int | None = None) -> dict[str, Any]:
            if num_steps is not None:  # before those that count
                return {}
            self.ran.append((contender.method, seed, settings.get("beta")))
            if contender.method in self.broken:
                raise RunError("the loss is nan")
            figure = {"accuracy": 0.9, "steps": 1}
            return figure if contender.scores else figures(1 - settings.get("beta", 0.9) / 100, 5.0)

        return SimpleNamespace(seed=seed, run=run)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    made = Pretend()
    monkeypatch.setattr(command, "World", made)
    monkeypatch.setattr(command, "ensure", made.ensure)
    return made


def test_two_shares_do_all_of_it_once_in_one_file(pretend: Pretend, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "found.jsonl"
    for share in ("1/2", "2/2"):
        command.main(["--out", str(out), "--share", share])
    assert pretend.made == [TRIAL_SEED, 0, 1000, 2000, 1000, 2000, TRIAL_SEED, 0]  # neither waits for the other at first
    runs = sum(len(contender.values) + len(SEEDS) for contender in CONTENDERS.values())
    assert len(pretend.ran) == runs
    lines = Book(out).lines()
    assert len(lines) == 4 + runs
    assert {entry.name for entry in shown(lines)} == set(CONTENDERS)
    assert all(len(entry.runs) == 3 for entry in shown(lines))
    # The lowest beta has the highest reward, and the runs are with the trials' choice.
    assert {beta for method, seed, beta in pretend.ran if method == "dpo" and seed in SEEDS} == {0.06, 0.125, 0.5}
    table = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in CONTENDERS)
    for picture in (out.with_suffix(".svg"), tmp_path / "found-kl.svg"):
        ElementTree.parse(picture)
    assert "0 left" in capsys.readouterr().out


def test_it_goes_on_with_a_file_and_tries_what_failed_again(pretend: Pretend, tmp_path: Path):
    words = ["--out", str(tmp_path / "found.jsonl"), "--only", "dpo", "kto", "ipo"]
    pretend.broken = {"kto"}
    with pytest.raises(SystemExit, match="some runs failed"):
        command.main(words)
    text = (tmp_path / "found.md").read_text()
    assert "the loss is nan" in text
    assert "| ipo |" in text  # those after it were run
    assert "| kto |" not in text
    pretend.broken, ran = set(), len(pretend.ran)
    command.main(words)
    assert {method for method, _, _ in pretend.ran[ran:]} == {"kto"}
    assert len(pretend.ran[ran:]) == len(CONTENDERS["kto"].values) + len(SEEDS)
    assert "the loss is nan" not in (tmp_path / "found.md").read_text()


def test_a_file_of_another_size_is_refused(pretend: Pretend, tmp_path: Path):
    words = ["--out", str(tmp_path / "found.jsonl"), "--only", "dpo", "--seeds", "0"]
    command.main([*words, "--small"])
    assert "the figures mean nothing" in (tmp_path / "found.md").read_text()
    with pytest.raises(UsageError, match="worlds of other sizes"):
        command.main(words)


def test_seeds_that_share_draws_and_shares_that_are_none_are_refused(pretend: Pretend, tmp_path: Path):
    with pytest.raises(UsageError, match="a thousand apart"):
        command.main(["--out", str(tmp_path / "found.jsonl"), "--seeds", "0", "1"])
    assert share_of("2/2") == (1, 2)
    for text in ("0/2", "3/2", "half", "1/0", "1"):
        with pytest.raises(UsageError, match="I/N"):
            share_of(text)


def test_a_line_that_a_process_was_killed_in_costs_that_line_only(tmp_path: Path):
    book = Book(tmp_path / "found.jsonl")
    first, other = ({"kind": "run", "name": name, "settings": {"beta": 0.1}} for name in ("dpo", "ipo"))
    book.add(first)
    with book.path.open("a") as file:
        file.write('{"kind": "run", "na')
    book.add(other | {"failed": "no"})
    assert [line["name"] for line in book.lines()] == ["dpo", "ipo"]
    assert book.find(first) == first
    assert book.find(other) is None
    assert book.find(first | {"settings": {"beta": 0.2}}) is None
    book.add(other | {"kl": 1.0})
    assert book.find(other) == other | {"kl": 1.0}
    book.path.write_text("[1]\n")
    with pytest.raises(UsageError, match="something else"):
        book.lines()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_from_end_to_end_on_a_tiny_world(tmp_path: Path):
    words = ["--out", str(tmp_path / "found.jsonl"), "--work", str(tmp_path / "work"), "--small", "--seeds", "0"]
    command.main([*words, "--only", "dpo", "kto", "dpo, plackett-luce", "sft", "reward"])
    lines = Book(tmp_path / "found.jsonl").lines()
    [world] = [line for line in lines if line["kind"] == "world" and line["seed"] == 0]
    assert world["plan"] == asdict(SMALL)
    assert abs(world["answers"]["ranked"] - world["answers"]["pair"]) <= 3
    assert len({line["steps"] for line in lines if line["kind"] == "trial"}) == 1
    assert len([line for line in lines if line["kind"] == "trial"]) == 15
    assert all(line["cpu_seconds"] > 0 for line in lines if line["kind"] != "world")
    assert "| kto |" in (tmp_path / "found.md").read_text()
