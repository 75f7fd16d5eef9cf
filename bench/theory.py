"""Draws docs/theory.svg: what training does on a world small enough to enumerate, beside what the papers prove about it.

    python -m bench.theory [--out FILE] [--steps 600]

The world, the data and the training are those of tests/methods/test_theory.py (tests/methods/enumerated.py); printed is
the table of docs/theory.md. It takes about half a minute on a CPU.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from bench.pictures import Panel, together
from tests.methods.enumerated import (
    World,
    all_alike,
    bradley_terry,
    certain,
    exact,
    far_apart,
    make_world,
    pairs,
    reward_and_kl,
    tilted,
)
from torch import Tensor

from prefopt.report.draw import COLOURS, canvas, inline_svg, label_axes, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = Path(__file__).parents[1] / "docs" / "theory.svg"

BETAS = (0.1, 0.3, 1.0, 3.0)
ROLES = ("train", "held", "chosen", "rejected")
"""Colours of the four."""

SHOWN = 1
"""Place of the β whose rewards are drawn."""

CERTAIN_BETA = 0.5
NUM_STEPS = 600
EARLY = 20
"""The step at which the reward is drawn half learned."""

RATE = 0.4

FLOOR = 1e-10
"""Distances below this are drawn as this."""


@dataclass(frozen=True)
class Run:
    """DPO with one β: the distance from its optimum before the first step and after each, and the policies [X, Y] that were kept."""

    beta: float
    apart: Sequence[float]
    early_XY: Tensor
    final_XY: Tensor
    best_XY: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw(given.out, given.steps)


def draw(out: Path, num_steps: int) -> None:
    """Train, print the table, write the picture."""
    world = make_world()
    runs = [dpo_run(world, beta, num_steps) for beta in BETAS]
    print_table(world, runs)
    margins = {name: margins_of(world, name, num_steps) for name in ("dpo", "ipo")}
    panels = (distances(runs), rewards(world, runs[SHOWN]), certainty(world, margins), frontier(world, runs, others_of(world)))
    out.write_text(together(panels), encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


def dpo_run(world: World, beta: float, num_steps: int) -> Run:
    """DPO on all pairs, AdamW with a rate that falls to 0."""
    problem = exact("dpo", pairs(bradley_terry(world.reward_XY), all_alike()), world, beta=beta)
    best_XY = tilted(world.reference_XY, world.reward_XY / beta)
    policies = [policy.logps() for policy in problem.steps(torch.optim.AdamW, num_steps, lr=RATE, fade=True, weight_decay=0.0)]
    apart = [far_apart(logps_XY, best_XY) for logps_XY in policies]
    return Run(beta, apart, policies[min(EARLY, num_steps)], policies[-1], best_XY)


def print_table(world: World, runs: Iterable[Run]) -> None:
    print("| β | reference to optimum | policy to optimum | largest error of the reward | mean reward | KL, nats |")
    print("|---|---|---|---|---|---|")
    for run in runs:
        error = (recovered(world, run.beta, run.final_XY, run.best_XY) - world.reward_XY).abs().max().item()
        reward, kl = reward_and_kl(world, run.final_XY)
        print(f"| {run.beta:g} | {run.apart[0]:.3f} | {run.apart[-1]:.0e} | {error:.0e} | {reward:.4f} | {kl:.4f} |")


def recovered(world: World, beta: float, logps_XY: Tensor, best_XY: Tensor) -> Tensor:
    """The implicit reward, with the number of each prompt's that theory says: β·log(π/π_ref) + β·log Z."""
    log_z_X1 = (world.reference_XY + world.reward_XY / beta).logsumexp(-1, keepdim=True)
    return beta * (logps_XY - world.reference_XY + log_z_X1)


def margins_of(world: World, name: str, num_steps: int) -> list[float]:
    """The reward margin over steps where the better answer is always preferred."""
    settings = {"reduction": "sum"} if name == "ipo" else {}
    problem = exact(name, pairs(certain(world.reward_XY), all_alike()), world, beta=CERTAIN_BETA, **settings)
    steps = problem.steps(torch.optim.AdamW, num_steps, lr=RATE / 8, weight_decay=0.0)
    return [problem.metric("rewards/margin", policy) for policy in steps]


def others_of(world: World) -> dict[str, list[Tensor]]:
    """The policies [X, Y] at which other objectives rest on the same pairs, with two β each."""
    trees = pairs(bradley_terry(world.reward_XY), all_alike())
    return {
        "IPO": [exact("ipo", trees, world, beta=beta, reduction="sum").solve().logps() for beta in (0.06, 0.03)],
        "forward KL": [exact("dpo", trees, world, beta=beta, f_divergence="forward-kl").solve().logps() for beta in (1.0, 0.3)],
    }


def distances(runs: Sequence[Run]) -> Panel:
    """Total variation over steps."""
    figure, axes = canvas()
    axes.axhline(-3, color=COLOURS["muted"], linewidth=1, dashes=(2, 3))
    for run, role in zip(runs, ROLES, strict=True):
        axes.plot(np.log10(np.maximum(run.apart, FLOOR)), color=COLOURS[role], linewidth=2)
    key(axes, [(f"β {run.beta:g}", role) for run, role in zip(runs, ROLES, strict=True)], top=0.5)
    label_axes(axes, "plain")
    powers_of_ten(axes)
    says = "total variation between DPO's policy and its optimum, over AdamW steps"
    return Panel("DPO reaches the closed form", says, inline_svg(written(figure), says))


