"""The next batch made ready on a stream of its own, beside what the device still does for the last one.

Making the maps of a batch waits for their sizes. On the stream of the network that would be a wait for the whole step
before; here it is one for the maps alone. Memory belongs to the stream on which it was first asked for, so a batch is
held until the device has done with it.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SideStream:
    def __init__(self):
        self.stream: torch.cuda.Stream | None = None
        self.held: deque[tuple[Any, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        """What is started inside runs beside the current stream, which goes on once it is done. A card's only."""
        if device.type != "cuda":
            yield
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(device, priority=-1)  # ahead of the last step's kernels: they are many
        while len(self.held) > 1:
            _, done = self.held[0]
            self.stream.wait_event(done)
            self.held.popleft()
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(device).wait_stream(self.stream)

    def hold(self, batch: Any, device: torch.device) -> None:
        """Until the device has done what the current stream was given so far; called when all that reads it is."""
        if device.type == "cuda":
            self.held.append((batch, torch.cuda.current_stream(device).record_event()))
