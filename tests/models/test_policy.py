"""The policy: the same numbers as the model's own forward, whatever is switched on, and however trees are packed."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.models.architectures import (
    VOCABULARY,
    gradients_of,
    one_thread,
    pairs,
    plain_logps,
    relative_differences,
    tiny_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.engine.attention import TREE_ATTENTION
from prefopt.engine.batch import Sharing, pack
from prefopt.engine.head import HeadShape
from prefopt.engine.logps import TokenLogps
from prefopt.errors import ModelError
from prefopt.models.policy import EnginePath, Policy, decoder_of, no_dropout, plain_head_of, set_attention, trained_parameters
from prefopt.models.proof import prove
from prefopt.trees import Completion, PromptTree, token_ids

SHARING: list[Sharing] = ["flat", "plain"]
CHUNKED, OWN = HeadShape(), None
PATHS = [EnginePath(sharing, head) for sharing in SHARING for head in (CHUNKED, OWN)]


# transformers 5.23 has a new name for it, which neither older versions nor peft know.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def run(policy: Policy, trees: tuple[PromptTree, ...] | None = None, *, extras: bool = False) -> TokenLogps:
    return policy(pack(trees or pairs(), sharing=policy.path.sharing), extras=extras)


def pull(sums_C: Tensor) -> Tensor:
    """A loss in which every completion counts differently."""
    return (sums_C * torch.linspace(-1, 1.5, len(sums_C), dtype=sums_C.dtype)).sum()


def plain_sums(model: PreTrainedModel | PeftModel, trees: tuple[PromptTree, ...] | None = None) -> Tensor:
    """The stock forward, completion by completion."""
    return torch.stack([plain_logps(model, tree, completion) for tree in trees or pairs() for completion in tree.completions])


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert {name: difference for name, difference in relative_differences(found, expected).items() if not difference < bound} == {}


def close(found: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= bound * expected.norm()


def rows() -> list[tuple[Tensor, int]]:
    """Each prompt with a completion as a row of its own, and the prompt's length."""
    branches = [(tree.prompt_ids.tolist(), completion.ids.tolist()) for tree in pairs() for completion in tree.completions]
    return [(torch.tensor([[*prompt, *ids]]), len(prompt)) for prompt, ids in branches]


# Ways to run


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_and_untied_heads(path: EnginePath, tied: bool):
    model = tiny_model("llama", tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    expected = plain_sums(model)
    expected_gradients = gradients_of(model, pull(expected))
    found = run(Policy(model, path)).sum()
    close(found, expected)
    same_gradients(gradients_of(model, pull(found)), expected_gradients)


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi", "gpt_oss", "bloom", "bamba", "falcon"])
def test_own_head_equals_chunked_head(name: str):
    model = tiny_model(name)
    path = prove(model, max_length=64).path
    if path.sharing == "fork":  # its head always runs apart
        path = replace(path, sharing="plain")
    assert path.chunked_head is not None
    chunked = run(Policy(model, path), extras=True)
    gradients = gradients_of(model, pull(chunked.sum()))
    own = run(Policy(model, replace(path, chunked_head=None)), extras=True)
    for name in ("values_N", "entropy_N", "log_sum_squares_N"):
        close(getattr(own, name), getattr(chunked, name))
    same_gradients(gradients_of(model, pull(own.sum())), gradients)


def test_a_flat_row_whose_layout_is_lost_on_the_way_is_an_error():
    """mamba2 hands keywords on from its decoder, not from the model with its head; it has no attention that would miss them."""
    policy = Policy(tiny_model("mamba2"), EnginePath("flat", OWN))
    with pytest.raises(ValueError, match="a layer with a state was called without tree_layout"):
        run(policy)


def test_own_head_runs_where_something_is_predicted_only():
    model = tiny_model("qwen2")
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(tuple(logits.shape)))
    scored = np.array([False] * 6 + [True, True])
    tree = PromptTree(token_ids(range(5, 25)), (Completion(token_ids(range(30, 38)), scored=scored), Completion(token_ids([40]))))
    run(Policy(model, EnginePath("flat", OWN)), (tree,))
    assert seen == [(1, 3, VOCABULARY)]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_extras_are_those_of_the_predicting_distributions(path: EnginePath):
    model = tiny_model("qwen2")
    all_logps = torch.cat([model(input_ids=row, use_cache=False).logits[0, prompt - 1 : -1].log_softmax(-1) for row, prompt in rows()])
    found = run(Policy(model, path), extras=True)
    assert found.entropy_N is not None
    assert found.log_sum_squares_N is not None
    close(found.entropy_N, -(all_logps.exp() * all_logps).sum(-1))
    close(found.log_sum_squares_N, all_logps.exp().square().sum(-1).log())
    assert not found.log_sum_squares_N.requires_grad

    without = run(Policy(model, path))
    assert (without.entropy_N, without.log_sum_squares_N, without.scalar_T) == (None, None, None)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_scalar_head_reads_every_position(name: str, path: EnginePath):
    model = tiny_model(name)
    decoder, scalar_head = decoder_of(model), nn.Linear(32, 1)
    assert decoder is not None
    with torch.no_grad():
        scalar_head.weight.copy_(torch.linspace(-1, 1, 32))
    # Completion by completion: the value at each of its tokens.
    expected = [scalar_head(decoder(input_ids=row, use_cache=False).last_hidden_state)[0, prompt:, 0] for row, prompt in rows()]

    batch = pack(pairs(), sharing=path.sharing)
    scalars = Policy(model, path, scalar_head=scalar_head)(batch).scalar_T
    assert scalars is not None
    assert scalars.shape == (batch.num_tokens,)
    ends = zip(batch.last_C.tolist(), batch.completions, strict=True)
    found = [scalars[last + 1 - len(completion.ids) : last + 1] for last, completion in ends]
    close(torch.cat(found), torch.cat(expected), 1e-5)
    close(scalars[batch.last_C], torch.stack([values[-1] for values in expected]), 1e-5)
    weights = list(scalar_head.parameters())
    found_gradients, expected_gradients = (torch.autograd.grad(torch.cat(parts).sum(), weights) for parts in (found, expected))
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_scored_tokens_of_a_prompt(path: EnginePath):
    model = tiny_model("qwen2")
    scored = np.array([False, True, False, True, True])
    tree = PromptTree(token_ids([5, 6, 7, 8, 9]), tuple(Completion(token_ids(ids)) for ids in ([11, 12], [13])), prompt_scored=scored)
    all_logps = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    found = run(Policy(model, path), (tree,))
    close(found.prompt_sum(), (all_logps[0, 6] + all_logps[2, 8] + all_logps[3, 9])[None])
    assert found.lengths_C.tolist() == [2, 1]


