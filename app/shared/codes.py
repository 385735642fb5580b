"""The one table of codes: all that can be met, how it ends, what it means, what to do.

docs/codes.md is this table: `python -m app.shared.codes > docs/codes.md`. No rule is decided here.
"""

import sys
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

Kind = Literal["fine", "fixed", "warned", "skipped", "refused", "call", "stopped", "fault"]

# where it ends a command
STATUS = MappingProxyType({"refused": 3, "skipped": 3, "call": 2, "stopped": 130, "fault": 1})
ENDINGS = MappingProxyType(
    {
        "fine": "nothing is wrong",
        "fixed": "put right and recorded; the work goes on",
        "warned": "told; the work goes on",
        "skipped": "no CT volume at all: left out; 3 where it was all there is",
        "refused": "this input is not used, the rest is done; exit status 3",
        "call": "the call or a config is wrong; exit status 2",
        "stopped": "ended from outside; exit status 130 by Ctrl-C, 143 by SIGTERM",
        "fault": "exit status 1",
    }
)


class Code(NamedTuple):
    kinds: tuple[Kind, ...]
    meaning: str
    remedy: str

    @property
    def status(self) -> int:
        """The exit status of a command that this ends, where whoever raises it says no other."""
        return STATUS.get(self.kinds[-1], 2)


_warned, _skipped, _refused, _call, _fault = (
    partial(Code, (kind,)) for kind in ("warned", "skipped", "refused", "call", "fault")
)


def _fixed(meaning: str, remedy: str = "nothing to do, it is recorded") -> Code:
    return Code(("fixed",), meaning, remedy)


