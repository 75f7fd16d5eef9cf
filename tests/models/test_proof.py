"""The proof at load: it finds the way that is right, says so, and leaves the model as it was."""

from collections.abc import Callable, Iterator
from functools import partial
from math import nan
from typing import Any

import pytest
import torch
from tests.models.architectures import ARCHITECTURES, WINDOW, one_thread, pairs, plain_logps, tiny_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from prefopt.engine.attention import TREE_ATTENTION
from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.engine.states import PIECE, Rows, forked
from prefopt.errors import ModelError
from prefopt.models.forest import long_trees, random_forest, spans_named
from prefopt.models.load import checkpoint_activations
from prefopt.models.policy import EnginePath, Policy, set_attention
from prefopt.models.proof import EXACT, NOISE_FACTOR, Difference, Proof, Trial, allowed, prove


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# What it finds


def test_a_transformer_is_shared():
    proof = prove(tiny_model("qwen2"), max_length=64)
    assert proof.path == EnginePath("flat", HeadShape())
    (trial,) = proof.trials
    assert isinstance(trial.found, Difference)
    assert trial.found.logps < 1e-6
    assert trial.found.gradients < 5e-6
    assert trial.independence < 1e-6
    assert proof.sentence().startswith("prompts are shared (flat): log-probs within ")
    assert proof.sentence().endswith("of the plain forward; the head runs in chunks")


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a state get the flat row as it stands, as those of any model do that the engine knows nothing of."""
    monkeypatch.setattr("prefopt.models.policy.in_rows", lambda model, wanted: None)


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "qwen3_5_text", "qwen3_next", "bamba"])
def test_layers_with_a_state_get_rows(name: str):
    proof = prove(tiny_model(name), max_length=80)
    (flat,) = proof.trials
    assert proof.path == EnginePath("flat", HeadShape())
    assert isinstance(flat.found, Difference)
    assert flat.found.logps < 1e-6
    assert flat.found.gradients < 5e-6
    assert flat.independence < 1e-6


@pytest.mark.usefixtures("no_rows")
@pytest.mark.parametrize("name", ["lfm2", "mamba2", "qwen3_5_text", "qwen3_next", "bamba", "llama4_text"])
def test_what_passes_information_around_attention_goes_on_from_a_cache(name: str):
    proof = prove(tiny_model(name), max_length=64)
    flat, fork = proof.trials
    assert isinstance(flat.found, Difference)  # it ran, without an error, and was wrong
    assert flat.found.gradients > 0.1
    assert isinstance(fork.found, Difference)
    assert fork.found.logps < 1e-6
    assert fork.found.gradients < 5e-6
    assert proof.path == EnginePath("fork", HeadShape())
    assert proof.sentence().startswith(
        "prompts are shared (fork: completions continue from copies of the prompt's cache): log-probs within "
    )


def test_a_recurrence_that_takes_no_masked_cache_is_not_shared():
    proof = prove(tiny_model("mamba"), max_length=64)
    assert proof.path.sharing == "plain"
    assert [trial.sharing for trial in proof.trials] == ["flat", "fork"]
    assert proof.sentence().startswith(
        "every completion runs with its own prompt (plain; flat: a layer with a state was called without tree_layout: this architecture "
    )
    assert "; fork: The size of tensor a" in proof.sentence()


def test_recomputed_layers_keep_no_cache_to_go_on_from():
    model = tiny_model("bloom")
    checkpoint_activations(model)
    proof = prove(model, max_length=64)
    assert proof.path.sharing == "plain"
    assert [trial.sharing for trial in proof.trials] == ["flat"]
    with pytest.raises(ModelError, match="sharing: fork was asked for and is not right on BloomForCausalLM"):
        prove(model, max_length=64, sharing="fork")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bloom", "BloomForCausalLM does not take its attention from outside"),
        ("stablelm", "tree attention was called without tree_layout: this architecture does not pass keywords on to its attention"),
    ],
)
def test_what_cannot_be_shared_says_why(name: str, why: str):
    proof = prove(tiny_model(name), max_length=64)
    assert proof.trials[0].found == why
    assert proof.path.sharing == "fork"
    alone = prove(tiny_model(name), max_length=64, sharing="auto")
    assert alone.path == proof.path
    with pytest.raises(
        ModelError, match=f"sharing: flat was asked for and is not right on .*plain; flat: {why}\\); the head runs in chunks"
    ):
        prove(tiny_model(name), max_length=64, sharing="flat")


def test_an_error_of_the_models_own_falls_back_to_plain():
    model = tiny_model("qwen2")

    def fail_on_a_flat_row(_module: nn.Module, _inputs: object, options: dict[str, object]) -> None:
        if "tree_layout" in options:
            raise RuntimeError("wants a cache\nand more lines")

    model.model.register_forward_pre_hook(fail_on_a_flat_row, with_kwargs=True)
    proof = prove(model, max_length=64)
    assert (proof.path.sharing, proof.trials[0].found) == ("fork", "wants a cache")


class RunningMean(nn.Module):
    """Adds to every token a little of the mean of all before it in the row: no attention keeps it out."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.share * hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]


