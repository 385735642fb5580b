"""How the benchmarks time, print and report: medians of interleaved runs by device events, a table, one JSON line."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

Work = Callable[[], object]


def once(work: Work, device: str, *, calls: int = 1) -> float:
    """Milliseconds a call, averaged over calls queued one behind the other."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return 1e3 * (time.perf_counter() - start) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def interleaved(
    works: dict[str, Work], *, device: str, rounds: int = 9, budget_ms: float = 300, turn_ms: float = 4
) -> dict[str, float]:
    """Median milliseconds of each; all take turns, so that a drifting clock meets them alike. Slow ones run less.

    A turn queues calls one behind the other for `turn_ms`, so that starting the first kernel does not count.
    """
    calls, times = {}, {}
    for name, work in works.items():
        work()  # compiles, tunes, fills caches
        first = once(work, device)
        calls[name] = max(1, round(turn_ms / first))
        times[name] = []
    for turn in range(rounds):
        for name, work in works.items():
            if turn < 3 or sum(times[name]) * calls[name] < budget_ms:
                times[name].append(once(work, device, calls=calls[name]))
    return {name: statistics.median(taken) for name, taken in times.items()}


def device_ms(work: Work, *, calls: int = 10) -> float:
    """Milliseconds that a CUDA card works a call, by the profiler: what is left when no host holds it up."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
    return sum(event.device_time for event in record.events() if event.device_type == DeviceType.CUDA) / calls / 1e3


class StepCost(NamedTuple):
    """What a step costs host and card."""

    launches: float  # kernels, graphs, copies and fills that the host starts
    waits: float  # times that the host waits for the card
    card_ms: float  # that the card works
    host_ms: float  # until the host has started everything, nothing before it in the queue


def step_cost(work: Work, *, calls: int = 5) -> StepCost:
    """By the profiler, and by a host clock without it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    host = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        host.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
    events = record.events()
    card = sum(event.device_time for event in events if event.device_type == DeviceType.CUDA) / calls / 1e3
    called = Counter(event.name for event in events if event.device_type == DeviceType.CPU)
    started = sum(count for name, count in called.items() if name.lstrip("cu").startswith(LAUNCHES))
    waits = sum(count for name, count in called.items() if "Synchronize" in name) - 1
    return StepCost(started / calls, waits / calls, card, statistics.median(host))


STARTS = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")
LAUNCHES = (*STARTS, *(f"da{name}" for name in STARTS))  # of the driver and of the runtime, without their "cu"


@contextmanager
def busy_host(processes: int) -> Iterator[None]:
    """So many processes beside that compute without end."""
    beside = [subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def dense_rate() -> float:
    """TFLOP/s of a bf16 matrix product of 8192 cubed on random data."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / interleaved({"mm": lambda: a @ b}, device="cuda", rounds=15)["mm"] / 1e9


def peak_gib(work: Work) -> float:
    """GiB that a call takes beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def machine(device: str) -> dict[str, str]:
    found = {"date": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version()}
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    for name in ("triton", "spconv-cu126", "spconv", "vector-quantize-pytorch", "monai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def finish(name: str, rows: list[dict], *, device: str, **summary: object) -> None:
    """The table, then the one JSON line."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_shown(row.get(column)) for column in columns) + " |")
    print(json.dumps({"benchmark": name, **machine(device), **summary, "rows": rows}))


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
