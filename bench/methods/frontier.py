"""The best reward that any policy can have at a KL from the SFT model: what every method is short of.

    maximise E[r] at KL(π ‖ π_SFT) ≤ k   =>   π ∝ π_SFT · e^(t·r)

so that reward and KL of the best policy follow from rewards of the SFT model's own samples alone, each weighed by e^(t·r):

    r(t) = Σ w·r,   KL(t) = t·r(t) − log mean(e^(t·r))

Openings say nothing about the sentiment here, so that samples of all openings are taken together.
"""

from collections.abc import Sequence

import numpy as np

STEEPEST = 1e4
"""t at which the best policy writes the best reviews only: rewards are at least 1e-4 apart below 0.9999, and what is above counts alike."""


def tilted(rewards: Sequence[float], steepness: float) -> tuple[float, float]:
    """Reward and KL, in nats, of the SFT model's distribution times e^(steepness · reward).

    Args:
        rewards: of samples of the SFT model.
        steepness: t, 0 or more.

    Example:
        >>> tilted([0.0, 1.0], 0.0)
        (0.5, 0.0)
    """
    reward = np.asarray(rewards, dtype=np.float64)
    exponent = steepness * (reward - reward.max())  # the largest is 0, so that no power overflows
    log_mean = np.log(np.exp(exponent).mean())
    weight = np.exp(exponent - log_mean) / len(reward)
    return float(weight @ reward), max(0.0, float(weight @ exponent - log_mean))


def best_at(rewards: Sequence[float], kl: float) -> float:
    """The highest reward of a policy at most `kl` nats from the model that the samples are of.

    Beyond the KL at which only the best of the samples are written it stays there: rarer ones that nobody sampled are unknown.

    Example:
        >>> best_at([0.0, 1.0], 0.0), best_at([0.0, 1.0], 1.0)
        (0.5, 1.0)
    """
    low, high = 0.0, STEEPEST
    if kl <= 0:
        return tilted(rewards, low)[0]
    if tilted(rewards, high)[1] <= kl:
        return float(max(rewards))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(rewards, middle)[1] <= kl else (low, middle)
    return tilted(rewards, low)[0]
