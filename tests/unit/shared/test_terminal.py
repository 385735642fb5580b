"""The live table of a chain: seconds left follow from how fast this machine was so far."""

import io

import pytest
from rich.console import Console

from app.shared import terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    return now


def test_what_is_left_follows_the_pace_so_far(clock, capsys):
    table = terminal.StageTable({"one": 10, "two": 20, "three": 30})
    assert table.left() == 60
    with table.stage("one"):
        clock[0] += 4
        assert table.left() == 56
        clock[0] += 16  # twice as long as usual
    assert table.spent == {"one": 20.0} and table.left() == 2 * 50
    with table.stage("two", lambda: 0.25):  # a quarter done after 5 s: 15 s more, whatever is usual
        clock[0] += 5
        assert table.left() == 15 + 2 * 30
    assert capsys.readouterr().err.splitlines()[0] == "one: done in 0:20, about 1:40 left"


def test_a_stage_of_an_earlier_call_says_nothing_of_the_pace(clock):
    table = terminal.StageTable({"one": 10, "two": 20})
    table.skip("one", 500.0)
    assert table.left() == 20


def test_the_table_shows_what_is_done_and_what_runs(clock):
    table = terminal.StageTable({"one": 10, "two": 20, "three": 30})
    table.skip("one", 61.0)
    said = io.StringIO()
    with table.stage("two", lambda: 0.5):
        clock[0] += 10
        Console(file=said, width=60).print(table.table())
    rows = [line.split() for line in said.getvalue().splitlines()]
    assert rows == [
        ["stage", "time"],
        ["one", "done", "earlier", "1:01"],
        ["two", "running,", "50%", "0:10"],
        ["three"],
        ["left,", "about", "0:40"],
    ]
    with table.stage("three"):
        clock[0] += 20
    Console(file=(said := io.StringIO()), width=60).print(table.table())
    assert said.getvalue().splitlines()[-1].split() == ["all", "1:31"]
