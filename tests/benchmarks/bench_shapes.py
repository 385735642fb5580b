"""Signed distance of meshes and organ masks: right to a millionth of a voxel? how long, how much memory, beside whom?

python -m tests.benchmarks.bench_shapes MESHES ORGAN [--peer-points 20000] [--dense-side 512] [--sides 64,512,1024]

MESHES is a folder of closed meshes, ORGAN a label volume. First beside closed forms, trimesh (distance), solid angles
(sign); then CPU seconds and peak memory, each in a process of its own, beside trimesh's signed distance on some points
of the very band and SciPy's dense transform on a grid of up to --dense-side: as for the whole, the share is told, and
how far both are from ours. A peer that takes longer than --peer-seconds is ended. Needs trimesh and rtree.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from app.shapes.bands import Shape, Surface, check_surface, mesh_affine, shape_of
from app.shapes.mesh_files import READERS, Mesh, read_mesh
from app.shapes.sources import NamedSurface, SurfaceChoice, find_sources, surfaces_of
from tests.oracle import solid_angle_winding
from tests.solids import box, box_distance, shuffled, sphere, torus, turned
from transforms.crossings import crossings

LIMIT_MIB = 4096  # of an organ at 1024
FASTER = 5  # than any peer at 512
WINDING_POINTS = 2000


# ---- correctness


def closed_forms() -> list[dict]:
    """Largest error in voxels and wrong signs, over random turns and orders of the triangles."""
    rng, rows = np.random.default_rng(0), []
    half, large, small = (40.0, 25.0, 17.0), 40.0, 15.0
    exact = {
        "box": (box(half), lambda p: box_distance(p, half)),
        "sphere": (sphere(40, n=160), lambda p: np.linalg.norm(p, axis=1) - 40),
        "torus": (
            torus(large, small, n=240),
            lambda p: np.hypot(np.hypot(p[:, 0], p[:, 1]) - large, p[:, 2]) - small,
        ),
    }
    for name, (mesh, distance) in exact.items():
        for side in (64, 256):
            worst, wrong, count = 0.0, 0, 0
            for _ in range(3):
                rotation, shift = turned(rng), rng.normal(size=3) * 30
                vertices, faces = shuffled(mesh, rng)
                made = Mesh(vertices @ rotation.T + shift, faces)
                shape = band_of(made, side)
                step = np.linalg.norm(shape.affine[:3, 0])
                truth = distance((in_mm(shape) - shift) @ rotation) / step
                found = shape.values * shape.band
                facets = 0 if name == "box" else sagitta(name) / step
                worst = max(worst, np.abs(found - truth).max())
                wrong += int(((found < 0) != (truth < 0))[np.abs(truth) > facets + 1e-5].sum())
                count += len(found)
            rows.append({"what": name, "side": side, "voxels": count, "error": worst, "facets": facets, "wrong": wrong})
    return rows


def sagitta(name: str) -> float:
    """How far, in mm, a facet may lie inside the curved surface that it stands for."""
    n, radius = (160, 40) if name == "sphere" else (240, 55)
    angle = np.pi / n
    return 2 * radius * (1 - np.cos(angle))


def band_of(mesh: Mesh, side: int) -> Shape:
    surface = Surface(mesh, "parity", (), ()) if len(mesh.faces) > 20_000 else check_surface(mesh)
    return shape_of(surface, mesh_affine(surface.mesh, side), resolution=side)


def in_mm(shape: Shape) -> np.ndarray:
    return shape.coords @ shape.affine[:3, :3].T + shape.affine[:3, 3]


def against_others(path: Path, side: int, count: int) -> dict:
    """One mesh beside trimesh and solid angles on points of its band; both know nothing of ours."""
    import trimesh

    mesh = read_mesh(path)
    shape = band_of(mesh, side)
    step = np.linalg.norm(shape.affine[:3, 0])
    chosen = np.random.default_rng(0).choice(len(shape.coords), min(count, len(shape.coords)), replace=False)
    points, mine = in_mm(shape)[chosen], shape.values[chosen] * shape.band
    peer = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    theirs = trimesh.proximity.closest_point(peer, points)[1] / step
    few = slice(0, WINDING_POINTS)
    corners = mesh.vertices[mesh.faces]
    wound = np.array([round(solid_angle_winding(point, corners)) for point in points[few]])
    wrong = ((wound != 0) != (mine[few] < 0)) & (np.abs(mine[few]) > 1e-5)
    return {
        "what": path.name,
        "side": side,
        "voxels": len(chosen),
        "error": float(np.abs(np.abs(mine) - theirs).max()),
        "wrong": int(wrong.sum()),
    }


# ---- time and memory, each in a process of its own


def ours(path: str, side: int, _share: int) -> dict:
    begun = time.process_time()
    _, shape = opened_and_made(path, side)
    return {"seconds": time.process_time() - begun, "voxels": len(shape.coords), **peak()}


def by_trimesh(path: str, side: int, count: int) -> dict:
    """Its signed distance on some points of the band; as for the whole band, which would take it hours."""
    import trimesh

    found, shape = opened_and_made(path, side)
    chosen = np.random.default_rng(0).choice(len(shape.coords), min(count, len(shape.coords)), replace=False)
    points, step = in_mm(shape)[chosen], np.linalg.norm(shape.affine[:3, 0])
    peer = trimesh.Trimesh(*found.surface.mesh, process=False)
    trimesh.proximity.signed_distance(peer, points[:10])
    begun = time.process_time()
    theirs = trimesh.proximity.signed_distance(peer, points)
    taken = time.process_time() - begun
    off = np.abs(np.abs(theirs) / step - np.abs(shape.values[chosen]) * shape.band).max()
    share = len(points) / len(shape.coords)
    return {"seconds": taken / share, "share": share, "measured": taken, "off": float(off), **peak()}


def by_dense_transform(path: str, wanted: int, largest: int) -> dict:
    """SciPy's Euclidean transform of the voxels inside and of those outside; the mask itself is given. On a coarser
    grid where the wanted one is larger than allowed, as for all its voxels.
    """
    from scipy import ndimage

    side = min(wanted, largest)
    found, shape = opened_and_made(path, side)
    mask = mask_of(found, side)
    begun = time.process_time()
    distance = ndimage.distance_transform_edt(~mask).astype(np.float32)
    distance -= ndimage.distance_transform_edt(mask)
    taken = time.process_time() - begun
    there = distance[tuple(shape.coords.T.astype(np.int64))]
    off = np.abs(np.clip(there, -shape.band, shape.band) - shape.values * shape.band).max()
    share = (side / wanted) ** 3
    return {"seconds": taken / share, "share": share, "measured": taken, "off": float(off), **peak()}


def mask_of(found: NamedSurface, side: int) -> np.ndarray:
    """Every voxel of the grid, whether it is inside."""
    there = np.linalg.inv(found.affine(side))
    vertices = found.surface.mesh.vertices @ there[:3, :3].T + there[:3, 3]
    lines = crossings(vertices, found.surface.mesh.faces, side=side)
    turns = np.zeros((side, side * side), bool)
    line = np.repeat(np.arange(side * side), np.diff(lines.starts))
    first = np.floor(lines.x).astype(int) + 1  # voxel behind each crossing
    np.logical_xor.at(turns, (first[first < side], line[first < side]), True)
    return np.logical_xor.accumulate(turns, axis=0, out=turns).reshape((side,) * 3)


def opened_and_made(path: str, side: int) -> tuple[NamedSurface, Shape]:
    (source,) = find_sources(Path(path), SurfaceChoice())
    found = next(iter(surfaces_of(source, SurfaceChoice())))
    return found, shape_of(found.surface, found.affine(side), resolution=side)


def peak() -> dict:
    """Of this process alone: getrusage would tell that of the one which started it, where that is higher."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return {"peak_mib": int(line.split()[1]) >> 10}


