"""Nothing that is loaded runs code: weights are safetensors, data is data, templates are in a sandbox.

Each hostile file here would leave a mark if it ran: a file in the test's own folder.
"""

import ast
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file
from tests.hostile import module_that_leaves, poison

import prefopt
from prefopt.config import from_yaml
from prefopt.errors import ModelError, RunError
from prefopt.models.load import LoadedModel, Precision, load_model, load_tokenizer
from prefopt.models.read import read_model
from prefopt.models.save import save_model
from prefopt.models.settings import ModelSettings
from prefopt.training.record.checkpoint import Checkpoints

SOURCES = sorted(Path(prefopt.__file__).parent.rglob("*.py"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Where code leaves its mark if it runs."""
    return tmp_path / "it-ran"


@pytest.fixture
def folder(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of the test's own."""
    return Path(shutil.copytree(model_folder(), tmp_path / "model"))


@pytest.fixture
def adapter(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """An adapter of the model of all tests."""
    save_model(loaded(model_folder(), lora_rank=2), tmp_path / "adapter")
    return tmp_path / "adapter"


def loaded(model: Path | str, **settings: Any) -> LoadedModel:
    return load_model(
        ModelSettings(model=str(model), **settings), precision=Precision(None, torch.float32), device=torch.device("cpu"), seed=0
    )


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Weights.


@pytest.mark.parametrize("also", [[], ["pytorch_model.bin.index.json"], ["training_args.bin", "optimizer.pt", "model.pkl", "model.ckpt"]])
def test_a_pickled_model_is_refused_and_not_opened(folder: Path, mark: Path, also: list[str]):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", *also):
        poison(folder / name, mark)
    if "pytorch_model.bin.index.json" in also:
        shards = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (folder / also[0]).write_text(json.dumps(shards))
    with pytest.raises(
        ModelError, match=r"cannot load a model from .*model.safetensors.*A model folder needs config.json and \*.safetensors"
    ):
        loaded(folder)
    assert not mark.exists()


def test_a_pickle_under_the_name_of_safetensors_is_refused_and_not_opened(folder: Path, mark: Path):
    poison(folder / "model.safetensors", mark)
    with pytest.raises(ModelError, match="cannot load a model from"):
        loaded(folder)
    assert not mark.exists()


def test_pickles_beside_safetensors_are_left_alone(folder: Path, mark: Path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"):
        poison(folder / name, mark)
    assert loaded(folder).model.num_parameters() > 0
    assert not mark.exists()


def test_an_index_that_points_out_of_the_folder_reads_no_pickle_there(folder: Path, mark: Path, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    poison(tmp_path / "evil.bin", mark)
    shards = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "../evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(ModelError, match="cannot load a model from"):
        loaded(folder)
    assert not mark.exists()


@pytest.mark.parametrize("how", ["as model", "as adapter"])
def test_a_pickled_adapter_is_refused_and_not_opened(adapter: Path, model_folder: Callable[..., Path], mark: Path, how: str):
    (adapter / "adapter_model.safetensors").unlink()
    poison(adapter / "adapter_model.bin", mark)
    with pytest.raises(ModelError, match=r"lacks adapter_model.safetensors. Weights are read from safetensors only"):
        loaded(adapter) if how == "as model" else loaded(model_folder(), adapter=str(adapter))
    assert not mark.exists()


def on_the_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, files: Path) -> str:
    """Puts a folder into the cache of the hub's client, under the name of a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(files, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for constant in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(hub_constants, constant, str(cache), raising=False)
    return name


@pytest.fixture
def quiet_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("quiet_hub")
def test_an_adapter_of_the_hub_is_read_from_safetensors_only(
    adapter: Path, model_folder: Callable[..., Path], mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    good = on_the_hub(monkeypatch, tmp_path / "hub", "org/good-adapter", adapter)
    assert not loaded(model_folder(), adapter=good).adapter_is_new
    (adapter / "adapter_model.safetensors").unlink()
    poison(adapter / "adapter_model.bin", mark)
    evil = on_the_hub(monkeypatch, tmp_path / "hub", "org/evil-adapter", adapter)
    with pytest.raises(ModelError, match=r"lacks adapter_model.safetensors. Weights are read from safetensors only"):
        loaded(model_folder(), adapter=evil)
    with pytest.raises(ModelError, match=r"there is no folder org/no-adapter here, and the hub gave no adapter of that name"):
        loaded(model_folder(), adapter="org/no-adapter")
    assert not mark.exists()


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_a_whole_model_is_not_put_into_it_unasked(folder: Path, adapter: Path, mark: Path, weights: str):
    shutil.copy(adapter / "adapter_config.json", folder)
    if weights.endswith(".bin"):
        poison(folder / weights, mark)
    else:
        shutil.copy(adapter / weights, folder)
    with pytest.raises(ModelError, match=r"holds both a whole model \(config.json\) and an adapter"):
        loaded(folder)
    with pytest.raises(ModelError, match=r"holds an adapter. Give the whole model that it belongs to as model, and this as adapter"):
        read_model(str(folder), dtype=torch.float32)
    assert not mark.exists()


def test_a_pickled_checkpoint_is_damage_and_not_opened(tmp_path: Path, mark: Path):
    for name in ("policy.safetensors", "optimizer.safetensors", "state.json", "state.pkl"):
        poison(tmp_path / "step-000002" / name, mark)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(RunError, match="there is no checkpoint to resume from"):
        Checkpoints(tmp_path, keep=2).newest_state()
    assert not mark.exists()


# Code that comes with a model.


@pytest.fixture
def with_code(folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model that can only be loaded by the Python file beside it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoTokenizer": ["evil.EvilTokenizer", None]}
    change_json(folder / "config.json", model_type="evil", architectures=["EvilModel"], auto_map=auto_map)
    change_json(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    (folder / "evil.py").write_text(
        module_that_leaves(mark) + "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


def test_code_that_comes_with_a_model_does_not_run(with_code: Path, mark: Path):
    own_code = "It comes with Python code of its own, which runs only if you set trust_remote_code"
    with pytest.raises(ModelError, match=own_code):
        loaded(with_code)
    with pytest.raises(ModelError, match=own_code):
        read_model(str(with_code), dtype=torch.float32)
    with pytest.raises(ModelError, match=own_code):
        load_tokenizer(ModelSettings(model=str(with_code)))
    assert not mark.exists()


def test_code_that_comes_with_a_model_runs_when_asked_for_by_name_and_this_is_said(with_code: Path, mark: Path):
    with pytest.warns(UserWarning, match=rf"trust_remote_code is on: Python code from {with_code} runs on this machine"):
        model = loaded(with_code, trust_remote_code=True).model
    assert type(model).__name__ == "EvilModel"
    assert mark.exists()


def test_code_beside_a_model_of_a_known_kind_is_passed_over(folder: Path, mark: Path):
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    for name in (
        "evil.py",
        "modeling_llama.py",
        "configuration_llama.py",
        "tokenization_llama.py",
        "__init__.py",
        "setup.py",
        "sitecustomize.py",
    ):
        (folder / name).write_text(module_that_leaves(mark))
    assert type(loaded(folder).model).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


def test_code_that_lies_somewhere_else_is_not_fetched(folder: Path, mark: Path):
    other = "someone/else--evil.Evil"
    change_json(folder / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": other, "AutoConfig": other})
    with pytest.raises(ModelError, match="trust_remote_code"):
        read_model(str(folder), dtype=torch.float32)
    assert not mark.exists()


@pytest.mark.parametrize(
    "asked",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:name"},
        {"_attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"experts_implementation": "someone/kernel"},
    ],
)
def test_a_config_that_asks_for_a_kernel_of_the_hub_is_refused(folder: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("the kernel was fetched")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", fetched, raising=False)
    change_json(folder / "config.json", **asked)
    with pytest.raises(ModelError, match=r"asks for someone/kernel.*, code of the hub that would run on this machine.*trust_remote_code"):
        loaded(folder)


def test_trust_is_a_setting_of_its_own_and_off_unless_given():
    assert ModelSettings(model="m").trust_remote_code is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("EvilModel", "org/model"):
            with pytest.raises(ModelError):
                load_tokenizer(ModelSettings(model=name))


# The source.


def calls(tree: ast.AST) -> Iterator[str]:
    """The dotted name of everything that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.unsafe_load",
}
FORBIDDEN_CALLS |= {
    "yaml.full_load",
    "os.system",
    "os.popen",
    "pd.read_pickle",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "torch.hub", "torch.package"}


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(SOURCES[0].parent)) for path in SOURCES])
def test_the_source_neither_unpickles_nor_runs_text(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not FORBIDDEN_CALLS & set(calls(tree))
    assert not FORBIDDEN_IMPORTS & {part for name in imports(tree) for part in (name, name.partition(".")[0])}


def test_weights_are_asked_for_as_safetensors_wherever_a_model_is_read():
    readers = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and re.search(r"(AutoModel\w*|READERS\[kind\])\.from_pretrained$", ast.unparse(node.func))
    ]
    assert readers
    for node in readers:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}["use_safetensors"] == "True"


