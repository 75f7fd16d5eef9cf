"""Lines as `bench.methods` writes them, made up."""

from dataclasses import asdict
from typing import Any

from bench.methods.__main__ import SEEDS, TRIAL_SEED
from bench.methods.choice import Entry, entries, run_line, trial_lines
from bench.methods.contenders import CONTENDERS

from prefopt.pipeline.quickstart import Plan


def figures(reward: float, kl: float, **more: float) -> dict[str, Any]:
    return {
        "true_reward": reward,
        "kl": kl,
        "accuracy": 0.8,
        "tokens": 30.0,
        "ended": 1.0,
        "steps": 162,
        "cpu_seconds": 9.0,
        "seconds": 5.0,
    } | more


def world_line(seed: int, reward: float = 0.5) -> dict[str, Any]:
    counted = {"pairs": 1000, "rankings": 500, "answers": {"pair": 2000, "demonstration": 1000, "ranked": 2000}, "labels_right": 0.93}
    return {"kind": "world", "seed": seed, "plan": asdict(Plan()), "true_reward": reward, "tokens": 29.0, "ended": 1.0, **counted} | {
        "rewards": [0.0, 1.0]
    }


def found_for(name: str, *, trials: list[tuple[float, float]], runs: list[tuple[float, float]], chosen: int) -> list[dict[str, Any]]:
    """Lines about a contender: (reward, KL) of its trials and of its runs with the chosen settings."""
    own = CONTENDERS[name]
    lines = [line | figures(*each) for line, each in zip(trial_lines(name, own, TRIAL_SEED), trials, strict=True)]
    settings = own.trials()[chosen]
    return lines + [run_line(name, own, seed, settings) | figures(*each) for seed, each in zip(SEEDS, runs, strict=False)]


LINES = [
    *(world_line(seed, 0.5) for seed in (*SEEDS, TRIAL_SEED)),
    *found_for("dpo, js", trials=[(0.95, 40.0), (0.9, 20.0), (0.85, 5.0), (0.7, 1.0)], runs=[(0.8, 2.0), (0.9, 4.0)], chosen=2),
    *found_for("dpo", trials=[(0.99, 9.0), (0.97, 12.0), (0.95, 8.5)], runs=[(0.95, 9.0), (0.93, 7.0), (0.94, 5.0)], chosen=2),
]


def shown(lines: list[dict[str, Any]]) -> list[Entry]:
    return entries(lines, CONTENDERS, SEEDS)
