"""Scores of generated text against references, all offline: BLEU, ROUGE, METEOR, CIDEr, exact match, token F1.

BLEU is sacrebleu's, ROUGE is rouge-score's; METEOR is nltk's with the modules exact and stem (synonyms would need a
download); CIDEr is the D variant of arXiv:1411.5726. Each comes per case, so that intervals can resample patients. None
of them shows by itself that the image was used: see `controls`. Chinese has no blanks between words: there a token is
a character, and BLEU takes sacrebleu's tokenizer `zh`.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from nltk.util import ngrams
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
HAN_LETTER = re.compile(f"[{HAN}]")
MIN_HAN = 0.2  # of letters, above which texts are taken for Chinese
WORD = re.compile(rf"[{HAN}]|\d+(?:\.\d+)?|[^\W\d_{HAN}]+")
METEOR_NOTE = "exact and stem modules (nltk, alpha 0.9, beta 3, gamma 0.5)"
CHARACTERS = "characters (Chinese; BLEU by sacrebleu's tokenizer zh)"
CIDER_SIGMA = 6.0
stemmer = cache(PorterStemmer)


def words(text: str) -> list[str]:
    """Lower-case words, numbers and Chinese characters; signs do not count."""
    return WORD.findall(text.lower())


def are_chinese(texts: Sequence[str]) -> bool:
    letters = sum(letter.isalpha() for text in texts for letter in text)
    return sum(len(HAN_LETTER.findall(text)) for text in texts) > MIN_HAN * letters


def text_scores(outputs: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Every text metric for every case, 0..1 (CIDEr 0..10)."""
    if len(outputs) != len(references) or not outputs:
        raise ValueError(f"outputs and references must pair up, got {len(outputs)} and {len(references)}")
    pairs = list(zip(outputs, references, strict=True))
    chinese = are_chinese(references)
    tokenizer = SimpleNamespace(tokenize=words) if chinese else None  # rouge-score's own drops all but English
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False, tokenizer=tokenizer)
    smooth = {"effective_order": True, "smooth_method": "exp", "tokenize": "zh" if chinese else "13a"}
    bleu = {}
    for order in (1, 4):
        metric = BLEU(max_ngram_order=order, lowercase=True, **smooth)
        scores = [metric.sentence_score(output, [reference]).score / 100 for output, reference in pairs]
        bleu[f"bleu{order}"] = np.array(scores)
    rouge = [scorer.score(reference, output) for output, reference in pairs]
    return {
        **bleu,
        **{name: np.array([row[name].fmeasure for row in rouge]) for name in ("rouge1", "rouge2", "rougeL")},
        "meteor": np.array([meteor(output, reference) for output, reference in pairs]),
        "cider": cider(outputs, references),
        "exact_match": np.array([exact_match(output, reference) for output, reference in pairs]),
        "token_f1": np.array([token_f1(output, reference) for output, reference in pairs]),
    }


def corpus_bleu(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """Corpus BLEU-1..4 (0..1) with sacrebleu's signature: the figures to quote."""
    scores: dict[str, float | str] = {}
    tokenize = "zh" if are_chinese(references) else "13a"
    for order in range(1, 5):
        metric = BLEU(max_ngram_order=order, lowercase=True, tokenize=tokenize)
        scores[f"corpus_bleu{order}"] = metric.corpus_score(list(outputs), [list(references)]).score / 100
    scores["bleu_signature"] = str(metric.get_signature())
    return scores


def meteor(output: str, reference: str) -> float:
    said, wanted = words(output), words(reference)
    if not said or not wanted:
        return float(said == wanted)
    no_synonyms = SimpleNamespace(synsets=lambda _word: [])  # where nltk would ask WordNet, which is a download
    return float(single_meteor_score(wanted, said, stemmer=stemmer(), wordnet=no_synonyms))


def exact_match(output: str, reference: str) -> float:
    return float(words(output) == words(reference))


def token_f1(output: str, reference: str) -> float:
    """F1 of the bags of words."""
    said, wanted = Counter(words(output)), Counter(words(reference))
    if not said or not wanted:
        return float(said == wanted)
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total())


def cider(outputs: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """CIDEr-D with one reference a case; document frequencies are those of the references."""
    said, wanted = [words(text) for text in outputs], [words(text) for text in references]
    total = np.zeros(len(said))
    for order in range(1, 5):
        grams = [(Counter(ngrams(a, order)), Counter(ngrams(b, order))) for a, b in zip(said, wanted, strict=True)]
        frequency = Counter(gram for _, reference in grams for gram in reference)
        total += [cider_similarity(a, b, frequency, len(said)) for a, b in grams]
    gap = np.array([len(a) - len(b) for a, b in zip(said, wanted, strict=True)])
    return 10 * total / 4 * np.exp(-(gap**2) / (2 * CIDER_SIGMA**2))


def cider_similarity(said: Counter, wanted: Counter, frequency: Counter, num_cases: int) -> float:
    """Cosine of tf-idf vectors; what is said more often than wanted counts as often as wanted."""

    def weigh(grams: Counter) -> dict:
        return {gram: count * math.log(num_cases / max(1, frequency[gram])) for gram, count in grams.items()}

    a, b = weigh(said), weigh(wanted)
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b) / norm if norm else 0.0


def diversity(outputs: Sequence[str]) -> dict[str, float]:
    """How often the model says the same: share of different outputs, and share of the most frequent one."""
    counts = Counter(" ".join(words(output)) for output in outputs)
    return {"unique_share": len(counts) / len(outputs), "most_frequent_share": max(counts.values()) / len(outputs)}
