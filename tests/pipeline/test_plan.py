"""What fits, with which settings, in how much time: asked through the command line, of models whose config is all there is."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.command_line import prefopt, refused
from tests.conftest import MakeModel
from tests.training.runs import pair_rows, run, write_rows
from transformers import AutoConfig

from prefopt.config import read_yaml
from prefopt.models.load import choose_precision
from prefopt.models.quantise import four_bit_layers
from prefopt.models.settings import ModelSettings
from prefopt.pipeline import pace as pace_of
from prefopt.pipeline import plan as planning
from prefopt.pipeline.pace import Pace, Work, assumed_pace, measure_pace, work_of
from prefopt.pipeline.plan import plan
from prefopt.pipeline.plan_fit import Examples, Fit, _ladder, find_fit
from prefopt.pipeline.plan_settings import PlanSettings, num_bytes
from prefopt.pipeline.plan_words import why
from prefopt.training.combination import check_combination
from prefopt.training.group.processes import ALONE
from prefopt.training.optimizers.kinds import KINDS
from prefopt.trees import Completion, PromptTree, token_ids

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 8 billion weights, of which there is the config only."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    folder = tmp_path_factory.mktemp("large")
    AutoConfig.for_model("llama", vocab_size=128256, tie_word_embeddings=False, **sizes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of three million weights, its config only."""
    folder = tmp_path_factory.mktemp("small")
    AutoConfig.for_model("llama", **SIZES).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(make_model: MakeModel, chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model that can be run."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", hidden_size=32, intermediate_size=64).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 10¹⁰ operations per second that nobody looks at."""
    monkeypatch.setattr(planning, "matrix_rate", lambda *_: 1e10)
    monkeypatch.setattr(
        planning,
        "measure_pace",
        lambda settings, precision, sizes, trees, *, sharing, device, rate, optim: assumed_pace(sizes, rate, sharing),
    )


def only_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if of the libraries that hold numbers in fewer bits these alone were there."""
    for module in ("prefopt.training.optimizers.kind", "prefopt.models.quantise"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: object() if name in names else None)


def rows_of(out: str) -> dict[str, list[str]]:
    """The table, by the first word of each row."""
    lines = out.splitlines()
    start = next(place for place, line in enumerate(lines) if "peak memory" in line)
    found = [re.split(r" {2,}", line) for line in lines[start + 1 : start + 4]]
    return {row[0].split(" ")[0]: row[1:] for row in found}


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("24", 24 * 10**9),
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("24000MB", 24 * 10**9),
        ("0.5TB", 5 * 10**11),
    ],
)
def test_amounts_of_memory(amount: str, expected: int):
    assert num_bytes(amount) == expected


@pytest.mark.parametrize("amount", ["0", "-1", "lots", "24XB", "1e3GB", "0GB", "nan"])
def test_what_is_no_amount_is_a_mistake(small: str, amount: str):
    said = prefopt("plan", "--model", small, f"--memory={amount}").check()
    assert said.code == 2
    assert f"--memory: must be more than 0, written like 24GB, 24GiB or 24000MB; a number alone is in GB (given: {amount})" in said.err


def test_of_eight_billion_weights_on_a_gpu_that_is_not_here(config: str):
    said = prefopt("plan", "--model", config, "--memory", "80GB", "--device", "cuda", "--gpus", "1", "--max-tokens", "2048").check()
    rows = rows_of(said.out)
    assert rows["full"][1] == "no"
    assert float(rows["full"][0].split()[0]) > 80
    assert rows["LoRA"][1] == "yes"
    assert 16 < float(rows["LoRA"][0].split()[0]) < 80
    assert 5 < float(rows["QLoRA"][0].split()[0]) < float(rows["LoRA"][0].split()[0]) - 9  # 7 billion weights at 1.5 bytes less
    assert "times: not known" in said.out
    assert "chosen: LoRA 16, because for full there is no room" in said.out
    assert f"prefopt train dpo --model {config} --data FILE" in said.out
    assert "--lora-rank 16" in said.out


