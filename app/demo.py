"""The command `demo`: the whole chain on built-in phantoms, each stage as its own command does it; then one page.

Stages run one behind the other in this process and write below OUT. A stage that has ended is recorded in demo.json and
not done again, one that was stopped goes on where it was. What stages print lies in demo.log.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from app.shared.json_files import write_object
from app.shared.output_folder import check_folder
from app.shared.refusals import Refused, check_path
from app.shared.terminal import StageTable, clock
from app.shared.version import VERSION

RECORD, LOG = "demo.json", "demo.log"


class Sizes(NamedTuple):
    """How much of everything: what two cores can do within minutes."""

    num_train: int = 30
    num_val: int = 6
    num_unseen: int = 20  # phantoms that judge the tokenizer: as many as a verdict takes
    steps: Mapping[str, int] = {"vae": 700, "vq_stage1": 100, "vq_stage2": 150}
    tokenizer: Mapping[str, Any] = {}  # further keys of the three stages
    codebook: Mapping[str, Any] = {}  # of stages 1 and 2
    align: Mapping[str, Any] = {"num_phantoms": 480}  # further keys of align
    num_asked: int = 60  # phantoms that judge the answers


class Demo(NamedTuple):
    out: Path
    seed: int
    sizes: Sizes

    @property
    def phantoms(self) -> Path:
        return self.out / "phantoms"

    @property
    def unseen(self) -> Path:
        return self.out / "phantoms_unseen"


class Stage(NamedTuple):
    """A row of the chain: its usual seconds on one idle core, what it does, and what it leaves below OUT."""

    seconds: float
    what: str
    run: Callable[[Demo], dict[str, Any]]
    leaves: str


# ---- the stages


def make_phantoms(demo: Demo) -> dict[str, Any]:
    """Phantoms as raw scans, NIfTI and a DICOM series, through `prepare`."""
    from app.phantoms.phantoms import ensure_cohort

    sizes = demo.sizes
    ensure_cohort(demo.phantoms, num_train=sizes.num_train, num_val=sizes.num_val, seed=demo.seed)
    ensure_cohort(demo.unseen, num_train=0, num_val=sizes.num_unseen, seed=demo.seed + 1)
    return {"phantoms": sizes.num_train + sizes.num_val, "unseen": sizes.num_unseen}


def train_stage(demo: Demo, name: str) -> dict[str, Any]:
    """One of the tokenizer's stages, each from the one before it."""
    from app.training.train import train

    before = {
        "vae": {},
        "vq_stage1": {"pretrained_vae_path": str(demo.out / "vae")},
        "vq_stage2": {"init_from": str(demo.out / "vq_stage1")},
    }
    return train(
        name,
        scale="demo",
        dataset_dir=str(demo.phantoms),
        output_dir=str(demo.out / name),
        resume="latest",
        seed=demo.seed,
        max_steps=demo.sizes.steps[name],
        **before[name],
        **demo.sizes.tokenizer,
        **({} if name == "vae" else demo.sizes.codebook),
    )._asdict()


def align(demo: Demo) -> dict[str, Any]:
    """A tiny Qwen2-VL, built here, learns to read the tokens."""
    from app.training.train import train

    settings = {"vae_ckpt": str(demo.out / "vq_stage2"), "output_dir": str(demo.out / "align"), "resume": "latest"}
    return train("align", **settings, seed=demo.seed, **demo.sizes.align)._asdict()


def evaluate(demo: Demo) -> dict[str, Any]:
    """The tokenizer's card, and answers beside every control, on phantoms that no stage has seen."""
    from app.evaluation.evaluate import evaluate as evaluate_language
    from app.evaluation.tokenizer_evaluation import TokenizerEvaluation

    card = {"tokenizer": str(demo.out / "vq_stage2"), "output_dir": str(demo.out / "evaluation")}
    TokenizerEvaluation(dataset_dir=str(demo.unseen), **card).run()
    options = {"num_phantoms": demo.sizes.num_asked, "seed": demo.seed}
    evaluate_language(align=str(demo.out / "align"), output_dir=str(demo.out / "evaluation"), options=options)
    return {}


def ask(demo: Demo) -> dict[str, Any]:
    """Questions about one unseen scan whose answers are known."""
    from app.language.ask import ask as ask_scan

    scan, asked = scan_to_ask(demo)
    said = ask_scan(str(scan), [question for question, _ in asked], align=str(demo.out / "align"))
    answered = [(row["question"], row["answer"]) for row in said["answers"]]
    answers = [
        {"question": question, "answer": answer, "known": truth}
        for (question, answer), (_, truth) in zip(answered, asked, strict=True)
    ]
    return {"scan": scan.relative_to(demo.out).as_posix(), "answers": answers, "notice": said["notice"]}


