"""A world small enough to enumerate: two prompts, fifteen completions each, and every method's loss in expectation over all the data
that there could be.

What is minimised is the real thing: `Method.loss`, its units and its weights, on trees that go through `pack`, in float64. Only the
model is small, a table with one row of logits for each prompt and prefix, which can express every policy; and the data has no
noise, because each tree weighs as much as it is likely. `test_theory.py` compares what comes out with what the papers
say, `bench/theory.py` draws it for docs/theory.md.

Shapes: X prompts, Y completions, S prefixes, V tokens, L places in a completion; N scored tokens of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.logps import TokenLogps
from prefopt.methods.method import LossOutput, Method
from prefopt.methods.table import METHODS
from prefopt.training.step import unit_totals, weighted_loss
from prefopt.trees import Completion, PromptTree, token_ids

Ids = tuple[int, ...]

END = 0
WORDS = (1, 2)
LONGEST = 3
"""Tokens of the longest completion; one that has not ended by then is cut."""

PROMPTS: tuple[Ids, ...] = ((3,), (3, 4))
"""Of different lengths, so that a mistake about where a completion begins shows."""

PREFIXES: tuple[Ids, ...] = tuple(words for length in range(LONGEST) for words in product(WORDS, repeat=length))
COMPLETIONS: tuple[Ids, ...] = tuple(
    (*prefix, token) for prefix in PREFIXES for token in (END, *WORDS) if token == END or len(prefix) == LONGEST - 1
)
"""All of them: no completion is the beginning of another, so that their probabilities add up to 1 under every policy."""

LENGTH_Y = torch.tensor([len(completion) for completion in COMPLETIONS], dtype=torch.float64)


class TokenTable(nn.Module):
    """A policy that keeps the logits of the next token for every prompt and prefix.

    Args:
        logits_XSV: where it starts, float64.
    """

    def __init__(self, logits_XSV: Tensor) -> None:
        super().__init__()
        self.logits_XSV = nn.Parameter(logits_XSV.detach().clone())

    def forward(self, batch: TreeBatch, row_N: Tensor) -> TokenLogps:
        """Log-probabilities as the engine gives them.

        Args:
            batch: plain.
            row_N: of each scored token, the row of the table that predicts it (`rows_of`).
        """
        logps_NV = self.logits_XSV.flatten(0, 1).log_softmax(-1)[row_N]
        values_N = logps_NV.gather(1, batch.target_N[:, None])[:, 0]
        return TokenLogps(
            values_N,
            batch.lengths_C,
            batch.prompt_lengths_B,
            batch.num_completion_tokens,
            log_sum_squares_N=(2 * logps_NV).logsumexp(-1).detach(),
        )

    @torch.no_grad()
    def logps(self) -> Tensor:
        """Log-probability of every completion, [X, Y], as the product of its tokens' probabilities."""
        table_XSV = self.logits_XSV.log_softmax(-1)
        columns = [
            sum(table_XSV[:, PREFIXES.index(completion[:place]), token] for place, token in enumerate(completion))
            for completion in COMPLETIONS
        ]
        return torch.stack([torch.as_tensor(column) for column in columns], 1)


def rows_of(batch: TreeBatch) -> Tensor:
    """Of each scored token of a plain batch the row of a `TokenTable`, int64 [N], read from the tokens in front of it."""
    found = []
    for position in batch.predict_from_N.tolist():
        row, column = divmod(position, batch.input_ids.shape[1])
        before = tuple(batch.input_ids[row, : column + 1].tolist())
        prompt = max((prompt for prompt in PROMPTS if before[: len(prompt)] == prompt), key=len)
        found.append(PROMPTS.index(prompt) * len(PREFIXES) + PREFIXES.index(before[len(prompt) :]))
    return torch.tensor(found)


@dataclass(frozen=True)
class World:
    """A reference policy, its log-probabilities, and the reward by which people judge."""

    reference: TokenTable
    reference_XY: Tensor
    reward_XY: Tensor


