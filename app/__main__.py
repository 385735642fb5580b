"""python -m app COMMAND: parse, call, print; no logic.

A command is a function of an answer and its own options; `command` adds those that every one has and runs it inside
`answering`: that keeps standard output for one JSON object where asked, turns a refusal into its line, and sets
the exit status (0 done, 1 a fault of ours, 2 the call is wrong, 3 some input was refused).
"""

import contextlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from typer import Argument, Option

from app.shared.refusals import Refused, refusal_of, say

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Json = Annotated[bool, Option("--json", help="One JSON object on standard output, all else on standard error.")]
Seed = Annotated[int, Option("--seed", help="Seed of whatever is random.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]


class CommandEnd:
    """What a command ends with: an object for --json, lines for people, an exit status; and the seed it was given."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.value: dict[str, Any] | None = None
        self.lines: Iterable[str] = ()
        self.status = 0

    def give(self, value: dict[str, Any], lines: Iterable[str] = (), *, status: int = 0) -> None:
        self.value, self.lines, self.status = value, lines, status


@contextlib.contextmanager
def answering(as_json: bool, debug: bool, seed: int = 0) -> Iterator[CommandEnd]:
    """Runs a command's body, prints its answer as one JSON object or as lines, and ends the process with its status."""
    answer, out = CommandEnd(seed), sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield answer
            lines = [] if as_json else list(answer.lines)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        refused = refusal_of(error) or Refused("FAULT", type(error).__name__)
        say(refused)
        answer.status, answer.value, lines = refused.status, {"error": str(refused), "status": refused.status}, []
    if as_json:
        out.write(json.dumps(answer.value) + "\n")
    else:
        out.writelines(f"{line}\n" for line in lines)
    out.flush()
    raise typer.Exit(answer.status)


def command(**how: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function whose first argument takes its answer."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        def run(as_json: Json = False, seed: Seed = 0, debug: Debug = False, **own: Any) -> None:
            with answering(as_json, debug, seed) as answer:
                body(answer, **own)

        _, *options = inspect.signature(body).parameters.values()
        *shared, _ = inspect.signature(run).parameters.values()
        run.__name__, run.__doc__, run.__signature__ = body.__name__, body.__doc__, inspect.Signature(options + shared)
        return app.command(**how)(run)

    return register


def _show_version(asked: bool) -> bool:
    if asked:
        from app.shared.version import VERSION

        sys.stdout.write(f"voxelingo {VERSION}\n")
        raise typer.Exit
    return asked


@app.callback()
def main(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Voxelingo: CT volumes as short sequences of discrete 3D tokens, and language models that read them."""


@command(epilog="Example: python -m app prepare scans/ prepared/ --size 256 --spacing 1.5 --workers 4")
def prepare(
    answer: CommandEnd,
    raw: Annotated[str, Argument(metavar="RAW", help="Folder, zip or file of scans: DICOM, NIfTI, NRRD, MHA.")],
    out: Annotated[str, Argument(metavar="OUT", help="Folder for the prepared dataset.")],
    organs: Annotated[str | None, Option(help="organ_mapping.json: names for label values and files.")] = None,
    text: Annotated[str | None, Option(help="csv or jsonl with reports or questions to join.")] = None,
    workers: Annotated[int, Option(min=1, help="At most this many worker processes.")] = 8,
    size: Annotated[int, Option(help="Voxels along each side of the grid.")] = 512,
    spacing: Annotated[float, Option(help="Millimetres between voxels.")] = 1.0,
    windows: Annotated[str, Option(help="Windows by name, comma separated.")] = "lung,bone,soft_tissue,brain",
    file_format: Annotated[str, Option("--format", help="npy, or zarr: chunked and compressed.")] = "npy",
    series: Annotated[str | None, Option(help="Take this DICOM series alone.", metavar="UID")] = None,
    split: Annotated[str | None, Option(help="csv with a column split and one of source, case, patient.")] = None,
    allow_gaps: Annotated[bool, Option("--allow-gaps", help="Interpolate missing slices.")] = False,
    assume_hu: Annotated[bool, Option("--assume-hu", help="Take the values for HU whatever they look like.")] = False,
    keep_names: Annotated[bool, Option("--keep-names", help="Name cases after their files, not by hashes.")] = False,
    key_file: Annotated[str | None, Option(help="Key of the hashes; else one is made beside OUT.")] = None,
    preview: Annotated[bool, Option("--preview", help="A PNG for each case.")] = False,
    cluster: Annotated[str | None, Option(help="Address of a Dask scheduler.", metavar="ADDRESS")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Make every case again.")] = False,
) -> None:
    """Raw scans, any nesting, to a prepared dataset."""
    from app.prepare import cohort, options
    from app.prepare import report as reports

    request = cohort.Request(
        series=series,
        organs=options.read_organs(organs),
        text=text,
        split=options.read_split(split),
        key_file=key_file,
        workers=workers,
        cluster=cluster,
        preview=preview,
        overwrite=overwrite,
    )
    names = tuple(name.strip() for name in windows.split(",") if name.strip())
    settings = cohort.PrepareSettings(size, spacing, names, file_format, allow_gaps, assume_hu, keep_names)
    report = cohort.prepare(raw, out, settings, request)
    answer.give(report.as_json(), reports.lines(report, keep_names), status=report.exit_status)


@command(epilog="Example: python -m app sdf meshes/ shapes/ --resolution 64,512")
def sdf(
    answer: CommandEnd,
    source: Annotated[
        str, Argument(metavar="SOURCE", help="Mesh (STL, OBJ, PLY, VTP), volume, prepared dataset, or a folder.")
    ],
    out: Annotated[str, Argument(metavar="OUT", help="Folder for files of signed distance.")],
    resolution: Annotated[str, Option(help="Voxels along each side, comma separated.")] = "64,512,1024",
    label: Annotated[str | None, Option(help="One label of a volume, or one organ of a case; else each.")] = None,
    hu: Annotated[float | None, Option(help="The surface of scans or prepared cases at this level.")] = None,
    band: Annotated[float, Option(help="Voxels on either side of the surface.")] = 4.0,
    sharp: Annotated[
        float | None, Option(help="Mark voxels near edges of more than so many degrees.", metavar="DEGREES")
    ] = None,
    unsigned: Annotated[bool, Option("--unsigned", help="Distances without a sign, of open meshes too.")] = False,
    workers: Annotated[int, Option(min=1, help="At most this many worker processes.")] = 8,
    overwrite: Annotated[bool, Option("--overwrite", help="Make every file again.")] = False,
) -> None:
    """Meshes and volumes to sparse signed distance."""
    from app.shapes import sdf as shapes
    from app.shapes.sources import SurfaceChoice

    sides = shapes.read_resolutions(resolution)
    settings = shapes.Settings(sides, band, sharp, SurfaceChoice(label, hu, unsigned), overwrite)
    done = shapes.make_shapes(source, out, settings, workers=workers)
    answer.give(done, shapes.lines(done), status=3 if done["refused"] else 0)


@command(epilog="Example: python -m app check prepared/ --keep body")
def check(
    answer: CommandEnd,
    data: Annotated[str, Argument(metavar="DATA", help="A prepared dataset, a manifest, or scans with .txt.")],
    keep: Annotated[str, Option(help="Sparsification by name, as training will be told.")] = "body",
    windows: Annotated[str, Option(help="Windows by name, comma separated.")] = "lung,bone,soft_tissue,brain",
    spacing: Annotated[float | None, Option(help="Millimetres at which points are counted; else the preset's.")] = None,
    preset: Annotated[str, Option(help="Sizes that will train, by the name of their preset.")] = "base",
    min_points: Annotated[int, Option(help="Cases with fewer points are told.")] = 100,
    image_root: Annotated[str | None, Option(help="Folder that a manifest's images are in.")] = None,
) -> None:
    """What is wrong with a prepared dataset or a text manifest, before any GPU time is spent."""
    from app.check import check as look
    from app.check import lines

    names = tuple(name.strip() for name in windows.split(",") if name.strip())
    counted = {"keep": keep, "windows": names, "preset": preset, "spacing": spacing, "min_points": min_points}
    checked = look(data, **counted, image_root=image_root)
    answer.give(checked.as_json(), lines(checked), status=checked.exit_status)


@app.command(
    epilog="Example: python -m app train vq_stage1 --dataset_dir prepared/ --max_steps 1000",
    context_settings={"ignore_unknown_options": True},
)
def train(
    words: Annotated[
        list[str] | None, Argument(metavar="STAGE [--key value]", help="Keys are those of its file.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a stage: vae, vq_stage1, vq_stage2 or align. Keys are those of bundles/STAGE.json."""
    with answering(as_json, debug) as answer:
        from app.training.run_errors import end_at_once_on_sigterm
        from app.training.train import train_words

        end_at_once_on_sigterm()
        answer.give(train_words(words or [])._asdict())


@command(epilog="Example: python -m app demo demo/")
def demo(
    answer: CommandEnd,
    out: Annotated[str, Argument(metavar="[OUT]", help="Folder for everything; an interrupted one goes on.")] = "demo",
) -> None:
    """The whole chain on built-in phantoms, in minutes on a CPU; ends with a table and a page."""
    from app import demo as chain

    done = chain.demo(out, seed=answer.seed)
    answer.give(done, chain.lines(done))


@command(epilog="Example: python -m app doctor")
def doctor(answer: CommandEnd) -> None:
    """What this machine can do: versions, GPU, sparse backends, DICOM decoders, free memory and disk."""
    from app.doctor import report

    answer.give(report())


@command(epilog="Example: python -m app tokenize prepared/chest tokens/ --tokenizer outputs/vq_stage2")
def tokenize(
    answer: CommandEnd,
    source: Annotated[str, Argument(metavar="SOURCE", help="A scan, prepared case or dataset; a mesh or shape.")],
    out: Annotated[str, Argument(metavar="OUT", help="Folder for token files, or one .npz for one scan.")],
    tokenizer: Annotated[str | None, Option(help="Checkpoint, output folder, bundle or name (ct_base).")] = None,
    support: Annotated[bool, Option("--support", help="Also store which voxels there were.")] = False,
    levels: Annotated[float | None, Option(min=1, help="Codes a cell; 1.5: on average, where they pay.")] = None,
    refine: Annotated[int, Option(min=0, help="Steps to codes that decode better; 8 take a while on a CPU.")] = 0,
    pack: Annotated[bool, Option("--pack", help="Entropy-coded: fewer bytes, read alike.")] = False,
    series: Annotated[str | None, Option(help="Take this DICOM series alone.", metavar="UID")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Make every file again.")] = False,
) -> None:
    """Scans to token files."""
    from app.tokens import commands

    how = {"support": support, "levels": levels, "refine": refine, "pack": pack}
    done = commands.tokenize(source, out, tokenizer=tokenizer, series=series, overwrite=overwrite, **how)
    answer.give(done, commands.lines(done), status=3 if done["refused"] else 0)


@command(epilog="Example: python -m app reconstruct tokens/case.npz case.nii.gz --like scan.nii.gz")
def reconstruct(
    answer: CommandEnd,
    tokens: Annotated[str, Argument(metavar="TOKENS", help="A token file, or a folder of them.")],
    out: Annotated[str, Argument(metavar="OUT", help="A .nii.gz, or of a shape a .ply, .stl or .obj; else a folder.")],
    tokenizer: Annotated[str | None, Option(help="Checkpoint, output folder, bundle or name (ct_base).")] = None,
    like: Annotated[str | None, Option(help="A scan on whose own grid to write.", metavar="SCAN")] = None,
    codes_alone: Annotated[bool, Option("--codes-alone", help="Leave stored support unused.")] = False,
    levels: Annotated[int | None, Option(min=1, help="Use the first so many codes of each cell.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Make every file again.")] = False,
) -> None:
    """Token files back to CT volumes in HU, or to meshes in mm, in world coordinates."""
    from app.tokens import commands

    done = commands.reconstruct(
        tokens,
        out,
        tokenizer=tokenizer,
        like=like,
        use_support=not codes_alone,
        levels=levels,
        overwrite=overwrite,
    )
    answer.give(done, commands.lines(done), status=3 if done["refused"] else 0)


@command(epilog='Example: python -m app ask scan.nii.gz "Is there a nodule in the left lung?"')
def ask(
    answer: CommandEnd,
    scan: Annotated[str, Argument(metavar="SCAN", help="Raw scan, prepared case, token file, or a folder.")],
    questions: Annotated[list[str] | None, Argument(metavar="[QUESTION]...", help="None: a report.")] = None,
    align: Annotated[str, Option(help="Output folder of an alignment run.")] = "outputs/align",
    tokenizer: Annotated[str | None, Option(help="Where the tokenizer is now, if it was moved.")] = None,
    out: Annotated[str | None, Option(help="Write answers as jsonl, with failures.csv beside it.")] = None,
    stream: Annotated[bool, Option("--stream", help="Show the answer while it is written.")] = False,
    max_new_tokens: Annotated[int, Option(min=1, help="At most this many tokens an answer.")] = 256,
) -> None:
    """An answer from a scan; without a question, a report. Research use only, not for diagnosis."""
    from app.language import ask as asking

    result = asking.ask(
        scan,
        questions or [],
        align=align,
        tokenizer=tokenizer,
        out=out,
        stream=stream,
        max_new_tokens=max_new_tokens,
    )
    answer.give(result, asking.lines(result, streamed=stream), status=result.pop("status"))


@command(epilog="Example: python -m app evaluate reports.csv --align outputs/align --batch-size 8")
def evaluate(
    answer: CommandEnd,
    data: Annotated[str | None, Argument(metavar="[DATA]", help="Manifest or prepared dataset with text.")] = None,
    align: Annotated[str, Option(help="Output folder of an alignment run.")] = "outputs/align",
    tokenizer: Annotated[str | None, Option(help="Where the tokenizer is now, if it was moved.")] = None,
    out: Annotated[str | None, Option(help="Folder for scores, table and picture.")] = None,
    image_root: Annotated[str | None, Option(help="Folder that the images' names are in.")] = None,
    split: Annotated[str | None, Option(help="Rows of this split; else test, else val.")] = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave out scans that cannot be read.")] = False,
    num_phantoms: Annotated[int, Option(min=2, help="Without DATA: this many unseen phantoms.")] = 60,
    batch_size: Annotated[int, Option(min=1, help="Answers written at a time.")] = 16,
    max_new_tokens: Annotated[int, Option(min=1, help="At most this many tokens an answer.")] = 160,
    num_shuffles: Annotated[int, Option(min=1, help="Other volumes that each question is asked of.")] = 1,
) -> None:
    """Scores of an aligned model beside what they are worth without the image."""
    from app.evaluation import evaluate

    options = {"seed": answer.seed, "split": split, "num_phantoms": num_phantoms}
    result = evaluate.evaluate(
        data,
        align=align,
        tokenizer=tokenizer,
        output_dir=out,
        image_root=image_root,
        skip_bad=skip_bad,
        options={
            **options,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "num_shuffles": num_shuffles,
        },
    )
    lines = evaluate.lines(result, align=align, output_dir=out)
    answer.give(result, lines, status=evaluate.status_of(result))


@command(epilog="Example: python -m app export my_bundle --tokenizer outputs/vq_stage2 --zip")
def export(
    answer: CommandEnd,
    out: Annotated[str, Argument(metavar="OUT", help="Folder of the bundle; it must not be there yet.")],
    tokenizer: Annotated[str | None, Option(help="Checkpoint, output folder, bundle or name (ct_base).")] = None,
    align: Annotated[str | None, Option(help="Output folder of an alignment run, to go along.")] = None,
    name: Annotated[str | None, Option(help="Name of the bundle; else that of OUT.")] = None,
    zipped: Annotated[bool, Option("--zip", help="Also OUT.zip; the same input gives the same bytes.")] = False,
) -> None:
    """A self-contained MONAI bundle, proven in a process of its own."""
    from app.export import export as exporting

    done = exporting.export(out, tokenizer=tokenizer, align=align, name=name, zipped=zipped)
    answer.give(done, exporting.lines(done))


@command(epilog="Example: monailabel start_server --app $(python -m app where app) --studies DIR")
def where(
    answer: CommandEnd,
    what: Annotated[str, Argument(metavar="bundles|app|pretrained", help="Which folder.")],
) -> None:
    """Prints the folder of the bundles (for --config_file), of the app (for MONAI Label), of tokenizers that ship."""
    from app.shared.places import app_folder, bundles_folder, pretrained_folder

    places = {"bundles": bundles_folder(), "app": app_folder(), "pretrained": pretrained_folder()}
    if what not in places:
        raise ValueError(f"there is {', '.join(places)}, got {what!r}")
    answer.give({what: str(places[what])}, [str(places[what])])


def run() -> None:
    """The command `voxelingo`, and `python -m app`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    sys.stderr.reconfigure(errors="backslashreplace")
    app(prog_name="voxelingo" if sys.argv[0].endswith("voxelingo") else "python -m app")


if __name__ == "__main__":
    run()