def test_yaml_makes_plain_values_only(mark: Path):
    for text in (
        f"a: !!python/object/apply:pathlib.Path.touch [{mark}]",
        "a: !!python/object/new:os.system [x]",
        "!!python/module:os x: 1",
    ):
        with pytest.raises(ValueError, match=r"is not read|could not determine|expected"):
            from_yaml(text)
    assert not mark.exists()


def test_safetensors_with_a_broken_head_is_refused(folder: Path):
    path = folder / "model.safetensors"
    for content in (
        b"",
        b"\xff" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        b"\x02" + b"\0" * 7 + b"{}",
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"cannot load a model from|lacks"):
            read_model(str(folder), dtype=torch.float32)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks"):
        read_model(str(folder), dtype=torch.float32)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
)
def test_a_model_folder_with_a_broken_file_is_loaded_or_refused(folder: Path, name: str, content: bytes):
    (folder / name).write_bytes(content)
    message = None
    try:
        made = loaded(folder)
    except ModelError as error:
        message = str(error)
    assert str(folder) in message if message is not None else made.model.num_parameters() > 0


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\0b", "~nobody-of-that-name/m", "", "https://example.org/m", "org/" + "x" * 300, "-", "..", "a b"]
)
def test_names_that_no_model_has_are_refused(name: str):
    with pytest.raises(ModelError):
        load_tokenizer(ModelSettings.model_construct(model=name, trust_remote_code=False))


@pytest.mark.parametrize("base", [3, [], {}, True, ["a"]])
def test_an_adapter_whose_base_is_no_name_is_refused(adapter: Path, base: Any):
    change_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ModelError, match=r"adapter_config.json cannot be read|does not name its base model"):
        loaded(adapter)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_proj", "nope"]}, "target_modules: the model has no module nope. Linear layers of this model: down_proj,"),
        ({"modules_to_save": ["nope"]}, "modules_to_save: the model has no module nope"),
        ({"modules_to_save": ["proj"]}, "modules_to_save: the model has no module proj"),
        ({"lora_rank": 10**12}, "an adapter of rank 1000000000000 has no room in memory"),
    ],
)
def test_a_module_that_the_model_does_not_have_and_a_rank_without_end_are_told(
    model_folder: Callable[..., Path], settings: dict[str, Any], says: str
):
    with pytest.raises(ModelError) as caught:
        loaded(model_folder(), **({"lora_rank": 2} | settings))
    assert says in str(caught.value)
