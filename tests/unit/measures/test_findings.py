"""The keyword matcher with negation, and the scores built on it."""

import numpy as np
import pytest

from app.measures.findings import (
    KEYWORDS,
    Counts,
    crg,
    find_findings,
    finding_matrix,
    finding_scores,
    matcher_error,
    random_labels,
    reads,
)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("Two nodules of 8 mm in the left lung.", {"Lung nodule"}),
        ("No nodule. Left pleural effusion.", {"Pleural effusion"}),
        ("No nodule, effusion or consolidation is seen.", set()),
        ("No nodule but a left pleural effusion.", {"Pleural effusion"}),
        ("Lungs are free of consolidation; atelectasis in the right base.", {"Atelectasis"}),
        ("Pleural effusion is not observed.", set()),
        ("Pericardial effusion of 5 mm.", {"Pericardial effusion"}),
        ("Pericardial effusion was not detected, pleural effusion is present.", {"Pleural effusion"}),
        ("Calcified atheroma plaques in the aorta and coronary artery calcification.",
         {"Arterial wall calcification", "Coronary artery wall calcification"}),
        ("A stone of 6.5 mm in the right kidney.", {"Kidney stone"}),
        ("Heart size is normal.", set()),
        ("The heart is enlarged.", {"Cardiomegaly"}),
        ("No pleural effusion\n5 mm nodule in the left lung", {"Lung nodule"}),
        ("No pleural effusion.\n2. Nodule of 3.5 mm", {"Lung nodule"}),
        ("There is a nodule and the heart is not enlarged.", {"Lung nodule"}),
        ("Pleural effusion and consolidation are no longer clearly visible.", set()),
        ("Lymph nodes are not enlarged. Coronary arteries without calcification.", set()),
        ("Nodules: none. Pleural effusion: absent.", set()),
        ("No pleural effusion and a nodule is seen.", {"Lung nodule"}),
        ("No pleural effusion, consolidation and nodule.", set()),
        ("A nodule cannot be ruled out.", {"Lung nodule"}),
        ("CT cannot rule out a nodule. Consolidation could not be ruled out.", {"Lung nodule", "Consolidation"}),
        ("Scan to rule out a nodule. Consolidation was ruled out.", set()),
        ("Mild emphysematous changes and bronchiectasis.", {"Emphysema", "Bronchiectasis"}),
        ("No lymphadenopathy. Interlobular septal thickening. Mosaic attenuation pattern.",
         {"Interlobular septal thickening", "Mosaic attenuation pattern"}),
        ("No change in nodule.", {"Lung nodule"}),
        ("No significant interval change in the 5 mm nodule, no effusion.", {"Lung nodule"}),
        ("Consolidation without increase of the pleural effusion.", {"Consolidation", "Pleural effusion"}),
        ("No increase in size of the nodules.", {"Lung nodule"}),
        ("No nodule or change of note.", set()),
        ("No fibrotic changes.", set()),
        ("Resolved effusion.", set()),
        ("Resolved left pleural effusion and a new nodule.", {"Lung nodule"}),
        ("Nodule and resolved effusion.", {"Lung nodule"}),
        ("Resolution of the pericardial effusion.", set()),
        ("Pleural effusion, resolved. Consolidation has since resolved.", set()),
        ("The effusion is completely resolved.", set()),
        ("Partially resolved pleural effusion.", {"Pleural effusion"}),
        ("The consolidation has not completely resolved.", {"Consolidation"}),
        ("Incomplete resolution of the consolidation.", {"Consolidation"}),
        ("Resolving consolidation.", {"Consolidation"}),
    ],
)  # fmt: skip
def test_mentions_and_negations(text, stated):
    assert {label for label, found in find_findings(text).items() if found} == stated


def test_crg_floors_and_ceiling():
    """All-negative and all-positive both give exactly one third, all right gives one."""
    truth = np.random.default_rng(0).random((50, 6)) < 0.2
    for said in (np.zeros_like(truth), np.ones_like(truth)):
        assert finding_scores(said, truth)["crg"] == pytest.approx(1 / 3)
    assert finding_scores(truth, truth)["crg"] == pytest.approx(1)
    assert np.isnan(crg(Counts(*np.array([[0.0], [1.0], [0.0]]), cases=10.0)))


def test_scores_by_hand_and_weights_repeat_cases():
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
    said = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    scores = finding_scores(said, truth)
    assert scores["precision"] == pytest.approx(2 / 4)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1_micro"] == pytest.approx(4 / 7)
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)  # the third label never occurs
    # hits 2, false alarms 2, misses 1 of 9 places with 3 positives: weight 1
    assert scores["crg"] == pytest.approx(3 / (6 - (2 - 1 - 2)))
    repeated = finding_scores(said[[0, 0, 2]], truth[[0, 0, 2]])
    assert finding_scores(said, truth, np.array([2.0, 0.0, 1.0])) == pytest.approx(repeated)


def test_what_is_not_in_latin_letters_is_not_read():
    assert reads(["A nodule of 5 mm.", "No effusion."]) and reads(["Nódulo pulmonar"]) and reads(["5 mm"])
    assert not reads(["左肺结节 5 mm"]) and not reads(["Узел в левом лёгком"])


def test_random_labels_are_as_many_a_report_and_each_as_likely():
    said = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=bool)
    np.testing.assert_allclose(random_labels(said), [[0.5] * 4, [0.25] * 4])
    truth = np.array([[1, 0, 0, 0], [0, 0, 0, 1]], dtype=bool)
    draws = np.random.default_rng(0).permuted(np.repeat(said[None], 4000, 0), axis=2)
    drawn = np.mean([finding_scores(draw, truth)["f1_micro"] for draw in draws])
    assert finding_scores(random_labels(said), truth)["f1_micro"] == pytest.approx(2 * 0.75 / 5)
    assert drawn == pytest.approx(2 * 0.75 / 5, rel=0.05)


def test_the_matchers_own_error_is_measured():
    labels = ["Lung nodule", "Pleural effusion"]
    texts = ["A nodule.", "No nodule. Fluid in the chest.", "Clear."]
    truth = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    assert finding_matrix(texts, labels).tolist() == [[True, False], [False, False], [False, False]]
    assert matcher_error(texts, truth, labels)["wrong_share"] == pytest.approx(1 / 6)


def test_the_table_has_the_eighteen_public_labels():
    assert len(KEYWORDS) == 19 and "Mosaic attenuation pattern" in KEYWORDS
