"""What the processes of a group do, for tests that want to see several of them. Runs in children of `group_server.py`."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.tuners.lora  # noqa: F401
import tokenizers  # noqa: F401
import torch
import transformers.generation.utils
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tests.conftest import _model
from tests.training.runs import run
from tests.training.test_step import Coupled, demonstrations, pairs, reward_model
from torch.distributed.tensor import DTensor

import prefopt.cli.entry
import prefopt.cli.train
import prefopt.training.run  # noqa: F401
from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.errors import DataError, PrefoptError
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.methods.method import Method, MethodSettings
from prefopt.methods.reward import Reward, RewardSettings
from prefopt.methods.sft import SFT, SFTSettings
from prefopt.models.load import checkpoint_activations
from prefopt.models.moving import Following, MovingReference
from prefopt.models.policy import EnginePath, Policy, no_dropout, trained_parameters
from prefopt.models.reference import AdapterOff, FrozenAdapter, FrozenCopy, Reference
from prefopt.rollout.sample import sample
from prefopt.training.group import lifeline, sharding
from prefopt.training.group.processes import Processes, join
from prefopt.training.group.sharding import gathered, shard, wrap
from prefopt.training.loop import Trainer
from prefopt.training.optimizer import Schedule, make_optimizer
from prefopt.training.record.checkpoint import Checkpoints, Progress, restore
from prefopt.training.references import InPlace
from prefopt.trees import token_ids

Weights = dict[str, torch.Tensor]


def play(scenario: str, rank: int, arguments: dict[str, Any], result: Path) -> int:
    """Run a scenario as the command line runs a command; its exit code."""
    try:
        found = SCENARIOS[scenario](rank, **arguments)
    except PrefoptError as error:
        if not error.told:
            print(f"prefopt: {error}", file=sys.stderr)
        return 2
    result.write_text(json.dumps(found))
    return 0


def train(rank: int, *, of_rank: dict[str, Any] | None = None, trouble: dict[str, Any] | None = None, **settings: Any) -> None:
    """A run.

    Args:
        of_rank: settings that the process of that rank has instead.
        trouble: `rank` (None: all), `step`, `do`: what befalls that process at the beginning of that step.
    """
    if trouble is not None and trouble["rank"] in (rank, None):
        prepare_trouble(trouble)
    hurry()
    settings |= (of_rank or {}).get(str(rank), {})
    method, model, data, out = (settings.pop(name) for name in ("method", "model", "data", "out"))
    if "cache_dir" in settings:
        settings["cache_dir"] = Path(settings["cache_dir"])
    run(method, model, data, Path(out), **settings)


def hurry() -> None:
    """Seconds in place of the quarter minutes that the lifeline gives in earnest."""
    lifeline.BEAT_S, lifeline.FROZEN_S, lifeline.SILENT_S, lifeline.LEAVE_S = 0.3, 2.0, 4.0, 1.5


def prepare_trouble(trouble: dict[str, Any]) -> None:
    original = Trainer.step

    def step(self: Trainer, trees: Any, step: int, state: Any) -> Any:
        if step == trouble["step"]:
            TROUBLES[trouble["do"]](self)
        return original(self, trees, step, state)

    Trainer.step = step  # type: ignore[method-assign]


def data_error(trainer: Trainer) -> None:
    raise DataError("row 7 is bad")


def bug(trainer: Trainer) -> None:
    raise TypeError("this is a bug")


def full_disk(trainer: Trainer) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    import prefopt.training.record.checkpoint

    prefopt.training.record.checkpoint.save_file = refuse


def stand_still_with_helper(trainer: Trainer) -> None:
    """As when a whole machine stands still. It is woken up when the others must have given it up."""
    assert trainer.processes.lifeline is not None
    assert trainer.processes.lifeline._helper is not None
    helper = trainer.processes.lifeline._helper.pid
    subprocess.Popen(["sh", "-c", f"sleep 10; kill -KILL {os.getpid()}; kill -CONT {helper}"])
    os.kill(helper, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)


def suspend_all(trainer: Trainer) -> None:
    """Every process and every helper at once, for longer than any of the lifeline's times: Ctrl-Z, and then `fg`."""
    assert trainer.processes.lifeline is not None
    assert trainer.processes.lifeline._helper is not None
    mine = f"{os.getpid()} {trainer.processes.lifeline._helper.pid}"
    subprocess.Popen(["sh", "-c", f"kill -STOP {mine}; sleep 5; kill -CONT {mine}"])
    time.sleep(1)


def hold_the_lock(trainer: Trainer) -> None:
    """Nothing in Python runs for longer than any of the lifeline's times; as when a large file is written."""
    ctypes.PyDLL(None).usleep(5_000_000)