def scan_to_ask(demo: Demo) -> tuple[Path, list[tuple[str, str]]]:
    """The first unseen phantom with an effusion on one side alone, else the first; questions with their answers."""
    from app.phantoms.sentences import phantom_report, questions
    from app.text.rows import REPORT_QUESTION

    findings = json.loads((demo.unseen / "findings.json").read_text())
    asked = {name: questions(listed, ["pleural effusion"]) for name, listed in findings.items()}
    name = next((name for name, rows in asked.items() if any(kind == "side" for kind, *_ in rows)), min(findings))
    effusions = [f for f in findings[name] if f["finding"] == "pleural effusion"]
    rows = [(question, truth) for _, question, truth in asked[name]]
    rows.append((REPORT_QUESTION, phantom_report(effusions, ["pleural effusion"])))
    files = [path for path in (demo.unseen / "raw").iterdir() if path.name.split(".")[0] == name]
    return files[0], rows


STAGES: Mapping[str, Stage] = {
    "prepare": Stage(
        19,
        "phantoms with known findings, as NIfTI and DICOM, through prepare",
        make_phantoms,
        "phantoms_unseen/metadata.csv",
    ),
    "vae": Stage(
        84, "stage 0: a continuous autoencoder on sparse voxels", lambda demo: train_stage(demo, "vae"), "vae/ckpts"
    ),
    "vq_stage1": Stage(
        18,
        "stage 1: the codebook, encoder and decoder frozen",
        lambda demo: train_stage(demo, "vq_stage1"),
        "vq_stage1/ckpts",
    ),
    "vq_stage2": Stage(
        20,
        "stage 2: encoder, decoder and codebook together",
        lambda demo: train_stage(demo, "vq_stage2"),
        "vq_stage2/ckpts",
    ),
    "align": Stage(250, "a tiny Qwen2-VL, built here, learns to read the tokens", align, "align/projector_final.pt"),
    "evaluate": Stage(
        52,
        "tokens and answers on phantoms that no stage has seen, beside controls",
        evaluate,
        "evaluation/language.json",
    ),
    "ask": Stage(1, "questions about one unseen scan", ask, RECORD),
}


# ---- the page

LEAD = (
    "The whole chain on built-in CT phantoms: scans become prepared volumes, volumes a few discrete tokens, and a "
    "small language model answers questions from those tokens alone. Phantoms are drawn, not scanned: nothing on this "
    "page says how well anything works on patients."
)
NEXT = (
    ("python -m app doctor", "says what this machine can do."),
    ("python -m app prepare RAW OUT", "takes your scans (DICOM, NIfTI, NRRD, MHA) to a prepared dataset."),
    ("python -m app check OUT", "says what is wrong with it before any GPU time is spent."),
    ("python -m app train vae --dataset_dir OUT", "trains the autoencoder; then vq_stage1 and vq_stage2 the same way."),
    ("python -m app train align --data reports.csv", "teaches a Qwen-VL to read the tokens, from your reports."),
    ("python -m app evaluate reports.csv", "writes a page like this one of your own data."),
)


def show(demo: Demo, record: dict[str, Any]) -> None:
    """The page of all that the stages left."""
    from app.evaluation import page
    from app.evaluation.answer_pictures import Asked, picture_answer
    from app.language.assistant import CTAssistant
    from app.text.rows import REPORT_QUESTION

    assistant = CTAssistant.from_pretrained(demo.out / "align")
    asked_scan = record["stages"]["ask"]["result"]
    asked = []
    for row in asked_scan["answers"]:
        if row["question"] == REPORT_QUESTION:
            asked.append(Asked(**row))
        else:
            asked.append(picture_answer(assistant, demo.out / asked_scan["scan"], **row))
    results = demo.out / "evaluation"
    shown = page.Page(
        "Voxelingo: the demo",
        LEAD,
        stages=[(name, STAGES[name].what, part["seconds"]) for name, part in record["stages"].items()],
        tokenizer=demo.out / "vq_stage2",
        card=results,
        runs={name: demo.out / name for name in ("vae", "vq_stage1", "vq_stage2", "align")},
        scores=json.loads((results / "language.json").read_text(encoding="utf-8")),
        bars=results / "language.png",
        asked=asked,
        commands=NEXT,
    )
    page.write_page(demo.out / page.NAME, shown)


# ---- the chain


