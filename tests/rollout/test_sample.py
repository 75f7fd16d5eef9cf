"""Samples: the same as transformers' greedy search, reproducible, ended properly, and from the right distribution."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from prefopt.errors import ModelError
from prefopt.rollout.sample import inverse_cdf, sample, until_end
from prefopt.trees import TokenIds, token_ids

MakeModel = Callable[..., PreTrainedModel]
PROMPTS = [token_ids(prompt) for prompt in ([5, 9, 17, 4, 8, 200, 31], [7], [12, 13, 14], [100, 101, 102, 103])]
NO_END = frozenset[int]()


def as_lists(completions: list[list[TokenIds]]) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in of_prompt] for of_prompt in completions]


def sharp(make_model: MakeModel, architecture: str = "llama", **config: Any) -> PreTrainedModel:
    """A random model whose next tokens are far from equally likely, so that rounding does not decide."""
    return make_model(architecture, seed=3, initializer_range=0.5, **config)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_greedy_is_transformers_greedy_whatever_the_padding(make_model: MakeModel, architecture: str) -> None:
    model = sharp(make_model, architecture).eval()
    together = sample(model, PROMPTS, eos_ids=NO_END, max_new_tokens=12, temperature=0)
    for prompt, (completion,) in zip(PROMPTS, together, strict=True):
        greedy = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        alone = model.generate(torch.tensor(prompt.tolist())[None], generation_config=greedy)
        assert completion.tolist() == alone[0, len(prompt) :].tolist()[:12]


def test_the_seed_fixes_samples_whatever_the_batches(make_model: MakeModel) -> None:
    model = sharp(make_model)
    before = torch.random.get_rng_state()
    together = as_lists(sample(model, PROMPTS, eos_ids={2}, num_per_prompt=3, max_new_tokens=10, seed=5, batch_size=64))
    assert as_lists(sample(model, PROMPTS, eos_ids={2}, num_per_prompt=3, max_new_tokens=10, seed=5, batch_size=5)) == together
    assert as_lists(sample(model, PROMPTS, eos_ids={2}, num_per_prompt=3, max_new_tokens=10, seed=6)) != together
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [len(of_prompt) for of_prompt in together] == [3, 3, 3, 3]
    assert together[0][0] != together[0][1]


def test_completions_end_with_the_first_end_or_at_the_limit(make_model: MakeModel) -> None:
    model = make_model("llama", seed=1)  # nearly uniform over its tokens: ends come at varied places
    eos_ids = set(range(2, 40))
    samples = sample(model, PROMPTS, eos_ids=eos_ids, num_per_prompt=16, max_new_tokens=8, seed=0)
    completions = [ids for of_prompt in as_lists(samples) for ids in of_prompt]
    ended = [ids for ids in completions if ids[-1] in eos_ids]
    assert len({len(ids) for ids in ended}) > 3
    assert all(not eos_ids & set(ids[:-1]) for ids in completions)
    assert all(len(ids) == 8 for ids in completions if ids[-1] not in eos_ids)
    assert any(ids[-1] not in eos_ids for ids in completions)


def test_cuts_after_the_end() -> None:
    assert until_end(np.array([4, 2, 0, 0]), {2, 3}).tolist() == [4, 2]
    assert until_end(np.array([3, 2]), {2, 3}).tolist() == [3]
    assert until_end(np.array([4, 5, 0]), {2, 3}).tolist() == [4, 5, 0]
    assert until_end(np.array([4, 5, 0]), set()).tolist() == [4, 5, 0]


def test_draws_follow_the_distribution_at_the_temperature(make_model: MakeModel) -> None:
    model = sharp(make_model).eval()
    (completions,) = sample(model, PROMPTS[:1], eos_ids=NO_END, num_per_prompt=4000, max_new_tokens=1, temperature=1.7, batch_size=1000)
    frequency = np.bincount([int(ids[0]) for ids in completions], minlength=model.config.vocab_size) / 4000
    with torch.no_grad():
        probability = (model(torch.tensor(PROMPTS[0].tolist())[None]).logits[0, -1] / 1.7).softmax(-1).numpy()
    error = np.sqrt(probability * (1 - probability) / 4000)
    assert probability.max() > 0.05
    assert np.all(np.abs(frequency - probability) < 5 * error + 1e-3)


def test_inverse_cdf_by_hand() -> None:
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(6, 4)  # cumulative: 0.25 0.25 0.75 1
    uniforms = torch.tensor([[0.0], [0.2499], [0.2501], [0.7499], [0.7501], [1.0]], dtype=torch.float64)
    assert inverse_cdf(logits, uniforms).flatten().tolist() == [0, 0, 2, 2, 3, 3]


def test_leaves_the_model_as_it_was(make_model: MakeModel) -> None:
    model = sharp(make_model)
    model.train()
    frozen = model.model.layers[0].eval()
    defaults = GenerationConfig(repetition_penalty=5.0, top_k=1, eos_token_id=7, max_length=3)
    model.generation_config = defaults
    modes = [module.training for module in model.modules()]
    with_defaults = sample(model, PROMPTS, eos_ids=NO_END, max_new_tokens=6, seed=1)
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    assert model.generation_config is defaults
    assert torch.is_grad_enabled()
    model.generation_config = GenerationConfig()
    assert as_lists(with_defaults) == as_lists(sample(model, PROMPTS, eos_ids=NO_END, max_new_tokens=6, seed=1))


def test_is_restored_after_a_failure(make_model: MakeModel) -> None:
    model = sharp(make_model)
    model.train()
    defaults = model.generation_config

    def fail(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, PROMPTS, eos_ids=NO_END, max_new_tokens=2, done=fail)
    assert model.training
    assert model.generation_config is defaults


def test_says_how_far_it_is(make_model: MakeModel) -> None:
    counts: list[int] = []
    sample(make_model("llama"), PROMPTS, eos_ids=NO_END, num_per_prompt=2, max_new_tokens=1, batch_size=3, done=counts.append)
    assert counts == [3, 6, 8]


def test_refuses_what_cannot_work(make_model: MakeModel) -> None:
    model = make_model("llama")
    with pytest.raises(ModelError, match="end-of-turn token 5000 is not among"):
        sample(model, PROMPTS, eos_ids={5000}, max_new_tokens=1)
    with pytest.raises(ModelError, match="cannot generate"):
        sample(model.model, PROMPTS, eos_ids=NO_END, max_new_tokens=1)
    for wrong in ({"max_new_tokens": 0}, {"num_per_prompt": 0}, {"temperature": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"at least 1|0 or more"):
            sample(model, PROMPTS, **({"eos_ids": NO_END, "max_new_tokens": 1} | wrong))
    with pytest.raises(ValueError, match="at least one token"):
        sample(model, [token_ids([])], eos_ids=NO_END, max_new_tokens=1)
