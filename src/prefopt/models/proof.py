"""Find the fastest way to run a model that is right, by trying on that very model.

Sharing a prompt assumes that a layer passes information between tokens through attention only, and that
attention is called with what it needs. Convolutions, recurrences, ALiBi and chunked attention break this, mostly
without an error. So before training a small random forest is run shared and plain, and two things are compared:
log-probabilities and gradients (with respect to the token embeddings, where every layer's error arrives), and
independence: changing one branch must not move another. What counts as equal is measured, not assumed: two plain
runs that differ in padding only show the arithmetic's own noise.

No list of blessed architectures decides. Where attention over one row does not hold, continuing from the prompt's cache is
tried, which models have to get right in order to generate.

Of a reward model, which has no log-probabilities, the scores at all tokens of the completions take their place; and its own forward,
with the score of the last token, must give what the engine makes of decoder and score layer.

A model whose log-probabilities depend on what else is in the batch cannot be trained on pairs at all: rotary embeddings
that change for the whole batch when one row grows long (longrope, dynamic) do that. It is refused.

Shapes: T positions of the flattened input, D hidden size, N scored tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prefopt.engine.batch import Sharing, TreeBatch, pack
from prefopt.engine.head import HeadShape
from prefopt.engine.layout import FlatLayout, ForkLayout
from prefopt.errors import ModelError
from prefopt.models.forest import NUM_SHORT_TREES, long_trees, random_forest, spans_named
from prefopt.models.policy import (
    EnginePath,
    Policy,
    decoder_of,
    on_device,
    plain_head_of,
    score_head_of,
    set_attention,
)
from prefopt.models.score_proof import prove_scores, relative, values_of
from prefopt.models.twin import twin_of
from prefopt.trees import Completion, PromptTree, token_ids

NOISE_FACTOR = 8.0
"""How many times the noise of two plain runs still counts as equal: sharing changes the order of sums in every layer."""

SHARED: dict[Sharing, str] = {"flat": "flat", "fork": "fork: completions continue from copies of the prompt's cache"}
"""Ways of sharing, fastest first, and what is said of them."""

LOUDEST = 100.0
"""How many times the floor it may become by that: a model that is noisier has more than arithmetic in its noise."""

EXACT = (1e-5, 5e-5)
"""Relative differences of log-probabilities and of gradients below which two float32 runs are equal however quiet the
noise. Right architectures stay below 1e-6; the quietest wrong one seen (lfm2) moves gradients by 3e-4."""

ROUGH = (3e-2, 1.5e-1)
"""The same for a second look in half precision, which catches a kernel that is wrong, not a subtle architecture."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Relative distance of a way of running from the plain one."""

    logps: float
    gradients: float

    def within(self, noise: "Difference", floor: tuple[float, float]) -> bool:
        """Whether it is no more than the arithmetic's own noise. NaN is not."""
        return self.logps <= allowed(noise.logps, floor[0]) and self.gradients <= allowed(noise.gradients, floor[1])


def allowed(noise: float, floor: float) -> float:
    """The relative difference that counts as equal."""
    return min(max(NOISE_FACTOR * noise, floor), LOUDEST * floor)


