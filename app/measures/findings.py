"""Findings named in a report, by keyword and negation, and how well two reports agree on them.

One table, open to correction: CT-RATE's 18 labels and what the built-in phantoms show. It reads mentions, not meaning;
its own error against given label columns is printed wherever its scores are (`matcher_error`). It reads English only.
CRG follows arXiv:2505.17167; its floor is 1/3, which all-negative and all-positive answers both reach.
"""

import re
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

LAST_LATIN = 0x24F
MAX_FOREIGN = 0.2  # of letters
KEYWORDS: dict[str, str] = {
    "Medical material": r"medical material|catheter|pacemaker|stent|prosthe\w+|sternotomy|surgical (?:clip|suture)\w*|"
    r"port chamber|\btube\b",
    "Arterial wall calcification": r"(?:arter\w+|aort\w+|vascular|atherosclero\w+)(?: \w+){0,3} calcifi\w+|"
    r"calcifi\w+(?: \w+){0,5} (?:aort\w+|arter\w+)|calcified atheroma\w*|atheroma\w* plaque\w*",
    "Cardiomegaly": r"cardiomegaly|enlarged heart|heart(?: size)? (?:is |appears )?(?:mildly |slightly )?enlarged|"
    r"increased heart size",
    "Pericardial effusion": r"pericardial (?:effusion|fluid)",
    "Coronary artery wall calcification": r"coronary(?: \w+){0,4} (?:calcifi\w+|plaque\w*)|"
    r"calcifi\w+(?: \w+){0,5} coronary",
    "Hiatal hernia": r"hiatal hernia|hiatus hernia",
    "Lymphadenopathy": r"lymphadenopath\w+|(?:enlarged|pathologic\w*) lymph nodes?|"
    r"lymph nodes? (?:\w+ ){0,3}(?:enlarged|pathologic\w*)",
    "Emphysema": r"emphysem\w+",
    "Atelectasis": r"atelecta\w+",
    "Lung nodule": r"nodul\w+",
    "Lung opacity": r"opacit\w+|ground[- ]glass",
    "Pulmonary fibrotic sequela": r"fibrotic|fibrosis|sequela\w*",
    "Pleural effusion": r"pleural (?:effusion|fluid)|(?<!pericardial )\beffusions?\b",
    "Mosaic attenuation pattern": r"mosaic (?:attenuation|pattern|perfusion)",
    "Peribronchial thickening": r"(?:peribronchial|bronchial wall) thicken\w+",
    "Consolidation": r"consolidat\w+",
    "Bronchiectasis": r"bronchiecta\w+",
    "Interlobular septal thickening": r"(?:interlobular )?septal thicken\w+",
    "Kidney stone": r"(?:kidney|renal)(?: \w+){0,2} (?:stones?|calcul\w+)|nephrolith\w+|"
    r"(?:stones?|calcul\w+)(?: [\w.]+){0,7} kidneys?",
}
# these deny a change, not the finding; what is resolved in part is still there
NO_DENIAL = re.compile(
    r"\b(?:no|without|not)(?: (?:any|interval|significant|definite|appreciable|obvious|substantial|relevant|further|"
    r"notable|marked|clear|evident|measurable|gross|major|overall|longer))*"
    r" (?:changes?|increase|decrease|growth|progression|enlargement|worsening|improvement|resolution|regression)\b|"
    r"\b(?:partial(?:ly)?|partly|incomplete(?:ly)?|near(?:ly)?[- ]complete(?:ly)?|almost(?: complete(?:ly)?)?|mostly|"
    r"not(?: yet)?(?: \w+ly)?) resol\w+"
)
# "no" reaches over a list, "not" only to the next comma, "resolved" over the few words of what it stands before
BEFORE = re.compile(
    r"\b(?:no|without|free of|negative for|absence of|neither|nor|denies|(?<!not )rule[sd]? out|lack of)\b"
    r"(?:(?!\band an?\b)[^:])*$|\bnot\b(?! (?:be )?rule)[^:,]*$|"
    r"\b(?:resolved|(?:resolution|disappearance|clearance|clearing) of)(?: (?!(?:and|with|but|new|now)\b)[\w-]+){1,6}$"
)
AFTER = re.compile(
    r"^[^,]*?\b(?:(?:not|no longer) (?:\w+ly )?(?:seen|observed|detected|present|identified|found|noted|visible|"
    r"visuali[sz]ed|demonstrated|evident|shown)|absent|(?<!not be )ruled out|"
    r"(?:has|have|had|is|are|was|were)(?: \w+ly| since| now| been)* resolved)\b|"
    r"^,?(?: \w+ly)? ?\(?resolved\b|^ ?: *(?:no|none|negative)\b"
)
CLAUSE = re.compile(r"[;\n]|\.(?!\d)|\bbut\b|\bhowever\b|\balthough\b|\bexcept(?: for)?\b|\bwith the exception of\b")


