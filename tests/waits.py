"""Counts what a card would be waited for, on a CPU: operations whose result the host must see before it goes on."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READ = {"_local_scalar_dense", "is_nonzero", "equal", "allclose"}  # item, bool, int, float
OF_UNKNOWN_SIZE = {
    *("nonzero", "nonzero_numpy", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}  # by a mask: its true places


class Waits(TorchDispatchMode):
    """`with Waits() as waits:` leaves their number by name in `waits.counts`."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.lists = _Lists(self.counts)

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        masked = name in INDEXED and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        if (name in READ | OF_UNKNOWN_SIZE and not sized) or masked:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


class _Lists(TorchFunctionMode):
    """`tolist`, which reads a CPU's memory past the dispatcher."""

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist:
            self.counts["tolist"] += 1
        return func(*args, **(kwargs or {}))