TROUBLES: dict[str, Callable[[Trainer], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "stand still": stand_still_with_helper,
    "hold": hold_the_lock,
    "suspend": suspend_all,
    "data": data_error,
    "bug": bug,
    "full disk": full_disk,
    "interrupt": lambda _: signal.raise_signal(signal.SIGINT),
}


# Steps in float64, where the number of processes can be seen to change nothing.


def make_trainer(case: dict[str, Any], processes: Processes) -> Trainer:
    """A trainer of a small GPT-2 in float64 (its norms compute in float64 too; Llama's do not).

    Args:
        case: `parallel`, `method`, `lora`, `tied`, `reference` (copy, off, start), `checkpointing`, `own_head`, `clip`, `follows` (the
            policy's share in the reference before each step but the first).
        processes: of the group.
    """
    if case["method"] == "reward":
        return make_reward_trainer(case, processes)
    policy, other = (small_policy(seed, tied=case["tied"], own_head=case.get("own_head", False)) for seed in (0, 1))
    method: Method = Coupled(MethodSettings()) if case["method"] == "coupled" else DPO(DPOSettings(beta=0.3, label_smoothing=0.1))
    reference: Reference
    if case["lora"]:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
            torch.manual_seed(5)
            config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=True)
            adapter = get_peft_model(policy.model, config)
        adapter.double()
        reference = AdapterOff(policy, adapter) if case["reference"] == "off" else FrozenAdapter(policy, adapter)
        if case["reference"] == "start":  # the two must differ, or the gradient would say little
            for name, parameter in adapter.named_parameters():
                if "prefopt_start" in name:
                    parameter.data.mul_(0.5)
    else:
        reference = FrozenCopy(other)
    no_dropout(policy)
    if case.get("checkpointing"):
        checkpoint_activations(policy.model)
        policy.train()
    wrapped = wrap(policy, processes, case["parallel"])
    if isinstance(reference, FrozenCopy) and case["parallel"] == "fsdp" and processes.count > 1:
        shard(reference.policy, processes)
    if "follows" in case:
        assert isinstance(reference, FrozenCopy | FrozenAdapter)
        reference = MovingReference(reference, policy, Following(1, case["follows"]))
    optimizer = make_optimizer(trained_parameters(policy), weight_decay=0.01)
    schedule = Schedule(1e-3, 10, 0.0, "constant")
    return Trainer(policy, wrapped, method, reference, optimizer, schedule, case.get("clip", 1e9), 60, None, processes)


def make_reward_trainer(case: dict[str, Any], processes: Processes) -> Trainer:
    """The same of a reward model."""
    policy = Policy(reward_model(small_policy(0).model).double(), EnginePath("flat", None, scores=True))
    if case["lora"]:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
            torch.manual_seed(5)
            config = LoraConfig(
                task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=True
            )
            get_peft_model(policy.model, config).double()
    no_dropout(policy)
    wrapped = wrap(policy, processes, case["parallel"])
    optimizer = make_optimizer(trained_parameters(policy), weight_decay=0.01)
    method = Reward(RewardSettings(center_weight=0.1))
    return Trainer(policy, wrapped, method, None, optimizer, Schedule(1e-3, 10, 0.0, "constant"), 1e9, 60, None, processes)


def small_policy(seed: int, *, tied: bool = True, own_head: bool = False) -> Policy:
    """A small GPT-2 in float64."""
    model = _model("gpt2", seed, {"initializer_range": 0.2, "tie_word_embeddings": tied}).double()
    return Policy(model, EnginePath("flat", None if own_head else HeadShape()))


