"""Learning curves as inline SVG: a run's losses step by step, and what its validations gave. Reads metrics.jsonl."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from app.shared.json_files import whole_lines

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 30  # room for labels


class Line(NamedTuple):
    name: str
    steps: list[int]
    values: list[float]


def curves_of(run: Path) -> list[Line]:
    """The training loss of a run, and the error or accuracy that it is judged by, where they were measured."""
    lines = whole_lines(run / "metrics.jsonl")
    rows = [row for row in lines if row.get("phase") == "train" and isinstance(row.get("step"), int)]
    loss = "recon" if any("recon" in row for row in rows) else "loss"
    names = {loss: "training", f"val_{loss}": "validation"}
    curves = []
    for key, name in names.items():
        kept = [row for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        if kept:
            curves.append(Line(name, [row["step"] for row in kept], [float(row[key]) for row in kept]))
    return curves


def svg(lines: Sequence[Line], *, title: str) -> str:
    """One panel; its label for screen readers says where each line begins and ends."""
    values = [value for line in lines for value in line.values]
    low, high = min(0.0, *values), max(values) or 1.0
    last = max(step for line in lines for step in line.steps)

    def at(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / ((high - low) or 1))

    summary = "; ".join(f"{line.name} from {line.values[0]:.3g} to {line.values[-1]:.3g}" for line in lines)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {summary}")}">']
    for tick in (low, (low + high) / 2, high):
        x, y = at(0, tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in (0, last):
        x, _ = at(tick, low)
        anchor = "start" if tick == 0 else "end"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{tick:,}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">step</text>')
    for line in lines:
        points = " ".join("{:.1f},{:.1f}".format(*at(*pair)) for pair in zip(line.steps, line.values, strict=True))
        parts.append(f'<polyline class="{line.name}" points="{points}"/>')
        if line.name == "validation":
            dots = (at(*pair) for pair in zip(line.steps, line.values, strict=True))
            parts += [f'<circle class="{line.name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dots]
    return "".join([*parts, "</svg>"])
