"""Values of settings that follow from the facts."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefopt.pipeline.advise.facts import Facts
from prefopt.training.settings import RunSettings
from prefopt.training.watching.start import ENOUGH_STEPS

FEW = 1000
"""Examples below which there are few of them: fifteen steps of a batch of 64."""

TOO_FEW = 50
"""Examples below which a tenth is too few to say anything, so that nothing is held out."""

HELD_OUT, HELD_OUT_OF_FEW = 0.05, 0.1
"""Share that is held out where nothing else is said: enough of few to say anything."""

SMALLEST_BATCH = 8

SEVERAL_EPOCHS = 3.0
"""Of few examples; the best evaluation says how many it should have been."""

EVALUATIONS = 10
"""On the way."""


def default(name: str) -> Any:
    """What every run has where nothing is said."""
    return RunSettings.model_fields[name].default


def error_rate(facts: Facts) -> float:
    """Rate of wrong verdicts, to two digits, within what the robust loss is used with."""
    from prefopt.methods.robust import Robust

    least, most = Robust.usual["label_smoothing"]
    return round(min(max(facts.agreement.error, least), most), 2)


def epochs(facts: Facts) -> float:
    """Passes over few examples, or over enough."""
    return SEVERAL_EPOCHS if facts.num_per_epoch < FEW else float(default("epochs"))


def held_out(facts: Facts) -> float:
    """Share that is held out: none beside held-out data that is given or of rows that open alike; else as told; else none of too little."""
    if facts.has_eval or facts.one_opening:
        return 0.0
    if facts.eval_fraction is not None:
        return facts.eval_fraction
    if facts.num_examples < TOO_FEW:
        return 0.0
    return HELD_OUT_OF_FEW if facts.num_examples < FEW else HELD_OUT


def all_good(facts: Facts) -> Facts:
    """The facts of all good answers, those beside what is judged among them: what SFT trains on."""
    beside = facts.beside
    if not beside.sources and facts.kind != "thumbs":
        return facts
    up = facts.counts.num_up / max(1, facts.num_examples) if facts.kind == "thumbs" else 1.0
    return replace(
        facts,
        num_examples=round(facts.num_examples * up) + beside.num_examples,
        num_per_epoch=round(facts.num_per_epoch * up) + beside.num_per_epoch,
        eval_fraction=None if facts.has_eval else held_out(facts),  # the same rows in every stage
    )


def evaluated(facts: Facts, **values: Any) -> dict[str, Any]:
    """These settings, where there is anything to evaluate on."""
    return values if facts.has_eval or held_out(facts) else {}


def trained_on(facts: Facts) -> int:
    """Examples of an epoch: as often as sources are weighted, without what is held out."""
    return max(1, round(facts.num_per_epoch * (1 - held_out(facts))))


def steps_of_default(facts: Facts) -> int:
    """Optimizer steps of a run with the default batch."""
    return math.ceil(trained_on(facts) * epochs(facts) / int(default("batch_size")))


def batch_size(facts: Facts) -> int:
    """The default, or a power of two that leaves enough steps."""
    usual = int(default("batch_size"))
    if steps_of_default(facts) >= ENOUGH_STEPS:
        return usual
    most = trained_on(facts) * epochs(facts) / ENOUGH_STEPS
    return max(SMALLEST_BATCH, min(usual, 1 << int(math.log2(max(most, 1)))))


def num_steps(facts: Facts) -> int:
    """Optimizer steps of the run."""
    return math.ceil(trained_on(facts) * epochs(facts) / batch_size(facts))


def eval_every(facts: Facts) -> int:
    """Steps between evaluations."""
    return max(1, num_steps(facts) // EVALUATIONS)


def max_length(facts: Facts) -> int:
    """The next power of two that ninety-nine in a hundred examples fit in, as far as the model reads."""
    wanted = 1 << math.ceil(math.log2(max(facts.lengths.uncut, 2 * facts.lengths.limit)))
    context = facts.model.context if facts.model is not None else None
    return min(wanted, context) if context else wanted


def what_fits(facts: Facts) -> Mapping[str, Any]:
    """What the chosen way of training needs to fit."""
    assert facts.model is not None, "its rules hold for a model only"
    assert facts.model.way is not None
    return facts.model.way.changes
