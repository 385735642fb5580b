"""Manifests and the six public layouts, each on a tiny file exactly as published."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from app.text.manifests import check_rows, read_rows, same_scans
from app.text.rows import REPORT_QUESTION

CT_RATE_LABELS = [
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
]


def write_csv(file: Path, header: list[str], *rows: list) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def test_text_beside_a_scan_is_named_when_it_cannot_be_read(tmp_path):
    touch(tmp_path / "a.nii.gz")
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 \(byte 2\)\. Save it"):
        read_rows(tmp_path)


def touch(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    return file


def test_ct_rate(tmp_path):
    """Reports csv, labels csv beside it, nested scans; "Not given." is nothing."""
    scan = touch(tmp_path / "dataset/valid/valid_53/valid_53_a/valid_53_a_1.nii.gz")
    reports = write_csv(
        tmp_path / "validation_reports.csv",
        ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"],
        ["valid_53_a_1.nii.gz", "Cough", "Not given.", "A nodule in the left lung.", "Nodule."],
        ["train_7_b_2.nii.gz", "", "", "Not given.", "Normal."],
    )
    write_csv(
        tmp_path / "valid_predicted_labels.csv",
        ["VolumeName", *CT_RATE_LABELS],
        ["valid_53_a_1.nii.gz", *(int(name == "Lung nodule") for name in CT_RATE_LABELS)],
    )
    (tmp_path / "anything.csv").write_bytes("Größe;Name\n".encode("latin-1"))
    rows = read_rows(reports, image_root=tmp_path / "dataset")
    assert rows[0].path == scan and rows[1].path is None
    assert rows[0].answer == "Findings: A nodule in the left lung.\nImpression: Nodule."
    assert (rows[0].question, rows[0].patient, rows[0].split) == (REPORT_QUESTION, "valid_53", "val")
    assert [name for name, value in rows[0].labels.items() if value] == ["Lung nodule"] and len(rows[0].labels) == 18
    assert (rows[1].answer, rows[1].patient, rows[1].split, rows[1].labels) == ("Normal.", "train_7", "train", {})


def test_radgenome(tmp_path):
    table = write_csv(
        tmp_path / "validation_region_report.csv",
        ["Volumename", "Anatomy", "Sentence"],
        ["valid_53_a_1.nii.gz", "lung", "A nodule in the left lung."],
        ["valid_53_a_1.nii.gz", "", "Whole report."],
    )
    rows = read_rows(table)
    assert [row.question for row in rows] == ["Describe the lung on this CT scan.", REPORT_QUESTION]
    assert [row.kind for row in rows] == ["region", "report"] and rows[0].patient == "valid_53"


def test_3d_rad(tmp_path):
    columns = "Task,Subtask,VolumeName,Question,Answer,QuestionType,AnswerChoice,Choice A,Choice B,Choice C,Choice D"
    table = write_csv(
        tmp_path / "test.csv",
        columns.split(","),
        ["Existence", "x", "valid_53_a_1.nii.gz", "Is there a nodule?", "Yes", "Close", "B", "No", "Yes", "-", "-"],
        ["Observation", "x", "valid_53_a_1.nii.gz", "What is seen?", "A nodule.", "Open", "-", "-", "-", "-", "-"],
        ["Density", "x", "valid_53_a_1.nii.gz", "How dense?", "-5 HU", "Close", "A", "-5 HU", "40 HU", "-", "-"],
    )
    closed, open_, signed = read_rows(table)
    assert signed.choices == ("-5 HU", "40 HU") and signed.answer == "A. -5 HU"
    assert closed.answer == "B. Yes" and closed.prompt == "Is there a nodule?\nA. No\nB. Yes"
    assert (open_.answer, open_.choices, open_.kind, open_.split) == ("A nodule.", (), "Observation", "val")


def test_m3d_vqa(tmp_path):
    columns = "Image Path,Text,Question Type,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer Choice"
    image = touch(tmp_path / "ct_quizze/000007/Axial.npz")
    table = write_csv(
        tmp_path / "M3D_VQA_test.csv",
        columns.split(","),
        ["ct_quizze/000007/Axial.npz", "", "1", "Which plane?", "Axial", "Sagittal", "Coronal", "None", "Axial", "A"],
    )
    (row,) = read_rows(table)
    assert (row.path, row.patient, row.answer, row.kind) == (image, "ct_quizze/000007", "A. Axial", "1")
    assert row.choices == ("Axial", "Sagittal", "Coronal", "None")


def test_m3d_cap(tmp_path):
    text = touch(tmp_path / "ct_case/000001/text.txt")
    text.write_text("presentation: cough; study_findings: A mass in the liver.; discussion: Common.")
    image = {"image": "ct_case/000001/Axial", "text": "ct_case/000001/text.txt"}
    manifest = tmp_path / "M3D_Cap.json"
    manifest.write_text(json.dumps({"train": [image], "validation": [image], "test100": [image]}))
    rows = read_rows(manifest)
    assert [row.split for row in rows] == ["train", "val", "test"]
    assert rows[0].answer == "A mass in the liver." and rows[0].patient == "ct_case/000001"


def test_llava(tmp_path):
    record = {
        "id": "valid_53_a_1_0",
        "image": "valid_53_a_1.nii.gz",
        "type": "conversation",
        "conversations": [
            {"from": "human", "value": "<image>\nIs there a nodule?"},
            {"from": "gpt", "value": "Yes."},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "Left."},
        ],
    }
    (tmp_path / "vqa.json").write_text(json.dumps([record]))
    rows = read_rows(tmp_path / "vqa.json")
    assert [(row.question, row.answer) for row in rows] == [("Is there a nodule?", "Yes."), ("Where?", "Left.")]
    assert rows[0].patient == "valid_53" and rows[0].kind == "conversation"


def test_own_manifest_by_loose_names(tmp_path):
    scan = touch(tmp_path / "scans/a.nii.gz")
    lines = [
        {"Image": "scans/a.nii.gz", "Findings": "Clear lungs.", "Impression": "Normal.", "Nodule": 0, "Stone": 1},
        {
            "image": "a",
            "question": "Side?",
            "answer": "left",
            "choices": ["left", "right"],
            "patient": "p",
            "split": "valid",
        },
        {"image": "nowhere.nii", "report": "Text.", "question": "Why?", "answer": "So.", "choices": "x|y"},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(manifest)
    assert rows[0].answer == "Findings: Clear lungs.\nImpression: Normal."
    assert rows[0].labels == {"Nodule": False, "Stone": True} and rows[0].path == rows[1].path == scan
    assert (rows[1].answer, rows[1].prompt) == ("A. left", "Side?\nA. left\nB. right")
    assert (rows[1].patient, rows[1].split) == ("p", "val")
    assert [(row.question, row.answer, row.path) for row in rows[2:]] == [
        ("Why?", "So.", None),
        (REPORT_QUESTION, "Text.", None),
    ]


def test_choices_by_letter_and_splits_by_other_names(tmp_path):
    row = {"image": "a.npz", "question": "q", "answer": "B", "choices": {"A": "yes", "B": "no"}}
    lines = [json.dumps({**row, "split": name}) for name in ("Train ", "dev")]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    rows = read_rows(tmp_path / "m.jsonl")
    assert rows[0].choices == ("yes", "no") and rows[0].answer == "B. no"
    assert [row.split for row in rows] == ["train", "val"]


def test_scans_with_text_beside_and_prepared_datasets(tmp_path):
    scan = touch(tmp_path / "plain/case1.nii.gz")
    (tmp_path / "plain/case1.txt").write_text("A report.")
    (row,) = read_rows(tmp_path / "plain")
    assert (row.path, row.answer) == (scan, "A report.")
    case = tmp_path / "out/set/processed/c1"
    case.mkdir(parents=True)
    text = {"case_id": "c1", "report": "Clear.", "patient": "p1", "split": "train"}
    (tmp_path / "out/set/text.jsonl").write_text(json.dumps(text))
    for folder in (tmp_path / "out", tmp_path / "out/set"):
        (row,) = read_rows(folder)
        assert (row.path, row.answer, row.patient, row.split) == (case, "Clear.", "p1", "train")


def test_patient_and_split_of_a_prepared_case_are_its_dataset_s(tmp_path):
    out, lines = tmp_path / "out/set", []
    cases = {f"c{number}": ("val" if number % 2 else "train") for number in range(8)}
    for name in cases:
        (out / "processed" / name).mkdir(parents=True)
        lines.append(json.dumps({"case_id": name, "report": "Clear."}))
    (out / "text.jsonl").write_text("\n".join(lines))
    write_csv(out / "metadata.csv", ["case_id", "patient", "split"], *[[c, f"p-{c}", s] for c, s in cases.items()])
    own = write_csv(tmp_path / "own.csv", ["image", "report"], *[[f"out/set/processed/{c}", "x"] for c in cases])
    for source in (tmp_path / "out", out, out / "text.jsonl", own):
        rows = read_rows(source)
        assert {Path(row.image).name: row.split for row in rows} == cases
        assert {row.patient for row in rows} == {f"p-{name}" for name in cases}


def test_a_name_of_two_files_is_not_guessed(tmp_path):
    for folder in "ab":
        touch(tmp_path / folder / "scan.nii.gz")
    manifest = write_csv(tmp_path / "m.csv", ["image", "report"], ["scan", "x"], ["a/scan.nii.gz", "y"])
    assert [row.path is None for row in read_rows(manifest)] == [True, False]


def test_several_images_are_not_one_file_for_its_name(tmp_path):
    scan = touch(tmp_path / "p1/scan.nii.gz")
    images = [[f"p{number}/scan.nii.gz", f"report {number}"] for number in range(3)]
    rows = read_rows(write_csv(tmp_path / "m.csv", ["image", "report"], *images))
    assert [row.path for row in rows] == [None, scan, None]


@pytest.mark.parametrize("image", ["siteA/x.nii.gz", "siteA/x", "/old/siteA/x.nii.gz", "/old/siteB/sub/x.nii.gz"])
def test_a_scan_of_the_same_name_in_another_folder_is_not_taken(tmp_path, image):
    touch(tmp_path / "data/siteB/x.nii.gz")
    table = write_csv(tmp_path / "data/m.csv", ["image", "report"], [image, "x"])
    for root in (None, tmp_path / "data", tmp_path / "data/siteB"):
        (row,) = read_rows(table, image_root=root)
        assert (row.path, row.missing) == (None, "no such file")
        assert f"first: {image} (no such file)" in check_rows([row])["problems"]["SCANS_MISSING"]


def test_folders_that_agree_are_the_scan_s_wherever_the_root_begins(tmp_path):
    scan = touch(tmp_path / "data/siteA/x.nii.gz")
    rate = touch(tmp_path / "data/flat/valid_53_a_1.nii.gz")
    images = ["siteA/x.nii.gz", "data/siteA/x", "x.nii.gz", str(scan)]
    for named in (images, ["/old/disk/siteA/x.nii.gz"]):
        table = write_csv(tmp_path / "m.csv", ["image", "report"], *[[image, image] for image in named])
        assert [row.path for row in read_rows(table, image_root=tmp_path / "data")] == [scan] * len(named)
    table = write_csv(tmp_path / "m.csv", ["VolumeName", "Findings_EN"], ["valid_53_a_1.nii.gz", "x"])
    assert [row.path for row in read_rows(table, image_root=tmp_path / "data")] == [rate]


def test_an_image_root_decides_over_the_current_folder_and_without_one_two_files_are_refused(tmp_path, monkeypatch):
    for folder in ("here", "root", "tables"):
        (tmp_path / folder).mkdir()
    table = write_csv(tmp_path / "tables/m.csv", ["image", "report"], ["x.nii.gz", "x"])
    monkeypatch.chdir(tmp_path / "here")
    mine = touch(tmp_path / "here/x.nii.gz")
    (row,) = read_rows(table, image_root=tmp_path / "root")
    assert (row.path, row.missing) == (None, "no such file")
    assert read_rows(table)[0].path.resolve() == mine
    beside, rooted = touch(tmp_path / "tables/x.nii.gz"), touch(tmp_path / "root/x.nii.gz")
    assert read_rows(table, image_root=tmp_path / "root")[0].path == rooted
    (row,) = read_rows(table)
    assert row.path is None and "2 files answer to it" in row.missing and str(beside) in row.missing
    monkeypatch.chdir(tmp_path / "tables")
    assert read_rows(table)[0].path.resolve() == beside


def test_one_case_id_in_two_datasets_is_two_images(tmp_path):
    for name in "ab":
        (tmp_path / name / "processed/c1").mkdir(parents=True)
        (tmp_path / name / "text.jsonl").write_text(json.dumps({"case_id": "c1", "report": f"of {name}"}))
    rows = read_rows(tmp_path)
    assert {row.image: (row.answer, row.path) for row in rows} == {
        f"{name}/c1": (f"of {name}", tmp_path / name / "processed/c1") for name in "ab"
    }
    table = write_csv(tmp_path / "m.csv", ["image", "report"], ["c1", "x"], ["a/c1", "y"], ["c/c1", "z"])
    first, second, third = read_rows(table)
    assert first.path is None and "2 files answer to it" in first.missing
    assert second.path == tmp_path / "a/processed/c1" and third.path is None


def test_check_counts_what_is_wrong(tmp_path):
    touch(tmp_path / "a.nii.gz")
    manifest = write_csv(
        tmp_path / "m.csv",
        ["image", "report", "patient", "split", "nodule"],
        ["a.nii.gz", "x", "p", "train", "1"],
        ["a.nii.gz", "x", "p", "train", "1"],
        ["b.nii.gz", "", "p", "val", "1"],
    )
    found = check_rows(read_rows(manifest))
    assert {key: found[key] for key in ("rows", "images", "matched", "missing", "empty", "duplicated")} == {
        "rows": 3, "images": 2, "matched": 2, "missing": 1, "empty": 1, "duplicated": 1,
    }  # fmt: skip
    assert found["patients_in_two_splits"] == 1 and found["labels"] == {"nodule": 2}
    assert set(found["problems"]) == {"SCANS_MISSING", "EMPTY_TEXT", "DUPLICATED", "SPLIT_LEAKAGE"}
    assert found["problems"]["SCANS_MISSING"].startswith("1 images not found, first: b.nii.gz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "report\nx\n", r"a row of m.csv names no image\. A column must be one of image, image_path"),
        ("m.csv", 'image,report\na.npz,"' + "x" * 140_000, "m.csv is not valid csv"),
        ("m.csv", b"image,report\na.npz,\xe9\n", "m.csv is not UTF-8"),
        ("m.csv", "image,question,answer,choices\na.npz,q,A,[yes\n", r"choices must be a list, .* got '\[yes'"),
        ("m.json", '{"image": "a.npz", "report": "x"}', "m.json must be a list of rows"),
        ("m.json", '[{"image": "a.npz", "report": "x"}, 5]', "row 2 of m.json is no object"),
        ("m.json", '[{"image": "a", "conversations": []}, {"conversations": []}]', "row 2 has no image"),
        ("m.json", '[{"image": "a", "conversations": [{"role": "user", "content": "q"}]}]', "holds no rows"),
        ("m.csv", "image,report\n", "m.csv holds no rows|holds no rows"),
        ("m.jsonl", "{", "m.jsonl is not valid JSON"),
        ("m.xlsx", "", "a manifest must be csv, json or jsonl, got m.xlsx"),
    ],
)
def test_unreadable_manifests_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        read_rows(tmp_path / "nowhere.csv")


def test_of_two_people_without_a_split_one_is_held_out_and_rows_go_with_their_patient(tmp_path):
    for name in ("ab", "cd", "ef"):
        rows = [[f"{name[0]}{n}.nii", "Clear.", name[0]] for n in range(2)] + [[f"{name[1]}.nii", "Clear.", name[1]]]
        read = read_rows(write_csv(tmp_path / f"{name}.csv", ["image", "report", "patient"], *rows))
        assert {row.split for row in read} == {"train", "val"} and read[0].split == read[1].split
    given = [["a.nii", "x", "p", "val"], ["b.nii", "x", "p", ""], ["c.nii", "x", "q", ""]]
    read = read_rows(write_csv(tmp_path / "some.csv", ["image", "report", "patient", "split"], *given))
    assert [row.split for row in read] == ["val", "val", "train"]


def test_the_same_file_under_two_names_on_both_sides_is_told(tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.nii").write_bytes(content)
    (tmp_path / "d.nii").write_bytes(content[:-1] + b"x")  # as long, and another at its end
    (tmp_path / "e.nii").write_bytes(content[:100_000] + b"x" + content[100_001:])  # between what is sampled
    sides = {"a": "train", "b": "val", "c": "train", "d": "val", "e": "val"}
    rows = [[f"{name}.nii", "Clear.", side] for name, side in sides.items()]
    rows = read_rows(write_csv(tmp_path / "m.csv", ["image", "report", "split"], *rows))
    assert same_scans(rows) == ["a.nii", "b.nii", "c.nii"]
    assert check_rows(rows)["problems"]["SAME_SCAN"].startswith("3 scans on both sides")
