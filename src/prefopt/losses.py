"""The losses of all methods as pure functions: tensors in, one loss per example out.

Each is defined, with its paper and equation, in its method's file.
"""

from prefopt.methods.dpo import dpo_loss
from prefopt.methods.sft import sft_loss

__all__ = ["dpo_loss", "sft_loss"]
