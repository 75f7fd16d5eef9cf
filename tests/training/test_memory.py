"""What a run will take is told before it starts, and what ran out when it did."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.conftest import MakeModel
from tests.training.runs import run
from transformers import AutoConfig

from prefopt.config import check
from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.errors import RunError
from prefopt.machine import ENVIRONMENT
from prefopt.methods.method import Method
from prefopt.models.load import checkpoint_activations, choose_precision
from prefopt.models.policy import EnginePath, Policy
from prefopt.models.settings import ModelSettings
from prefopt.training.assemble import method_named, own_settings, settings_for
from prefopt.training.group.processes import ALONE
from prefopt.training.memory import check as memory
from prefopt.training.memory import out_of_memory
from prefopt.training.memory.available import Available
from prefopt.training.memory.check import MemoryCheck, Micro, check_memory
from prefopt.training.memory.estimate import KERNEL, LIBRARIES, estimate_memory, size
from prefopt.training.memory.out_of_memory import explaining_out_of_memory, is_out_of_memory
from prefopt.training.memory.trace import Load, _micro_batch, trace_step
from prefopt.training.settings import RunSettings
from prefopt.trees import Completion, PromptTree, token_ids

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def model(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers, of which the checks read the config only."""
    folder = tmp_path_factory.mktemp("wide")
    make_model("llama", tie_word_embeddings=True, **WIDE).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(autouse=True)
def no_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if glibc were told to keep nothing back: what it keeps is no round number."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")


def settings_of(model: Path, method: str = "dpo", **given: Any) -> tuple[Method, RunSettings]:
    kind = method_named(method)
    fixed = {"model": str(model), "data": ["x.jsonl"], "out": "out", "precision": "float32", "max_length": 256}
    settings = check(settings_for(kind), fixed | given)
    return kind(own_settings(kind, settings)), settings


def parts(model: Path, positions: int = 1000, method: str = "dpo", processes: int = 1, **given: Any) -> dict[str, int]:
    """Bytes of each part that is not empty, by the first words of its name."""
    estimate = estimate_memory(*settings_of(model, method, **given), positions=positions, device=CPU, num_processes=processes)
    return {part.name: part.num_bytes for part in estimate.parts if part.num_bytes}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a model of 172 million weights; there is no more to it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 32000}
    folder = tmp_path_factory.mktemp("big")
    AutoConfig.for_model("llama", tie_word_embeddings=False, **sizes).save_pretrained(folder)
    return folder


NUM_BIG = 2 * 32000 * 1024 + 8 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 1024


def num_weights(model: MakeModel) -> int:
    return sum(parameter.numel() for parameter in model("llama", tie_word_embeddings=True, **WIDE).parameters())


def test_weights_gradients_and_moments_are_four_float32_numbers_per_weight(model: Path, make_model: MakeModel):
    found, num = parts(model), num_weights(make_model)
    assert found["trained weights"] == 4 * num
    assert found["gradients"] == 4 * num
    assert found["AdamW's moments"] == 8 * num
    assert "the reference model" not in found


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_an_adapter_leaves_the_weights_frozen_in_their_own_type(model: Path, make_model: MakeModel):
    num = num_weights(make_model)
    wrapped = get_peft_model(make_model("llama", tie_word_embeddings=True, **WIDE), LoraConfig(r=4, target_modules="all-linear"))
    num_adapter = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    for precision, width, per_weight in (("float32", "float32", 4), ("bf16", "bf16", 2)):
        found = parts(model, lora_rank=4, precision=precision)
        assert found["trained weights"] == 4 * num_adapter
        assert found["AdamW's moments"] == 8 * num_adapter
        assert found[f"frozen weights ({width})"] == pytest.approx(per_weight * num, abs=1000)  # and tables of positions


def test_a_reference_in_memory_is_a_second_model_but_where_the_adapter_can_be_switched_off(model: Path, make_model: MakeModel):
    num = num_weights(make_model)
    assert parts(model, reference_cache=False)["the reference model"] == pytest.approx(4 * num, abs=1000)
    assert "the reference model" not in parts(model, reference_cache=False, lora_rank=4)
    assert parts(model, reference_cache=False, lora_rank=4, reference=str(model))["the reference model"] == pytest.approx(4 * num, abs=1000)
    assert "the reference model" not in parts(model, method="sft")


