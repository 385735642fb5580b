"""What a person at a terminal sees while work goes on: a bar for many items, a live table for a chain of stages."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@contextmanager
def steps_shown(total: int, what: str) -> Iterator[Callable[[], None]]:
    """What to call at each step: a bar on standard error with rate and time left, where that is a terminal."""
    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]} a minute")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal or total < 2) as bar:
        task = bar.add_task(what, total=total, rate="-")

        def step() -> None:
            bar.advance(task)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{60 * speed:.0f}" if speed else "-")

        yield step


def progress(items: Sequence[Any], what: str) -> Iterator[Any]:
    """The items, with such a bar."""
    with steps_shown(len(items), what) as step:
        for item in items:
            yield item
            step()


class StageTable:
    """A chain of stages on standard error: live with the time left at a terminal, elsewhere a line as each one ends.

    `usual`: seconds that each stage takes where nothing else runs, by name. What a stage prints is no part of it.
    """

    def __init__(self, usual: Mapping[str, float]):
        self.usual, self.spent = dict(usual), {}
        self.earlier: set[str] = set()
        self.running: str | None = None
        self.begun, self.share = 0.0, lambda: None
        self.console = Console(file=sys.stderr)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While stages run."""
        if not self.console.is_terminal:
            yield
            return
        options = {"redirect_stdout": False, "redirect_stderr": False, "refresh_per_second": 2}
        with Live(get_renderable=self.table, console=self.console, **options):
            yield

    def skip(self, name: str, seconds: float) -> None:
        """A stage that an earlier call has done."""
        self.spent[name] = seconds
        self.earlier.add(name)

    @contextmanager
    def stage(self, name: str, share: Callable[[], float | None] = lambda: None) -> Iterator[None]:
        """While one stage runs; `share` says how much of it is done, where that is known."""
        self.running, self.begun, self.share = name, time.perf_counter(), share
        try:
            yield
            self.spent[name] = round(time.perf_counter() - self.begun, 1)
        finally:
            self.running = None
        if not self.console.is_terminal:
            print(f"{name}: done in {clock(self.spent[name])}, about {clock(self.left())} left", file=sys.stderr)

    def pace(self) -> float:
        """How much longer than usual stages take here."""
        own = [name for name in self.spent if name not in self.earlier]
        usual = sum(self.usual[name] for name in own)
        return sum(self.spent[name] for name in own) / usual if usual > 0 else 1.0

    def left(self) -> float:
        """Seconds until the last stage ends, as far as can be told."""
        waiting = [name for name in self.usual if name not in self.spent and name != self.running]
        left = self.pace() * sum(self.usual[name] for name in waiting)
        if self.running is not None:
            gone, share = time.perf_counter() - self.begun, self.share()
            left += gone / share - gone if share else max(self.pace() * self.usual[self.running] - gone, 0)
        return left

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name, side in (("stage", "left"), ("", "left"), ("time", "right")):
            table.add_column(name, justify=side)
        for name in self.usual:
            if name in self.spent:
                table.add_row(name, "done earlier" if name in self.earlier else "done", clock(self.spent[name]))
            elif name == self.running:
                share = self.share()
                table.add_row(
                    f"[bold]{name}[/bold]",
                    "running" if share is None else f"running, {share:.0%}",
                    clock(time.perf_counter() - self.begun),
                )
            else:
                table.add_row(f"[dim]{name}[/dim]", "", "")
        if len(self.spent) == len(self.usual):
            table.add_row("all", "", clock(sum(self.spent.values())))
        else:
            table.add_row("", "left, about", clock(self.left()))
        return table


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
