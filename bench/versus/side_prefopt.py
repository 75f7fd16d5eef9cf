"""prefopt as a contestant: its training entry point, followed by a callback and a narrator that wait for their turn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from bench.versus.turns import Parts, Turns, peak_memory

import prefopt
from prefopt.config import check
from prefopt.methods.dpo import DPO, DPOSettings, dpo_loss
from prefopt.methods.method import LossOutput, Method, Needs, State, Term
from prefopt.training.assemble import settings_around
from prefopt.training.record.callbacks import Callback, RunStart
from prefopt.training.run import train
from prefopt.training.terminal.narrator import Quiet, Ticker
from prefopt.trees import PromptTree

if TYPE_CHECKING:
    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps


def play(spec: Mapping[str, Any], turns: Turns) -> None:
    """Run what the spec says; the driver ends the process after the last block."""
    turns.facts(import_seconds=turns.start_seconds)
    method = DPO(DPOSettings(beta=spec["beta"])) if spec["branches"] == 2 else Branches(spec["branches"], beta=spec["beta"])
    settings = check(settings_around(method.needs), run_settings(spec), source="the settings of a contestant")
    train(method, settings, narrator=Waiting(turns, spec["reference_parts"]), callbacks=[Blocks(turns, spec["block_steps"])])


def run_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings: what all contestants have in common, then its own."""
    return {
        "model": spec["model"],
        "data": [spec["pairs"]],
        "data_format": "text_pair",
        "out": spec["out"],
        "cache_dir": spec["cache"],
        "batch_size": spec["batch_size"],
        "max_steps": spec["steps"],
        "max_length": spec["max_length"],
        "learning_rate": spec["learning_rate"],
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        "precision": spec["precision"],
        "device": spec["device"],
        "lora_rank": spec["lora_rank"],
        "seed": spec["seed"],
        "samples": 0,
        "report": False,
        "memory_check": False,  # it would count what the other contestants hold as taken
        **({} if spec["checkpointing"] is None else {"gradient_checkpointing": spec["checkpointing"]}),
        **spec["settings"],
    }


class Blocks(Callback):
    """Waits before the first step and after every few, and tells the steps' losses."""

    def __init__(self, turns: Turns, block_steps: int) -> None:
        self.turns, self.block_steps = turns, block_steps
        self.losses: list[float] = []

    def on_start(self, run: RunStart) -> None:
        manifest = run.manifest
        self.turns.facts(
            start_seconds=self.turns.start_seconds,
            tokenise_seconds=manifest["data"]["summary"]["seconds"],
            fingerprint=manifest["data"]["fingerprint"],
            memory_before=peak_memory(cuda=self.turns.cuda),
            options={**manifest["resolved"], "settings": {name: str(value) for name, value in manifest["settings"].items()}},
            parameters=manifest["model"]["num_parameters"],
            versions={"prefopt": prefopt.__version__, "torch": torch.__version__, "transformers": manifest["environment"]["transformers"]},
        )
        self.turns.enter("train")

    def on_step(self, row: Mapping[str, float]) -> None:
        self.losses.append(row["loss"])
        if len(self.losses) == self.block_steps:
            losses, self.losses = self.losses, []
            self.turns.cut(losses=losses, memory=peak_memory(cuda=self.turns.cuda))


class Waiting(Quiet):
    """A narrator that speaks into the log, and lets the reference pass wait for its turns."""

    def __init__(self, turns: Turns, reference_parts: int) -> None:
        self.turns, self.reference_parts = turns, reference_parts

    def say(self, line: str) -> None:
        print(line, flush=True)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Ticker]:
        if what != "reference":
            with super().progress(what, total, done) as ticker:
                yield ticker
            return
        self.turns.enter("reference")
        yield _Counter(Parts(self.turns, total - done, self.reference_parts))
        self.turns.finish()


class _Counter:
    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def step(self, done: int, row: Mapping[str, float]) -> None:
        self.parts.item()


class Branches(Method):
    """DPO on K completions of a prompt as K / 2 pairs, the prompt held once for all of them.

    The data room reads pairs; those of one prompt stand together and are joined here.
    """

    name = "branches"
    settings_class = DPOSettings
    needs = Needs(completions="pair", reference=True)
    units = {"pairs": lambda tree: len(tree.completions) / 2}
    rates = DPO.rates

    def __init__(self, branches: int, *, beta: float) -> None:
        super().__init__(DPOSettings(beta=beta))
        self.pairs = branches // 2

    def arrange(self, trees: Sequence[PromptTree], *, seed: int) -> Sequence[PromptTree]:
        """One tree for all pairs of a prompt."""
        groups = [trees[start : start + self.pairs] for start in range(0, len(trees), self.pairs)]
        if any(own.prompt_ids.tobytes() != group[0].prompt_ids.tobytes() for group in groups for own in group):
            raise ValueError("pairs of one prompt must stand together")
        return [
            PromptTree(group[0].prompt_ids, tuple(completion for own in group for completion in own.completions), row_id=group[0].row_id)
            for group in groups
        ]

    def loss(
        self,
        policy: "TokenLogps",
        reference: "ReferenceLogps | None",
        batch: "TreeBatch",
        *,
        statistics: Mapping[str, float],
        state: State,
    ) -> LossOutput:
        """The mean of DPO's loss over all pairs."""
        assert reference is not None
        losses = dpo_loss(*policy.sum().view(-1, 2).unbind(1), *reference.sum().view(-1, 2).unbind(1), beta=self.settings.beta)
        return LossOutput(terms=(Term(losses.view(-1, self.pairs).sum(-1), unit="pairs"),))
