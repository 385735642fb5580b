"""Language, measured: answers with the true volume and with every control, scores, gaps, verdicts.

Generates each column once, line by line on disk, so that a stopped run goes on where it was. Scores come from
`text_scores` and `findings`, what to compare them with from `controls`; `answer_pages` shows them to people.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from app.evaluation import answer_pages
from app.evaluation.answer_pages import COLUMNS
from app.language.assistant import CTAssistant
from app.measures import controls, findings, text_scores
from app.measures.controls import CONTROLS
from app.measures.report import plain
from app.shared.atomic_files import write_text
from app.shared.json_files import whole_lines, write_object
from app.shared.notice import NOTICE
from app.shared.refusals import Refused
from app.shared.terminal import progress
from app.text.rows import TextRow
from app.tokens.token_files import CTTokens
from networks.tokens import TokenSequence

log = logging.getLogger(__name__)

RANDOM = "random_labels"
GENERATED = COLUMNS[:-1]  # the constant answers need no model
REPORT_GAPS = ("bleu4", "rougeL", "meteor", "cider")


def evaluate_language(  # noqa: PLR0913
    assistant: CTAssistant,
    rows: Sequence[TextRow],
    volumes: dict[str, CTTokens],
    *,
    out: str | Path,
    mirrored: dict[str, CTTokens] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    num_shuffles: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of every column with their gaps; also written to `out` as JSON, Markdown and PNG.

    Questions are asked with `num_shuffles` pairings of the volumes: by the luck of one a control may be off by more
    than its volumes tell, where few rows are of a kind. Reports, which take longest, have the first alone.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reduced = {image: assistant.reduce(tokens) for image, tokens in volumes.items()}
    rows, left_out = usable(rows, reduced, assistant)
    if not rows:
        raise Refused("BAD_EVALUATION", f"nothing to evaluate: {dict(left_out)} of {left_out.total()} rows")
    shown_in = volume_columns(rows, reduced, seed=seed)
    answers: dict[str, list[str]] = {"reference": [row.answer for row in rows]}
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    for column in GENERATED:
        stored = Answers(out / f"answers_{column}.jsonl", rows, shown_in[column], assistant)
        answers[column] = stored.complete(column, **options)
    answers["constant"] = controls.constant_answers(
        answers["reference"], [row.question for row in rows], [row.patient for row in rows], closeness
    )
    asked, more = [row for row in rows if row.kind != "report"], []
    for number in range(2, num_shuffles + 1 if asked else 0):
        stored = Answers(
            out / f"answers_shuffled_{number}.jsonl",
            asked,
            other_volumes(asked, reduced, seed=seed + number),
            assistant,
        )
        more.append(stored.complete(f"shuffled, {number}", **options))
    result = {"rows": len(rows), "patients": len({row.patient for row in rows}), "notice": NOTICE}
    result |= {"left_out": dict(left_out), "shuffles": 1 + len(more)}
    result |= {"questions": question_scores(rows, answers, more), "reports": report_scores(rows, answers)}
    add_verdicts(result["questions"], result["reports"], (result["reports"] or {}).get("findings"))
    if mirrored:
        asked = [row for row in rows if row.image in mirrored and controls.swap_sides(row.answer) != row.answer]
        asked = [row for row in asked if row.kind != "report"]
        if asked:
            shown = [assistant.reduce(mirrored[row.image]) for row in asked]
            said = Answers(out / "answers_mirrored.jsonl", asked, shown, assistant).complete("mirrored", **options)
            at = {id(row): number for number, row in enumerate(rows)}
            result["mirror"] = mirror_scores(asked, [answers["real"][at[id(row)]] for row in asked], said)
    result = plain(result)
    write_object(out / "language.json", result, indent=2, allow_nan=False)
    write_text(out / "language.md", "\n".join(answer_pages.table_lines(result)) + "\n")
    answer_pages.draw_bars(result, out / "language.png")
    return result


def usable(
    rows: Sequence[TextRow], volumes: dict[str, TokenSequence], assistant: CTAssistant
) -> tuple[list[TextRow], Counter[str]]:
    """Rows that can be asked and judged, and how many cannot, by reason."""
    kept, left_out = [], Counter()
    longest = max((len(volume.feats) for volume in volumes.values()), default=0)  # shuffled, any may stand beside any
    for row in rows:
        if not row.answer:
            left_out["empty answer"] += 1
        elif row.image not in volumes:
            left_out["no volume"] += 1
        elif not assistant.fits(row.prompt, num_tokens=longest):
            left_out["question too long"] += 1
        else:
            kept.append(row)
    for reason, count in left_out.items():
        log.warning("%d rows left out: %s", count, reason)
    return kept, left_out


def volume_columns(
    rows: Sequence[TextRow], reduced: dict[str, TokenSequence], *, seed: int
) -> dict[str, list[TokenSequence | None]]:
    """What each column shows with each row."""
    images = list(dict.fromkeys(row.image for row in rows))
    mean = sum(reduced[image].feats.mean(0) for image in images) / len(images)
    first = reduced[images[0]]
    blank = first._replace(feats=mean.expand_as(first.feats).clone())  # one featureless volume for every row
    return {
        "real": [reduced[row.image] for row in rows],
        "shuffled": other_volumes(rows, reduced, seed=seed),
        "blank": [blank] * len(rows),
        "question_only": [None] * len(rows),
    }


def other_volumes(rows: Sequence[TextRow], reduced: dict[str, TokenSequence], *, seed: int) -> list[TokenSequence]:
    """With each row the volume of another patient."""
    images = list(dict.fromkeys(row.image for row in rows))
    owner = {row.image: row.patient for row in rows}
    other = controls.derange([owner[image] for image in images], seed=seed)
    swapped = {image: images[at] for image, at in zip(images, other, strict=True)}
    return [reduced[swapped[row.image]] for row in rows]


class Answers:
    """The answers of one column on disk, a line each.

    A stored answer is used again where question, tokens shown, model and allowed length are the same.
    """

    def __init__(
        self, file: Path, rows: Sequence[TextRow], volumes: Sequence[TokenSequence | None], assistant: CTAssistant
    ):
        self.file, self.rows, self.volumes, self.assistant = file, rows, volumes, assistant
        self.model = assistant.settings["projector_sha256"]

    def complete(self, column: str, *, batch_size: int, max_new_tokens: int) -> list[str]:
        shown = {id(volume): fingerprint(volume) for volume in self.volumes}
        origins = [
            hashlib.sha256(repr((self.model, row.prompt, shown[id(volume)], max_new_tokens)).encode()).hexdigest()[:16]
            for row, volume in zip(self.rows, self.volumes, strict=True)
        ]
        known = self._read(origins)
        open_ = [at for at in range(len(self.rows)) if at not in known]
        open_.sort(key=lambda at: (self.rows[at].kind, len(self.rows[at].prompt)))  # alike ones share a batch
        batches = [open_[at : at + batch_size] for at in range(0, len(open_), batch_size)]
        with open(self.file, "a", encoding="utf-8") as stream:
            for batch in progress(batches, f"answering: {column}"):
                asked = [(self.rows[at].prompt, self.volumes[at]) for at in batch]
                said = self.assistant.answer_many(asked, max_new_tokens=max_new_tokens)
                for at, text in zip(batch, said, strict=True):
                    known[at] = text
                    row = self.rows[at]
                    line = {"row": at, "image": row.image, "question": row.prompt, "answer": text, "of": origins[at]}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                stream.flush()
        return [known[at] for at in range(len(self.rows))]

    def _read(self, origins: Sequence[str]) -> dict[int, str]:
        known: dict[int, str] = {}
        for line in whole_lines(self.file):
            if line["row"] < len(origins) and line.get("of") == origins[line["row"]]:
                known[line["row"]] = line["answer"]
        return known


def stored_answers(file: Path) -> dict[tuple[str, str], str]:
    """Answers of a column that has been completed, by image and question."""
    return {(line["image"], line["question"]): line["answer"] for line in whole_lines(file)}


def fingerprint(volume: TokenSequence | None) -> str:
    """Hash of what the model is shown."""
    digest = hashlib.sha256()
    for part in volume or ():
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def closeness(candidate: str, pool: Sequence[str]) -> float:
    return float(np.mean([text_scores.token_f1(candidate, text) for text in pool]))


def question_scores(
    rows: Sequence[TextRow], answers: dict[str, list[str]], more_shuffled: Sequence[list[str]] = ()
) -> dict[str, Any] | None:
    """Accuracy (exact match of words) over all questions and by kind, for every column, with gaps.

    `more_shuffled`: answers to the questions alone with further pairings, which count as much as the first.
    """
    asked = [at for at, row in enumerate(rows) if row.kind != "report"]
    if not asked:
        return None
    said = {column: [[answers[column][at] for at in asked]] for column in (*COLUMNS, "reference")}
    said["shuffled"] += more_shuffled
    (truth,) = said["reference"]

    def judged(column: str, judge: Callable[[str, str], float]) -> np.ndarray:
        return np.mean([[*map(judge, texts, truth)] for texts in said[column]], axis=0)

    hits = {column: judged(column, text_scores.exact_match) for column in COLUMNS}
    patients = np.array([rows[at].patient for at in asked])
    kinds = np.array([rows[at].kind for at in asked])
    by_kind = {
        kind: {"rows": int((kinds == kind).sum()), **{c: float(hits[c][kinds == kind].mean()) for c in COLUMNS}}
        for kind in sorted(set(kinds.tolist()))
    }
    gaps = {
        control: {"accuracy": controls.mean_gap(hits["real"], hits[control], patients.tolist())} for control in CONTROLS
    }
    f1 = {column: float(judged(column, text_scores.token_f1).mean()) for column in COLUMNS}
    overall = {c: float(hits[c].mean()) for c in COLUMNS}
    chosen = {"all": kinds == kinds, **{kind: kinds == kind for kind in by_kind}}
    spans = {
        kind: {c: controls.interval_over_patients(partial(mean, hits[c][of]), patients[of].tolist()) for c in COLUMNS}
        for kind, of in chosen.items()
    }
    gaps["shuffled"] |= {
        kind: controls.mean_gap(hits["real"][of], hits["shuffled"][of], patients[of].tolist())
        for kind, of in chosen.items()
        if kind != "all"
    }
    scores = {"accuracy": overall, "intervals": spans, "token_f1": f1, "by_kind": by_kind, "gaps": gaps}
    return {"rows": len(asked), **scores, **text_scores.diversity([answers["real"][at] for at in asked])}


def report_scores(rows: Sequence[TextRow], answers: dict[str, list[str]]) -> dict[str, Any] | None:
    """Text and finding scores of reports for every column, with gaps; label floors beside the findings."""
    asked = [at for at, row in enumerate(rows) if row.kind == "report"]
    if not asked:
        return None
    patients = [rows[at].patient for at in asked]
    texts = {c: [answers[c][at] for at in asked] for c in [*COLUMNS, "reference"]}
    scores = {c: text_scores.text_scores(texts[c], texts["reference"]) for c in COLUMNS}
    table = {c: {name: float(v.mean()) for name, v in scores[c].items()} for c in COLUMNS}
    for c in COLUMNS:
        table[c] |= text_scores.corpus_bleu(texts[c], texts["reference"])
    gaps = {
        control: {
            name: controls.mean_gap(scores["real"][name], scores[control][name], patients) for name in REPORT_GAPS
        }
        for control in CONTROLS
    }
    tokens = text_scores.CHARACTERS if text_scores.are_chinese(texts["reference"]) else "words"
    result = {"rows": len(asked), "tokens": tokens, "meteor": text_scores.METEOR_NOTE, "scores": table, "gaps": gaps}
    readable = findings.reads(texts["reference"])
    of_findings = report_findings([rows[at] for at in asked], texts, patients) if readable else None
    return {**result, **text_scores.diversity(texts["real"]), "findings": of_findings}


def report_findings(rows: Sequence[TextRow], texts: dict[str, list[str]], patients: Sequence[str]) -> dict[str, Any]:
    """Findings against label columns where the data has them, else against the matcher's reading of the reference.

    Beside the controls stand as many labels a report drawn at random, which needs no model at all.
    """
    labels = sorted({name for row in rows for name in row.labels})
    known = [name for name in labels if name in findings.KEYWORDS]
    has_labels = bool(known) and all(set(known) <= set(row.labels) for row in rows)
    names = known if has_labels else list(findings.KEYWORDS)
    if has_labels:
        truth = np.array([[row.labels[name] for name in names] for row in rows])
    else:
        truth = findings.finding_matrix(texts["reference"], names)
    said = {c: findings.finding_matrix(texts[c], names) for c in COLUMNS}
    said |= {RANDOM: findings.random_labels(said["real"])}
    said |= {"all_negative": np.zeros_like(truth), "all_positive": np.ones_like(truth)}
    scores = {c: findings.finding_scores(matrix, truth) for c, matrix in said.items()}
    both = np.concatenate([truth, truth])
    gaps, tested = {}, [name for name, score in findings.FINDING_SCORES.items() if score.is_tested]
    for control in (*CONTROLS, RANDOM):
        stacked = np.concatenate([said["real"], said[control]])
        gaps[control] = controls.paired_gaps(partial(findings.finding_scores, stacked, both), patients, tested)
    spans = {
        c: controls.interval_over_patients(partial(_f1_micro, said[c], truth), patients) for c in (*COLUMNS, RANDOM)
    }
    source = "label columns" if has_labels else "the matcher's reading of the reference reports"
    error = findings.matcher_error(texts["reference"], truth, names) if has_labels else None
    result = {"labels": names, "truth": source, "matcher_error": error, "scores": scores}
    return {**result, "intervals": spans, "gaps": gaps}


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.average(values, weights=weights))


def _f1_micro(said: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    return findings.finding_scores(said, truth, weights)["f1_micro"]


def mirror_scores(rows: Sequence[TextRow], real: Sequence[str], mirrored: Sequence[str]) -> dict[str, Any]:
    """Of the sided answers that were right, how many turn over when the scan is mirrored."""
    was_right = [at for at, row in enumerate(rows) if text_scores.exact_match(real[at], row.answer)]
    flipped = [text_scores.exact_match(mirrored[at], controls.swap_sides(rows[at].answer)) for at in was_right]
    return {"asked": len(rows), "right": len(was_right), "flipped": float(np.mean(flipped)) if flipped else None}


def add_verdicts(*scores: dict[str, Any] | None) -> None:
    """Puts a verdict to every gap in place, all that are compared with one control being one family of tests."""
    homes = [part["gaps"] for part in scores if part is not None]
    for control in (*CONTROLS, RANDOM):
        family = {(at, name): gap for at, home in enumerate(homes) for name, gap in home.get(control, {}).items()}
        for (at, name), verdict in controls.verdicts(family, control=control).items():
            homes[at][control][name] = {**family[at, name]._asdict(), "verdict": verdict}