def demo(out: str = "demo", *, seed: int = 0, sizes: Sizes = Sizes()) -> dict[str, Any]:  # noqa: B008 (a tuple)
    """Runs what is left of the chain and writes the page; gives seconds and results by stage."""
    check_path(out)
    given = Demo(Path(out), seed, sizes)
    record = open_record(given)
    table = StageTable({name: stage.seconds for name, stage in STAGES.items()})
    begun, finished = time.perf_counter(), finished_stages(given, record)
    record["stages"] = finished
    for name, part in finished.items():
        table.skip(name, part["seconds"])
    # one log for the whole chain, and libraries loaded within it: they keep the stream that they find
    with table.shown(), open(given.out / LOG, "a", encoding="utf-8") as log, one_thread(log):
        for name, stage in STAGES.items():
            if name in finished:
                continue
            log.write(f"==== {name}\n")
            with table.stage(name, share_of(given, name)), to_log(log):
                result = run_stage(given, stage)
            record["stages"][name] = {"seconds": table.spent[name], "result": result}
            write_object(given.out / RECORD, record)
        with to_log(log):
            show(given, record)
    seconds = round(time.perf_counter() - begun, 1)
    return {"out": str(given.out), "page": str(given.out / "index.html"), "seconds": seconds, **record}


def finished_stages(demo: Demo, record: dict[str, Any]) -> dict[str, Any]:
    """Stages that earlier calls finished, up to the first whose files are gone: later ones depend on it."""
    finished = {}
    for name, stage in STAGES.items():
        if name not in record["stages"] or not (demo.out / stage.leaves).exists():
            break
        finished[name] = record["stages"][name]
    return finished


def run_stage(demo: Demo, stage: Stage) -> dict[str, Any]:
    try:
        return stage.run(demo)
    except (Refused, KeyboardInterrupt) as error:
        if isinstance(error, Refused) and error.code != "STOPPED":
            raise
        what = "ended by Ctrl-C" if isinstance(error, KeyboardInterrupt) else error.what
        status = 130 if isinstance(error, KeyboardInterrupt) else error.status
        raise Refused("STOPPED", what, "to go on, run the same command again", status=status) from error


def open_record(demo: Demo) -> dict[str, Any]:
    """What earlier calls have done in OUT; a folder of something else, or of another demo, is refused."""
    check_folder(demo.out)
    settings = {"version": VERSION, "seed": demo.seed}
    file = demo.out / RECORD
    if not file.exists():
        if demo.out.exists() and any(demo.out.iterdir()):
            raise Refused("NO_OUTPUT", f"{demo.out} holds something that is no demo", "give another OUT")
        demo.out.mkdir(parents=True, exist_ok=True)
        record = {**settings, "stages": {}}
        write_object(demo.out / RECORD, record)
        return record
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        known = {name: record[name] for name in settings}
        whole = all(float(part["seconds"]) >= 0 and "result" in part for part in record["stages"].values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise Refused("NO_OUTPUT", f"{file} is damaged", "remove the folder, or give another OUT")
    if known != settings:
        was = " and ".join(f"{name} {value}" for name, value in known.items())
        raise Refused("NO_OUTPUT", f"{demo.out} holds a demo of {was}", "give another OUT")
    return record


def share_of(demo: Demo, name: str) -> Callable[[], float | None]:
    """How much of a training stage is done, by its last row of metrics."""
    file, steps = demo.out / name / "metrics.jsonl", demo.sizes.steps.get(name)

    def share() -> float | None:
        try:
            return json.loads(file.read_text().splitlines()[-1])["step"] / steps
        except (OSError, ValueError, IndexError, KeyError, TypeError):  # no row yet, or half of one
            return None

    return share


@contextlib.contextmanager
def one_thread(log: TextIO) -> Iterator[None]:
    """One thread on a CPU, as training chooses too, also for what runs between stages."""
    with to_log(log):
        from app.shared.devices import choose_device, threads_kept
    with threads_kept():
        choose_device(one_thread=True)
        yield


@contextlib.contextmanager
def to_log(log: TextIO) -> Iterator[None]:
    """What is printed goes to the log."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield
    log.flush()


def lines(done: dict[str, Any]) -> list[str]:
    """For people: seconds by stage, answers beside what is known, where the page lies."""
    printed = [f"{name:10} {clock(part['seconds']):>6}" for name, part in done["stages"].items()]
    printed.append(f"{'all':10} {clock(sum(part['seconds'] for part in done['stages'].values())):>6}")
    asked = done["stages"]["ask"]["result"]
    for row in asked["answers"]:
        printed += ["", row["question"], f"  {row['answer']}  (known: {row['known']})"]
    return [*printed, "", asked["notice"], f"Look at {done['page']} in a browser."]