@dataclass(frozen=True, slots=True)
class Trial:
    """A way of sharing prompts that was tried.

    Attributes:
        sharing: which.
        found: its distance from plain, or why it could not run.
        independence: the largest change of a branch's log-probability when another branch was changed, relative.
    """

    sharing: Sharing
    found: Difference | str
    independence: float

    def holds(self, noise: Difference, floor: tuple[float, float]) -> bool:
        """Whether it is the plain function."""
        return (
            isinstance(self.found, Difference) and self.found.within(noise, floor) and self.independence <= allowed(noise.logps, floor[0])
        )

    def and_also(self, other: "Trial") -> "Trial":
        """The worse of both, which are of the same way on different trees; what could not run is worst."""
        if isinstance(self.found, str) or isinstance(other.found, str):
            return self if isinstance(self.found, str) else other
        found = Difference(*(float(np.maximum(*pair)) for pair in zip(astuple(self.found), astuple(other.found), strict=True)))
        return Trial(self.sharing, found, float(np.maximum(self.independence, other.independence)))

    def failure(self, what: str = "log-probs") -> str:
        """Why it is not taken.

        Args:
            what: was compared.
        """
        if isinstance(self.found, str):
            return f"{self.sharing}: {self.found}"
        return f"{self.sharing} moves {what} by {self.found.logps:.0e} and gradients by {self.found.gradients:.0e}"


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found.

    Attributes:
        path: the fastest way that is right.
        trials: the ways of sharing that were tried, in order; where one holds it is the last.
        noise: distance of two plain runs that differ in padding only.
    """

    path: EnginePath
    trials: tuple[Trial, ...]
    noise: Difference

    def sentence(self) -> str:
        """The result for people."""
        what = "scores" if self.path.scores else "log-probs"
        head = "the head runs in chunks" if self.path.chunked_head else "the model's own head runs on scored positions"
        if self.path.scores:
            head = "a score layer in the place of a head"
        if self.path.sharing == "plain":
            reason = "; ".join(trial.failure(what) for trial in self.trials) or "asked for"
            return f"every completion runs with its own prompt (plain; {reason}); {head}"
        found = self.trials[-1].found
        assert isinstance(found, Difference), "it holds"
        return (
            f"prompts are shared ({SHARED[self.path.sharing]}): {what} within {found.logps:.0e}, gradients within "
            f"{found.gradients:.0e} of the plain forward; {head}"
        )


def prove(
    model: PreTrainedModel,
    *,
    max_length: int,
    sharing: str = "auto",
    autocast: torch.dtype | None = None,
    apart: torch.device | None = None,
) -> Proof:
    """The fastest way to run the model that equals the plain one.

    Half precision hides small errors, so the proof runs in float32: on the model itself where its weights are, else on
    a float32 twin (the same architecture and widths, few layers, random weights), and then once more, roughly, on the
    model as it will run.

    Args:
        model: the model, on its device, as it will be trained; its parameters and gradients are left as they are.
        max_length: longest prompt with completion of the run, in tokens.
        sharing: `auto`, or the one way to prove.
        autocast: dtype of the run's forward passes, where they are not in the parameters' own.
        apart: the device of a run that never has the whole model on one device: both looks are at a twin there.

    Raises:
        ModelError: the sharing that was asked for is not right on this model, or the model gives no finite log-probabilities.
    """
    exact = model.dtype in (torch.float32, torch.float64)
    twin = twin_of(model, apart or model.device) if apart or not exact else None
    ways = ways_to_try(model, sharing)
    proof = _prove(twin or model, max_length, ways, None, EXACT)
    if apart and plain_head_of(model) is None:  # an adapter stands on it, which the twin does not have
        proof = replace(proof, path=replace(proof.path, chunked_head=None))
    if not exact or autocast is not None:
        as_it_runs = on_device(twin, apart, model.dtype) if apart and twin else model
        way = proof.path.sharing
        rough = _prove(as_it_runs, max_length, () if way == "plain" else (way,), autocast, ROUGH)
        if apart and proof.path.chunked_head is None:
            rough = replace(rough, path=replace(rough.path, chunked_head=None))
        if (rough.path.sharing, rough.path.chunked_head) != (proof.path.sharing, proof.path.chunked_head):
            proof = rough
    if sharing not in ("auto", proof.path.sharing):
        raise ModelError(
            f"sharing: {sharing} was asked for and is not right on {type(model).__name__}: {proof.sentence()}. Use sharing: auto."
        )
    return proof


def ways_to_try(model: PreTrainedModel, sharing: str) -> tuple[Sharing, ...]:
    """The ways of sharing that come into question, fastest first."""
    ways: tuple[Sharing, ...] = tuple(way for way in SHARED if sharing in ("auto", way))
    # Layers whose activations are computed again keep no cache: the library leaves it out without an error.
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    has_part = plain_head_of(model) is not None or score_head_of(model) is not None
    return ways if has_part and not recomputes else tuple(way for way in ways if way != "fork")


def _prove(
    model: PreTrainedModel, max_length: int, ways: Sequence[Sharing], autocast: torch.dtype | None, floor: tuple[float, float]
) -> Proof:
    forest = random_forest(model.config, max_length)
    with _frozen(model):
        plain = _prove_plain(model, forest, autocast, floor[0])
        base, noise = _plainly(model, plain, forest, autocast)
        if not bool(torch.isfinite(base.logps_N).all()):
            raise ModelError(
                "the model gives infinite or NaN numbers on random tokens: its weights are damaged, or its precision is too low"
            )
        _refuse_batch_dependence(model, base, forest, plain, autocast, allowed(noise.logps, floor[0]))
        trials: list[Trial] = []
        for way in ways:
            path = replace(plain, sharing=way)
            trial = _try(model, path, forest, base, autocast)
            holds = trial.holds(noise, floor)
            if holds and floor == EXACT and (pieces := _try_pieces(model, path, max_length)):
                holds = pieces[0].holds(pieces[1], floor)
                trial = trial.and_also(pieces[0])
            trials.append(trial)
            if holds:
                return Proof(path, tuple(trials), noise)
    return Proof(plain, tuple(trials), noise)


def _plainly(model: PreTrainedModel, plain: EnginePath, trees: list[PromptTree], autocast: torch.dtype | None) -> "tuple[_Run, Difference]":
    """The plain run, and how far another one is from it that differs in padding only."""
    base, padded = (
        _run(model, plain, pack(trees, sharing="plain", device=model.device, pad_to_multiple=multiple), autocast) for multiple in (1, 16)
    )
    return base, _difference(padded, base)


def _try_pieces(model: PreTrainedModel, path: EnginePath, max_length: int) -> tuple[Trial, Difference] | None:
    """Trees so long that layers with a state compute them in pieces, and their noise; None: there are none. At a twin, because such rows
    take long on a whole model, and how a layer goes on from piece to piece does not depend on what stands above it."""
    if path.sharing != "flat" or model.device.type != "cpu" or not long_trees(model.config, max_length):
        return None  # on a GPU no row is cut, and neither is one that continues from a cache
    twin = twin_of(model, model.device)
    trees = long_trees(twin.config, max_length)
    with _frozen(twin):
        base, noise = _plainly(twin, replace(path, sharing="plain"), trees, None)
        return _try(twin, path, trees, base, None), noise


@dataclass(frozen=True, slots=True)
class _Run:
    """What one way of running gives: log-probabilities or scores, and the gradient of each token's embedding, per tree token."""

    logps_N: Tensor
    gradients_TD: Tensor


