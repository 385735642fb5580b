"""Reading and resampling a scan, against MONAI's LoadImage + Orientation + Spacing: time and peak memory, one thread.

python tests/benchmarks/bench_prepare.py FOLDER [--spacing 1.0] [--full]

Both read the same file, interpolate linearly to the same spacing and write an uncompressed .npy of int16, each run in
a process of its own. Correctness first: each result is compared with the source, interpolated at its own voxels. Ours
also pads to a cube. Times are CPU seconds of the one thread, which other load moves little. --full adds a row for the
whole of `prepare` (hash, cube, four windows, sidecar). Prints a table and a JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def ours(path: str, spacing: float, out: str):
    import numpy as np

    from app.prepare import normalise, read_scan
    from transforms.grid import spacing_of

    start = time.process_time()
    volume = read_scan(path)[0]
    size = int(np.ceil((np.array(volume.hu.shape) * spacing_of(volume.affine)).max() / spacing)) + 1
    on_grid = normalise(volume, size, spacing)
    np.save(out, on_grid.hu)
    return time.process_time() - start, on_grid.affine


def monai(path: str, spacing: float, out: str):
    import numpy as np
    import torch
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, Spacing

    torch.set_num_threads(1)
    chain = Compose(
        [
            LoadImage(image_only=True),
            EnsureChannelFirst(channel_dim="no_channel"),
            Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacing((spacing,) * 3, mode="bilinear"),
        ]
    )
    start = time.process_time()
    image = chain(path)
    np.save(out, np.rint(image[0].numpy()).astype(np.int16))
    return time.process_time() - start, image.affine.numpy()


def full(path: str, spacing: float, out: str):
    import numpy as np

    from app.prepare import cohort, read_scan
    from transforms.grid import spacing_of

    volume = read_scan(path)[0]
    size = int(np.ceil((np.array(volume.hu.shape) * spacing_of(volume.affine)).max() / spacing)) + 1
    start = time.process_time()
    cohort.prepare(path, Path(out).parent / "dataset", cohort.PrepareSettings(size, spacing), cohort.Request(workers=1))
    return time.process_time() - start, np.eye(4)


def measure(kind: str, path: str, spacing: float) -> dict:
    """Runs in a process of its own: seconds, peak memory above what the imports took, and the error."""
    import numpy as np
    from scipy import ndimage

    from app.prepare import read_scan

    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/x.npy"
        seconds, affine = {"ours": ours, "monai": monai, "full": full}[kind](path, spacing, out)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = {"seconds": seconds, "peak_mib": peak}
        if kind != "full":
            result, source = np.load(out), read_scan(path)[0]
            index = np.random.default_rng(0).integers(0, result.shape, (200_000, 3))
            places = index @ affine[:3, :3].T + affine[:3, 3]
            at = (places - source.affine[:3, 3]) @ np.linalg.inv(source.affine[:3, :3]).T
            on = ((at >= 0) & (at <= np.array(source.hu.shape) - 1)).all(1)
            truth = ndimage.map_coordinates(np.asarray(source.hu, np.float64), at[on].T, order=1)
            row["mean_error"] = float(np.abs(result[tuple(index[on].T)] - truth).mean())
            row["voxels"] = int(result.size)
    return row


def run(kind: str, path: str, spacing: float) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, path, "--one", kind, "--spacing", str(spacing)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode and kind == "monai":
        return {
            "seconds": float("nan"),
            "peak_mib": float("nan"),
            "mean_error": float("nan"),
        }  # it has no reader for it
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--spacing", type=float, default=1.0)
    parser.add_argument("--one", choices=("ours", "monai", "full"))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.folder, options.spacing)))
        return
    from app.prepare.gate import Rules
    from app.prepare.survey import survey
    from app.prepare.volume import read_item
    from app.shared.refusals import Refused

    rows = []
    for item in survey(options.folder):
        if item.plan is None:
            continue
        try:
            read_item(item, Rules())
        except Refused:
            continue
        path = os.path.join(options.folder, item.source)
        row = {"source": item.source}
        for kind in ("ours", "monai", *(["full"] if options.full else [])):
            best = min((run(kind, path, options.spacing) for _ in range(options.repeats)), key=lambda r: r["seconds"])
            row |= {f"{kind}_{name}": value for name, value in best.items()}
        row["ratio"] = row["monai_seconds"] / row["ours_seconds"]
        rows.append(row)
        told = [
            "{} {:6.2f} s {:6.0f} MiB, mean error {:.2f}".format(
                kind, *(row[f"{kind}_{name}"] for name in ("seconds", "peak_mib", "mean_error"))
            )
            for kind in ("ours", "monai")
        ]
        whole = f"   prepare {row['full_seconds']:.2f} s" if options.full else ""
        print(f"{row['source']:40} {'   '.join(told)}   {row['ratio']:.1f}x{whole}", flush=True)
    rows = [{name: None if value != value else value for name, value in row.items()} for row in rows]  # NaN is no JSON
    peer = "MONAI LoadImage+Orientation+Spacing"
    print(json.dumps({"benchmark": "prepare", "spacing": options.spacing, "peer": peer, "rows": rows}))


if __name__ == "__main__":
    main()