def steps(case: dict[str, Any], processes: Processes) -> tuple[Weights, dict[str, Any]]:
    """Two steps with an evaluation between: every gradient of the first, every weight after, and the numbers."""
    trainer = make_trainer(case, processes)
    state = trainer.method.initial_state()
    first, norm = trainer.step(pairs(7), 0, state)
    parameters = dict(trained_parameters(trainer.policy))
    found = {f"gradient {name}": parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    tensors = gathered(found, processes)
    numbers = {"loss": first.loss, "norm": norm, "metrics": first.metrics, "evaluation": trainer.evaluate(pairs(5, seed=3), state).figures}
    second, second_norm = trainer.step(pairs(5, seed=1), 1, state)
    numbers |= {"second loss": second.loss, "second norm": second_norm}
    numbers["cut"] = [isinstance(parameter, DTensor) for parameter in trainer.policy.parameters()]
    tensors |= gathered({f"weight {name}": parameter for name, parameter in parameters.items()}, processes)
    return tensors, numbers


def all_steps(rank: int, *, cases: dict[str, dict[str, Any]], folder: str) -> dict[str, Any]:
    """Each case's tensors as a file, and its numbers."""
    found = {}
    with join("cpu") as processes:
        for name, case in cases.items():
            tensors, found[name] = steps(case, processes)
            if rank == 0:
                save_file(tensors, Path(folder) / f"{name}.safetensors")
    return found


def after_a_look(rank: int, *, folder: str, lets_go: bool) -> dict[str, Any]:
    """A reference read before training, then an optimizer, as a run does; with and without giving up gathered weights."""
    if not lets_go:
        sharding.let_go = lambda policy, inputs, output: None
    with join("cpu") as processes:
        return look_and_step(processes, folder)


def look_and_step(processes: Processes, folder: str | None = None) -> dict[str, Any]:
    """Losses of three steps of a model that was looked at before the optimizer was made; its weights into the folder."""
    policy = small_policy(0)
    no_dropout(policy)
    trees = demonstrations(6)
    wrapped = wrap(policy, processes, "fsdp")
    InPlace(policy).logps(pack(trees[:2], sharing="flat"))
    cut_after = [isinstance(parameter, DTensor) for parameter in policy.parameters()]
    optimizer = make_optimizer(trained_parameters(policy), weight_decay=0.0)
    trainer = Trainer(policy, wrapped, SFT(SFTSettings()), None, optimizer, Schedule(1e-2, 10, 0.0, "constant"), 1.0, 60, None, processes)
    results = [trainer.step(trees, step, {}) for step in range(3)]
    weights = gathered(dict(policy.named_parameters()), processes)
    if processes.is_main and folder is not None:
        save_file(weights, Path(folder) / "weights.safetensors")
    return {"losses": [result.loss for result, _ in results], "norms": [norm for _, norm in results], "cut": cut_after}


def samples(rank: int, *, model_seed: int = 0, first: bool = True) -> Any:
    """Answers of a model that is cut, before and after it has run."""
    with join("cpu") as processes:
        return draw_samples(processes)


def draw_samples(processes: Processes) -> Any:
    """Answers before the model has run otherwise, then a loss and its gradient's norm, then answers again."""
    policy = small_policy(0)
    no_dropout(policy)
    wrapped = wrap(policy, processes, "fsdp")
    prompts = [token_ids([5, 6, 7]), token_ids([8, 9])]
    schedule = Schedule(5e-2, 9, 0.0, "constant")

    def draw() -> list[list[int]]:
        with policy.generating() as model:
            return [ids.tolist() for (ids,) in sample(model, prompts, eos_ids={2}, max_new_tokens=12, seed=3)]

    before = draw()
    optimizer = make_optimizer(trained_parameters(policy), weight_decay=0.0)
    reference = FrozenCopy(small_policy(1))
    if processes.count > 1:
        shard(reference.policy, processes)
    trainer = Trainer(policy, wrapped, DPO(DPOSettings()), reference, optimizer, schedule, 1.0, 60, None, processes)
    result, norm = trainer.step(pairs(4), 0, {})
    cut_after = [isinstance(parameter, DTensor) for parameter in policy.parameters()]
    return {"before": before, "loss": result.loss, "norm": norm, "after": draw(), "cut": cut_after}


def units(rank: int, *, architecture: str) -> dict[str, Any]:
    """How a model is cut into units."""
    with join("cpu") as processes:
        policy = Policy(_model(architecture, 0, {}), EnginePath("plain", None))
        layers = len(sharding.layers_of(policy))
        shard(policy, processes)
        shard(policy, processes)  # once is enough
        return {"layers": layers, "cut": all(isinstance(parameter, DTensor) for parameter in policy.parameters())}


def words(rank: int) -> dict[str, Any]:
    """What processes say to each other, and numbers that they share, twice in the same process."""
    found: dict[str, Any] = {}
    for turn in range(2):
        with join("cpu") as processes:
            found[f"shared {turn}"] = processes.share({"of": rank, "turn": turn})
            processes.agree({"the data": "same"})
            found[f"sum {turn}"] = processes.add_up(torch.tensor([rank + 1.0])).item()
            found[f"collected {turn}"] = processes.collect(torch.tensor([rank, turn])).tolist()
            found[f"sent {turn}"] = processes.send(torch.tensor([rank, 7]), 1).tolist()
            order = []
            with processes.main_first():
                order.append(time.monotonic())
            processes.wait()
            found[f"time {turn}"] = order[0]
    return found


def disagree(rank: int, *, what: str) -> None:
    """Facts that are not the same."""
    with join("cpu") as processes:
        processes.agree({"the model": "same", what: f"that of {rank}"})


def random_states(rank: int, *, folder: str) -> Any:
    """Each process's random state comes back to it."""
    with join("cpu") as processes:
        policy = small_policy(0)
        wrap(policy, processes, "fsdp")
        parameters = dict(trained_parameters(policy))
        optimizer = make_optimizer(parameters.items(), weight_decay=0.0)
        torch.manual_seed(100 + rank)
        path = Checkpoints(Path(folder), keep=1).save(parameters, optimizer, Progress(1, {}), {}, processes=processes)
        drawn = torch.rand(2).tolist()
        processes.wait()
        restore(path, {"step": 1, "method_state": {}}, parameters, optimizer, processes)
        return {"first": drawn, "again": torch.rand(2).tolist()}


SCENARIOS: dict[str, Callable[..., Any]] = {
    "train": train,
    "steps": all_steps,
    "after a look": after_a_look,
    "samples": samples,
    "units": units,
    "words": words,
    "disagree": disagree,
    "random states": random_states,
}
