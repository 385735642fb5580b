"""Language, measured: answers with the true volume and with every control, scores, gaps, one table.

Generates each column once, line by line on disk, so that a stopped run goes on where it was. Scores come from
`text_metrics` and `findings`, what to compare them with from `controls`; pictures and words for people are at the end.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.language.assistant import NOTICE, CTAssistant
from app.language.volume_tokens import VolumeTokens
from app.measures.controls import (
    BETTER,
    CONTROLS,
    USED,
    Gap,
    constant_answers,
    derange,
    mean_gap,
    paired_gap,
    swap_sides,
)
from app.measures.findings import KEYWORDS, finding_matrix, finding_scores, matcher_error
from app.measures.text_scores import METEOR_NOTE, corpus_bleu, diversity, exact_match, text_scores, token_f1
from app.shared.atomic_files import write_text
from app.shared.refusals import Refused
from app.shared.terminal import progress
from app.text.rows import TextRow
from networks.tokens import TokenSequence

log = logging.getLogger(__name__)

COLUMNS = ("real", *CONTROLS)
GENERATED = COLUMNS[:-1]  # the constant answers need no model
REPORT_GAPS = ("bleu4", "rougeL", "meteor", "cider")
FINDING_GAPS = ("f1_micro", "f1_macro", "crg")


def evaluate_language(
    assistant: CTAssistant,
    rows: Sequence[TextRow],
    volumes: dict[str, VolumeTokens],
    *,
    out: str | Path,
    mirrored: dict[str, VolumeTokens] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of every column with their gaps; also written to `out` as JSON, Markdown and PNG."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reduced = {image: assistant.reduce(tokens) for image, tokens in volumes.items()}
    rows, left_out = usable(rows, reduced, assistant)
    if not rows:
        raise Refused("BAD_EVALUATION", f"nothing to evaluate: {dict(left_out)} of {left_out.total()} rows")
    given = volume_columns(rows, reduced, seed=seed)
    answers: dict[str, list[str]] = {"reference": [row.answer for row in rows]}
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    for column in GENERATED:
        stored = Answers(out / f"answers_{column}.jsonl", rows, given[column], assistant)
        answers[column] = stored.complete(column, **options)
    answers["constant"] = constant_answers(
        answers["reference"], [row.question for row in rows], [row.patient for row in rows], closeness
    )
    result = {"rows": len(rows), "patients": len({row.patient for row in rows}), "notice": NOTICE}
    result["left_out"] = dict(left_out)
    result |= {"questions": question_scores(rows, answers), "reports": report_scores(rows, answers)}
    if mirrored:
        asked = [row for row in rows if row.image in mirrored and swap_sides(row.answer) != row.answer]
        asked = [row for row in asked if row.kind != "report"]
        if asked:
            seen = [assistant.reduce(mirrored[row.image]) for row in asked]
            said = Answers(out / "answers_mirrored.jsonl", asked, seen, assistant).complete("mirrored", **options)
            at = {id(row): number for number, row in enumerate(rows)}
            result["mirror"] = mirror_scores(asked, [answers["real"][at[id(row)]] for row in asked], said)
    result = without_nan(result)
    write_text(out / "language.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    (out / "language.md").write_text("\n".join(table_lines(result)) + "\n")
    draw_bars(result, out / "language.png")
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
    owner = {row.image: row.patient for row in rows}
    other = derange([owner[image] for image in images], seed=seed)
    swapped = {image: images[at] for image, at in zip(images, other, strict=True)}
    mean = sum(reduced[image].feats.mean(0) for image in images) / len(images)
    first = reduced[images[0]]
    blank = first._replace(feats=mean.expand_as(first.feats).clone())  # one featureless volume for every row
    return {
        "real": [reduced[row.image] for row in rows],
        "shuffled": [reduced[swapped[row.image]] for row in rows],
        "blank": [blank] * len(rows),
        "question_only": [None] * len(rows),
    }


class Answers:
    """The answers of one column on disk, a line each.

    What is there is kept if it came of the same: question, tokens shown, model, and length allowed.
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
        if not self.file.is_file():
            return known
        for text in self.file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # the line at which a run was stopped
                continue
            if line["row"] < len(origins) and line.get("of") == origins[line["row"]]:
                known[line["row"]] = line["answer"]
        return known


def fingerprint(volume: TokenSequence | None) -> str:
    """Hash of what the model is shown."""
    digest = hashlib.sha256()
    for part in volume or ():
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def closeness(candidate: str, pool: Sequence[str]) -> float:
    return float(np.mean([token_f1(candidate, text) for text in pool]))


