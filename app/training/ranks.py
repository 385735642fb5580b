"""The processes of one run, a card each, as torchrun starts them: their group, and what they average."""

import logging
import os
from collections.abc import Sequence

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from app.shared.devices import choose_device
from app.shared.refusals import Refused
from app.training.run_errors import one_line_errors


class ProcessGroup:
    """Joined before anything else of a run that torchrun started, left at its end."""

    def join(self) -> None:
        if "RANK" not in os.environ:
            what = "bundles/multi_gpu.json runs under torchrun"
            raise Refused("NO_TORCHRUN", what, "start it with torchrun --nproc_per_node=N -m monai.bundle …")
        if not dist.is_initialized():
            choose_device()
            store, rank, world = next(rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                # torchrun's restart keeps the store: without a name of its own an attempt would read where the ranks
                # of the last one listened. Over several nodes attempts are not counted alike, and stores are new.
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"attempt {attempt}", store)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
            one_line_errors()  # torch has put its own hook before ours
        if dist.get_rank() != 0:  # one voice on the console
            logging.getLogger().setLevel(logging.WARNING)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


@torch.no_grad()
def distribute(network: nn.Module) -> nn.Module:
    """The network, on every rank as the first one has it."""
    if idist.get_world_size() > 1:
        for tensor in (*network.parameters(), *network.buffers()):
            whole = tensor.contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)
    return network


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients become their means over ranks: one message for each type, as one a parameter takes the host longer.

    What has no gradient here may have one on another rank, and counts as zero.
    """
    world = idist.get_world_size()
    if world == 1:
        return
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        parameter.grad = grad
        by_type.setdefault(grad.dtype, []).append(grad)
    for grads in by_type.values():
        rows = in_few(grads)
        message = torch.cat(rows)
        dist.all_reduce(message)
        torch._foreach_copy_(rows, message.div_(world).split([len(row) for row in rows]))


def in_few(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same memory as vectors, one for all that lie behind one another, as gradients from a CUDA graph do."""
    ends: list[int] = []
    rows: list[torch.Tensor] = []
    for tensor in tensors:
        memory, begin = tensor.untyped_storage(), tensor.storage_offset()
        if rows and memory.data_ptr() == rows[-1].untyped_storage().data_ptr() and begin == ends[-1]:
            ends[-1] += tensor.numel()
            rows[-1] = rows[-1].as_strided((len(rows[-1]) + tensor.numel(),), (1,))
        else:
            ends.append(begin + tensor.numel())
            rows.append(tensor.view(-1))
    return rows


def mean_of_ranks(totals: torch.Tensor) -> torch.Tensor:
    """Every rank has as many samples, so the mean over ranks is the mean over samples."""
    world = idist.get_world_size()
    return totals if world == 1 else idist.all_reduce(totals) / world


def largest_of_ranks(values: torch.Tensor) -> torch.Tensor:
    return values if idist.get_world_size() == 1 else idist.all_reduce(values, op="MAX")