MEASURES = {"ours": ours, "trimesh": by_trimesh, "dense transform": by_dense_transform}
LARGEST = {"ours": 4096, "trimesh": 512, "dense transform": 512}  # a side at which it is run


def measured(name: str, path: Path, side: int, share: int, seconds: float | None) -> dict:
    words = [sys.executable, "-m", "tests.benchmarks.bench_shapes", "--one", name, str(path), str(side), str(share)]
    row = {"what": path.name, "side": side, "by": name}
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {**row, "over": seconds}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def times(files: list[Path], sides: list[int], shares: dict[str, int], seconds: float) -> list[dict]:
    rows = []
    for path in files:
        for side in sides:
            group = []
            for name in (name for name in MEASURES if side <= LARGEST[name]):
                row = measured(name, path, side, shares[name], None if name == "ours" else seconds)
                group.append(row)
                if "seconds" in row:
                    row["times_ours"] = row["seconds"] / group[0]["seconds"]
                sys.stderr.write(f"{row}\n")
            rows += group
    return rows


def table(rows: list[dict], columns: dict[str, str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(shown(row.get(key, "")) for key in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        name, path, side, count = sys.argv[2:]
        sys.stdout.write(json.dumps(MEASURES[name](path, int(side), int(count))) + "\n")
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("meshes", type=Path)
    parser.add_argument("organ", type=Path)
    parser.add_argument("--peer-points", type=int, default=20_000)
    parser.add_argument("--dense-side", type=int, default=512)
    parser.add_argument("--peer-seconds", type=float, default=400)
    parser.add_argument("--sides", default="64,512,1024")
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--skip-right", action="store_true")
    args = parser.parse_args()
    files = sorted(file for file in args.meshes.iterdir() if file.suffix.lower() in READERS)
    sides = [int(side) for side in args.sides.split(",")]
    right = []
    if not args.skip_right:
        right += closed_forms()
        right += [against_others(file, side, args.peer_points) for file in files for side in sides if side <= 512]
    columns = {"what": "what", "side": "side", "voxels": "voxels", "largest error, voxels": "error"}
    sys.stdout.write(table(right, {**columns, "of it by facets": "facets", "wrong signs": "wrong"}) + "\n\n")
    assert not sum(row["wrong"] for row in right)
    assert all(row["error"] <= row.get("facets", 0) + 1e-3 for row in right)
    shares = {"ours": 0, "trimesh": args.peer_points, "dense transform": args.dense_side}
    rows = [] if args.skip_times else times([*files, args.organ], sides, shares, args.peer_seconds)
    columns = {"what": "what", "side": "side", "by": "by", "CPU s": "seconds", "measured share": "share"}
    columns |= {"voxels": "voxels", "peak, MiB": "peak_mib", "times ours": "times_ours", "off, voxels": "off"}
    sys.stdout.write(table(rows, {**columns, "ended after, s": "over"}) + "\n")
    sys.stdout.write(json.dumps({"right": right, "times": rows}, default=float) + "\n")
    assert all(
        row["times_ours"] >= FASTER for row in rows if row["side"] == 512 and row["by"] != "ours" and "seconds" in row
    )
    assert all(row["peak_mib"] <= LIMIT_MIB for row in rows if row["by"] == "ours")


if __name__ == "__main__":
    main()