@pytest.mark.parametrize(("share", "sharing"), [(0.0, "flat"), (1e-3, "plain")])
def test_a_small_leak_between_branches_is_seen(share: float, sharing: str):
    model = tiny_model("qwen2")
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, RunningMean(share))
    assert prove(model, max_length=64).path.sharing == sharing


# Weights in half precision hide small errors: the proof runs on a float32 twin.
@pytest.mark.parametrize(
    "name", ["lfm2", "mamba2", "qwen3_5_text", "llama4_text", "bloom", "qwen2", "gemma2", "gpt_oss", "cohere", "deepseek_v3"]
)
def test_weights_in_bf16_are_proved_as_well(name: str):
    model = tiny_model(name, dtype=torch.bfloat16)
    proof = prove(model, max_length=64)
    assert proof.path.sharing == ARCHITECTURES[name].way
    assert (proof.path.chunked_head is None) == (ARCHITECTURES[name].head == "own")
    assert model.dtype == torch.bfloat16


@pytest.mark.usefixtures("no_rows")
def test_lfm2_as_it_starts_is_seen_in_bf16():
    # The quietest of the wrong ones: with fresh weights, gradients are off by 3e-4, below what bf16 resolves.
    assert prove(tiny_model("lfm2", dtype=torch.bfloat16, initializer_range=0.02), max_length=64).path.sharing == "fork"


@pytest.mark.parametrize(("name", "sharing"), [("qwen2", "flat"), ("lfm2", "flat"), ("bloom", "fork")])
def test_autocast_is_proved_as_well(name: str, sharing: str):
    proof = prove(tiny_model(name), max_length=64, autocast=torch.bfloat16)
    assert proof.path.sharing == sharing


@pytest.mark.usefixtures("no_rows")
def test_a_deep_model_in_bf16_is_proved_on_few_layers_of_every_kind():
    # Four layers, and only the last is another kind: the twin must reach it.
    kinds = ["full_attention"] * 3 + ["conv"]
    model = tiny_model("lfm2", dtype=torch.bfloat16, num_hidden_layers=4, layer_types=kinds)
    assert prove(model, max_length=64).path.sharing == "fork"
    assert model.config.num_hidden_layers == 4
    assert list(model.config.layer_types) == kinds


# Long rows of layers with a state


def in_wrong_order(rows: Rows, own: Callable[[Rows], list[Rows]]) -> list[Rows]:
    return own(rows)[::-1]


def in_wrong_order_in_completions(rows: Rows, own: Callable[[Rows], list[Rows]]) -> list[Rows]:
    begins_in_the_first_prompt = int(rows.index_RL[0, 0]) == 0
    return own(rows) if begins_in_the_first_prompt else own(rows)[::-1]


LONG = {"max_position_embeddings": 1024}


