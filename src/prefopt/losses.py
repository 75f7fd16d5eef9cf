"""The losses of all methods as pure functions: tensors in, one loss per example out.

Each is defined, with its paper and equation, in its method's file.
"""

from prefopt.methods.apo_down import apo_down_loss
from prefopt.methods.apo_zero import apo_zero_loss
from prefopt.methods.bco import bco_loss, bco_thumbs_loss
from prefopt.methods.cpo import cpo_loss
from prefopt.methods.discopop import discopop_loss
from prefopt.methods.dpo import dpo_loss
from prefopt.methods.dpop import dpop_loss
from prefopt.methods.exo import exo_loss
from prefopt.methods.hinge import hinge_loss
from prefopt.methods.ipo import ipo_loss
from prefopt.methods.kto import kto_loss
from prefopt.methods.ln_dpo import ln_dpo_loss
from prefopt.methods.nca import nca_loss
from prefopt.methods.orpo import orpo_loss
from prefopt.methods.ranked import plackett_luce_loss
from prefopt.methods.rdpo import rdpo_loss
from prefopt.methods.reward import centring_loss, reward_loss
from prefopt.methods.robust import robust_loss
from prefopt.methods.sft import sft_loss
from prefopt.methods.simpo import simpo_loss
from prefopt.methods.sppo import sppo_loss

__all__ = [
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_thumbs_loss",
    "centring_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "dpop_loss",
    "exo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "ln_dpo_loss",
    "nca_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "rdpo_loss",
    "reward_loss",
    "robust_loss",
    "sft_loss",
    "simpo_loss",
    "sppo_loss",
]