def test_a_rate_that_is_given_gives_times(config: str):
    words = ("--memory", "80GB", "--device", "cuda", "--gpus", "1", "--max-tokens", "2048", "--tflops")
    slow, fast = (rows_of(prefopt("plan", "--model", config, *words, rate).check().out)["LoRA"] for rate in ("100", "200"))
    assert slow[2] != "?"
    assert seconds(slow[5]) == pytest.approx(2 * seconds(fast[5]), rel=0.02)
    tokens = 10_000 * (256 + 2 * 128)
    weights = 7.5e9
    assert seconds(slow[5]) == pytest.approx((2 * 2 + 2) * weights * tokens / 100e12, rel=0.1)


def seconds(text: str) -> float:
    if text.endswith(" s"):
        return float(text.removesuffix(" s"))
    total = 0
    for part in text.split(":"):
        total = 60 * total + int(part)
    return float(total)


def test_where_memory_is_short_the_plan_says_what_to_give_up(small: str, instant: None):
    roomy = prefopt("plan", "--model", small, "--memory", "64GB", "--device", "cuda").check().out
    assert rows_of(roomy)["full"][-1] == "-"
    needed = {}
    for memory in ("1.5GB", "1.3GB", "1.1GB"):
        found = plan(PlanSettings(model=small, memory=memory, device="cuda", precision="float32", gpus=1), say=lambda _: None, only="full")
        way = found.ways[0]
        assert way.fit.fits
        assert way.fit.estimate.total + planning.CUDA_ITSELF <= num_bytes(memory)
        needed[memory] = way.fit.changes
    assert set(needed["1.5GB"]) <= {"max_tokens"}
    assert needed["1.1GB"] != needed["1.5GB"]


def test_layers_recompute_as_few_as_it_takes(small: str):
    settings = PlanSettings(model=small, memory="64GB", device="cuda", precision="float32", max_tokens=2048)
    method = planning.method_named("dpo")
    base = planning._base_settings(settings, method, True)
    dpo = method(planning.own_settings(method, base))
    examples = Examples((256, 128, 128), 512.0, 0.0, 512, 64)
    cuda = torch.device("cuda")
    free = find_fit(dpo, base, examples, room=10**12, device=cuda, gpus=1)
    assert free.changes == {}
    tight = find_fit(dpo, base, examples, room=free.estimate.total - 1, device=cuda, gpus=1)
    assert tight.changes == {"gradient_checkpointing": 1}
    tighter = find_fit(dpo, base, examples, room=tight.estimate.total - 1, device=cuda, gpus=1)
    assert tighter.changes == {"gradient_checkpointing": 2}
    hopeless = find_fit(dpo, base, examples, room=10**6, device=cuda, gpus=1)
    assert not hopeless.fits


def test_several_gpus_are_taken_where_one_is_too_small(config: str):
    found = plan(PlanSettings(model=config, memory="80GB", device="cuda", max_tokens=2048), say=lambda _: None, only="full")
    assert found.chosen is not None
    assert found.chosen.fit.gpus > 1
    assert found.command.startswith(f"torchrun --nproc-per-node {found.chosen.fit.gpus} -m prefopt train dpo ")
    assert "--parallel fsdp" in found.command


def asked(model: str, **given: Any) -> tuple[Any, Any]:
    """The method and the settings that a plan begins with."""
    settings = PlanSettings(model=model, memory="64GB", max_tokens=2048, **given)
    method = planning.method_named("dpo")
    base = planning._base_settings(settings, method, True)
    return method(planning.own_settings(method, base)), base


BF16, EIGHT = {"optim": "adamw-bf16", "precision": "bf16"}, {"optim": "adamw-8bit"}
OFFLOAD = {"offload_activations": True}


@pytest.mark.parametrize(
    ("device", "precision", "installed", "rungs"),
    [
        ("cuda", "auto", ("bitsandbytes", "optimi"), [{}, EIGHT, BF16, OFFLOAD]),
        ("cpu", "auto", ("bitsandbytes", "optimi"), [{}, BF16, EIGHT]),  # 8 bits take a hundred times as long there
        ("cuda", "auto", ("bitsandbytes",), [{}, EIGHT, OFFLOAD]),
        ("cuda", "auto", ("optimi",), [{}, BF16, OFFLOAD]),
        ("cpu", "auto", (), [{}]),
        ("cpu", "float32", ("bitsandbytes", "optimi"), [{}, EIGHT]),
    ],
)
def test_what_is_given_up_in_which_order(
    small: str, device: str, precision: str, installed: tuple[str, ...], rungs: list[Any], monkeypatch: pytest.MonkeyPatch
):
    only_installed(monkeypatch, *installed)
    _, base = asked(small, device=device, precision=precision)
    assert [changes for changes, _ in _ladder(base, torch.device(device), 1)] == rungs