@pytest.mark.parametrize("wrong", [in_wrong_order, in_wrong_order_in_completions])
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_wrong_pieces_are_seen_where_rows_can_be_that_long(name: str, wrong: Callable[..., list[Rows]], monkeypatch: pytest.MonkeyPatch):
    own = Rows.pieces
    monkeypatch.setattr(Rows, "pieces", lambda rows: wrong(rows, own))
    proof = prove(tiny_model(name, **LONG), max_length=PIECE + 6)
    assert proof.path.sharing == "fork"
    assert isinstance(proof.trials[0].found, Difference)
    assert proof.trials[0].found.logps > 1e-3
    assert prove(tiny_model(name, **LONG), max_length=PIECE + 5).path.sharing == "flat"  # no row is long enough to be cut


def test_a_state_that_is_lost_between_pieces_is_seen(monkeypatch: pytest.MonkeyPatch):
    from prefopt.engine import states

    def fresh(layer: Any, prompt_of_R: Tensor | None = None) -> Any:
        own = forked(layer, prompt_of_R)
        if prompt_of_R is None:
            for states_of in (own.conv_states, own.recurrent_states):
                states_of.update({place: torch.zeros_like(value) for place, value in states_of.items() if value is not None})
        return own

    monkeypatch.setattr(states, "forked", fresh)
    proof = prove(tiny_model("qwen3_5_text", **LONG), max_length=1024)
    assert isinstance(proof.trials[0].found, Difference)
    assert proof.trials[0].found.logps > 1e-3
    assert proof.path.sharing == "fork"


def test_right_pieces_are_shared_in_half_precision_too():
    for given in ({}, {"dtype": torch.bfloat16}):
        proof = prove(tiny_model("qwen3_5_text", **LONG, **given), max_length=1024)
        assert proof.path.sharing == "flat"
        assert isinstance(proof.trials[0].found, Difference)


def test_a_prompt_and_completions_are_longer_than_a_piece_where_the_run_allows():
    config = tiny_model("qwen3_5_text", **LONG).config
    assert long_trees(config, PIECE + 5) == []
    assert long_trees(tiny_model("qwen2").config, 1024) == []
    prompt, completions = long_trees(config, PIECE + 6)
    assert len(prompt.prompt_ids) > PIECE
    assert len(completions.completions[0].ids) > PIECE
    assert max(tree.longest for tree in (prompt, completions)) == PIECE + 6
    for tree, again in zip((prompt, completions), long_trees(config, 4096), strict=True):
        assert tree.prompt_ids.tolist() == again.prompt_ids.tolist()


def test_of_two_trials_the_worse_counts():
    good, bad = Trial("flat", Difference(1e-7, 2e-6), 0.0), Trial("flat", Difference(1e-8, 1e-2), 1e-3)
    assert good.and_also(bad) == bad.and_also(good) == Trial("flat", Difference(1e-7, 1e-2), 1e-3)
    failed = Trial("flat", "it has no cache", nan)
    assert good.and_also(failed) is failed.and_also(good) is failed
    unknown = good.and_also(Trial("flat", Difference(nan, 0.0), 0.0))
    assert not unknown.holds(Difference(1e-7, 1e-6), EXACT)


# What was asked for


@pytest.mark.usefixtures("no_rows")
def test_flat_asked_for_and_not_right_is_an_error():
    with pytest.raises(ModelError, match=r"sharing: flat was asked for and is not right on Lfm2ForCausalLM: .* Use sharing: auto\."):
        prove(tiny_model("lfm2"), max_length=64, sharing="flat")


def test_flat_asked_for_and_right():
    assert prove(tiny_model("qwen2"), max_length=64, sharing="flat").path.sharing == "flat"


