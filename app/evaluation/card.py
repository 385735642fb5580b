"""The card of a tokenizer: the same results as JSON for machines, Markdown for readers and PNG for a page.

Knows how results are shown, not how they come about (see tokenizer_evaluation.py).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import NullFormatter

from app.measures import report
from app.measures.controls import MIN_PATIENTS
from app.measures.hu_errors import TISSUES
from app.measures.report import table, with_interval
from app.shared.atomic_files import write_text, written_whole
from app.shared.json_files import write_object
from app.shared.sides import write_sides
from transforms.windows import WINDOWS, window

NAME = "tokenizer_card"
COLOURS = {"codes alone": "#1f6f8b", "stored support": "#9ccbd8", "shuffled codes": "#d98e5f"}
TISSUE_ORDER = ("air", *TISSUES)
PICTURED_WINDOWS, NAMED_LEVELS = 3, 4  # in the picture; of more levels the first and the last


class Slice(NamedTuple):
    """The coronal plane through the middle of a body, cut to its extent."""

    truth: Num[np.ndarray, "X Z"]
    decoded: dict[str, Float[np.ndarray, "X Z"]]  # by way
    codes: Float[np.ndarray, "x z"]  # first level on the latent grid, NaN where empty


def slice_of(
    truth: Num[np.ndarray, "X Y Z"], decoded: dict[str, np.ndarray], codes: Float[np.ndarray, "x y z"]
) -> Slice:
    body = np.argwhere(truth > -300)
    low, high = (body.min(0), body.max(0) + 1) if len(body) else (np.zeros(3, int), np.array(truth.shape))
    middle = int(np.median(body[:, 1])) if len(body) else truth.shape[1] // 2
    box = (slice(low[0], high[0]), middle, slice(low[2], high[2]))
    latent = (slice(low[0] // 8, -(-high[0] // 8)), middle // 8, slice(low[2] // 8, -(-high[2] // 8)))
    return Slice(truth[box].copy(), {way: hu[box].copy() for way, hu in decoded.items()}, codes[latent].copy())


def write(folder: Path, result: dict[str, Any], evaluated: Sequence[Any]) -> None:
    """The three files. Of the evaluated cases the one of median error is pictured."""
    write_object(folder / f"{NAME}.json", report.plain(result))
    write_text(folder / f"{NAME}.md", markdown(result))
    error = [one.row["errors"]["codes alone"]["tissues"]["foreground"]["mae"] for one in evaluated]
    picture(result, evaluated[int(np.argsort(error)[(len(error) - 1) // 2])], folder / f"{NAME}.png")


# ---- text


def markdown(result: dict[str, Any]) -> str:
    """The whole card as text."""
    data, sizes = result["data"], result["tokenizer"]["sizes"]
    return "\n".join(
        [
            "# Tokenizer card",
            "",
            f"{data['cases']} cases of {data['dataset']} (split {data['split']}), whole volumes, "
            f"{sizes['resolution']}³ voxels of {sizes['spacing']:g} mm. Means over cases; in brackets 95 % bootstrap "
            "intervals over cases. Research use, not for diagnosis."
            + (f" Codes refined in {data['refined']} steps." if data.get("refined") else "")
            + (f" Not judged: {', '.join(data['not_judged'])}." if data["not_judged"] else ""),
            "",
            *_facts(result),
            *_errors(result),
            *_by_window(result),
            *_bits(result),
            *_codes(result),
            *_support(result),
            *_cases(result),
            *_definitions(),
        ]
    )


def _facts(result: dict[str, Any]) -> list[str]:
    sizes, codes, rate = result["tokenizer"]["sizes"], result["codes"], result["rate"]
    levels = f", {codes['levels']} codes a latent" if codes["levels"] > 1 else ""
    options = [name for name in ("rotation_trick", "normalize_codes") if sizes[name]]
    rows = [
        ("checkpoint", f"`{result['tokenizer']['file']}`, sha256 `{result['tokenizer']['sha256'][:16]}…`"),
        ("features", f"windows {', '.join(sizes['windows'])}; keep {sizes['keep']}"),
        ("codebook", f"{codes['num_embeddings']} codes of width {sizes['latent_channels']}{levels}, "
         + ", ".join([sizes["codebook"], *options])),
        ("tokens a volume", with_interval(codes["per_case"], ".0f")),
        ("compression of 16-bit voxels", f"{rate['compression_of_16_bit']['mean']:.0f} ×"),
    ]  # fmt: skip
    return ["## What was judged", "", *table(("", ""), rows)]


def _errors(result: dict[str, Any]) -> list[str]:
    ways = result["errors"]
    rows = [
        (
            "**body**" if name == "foreground" else name,
            f"{100 * result['tissue_share'][name]['mean']:.1f} %",
            *(with_interval(ways[way]["tissues"][name]["mae"]) for way in ways),
            with_interval(ways["codes alone"]["tissues"][name]["rmse"]),
        )
        for name in ("foreground", *TISSUE_ORDER)
        if name in ways["codes alone"]["tissues"]
    ]
    ratio = result["shuffled_ratio"]
    patients = result["data"]["patients"]
    verdict = (
        f"no verdict from {patients} patients, it takes {MIN_PATIENTS}"
        if patients < MIN_PATIENTS
        else "the codes carry the image"
        if ratio > 2
        else "much of the image does not hang on which code is where (too little training, or a decoder that reads it "
        "off the coordinates)"
    )
    return [
        "## Error in HU, on every voxel of the grid",
        "",
        *table(("tissue", "share of grid", *(f"MAE, {way}" for way in ways), "RMSE, codes alone"), rows),
        f"With the codes exchanged at random inside each case the error in the body is {ratio:.1f} times that of the "
        f"true codes on the same support: "
        f"{verdict}. {with_interval(result['clipped_share'], '.2f', percent=True)} of the body lies beyond all windows "
        "and is compared clipped.",
        "",
    ]


def _by_window(result: dict[str, Any]) -> list[str]:
    scores = result["errors"]["codes alone"]["windows"]
    rows = [
        (
            f"{name} (W {WINDOWS[name][0]}, L {WINDOWS[name][1]})",
            with_interval(part["mae"]),
            with_interval(part["rmse"]),
            with_interval(part["psnr"]),
            with_interval(part["ssim"], ".3f") if "ssim" in part else report.MISSING,
            f"{part['data_range']['mean']:.0f} HU",
        )
        for name, part in scores.items()
    ]
    head = ("window", "MAE, HU", "RMSE, HU", "PSNR, dB", "SSIM", "data range")
    return ["## As each window shows the body, from codes alone", "", *table(head, rows)]


def _bits(result: dict[str, Any]) -> list[str]:
    rate, alone = result["rate"], result["errors"]["codes alone"]["tissues"]["foreground"]
    rows = [
        ("which cells exist", with_interval(rate["cells_per_foreground_voxel"], ".5f"), ""),
        (
            "codes",
            with_interval(rate["codes_per_foreground_voxel"], ".4f"),
            with_interval(rate["code_bits_per_token"], ".2f"),
        ),
        ("header", with_interval(rate["header_per_foreground_voxel"], ".5f"), ""),
        (
            "**all, codes alone**",
            with_interval(rate["bits_per_foreground_voxel"], ".4f"),
            with_interval(rate["bits_per_token"], ".2f"),
        ),
        ("the same before entropy coding", with_interval(rate["plain_bits_per_foreground_voxel"], ".4f"), ""),
        ("stored support, besides", with_interval(rate["support_per_foreground_voxel"], ".4f"), ""),
    ]
    codecs = [
        (name, with_interval(part["mae"]), with_interval(part["rmse"]), with_interval(part["bits_of_ours"], ".2f"))
        for name, part in result["codecs"].items()
    ]
    lines = ["## Bits", "", *table(("", "bits a voxel of the body", "bits a token"), rows)]
    if not codecs:
        return lines
    ours = ("**tokens, codes alone**", with_interval(alone["mae"]), with_interval(alone["rmse"]), "1")
    head = ("at the same bits", "MAE in the body, HU", "RMSE", "bits, of the tokens'")
    without = "" if "x265" in result["codecs"] else " x265 was not asked: PyAV is not installed."
    return [*lines, *table(head, [ours, *codecs]), f"Codecs see the same body, cut to its box.{without}", ""]


def _codes(result: dict[str, Any]) -> list[str]:
    codes = result["codes"]
    rows = [
        (
            str(i),
            f"{used} of {codes['num_embeddings']} ({used / codes['num_embeddings']:.0%})",
            str(codes["num_embeddings"] - used),
            f"{spread:.0f}",
        )
        for i, (used, spread) in enumerate(zip(codes["used"], codes["perplexity"], strict=True))
    ]
    return ["## Code use over all cases", "", *table(("level", "used", "never used", "perplexity"), rows)]


def _support(result: dict[str, Any]) -> list[str]:
    support, share = result["support"], partial(with_interval, form=".2f", percent=True)
    rows = [
        ("denser than air (table too), beyond the grid: not judged", share(result["beyond"])),
        ("body voxels that the encoder was given", share(support["foreground_kept"])),
        ("body voxels that come back from codes alone", share(support["foreground_decoded"])),
        ("Dice of decoded and given voxels", with_interval(support["dice"], ".4f")),
        ("voxels computed, of full expansion", share(support["computed_of_full_expansion"], form=".0f")),
        ("cells where all children were judged empty", with_interval(support["forced_children"], ".1f")),
    ]  # fmt: skip
    lines = ["## What was kept", "", *table(("", ""), rows)]
    if result["labels"]:
        organs = [
            (
                name,
                with_interval(part["kept"], ".2f", percent=True),
                with_interval(part["decoded"], ".2f", percent=True),
            )
            for name, part in result["labels"].items()
        ]
        lines += table(("label voxels", "given to the encoder", "back from codes alone"), organs)
    return lines


def _cases(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["per_case"]:
        alone, mixed = (row["errors"][way]["tissues"]["foreground"]["mae"] for way in ("codes alone", "shuffled codes"))
        counts = (str(row["tokens"]), f"{alone:.1f}", f"{mixed:.1f}", f"{row['support']['dice']:.4f}")
        rows.append((row["case"], *counts, f"{row['seconds']['encode']:.1f}"))
    head = ("case", "tokens", "MAE, HU", "shuffled", "Dice of support", "encoding, s")
    return ["## Case by case", "", *table(head, rows)]


def _definitions() -> list[str]:
    return [
        "## How to read it",
        "",
        "Truth is the source resampled to the tokenizer's grid; what lies beyond that grid is not judged. The body is "
        "found in the source by its own mask, whatever voxels the tokenizer keeps; tissues are its parts by HU: lung "
        "below -500, air-tissue border to -150, fat to -30, soft tissue to 150, bone (and contrast, metal) above; air "
        "is the rest of the grid. A voxel that was dropped counts with the HU it stands for. PSNR and SSIM are over "
        "the body with the window's width as data range. *Codes alone*: the network itself says where voxels are. "
        "*Stored support*: it is told. *Shuffled codes*: it is told, but codes have changed places at random. Bits "
        "are all that a decoder needs beside the weights, which all volumes share: those of the packed token file "
        "(`tokenize --pack`), made of codes, cells and a short header. Perplexity is the number of codes that "
        "equal use would need.",
        "",
    ]


# ---- picture


def picture(result: dict[str, Any], case: Any, path: Path) -> None:
    """One page: the median case in three windows, errors per tissue beside their control, code use, key numbers."""
    names = list(result["tokenizer"]["sizes"]["windows"])[:PICTURED_WINDOWS]
    shape = case.slice.truth.shape
    height = 2.2 * shape[1] / shape[0]
    figure = Figure(figsize=(11.7, min(height, 3.4) * len(names) + 4.1), layout="constrained")
    ratios = {"height_ratios": [*[min(height, 3.4)] * len(names), 3.4], "width_ratios": [1] * 5}
    grid = GridSpec(len(names) + 1, 5, figure=figure, **ratios)
    data = result["data"]
    figure.suptitle(
        f"Tokenizer {result['tokenizer']['sha256'][:8]} on {data['cases']} cases of {data['dataset']} "
        f"(split {data['split']}). Shown: {case.row['case']}, the case of median error",
        fontsize=11,
    )
    _slices(figure, grid, case.slice, names, spacing=result["tokenizer"]["sizes"]["spacing"])
    _tissue_bars(figure.add_subplot(grid[len(names), :3]), result)
    _code_use(figure.add_subplot(grid[len(names), 3:]), result)
    if len(names) > 1:
        _key_numbers(figure.add_subplot(grid[1 : len(names), 4]), result)
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def _slices(figure: Figure, grid: GridSpec, shown: Slice, names: Sequence[str], *, spacing: float) -> None:
    """A row a window: source, decoded, their difference, and the control; beside them the codes of the slice."""
    truth, alone, mixed = shown.truth, shown.decoded["codes alone"], shown.decoded["shuffled codes"]
    for row, name in enumerate(names):
        width = WINDOWS[name][0]
        for column, (title, hu) in enumerate((("source", truth), ("codes alone", alone), ("shuffled codes", mixed))):
            axis = figure.add_subplot(grid[row, (0, 1, 3)[column]])
            _show(axis, window(hu, *WINDOWS[name]), cmap="gray", vmin=0, vmax=1)
            if row == 0:
                axis.set_title(title, fontsize=9)
            if column == 0:
                label = f"{name}\nW {width} L {WINDOWS[name][1]}"
                axis.text(-0.04, 0.5, label, rotation=90, fontsize=9, transform=axis.transAxes, ha="right", va="center")
        axis = figure.add_subplot(grid[row, 2])
        change = (window(alone, *WINDOWS[name]) - window(truth, *WINDOWS[name])) * width
        drawn = _show(axis, change, cmap="RdBu_r", vmin=-width / 4, vmax=width / 4)
        scale = figure.colorbar(drawn, ax=axis, shrink=0.7, pad=0.01)
        scale.ax.tick_params(labelsize=6)
        scale.set_label("HU", fontsize=6)
        if row == 0:
            axis.set_title("difference (red: too high)", fontsize=9)
            axis = figure.add_subplot(grid[row, 4])
            _show(axis, shown.codes, cmap=matplotlib.colormaps["turbo"].with_extremes(bad="black"))
            axis.set_title(f"its codes, {8 * spacing:g} mm each", fontsize=9)


def _show(axis: Axes, image: Float[np.ndarray, "X Z"], **looks: Any) -> Any:
    """Patient upright, their right on the left."""
    shown = axis.imshow(image[::-1].T, origin="lower", interpolation="none", **looks)
    axis.set_axis_off()
    write_sides(axis, "coronal")
    return shown


def _tissue_bars(axis: Axes, result: dict[str, Any]) -> None:
    ways = result["errors"]
    names = [name for name in ("foreground", *TISSUE_ORDER) if name in ways["codes alone"]["tissues"]]
    for i, (way, part) in enumerate(ways.items()):
        errors = [part["tissues"][name]["mae"] for name in names]
        mean = np.array([value["mean"] for value in errors])
        whisker = [[v["mean"] - v["low"] if v["low"] is not None else 0 for v in errors],
                   [v["high"] - v["mean"] if v["low"] is not None else 0 for v in errors]]  # fmt: skip
        place = np.arange(len(names)) + (i - 1) * 0.27
        axis.bar(place, mean, 0.27, color=COLOURS[way], label=way, yerr=whisker, error_kw={"lw": 0.8, "capsize": 1.5})
        if way != "stored support":
            for x, value, above in zip(place, mean, whisker[1], strict=True):
                top = (x, value + above)
                axis.annotate(f"{value:.0f}", top, (0, 2), textcoords="offset points", ha="center", fontsize=7)
    labels = [
        {"foreground": "body", "air-tissue border": "air-tissue\nborder", "soft tissue": "soft\ntissue"}.get(n, n)
        for n in names
    ]
    axis.set_xticks(range(len(names)), labels, fontsize=8)
    axis.set_ylabel("mean absolute error, HU", fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _code_use(axis: Axes, result: dict[str, Any]) -> None:
    """Share of each code over all cases, most used first, beside equal use."""
    last = len(result["code_counts"]) - 1
    for i, counts in enumerate(result["code_counts"]):
        share = np.sort(np.array(counts, np.float64))[::-1] / max(sum(counts), 1)
        label = f"level {i}: " if last else ""
        label += f"{result['codes']['used'][i]} used, perplexity {result['codes']['perplexity'][i]:.0f}"
        named = last < NAMED_LEVELS or i in (0, last)
        axis.plot(
            np.arange(1, len(share) + 1), np.where(share > 0, share, np.nan), lw=1.4, label=label if named else None
        )
    equal = 1 / result["codes"]["num_embeddings"]
    axis.axhline(equal, color="grey", lw=0.8, ls="--", label="equal use")
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("code, most used first", fontsize=9)
    axis.set_ylabel("share of tokens", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _key_numbers(axis: Axes, result: dict[str, Any]) -> None:
    support, rate, codes = result["support"], result["rate"], result["codes"]
    alone = result["errors"]["codes alone"]
    rows = [
        ("MAE in the body", f"{with_interval(alone['tissues']['foreground']['mae'])} HU"),
        ("with shuffled codes", f"{result['shuffled_ratio']:.1f} × as large"),
        ("tokens a volume", with_interval(codes["per_case"], ".0f")),
        ("bits a voxel of the body", f"{rate['bits_per_foreground_voxel']['mean']:.4f}"),
        ("against 16 bit", f"{rate['compression_of_16_bit']['mean']:.0f} × smaller"),
        ("body voxels back", with_interval(support["foreground_decoded"], ".1f", percent=True)),
        ("Dice of support", with_interval(support["dice"], ".3f")),
    ]
    for name, part in alone["windows"].items():
        ssim = f", SSIM {part['ssim']['mean']:.3f}" if "ssim" in part else ""
        rows.append((f"{name} window", f"{part['psnr']['mean']:.1f} dB{ssim}"))
    axis.set_axis_off()
    place = {"transform": axis.transAxes, "va": "top"}
    for i, (name, value) in enumerate(rows):
        y = 1 - i / len(rows)
        axis.text(0.05, y, name, fontsize=8.5, color="#666666", **place)
        axis.text(0.05, y - 0.38 / len(rows), value, fontsize=9.5, **place)
