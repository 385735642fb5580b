"""Scores of answers for people: tables with every control and verdict, and one picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from app.measures.controls import CONTROLS
from app.measures.findings import FINDING_SCORES
from app.measures.report import gap, number, table
from app.shared.atomic_files import written_whole
from app.shared.notice import NOTICE

COLUMNS = ("real", *CONTROLS)
WITH_RANDOM = (*COLUMNS, "random_labels")
TEXT_SCORES = ("corpus_bleu1", "corpus_bleu4", "rougeL", "meteor", "cider", "exact_match")
NOT_READ = "Findings are not claimed: the matcher reads English, and these references are not."


def table_lines(result: dict[str, Any]) -> list[str]:
    """Markdown: every score beside its controls, then the gaps in words."""
    left_out = "".join(f", {count} left out ({reason})" for reason, count in result["left_out"].items())
    lines = [f"{result['rows']} rows of {result['patients']} patients{left_out}. {NOTICE}", ""]
    if result["questions"]:
        lines += _questions(result["questions"])
        if (shuffles := result.get("shuffles", 1)) > 1:
            lines[-1:] = [f"- shuffled: the mean of {shuffles} pairings of questions with volumes", ""]
    if result["reports"]:
        lines += _reports(result["reports"])
    if result.get("mirror"):
        mirror = result["mirror"]
        share = "none was right" if mirror["flipped"] is None else f"{mirror['flipped']:.1%} turned over"
        lines.append(f"Mirror test: of {mirror['right']} right answers with a side, {share} with the mirrored scan.")
    return lines


def _questions(scores: dict[str, Any]) -> list[str]:
    rows = [_row(f"accuracy, {scores['rows']} questions", scores["accuracy"])]
    rows += [_row(f"{kind} ({part['rows']})", part) for kind, part in scores["by_kind"].items()]
    rows.append(_row("token F1", scores["token_f1"]))
    gaps = [
        gap_line(what, control, measured) for control, gaps in scores["gaps"].items() for what, measured in gaps.items()
    ]
    return [*table(_head(COLUMNS), rows), *gaps, ""]


def _reports(scores: dict[str, Any]) -> list[str]:
    rows = [_row(f"reports: {name}", {c: scores["scores"][c][name] for c in COLUMNS}) for name in TEXT_SCORES]
    findings = scores["findings"]
    if findings:
        scores_of_findings = findings["scores"]
        rows = [[*row, number(None)] for row in rows]
        rows += [
            _row(f"findings: {name}", {c: scores_of_findings[c][name] for c in WITH_RANDOM}) for name in FINDING_SCORES
        ]
    lines = table(_head(WITH_RANDOM if findings else COLUMNS), rows)
    lines += _about_findings(findings) if findings else [NOT_READ]
    for control, gaps in scores["gaps"].items():
        lines.append(gap_line("rougeL", control, gaps["rougeL"]))
    for control, gaps in findings["gaps"].items() if findings else ():
        lines.append(gap_line("findings F1 (micro)", control, gaps["f1_micro"]))
    lines.append(f"Different reports: {scores['unique_share']:.1%} of all.")
    return [*lines, f"Tokens of the text scores: {scores['tokens']}. METEOR: {scores['meteor']}.", ""]


def _about_findings(findings: dict[str, Any]) -> list[str]:
    scores = findings["scores"]
    floors = ", ".join(f"{c.replace('_', '-')} {number(scores[c]['crg'])}" for c in ("all_negative", "all_positive"))
    lines = [f"CRG floors: {floors}. Findings are judged against {findings['truth']}. Random labels: as many a report."]
    if findings["matcher_error"]:
        wrong = findings["matcher_error"]["wrong_share"]
        lines.append(f"The matcher itself is wrong on {wrong:.1%} of labels of the references.")
    return lines


def _head(columns: tuple[str, ...]) -> list[str]:
    return ["", *(column.replace("_", " ") for column in columns)]


def _row(name: str, values: dict[str, float | None]) -> list[str]:
    return [name, *(number(values[column]) for column in WITH_RANDOM if column in values)]


def gap_line(name: str, control: str, measured: dict[str, Any]) -> str:
    return f"- {name}, real minus {control.replace('_', ' ')}: {gap(measured)}"


def draw_bars(result: dict[str, Any], file: Path) -> None:
    """Accuracy by kind and findings F1, real beside the controls: with counts, and 95 % intervals over patients."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, tuple[dict[str, float], dict[str, list[float]]]] = {}
    questions, findings = result["questions"], (result["reports"] or {}).get("findings")
    if questions:
        groups[f"all questions\n{questions['rows']}"] = (questions["accuracy"], questions["intervals"]["all"])
        for kind, part in questions["by_kind"].items():
            lines = kind.split(": ")
            groups["\n".join([*lines, str(part["rows"])])] = (part, questions["intervals"][kind])
    if findings:
        values = {c: findings["scores"][c]["f1_micro"] for c in WITH_RANDOM}
        groups[f"findings F1\n{result['reports']['rows']}"] = (values, findings["intervals"])
    figure = Figure(figsize=(max(6.4, 1.6 + 1.2 * len(groups)), 3.6), layout="constrained")  # as wide as the legend
    axes = figure.add_subplot()
    for at, column in enumerate(WITH_RANDOM if findings else COLUMNS):
        _bars(axes, at, column, list(groups.values()))
    axes.set_xticks(np.arange(len(groups)), list(groups), fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy / F1")
    axes.set_xlabel(
        f"rows below each kind; {result['patients']} patients; whiskers: 95 % interval over patients", fontsize=8
    )
    axes.legend(fontsize=7, ncols=6, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    with written_whole(file) as beside:
        FigureCanvasAgg(figure).print_png(str(beside))


def _bars(axes: Axes, at: int, column: str, groups: list[tuple[dict, dict]]) -> None:
    """One column's bar in each group that has it."""
    places = [place for place, (values, _) in enumerate(groups) if values.get(column) is not None]
    heights = np.array([groups[place][0][column] for place in places], float)
    spans = np.array([groups[place][1][column] for place in places], float).reshape(-1, 2)
    whiskers = np.clip(np.stack([heights - spans[:, 0], spans[:, 1] - heights]), 0, None)
    at_x = np.array(places) + 0.14 * (at - 2.5)
    look = {"lw": 0.8, "capsize": 1.5, "ecolor": "#444444"}
    axes.bar(at_x, heights, 0.14, label=column.replace("_", " "), yerr=whiskers, error_kw=look)
