"""Text scores against values worked out by hand or by the definition."""

import math

import numpy as np
import pytest

from app.measures.text_scores import cider, corpus_bleu, diversity, meteor, text_scores, token_f1

REPORTS = ["The left lung has two nodules.", "No pleural effusion.", "A stone of 6 mm in the right kidney."]


def test_perfect_text_scores_one_everywhere():
    scores = text_scores(REPORTS, REPORTS)
    for name in ("bleu1", "bleu4", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1"):
        np.testing.assert_allclose(scores[name], 1, err_msg=name)
    assert corpus_bleu(REPORTS, REPORTS)["corpus_bleu4"] == pytest.approx(1)
    assert "version:" in corpus_bleu(REPORTS, REPORTS)["bleu_signature"]


def test_unrelated_and_empty_text_scores_zero():
    for output in ("xyz", ""):
        scores = text_scores([output] * 3, REPORTS)
        for name in ("rouge1", "meteor", "cider", "exact_match", "token_f1"):
            np.testing.assert_allclose(scores[name], 0, err_msg=name)


def test_meteor_uses_exact_and_stem_but_no_synonyms():
    # 3 of 3 words match in one chunk: 1 * (1 - 0.5 * (1/3)^3)
    assert meteor("two nodules seen", "two nodules seen") == pytest.approx(1 - 0.5 / 27)
    assert meteor("two nodule seen", "two nodules seen") == pytest.approx(1 - 0.5 / 27)
    assert meteor("tumour", "neoplasm") == 0
    # P = 1/2, R = 1: F = 1/2 / (0.9 * 1/2 + 0.1 * 1), penalty 0.5 * 1^3
    assert meteor("nodule here", "nodule") == pytest.approx(0.5 / 0.55 * 0.5)


def test_token_f1_counts_words():
    assert token_f1("the left lung", "left lung nodule") == pytest.approx(2 / 3)


def test_cider_of_two_cases_by_hand():
    """Words that stand in every reference weigh nothing; a perfect answer of one rare word scores 1 of the 4 orders."""
    perfect = cider(["lung left", "lung right"], ["lung left", "lung right"])
    # unigrams: only left/right weigh; bigrams: the whole pair weighs; orders 3 and 4 do not exist
    np.testing.assert_allclose(perfect, 10 * 2 / 4)
    swapped = cider(["lung right", "lung left"], ["lung left", "lung right"])
    np.testing.assert_allclose(swapped, 0)
    longer = cider(["left left left", "x"], ["left", "right"])
    # clipped to the wanted count: min(3, 1) * 1 / (3 * 1), and two words too many
    np.testing.assert_allclose(longer[0], 10 / 4 / 3 * math.exp(-4 / 72))


def test_diversity_sees_one_answer_for_all():
    assert diversity(["Normal.", "normal", "Normal", "A stone."]) == {"unique_share": 0.5, "most_frequent_share": 0.75}


def test_unpaired_lists_are_named():
    with pytest.raises(ValueError, match="got 1 and 2"):
        text_scores(["a"], ["a", "b"])
