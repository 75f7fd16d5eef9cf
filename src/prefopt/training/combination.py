"""Settings that do not go together, where seeing it takes more than the settings: the model's folder, the libraries, the processes."""

from prefopt.errors import ConfigError
from prefopt.models.quantise import need_bitsandbytes, refuse_full
from prefopt.training.group.processes import Processes
from prefopt.training.memory.estimate import trains_adapter
from prefopt.training.optimizers.kinds import KINDS
from prefopt.training.settings import RunSettings


def check_combination(settings: RunSettings, processes: Processes) -> None:
    """Look before anything is read.

    Raises:
        ConfigError: two settings do not go together, or a library is missing; says what to do.
        ModelError: the model's folder does not exist, or all weights were to be trained in 4 bits.
    """
    KINDS[settings.optim].check_installed()
    adapter = trains_adapter(settings)
    if settings.optim == "adamw-bf16" and adapter:
        raise ConfigError(
            f"optim adamw-bf16 is for training all weights, and {settings.model} is an adapter, whose weights are few and stay in float32. "
            "Leave optim out."
        )
    if settings.offload_activations and processes.device.type != "cuda":
        raise ConfigError(
            "offload_activations moves activations from a GPU to the machine's memory, and this run computes on the CPU, where they are "
            "already: nothing would be gained. Leave it out; gradient_checkpointing and a lower max_tokens take less memory here."
        )
    cut = settings.parallel == "fsdp" and processes.count > 1
    if settings.load_in_4bit:
        need_bitsandbytes("--load-in-4bit")
        if not adapter:
            refuse_full(settings.model)
        if cut:
            raise ConfigError(
                "--load-in-4bit with --parallel fsdp: weights in 4 bits lie in blocks that cannot be cut among processes. Use --parallel "
                "ddp, where each holds all of them (half a byte for a weight), or leave out --load-in-4bit."
            )
    if settings.optim == "adamw-8bit" and cut:
        raise ConfigError(
            "--optim adamw-8bit with --parallel fsdp: moments in 8 bits lie in blocks that cannot be cut among processes. Use --optim "
            "adamw, whose moments are cut, or --optim adamw-bf16, or --parallel ddp."
        )
