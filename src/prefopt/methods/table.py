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


METHODS: tuple[MethodRow, ...] = (
    MethodRow("sft", "Supervised fine-tuning: learn to give the answers of the data.", "prefopt.methods.sft", "SFT"),
    MethodRow("dpo", "Direct Preference Optimization: prefer the chosen answer to the rejected one.", "prefopt.methods.dpo", "DPO"),
)