def question_scores(rows: Sequence[TextRow], answers: dict[str, list[str]]) -> dict[str, Any] | None:
    """Accuracy (exact match of words) over all questions and by kind, for every column, with gaps."""
    asked = [at for at, row in enumerate(rows) if row.kind != "report"]
    if not asked:
        return None
    hits = {c: np.array([exact_match(answers[c][at], answers["reference"][at]) for at in asked]) for c in COLUMNS}
    patients = [rows[at].patient for at in asked]
    kinds = np.array([rows[at].kind for at in asked])
    by_kind = {
        kind: {"rows": int((kinds == kind).sum()), **{c: float(hits[c][kinds == kind].mean()) for c in COLUMNS}}
        for kind in sorted(set(kinds.tolist()))
    }
    gaps = {control: tell(mean_gap(hits["real"], hits[control], patients), control) for control in CONTROLS}
    f1 = {c: float(np.mean([token_f1(answers[c][at], answers["reference"][at]) for at in asked])) for c in COLUMNS}
    overall = {c: float(hits[c].mean()) for c in COLUMNS}
    said = diversity([answers["real"][at] for at in asked])
    return {"rows": len(asked), "accuracy": overall, "token_f1": f1, "by_kind": by_kind, "gaps": gaps, **said}


def report_scores(rows: Sequence[TextRow], answers: dict[str, list[str]]) -> dict[str, Any] | None:
    """Text and finding scores of reports for every column, with gaps; label floors beside the findings."""
    asked = [at for at, row in enumerate(rows) if row.kind == "report"]
    if not asked:
        return None
    patients = [rows[at].patient for at in asked]
    texts = {c: [answers[c][at] for at in asked] for c in [*COLUMNS, "reference"]}
    scores = {c: text_scores(texts[c], texts["reference"]) for c in COLUMNS}
    table = {c: {name: float(v.mean()) for name, v in scores[c].items()} for c in COLUMNS}
    for c in COLUMNS:
        table[c] |= corpus_bleu(texts[c], texts["reference"])
    gaps = {
        control: {
            name: tell(mean_gap(scores["real"][name], scores[control][name], patients), control) for name in REPORT_GAPS
        }
        for control in CONTROLS
    }
    result = {"rows": len(asked), "meteor": METEOR_NOTE, "scores": table, "gaps": gaps, **diversity(texts["real"])}
    return result | {"findings": report_findings([rows[at] for at in asked], texts, patients)}


def report_findings(rows: Sequence[TextRow], texts: dict[str, list[str]], patients: Sequence[str]) -> dict[str, Any]:
    """Findings against label columns where the data has them, else against the matcher's reading of the reference."""
    labels = sorted({name for row in rows for name in row.labels})
    known = [name for name in labels if name in KEYWORDS]
    has_labels = bool(known) and all(set(known) <= set(row.labels) for row in rows)
    names = known if has_labels else list(KEYWORDS)
    if has_labels:
        truth = np.array([[row.labels[name] for name in names] for row in rows])
    else:
        truth = finding_matrix(texts["reference"], names)
    said = {c: finding_matrix(texts[c], names) for c in COLUMNS}
    said |= {"all_negative": np.zeros_like(truth), "all_positive": np.ones_like(truth)}
    scores = {c: finding_scores(matrix, truth) for c, matrix in said.items()}
    gaps = {}
    for control in CONTROLS:
        gaps[control] = {}
        for name in FINDING_GAPS:

            def both(weights: np.ndarray, name: str = name, control: str = control) -> tuple[float, float]:
                return tuple(finding_scores(said[c], truth, weights)[name] for c in ("real", control))

            gaps[control][name] = tell(paired_gap(both, patients), control)
    source = "label columns" if has_labels else "the matcher's reading of the reference reports"
    error = matcher_error(texts["reference"], truth, names) if has_labels else None
    return {"labels": names, "truth": source, "matcher_error": error, "scores": scores, "gaps": gaps}


def mirror_scores(rows: Sequence[TextRow], real: Sequence[str], mirrored: Sequence[str]) -> dict[str, Any]:
    """Of the sided answers that were right, how many turn over when the scan is mirrored."""
    was_right = [at for at, row in enumerate(rows) if exact_match(real[at], row.answer)]
    flipped = [exact_match(mirrored[at], swap_sides(rows[at].answer)) for at in was_right]
    return {"asked": len(rows), "right": len(was_right), "flipped": float(np.mean(flipped)) if flipped else None}