def _run(model: PreTrainedModel, path: EnginePath, batch: TreeBatch, autocast: torch.dtype | None) -> _Run:
    policy = Policy(model, path)
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        embedded.append(leaf)
        return leaf

    num_calls = 2 if path.sharing == "fork" else 1  # of the embeddings; some models make further ones of their own

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            values_N = values_of(policy(batch), batch)
        weights_N = torch.linspace(-1.0, 1.5, len(values_N), device=values_N.device, dtype=values_N.dtype)
        with torch.enable_grad():
            gradients = torch.autograd.grad((weights_N * values_N).sum(), embedded[:num_calls])
    finally:
        handle.remove()
    return _Run(values_N.detach(), _per_tree_token(torch.cat([gradient.flatten(0, 1) for gradient in gradients]), batch))


def _try(model: PreTrainedModel, path: EnginePath, forest: list[PromptTree], base: _Run, autocast: torch.dtype | None) -> Trial:
    """One way of sharing against the plain run."""
    try:
        shared = _run(model, path, pack(forest, sharing=path.sharing, device=model.device), autocast)
        return Trial(path.sharing, _difference(shared, base), _independence(model, path, forest, autocast))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # architectures fail here in ways of their own: an attention that drops keywords, a cache of another kind
        return Trial(path.sharing, _first_sentence(error), float("nan"))


def _per_tree_token(gradient_TD: Tensor, batch: TreeBatch) -> Tensor:
    """Gradients as the flat row orders tokens; in plain rows a prompt stands once per completion, and its parts add up."""
    if isinstance(batch.layout, FlatLayout):
        return gradient_TD
    if isinstance(batch.layout, ForkLayout):
        prompts, completions = gradient_TD.split([batch.input_ids.numel(), batch.layout.completion_ids_CL.numel()])
        of_prompts = iter(prompts[batch.layout.prompt_mask_BP.flatten().bool()].split([len(tree.prompt_ids) for tree in batch.trees]))
        lengths = [len(completion.ids) for completion in batch.completions]
        of_completions = iter(completions[batch.layout.completion_mask_CL.flatten().bool()].split(lengths))
        return torch.cat([part for tree in batch.trees for part in (next(of_prompts), *(next(of_completions) for _ in tree.completions))])
    width = batch.input_ids.shape[1]
    parts: list[Tensor] = []
    row = 0
    for tree in batch.trees:
        prompt = len(tree.prompt_ids)
        rows = gradient_TD.view(-1, width, gradient_TD.shape[-1])[row : row + len(tree.completions)]
        parts.append(rows[:, :prompt].sum(0))
        parts += [rows[index, prompt : prompt + len(completion.ids)] for index, completion in enumerate(tree.completions)]
        row += len(tree.completions)
    return torch.cat(parts)