def test_plain_asked_for():
    proof = prove(tiny_model("qwen2"), max_length=64, sharing="plain")
    assert proof.path == EnginePath("plain", HeadShape())
    assert proof.sentence() == "every completion runs with its own prompt (plain; asked for); the head runs in chunks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damaged_weights_are_an_error(dtype: torch.dtype):
    model = tiny_model("qwen2", dtype=dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = nan
    with pytest.raises(ModelError, match="infinite or NaN"):
        prove(model, max_length=64)


# The head


def test_scale_and_soft_cap_named_by_the_config_are_used():
    assert prove(tiny_model("cohere"), max_length=64).path.chunked_head == HeadShape(scale=0.25)
    assert prove(tiny_model("granite"), max_length=64).path.chunked_head == HeadShape(scale=1 / 4.0)
    assert prove(tiny_model("gemma2"), max_length=64).path.chunked_head == HeadShape(soft_cap=30.0)


def scaled_in_its_forward() -> PreTrainedModel:
    """Scales its logits by something that no config names."""

    class ScaledLlama(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    model = tiny_model("llama")
    model.__class__ = ScaledLlama
    return model


def scaled_by_a_hook() -> PreTrainedModel:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 0.5)
    return model


def wrapped_head() -> PreTrainedModel:
    class Scaled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * 0.5

    model = tiny_model("llama")
    head = Scaled(32, model.config.vocab_size, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def misnamed_scale() -> PreTrainedModel:
    """The config names a scale, and the model does not apply it."""
    model = tiny_model("llama")
    model.config.logit_scale = 0.5
    return model


@pytest.mark.parametrize("make", [scaled_in_its_forward, scaled_by_a_hook, wrapped_head, misnamed_scale])
def test_a_head_that_is_not_what_its_config_names_runs_as_it_is(make: Callable[[], PreTrainedModel]):
    model = make()
    proof = prove(model, max_length=64)
    assert proof.path == EnginePath("flat", None)
    assert proof.sentence().endswith("; the model's own head runs on scored positions")
    expected = torch.stack([plain_logps(model, tree, completion) for tree in pairs() for completion in tree.completions])
    found = Policy(model, proof.path)(pack(pairs(), sharing="flat")).sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


# What it leaves alone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["qwen2", "lfm2"])
def test_everything_is_as_before(name: str, training: bool, attention: str):
    model = tiny_model(name, tie_word_embeddings=False)
    model.set_attn_implementation(attention)
    model.train(training)
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    parameters = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    wanted = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    config, random_state = model.config.to_dict(), torch.get_rng_state()

    prove(model, max_length=64)

    assert all(torch.equal(parameters[key], parameter) for key, parameter in model.named_parameters())
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == wanted
    assert [key for key, parameter in model.named_parameters() if parameter.grad is not None] == ["lm_head.weight"]
    assert bool((model.lm_head.weight.grad == 1).all())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {module.training for module in model.modules()} == {training}
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == config
    assert not any(isinstance(vars(module).get("forward"), partial) for module in model.modules())
    assert len(embeddings._forward_hooks) == 0


def test_random_state_is_as_before_when_a_twin_is_drawn():
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    before = torch.get_rng_state()
    prove(model, max_length=64)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("no_rows")
def test_a_failed_proof_leaves_the_model_as_it_was_too():
    model = tiny_model("lfm2").train()
    with pytest.raises(ModelError):
        prove(model, max_length=64, sharing="flat")
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_in_use_can_be_proved_again():
    model = tiny_model("qwen2")
    set_attention(model, TREE_ATTENTION)
    assert prove(model, max_length=64).path.sharing == "flat"
    assert model.config._attn_implementation == TREE_ATTENTION


def test_the_same_model_gives_the_same_proof():
    first, second = (prove(tiny_model("qwen2"), max_length=64) for _ in range(2))
    assert first == second


# Windows


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("gemma2", {WINDOW}),
        ("mistral", {WINDOW}),
        ("llama4_text", {WINDOW}),
        ("qwen2", set()),
        ("gpt2", set()),
        ("mamba2", {8}),
        ("bamba", {8}),
    ],
)
def test_windows_and_chunks_that_a_config_names(name: str, spans: set[int]):
    assert spans_named(tiny_model(name).config) == spans


