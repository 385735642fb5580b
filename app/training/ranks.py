"""The processes of one run, a card each, as torchrun starts them: their group, and what they average."""

import logging
import os
import warnings

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


def distribute(network: nn.Module) -> nn.Module:
    """The network with gradients averaged over ranks, where there are several."""
    if idist.get_world_size() == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    with warnings.catch_warnings():  # the argument's new name is not in every torch we support
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def mean_of_ranks(totals: torch.Tensor) -> torch.Tensor:
    """Every rank has as many samples, so the mean over ranks is the mean over samples."""
    world = idist.get_world_size()
    return totals if world == 1 else idist.all_reduce(totals) / world
