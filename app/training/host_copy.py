"""Numbers on their way to the host, which waits for them alone, not for what the device was given after them."""

from collections.abc import Callable

import torch


class HostCopy:
    """A copy of a tensor, begun at once; `tolist` waits until it has arrived.

    On a card both it and what is done to the tensor `first` run beside the current stream, which need not wait where
    that asks other ranks.
    """

    def __init__(self, values: torch.Tensor, *, first: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.arrived = None
        if values.device.type != "cuda":
            self.values = first(values) if first else values
            return
        self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self.arrived, stream = torch.cuda.Event(), torch.cuda.Stream(values.device)
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):
            self.values.copy_(first(values) if first else values, non_blocking=True)
            self.arrived.record()
        values.record_stream(stream)

    def tolist(self) -> list:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()
