"""The runs that tests of this room ask about."""

from tests.pipeline.trained_runs import chat_run, continued_run, full_run, lora_run, reward_run, sft_run

__all__ = ["chat_run", "continued_run", "full_run", "lora_run", "reward_run", "sft_run"]