@pytest.mark.parametrize("sharing", ["flat", "plain"])
@pytest.mark.parametrize("recomputing", [0, 4, None])
def test_a_traced_step_takes_what_a_real_one_takes(make_model: MakeModel, tmp_path: Path, sharing: Any, recomputing: int | None):
    deep = make_model("qwen3", head_dim=8, **(WIDE | {"num_hidden_layers": 11}))  # more layers than are run
    deep.save_pretrained(tmp_path)
    settings = ModelSettings(model=str(tmp_path), sharing=sharing)
    lengths = (100, 100, 97)  # so that there is padding, as there mostly is
    load = Load({"flat": 6 * 297, "plain": 6 * 400}[sharing], lengths, False, recomputing, "cpu", False)
    step = trace_step(settings, choose_precision("float32", CPU, adapter=False), load, depth=11)
    if recomputing != 0:
        checkpoint_activations(deep, recomputing)
    policy = Policy(deep.train(), EnginePath(sharing, HeadShape()))
    ids = [token_ids([1] * length) for length in lengths]
    batch = pack([PromptTree(ids[0], (Completion(ids[1]), Completion(ids[2])))] * 6, sharing=sharing)
    real = _micro_batch(policy, batch, None, [*policy.parameters(), *policy.buffers()], False)
    assert step.peak == pytest.approx(real.peak, rel=0.03)
    assert step.gradients == sum(parameter.grad.nbytes for parameter in deep.parameters() if parameter.grad is not None)


def test_in_a_step_of_several_micro_batches_gradients_are_there_while_the_later_ones_run(model: Path):
    settings = ModelSettings(model=str(model))
    load = Load(600, (50, 50, 50), False, 0, "cpu", False)
    precision = choose_precision("float32", CPU, adapter=False)
    once, several = (trace_step(settings, precision, replace(load, accumulates=flag), depth=3) for flag in (False, True))
    assert once.peak < several.peak <= once.peak + once.gradients


def test_a_long_row_takes_in_proportion(model: Path, monkeypatch: pytest.MonkeyPatch):
    settings = ModelSettings(model=str(model))
    precision = choose_precision("float32", CPU, adapter=False)
    load = Load(4800, (50, 50, 50), True, 0, "cpu", False)
    whole = trace_step(settings, precision, load, depth=3).peak
    monkeypatch.setattr("prefopt.training.memory.trace.MOST", 2400)
    assert trace_step(settings, precision, load, depth=3).peak == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_rule_of_thumb_is_near_what_is_counted(model: Path, precision: str, checkpointing: bool):
    method, settings = settings_of(model, precision=precision, gradient_checkpointing=checkpointing)
    exact, rough = (estimate_memory(method, settings, positions=4000, device=CPU, exact=exact).total for exact in (True, False))
    assert rough == pytest.approx(exact, rel=0.5)


def test_an_architecture_that_does_not_run_without_weights_gets_the_rule_of_thumb(make_model: MakeModel, tmp_path: Path):
    make_model("mixtral", num_local_experts=4, num_experts_per_tok=2, **WIDE).save_pretrained(tmp_path)
    settings = ModelSettings(model=str(tmp_path))
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever a tensor without numbers raises when it is asked for them)
        trace_step(settings, choose_precision("float32", CPU, adapter=False), Load(600, (50, 50, 50), True, 0, "cpu", False), depth=3)
    kept, feed_forward = 1000 * 3 * 4 * (16 * 64 + 4 * 2 * 128), 4 * 4 * 1000 * 2 * 128
    head = 3 * 4 * 1000 * 384 + 4 * 384 * 64
    assert parts(tmp_path)["activations of 1,000 positions"] == kept + max(feed_forward, head)


