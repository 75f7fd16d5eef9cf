"""How the processes of a run share the model: each holds all of it (DDP), or a part of every weight (FSDP).

    ddp     every process has the whole model and the optimizer's state; gradients are averaged
    fsdp    every weight, gradient and moment is cut into as many parts as there are processes (`fully_shard`). A layer is
            gathered for the moment in which it runs. Embeddings, last norm and head belong to the policy itself, whose
            forward gathers them: the head's weight is read outside the head's own forward.

A weight that is cut is a DTensor. After a forward pass without gradients FSDP leaves the policy's own unit gathered: whoever
then asks for its parameters gets the gathered copies, and an optimizer made of them trains copies that nothing reads. So a
policy that is cut lets go of its weights after every such pass.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from prefopt.engine.batch import pack
from prefopt.models.policy import Policy, decoder_of
from prefopt.training.group.processes import Processes
from prefopt.trees import Completion, PromptTree, token_ids

Parallel = Literal["ddp", "fsdp"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Types of what checkpoints hold, as safetensors calls them."""


def wrap(policy: Policy, processes: Processes, parallel: Parallel) -> nn.Module:
    """What training calls in the policy's place: the policy itself on one process and where it is cut; DDP around it else."""
    if processes.count == 1:
        return policy
    if parallel == "fsdp":
        shard(policy, processes)
        return policy
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 has another name for it, which 2.11 does not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(policy, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(policy: Policy, processes: Processes) -> None:
    """Cut every weight of the policy into parts, one per process. In place, and once: a policy that is cut stays as it is.

    The weights may lie on a CPU: they go to the process's device unit by unit, so that no device ever holds all of them.
    """
    if isinstance(policy, FSDPModule):
        return
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    apart = of_other_width(policy)
    for part in apart:
        fully_shard(part, mesh=mesh)
    for layer in layers_of(policy):
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    policy.register_forward_hook(let_go)
    # The module that runs first is taken for the root of all. Not every use begins with the policy's own forward.
    token = 0 if policy.model.config.get_text_config().pad_token_id != 0 else 1
    smallest = PromptTree(token_ids([token]), (Completion(token_ids([token])),))
    with torch.no_grad(), torch.autocast(processes.device.type, torch.bfloat16, enabled=bool(apart)):
        policy(pack([smallest], sharing=policy.path.sharing, device=processes.device))


def of_other_width(policy: Policy) -> list[nn.Module]:
    """The norms in float32 among weights that are trained in bf16: what is gathered together must be of one type."""
    if len({parameter.dtype for parameter in policy.parameters() if parameter.requires_grad}) < 2:
        return []
    owns = ((module, list(module.parameters(recurse=False))) for module in policy.modules())
    return [module for module, own in owns if own and all(parameter.dtype == torch.float32 for parameter in own)]


def let_go(policy: nn.Module, _inputs: Any, _output: Any) -> None:
    """Give up gathered weights after a forward pass that no backward pass will follow."""
    if torch.is_grad_enabled() or not isinstance(policy, FSDPModule):
        return
    if hasattr(policy, "reset_iter_state"):  # since torch 2.13; it also forgets the order of the layers, which only backward would
        policy.reset_iter_state()
    else:
        policy.reshard()


def layers_of(policy: Policy) -> list[nn.Module]:
    """The layers that are gathered one at a time: what the architecture says must not be split, or its longest list of modules.

    Empty where there is neither: then the whole model is gathered at once.
    """
    names = set(policy._no_split_modules or ())
    named = [module for module in policy.modules() if type(module).__name__ in names]
    if named:
        inner = {id(part) for module in named for part in module.modules() if part is not module}
        return [module for module in named if id(module) not in inner]
    lists = [list(module) for module in (decoder_of(policy.model) or policy.model).modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def is_cut(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is spread over the processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def gathered(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The tensors, whole, on the main process's CPU; nothing on the others, who must take part.

    One at a time, so that no device holds more than one of them whole. What is the same tensor under two names stays so.
    """
    whole: dict[str, Tensor] = {}
    known: dict[int, Tensor | None] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in known:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            known[id(tensor)] = full.detach().cpu().contiguous() if processes.is_main else None
        if (mine := known[id(tensor)]) is not None:
            whole[name] = mine
    return whole


def saved_weights(module: nn.Module, processes: Processes, *, trained_only: bool) -> dict[str, Tensor]:
    """What `module.state_dict()` would hold of a model that is not cut, as `gathered` gives it.

    Args:
        trained_only: leave out frozen parameters, and all buffers.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if trained_only:
        return gathered({name: parameter for name, parameter in parameters.items() if parameter.requires_grad}, processes)
    return gathered({name: parameters.get(name, tensor) for name, tensor in module.state_dict().items()}, processes)


def put(target: Tensor, value: Tensor) -> None:
    """A whole tensor's numbers into one that may be cut; every process gives the same and keeps its part."""
    with torch.no_grad():
        target.copy_(like(target, value))


def like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor cut as the target is, on its device."""
    if not isinstance(target, DTensor):
        return value.to(target.device)
    on_device = value.to(target.device)
    return distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)


def not_finite(tensors: Mapping[str, Tensor], processes: Processes) -> list[str]:
    """Names of the tensors that hold NaN or an infinity on any process; all processes get the same answer, and must ask.

    Each looks at the part it has: one pass over memory without copies, and one number per tensor that is read.
    """
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    if not parts:
        return []
    broken = processes.add_up(torch.stack([_is_broken(part.detach()).to(processes.device) for part in parts]))
    return [name for name, found in zip(tensors, broken.tolist(), strict=True) if found]


def _is_broken(part: Tensor) -> Tensor:
    """1 or 0, where the tensor is."""
    if not part.numel():  # a process may have no part of a small tensor
        return part.new_zeros((), dtype=torch.float32)
    # The largest absolute value is NaN as soon as one number is; a sum would overflow where all numbers are finite.
    largest: Tensor = torch.linalg.vector_norm(part, ord=math.inf)
    return (~largest.isfinite()).float()


class SharedFile:
    """A safetensors file of the main process, read by all: the others need not see its disk.

    Args:
        path: looked at by the main process only.
        processes: of the run.

    Attributes:
        shapes: name of each tensor -> its shape.
    """

    def __init__(self, path: Path, processes: Processes) -> None:
        self.processes = processes
        self._file = cast(Any, safe_open(path, framework="pt")) if processes.is_main else None
        header: dict[str, tuple[list[int], str]] = {}
        if self._file is not None:
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118  # it is no mapping
            header = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        header = processes.share(header)
        self.shapes = {name: tuple(shape) for name, (shape, _) in header.items()}
        self._dtypes = {name: DTYPES[dtype] for name, (_, dtype) in header.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor, whole: on a CPU where there is one process, else on the process's device. All must go to the end."""
        for name, shape in self.shapes.items():
            tensor = None if self._file is None else self._file.get_tensor(name)
            yield name, self.processes.send(torch.empty(shape, dtype=self._dtypes[name]) if tensor is None else tensor, 0)
