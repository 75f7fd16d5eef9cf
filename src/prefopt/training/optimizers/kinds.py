"""The optimizers by name. Each is AdamW; they differ in how many bits they hold what in.

    adamw       torch         weights, gradients and moments in float32: 16 bytes for a trained weight
    adamw-8bit  bitsandbytes  moments in 8 bits, in blocks of 256 with a scale each: 10 bytes
    adamw-bf16  optimi        everything in bf16, and in a fifth number what rounding took from the weight: 10 bytes

The bytes are those of weight, gradient and state together.
"""

from collections.abc import Mapping

from prefopt.training.optimizers.compensated import Compensated
from prefopt.training.optimizers.eight_bit import EightBit
from prefopt.training.optimizers.kind import Kind
from prefopt.training.optimizers.whole import Whole

KINDS: Mapping[str, Kind] = {"adamw": Whole(), "adamw-8bit": EightBit(), "adamw-bf16": Compensated()}
"""By the names of the setting `optim`."""


def kind_of(optimizer: object) -> Kind:
    """The kind that made an optimizer."""
    return next(kind for kind in KINDS.values() if kind.made(optimizer))