def find_findings(text: str, labels: Sequence[str] | None = None) -> dict[str, bool]:
    """For each label whether the text states it: at least one mention that is not negated."""
    clauses = [NO_DENIAL.sub(" ", clause) for clause in CLAUSE.split(text.lower())]
    return {
        label: any(states(clause, re.compile(KEYWORDS[label])) for clause in clauses)
        for label in (KEYWORDS if labels is None else labels)
    }


def states(clause: str, keyword: re.Pattern) -> bool:
    return any(
        not BEFORE.search(clause[: hit.end()]) and not AFTER.search(clause[hit.end() :])
        for hit in keyword.finditer(clause)
    )


def reads(texts: Sequence[str]) -> bool:
    """Whether the matcher can read these: most of their letters are Latin ones."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum(ord(letter) > LAST_LATIN for letter in letters) <= len(letters) * MAX_FOREIGN


def random_labels(said: Bool[np.ndarray, "N L"]) -> Float[np.ndarray, "N L"]:
    """As many findings a case as were said, each label as likely: what is expected of naming them at random."""
    return np.broadcast_to(said.mean(1, keepdims=True), said.shape)


def finding_matrix(texts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(cases, labels) of booleans."""
    return np.array([list(find_findings(text, labels).values()) for text in texts], dtype=bool).reshape(-1, len(labels))


class Counts(NamedTuple):
    """Of each label: cases where it was rightly said, said in vain, and missed; and the number of cases."""

    hits: Float[np.ndarray, " L"]
    false_alarms: Float[np.ndarray, " L"]
    misses: Float[np.ndarray, " L"]
    cases: float


class FindingScore(NamedTuple):
    of: Callable[[Counts], float]
    is_tested: bool  # whether its gap to each control is put to the test, and so counts in the correction for many


def finding_scores(
    said: Shaped[np.ndarray, "N L"], truth: Bool[np.ndarray, "N L"], weights: np.ndarray | None = None
) -> dict[str, float]:
    """All of FINDING_SCORES; what was said may be shares of a label. `weights` repeats cases."""
    weights = np.ones(len(truth)) if weights is None else weights
    hits = weights @ (said * truth)
    counts = Counts(hits, weights @ said - hits, weights @ truth - hits, float(weights.sum()))
    return {name: score.of(counts) for name, score in FINDING_SCORES.items()}


def precision(of: Counts) -> float:
    return ratio(of.hits.sum(), of.hits.sum() + of.false_alarms.sum())


def recall(of: Counts) -> float:
    return ratio(of.hits.sum(), of.hits.sum() + of.misses.sum())


def f1_micro(of: Counts) -> float:
    return ratio(2 * of.hits.sum(), 2 * of.hits.sum() + of.false_alarms.sum() + of.misses.sum())


def f1_macro(of: Counts) -> float:
    """Over labels that occur in the truth."""
    occurs = of.hits + of.misses > 0
    with np.errstate(invalid="ignore"):
        f1 = 2 * of.hits / (2 * of.hits + of.false_alarms + of.misses)
    return float(f1[occurs].mean()) if occurs.any() else 0.0


def crg(of: Counts) -> float:
    """Clinically relevant gain: 1 when all is right, 1/3 for all-negative and for all-positive answers."""
    hits, false_alarms, misses = of.hits.sum(), of.false_alarms.sum(), of.misses.sum()
    positives, total = hits + misses, of.cases * len(of.hits)
    if positives == 0 or positives == total:
        return float("nan")
    weight = (total - positives) / (2 * positives)
    best = positives * weight
    return float(best / (2 * best - (hits * weight - misses * weight - false_alarms)))


FINDING_SCORES = MappingProxyType(  # a row of each stands in every table of answers, in this order
    {
        "precision": FindingScore(precision, is_tested=False),
        "recall": FindingScore(recall, is_tested=False),
        "f1_micro": FindingScore(f1_micro, is_tested=True),
        "f1_macro": FindingScore(f1_macro, is_tested=True),
        "crg": FindingScore(crg, is_tested=True),
    }
)


def ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def matcher_error(texts: Sequence[str], truth: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """The matcher's own error on reference reports with known labels: the ceiling of what its scores can mean."""
    read = finding_matrix(texts, labels)
    return {**finding_scores(read, truth), "wrong_share": float((read != truth).mean())}
