"""All methods, in the order in which people should consider them.

A plain table: a method that is not in it does not exist. Rows name modules instead of importing them, so that
listing the methods costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefopt.methods.method import Method


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method: its name on the command line, the first line of its module's docstring, and where it lives."""

    name: str
    summary: str
    module: str
    class_name: str

    def load(self) -> type[Method]:
        """The method's class."""
        method: type[Method] = getattr(import_module(self.module), self.class_name)
        return method


ALSO_CALLED = {
    "cdpo": "dpo with label_smoothing",
    "f-dpo": "dpo with f_divergence",
    "ld-dpo": "dpo with ld_alpha",
    "plackett-luce": "dpo with plackett_luce",
    "rm": "reward",
    "rpo": "dpo with sft_weight",
    "slic": "hinge",
    "tr-dpo": "dpo with sync_reference_every_steps",
    "wpo": "dpo with wpo",
}
"""What papers and other tools call a method of its own and is an option here, or has another name."""

METHODS: tuple[MethodRow, ...] = (
    MethodRow("sft", "Supervised fine-tuning: learn to give the answers of the data.", "prefopt.methods.sft", "SFT"),
    MethodRow("dpo", "Direct Preference Optimization: prefer the chosen answer to the rejected one.", "prefopt.methods.dpo", "DPO"),
    MethodRow("ipo", "Identity Preference Optimization: like DPO, with a margin that stops growing.", "prefopt.methods.ipo", "IPO"),
    MethodRow(
        "kto",
        "Kahneman-Tversky Optimization: learns from thumbs up and down on single answers, without pairs.",
        "prefopt.methods.kto",
        "KTO",
    ),
    MethodRow(
        "orpo",
        "Odds-Ratio Preference Optimization: fine-tuning and preference in one step, without a reference.",
        "prefopt.methods.orpo",
        "ORPO",
    ),
    MethodRow(
        "simpo",
        "Simple Preference Optimization: the mean log-probability is the reward; no reference, and a margin to reach.",
        "prefopt.methods.simpo",
        "SimPO",
    ),
    MethodRow(
        "cpo",
        "Contrastive Preference Optimization: DPO without a reference, held by the likelihood of the chosen answers.",
        "prefopt.methods.cpo",
        "CPO",
    ),
    MethodRow("robust", "Robust DPO: unbiased under labels that are flipped at a known rate.", "prefopt.methods.robust", "Robust"),
    MethodRow(
        "hinge", "Hinge loss on the margin, as in SLiC: pairs that are right by enough teach no more.", "prefopt.methods.hinge", "Hinge"
    ),
    MethodRow("ln-dpo", "Length-normalised DPO: DPO on log-probabilities per token.", "prefopt.methods.ln_dpo", "LengthNormalisedDPO"),
    MethodRow("rdpo", "R-DPO: DPO that explains a taste for length away instead of learning it.", "prefopt.methods.rdpo", "RDPO"),
    MethodRow("dpop", "DPO-Positive: DPO that does not let the chosen answer become less likely.", "prefopt.methods.dpop", "DPOP"),
    MethodRow(
        "exo", "Efficient Exact Optimization: the reverse KL to the labels, in place of DPO's forward KL.", "prefopt.methods.exo", "EXO"
    ),
    MethodRow(
        "nca",
        "Noise Contrastive Alignment: raises the chosen answer itself, not only its distance from the rejected one.",
        "prefopt.methods.nca",
        "NCA",
    ),
    MethodRow(
        "bco",
        "Binary Classifier Optimization: the implicit reward, shifted, classifies answers as good or bad.",
        "prefopt.methods.bco",
        "BCO",
    ),
    MethodRow("sppo", "Self-Play Preference Optimization: log-ratios are regressed to plus and minus ½/β.", "prefopt.methods.sppo", "SPPO"),
    MethodRow(
        "apo-zero",
        "Anchored Preference Optimization, zero: the chosen answer rises, the rejected one falls.",
        "prefopt.methods.apo_zero",
        "APOZero",
    ),
    MethodRow(
        "apo-down",
        "Anchored Preference Optimization, down: both answers fall, the rejected one faster.",
        "prefopt.methods.apo_down",
        "APODown",
    ),
    MethodRow(
        "discopop",
        "DiscoPOP: a loss that a language model found, between the logistic and the exponential.",
        "prefopt.methods.discopop",
        "DiscoPOP",
    ),
    MethodRow(
        "reward",
        "Bradley-Terry reward model: a score for any answer, learned from which answers people prefer.",
        "prefopt.methods.reward",
        "Reward",
    ),
)