def test_a_count_of_layers_is_no_window():
    config = tiny_model("qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=1).config
    assert spans_named(config) == {20}


@pytest.mark.parametrize(("max_length", "crossed"), [(40, False), (41, True), (64, True)])
def test_windows_are_crossed_only_where_rows_can_be_that_long(max_length: int, crossed: bool):
    forest = random_forest(tiny_model("llama4_text", attention_chunk_size=40).config, max_length)
    assert any(tree.longest > 40 for tree in forest) == crossed
    if crossed:  # once inside a completion, once inside a prompt
        beyond = [tree for tree in forest if tree.longest > 40]
        assert {len(tree.prompt_ids) > 40 for tree in beyond} == {True, False}
        assert all(len(tree.completions) > 1 for tree in beyond)


@pytest.mark.parametrize(("max_length", "sharing"), [(40, "flat"), (64, "fork")])
def test_chunks_that_no_row_reaches_do_not_matter(max_length: int, sharing: str):
    assert prove(tiny_model("llama4_text", attention_chunk_size=40), max_length=max_length).path.sharing == sharing


def test_a_window_ignored_by_attention_is_seen(monkeypatch: pytest.MonkeyPatch):
    from prefopt.engine import attention

    original = attention._per_tree
    monkeypatch.setattr(attention, "_per_tree", lambda *arguments: original(*arguments[:5], None, *arguments[6:]))
    assert prove(tiny_model("mistral", sliding_window=40), max_length=40).path.sharing == "flat"
    assert prove(tiny_model("mistral", sliding_window=40), max_length=64).path.sharing == "fork"


# What counts as equal


def test_equal_is_measured_against_the_noise():
    noise = Difference(1e-5, 1e-4)
    assert Difference(NOISE_FACTOR * 1e-5, NOISE_FACTOR * 1e-4).within(noise, EXACT)
    assert not Difference(1.01 * NOISE_FACTOR * 1e-5, 0).within(noise, EXACT)
    assert not Difference(0, 1.01 * NOISE_FACTOR * 1e-4).within(noise, EXACT)


def test_without_noise_a_floor_counts():
    silence = Difference(0, 0)
    assert Difference(*EXACT).within(silence, EXACT)
    assert not Difference(2 * EXACT[0], 0).within(silence, EXACT)
    assert not Difference(0, 2 * EXACT[1]).within(silence, EXACT)


def test_nan_is_never_equal():
    assert not Difference(nan, 0).within(Difference(0, 0), EXACT)
    assert not Difference(0, nan).within(Difference(0, 0), EXACT)
    assert not Difference(nan, nan).within(Difference(nan, nan), EXACT)


def test_sentences():
    noise = Difference(1e-7, 1e-6)
    flat = Proof(EnginePath("flat", None), (Trial("flat", Difference(2e-7, 3e-6), 0.0),), noise)
    assert flat.sentence() == (
        "prompts are shared (flat): log-probs within 2e-07, gradients within 3e-06 of the plain forward; "
        "the model's own head runs on scored positions"
    )
    trials = (Trial("flat", Difference(0.05, 0.5), 0.1), Trial("fork", "it has no cache", nan))
    plain = Proof(EnginePath("plain", HeadShape()), trials, noise)
    assert plain.sentence() == (
        "every completion runs with its own prompt (plain; flat moves log-probs by 5e-02 and gradients by 5e-01; "
        "fork: it has no cache); the head runs in chunks"
    )


def test_rotary_embeddings_that_change_for_the_whole_batch_are_refused():
    half = 4  # head size 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
    }
    model = tiny_model("phi3", rope_parameters=rope, max_position_embeddings=128, original_max_position_embeddings=32)
    assert prove(model, max_length=32).path.sharing == "flat"  # no row reaches the long factors
    with pytest.raises(ModelError, match=r"other log-probabilities when longer rows stand in the same batch.*Lower max_length to 32"):
        prove(model, max_length=64)


def test_noise_does_not_excuse_everything():
    assert allowed(1e-8, 1e-5) == 1e-5
    assert allowed(1e-5, 1e-5) == pytest.approx(8e-5)
    assert allowed(1.0, 1e-5) == pytest.approx(1e-3)


def test_a_caller_without_gradients_may_prove():
    with torch.no_grad():
        assert prove(tiny_model("qwen2"), max_length=64).path.sharing == "flat"