def _independence(model: PreTrainedModel, path: EnginePath, forest: list[PromptTree], autocast: torch.dtype | None) -> float:
    """Changes the first completion of every tree; the others must stay as they are."""
    changed = [
        PromptTree(tree.prompt_ids, (Completion(token_ids(tree.completions[0].ids[::-1])), *tree.completions[1:])) for tree in forest
    ]
    policy = Policy(model, path)
    with torch.no_grad(), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        batches = [pack(trees, sharing=path.sharing, device=model.device) for trees in (forest, changed)]
        found = [(policy(batch), batch) for batch in batches]
        before, after = (logps.last_scalars(batch.last_C) if path.scores else logps.sum() for logps, batch in found)
    others = torch.tensor([index > 0 for tree in forest for index in range(len(tree.completions))], device=before.device)
    return relative(after[others], before[others])


def _refuse_batch_dependence(
    model: PreTrainedModel, base: _Run, forest: list[PromptTree], plain: EnginePath, autocast: torch.dtype | None, equal: float
) -> None:
    """The short trees alone must give what they gave beside the long ones.

    Raises:
        ModelError: they do not.
    """
    short = forest[:NUM_SHORT_TREES]
    with torch.no_grad(), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        batch = pack(short, sharing="plain", device=model.device)
        alone_N = values_of(Policy(model, plain)(batch), batch)
    difference = relative(alone_N, base.logps_N[: len(alone_N)])
    if not difference <= equal:
        limits = sorted(spans_named(model.config))
        advice = f"Lower max_length to {limits[0]}, from which on this model changes." if limits else "Use another model."
        what = "scores" if plain.scores else "log-probabilities"
        raise ModelError(
            f"{type(model).__name__} gives an answer other {what} when longer rows stand in the same batch "
            f"(by {difference:.0e}), so that no comparison of answers would hold. Rotary embeddings that change for the whole batch "
            f"do that. {advice}"
        )


def _prove_plain(model: PreTrainedModel, forest: list[PromptTree], autocast: torch.dtype | None, floor: float) -> EnginePath:
    """The plain way: with the head in chunks, where running it apart gives the model's own log-probabilities; else with its own head.

    Raises:
        ModelError: a reward model gives other scores than its decoder and score layer.
    """
    own_head = EnginePath("plain", None)
    if score_head_of(model) is not None:
        if floor == EXACT[0]:  # in half precision its own score is rounded besides, and says nothing more
            prove_scores(model, forest[:NUM_SHORT_TREES], floor)
        return EnginePath("plain", None, scores=True)
    if decoder_of(model) is None or plain_head_of(model) is None:
        return own_head
    shape = _named_head_shape(model.config)
    batch = pack(forest, sharing="plain", device=model.device)
    with torch.no_grad(), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        own = Policy(model, own_head)(batch).values_N
        try:
            chunked = Policy(model, EnginePath("plain", shape))(batch).values_N
        except (TypeError, AttributeError, ValueError, RuntimeError):  # a decoder that wants other inputs, or returns something else
            return own_head
    return EnginePath("plain", shape) if relative(chunked, own) <= floor else own_head


def _named_head_shape(config: PretrainedConfig) -> HeadShape:
    """Scale and cap by the names under which configs hold them; whether they mean what we think is proved, not trusted."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    divisor = getattr(text, "logits_scaling", None) or 1.0
    return HeadShape(scale=float(scale) / float(divisor), soft_cap=getattr(text, "final_logit_softcapping", None))


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients of parameters: the proof needs those of the embeddings only. Afterwards all is as before."""
    was_training = model.training
    attention = model.config._attn_implementation
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train(False)
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(was_training)
        set_attention(model, attention)


def _difference(run: _Run, base: _Run) -> Difference:
    return Difference(relative(run.logps_N, base.logps_N), relative(run.gradients_TD, base.gradients_TD))


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text or type(error).__name__