def tell(gap: Gap, control: str) -> dict[str, Any]:
    verdict = USED if control == "shuffled" and gap.verdict == BETTER else gap.verdict
    return {"difference": gap.difference, "low": gap.low, "high": gap.high, "verdict": verdict}


def without_nan(value: Any) -> Any:
    """Scores that do not exist (CRG where every label is positive) as null: JSON knows no NaN."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---- for people


def table_lines(result: dict[str, Any]) -> list[str]:
    """Markdown: every score beside its controls, then the gaps in words."""
    left_out = "".join(f", {count} left out ({reason})" for reason, count in result["left_out"].items())
    lines = [f"{result['rows']} rows of {result['patients']} patients{left_out}. {NOTICE}", ""]
    head = "| | " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |"
    rule = "|---|" + "---|" * len(COLUMNS)

    def row(name: str, values: dict[str, float]) -> str:
        return f"| {name} | " + " | ".join(shown(values[c]) for c in COLUMNS) + " |"

    questions, reports = result["questions"], result["reports"]
    if questions:
        lines += [head, rule, row(f"accuracy, {questions['rows']} questions", questions["accuracy"])]
        lines += [row(f"{kind} ({part['rows']})", part) for kind, part in questions["by_kind"].items()]
        lines += [row("token F1", questions["token_f1"]), ""]
        lines += [gap_line("accuracy", control, gap) for control, gap in questions["gaps"].items()]
        lines.append("")
    if reports:
        lines += [head, rule]
        for name in ("corpus_bleu1", "corpus_bleu4", "rougeL", "meteor", "cider", "exact_match"):
            lines.append(row(f"reports: {name}", {c: reports["scores"][c][name] for c in COLUMNS}))
        found = reports["findings"]["scores"]
        for name in ("precision", "recall", "f1_micro", "f1_macro", "crg"):
            lines.append(row(f"findings: {name}", {c: found[c][name] for c in COLUMNS}))
        floors = ", ".join(f"{c.replace('_', '-')} {shown(found[c]['crg'])}" for c in ("all_negative", "all_positive"))
        lines += ["", f"CRG floors: {floors}. Findings are judged against {reports['findings']['truth']}."]
        if reports["findings"]["matcher_error"]:
            wrong = reports["findings"]["matcher_error"]
            lines.append(f"The matcher itself is wrong on {wrong['wrong_share']:.1%} of labels of the references.")
        for control, gaps in reports["gaps"].items():
            lines.append(gap_line("rougeL", control, gaps["rougeL"]))
            lines.append(gap_line("findings F1 (micro)", control, reports["findings"]["gaps"][control]["f1_micro"]))
        lines += [f"Different reports: {reports['unique_share']:.1%} of all.", f"METEOR: {reports['meteor']}.", ""]
    if result.get("mirror"):
        mirror = result["mirror"]
        share = "none was right" if mirror["flipped"] is None else f"{mirror['flipped']:.1%} turned over"
        lines.append(f"Mirror test: of {mirror['right']} right answers with a side, {share} with the mirrored scan.")
    return lines


def gap_line(name: str, control: str, gap: dict[str, Any]) -> str:
    if gap["difference"] is None:
        return f"- {name}, real minus {control.replace('_', ' ')}: not defined here"
    interval = f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
    return f"- {name}, real minus {control.replace('_', ' ')}: {interval}: {gap['verdict']}"


def draw_bars(result: dict[str, Any], file: Path) -> None:
    """Accuracy by kind and findings F1, real beside the controls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, float]] = {}
    if result["questions"]:
        groups["all questions"] = result["questions"]["accuracy"]
        groups |= result["questions"]["by_kind"]
    if result["reports"]:
        groups["findings F1"] = {c: result["reports"]["findings"]["scores"][c]["f1_micro"] for c in COLUMNS}
    figure = Figure(figsize=(max(5.0, 1.5 + 1.4 * len(groups)), 3.2), layout="constrained")  # as wide as the legend
    axes = figure.add_subplot()
    for at, column in enumerate(COLUMNS):
        heights = [values[column] for values in groups.values()]
        axes.bar(np.arange(len(groups)) + 0.16 * (at - 2), heights, 0.16, label=column.replace("_", " "))
    axes.set_xticks(np.arange(len(groups)), list(groups))
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy / F1")
    axes.legend(fontsize=7, ncols=5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    FigureCanvasAgg(figure).print_png(str(file))
