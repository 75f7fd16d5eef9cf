"""What the methods on pairs have in common: everything but the loss of a pair.

A method of this kind says what a pair costs (`pair_losses`) and which options fit it (the groups that its settings derive
from). The base reads the options, weighs the terms, mixes other losses in, and reports the metrics.

Shapes: B examples, P comparisons (P = B for pairs).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError, field_validator, model_validator

from prefopt.config import describe, nearest, printable, readings, shown
from prefopt.methods.comparisons import Comparisons, best_of, has_order
from prefopt.methods.method import LossOutput, Method, MethodSettings, Needs, Setting, State, Term
from prefopt.methods.options import WPO, AllPairs, FDivergence, LengthDesensitised, Reduction, SFTWeight, is_number
from prefopt.methods.pairs import Pairs, pair_metrics
from prefopt.methods.sft import sft_loss
from prefopt.trees import PromptTree

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps

LIKELIHOOD = "sft"
"""What a mix calls the negative log-likelihood of the chosen answers."""


class PairSettings(AllPairs, WPO):
    """Settings of every method on pairs."""

    mix: dict[str, Any] = Setting(
        {},
        help="Other losses on pairs to add, by weight: ipo=0.5 sft=0.1. In a file also with settings of their own: {ipo: {weight: 0.5, "
        "beta: 0.2}}; sft is the likelihood of the chosen answers, per token.",
    )

    has_reference: ClassVar[bool] = True
    """Whether the method compares with a reference, so that a loss which does can be mixed in."""

    @field_validator("mix", mode="before")
    @classmethod
    def _written_in_one_word(cls, value: Any) -> Any:
        """Takes `ipo=0.5,sft=0.1` as one text too."""
        if isinstance(value, str):
            value = dict(part.partition("=")[::2] for part in value.split(","))
        if not isinstance(value, dict):
            return value
        parts: dict[Any, Any] = {}
        for name, given in value.items():
            first, *others = given.split(",") if isinstance(given, str) else (given,)
            parts |= {name: first} | dict(part.partition("=")[::2] for part in others)
        return {name.strip() if isinstance(name, str) else name: _number(given) for name, given in parts.items()}

    @field_validator("mix")
    @classmethod
    def _losses_that_there_are(cls, value: dict[str, Any]) -> dict[str, Any]:
        for _, part in parts_of(value):
            if part is not None and part.needs.reference and not cls.has_reference:
                raise ValueError(
                    f"{part.name} needs a reference, and this method has none: train with {part.name}, and mix this one into it"
                )
        return value

    @model_validator(mode="after")
    def _rankings_have_no_shorter_answer(self) -> PairSettings:
        for ranked, kind in readings(type(self)).items():
            if kind != "ranked" or not getattr(self, ranked):
                continue
            about = f"is about the two answers of a pair, and {ranked} reads rankings: leave one of them out"
            if getattr(self, "ld_alpha", None) is not None:
                raise ValueError(f"ld_alpha {about}")
            for _, part in parts_of(self.mix):
                if part is not None and getattr(part.settings, "ld_alpha", None) is not None:
                    raise ValueError(f"mix: {part.name}.ld_alpha {about}")
        return self


def _number(given: Any) -> Any:
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given


class BetaSettings(MethodSettings):
    """The hold on the reference, for methods whose loss reads it as DPO's does."""

    beta: float = Setting(0.1, gt=0, help="Hold on the reference. 0.01-0.05 moves far, 0.1-0.3 is usual, above 0.5 is slow.")


def pair_methods() -> dict[str, type[PairMethod]]:
    """The methods on pairs, by name."""
    from prefopt.methods.table import METHODS  # it names this module's methods, and loads none

    loaded = {row.name: row.load() for row in METHODS}
    return {name: method for name, method in loaded.items() if issubclass(method, PairMethod)}