def test_an_adapter_is_trained_as_it_is(model: str, tmp_path: Path):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    run("dpo", model, pairs, tmp_path / "run", lora_rank=4, max_steps=1)
    for given in ({"model": str(tmp_path / "run")}, {"model": model, "lora_rank": 4}, {"model": model, "adapter": str(tmp_path / "run")}):
        _, base = asked(model, device="cpu")
        assert [changes for changes, _ in _ladder(base.model_copy(update=given), torch.device("cpu"), 1)] == [{}]


@pytest.mark.parametrize(
    ("installed", "optim"), [(("bitsandbytes", "optimi"), "adamw-bf16"), (("optimi",), "adamw-bf16"), (("bitsandbytes",), "adamw-8bit")]
)
def test_the_optimizer_that_makes_room_is_one_that_runs(
    small: str, installed: tuple[str, ...], optim: str, monkeypatch: pytest.MonkeyPatch
):
    dpo, base = asked(small, device="cpu")
    examples, cpu = Examples((256, 128, 128), 512.0, 0.0, 512, 64), torch.device("cpu")
    only_installed(monkeypatch)
    least = find_fit(dpo, base, examples, room=10**6, device=cpu, gpus=1)
    assert not least.fits
    assert not find_fit(dpo, base, examples, room=least.estimate.total - 1, device=cpu, gpus=1).fits
    only_installed(monkeypatch, *installed)
    found = find_fit(dpo, base, examples, room=least.estimate.total - 1, device=cpu, gpus=1)
    assert found.fits
    assert found.changes["optim"] == optim
    check_combination(found.settings, ALONE)


def test_what_was_not_tried_and_why_a_way_that_fits_was_not_taken(small: str, instant: None, monkeypatch: pytest.MonkeyPatch):
    only_installed(monkeypatch)
    lines: list[str] = []
    plan(PlanSettings(model=small, memory="100MB", device="cuda"), say=lines.append, only="full")
    assert [line for line in lines if line.startswith("not tried: ")] == [
        "not tried: --optim adamw-8bit, for the library bitsandbytes is not installed (pip install 'prefopt[bits]')",
        "not tried: --optim adamw-bf16, for the library optimi is not installed (pip install 'prefopt[bf16]')",
    ]
    assert any(line.startswith("nothing fits: ") for line in lines)
    lines.clear()
    plan(PlanSettings(model=small, memory="64GB", device="cuda"), say=lines.append, only="full")
    assert not any(line.startswith("not tried: ") for line in lines)


def test_reasons_name_what_has_no_room_and_what_is_not_installed():
    def way(name: str, fits: bool) -> Any:
        return SimpleNamespace(name=name, fit=SimpleNamespace(fits=fits))

    full, lora, qlora = way("full", False), way("LoRA 16", True), way("QLoRA 16", True)
    assert why(lora, [full, lora, qlora]) == "because for full there is no room"
    assert why(qlora, [full, lora, qlora]) == (
        "because for full there is no room, and for LoRA 16 the library bitsandbytes is not installed (pip install 'prefopt[bits]')"
    )


def test_what_takes_time_besides_is_said(config: str, small: str, monkeypatch: pytest.MonkeyPatch):
    """Of a rate that is given, in 4 bits; of a base on several GPUs; of activations that move."""
    lines: list[str] = []
    plan(PlanSettings(model=config, memory="80GB", device="cuda", max_tokens=2048, tflops=100), say=lines.append)
    rows = rows_of("\n".join(lines))
    assert [rows[name][2].startswith("> ") for name in ("full", "LoRA", "QLoRA")] == [True, False, True]
    assert [line for line in lines if line.startswith("> ")] == [
        "> longer than that: GPUs send each other weights and gradients",
        "> longer than that: weights in 4 bits are written out for every pass",
    ]
    fit = SimpleNamespace(settings=SimpleNamespace(load_in_4bit=False, offload_activations=True), gpus=1)
    assert planning._without(fit, SimpleNamespace(is_measured=True)) == ("activations go to the machine's memory and come back",)
    fit = SimpleNamespace(settings=SimpleNamespace(load_in_4bit=True, offload_activations=False), gpus=1)
    only_installed(monkeypatch, "bitsandbytes")
    assert planning._without(fit, SimpleNamespace(is_measured=True)) == ()
    only_installed(monkeypatch)
    assert len(planning._without(fit, SimpleNamespace(is_measured=True))) == 1