def test_fsdp_shares_what_is_certain_and_gathers_a_layer_at_a_time(model: Path, make_model: MakeModel):
    num = num_weights(make_model)
    found = parts(model, parallel="fsdp", processes=4)
    assert found["trained weights"] == num
    assert found["AdamW's moments"] == 2 * num
    embeddings = 4 * 384 * 64 + 4 * 64  # the last norm is no layer's either
    assert found["gathered weights"] == pytest.approx(embeddings + 2 * (4 * num - embeddings) / 3, abs=200)  # tables of positions
    assert estimate_memory(*settings_of(model, parallel="fsdp"), positions=10, device=CPU, num_processes=64).loading >= 4 * num
    assert parts(model, parallel="ddp", processes=4)["trained weights"] == 4 * num


def test_the_heap_keeps_back_what_small_tensors_leave_unless_glibc_is_told_not_to(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefopt.training.memory.heap.sys.platform", "linux")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert parts(model)["holes in the heap"] > 0
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    assert "holes in the heap" not in parts(model)


@pytest.mark.parametrize(("onednn", "torch_s", "kernels"), [("32", "32", 32), ("8", "128", 128), ("0", "0", 0), ("", "16", None)])
def test_as_many_kernels_are_counted_as_the_environment_lets_the_libraries_keep(
    model: Path, onednn: str, torch_s: str, kernels: int | None, monkeypatch: pytest.MonkeyPatch
):
    """The greater of both; what is not said is as `prefopt.machine` sets it. In float32 there are none."""
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", onednn)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", torch_s)
    count = max(16, int(ENVIRONMENT["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])) if kernels is None else kernels
    assert parts(model, precision="bf16")["kernels and caches"] == LIBRARIES + count * KERNEL
    assert parts(model, precision="float32")["kernels and caches"] == LIBRARIES


def test_the_parts_as_people_read_them(model: Path):
    lines = estimate_memory(*settings_of(model), positions=1000, device=CPU).lines()
    assert lines[0].startswith("trained weights ")
    assert lines[-1].startswith("in all")
    assert len({len(line) for line in lines}) == 1


def test_sizes():
    assert [size(value) for value in (0, 1_500_000, 999_000_000, 12_340_000_000)] == ["0 MB", "2 MB", "999 MB", "12.3 GB"]


def checked(model: Path, num_bytes: int, *, device: torch.device = CPU, processes: int = 1, **given: Any) -> MemoryCheck:
    method, settings = settings_of(model, **given)
    return MemoryCheck(method, settings, processes, device, Available(num_bytes, "of this machine"))


def test_a_run_whose_weights_gradients_and_moments_do_not_fit_is_refused_with_what_helps(big: Path):
    needed = 16 * NUM_BIG
    checked(big, needed, max_tokens=512).refuse()
    with pytest.raises(RunError) as found:
        checked(big, needed - 1, max_tokens=512).refuse()
    text = str(found.value)
    assert f"needs at least {size(needed)} of memory, and {size(needed - 1)} of this machine are free (trained weights" in text
    assert "--lora-rank 16: " in text
    assert "--gradient-checkpointing on: " in text
    assert "--max-tokens 256: " in text
    assert "--memory-check off" in text
    assert "fsdp" not in text  # processes on one machine share its memory


def test_remedies_stand_in_the_order_of_their_effect_and_say_which_of_them_fits(big: Path):
    low = checked(big, 10**5, max_tokens=4096)
    lines = [line.strip() for line in low._advice(Micro(4096)).split("\n  ")[1:]]
    assert {line.split(":")[0] for line in lines[:3]} == {"--lora-rank 16", "--gradient-checkpointing on", "--max-tokens 2048"}
    totals = [float(line.split(": ")[1].split(" ")[0]) for line in lines[:3]]
    assert totals == sorted(totals)
    assert lines[3].startswith("all of them: ")
    assert float(lines[3].split(": ")[1].split(" ")[0]) < totals[0]
    assert not any("which fits" in line for line in lines)
    total = low.estimate(Micro(4096), gradient_checkpointing="on").total
    assert "--gradient-checkpointing on: " + size(total) + ", which fits" in checked(big, total, max_tokens=4096)._advice(Micro(4096))


def test_each_remedy_is_named_only_where_it_is_one(model: Path):
    def names(device: torch.device = CPU, positions: int = 4096, **given: Any) -> list[str]:
        low = checked(model, 10**5, device=device, **given)
        return [words for words, *_ in low._remedies(Micro(positions))]

    assert names() == ["--lora-rank 16", "--gradient-checkpointing on", "--max-tokens 2048"]
    assert names(lora_rank=8, gradient_checkpointing=True, positions=300) == ["--precision bf16", "--load-in-4bit on"]
    assert names(reference_cache=False, lora_rank=8, precision="bf16", gradient_checkpointing=True, positions=300) == [
        "--load-in-4bit on",
        "--reference-cache on",
    ]


def test_several_gpus_are_proposed_as_many_as_it_takes(big: Path):
    alone = MemoryCheck(*settings_of(big), 1, torch.device("cuda"), Available(3 * 10**9, "of a GPU"))
    found = next(remedy for remedy in alone._remedies(Micro(300)) if "fsdp" in remedy[0])
    count = found[3]
    assert found[0] == f"--parallel fsdp on {count} GPUs"
    assert count is not None
    assert (
        alone.estimate(Micro(300), count, parallel="fsdp").total
        <= 3 * 10**9
        < alone.estimate(Micro(300), count // 2, parallel="fsdp").total
    )
    hopeless = MemoryCheck(*settings_of(big), 1, torch.device("cuda"), Available(10**6, "of a GPU"))
    assert not [remedy for remedy in hopeless._remedies(Micro(300)) if "fsdp" in remedy[0]]


def trees(num: int, length: int) -> list[PromptTree]:
    ids = token_ids([1] * length)
    return [PromptTree(ids, (Completion(ids), Completion(ids)))] * num


def note(check: MemoryCheck, examples: list[PromptTree], sharing: Any) -> str | None:
    return check.note(check.largest_micro_batch(examples, sharing))


def test_where_activations_are_what_may_not_fit_the_run_is_only_warned(model: Path, monkeypatch: pytest.MonkeyPatch):
    check_of = checked(model, 10**12, batch_size=8)
    total = check_of.estimate(check_of.largest_micro_batch(trees(20, 50), "flat")).total
    assert note(checked(model, total, batch_size=8), trees(20, 50), "flat") is None
    found = note(checked(model, total - 1, batch_size=8), trees(20, 50), "flat")
    assert found is not None
    assert found.startswith(f"note: memory may run out: the run may need {size(total)} (")
    assert "activations of 1,200 positions" in found
    assert "--gradient-checkpointing on: " in found
    monkeypatch.setattr(MemoryCheck, "_advice", lambda *_: "")  # it counts a step for each remedy; what follows asks for the cause only
    mixed = [*trees(19, 10), *trees(1, 500)]  # the longest example has a micro-batch to itself
    assert "activations of 1,500 positions" in (note(checked(model, 10**5, batch_size=1), mixed, "flat") or "")
    assert "activations of 800 positions" in (note(checked(model, 10**5, batch_size=8), trees(20, 25), "plain") or "")
    assert "activations of 600 positions" in (note(checked(model, 10**5, batch_size=8, processes=2), trees(20, 50), "flat") or "")


def test_a_micro_batch_is_known_by_its_positions_its_lengths_and_whether_others_follow(model: Path):
    check_of = checked(model, 10**12, batch_size=8, max_tokens=1000)
    assert check_of.largest_micro_batch(trees(20, 50), "flat") == Micro(600, (50, 50, 50), accumulates=True)  # 1,200 in two even rows
    assert check_of.largest_micro_batch(trees(20, 20), "flat") == Micro(480, (20, 20, 20), accumulates=False)


def test_a_run_that_cannot_fit_does_not_load_its_model(model: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: Available(1_000_000, "of this machine"))
    with pytest.raises(RunError, match="the run needs at least"):  # the folder holds no weights: reading them would be another error
        run("dpo", model, pairs, tmp_path / "out", memory_check=True)


def test_the_check_can_be_switched_off_and_leaves_mistakes_to_who_loads_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "available_memory", lambda device: Available(10, "of this machine"))
    assert check_memory(*settings_of(model, memory_check=False), ALONE) is None
    (tmp_path / "config.json").write_text("{}")
    assert check_memory(*settings_of(tmp_path), ALONE) is None
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    assert check_memory(*settings_of(model), ALONE) is None


CUDA_TEXT = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.06 GiB is free."
CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000000 bytes."
)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError(CUDA_TEXT), True),
        (RuntimeError(CPU_TEXT), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("CUDA out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_counts_as_running_out(error: BaseException, is_one: bool):
    assert is_out_of_memory(error) is is_one


def words_of(error: BaseException, settings: RunSettings, longest: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(out_of_memory, "in_use", lambda device: "the run held 78.3 GB of the 85.1 GB of a GPU")
    with (
        pytest.raises(RunError) as found,
        explaining_out_of_memory(
            settings,
            doing=lambda: "in step 12 of 100",
            device=torch.device("cuda"),
            advice=lambda: "The last checkpoint is as it was: go on with the same command and --resume.",
            longest=longest,
        ),
    ):
        raise error
    assert found.value.__cause__ is None
    return str(found.value)


def test_the_error_says_where_how_much_what_to_lower_and_that_nothing_is_lost(model: Path, monkeypatch: pytest.MonkeyPatch):
    _, settings = settings_of(model, max_tokens=8192)
    text = words_of(torch.OutOfMemoryError(CUDA_TEXT), settings, 900, monkeypatch)
    assert text.startswith(
        "memory ran out in step 12 of 100: the run held 78.3 GB of the 85.1 GB of a GPU, and 1.6 GB more were asked for. "
        "Lower max_tokens from 8192 to 4096; results do not depend on it, and a run may be resumed with it."
    )
    assert "--gradient-checkpointing on" in text
    assert "--lora-rank 16" in text
    assert "--parallel fsdp" in text
    assert text.endswith("The last checkpoint is as it was: go on with the same command and --resume.")


def test_max_tokens_is_lowered_to_the_largest_example_and_not_below(model: Path, monkeypatch: pytest.MonkeyPatch):
    _, settings = settings_of(model, max_tokens=1000, gradient_checkpointing=True, lora_rank=4, parallel="fsdp")
    assert "from 1000 to 900;" in words_of(RuntimeError(CPU_TEXT), settings, 900, monkeypatch)
    text = words_of(RuntimeError(CPU_TEXT), settings, 1000, monkeypatch)
    assert "and 40.0 GB more were asked for" in text
    assert "the largest example takes 1000 of them" in text
    assert "A lower max_length" in text
    for setting in ("--gradient-checkpointing", "--lora-rank", "fsdp"):
        assert setting not in text
    assert "max_tokens" not in words_of(MemoryError(), settings, None, monkeypatch)


def test_other_errors_pass(model: Path):
    _, settings = settings_of(model)
    with pytest.raises(ZeroDivisionError), explaining_out_of_memory(settings, doing=str, device=CPU, advice=str):
        raise ZeroDivisionError


def test_what_this_process_holds():
    words = out_of_memory.in_use(CPU)
    assert words.startswith("this process held ")
    assert words.endswith("MB of the machine's memory") or "GB of the machine's memory" in words


CHILD = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
import prefopt.training.run
from prefopt.errors import RunError
from tests.training.runs import run
from transformers import AutoConfig
from pathlib import Path
warm = run("dpo", sys.argv[2], sys.argv[3], Path(sys.argv[4]) / "warm", samples=0, report=False)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 48 * 2**20, held + 48 * 2**20))
try:
    run("dpo", sys.argv[2], sys.argv[5], Path(sys.argv[4]) / "out", samples=0, report=False, memory_check=False, save_every_steps=1,
        max_length=4096, max_tokens=200_000, batch_size=64, epochs=1)
except RunError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on address space is Linux's")
def test_a_run_whose_memory_really_runs_out_ends_with_what_to_lower(make_model: MakeModel, chat_tokenizer: Any, pairs: str, tmp_path: Path):
    make_model("llama", **WIDE).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    from tests.training.runs import write_rows

    long = [{"prompt": f"{row} good " * 60, "chosen": " yes" * 100, "rejected": " no" * 100} for row in range(64)]
    data = write_rows(tmp_path / "long.jsonl", long)
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", CHILD, root, str(tmp_path / "model"), pairs, str(tmp_path), data],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("memory ran out"), found.stdout
    assert "more were asked for" in found.stdout
    assert "--gradient-checkpointing on" in found.stdout