def key(axes: "Axes", names: Iterable[tuple[str, str]], *, top: float = 1.0) -> None:
    """What the colours mean, at the left, from a share of the height downwards."""
    for place, (name, role) in enumerate(names):
        at = {"xycoords": "axes fraction", "xytext": (10, -14 - 18 * place), "textcoords": "offset points"}
        axes.annotate(name, (0, top), color=COLOURS[role], **at)


def rewards(world: World, run: Run) -> Panel:
    """Implicit rewards against true ones."""
    figure, axes = canvas()
    true = world.reward_XY.flatten().numpy()
    span = (true.min() - 0.3, true.max() + 0.3)
    axes.plot(span, span, color=COLOURS["axis"], linewidth=1)
    shown = (("at the end", "train", run.final_XY), (f"after {EARLY} steps", "held", run.early_XY))
    for place, (_, role, logps_XY) in enumerate(shown):
        found = recovered(world, run.beta, logps_XY, run.best_XY).flatten().numpy()
        axes.plot(true, found, "o", color=COLOURS[role], markersize=6, zorder=4 - place)
    key(axes, [(name, role) for name, role, _ in shown])
    axes.set_xlim(span)
    label_axes(axes, "plain", across="true reward")
    says = f"implicit reward + β·log Z against true reward, all answers (β {run.beta:g})"
    return Panel("It is a reward model", says, inline_svg(written(figure), says))


def certainty(world: World, margins: dict[str, list[float]]) -> Panel:
    """DPO's margin and IPO's where preferences are certain."""
    figure, axes = canvas()
    num_steps = len(margins["dpo"]) - 1
    axes.set_xlim(0, num_steps * 1.12)
    preference_XYY = certain(world.reward_XY)
    wins_XY = preference_XYY.mean(-1)
    gaps_XYY = wins_XY[:, :, None] - wins_XY[:, None, :]
    rest = gaps_XYY[preference_XYY == 1].mean().item()
    axes.axhline(rest, color=COLOURS["muted"], linewidth=1, dashes=(2, 3))
    for name, role, label in (("dpo", "train", "DPO"), ("ipo", "held", "IPO")):
        axes.plot(margins[name], color=COLOURS[role], linewidth=2)
        write_at(axes, num_steps, margins[name][-1], label, role, above=name == "ipo")
    label_axes(axes, "plain")
    says = f"rewards/margin over AdamW steps (β {CERTAIN_BETA:g}); dashed: IPO's closed form, {rest:.2f}"
    return Panel("Certain preferences: DPO has no end, IPO has", says, inline_svg(written(figure), says))


def frontier(world: World, runs: Sequence[Run], others: Mapping[str, Sequence[Tensor]]) -> Panel:
    """Reward against KL: the best there is, DPO's policies, and those of other objectives."""
    figure, axes = canvas()
    curve = np.array([reward_and_kl(world, tilted(world.reference_XY, world.reward_XY / beta)) for beta in np.geomspace(0.05, 50, 200)])
    axes.plot(curve[:, 1], curve[:, 0], color=COLOURS["axis"], linewidth=2)
    axes.set_xlim(-0.25, curve[:, 1].max() + 0.1)
    for (name, policies), role in zip(others.items(), ("note", "warning"), strict=True):
        points = [reward_and_kl(world, logps_XY) for logps_XY in policies]
        axes.plot([kl for _, kl in points], [reward for reward, _ in points], "s", color=COLOURS[role], markersize=6, zorder=5)
        reward, kl = points[0]
        place = {"xytext": (-8, 5), "ha": "right"} if name == "IPO" else {"xytext": (9, -11)}
        axes.annotate(name, (kl, reward), textcoords="offset points", color=COLOURS[role], **place)
    for run, role in zip(runs, ROLES, strict=True):
        reward, kl = reward_and_kl(world, run.final_XY)
        axes.plot([kl], [reward], "o", color=COLOURS[role], markersize=9, zorder=4)
        axes.annotate(f"β {run.beta:g}", (kl, reward), xytext=(-8, 6), textcoords="offset points", ha="right", color=COLOURS[role])
    label_axes(axes, "plain", across="KL")
    says = "mean reward against KL in nats; line: the optimum for every β; large dots: DPO"
    return Panel("DPO's policies lie on the reward-KL frontier", says, inline_svg(written(figure), says))


def write_at(axes: "Axes", x: float, y: float, text: str, role: str, *, above: bool = False) -> None:
    """The name of a line at its end."""
    place = {"xytext": (4, 6), "va": "bottom"} if above else {"xytext": (4, 0), "va": "center"}
    axes.annotate(text, (x, y), textcoords="offset points", color=COLOURS[role], **place)


def powers_of_ten(axes: "Axes") -> None:
    """Names for an upright axis that holds logarithms."""
    low, _ = axes.get_ylim()
    places = range(0, int(np.ceil(low)) - 1, -3)
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    axes.set_yticks(list(places), ["1" if place == 0 else f"10{str(place).translate(raised)}" for place in places])


if __name__ == "__main__":
    main()