class Slow(torch.optim.SGD):
    """Takes a fifth of a second for a step, whatever it has to do."""

    def step(self, closure: Any = None) -> None:
        time.sleep(0.2)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Kind and number of weights of every optimizer that the probe makes; each is slow."""
    made: list[tuple[str, int]] = []

    def make(named: Any, *, weight_decay: float, kind: str) -> torch.optim.Optimizer:
        parameters = [parameter for _, parameter in named]
        made.append((kind, sum(parameter.numel() for parameter in parameters)))
        return Slow(parameters, lr=0.1)

    monkeypatch.setattr(pace_of, "make_optimizer", make)
    return made


TREES = [PromptTree(token_ids([1] * 12), (Completion(token_ids([2] * 6)), Completion(token_ids([3] * 4))))] * 2


def probed(model: str, *, optim: str = "adamw", **settings: Any) -> tuple[Pace, Work]:
    given = ModelSettings(model=model, **settings)
    precision = choose_precision("float32", torch.device("cpu"), adapter=bool(given.lora_rank), trained=KINDS[optim].trained)
    sizes = work_of(given, precision, adapter=bool(given.lora_rank))
    rate = 1e10
    return measure_pace(given, precision, sizes, TREES, sharing="flat", device=torch.device("cpu"), rate=rate, optim=optim), sizes


def test_only_where_there_is_an_optimizer_its_step_is_timed(model: str, timed: list[tuple[str, int]]):
    given, cpu = ModelSettings(model=model), torch.device("cpu")
    precision = choose_precision("float32", cpu, adapter=False)
    without, with_it = (pace_of._time_layers(given, precision, "language", TREES, 1, "flat", cpu, optim) for optim in (None, "adamw"))
    assert without.keys() == {"train", "forward"}
    assert with_it.keys() == {"train", "forward", "update"}
    assert [kind for kind, _ in timed] == ["adamw"]
    assert with_it["update"] > 0


def test_a_reward_model_is_no_model_to_train_with_another_method(
    reward_run: Path, lora_run: Path, model_folder: Callable[..., Path], tmp_path: Path
):
    model, data = str(reward_run / "model"), write_rows(tmp_path / "pairs.jsonl", pair_rows())
    words = ("--max-length", "64", "--device", "cpu", "--memory", "8GB")
    for said in (refused("plan", "dpo", "--model", model, *words), refused("advise", data, "--model", model)):
        assert f"{model} holds a reward model, which scores answers and cannot write any" in said
    assert prefopt("plan", "reward", "--model", model, *words).check().code == 0
    run("reward", model_folder(), data, tmp_path / "adapted", lora_rank=2, max_steps=1)
    adapter = str(tmp_path / "adapted" / "model")
    for said in (refused("plan", "dpo", "--model", adapter, *words), refused("advise", data, "--model", adapter)):
        assert f"{adapter} holds a reward model" in said
    assert "is an adapter of a language model" in refused("plan", "reward", "--model", str(lora_run / "model"), *words)


@pytest.mark.parametrize("optim", ["adamw", "adamw-8bit", "adamw-bf16"])
def test_the_optimizer_that_is_timed_is_the_one_that_runs(model: str, timed: list[tuple[str, int]], optim: str):
    found, sizes = probed(model, optim=optim)
    assert timed == [(optim, sizes.num_trained)]
    assert 0.2 <= found.optimizer() < 0.4


def test_a_part_of_a_large_model_tells_the_optimizer_s_time(small: str, timed: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pace_of, "SAMPLE", 500_000)
    found, sizes = probed(small)
    ((_, sampled),) = timed
    assert 500_000 <= sampled < sizes.num_trained / 2
    assert found.optimizer() == pytest.approx(0.2 * sizes.num_trained / sampled, rel=0.5)


def test_the_plan_times_the_optimizer_that_it_proposes(small: str, monkeypatch: pytest.MonkeyPatch):
    asked_of: list[str] = []

    def in_bf16(*given: Any, **others: Any) -> Fit:
        found = find_fit(*given, **others)
        return replace(found, settings=found.settings.model_copy(update=BF16), changes=BF16)

    def measured(*given: Any, optim: str, rate: float, sharing: Any, **_others: Any) -> Pace:
        asked_of.append(optim)
        return assumed_pace(given[2], rate, sharing)

    monkeypatch.setattr(planning, "matrix_rate", lambda *_: 1e10)
    monkeypatch.setattr(planning, "measure_pace", measured)
    plan(PlanSettings(model=small, memory="64GB", device="cpu"), say=lambda _: None, only="full")
    monkeypatch.setattr(planning, "find_fit", in_bf16)
    plan(PlanSettings(model=small, memory="64GB", device="cpu"), say=lambda _: None, only="full")
    assert asked_of == ["adamw", "adamw-bf16"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_base_in_4_bits_is_timed_in_4_bits(model: str, is_there: bool, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("bitsandbytes")
    if not is_there:
        only_installed(monkeypatch)
    seen: list[int] = []

    class Watched(pace_of.Policy):
        def __init__(self, model: Any, path: Any) -> None:
            super().__init__(model, path)
            seen.append(len(list(four_bit_layers(model))))

    monkeypatch.setattr(pace_of, "Policy", Watched)
    found, sizes = probed(model, lora_rank=4, load_in_4bit=True)
    assert sizes.num_layers == 2
    assert seen == ([14, 7] if is_there else [0, 0])  # seven layers of each of the model's two, and of one
    assert found.layer + found.outside > 0


def test_nothing_fits(small: str, instant: None):
    said = prefopt("plan", "--model", small, "--memory", "100MB", "--device", "cuda").check()
    assert said.code == 0
    assert "nothing fits: " in said.out
    assert "chosen" not in said.out


def test_what_would_fit_with_a_library_that_is_not_there_is_said(small: str, instant: None, monkeypatch: pytest.MonkeyPatch):
    def only_in_4_bits(*given: Any, **others: Any) -> Fit:
        found = find_fit(*given, **others)
        return replace(found, fits=found.settings.load_in_4bit)

    monkeypatch.setattr(planning, "find_fit", only_in_4_bits)
    only_installed(monkeypatch)
    lines: list[str] = []
    found = plan(PlanSettings(model=small, memory="64GB", device="cpu"), say=lines.append)
    assert found.chosen is None
    assert lines[-1] == "QLoRA 16 fits, and needs bitsandbytes, which is not installed: pip install 'prefopt[bits]', and ask again"
    only_installed(monkeypatch, "bitsandbytes")
    chosen = plan(PlanSettings(model=small, memory="64GB", device="cpu"), say=lines.append).chosen
    assert chosen is not None
    assert chosen.name == "QLoRA 16"


def test_data_of_ones_own_gives_lengths_and_the_command_and_file_run(
    model: str, tmp_path: Path, instant: None, monkeypatch: pytest.MonkeyPatch
):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "plan.yaml"
    words = ("--model", model, "--data", pairs, "--memory", "24GB", "--device", "cpu", "--batch-size", "4", "--write", str(file))
    said = prefopt("plan", *words).check()
    assert "examples: 12, prompts of " in said.out
    assert rows_of(said.out)["full"][1] == "yes"
    command = said.out.splitlines()[-2].strip()
    assert command == f"prefopt train dpo --model {model} --data {pairs} --out runs/plan --batch-size 4 --device cpu"
    assert read_yaml(file) == {"method": "dpo", "model": model, "data": [pairs], "out": "runs/plan", "batch_size": 4, "device": "cpu"}
    flags = ("--out", str(tmp_path / "run"), "--max-steps", "1", "--samples", "0", "--report", "off")
    trained = prefopt("train", "--config", str(file), *flags)
    trained.check()
    assert trained.code == 0, trained.err


def test_an_adapter_goes_on(model: str, tmp_path: Path, instant: None):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    run("dpo", model, pairs, tmp_path / "run", lora_rank=4, max_steps=1)
    said = prefopt("plan", "--model", str(tmp_path / "run"), "--memory", "24GB", "--device", "cpu").check()
    assert "an adapter over" in said.out
    assert "chosen: adapter" in said.out
    assert "LoRA" not in said.out
    assert "--lora-rank" not in said.out


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: str(folder / "none"), "no folder"),
        (str, "holds no model: there is no config.json in it"),
        (lambda folder: "no-such-org/no-such-model", "the hub gave no config of that name"),
    ],
)
def test_models_that_are_not_there(make: Callable[[Path], str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = prefopt("plan", "--model", make(tmp_path), "--memory", "24GB").check()
    assert said.code == 2
    assert says in said.err


def test_a_config_that_is_damaged(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    said = prefopt("plan", "--model", str(tmp_path), "--memory", "24GB").check()
    assert said.code == 2
    assert "cannot read the config of" in said.err


def test_a_gpu_that_is_not_here_needs_its_memory_and_measuring_needs_data(small: str):
    said = prefopt("plan", "--model", small, "--device", "cuda").check()
    assert said.code == 2
    assert "--memory 24GB" in said.err
    said = prefopt("plan", "--model", small, "--memory", "24GB", "--measure").check()
    assert said.code == 2
    assert "give data too" in said.err


def test_a_method_that_is_none(small: str):
    said = prefopt("plan", "dpoo", "--model", small, "--memory", "24GB").check()
    assert said.code == 2
    assert "did you mean dpo?" in said.err


def test_the_probe_tells_the_time_of_the_whole_model(small: str):
    """What it finds is positive, grows with the work, and training takes longer than a forward pass."""
    found = plan(
        PlanSettings(model=small, memory="24GB", device="cpu", precision="float32", max_tokens=1024), say=lambda _: None, only="full"
    )
    times = found.ways[0].times
    assert times is not None
    assert times.is_measured
    assert times.step > 0
    assert times.run == pytest.approx(times.reference + times.step * np.ceil(10_000 / 64))
    assert times.step * 10_000 / 64 > times.reference > 0


def test_operations_are_counted_by_hand():
    sizes = Work(layer_weights=100, num_layers=3, hidden=8, vocabulary=50, num_trained=300, adapter=False)
    ids = [token_ids([0] * length) for length in (4, 2, 3)]
    tree = PromptTree(ids[0], (Completion(ids[1]), Completion(ids[2])))
    seen = 4 * 5 / 2 + (4 * 2 + 3) + (4 * 3 + 6)
    assert sizes.layer_flops(tree, "flat") == 2 * 100 * 9 + 4 * 8 * seen
    assert sizes.layer_flops(tree, "plain") == 2 * 100 * 13 + 4 * 8 * (6 * 7 / 2 + 7 * 8 / 2)
    assert sizes.head_flops(tree) == 2 * 50 * 8 * 5
    pace = Pace(sizes, layer=3.0, outside=2.0, layer_forward=1.0, outside_forward=0.5, update=0.1, sharing="flat")
    one = sizes.layer_flops(tree, "flat")
    assert pace.micro_batch([tree], recomputing=2) == one * (3 * 3 + 2 * 1) + 2 * sizes.head_flops(tree)
    assert pace.forward([tree]) == one * 3 + 0.5 * sizes.head_flops(tree)
    assert pace.optimizer() == 30


@pytest.mark.slow
def test_the_plan_is_measured(make_model: MakeModel, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of steps that take about a second: in less, what is no work of the model counts too."""
    make_model("llama", hidden_size=256, intermediate_size=704, num_hidden_layers=4).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows() * 24)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    words = ("--model", str(tmp_path / "model"), "--data", pairs, "--device", "cpu", "--batch-size", "96", "--max-tokens", "2048")
    said = prefopt("plan", *words, "--precision", "float32", "--measure").check()
    assert said.code == 0, said.err
    found = re.search(r"measured: 3 steps, peak memory (\S+) GB, .* predicted / measured (\S+), (\S+)", said.out)
    assert found is not None
    assert 0.8 < float(found[2]) < 1.25  # of half a gigabyte most is Python and its libraries
    assert 0.5 < float(found[3]) < 2.0
