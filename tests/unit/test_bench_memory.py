"""Benchmarks that only a GPU can fill run here in a tiny form: what they measure is what training and tokenizing do."""

import json

import torch

from networks.presets import PRESETS
from tests.benchmarks import bench_memory


def test_memory_by_preset_measures_every_way_of_a_preset(capsys):
    bench_memory.by_preset(["tiny"], [1, 2], torch.device("cpu"), side=16)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    alone, together = (next(row for row in rows if row["what"] == f"step, batch {n}") for n in (1, 2))
    assert [row["what"].split(",")[0] for row in rows] == ["step"] * 4 + ["tokens and back"] * 2
    assert together["voxels"] == 2 * alone["voxels"] and rows[-1]["voxels"] == alone["voxels"]
    assert all(row["ms"] > 0 and row["card"] == "8 GB" for row in rows)


def test_a_sample_of_the_benchmark_keeps_to_max_points_in_whole_cells():
    coords = bench_memory.sample_of(64, max_points=40_000, batch_size=2)
    first = coords[coords[:, 0] == 0]
    assert 30_000 < len(first) <= 40_000 and len(coords) == 2 * len(first)
    assert int(first[:, 3].max()) % 8 == 7


def test_a_card_is_told_with_room_for_its_context():
    assert [bench_memory.card_for(gib) for gib in (1.0, 6.7, 6.8, 14.1, 15.0, 200.0)] == [
        "8 GB", "8 GB", "16 GB", "16 GB", "24 GB", "none",
    ]  # fmt: skip
    assert PRESETS["base"].max_points == 8_000_000