CODES = MappingProxyType(
    {
        "OK": Code(("fine",), "nothing to report", "nothing to do"),
        "TILT_CORRECTED": _fixed("the gantry was tilted: the sheared stack is resampled onto a right-angled grid"),
        "UNEVEN_SPACING_RESAMPLED": _fixed("steps between slices differ: slices are interpolated at even steps"),
        "GAPS_INTERPOLATED": _fixed(
            "missing slices are interpolated from their neighbours, as --allow-gaps asked",
            "leave these slices out of conclusions",
        ),
        "DUPLICATES_DROPPED": _fixed("slices that occur twice with equal pixels are used once"),
        "PADDING_MAPPED": _fixed("values that stand for no measurement (padding, NaN, below -1500 HU) became air"),
        "OVERLAPPING_SLICES": _warned("slices are thicker than the step between them", "expect blur along the stack"),
        "NO_SERIES_UID": _warned(
            "slices without a series UID, grouped by folder and geometry",
            "check that they belong together, or export again with series UIDs",
        ),
        "SERIES_SPLIT": _warned(
            "one series UID holds several stacks, each becomes a case", "keep the cases that you want"
        ),
        "FOV_CROPPED": _warned(
            "the scan is larger than the grid and was cut",
            "raise --size or --spacing; where a tokenizer's own grid cuts, train it with a larger spacing",
        ),
        "LOW_RESOLUTION": _warned(
            "voxels are more than four times as large as the grid's", "expect blur; do not judge fine detail"
        ),
        "ORIENTATION_FROM_QFORM": _fixed("NIfTI without sform: the qform gives the orientation"),
        "SFORM_QFORM_DIFFER": _warned(
            "NIfTI sform disagrees with qform or pixdim: the sform is used",
            "check left, right and sizes on the preview",
        ),
        "LOSSY_COMPRESSION": _warned(
            "pixels went through lossy compression", "prefer the original; fine detail and HU are altered"
        ),
        "ASSUMED_HU": _warned(
            "values were taken for HU because --assume-hu says so", "check the HU range in case.json"
        ),
        "DERIVED_SERIES": _warned(
            "the image type says DERIVED or SECONDARY: rewritten by other software",
            "prefer the scanner's own series where there is one",
        ),
        "LABELS": _skipped(
            "labels, no scan: taken along with the scan they belong to", "nothing to do; name them with --organs"
        ),
        "NOT_CT": Code(
            ("skipped", "refused"),
            "no CT volume: text, RTSTRUCT, screen shot (skipped); MR, PET, reformatted or projected image (refused)",
            "give the axial CT series; one reformatted series can be asked for with --series UID",
        ),
        "NOT_HU": _refused(
            "values are not HU: 8-bit, 0..1, windowed, rescaled twice or never",
            "give the original scan, or overrule by `prepare --assume-hu`",
        ),
        "LOCALIZER": Code(
            ("skipped", "refused"),
            "a localizer (scout): skipped beside a scan, refused alone",
            "give the axial series of the study",
        ),
        "TOO_FEW_SLICES": _refused("fewer than 5 slices", "give the whole series"),
        "MISSING_SLICES": _refused(
            "a step between slices is a multiple of the others",
            "export the series again, or accept interpolation by `prepare --allow-gaps`",
        ),
        "DUPLICATE_SLICES": _refused(
            "slices at one position differ in their pixels", "separate the reconstructions or time points"
        ),
        "MIXED_GEOMETRY": _refused(
            "slices of one series do not make one stack (matrix, spacing, orientation, position)",
            "separate the stacks, each with a series UID of its own",
        ),
        "MIXED_IDENTITY": _refused(
            "slices of two patients, studies or frames of reference under one series UID",
            "separate them, each with a series UID of its own",
        ),
        "MULTI_FRAME_UNSUPPORTED": _refused(
            "a multi-frame file without the functional groups of Enhanced CT", "export as classic CT slices"
        ),
        "FOUR_D": _refused("several time points or channels", "export one time point as a volume of its own"),
        "RGB": _refused("colour pixels", "give the original grey series"),
        "DECODER_MISSING": _refused(
            "no installed decoder reads this compression",
            "see `python -m app doctor`; else decompress first, for example with gdcmconv --raw",
        ),
        "CORRUPT_FILE": _refused("the file is damaged, truncated or contradicts itself", "copy or export it again"),
        "EMPTY": _refused("no voxels, or all voxels the same", "give a scan with content"),
        "NO_SPACING": _refused(
            "voxel size, position or orientation is missing or impossible", "export again with geometry"
        ),
        "LABEL_GRID_MISMATCH": _refused("labels lie outside the scan they belong to", "give labels drawn on that scan"),
        "UNSAFE_ARCHIVE": _refused(
            "an archive with absolute or climbing paths, links, too many or too large members",
            "unpack it yourself after a look inside",
        ),
        "NO_CASES": Code(
            ("call", "refused"),
            "nothing here could become a case, or is left of the data that the call names",
            "check the path and the split; see the other lines for the reasons",
        ),
        # what `check` tells of a prepared dataset or a manifest; those that training would stumble over end it with 3
        "UNREADABLE": _refused("files of a prepared case cannot be read", "prepare these cases again"),
        "WINDOW_MISSING": _refused("a prepared case lacks a window", "prepare again with --windows"),
        "OUT_OF_RANGE": _refused("values beyond -32768..32767, or not HU", "prepare again"),
        "STALE": _refused(
            "the source of a prepared case is refused by now", "mend the source and prepare again, or remove the case"
        ),
        "SPLIT_LEAKAGE": _refused("a patient is on both sides of a split", "split by patient"),
        "SAME_SCAN": _refused(
            "one scan is on both sides of a split under two names", "give both one patient, or remove a copy"
        ),
        "SCANS_MISSING": _refused(
            "a manifest names images that are not found", "give the folder that their paths begin in as image_root"
        ),
        "CONSTANT": _warned("a window says the same everywhere", "leave that window out, or that scan"),
        "UNDER_MIN_POINTS": _warned(
            "fewer points than min_points: training skips the case", "lower min_points, or look at the scan"
        ),
        "INPUTS_REFUSED": _warned("inputs that never became cases", "see failures.csv"),
        "NO_VALIDATION": _warned("every case is in train", "name some val in the column split, or prepare --split"),
        "NO_TRAINING": _warned("every case is in val", "name some train in the column split, or prepare --split"),
        "EMPTY_TEXT": _warned("rows of a manifest without an answer are skipped", "nothing to do"),
        "DUPLICATED": _warned("rows of a manifest that stand there more than once", "remove the copies"),
        # prepared cases and tokens
        "DAMAGED_CASE": _refused(
            "files of a prepared case are missing or damaged", "prepare the case again with --overwrite"
        ),
        "OTHER_WINDOWS": _refused(
            "a case lacks a window that is asked for", "choose among those it has, or prepare again"
        ),
        "BAD_SCAN": _call(
            "a scan that text belongs to cannot be used", "repair it, or leave it out with --skip_bad True"
        ),
        "BAD_LIKE": _refused(
            "the scan given as --like cannot be read, or is several", "give one scan that can be read"
        ),
        "NO_TOKENS": Code(
            ("call", "refused"), "no token file is there", "make one with `python -m app tokenize SOURCE OUT`"
        ),
        "DAMAGED_TOKENS": _refused("a token file is damaged, or contradicts itself", "tokenize the scan again"),
        "TOO_FEW_LEVELS": _refused(
            "tokens with fewer quantiser levels than are asked for",
            "ask for fewer, or tokenize the scan again with more",
        ),
        "EXISTS": Code(
            ("fine", "refused"),
            "a file is there already: taken as it is, or of another scan or tokenizer and not overwritten",
            "--overwrite, or another OUT",
        ),
        # shapes
        "BAD_MESH": _refused("a mesh file is damaged, or is none", "export it again as STL, OBJ, PLY or VTP"),
        "OPEN_MESH": _refused(
            "a mesh has holes: it has no inside", "close it, or take distances without a sign by --unsigned"
        ),
        "SELF_CROSSING": _warned(
            "triangles of a mesh pass through each other: the line says what counts as inside",
            "nothing to do where parts overlap on purpose; else repair the mesh",
        ),
        "NON_MANIFOLD": _warned(
            "more than two triangles meet in an edge: a line that crossed the surface an odd number of times is inside",
            "nothing to do where parts touch on purpose; else repair the mesh",
        ),
        "UNSIGNED": _warned("distances have no sign, as --unsigned asked", "do not train on them beside signed ones"),
        "NO_SURFACE": _refused("a volume has no surface there", "name a label or a level that it has"),
        "DAMAGED_SHAPE": _refused(
            "a file of signed distance is damaged, or is none", "make it again with `python -m app sdf`, --overwrite"
        ),
        # the call
        "BAD_VALUE": _call("a value that cannot be used", "the line says the rule; pass another"),
        "BAD_CALL": _call("options that do not go together", "see --help"),
        "BAD_PATH": _call("a path that cannot be used", "check the path"),
        "NO_ACCESS": _call("a file or folder may not be read or written", "check the path and who may use it"),
        "DISK_FULL": _call(
            "no space is left on the disk",
            "free space and run again: what is done is kept, training goes on with --resume latest",
        ),
        "NO_SOURCE": _call("what to work on does not exist", "check the path"),
        "NO_DATA": _call("no data are given, or there are none", "give a prepared dataset, a manifest or a folder"),
        "NO_OUTPUT": _call("results cannot be written there", "give another place, or mend its permissions"),
        "IN_USE": _call("another run is writing there", "wait for it, or give another place"),
        "MANY_SCANS": _call("several scans and one file to write", "give a folder as OUT"),
        "BAD_MANIFEST": _call(
            "a manifest cannot be read as rows of scans with text", "see `python -m app check` on it"
        ),
        "BAD_TABLE": _call("a csv is not what its header says", "correct it at the line that is named"),
        "BAD_DATASET": _call(
            "a Dataset of yours cannot be loaded, or an item of it used", "give package.module.Class of a torch Dataset"
        ),
        "BAD_EVALUATION": _call("nothing can be evaluated", "see `python -m app check` on the data"),
        # the config of a bundle run
        "NO_STAGE": _call("no stage is named", "voxelingo train STAGE; the line names them"),
        "UNKNOWN_STAGE": _call("there is no such stage", "the line names the nearest"),
        "NO_CONFIG": _call("a config file is not there", "check the path"),
        "BAD_CONFIG": _call("a config file cannot be read", "correct it; it must be JSON or YAML with one object"),
        "UNKNOWN_RUN": _call("the config has nothing of that name to run", "the line names the nearest"),
        "UNKNOWN_KEY": _call("the run has no such key", "the line names the nearest"),
        "UNUSED_KEY": _call("the key stands in the config and no part of this run uses it", "leave it out"),
        "UNKNOWN_ARGUMENT": _call("a part is given an argument that it does not take", "the line names the nearest"),
        "MISSING_ARGUMENT": _call("a part is made without an argument that it needs", "add it in the config"),
        "MISSING_REFERENCE": _call("a reference to a key that does not exist", "define it, or remove the reference"),
        "BAD_TARGET": _call("a _target_ that cannot be imported", "give the dotted path of a class or function"),
        "BAD_TARGET_KEY": _call("a misspelt _target_, which MONAI would pass over", "the line says how to write it"),
        "BAD_EXPRESSION": _call("a $ expression fails", "correct it in the config or on the line"),
        "PLAIN_STEP": _call("a step without $, which MONAI would pass over", "begin it with $"),
        "NULL_IGNORED": _call("--key None, which MONAI would ignore", "write --key '$None' to set null"),
        "NO_OVERLAY": _call("several processes and a config for one", "lay bundles/multi_gpu.json over it"),
        "NO_TORCHRUN": _call("bundles/multi_gpu.json without torchrun", "start it with torchrun"),
        # training
        "BAD_RESUME": _call("--resume takes latest or a step", "pass --resume latest"),
        "NO_CHECKPOINT": _call("no complete checkpoint is there", "train first, or name another file or output folder"),
        "BAD_RUN": _call("a file of an output folder is no longer what a run wrote", "the line says what to remove"),
        "BAD_CHECKPOINT": _call("a checkpoint is damaged or does not fit", "it may be damaged: use an older step"),
        "FOREIGN_CHECKPOINT": _call(
            "a file that does not say what it was made for", "use a checkpoint of this project"
        ),
        "WEIGHTS_MISFIT": _call(
            "published weights lack tensors, have others besides, or of other shapes",
            "pass --preset direct3d_s2 and one feature a voxel (--features sdf, or a --window_type)",
        ),
        "NO_CODEBOOK": _call("an autoencoder where a tokenizer is wanted", "give the output folder of stage 1"),
        "NO_STAGE1": _call("stage 2 without a stage 1", "run stage 1 with your dataset_dir first"),
        "CONSTANT_ENCODER": _call(
            "the encoder gives the same output everywhere",
            "give trained weights, or null to train an autoencoder first",
        ),
        "TOO_LITTLE_DATA": _call(
            "too few encoder outputs for a codebook",
            "give more cases, larger crops (--max_points) or fewer codes (--num_embeddings)",
        ),
        "COLLAPSED_CODEBOOK": _warned(
            "few codes are used: tokens say next to nothing",
            "stop, and begin again with a lower --learning_rate or with --codebook ema from stage 1 on",
        ),
        "NOT_FINITE": _fault(
            "the loss is no number", "resume with a lower learning_rate; check the cases that the line names"
        ),
        "SAVE_FAILED": _call("a checkpoint cannot be written", "free disk space, then --resume latest"),
        "OUT_OF_MEMORY": _call(
            "the memory of the machine or GPU is not enough",
            "lower, in this order: batch_size_per_gpu, max_points, resolution; or pass --use_checkpoint True",
        ),
        "LOST_RANK": _fault(
            "another process of this run is gone",
            "look above for why it ended, then --resume latest; torchrun --max_restarts=3 does so by itself",
        ),
        "STOPPED": Code(
            ("stopped",),
            "ended by Ctrl-C or SIGTERM; training had finished and saved the step it was at",
            "run again: what is done is kept; training, where it had saved a step, with --resume latest",
        ),
        # tokenizers and language models
        "NO_TOKENIZER": _call("there is no tokenizer", "train one, or name one with --tokenizer or --vae_ckpt"),
        "BAD_TOKENIZER": _call("a tokenizer cannot do this", "give another with --tokenizer"),
        "OTHER_TOKENIZER": Code(
            ("call", "refused"), "made for or by another tokenizer", "give that one with --tokenizer, or make it again"
        ),
        "OTHER_RESAMPLER": Code(
            ("call", "refused"),
            "data were brought onto their grid by another version of the resampler",
            "prepare the dataset again with --overwrite; begin the run again",
        ),
        "BAD_MODEL": _call(
            "no Qwen-VL can be loaded from there", "give a hub name or the folder of a Qwen2-VL or Qwen3-VL"
        ),
        "OTHER_MODEL": _call("a projector of another language model", "restore that model, or align again"),
        "OTHER_SETTINGS": _call(
            "a run is resumed with settings of which it cannot change",
            "resume with the same, or start in another output_dir",
        ),
        "NO_PEFT": _call("LoRA without peft", "pip install peft, or leave out --use_lora"),
        "NO_ALIGNMENT": _call("there is no aligned model", "run the bundle align.json first, or name one with --align"),
        "NOT_FINISHED": _call("an alignment that did not reach its end", "go on with --resume latest"),
        "BAD_PROJECTOR": _call("a projector that its own settings do not describe", "align again"),
        "BAD_ADAPTER": _call("a LoRA adapter cannot be loaded", "install peft, copy the folder again, or align again"),
        # bundles that leave the house, and the server
        "BAD_BUNDLE": _call(
            "an exported bundle whose files contradict each other", "copy it again, or export it again"
        ),
        "BAD_CARD": _call("a tokenizer's card beside it cannot be read", "evaluate it again, or remove the card"),
        "NO_TEMPLATES": _call("a bundle's own code exports no bundle", "use a checkout or an installation"),
        "NOT_PROVEN": _fault("an exported bundle does not give what its source gives", "report it with its line"),
        "BAD_SHAPE": _refused("a batch that is not (B, 1, X, Y, Z)", "give volumes in HU with one channel"),
        "NOT_LOCAL": _refused("a request from another machine or page", "the line says how to allow it"),
        "TOO_LARGE": _refused("more is sent than the server takes", "raise --conf max_upload_mb"),
        "NO_MODEL": _refused("the server has no such model", "name one that the line names"),
        # ours
        "FAULT": _fault("a mistake of this software", "run again with --debug, and report what it shows"),
    }
)


def as_markdown() -> str:
    """docs/codes.md, whole."""
    lines = ["# Codes", "", "Everything that can be met, in one line each: `CODE: what. What to do.`", ""]
    lines += [f"- {kind}: {says}" for kind, says in ENDINGS.items()]
    lines += ["", "| code | ends as | means | what to do |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {' or '.join(code.kinds)} | {code.meaning} | {code.remedy} |" for name, code in CODES.items()
    ]
    lines += ["", "Written by `python -m app.shared.codes > docs/codes.md`.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
