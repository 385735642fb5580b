"""Parts of a network as two CUDA graphs each, forward and backward: the host starts each at once.

Features and maps lie in tables of fixed length; how many rows are live stands on the device, where the kernels read it.
More rows than there is room for make longer tables and new graphs. The kernels are those that run without graphs, and
nothing that they sum depends on a table's length: values and gradients are the same to the bit. Where graphs cannot
serve, `run` gives None.
"""

import itertools
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from networks.sparse import ops
from networks.sparse.maps import maps_for
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening, Level, NeighbourLists, Tiles, Windows

STEPS_AN_OCTAVE = 8  # of the tables' length: at most an eighth too long
SHORTEST = 2048
log = logging.getLogger(__name__)

# Features on a level of a batch, and the batch's finest level, to features on levels of that batch.
Work = Callable[[SparseTensor, Level], Sequence[SparseTensor]]


def table_length(num_rows: int) -> int:
    step = max((1 << (num_rows - 1).bit_length()) // (2 * STEPS_AN_OCTAVE), SHORTEST // STEPS_AN_OCTAVE)
    return -(-num_rows // step) * step


class CudaGraph:
    """What `work` starts on the device, recorded; `replay` does it again, into the same `results`."""

    def __init__(self, work: Callable[[], list[Tensor]], pool: tuple[int, int]):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # loaders' threads go on meanwhile
            self.results = work()
        self.replay = graph.replay


class _Filled(NamedTuple):
    """Tables, the maps of a level that are laid into them, and whether what is left over is the number of rows."""

    read: Callable[[Level], Sequence[Tensor | None]]
    tables: Sequence[Tensor | None]
    padded: bool


# A map, the table it is laid into, and what fills the rest of that table, if anything does.
_Part = tuple[Tensor | None, Tensor, int | None]


class Tables(Level):
    """A level that kernels meet in graphs: its maps lie in tables, made when first asked for, laid anew for each batch.

    As long as it is the length of its tables; of these rows `live` count. What no kernel asks for it does not have.
    Where others were there `before`, none of these is shorter: batches that are large in turn at one level and at
    another would each want tables of their own.
    """

    def __init__(self, source: Level, coarse: "Tables | None", *, before: "Tables | None" = None):
        self.length, self.coarse, self.batch_size = table_length(len(source)), coarse, source.batch_size
        self.num_bounds = dict(before.num_bounds) if before else {}  # of windows
        if before:
            self.length = max(self.length, before.length)
        self.live = torch.zeros(1, dtype=torch.int32, device=source.device)
        self._filled: dict[Hashable, _Filled] = {}
        maps_for(source.device).lay_parts(self.parts_of(source))

    def has_kernels_for(self, source: Level) -> bool:
        """Whether the kernels that were recorded are those of another batch's neighbourhoods."""
        return "is_thin" not in self.__dict__ or source.is_thin == self.is_thin

    def fits(self, source: Level) -> bool:
        """Whether there is room for the maps of another batch."""
        if len(source) > self.length:
            return False
        both = [pair for one in self._filled.values() for pair in zip(one.read(source), one.tables, strict=True)]
        sizes = [
            sides for part, table in both if part is not None for sides in zip(part.shape, table.shape, strict=True)
        ]
        return all(needed <= there for needed, there in sizes)

    def parts_of(self, source: Level) -> list[_Part]:
        """Another batch's maps and how many rows it has, and the tables where all of these are to be laid."""
        self.source, self.count, self.spatial_shape = weakref.ref(source), len(source), source.spatial_shape
        return [(None, self.live, self.count), *self._parts(*self._filled.values())]

    def _parts(self, *all_filled: _Filled) -> list[_Part]:
        return [
            (part, table, self.count if filled.padded else None)
            for filled in all_filled
            for part, table in zip(filled.read(self.source()), filled.tables, strict=True)
            if part is not None
        ]

    def _tables(
        self,
        key: Hashable,
        read: Callable[[Level], Sequence[Tensor | None]],
        *shapes: Sequence[int],
        padded: bool = False,
    ) -> Sequence[Tensor | None]:
        if key not in self._filled:
            both = zip(read(self.source()), shapes, strict=True)
            tables = [None if part is None else part.new_zeros(shape) for part, shape in both]
            self._filled[key] = _Filled(read, tables, padded)
            maps_for(self.device).lay_parts(self._parts(self._filled[key]))
        return self._filled[key].tables

    def __len__(self) -> int:
        return self.length

    @property
    def device(self) -> torch.device:
        return self.live.device

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Made anew: what is kept would be of the batch that was recorded."""
        return make()

    @cached_property
    def is_thin(self) -> bool:
        return self.source().is_thin

    @property
    def sample_sizes(self) -> list[int]:
        raise RuntimeError("how many voxels a sample has is not known in a graph")

    @property
    def coords(self) -> Tensor:
        return self._tables("coords", lambda level: [level.coords], (self.length, 4))[0]

    def tiles(self, size: int) -> Tiles:
        count = -(-self.length // size)
        placed = self._tables("placed", lambda level: level.tiles(size)[:2], (self.length,), (27, self.length))
        cut = self._tables(("tiles", size), lambda level: level.tiles(size)[2:], (count, 27), (count,))
        return Tiles(*placed, *cut)

    @property
    def neighbours(self) -> Tensor:
        if self.is_thin:
            raise RuntimeError("tables have the neighbours of a thin level in the order of its tiles alone")
        return self._filled["placed"].tables[1]

    @property
    def neighbour_lists(self) -> NeighbourLists:
        rows = (27, self.length)
        return NeighbourLists(*self._tables("lists", lambda level: level.neighbour_lists, rows, rows, (27,)))

    @property
    def coarsening(self) -> Coarsening:
        children = self._tables("children", lambda level: [level.coarsening.children], (8, self.coarse.length))[0]
        return Coarsening(self, self.coarse, children.new_empty(0), children)

    def windows(self, size: int, shift: int) -> Windows:
        """Those that are left over are empty."""
        key, read = ("windows", size, shift), partial(_order_and_bounds, size=size, shift=shift)
        if key not in self._filled:
            self.num_bounds[key] = max(len(read(self.source())[1]), self.num_bounds.get(key, 0))
        return Windows(*self._tables(key, read, (self.length,), (self.num_bounds[key],), padded=True), size**3)


def _order_and_bounds(level: Level, *, size: int, shift: int) -> tuple[Tensor, Tensor]:
    return level.windows(size, shift)[:2]


class NetworkGraphs:
    """The graphs of a network's parts, recorded when first needed, on tables that the parts share."""

    def __init__(self):
        self.tables: list[Tables] = []  # the finest first
        self.recorded: dict[str, _Recorded] = {}
        self.failed = False

    def __deepcopy__(self, memo: dict) -> "NetworkGraphs":
        return NetworkGraphs()  # a copy of a network has parameters of its own

    def run(
        self, part: str, work: Work, x: SparseTensor, levels: Sequence[Level], modules: Sequence[nn.Module]
    ) -> list[SparseTensor] | None:
        """What `work` gives, if all parameters of the modules it consists of learn.

        `levels` are the batch's, finest first, x on one of them. A batch whose voxels have many neighbours where those
        of the first had few, or the other way round, needs other kernels and runs without graphs.
        """
        parameters = [value for module in modules for value in module.parameters()]
        learns = torch.is_grad_enabled() and all(value.requires_grad for value in parameters)
        if self.failed or not learns or not len(x):
            return None
        try:
            if not self._lay(levels):
                return None
            recorded = self.recorded.get(part)
            if recorded is None or not recorded.fits(x.feats, parameters):
                self.recorded.pop(part, None)  # before the next takes memory
                table = self.tables[[level is x.level for level in levels].index(True)]
                recorded = self.recorded[part] = _Recorded(work, x.feats, table, self.tables[0], modules)
                log.info("CUDA graphs of the %s recorded for up to %d rows", part, len(self.tables[0]))
        except Exception as error:  # whatever a driver, an allocator or Triton may raise
            self.failed, self.tables, self.recorded = True, [], {}
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("kernels are started one by one: CUDA graphs cannot be recorded here (%s)", reason)
            return None
        rows = _RunGraphs.apply(x.feats, recorded, *parameters)
        at = [levels[self.tables.index(table)] for table in recorded.levels]
        return [SparseTensor.on(level, feats) for level, feats in zip(at, rows, strict=True)]

    def _lay(self, levels: Sequence[Level]) -> bool:
        """The batch's maps into the tables, unless they lie there; into longer ones, where there is too little room."""
        if self.tables and self.tables[0].source() is levels[0]:
            return True
        if self.tables and not all(map(Tables.has_kernels_for, self.tables, levels)):
            return False
        for recorded in self.recorded.values():
            recorded.turn += 1
        if self.tables and all(table.fits(level) for table, level in zip(self.tables, levels, strict=True)):
            laid = [table.parts_of(level) for table, level in zip(self.tables, levels, strict=True)]
            maps_for(levels[0].device).lay_parts(list(itertools.chain(*laid)))
            return True
        before, self.recorded = self.tables or [None] * len(levels), {}
        for table in self.tables:
            table._filled = {}  # before the next take memory
        tables: list[Tables] = []
        for level, last in zip(reversed(levels), reversed(before), strict=True):
            tables.insert(0, Tables(level, tables[0] if tables else None, before=last))
        self.tables = tables
        return True


class _Recorded:
    """Rows of a part's input, of its results' gradients, and the graphs that read them."""

    def __init__(
        self,
        work: Work,
        feats: Float[Tensor, "N C"],
        table: Tables,
        finest: Tables,
        modules: Sequence[nn.Module],
    ):
        self.work, self.finest, self.modules = work, finest, modules
        self.x = SparseTensor.on(table, feats.new_zeros((len(table), feats.shape[1])))
        self.follows, self.dtype = feats.requires_grad, ops.autocast_dtype(feats)
        self.addresses = [value.data_ptr() for module in modules for value in module.parameters()]
        self.turn = 0
        self._forward()  # compiles and loads all kernels and makes all tables: none may be while a graph is recorded
        self.grads = [torch.zeros_like(rows) for rows in self.rows]
        self._backward()
        pool = torch.cuda.graph_pool_handle() if feats.is_cuda else (0, 0)
        self.forward = CudaGraph(self._forward, pool)
        self.backward = CudaGraph(self._backward, pool)

    def fits(self, feats: Float[Tensor, "N C"], parameters: Sequence[nn.Parameter]) -> bool:
        """Whether everything is as it was recorded."""
        mine, addresses = self.x.feats, [value.data_ptr() for value in parameters]
        known = (mine.dtype, mine.device, mine.shape[1], self.follows, self.dtype, self.addresses)
        given = (feats.dtype, feats.device, feats.shape[1], feats.requires_grad, ops.autocast_dtype(feats), addresses)
        return known == given

    def _forward(self) -> list[Tensor]:
        feats = self.x.feats.detach().requires_grad_(self.follows)
        with torch.enable_grad(), _own_leaves(self.modules) as parameters:
            results = self.work(self.x.replace(feats), self.finest)
        self.wanted = [*parameters, *([feats] if self.follows else [])]
        self.levels, self.rows = [x.level for x in results], [x.feats for x in results]
        return [rows.detach() for rows in self.rows]

    def _backward(self) -> list[Tensor]:
        grads = torch.autograd.grad(self.rows, self.wanted, self.grads)
        count = len(self.addresses)
        return [torch.cat([grad.flatten() for grad in grads[:count]]), *grads[count:]]


@contextmanager
def _own_leaves(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Parameters stand for themselves as fresh leaves in the same memory.

    What adds up a parameter's gradient belongs to the stream on which it first learned, where no graph is recorded.
    """
    held = [(one, dict(one._parameters)) for module in modules for one in module.modules()]
    leaves = {value: value.detach().requires_grad_() for module in modules for value in module.parameters()}
    try:
        for one, own in held:
            one._parameters.update({name: leaves.get(value) for name, value in own.items()})
        yield list(leaves.values())
    finally:
        for one, own in held:
            one._parameters.update(own)


class _RunGraphs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feats, recorded, *parameters):
        recorded.x.feats[: len(feats)].copy_(feats)
        recorded.forward.replay()
        recorded.turn += 1
        ctx.recorded, ctx.turn, ctx.num_rows = recorded, recorded.turn, len(feats)
        ctx.counts = [table.count for table in recorded.levels]
        return tuple(rows[:count] for rows, count in zip(recorded.forward.results, ctx.counts, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        ops.refuse_second_derivative()
        recorded = ctx.recorded
        if ctx.turn != recorded.turn:
            raise RuntimeError("use_graphs allows one forward before each backward: its tables hold another batch now")
        for table, grad, count in zip(recorded.grads, grads, ctx.counts, strict=True):
            table[:count].copy_(grad)
        recorded.backward.replay()
        of_all, *of_feats = recorded.backward.results
        leaves = recorded.wanted[: len(recorded.addresses)]
        of_parameters = torch._utils._unflatten_dense_tensors(of_all.clone(), leaves)  # the next replay writes there
        return (of_feats[0][: ctx.num_rows] if of_feats else None), None, *of_parameters