def parts_of(mix: Mapping[str, Any]) -> list[tuple[float, PairMethod | None]]:
    """The losses of a mix with their weights; None stands for the likelihood.

    Raises:
        ValueError: there is no such loss, or what is given for it is wrong; says what may be.
    """
    parts: list[tuple[float, PairMethod | None]] = []
    for name, given in mix.items():
        own = dict(given) if isinstance(given, dict) else {"weight": given}
        weight = own.pop("weight", 1.0)
        if not is_number(weight) or weight < 0:
            raise ValueError(f"the weight of {printable(name)} must be a number, 0 or more (given: {shown(weight)})")
        if name == LIKELIHOOD:
            if own:
                raise ValueError(f"{name} has no settings but its weight (given: {', '.join(map(printable, own))})")
            parts.append((float(weight), None))
            continue
        known = pair_methods()
        if name not in known:
            names = [*known, LIKELIHOOD]
            if any(name in method.settings_class.model_fields for method in known.values()):
                raise ValueError(
                    f"{name} is a setting and no loss: a loss with settings of its own is written in a file, as {{ipo: {{weight: 0.5, "
                    f"{name}: ...}}}}"
                )
            raise ValueError(f"{printable(name)} is no loss on pairs{nearest(str(name), names)}; there are {', '.join(names)}")
        if taken := [setting for setting in ("mix", *readings(known[name].settings_class)) if setting in own]:
            raise ValueError(f"{taken[0]} is set for the whole mix, not for {name} in it")
        kind = known[name].settings_class
        try:
            parts.append((float(weight), known[name](kind.model_validate(own))))
        except ValidationError as error:
            raise ValueError("; ".join(f"{name}.{describe(detail, kind, {})}" for detail in error.errors(include_url=False))) from None
    return parts


def one_per_ranking(tree: PromptTree) -> float:
    """The unit of means over rankings: 1 where two answers differ in rank, 0 where there is nothing to compare."""
    return 1.0 if has_order(tree) else 0.0


def chosen_tokens(tree: PromptTree) -> float:
    """The unit of the chosen answers' likelihood: their scored tokens; 0 where all answers share a rank, and none is chosen."""
    return float(tree.completions[best_of(tree)].num_scored) if has_order(tree) else 0.0


def prompt_and_chosen_tokens(tree: PromptTree) -> float:
    """The same with the prompts' scored tokens."""
    return chosen_tokens(tree) + (float(tree.prompt_scored.sum()) if tree.prompt_scored is not None and has_order(tree) else 0.0)


