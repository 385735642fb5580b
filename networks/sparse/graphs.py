"""Transformer blocks one behind another as two CUDA graphs, forward and backward: the host starts each at once.

Features lie in tables of fixed length; how many rows are live stands on the device, where the kernels read it. More
rows or windows than there is room for make longer tables and new graphs. The kernels are those of whole_blocks.py, and
nothing that they sum depends on a table's length: values and gradients are those of blocks run one by one to the bit.
Where graphs cannot serve, `run` gives None.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from networks.sparse import ops, whole_blocks
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Windows
from networks.sparse.whole_blocks import Block, Transformer

STEPS_AN_OCTAVE = 8  # of the tables' length: at most an eighth too long
SHORTEST = 2048
log = logging.getLogger(__name__)


class CudaGraph:
    """What `work` starts on the device, recorded; `replay` does it again, into the same `results`."""

    def __init__(self, work: Callable[[], list[Tensor]], pool: tuple[int, int]):
        work()  # compiles and loads its kernels: none may be while a graph is recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # loaders' threads go on meanwhile
            self.results = work()
        self.replay = graph.replay


class BlockGraphs:
    """The graphs of one row of blocks, recorded when first needed."""

    def __init__(self):
        self.recorded: _Recorded | None = None
        self.failed = False

    def __deepcopy__(self, memo: dict) -> "BlockGraphs":
        return BlockGraphs()  # a copy of a network has parameters of its own

    def run(self, blocks: Sequence[Block], x: SparseTensor) -> SparseTensor | None:
        """The blocks' result where features and all parameters learn; None where blocks have to run one by one."""
        parameters = [value for block in blocks for layer in block.layers for value in layer]
        learns = torch.is_grad_enabled() and all(value.requires_grad for value in (x.feats, *parameters))
        if self.failed or not learns or not len(x):
            return None
        hows = [whole_blocks.transformer_for(x, block) for block in blocks]
        if None in hows:
            return None
        if self.recorded is None or not self.recorded.fits(x.feats, hows, parameters):
            self.recorded = None  # before the next takes memory
            try:
                with torch.no_grad():
                    self.recorded = _Recorded(blocks, x.feats, hows, parameters)
            except Exception as error:  # whatever a driver, an allocator or Triton may raise
                self.failed = True
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                log.warning("transformer blocks run one by one: CUDA graphs cannot be recorded here (%s)", reason)
                return None
        return x.replace(_RunGraphs.apply(x.feats, hows, self.recorded, *parameters))


def table_length(num_rows: int) -> int:
    step = max((1 << (num_rows - 1).bit_length()) // (2 * STEPS_AN_OCTAVE), SHORTEST // STEPS_AN_OCTAVE)
    return -(-num_rows // step) * step


class _Recorded:
    """Tables, and the graphs that read and write them."""

    def __init__(
        self, blocks: Sequence[Block], feats: Float[Tensor, "N C"], hows: list[Transformer], parameters: list[Tensor]
    ):
        self.feats = feats.new_zeros((table_length(len(feats)), feats.shape[1]))
        self.grad = torch.zeros_like(self.feats)
        self.live = torch.zeros(1, dtype=torch.int32, device=feats.device)
        self.sources = _sources(hows)
        tables = {i: self._windows(hows[i].plan, blocks[i].window ** 3) for i in set(self.sources)}
        self.hows = [how._replace(plan=tables[i], live=self.live) for i, how in zip(self.sources, hows, strict=True)]
        self.parameters = parameters
        self.addresses = [value.data_ptr() for value in parameters]
        self.turn = 0
        self.load(feats, hows)
        pool = torch.cuda.graph_pool_handle() if feats.is_cuda else (0, 0)
        self.forward = CudaGraph(self._forward, pool)
        self.out, *kept = self.forward.results
        size = len(kept) // len(blocks)
        self.saved = [kept[first : first + size] for first in range(0, len(kept), size)]
        self.backward = CudaGraph(self._backward, pool)
        log.info("CUDA graphs of %d transformer blocks recorded for up to %d rows", len(blocks), len(self.feats))

    def _windows(self, plan: Windows, most: int) -> Windows:
        return Windows(plan.order.new_zeros(len(self.feats)), torch.zeros_like(plan.bounds), most)

    def fits(self, feats: Float[Tensor, "N C"], hows: list[Transformer], parameters: list[Tensor]) -> bool:
        """Whether there is room, and everything else is where it was."""
        known = (self.feats.dtype, self.feats.device, self.sources, self.addresses)
        given = (feats.dtype, feats.device, _sources(hows), [value.data_ptr() for value in parameters])
        both = zip(self.hows, hows, strict=True)
        return (
            known == given
            and len(feats) <= len(self.feats)
            and all(len(how.plan.bounds) <= len(mine.plan.bounds) for mine, how in both)
        )

    def load(self, feats: Float[Tensor, "N C"], hows: list[Transformer]) -> None:
        """Rows and windows of a batch into the tables; windows that are left over are empty."""
        num_rows = len(feats)
        self.feats[:num_rows].copy_(feats)
        self.live.fill_(num_rows)
        for i in set(self.sources):
            (order, bounds, _), plan = self.hows[i].plan, hows[i].plan
            order[:num_rows].copy_(plan.order)
            bounds[: len(plan.bounds)].copy_(plan.bounds)
            if len(plan.bounds) < len(bounds):
                bounds[len(plan.bounds) :].fill_(num_rows)

    def _forward(self) -> list[Tensor]:
        x, kept = self.feats, []
        for number, how in enumerate(self.hows):
            x, saved = whole_blocks.transformer_forward(x, how, self.parameters[8 * number : 8 * number + 8])
            kept += saved
        return [x, *kept]

    def _backward(self) -> list[Tensor]:
        grad, of_all = self.grad, []
        for how, saved in zip(reversed(self.hows), reversed(self.saved), strict=True):
            grad, of_parameters = whole_blocks.transformer_backward(grad, how, saved)
            of_all = [*of_parameters, *of_all]
        return [grad, torch.cat([one.flatten() for one in of_all])]


def _sources(hows: list[Transformer]) -> list[int]:
    """Of each block the first with the same windows."""
    plans = [id(how.plan) for how in hows]
    return [plans.index(plan) for plan in plans]


class _RunGraphs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feats, hows, recorded, *parameters):
        recorded.load(feats, hows)
        recorded.forward.replay()
        recorded.turn += 1
        ctx.recorded, ctx.turn, ctx.num_rows = recorded, recorded.turn, len(feats)
        ctx.shapes = [value.shape for value in parameters]
        return recorded.out[: len(feats)]

    @staticmethod
    def backward(ctx, grad):
        ops.refuse_second_derivative()
        recorded = ctx.recorded
        if ctx.turn != recorded.turn:
            raise RuntimeError("use_graphs allows one forward before each backward: its tables hold another batch now")
        recorded.grad[: ctx.num_rows].copy_(grad)
        recorded.backward.replay()
        of_feats, of_all = recorded.backward.results
        parts = of_all.clone().split([shape.numel() for shape in ctx.shapes])  # the next replay writes there again
        of_parameters = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return of_feats[: ctx.num_rows], None, None, *of_parameters
