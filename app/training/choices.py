"""What a stage file leaves to its user in few keys: demo or one's own data, which CT windows, which sparse backend."""

import logging
import os
from collections.abc import Mapping, Sequence

from app.shared.refusals import Refused
from networks.sparse.ops import BACKENDS
from transforms.windows import WINDOWS

log = logging.getLogger(__name__)

SCALES = ("auto", "demo", "full")


def is_demo(
    scale: str = "auto",
    *,
    dataset_dir: str | None = None,
    data: str | None = None,
    dataset: str | None = None,
    dummy_data: bool = False,
) -> bool:
    """Whether the demo's numbers are meant; `auto` means them as long as there is no data. `dummy_data` is the demo.

    A tokenizer learns from a `dataset_dir`; an alignment from text (`data`) or from a `dataset` by its dotted path.
    """
    if scale not in SCALES:
        raise Refused("BAD_VALUE", f"scale must be auto, demo or full, got {scale!r}", "leave --scale out for auto")
    given = {"data": data is not None, "dataset": dataset is not None, "dummy_data": dummy_data}
    if sum(given.values()) > 1:
        both = " and ".join(name for name, is_given in given.items() if is_given)
        raise Refused("BAD_VALUE", f"{both} are both given", "give one of them")
    own = dataset_dir is not None or given["data"] or given["dataset"]
    if scale == "full" and not own:
        remedy = "pass --dataset_dir (an alignment: --data), or leave --scale out for the demo"
        raise Refused("NO_DATA", "scale full needs data", remedy)
    return scale == "demo" or (scale == "auto" and not own)


def window_names(
    windows: Mapping[str, Sequence[float]] | Sequence[str], *, window_type: str | None = None
) -> list[str]:
    """The CT windows of a run, one channel each: `window_type` alone where it is given, else all of `windows`.

    A window is known by its name everywhere after this, so numbers (width, level) that stand in a config have to be
    those of the table.
    """
    if window_type is not None:
        return [window_type]
    if isinstance(windows, Mapping):
        for name, numbers in windows.items():
            if name in WINDOWS and tuple(numbers) != WINDOWS[name]:
                width, level = WINDOWS[name]
                given = "/".join(f"{number:g}" for number in numbers)
                remedy = (
                    "choose among the windows there are, or add one under a name of its own to transforms/windows.py"
                )
                what = f"window {name} must be {width}/{level} (width/level in HU), got {given}"
                raise Refused("BAD_VALUE", what, remedy)
    return list(windows)


def backend_of_run(wanted: str | None = None) -> str:
    """The config's choice, else what SPARSE_BACKEND says, else auto. Backends of other projects mean auto."""
    for name in ("ATTN_BACKEND", "SPCONV_ALGO"):
        if os.environ.get(name):
            log.info("%s=%s is not used here: the fastest way is chosen by device", name, os.environ[name])
    named = wanted or os.environ.get("SPARSE_BACKEND") or "auto"
    if named in ("auto", *BACKENDS):
        return named
    if wanted:
        what = f"sparse_backend must be auto or one of {', '.join(BACKENDS)}, got {wanted!r}"
        raise Refused("BAD_VALUE", what, "pass one of these")
    log.info("SPARSE_BACKEND=%s is not among auto, %s: taking auto", named, ", ".join(BACKENDS))
    return "auto"