def make_world(seed: int = 0) -> World:
    """One that the seed draws; rewards differ by about 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    reference = TokenTable(0.8 * normal(len(PROMPTS), len(PREFIXES), 1 + len(WORDS)))
    return World(reference, reference.logps(), normal(len(PROMPTS), len(COMPLETIONS)))


# Preferences [X, Y, Y]: how often the first of two is preferred; 1/2 on the diagonal.


def bradley_terry(reward_XY: Tensor) -> Tensor:
    """σ(r(y) − r(y'))."""
    return (reward_XY[:, :, None] - reward_XY[:, None, :]).sigmoid()


def certain(reward_XY: Tensor) -> Tensor:
    """The one with the higher reward, always."""
    return bradley_terry(reward_XY).sub(0.5).sign() / 2 + 0.5


def flipped(preference_XYY: Tensor, rate: float) -> Tensor:
    """The same where chosen and rejected are exchanged at a rate."""
    return (1 - rate) * preference_XYY + rate * (1 - preference_XYY)


# How often two completions are compared, [X, Y, Y], symmetric.


def by_chance(probabilities_XY: Tensor) -> Tensor:
    """Two independent draws."""
    return probabilities_XY[:, :, None] * probabilities_XY[:, None, :]


def all_alike() -> Tensor:
    """Every two as often as any others."""
    return by_chance(torch.full((len(PROMPTS), len(COMPLETIONS)), 1 / len(COMPLETIONS), dtype=torch.float64))


def only(couples: Iterable[tuple[int, int]]) -> Tensor:
    """These, for every prompt, and no others."""
    weight_XYY = torch.zeros(len(PROMPTS), len(COMPLETIONS), len(COMPLETIONS), dtype=torch.float64)
    for one, other in couples:
        weight_XYY[:, one, other] = weight_XYY[:, other, one] = 1.0
    return weight_XYY


CHAIN = tuple(zip(range(len(COMPLETIONS) - 1), range(1, len(COMPLETIONS)), strict=True))
"""Each completion is compared with the next, and with no other."""


def pairs(preference_XYY: Tensor, weight_XYY: Tensor) -> list[PromptTree]:
    """Every pair that can occur, chosen first; its weight is how often it does."""
    often_XYY = preference_XYY * weight_XYY
    return [
        PromptTree(token_ids(prompt), (completion(one), completion(other)), weight=often_XYY[x, one, other].item())
        for x, prompt in enumerate(PROMPTS)
        for one, other in permutations(range(len(COMPLETIONS)), 2)
        if often_XYY[x, one, other] > 0
    ]


def rankings(reward_XY: Tensor, groups: Sequence[Sequence[int]]) -> list[PromptTree]:
    """Every order of every group; its weight is its probability under Plackett and Luce, who draw the best first."""

    def ranked(prompt: Ids, order: Sequence[int], reward_Y: Tensor) -> PromptTree:
        answers = tuple(completion(y, rank=rank) for rank, y in enumerate(order))
        return PromptTree(token_ids(prompt), answers, weight=_likely(reward_Y[list(order)]))

    return [
        ranked(prompt, order, reward_Y)
        for prompt, reward_Y in zip(PROMPTS, reward_XY, strict=True)
        for group in groups
        for order in permutations(group)
    ]


def _likely(ordered_K: Tensor) -> float:
    return (ordered_K - ordered_K.flip(0).logcumsumexp(0).flip(0)).sum().exp().item()


def thumbs(up_XY: Tensor, weight_XY: Tensor) -> list[PromptTree]:
    """Every completion with a thumb up and with a thumb down.

    Args:
        up_XY: share of thumbs up.
        weight_XY: how often the completion is shown.
    """
    return [
        PromptTree(token_ids(prompt), (completion(y, label=label),), weight=(share * weight_XY[x, y]).item())
        for x, prompt in enumerate(PROMPTS)
        for y in range(len(COMPLETIONS))
        for label, share in ((True, up_XY[x, y]), (False, 1 - up_XY[x, y]))
    ]


def completion(y: int, **others: Any) -> Completion:
    """One of the fifteen."""
    return Completion(token_ids(COMPLETIONS[y]), **others)


# Closed forms: log-probabilities [X, Y].


def tilted(base_XY: Tensor, score_XY: Tensor) -> Tensor:
    """base·exp(score) / Z: with the reference and r/β the optimum of RLHF."""
    return (base_XY + score_XY).log_softmax(-1)


def balanced(logps_at: Callable[[Tensor], Tensor], high_X: Tensor) -> Tensor:
    """`logps_at(c)` for the c of each prompt at which the probabilities add up to 1.

    Args:
        logps_at: log-probabilities [X, Y] that rise with c [X, 1].
        high_X: a c at which they add up to more.
    """
    high_X1 = high_X[:, None]
    low_X1 = high_X1 - 1e4
    for _ in range(200):
        middle_X1 = (low_X1 + high_X1) / 2
        too_much_X1 = logps_at(middle_X1).logsumexp(-1, keepdim=True) > 0
        low_X1, high_X1 = low_X1.where(too_much_X1, middle_X1), middle_X1.where(too_much_X1, high_X1)
    return logps_at((low_X1 + high_X1) / 2)


def per_token(base_XY: Tensor, score_XY: Tensor) -> Tensor:
    """base·exp(length·(score + c)), where a method reads means over tokens."""
    return balanced(lambda c: base_XY + LENGTH_Y * (score_XY + c), 100 - score_XY.amin(-1))


def far_apart(one_XY: Tensor, other_XY: Tensor) -> float:
    """Total variation between two policies, the larger one of the prompts'."""
    return (one_XY.exp() - other_XY.exp()).abs().sum(-1).max().item() / 2


def reward_and_kl(world: World, logps_XY: Tensor) -> tuple[float, float]:
    """Mean reward and KL from the reference, in nats, of the two prompts together."""
    probabilities_XY = logps_XY.exp()
    reward = (probabilities_XY * world.reward_XY).sum(-1).mean().item()
    return reward, (probabilities_XY * (logps_XY - world.reference_XY)).sum(-1).mean().item()


# Training.


@dataclass
class Exact:
    """A method's loss over all data at once, as a function of the policy.

    Args:
        method: made with its settings.
        trees: the data, each tree weighing as much as it is likely.
        world: with the reference, from which training starts.
    """

    method: Method
    trees: Sequence[PromptTree]
    world: World
    parts: Mapping[str, tuple[TreeBatch, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.trees = list(self.method.arrange(self.trees, seed=0))
        self.totals = unit_totals(self.method, self.trees)
        self.state = self.method.state_from(self.trees)
        self.parts = {"loss": self._packed(self.method.in_loss), "statistics": self._packed(self.method.in_statistics)}
        with torch.no_grad():
            self.reference = {name: self.world.reference(*part) for name, part in self.parts.items()}

    def _packed(self, part: Callable[[PromptTree], PromptTree]) -> tuple[TreeBatch, Tensor]:
        trees = [part(tree) for tree in self.trees]
        # The engine keeps weights in float32; here they are probabilities, and rounding would move the optimum.
        weight_B = torch.tensor([tree.weight for tree in trees], dtype=torch.float64)
        batch = replace(pack(trees, sharing="plain"), weight_B=weight_B)
        return batch, rows_of(batch)

    @torch.no_grad()
    def statistics(self, policy: TokenTable) -> Mapping[str, float]:
        """The sums that couple the examples, as the loop takes them before a step."""
        sums = self.method.statistics(policy(*self.parts["statistics"]), self.reference["statistics"], self.parts["statistics"][0])
        return {name: value.item() for name, value in (sums or {}).items()}

    def output(self, policy: TokenTable, statistics: Mapping[str, float]) -> LossOutput:
        """What the method makes of the data."""
        reference = self.reference["loss"] if self.method.needs.reference else None
        batch = self.parts["loss"][0]
        return self.method.loss(policy(*self.parts["loss"]), reference, batch, statistics=statistics, state=self.state)

    def loss(self, policy: TokenTable, statistics: Mapping[str, float] | None = None) -> Tensor:
        """The loss, as the loop weighs it."""
        found = self.statistics(policy) if statistics is None else statistics
        return weighted_loss(self.output(policy, found), self.parts["loss"][0], self.totals)

    @torch.no_grad()
    def metric(self, name: str, policy: TokenTable) -> float:
        """The mean of a metric, by weight."""
        weight_B = self.parts["loss"][0].weight_B
        return ((self.output(policy, self.statistics(policy)).metrics[name] * weight_B).sum() / weight_B.sum()).item()

    def slopes(self, policy: TokenTable) -> Tensor:
        """The loss's derivatives by the logits, as the loop would follow them: what couples examples is held."""
        (gradient_XSV,) = torch.autograd.grad(self.loss(policy), policy.parameters())
        return gradient_XSV

    def steps(self, optimizer: type[torch.optim.Optimizer], num_steps: int, *, fade: bool = False, **settings: Any) -> Iterator[TokenTable]:
        """The policy before the first step, and after each.

        Args:
            optimizer: of torch.
            num_steps: how many.
            fade: the rate falls to 0 along a line.
            settings: the optimizer's.
        """
        policy = TokenTable(self.world.reference.logits_XSV)
        made = optimizer(policy.parameters(), **settings)
        yield policy
        for step in range(num_steps):
            if fade:
                made.param_groups[0]["lr"] = settings["lr"] * (1 - step / num_steps)
            statistics = self.statistics(policy)

            def value(statistics: Mapping[str, float] = statistics) -> float:
                made.zero_grad()
                loss = self.loss(policy, statistics)
                loss.backward()
                return loss.item()

            made.step(value)
            yield policy

    def solve(self, *, slope: float = 1e-9) -> TokenTable:
        """The policy at rest: no derivative of the loss is above `slope`.

        L-BFGS goes there. It ends early where rounding hides from it that the loss still falls, and where a weight is held that
        depends on the policy (WPO); a few steps of Newton's method on the derivatives do the rest.

        Raises:
            AssertionError: it does not come to rest.
        """
        search = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0.1 * slope, "tolerance_change": 0.0}
        for policy in self.steps(torch.optim.LBFGS, 15, lr=1.0, max_iter=20, history_size=30, **search):
            if self.slopes(policy).abs().max() < slope:
                return policy
        for _ in range(10):
            slopes = self.slopes(policy)
            if slopes.abs().max() < slope:
                return policy
            # Softmax leaves a direction free in each row of the table: the smallest step that serves is taken.
            step = torch.linalg.lstsq(self._bends(policy, slopes), slopes.flatten(), rcond=1e-7, driver="gelsd").solution
            with torch.no_grad():
                policy.logits_XSV -= step.view_as(policy.logits_XSV)
        raise AssertionError(f"{self.method.name} does not come to rest: its slope is {slopes.abs().max():.1e}")

    def _bends(self, policy: TokenTable, slopes: Tensor) -> Tensor:
        """Derivatives of the slopes, as differences."""
        columns = []
        for place in range(slopes.numel()):
            beside = TokenTable(policy.logits_XSV)
            with torch.no_grad():
                beside.logits_XSV.view(-1)[place] += 1e-6
            columns.append((self.slopes(beside) - slopes).flatten() / 1e-6)
        return torch.stack(columns, 1)


def exact(name: str, trees: Sequence[PromptTree], world: World, **settings: Any) -> Exact:
    """A method by its name, on data of a world."""
    kind = next(row for row in METHODS if row.name == name).load()
    return Exact(kind(kind.settings_class(**settings)), trees, world)
