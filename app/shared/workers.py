"""Many jobs through one function: in this process, in worker processes, or on a Dask cluster; one code path for all.

A worker that dies takes no other job with it: what was under way is tried again with fewer workers, at last alone.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from app.shared.refusals import Refused
from app.shared.terminal import steps_shown

J = TypeVar("J")
R = TypeVar("R")


def free_memory() -> int:
    """Bytes that can be had now, the container's limit counted."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    info = Path("/proc/meminfo")
    if info.is_file():
        rows = dict(line.split(":", 1) for line in info.read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) << 10
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    return free


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(asked: int, bytes_each: int, jobs: int) -> int:
    """As many as asked, if cores, memory and jobs allow; says so where they do not."""
    cores = num_cores()
    fit = max(1, int(0.8 * free_memory() / bytes_each))
    count = max(1, min(asked, cores, fit, jobs))
    if count < min(asked, jobs):
        why = f"{fit} fit into memory at {bytes_each / 2**30:.1f} GiB each" if fit <= cores else f"{cores} cores"
        sys.stderr.write(f"{count} workers instead of {asked}: {why}\n")
    return count


def run_jobs(
    work: Callable[[J], R],
    jobs: Sequence[J],
    *,
    failed: Callable[[J], R],
    workers: int,
    cluster: str | None = None,
) -> list[R]:
    """The result of every job, in no order; `failed` speaks for a job whose worker died with it each time."""
    with steps_shown(len(jobs), "cases") as shown:

        def step(result: R) -> R:
            shown()
            return result

        if cluster is not None:
            return _on_cluster(work, jobs, failed=failed, address=cluster, step=step)
        if workers == 1 or len(jobs) < 2:
            return [step(work(job)) for job in jobs]
        return _in_processes(work, jobs, failed=failed, workers=workers, step=step)


def _in_processes(
    work: Callable[[J], R], jobs: Sequence[J], *, failed: Callable[[J], R], workers: int, step: Callable[[R], R]
) -> list[R]:
    results: list[R] = []
    left = list(jobs)
    while left:
        with _stopped_at_once(_pool(workers, preload=work.__module__)) as pool:
            # alone, the job that kills its worker is known: it is the first one not done
            batch = left if workers > 1 else left[:1]
            done = _collect(pool, work, batch, step, results)
        broken = len(done) < len(batch)
        left = [job for number, job in enumerate(left) if number not in done]
        if broken and workers == 1:
            results.append(step(failed(left.pop(0))))
        elif broken:
            workers = workers // 2
    return results


def _collect(pool: Executor, work: Callable, batch: Sequence, step: Callable, results: list) -> set[int]:
    futures: dict[Future, int] = {}
    done = set()
    try:
        with _interrupts_held():
            futures = {pool.submit(work, job): number for number, job in enumerate(batch)}
        for future in as_completed(futures):
            results.append(step(future.result()))
            done.add(futures[future])
    except BrokenProcessPool:
        for future, number in futures.items():
            if number not in done and future.done() and not future.cancelled() and future.exception() is None:
                results.append(step(future.result()))
                done.add(number)
    return done


def _pool(workers: int, *, preload: str) -> ProcessPoolExecutor:
    """Processes that have loaded a module before the first job, once for all of them."""
    kind = "forkserver" if sys.platform != "win32" else "spawn"
    context = get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(workers, context, initializer=_one_thread)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits; processes started meanwhile never get it, as it is this one's to answer."""
    if not hasattr(signal, "pthread_sigmask"):  # none on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stopped_at_once(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """A pool that is left by Ctrl-C neither begins nor ends what was given to it; by an error it begins no more."""
    others = active_children()
    with pool:  # left when its own thread has ended: one that ends beside the interpreter may write to a closed pipe
        try:
            yield pool
        except KeyboardInterrupt:
            for worker in active_children():
                if worker not in others:
                    worker.terminate()
            raise
        except BaseException:  # what ends the whole run: a full disk
            pool.shutdown(cancel_futures=True)
            raise


def _one_thread() -> None:
    """Workers share the cores: none takes them all (read by torch and BLAS when they load)."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def _on_cluster(
    work: Callable[[J], R], jobs: Sequence[J], *, failed: Callable[[J], R], address: str, step: Callable[[R], R]
) -> list[R]:
    """Dask moves the jobs of a lost worker to the others by itself."""
    from distributed import Client
    from distributed.scheduler import KilledWorker

    results = []
    with Client(address, set_as_default=False) as client, client.get_executor() as executor:
        futures = {executor.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                results.append(step(future.result()))
            except KilledWorker:
                results.append(step(failed(futures[future])))
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
    return results


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """One run at a time writes to OUT; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f"{out.name}.lock"), "a") as lock:  # it may be a file of the user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused("IN_USE", "another run is writing to this OUT", "wait for it, or use another OUT") from error
        yield


def busy(what: str) -> AbstractContextManager:
    """A spinner on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()
