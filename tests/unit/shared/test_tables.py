"""Tables of strangers: no cell is lost in silence, in any reader of one."""

import pytest

from app.check import check
from app.dataset import prepared
from app.prepare.options import read_split
from app.shared.tables import read_table
from app.text.manifests import read_rows

CUT = "image,report\na.nii.gz,Clear.\nb.nii.gz,No nodule, but an effusion.\n"


def test_rows_by_column_with_what_is_lacking_as_none():
    lines = ["a,b\n", '1,"x, ', 'y"\n', "\n", "2\n", "3,z,, \n"]
    assert list(read_table(lines, name="t")) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": None}, {"a": "3", "b": "z"}]
    assert list(read_table([], name="t")) == []


def test_an_unquoted_comma_is_told_by_the_line_that_its_row_begins_on():
    lines = ["a,b\n", '1,"x\n', 'y"\n', '2,"y\n', 'z",surplus\n']
    with pytest.raises(ValueError, match=r"line 4 of t has 3 cells, its header has 2\. .* quotation marks"):
        list(read_table(lines, name="t"))


def test_two_columns_of_one_name_are_told():
    with pytest.raises(ValueError, match="t has the column 'report' twice"):
        list(read_table(["image,report,report,,\n", "a,b,c\n"], name="t"))


def test_every_reader_of_a_table_tells_the_line_of_a_surplus_cell(tmp_path):
    (tmp_path / "m.csv").write_text(CUT)
    (tmp_path / "reports.csv").write_text("VolumeName,Findings_EN\ntrain_1_a_1.nii.gz,x, y\n")
    (tmp_path / "split.csv").write_text("image,split\na,train\nb,val,x\n")
    dataset = tmp_path / "out" / "set"
    (dataset / "processed" / "c").mkdir(parents=True)
    (dataset / "metadata.csv").write_text("case_id,patient\nc,p, q\n")
    for read, where in (
        (lambda: read_rows(tmp_path / "m.csv"), "line 3 of m.csv has 3 cells"),
        (lambda: check(tmp_path / "m.csv"), "line 3 of m.csv has 3 cells"),
        (lambda: read_rows(tmp_path / "reports.csv"), "line 2 of reports.csv has 3 cells"),
        (lambda: read_split(str(tmp_path / "split.csv")), "line 3 of the split file has 3 cells"),
        (lambda: prepared.find_cases(dataset), "line 2 of set/metadata.csv has 3 cells"),
    ):
        with pytest.raises(ValueError, match=where):
            read()


def test_a_labels_table_beside_reports_tells_its_surplus_cell_and_other_tables_are_left_alone(tmp_path):
    (tmp_path / "reports.csv").write_text("VolumeName,Findings_EN\ntrain_1_a_1.nii.gz,x\n")
    (tmp_path / "anything.csv").write_text("a,a\n1,2,3\n")
    assert len(read_rows(tmp_path / "reports.csv")) == 1
    (tmp_path / "labels.csv").write_text("VolumeName,Medical material\ntrain_1_a_1.nii.gz,0,1\n")
    with pytest.raises(ValueError, match=r"line 2 of labels.csv has 3 cells"):
        read_rows(tmp_path / "reports.csv")


def test_a_split_table_that_contradicts_itself_or_is_no_text_is_told(tmp_path):
    file = tmp_path / "split.csv"
    file.write_text("image,split\na,train\na,train\na,val\n")
    with pytest.raises(ValueError, match=r"line 4 of the split file puts 'a' on the other side"):
        read_split(str(file))
    file.write_bytes(b"image,split\n\xe9,train\n")
    with pytest.raises(ValueError, match="the split file is no UTF-8 csv"):
        read_split(str(file))