class PairMethod(Method):
    """Base of the methods that compare a chosen completion with a rejected one."""

    settings_class: ClassVar[type[PairSettings]] = PairSettings
    units = {"pairs": one_per_ranking, "tokens": chosen_tokens, "prompt_tokens": prompt_and_chosen_tokens}

    settings: Any

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.parts = parts_of(settings.mix)
        for _, part in self.parts:
            if part is not None:
                self.needs = replace(self.needs, outputs=self.needs.outputs | part.needs.outputs)

    @classmethod
    def needs_with(cls, settings: Any) -> Needs:
        """With `wpo` the policy's Σ π² too."""
        needs = super().needs_with(settings)
        return replace(needs, outputs=needs.outputs | {"log_sum_squares"}) if settings.wpo else needs

    @property
    def averaged(self) -> bool:
        """Whether the loss reads means over tokens; rewards are reported likewise."""
        return False

    @property
    def reward_scale(self) -> float:
        """β of the implicit reward."""
        return float(self.settings.beta)

    @property
    def likelihood_weight(self) -> float:
        """Weight of the chosen answers' negative log-likelihood."""
        return self.settings.sft_weight if isinstance(self.settings, SFTWeight) else 0.0

    @property
    def learns_prompt(self) -> bool:
        """Whether it is the likelihood of the prompts too."""
        return False

    @abstractmethod
    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """The loss of each comparison, [P]."""

    def own_losses(self, pairs: Pairs, batch: TreeBatch, state: State) -> Tensor:
        """The loss of each example, [B]: the mean of its comparisons, by their weight."""
        losses_P = self.pair_losses(pairs, state)
        if self.settings.wpo:
            losses_P = losses_P * pairs.wpo_weights(clamp=self.settings.wpo_clamp)
        return pairs.comparisons.of_trees(losses_P)

    def arrange(self, trees: Sequence[PromptTree], *, seed: int) -> Sequence[PromptTree]:
        """As the losses of the mix want them."""
        for _, part in self.parts:
            trees = trees if part is None else part.arrange(trees, seed=seed)
        return trees

    def initial_state(self) -> State:
        """What the losses of the mix carry, under their names."""
        states = {part.name: part.initial_state() for _, part in self.parts if part is not None}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def next_state(self, state: State, sums: Mapping[str, float]) -> State:
        """The same after a step."""
        after: State = {}
        for _, part in self.parts:
            if part is not None:
                own = part.next_state(_under(part.name, state), _under(part.name, sums))
                after |= {f"{part.name}/{key}": value for key, value in own.items()}
        return after

    def loss(
        self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch, *, statistics: Mapping[str, float], state: State
    ) -> LossOutput:
        """The mean of `pair_losses`, with what the options add to it."""
        compared = Comparisons.of(batch, all_pairs=self.needs.completions == "ranked")
        terms = list(self.terms(compared, policy, reference, batch, state))
        sums = dict(self.state_sums(compared, policy, reference, batch))
        for weight, part in self.parts:
            if part is None:
                terms.append(likelihood(compared, policy, weight))
                continue
            own = part.terms(compared, policy, reference, batch, _under(part.name, state))
            terms += [replace(term, weight=weight * term.weight) for term in own]
            sums |= {f"{part.name}/{key}": value for key, value in part.state_sums(compared, policy, reference, batch).items()}
        metrics = pair_metrics(
            policy, reference if self.needs.reference else None, batch, beta=self.reward_scale, averaged=self.averaged, comparisons=compared
        )
        # A ranking in which all answers share a rank compares nothing, and has no figures.
        only = dict.fromkeys(metrics, compared.num_B > 0) if self.needs.completions == "ranked" else {}
        return LossOutput(tuple(terms), metrics, sums, only)

    def state_sums(
        self, compared: Comparisons, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch
    ) -> Mapping[str, Tensor]:
        """What `next_state` reads of a micro-batch; nothing for most."""
        return {}

    def terms(
        self, compared: Comparisons, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch, state: State
    ) -> Iterator[Term]:
        """The loss of the pairs and, where it has a weight, the likelihood."""
        settings = self.settings
        pairs = Pairs(compared, policy, reference)
        if isinstance(settings, LengthDesensitised):
            pairs = replace(pairs, ld_alpha=settings.ld_alpha)
        if isinstance(settings, FDivergence):
            pairs = replace(pairs, f_divergence=settings.f_divergence, f_alpha=settings.f_alpha)
        yield Term(self.own_losses(pairs, batch, state), unit="pairs")
        if self.likelihood_weight:
            yield likelihood(compared, policy, self.likelihood_weight, reduction=settings.sft_reduction, learns_prompt=self.learns_prompt)


def likelihood(
    compared: Comparisons, policy: TokenLogps, weight: float, *, reduction: Reduction = "tokens", learns_prompt: bool = False
) -> Term:
    """The negative log-likelihood of the chosen answers; of a ranking without an order 0.

    Args:
        compared, policy: as a loss reads them.
        weight: of the term.
        reduction: how it is averaged.
        learns_prompt: the prompts' likelihood is added.
    """
    logps_B, lengths_B = compared.best(policy.sum()), compared.best(policy.lengths_C)
    if learns_prompt:
        logps_B, lengths_B = logps_B + policy.prompt_sum(), lengths_B + policy.prompt_lengths_B
    losses_B = sft_loss(logps_B / lengths_B.clamp(min=1) if reduction == "mean" else logps_B)
    tokens = "prompt_tokens" if learns_prompt else "tokens"
    return Term(losses_B * (compared.num_B > 0), unit=tokens if reduction == "tokens" else "pairs", weight=weight)


def _under(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