# Gradient checkpointing


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_oss", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name: str, sharing: Sharing):
    model = tiny_model(name)
    no_dropout(model)
    path = replace(prove(model, max_length=64).path, sharing=sharing)
    model.train()
    policy = Policy(model, path)
    calls: list[int] = []
    first_mlp = next(module for module_name, module in model.named_modules() if module_name.endswith(".mlp"))
    first_mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    off = run(policy).sum()
    off_gradients = gradients_of(model, pull(off))
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    on = run(policy).sum()
    on_gradients = gradients_of(model, pull(on))
    assert len(calls) == 3  # forward, and once more in backward: it was on
    assert on.tolist() == off.tolist()
    same_gradients(on_gradients, off_gradients, 1e-6)


# Adapters


def with_adapter(model: PreTrainedModel, target_modules: list[str]) -> PeftModel:
    """Adapters that do something: both of their matrices are random."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, init_lora_weights=False))
    assert isinstance(peft, PeftModel)
    return peft.eval()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_adapter_on_equals_the_stock_forward_and_off_is_bit_equal_to_the_base(path: EnginePath):
    base = tiny_model("qwen2")
    before = run(Policy(base, path)).values_N
    set_attention(base, None)

    peft = with_adapter(base, ["q_proj", "v_proj", "down_proj"])
    expected = plain_sums(peft)
    trained = dict(trained_parameters(peft))
    assert all("lora_" in name for name in trained)
    expected_gradients = torch.autograd.grad(pull(expected), list(trained.values()))

    inner = peft.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    policy = Policy(inner, path)
    found = run(policy)
    close(found.sum(), expected)
    for one, other in zip(torch.autograd.grad(pull(found.sum()), list(trained.values())), expected_gradients, strict=True):
        close(one, other, 1e-5)
    assert (found.values_N - before).abs().max() > 0.1  # it does something
    with peft.disable_adapter():
        assert run(policy).values_N.tolist() == before.tolist()
    assert run(policy).values_N.tolist() == found.values_N.tolist()


@pytest.mark.parametrize("sharing", SHARING)
def test_adapter_on_the_head_is_never_left_out(sharing: Sharing):
    peft = with_adapter(tiny_model("qwen2"), ["q_proj", "lm_head"])
    expected = plain_sums(peft)
    inner = peft.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    assert plain_head_of(inner) is None
    with pytest.raises(ModelError, match="use its own head"):
        Policy(inner, EnginePath(sharing, CHUNKED))
    path = prove(inner, max_length=64, sharing=sharing).path
    assert path == EnginePath(sharing, None)
    policy = Policy(inner, path)
    close(run(policy).sum(), expected)
    trained = [parameter for name, parameter in trained_parameters(peft) if "lm_head" in name]
    assert len(trained) == 2
    assert all(gradient.norm() > 0 for gradient in torch.autograd.grad(pull(run(policy).sum()), trained))


# Packing


def forest() -> tuple[PromptTree, ...]:
    """Seven trees of one to four completions, some of whose tokens are not scored, some with scored prompts."""
    rng = np.random.default_rng(0)

    def completion() -> Completion:
        ids = token_ids(rng.integers(3, VOCABULARY, rng.integers(1, 9)).tolist())
        return Completion(ids, scored=rng.random(len(ids)) < 0.7 if rng.random() < 0.5 else None)

    trees: list[PromptTree] = []
    for num_completions in (2, 1, 4, 2, 3, 2, 1):
        prompt = token_ids(rng.integers(3, VOCABULARY, rng.integers(1, 10)).tolist())
        prompt_scored = None if rng.random() < 0.5 else np.array([False, *(rng.random(len(prompt) - 1) < 0.5)])
        trees.append(PromptTree(prompt, tuple(completion() for _ in range(num_completions)), prompt_scored=prompt_scored))
    return tuple(trees)


def in_batches(policy: Policy, batches: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Forest trees, cut into these batches: sums in the forest's order, and the gradient of a loss of all of them."""
    trees = forest()
    sums: dict[int, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for members in batches:
        logps = run(policy, tuple(trees[member] for member in members))
        per_tree = logps.sum().split([len(trees[member].completions) for member in members])
        for member, sums_K, prompt_sum in zip(members, per_tree, logps.prompt_sum(), strict=True):
            sums[member] = torch.cat([sums_K, prompt_sum[None]])
            total = total + (1 + member) * (sums_K.square().sum() + prompt_sum)
    return torch.cat([sums[member] for member in range(len(trees))]).detach(), gradients_of(policy.model, total)


# Layer norms of other architectures compute in float32 whatever the weights are; these keep float64 all through.
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_neither_order_nor_composition_of_batches_nor_the_way_changes_anything(name: str):
    policy = Policy(tiny_model(name, dtype=torch.float64), PATHS[0])
    together, gradients = in_batches(policy, [[0, 1, 2, 3, 4, 5, 6]])
    assert together.dtype == torch.float64
    for path in PATHS:
        policy.use_path(path)
        for batches in ([[0, 1, 2, 3, 4, 5, 6]], [[6, 3, 0, 5, 1, 4, 2]], [[0], [1], [2], [3], [4], [5], [6]], [[4, 1], [6, 0, 2], [5, 3]]):
            found, found_gradients = in_batches(policy, batches)
            close(found, together, 1e-12)
            same_gradients(found_gradients, gradients, 1e-12)


@pytest.mark.parametrize("sharing", SHARING)
def test_masked_tokens_count_as_absent(sharing: Sharing):
    model = tiny_model("gpt_neox", dtype=torch.float64)
    policy = Policy(model, EnginePath(sharing, CHUNKED))
    prompt = token_ids([5, 6, 7])
    end_masked = Completion(token_ids([11, 12, 13, 14]), scored=np.array([True, True, False, False]))
    cut = Completion(token_ids([11, 12]))
    nothing = Completion(token_ids([21, 22]), scored=np.array([False, False]))
    one, other = (run(policy, (PromptTree(prompt, (completion,)),)) for completion in (end_masked, cut))
    close(one.values_N, other.values_N, 1e-12)
    close(one.mean(), other.mean(), 1e-12)
    other_gradients = gradients_of(model, other.mean().sum())
    same_gradients(gradients_of(model, one.mean().sum()), other_gradients, 1e-12)
    with_nothing = run(policy, (PromptTree(prompt, (cut, nothing)),))
    assert with_nothing.mean()[1].item() == 0
    same_gradients(gradients_of(model, with_nothing.mean().sum()), other_gradients, 1e-12)

    # A mask in the middle picks tokens out of the same distribution: context is read all the same.
    every = run(policy, (PromptTree(prompt, (Completion(token_ids([11, 12, 13, 14])),)),))
    middle = run(policy, (PromptTree(prompt, (Completion(token_ids([11, 12, 13, 14]), scored=np.array([True, False, False, True])),)),))
    close(middle.values_N, every.values_N[[0, 3]], 1e-12)


def test_nothing_scored_gives_zeros():
    tree = PromptTree(token_ids([5]), (Completion(token_ids([6]), scored=np.array([False])),))
    for path in PATHS:
        model = tiny_model("gpt2")
        found = run(Policy(model, path), (tree,))
        assert found.sum().tolist() == found.mean().tolist() == [0]
        assert all(bool((gradient == 0).all()) for gradient in gradients_of(model, found.sum().sum()).values())


@pytest.mark.parametrize("sharing", SHARING)
def test_a_batch_packed_for_the_other_way_is_refused(sharing: Sharing):
    policy = Policy(tiny_model("gpt2"), EnginePath(sharing, CHUNKED))
    other: Sharing = "plain" if sharing == "flat" else "flat"
    with pytest.raises(ValueError, match=f"the batch is packed {other}, the policy runs {sharing}"):
        policy(pack(pairs(), sharing=other))


# Generating


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_generating_gives_the_stock_model_and_restores_everything(training: bool, sharing: Sharing, attention: str):
    prompt = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    stock = tiny_model("qwen2").generate(prompt, **options)
    model = tiny_model("qwen2")
    model.set_attn_implementation(attention)
    policy = Policy(model, EnginePath(sharing, CHUNKED))
    before = run(policy).values_N
    implementation = model.config._attn_implementation
    assert (implementation == TREE_ATTENTION) == (sharing == "flat")
    model.train(training)
    for failing in (False, True):
        with pytest.raises(RuntimeError, match="stop here") if failing else nullcontext(), policy.generating() as ready:
            assert ready is model
            assert not ready.training
            assert not torch.is_grad_enabled()
            assert ready.config._attn_implementation in ("eager", "sdpa")
            assert ready.generate(prompt, **options).tolist() == stock.tolist()
            if failing:
                raise RuntimeError("stop here")
        assert model.training == training
        assert torch.is_grad_enabled()
        assert model.config._attn_implementation == implementation
        assert run(policy).values_N.tolist() == before.tolist()


# The rest


def test_no_dropout_makes_training_the_same_as_evaluation():
    model = tiny_model("gpt2", attn_pdrop=0.3, embd_pdrop=0.3, resid_pdrop=0.3)
    policy = Policy(model, EnginePath("plain", CHUNKED))
    quiet = run(policy).values_N
    model.train()
    assert (run(policy).values_N - quiet).abs().max() > 0.1
    no_dropout(model)
    assert model.training
    assert run(policy).values_N.tolist() == quiet.tolist()


def test_no_dropout_reaches_attention_that_keeps_its_rate_as_a_number():
    model = tiny_model("llama", attention_dropout=0.5)
    policy = Policy(model, EnginePath("plain", CHUNKED))
    quiet = run(policy).values_N
    model.train()
    assert (run(policy).values_N - quiet).abs().max() > 0.1
    no_dropout(model)
    assert run(policy).values_N.tolist() == quiet.tolist()


def test_another_path_from_now_on():
    model = tiny_model("qwen2")
    policy = Policy(model, EnginePath("flat", CHUNKED))
    flat = run(policy).sum()
    policy.use_path(EnginePath("plain", CHUNKED))
    assert model.config._attn_implementation != TREE_ATTENTION
    close(run(policy).sum(), flat)
    policy.use_path(EnginePath("flat", OWN))
    assert model.config._attn_implementation == TREE_ATTENTION
    close(run(policy).sum(), flat)


def test_paths_read_well():
    assert [str(path) for path in PATHS] == ["flat, chunked head", "flat, own head", "plain, chunked head", "plain, own head"]


def test_flat_is_refused_where_attention_cannot_be_replaced():
    with pytest.raises(ModelError, match="BloomForCausalLM does not take its attention from outside"):
        Policy(tiny_model("bloom"), EnginePath("flat", CHUNKED))


def test_wrappers_find_no_embeddings_and_the_models_blocks():
    # accelerate and FSDP2 carve the embeddings out of `forward`'s unit where a module shows them.
    model = tiny_model("qwen2")
    policy = Policy(model, PATHS[0])
    assert not hasattr(policy, "get_input_embeddings")
    assert not hasattr(policy, "get_output_embeddings")
    assert policy._no_split_modules == model._no_split_modules


def test_float64_models_give_float64_and_others_float32():
    assert run(Policy(tiny_model("gpt2", dtype=torch.float64), PATHS[0])).values_N.dtype == torch.float64
    for path in PATHS:
        assert run(Policy(tiny_model("gpt2", dtype=torch.bfloat16), path), extras=True).values_N.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_autocast_stays_near_float32(path: EnginePath):
    model = tiny_model("qwen2")
    policy = Policy(model, path)
    exact = run(policy).values_N
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = run(policy).values_N
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.03 * exact.norm()
