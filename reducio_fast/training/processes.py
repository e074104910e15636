"""The processes of one run under torchrun: ranks, process groups, and the distribution of a model over them.

Without torchrun a run has one process, and the collectives here do nothing. `torchrun --nproc-per-node N` runs the same
code in N processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..system.devices import resolve_device
from ..system.errors import ReducioError

PARALLEL = ("ddp", "fsdp")
TIMEOUT = timedelta(minutes=10)  # of a collective: the longest wait for a process that was killed


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's rank, the number of processes, the `device` it computes on, and its process groups."""

    rank: int
    world_size: int
    device: torch.device
    # Separate gloo groups for checkpoints and for the loop: in one group the collectives of a background save would
    # pair with those of the loop and deadlock.
    checkpoints: Any = None
    control: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes logs and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(self.control)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means of the values over all processes; all must pass the same names."""
        if self.world_size == 1 or not values:
            return values
        summed = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(summed, group=self.control)
        return dict(zip(values, (summed / self.world_size).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return flag if self.world_size == 1 else self.mean({"flag": float(flag)})["flag"] > 0

    def all_finite(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether both are finite in every process, so that all processes skip a step together."""
        fine = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        if self.world_size > 1:
            flag = fine.to(torch.int32).cpu()
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.control)
            return bool(flag)
        return bool(fine)


@contextlib.contextmanager
def joined(device: str | torch.device = "cpu", threads: int | None = None) -> Iterator[Processes]:
    """Join the process group of the run and yield this process's `Processes`; leave the group at the end.

    Args:
        device: "cuda" means the GPU of the process's local rank.
        threads: torch's number of CPU threads inside the block; None does not change it.

    Raises:
        ReducioError: the device cannot be used; torchrun's variables are set and the group cannot be formed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with _group(device) as processes:
            yield processes
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _group(word: str | torch.device) -> Iterator[Processes]:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and str(word) == "cuda":
        word = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = resolve_device(word)
    if world_size == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise ReducioError(
            f"WORLD_SIZE={world_size}: cannot join the process group: {str(error).splitlines()[0]}"
        ) from error
    try:
        groups = [dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2)]
        yield Processes(dist.get_rank(), world_size, device, *groups)
    finally:
        dist.destroy_process_group()


def spread(module: nn.Module, parallel: str, processes: Processes, blocks: Iterable[nn.Module] = ()) -> nn.Module:
    """Wrap `module` for data parallelism: "ddp" averages gradients, "fsdp" also shards parameters.

    "fsdp" gathers the `blocks` one by one; parameters outside of them are gathered for the module's whole pass. "fsdp"
    shards with a single process too, so that a test runs the same code as a cluster.
    """
    if parallel == "fsdp":
        mesh = None if dist.is_initialized() else _alone(processes.device)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh)
    if processes.world_size > 1:
        # A phase, or a batch without images, may not use all parameters; these get no step, as with one process.
        return DistributedDataParallel(module, find_unused_parameters=True)
    return module


def _alone(device: torch.device) -> Any:
    """A device mesh of this process alone."""
    with contextlib.suppress(ValueError):  # already initialised by an earlier stage
        store = dist.HashStore()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    return dist.device_mesh.init_device_mesh(device.type, (1,))


def accumulating(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Context of a backward pass that exchanges gradients between processes only for the `last` batch of a step."""
    if isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext() if last else module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
    return contextlib.nullcontext()
