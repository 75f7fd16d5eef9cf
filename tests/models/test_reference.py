"""Every reference gives what the policy was before training, whatever training did since."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.head import HeadShape
from prefopt.engine.logps import TokenLogps
from prefopt.errors import DataError
from prefopt.models.load import LoadedModel, Precision, load_model
from prefopt.models.policy import EnginePath, Policy, trained_parameters
from prefopt.models.reference import (
    START_ADAPTER,
    AdapterOff,
    CachedReference,
    DataReference,
    FrozenAdapter,
    FrozenCopy,
    completion_keys,
    data_has_reference,
    prompt_key,
    split_by_key,
)
from prefopt.models.save import save_model
from prefopt.models.settings import ModelSettings
from prefopt.trees import Completion, PromptTree, TokenIds, token_ids

FLAT = EnginePath("flat", HeadShape())
OWN_HEAD = EnginePath("flat", None)
FLOAT32 = Precision(None, torch.float32)


def draw(rng: np.random.Generator, length: int) -> TokenIds:
    return token_ids(rng.integers(4, 380, length))


def trees(num: int = 4, seed: int = 0) -> list[PromptTree]:
    rng = np.random.default_rng(seed)
    return [
        PromptTree(draw(rng, rng.integers(2, 12)), (Completion(draw(rng, rng.integers(1, 9))), Completion(draw(rng, rng.integers(1, 9)))))
        for _ in range(num)
    ]


def masked_trees() -> list[PromptTree]:
    """A mask inside a completion, a scored prompt, both, neither, and three completions."""
    rng = np.random.default_rng(1)
    mask = np.array([True, False, True, False, True])
    prompt_mask = np.array([False, True, False, True, True, False])
    return [
        PromptTree(draw(rng, 6), (Completion(draw(rng, 5), scored=mask), Completion(draw(rng, 3)))),
        PromptTree(draw(rng, 6), (Completion(draw(rng, 4)), Completion(draw(rng, 5))), prompt_scored=prompt_mask),
        PromptTree(
            draw(rng, 6), (Completion(draw(rng, 5), scored=mask), Completion(draw(rng, 5), scored=~mask)), prompt_scored=prompt_mask
        ),
        PromptTree(draw(rng, 6), (Completion(draw(rng, 2)), Completion(draw(rng, 7)), Completion(draw(rng, 1)))),
    ]


def with_adapter(folder: Path, *, path: EnginePath = FLAT, **settings: object) -> tuple[Policy, LoadedModel]:
    wanted = ModelSettings(model=str(folder), **({"lora_rank": 2} | settings))
    loaded = load_model(wanted, precision=FLOAT32, device=torch.device("cpu"), seed=0)
    return Policy(loaded.model, path), loaded


@pytest.fixture
def adapter(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """An adapter that does something, on embeddings and in full on the head too."""
    targets = ["q_proj", "v_proj", "embed_tokens"]
    _, loaded = with_adapter(model_folder(), target_modules=targets, modules_to_save=["lm_head"], path=OWN_HEAD)
    move(loaded.model)
    save_model(loaded, tmp_path / "adapter")
    return tmp_path / "adapter"


def move(model: torch.nn.Module) -> None:
    """Changes every trained weight."""
    with torch.no_grad():
        for _, parameter in trained_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)


def logps(policy: Policy, batch: TreeBatch) -> torch.Tensor:
    with torch.no_grad():
        return policy(batch).values_N


def train(policy: Policy, reference: object, batch: TreeBatch, *, steps: int = 2) -> None:
    """Steps as the loop makes them: the reference first, then the policy, then its gradients."""
    optimizer = torch.optim.SGD([parameter for _, parameter in trained_parameters(policy)], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        before = reference.logps(batch)
        (policy(batch).values_N - before.values_N.detach() - 1).square().mean().backward()
        optimizer.step()


# A second model.


def test_a_frozen_copy_is_of_the_model_as_it_is_in_memory(make_model):
    policy = Policy(make_model(), FLAT)
    move(policy)
    batch = pack(trees(), sharing="flat")
    before = logps(policy, batch)
    reference = FrozenCopy.of(policy)
    move(policy)
    assert torch.equal(reference.logps(batch).values_N, before)
    assert not torch.allclose(logps(policy, batch), before, atol=0.01)
    assert not any(parameter.requires_grad for parameter in reference.policy.parameters())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert policy.training
    assert not reference.logps(batch).values_N.requires_grad


def test_a_reference_that_runs_another_way_takes_the_same_batches(make_model):
    flat, plain = (FrozenCopy(Policy(make_model(), EnginePath(sharing, HeadShape()))) for sharing in ("flat", "plain"))
    for sharing in ("flat", "plain"):
        batch = pack(masked_trees(), sharing=sharing)
        torch.testing.assert_close(flat.logps(batch).values_N, plain.logps(batch).values_N, rtol=0, atol=2e-5)
        assert flat.logps(batch).lengths_C.tolist() == plain.logps(batch).lengths_C.tolist()


# Adapters.


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"], "gradient_checkpointing": True}])
def test_the_adapter_off_is_the_base_bit_for_bit_also_after_steps(model_folder, make_model, settings: dict[str, object]):
    path = OWN_HEAD if settings.get("modules_to_save") == ["lm_head"] else FLAT
    policy, loaded = with_adapter(model_folder(), path=path, **settings)
    trained = [name for name, _ in trained_parameters(policy)]
    reference = AdapterOff(policy, loaded.adapter)
    batch = pack(trees(), sharing="flat")
    base = logps(Policy(make_model(), path), batch)
    assert torch.equal(logps(policy, batch), base)
    train(policy, reference, batch)
    assert torch.equal(reference.logps(batch).values_N, base)
    assert not torch.allclose(logps(policy, batch), base, atol=1e-3)
    assert [name for name, _ in trained_parameters(policy)] == trained


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_frozen_adapter_is_the_adapter_at_the_start(adapter: Path, gradient_checkpointing: bool):
    policy, loaded = with_adapter(adapter, lora_rank=0, path=OWN_HEAD, gradient_checkpointing=gradient_checkpointing)
    batch = pack(trees(), sharing="flat")
    before = logps(policy, batch)
    trained = {name: parameter.clone() for name, parameter in trained_parameters(policy)}
    assert any("lora_embedding_A" in name for name in trained)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    reference = FrozenAdapter(policy, loaded.adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in trained_parameters(policy)] == list(trained)
    assert torch.equal(logps(policy, batch), before)
    train(policy, reference, batch)
    assert torch.equal(reference.logps(batch).values_N, before)
    assert not torch.allclose(logps(policy, batch), before, atol=1e-3)
    assert [name for name, _ in trained_parameters(policy)] == list(trained)
    for name, parameter in trained_parameters(policy):
        assert not torch.equal(parameter, trained[name]), name


def test_the_steps_do_not_depend_on_where_the_reference_comes_from(adapter: Path):
    batch = pack(trees(), sharing="flat")
    weights = []
    for kind in (FrozenAdapter, lambda policy, _: FrozenCopy.of(policy)):
        policy, loaded = with_adapter(adapter, lora_rank=0, path=OWN_HEAD)
        train(policy, kind(policy, loaded.adapter), batch)
        weights.append({name: parameter.detach() for name, parameter in trained_parameters(policy)})
    for name, parameter in weights[0].items():
        assert torch.equal(parameter, weights[1][name]), name


def test_the_frozen_adapter_is_not_saved(adapter: Path, tmp_path: Path):
    policy, loaded = with_adapter(adapter, lora_rank=0, path=OWN_HEAD)
    FrozenAdapter(policy, loaded.adapter)
    move(policy)
    save_model(loaded, tmp_path / "saved")
    assert START_ADAPTER not in "".join(str(path) for path in (tmp_path / "saved").rglob("*"))
    again, _ = with_adapter(tmp_path / "saved", lora_rank=0, path=OWN_HEAD)
    batch = pack(trees(), sharing="flat")
    assert torch.equal(logps(again, batch), logps(policy, batch))


# Values from before.


@pytest.mark.parametrize("made", ["flat", "plain"])
@pytest.mark.parametrize("read", ["flat", "plain"])
def test_cached_values_are_fresh_ones_in_any_packing_and_order(make_model, made: str, read: str):
    forest = [*trees(5), *masked_trees()]
    makes, reads = (Policy(make_model(initializer_range=0.3), EnginePath(sharing, HeadShape())) for sharing in (made, read))
    values = {}
    for part in (forest[:3], forest[3:4], forest[4:]):
        batch = pack(part, sharing=made)
        values |= split_by_key(batch, TokenLogps(logps(makes, batch), batch.lengths_C, batch.prompt_lengths_B, batch.num_completion_tokens))
    reference = CachedReference(values)
    for part in (forest, forest[::-1], forest[2:7]):
        batch = pack(part, sharing=read)
        cached, fresh = reference.logps(batch), reads(batch)
        torch.testing.assert_close(cached.values_N, fresh.values_N, rtol=0, atol=2e-5)
        torch.testing.assert_close(cached.sum(), fresh.sum(), rtol=0, atol=1e-4)
        torch.testing.assert_close(cached.prompt_sum(), fresh.prompt_sum(), rtol=0, atol=1e-4)


def test_keys_tell_everything_apart_that_has_another_value():
    prompt, completion = token_ids([5, 6, 7]), token_ids([8, 9])
    mask, other_mask = np.array([True, False]), np.array([False, True])
    variants = [
        PromptTree(prompt, (Completion(completion),)),
        PromptTree(token_ids([5, 6]), (Completion(token_ids([7, 8, 9])),)),
        PromptTree(prompt, (Completion(token_ids([8, 10])),)),
        PromptTree(token_ids([5, 7, 6]), (Completion(completion),)),
        PromptTree(prompt, (Completion(completion, scored=mask),)),
        PromptTree(prompt, (Completion(completion, scored=other_mask),)),
    ]
    keys = [completion_keys(tree)[0] for tree in variants]
    scored = PromptTree(prompt, (Completion(completion),), prompt_scored=np.array([False, True, True]))
    assert len({*keys, prompt_key(scored)}) == len(variants) + 1
    assert prompt_key(variants[0]) is None
    assert completion_keys(scored) == completion_keys(variants[0])  # whether the prompt counts does not move its completion
    assert completion_keys(variants[0].with_weight(3.0)) == completion_keys(variants[0])


def test_a_value_that_was_never_computed_is_an_error(make_model):
    policy = Policy(make_model(), FLAT)
    known = pack(trees(2), sharing="flat")
    with torch.no_grad():
        reference = CachedReference(split_by_key(known, policy(known)))
    reference.logps(known)
    with pytest.raises(DataError, match="was not computed for an example of this batch"):
        reference.logps(pack(trees(3), sharing="flat"))


def test_the_policy_s_extras_ask_nothing_of_a_reference(make_model):
    policy = Policy(make_model(), FLAT)
    batch = pack(trees(2), sharing="flat")
    own = policy(batch, extras=True)
    cached = CachedReference(split_by_key(batch, own)).logps(batch)
    assert own.entropy_N is not None
    assert cached.entropy_N is None
    assert torch.equal(cached.values_N, own.values_N.detach())


# Sums that came with the data.


def given(*sums: float | None) -> list[PromptTree]:
    return [
        PromptTree(
            token_ids([5, 6]), (Completion(token_ids([7, 8]), reference_logp=chosen), Completion(token_ids([9]), reference_logp=rejected))
        )
        for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)
    ]


def test_the_data_s_sums():
    reference = DataReference().logps(pack(given(-1.5, -2.5, -3.0, 0.0), sharing="flat"))
    assert reference.sum().tolist() == [-1.5, -2.5, -3.0, 0.0]
    assert reference.mean().tolist() == [-0.75, -2.5, -1.5, 0.0]
    assert not reference.has_tokens
    with pytest.raises(DataError, match="the data brings one sum per completion"):
        _ = reference.values_N


def test_whether_the_data_brings_sums():
    assert data_has_reference(given(-1.0, 0.0, -3.0, -4.0))
    assert not data_has_reference(given(None, None, None, None))
    assert not data_has_reference([])
    with pytest.raises(DataError, match=r"2 of 4 completions bring a reference log-probability. Give it for all of them, or for none"):
        data_has_reference(given(None, None, -1.0, -2.0))
