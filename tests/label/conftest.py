"""One server with an aligned tiny model over a NIfTI and a DICOM series, and what it must answer."""

import zipfile

import pytest

from app.tokens.open_scan import Volume
from app.tokens.tokenizer import CTTokenizer
from app.tokens.volumes import onto_grid, write_nifti
from tests import alignments, scans
from tests import tiny_tokenizer as tiny
from tests.label_server import PATIENT, end, start, wait_for
from tests.runs import ROOT


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """An aligned model with its tokenizer."""
    folder = alignments.make_home(tmp_path_factory.mktemp("home"))
    alignments.align(folder, folder / "aligned")
    return folder


@pytest.fixture(scope="session")
def studies(tmp_path_factory):
    """A NIfTI and a DICOM series in a zip and in a folder, all named after a patient."""
    folder = tmp_path_factory.mktemp("studies")
    write_nifti(folder / f"{PATIENT}.nii.gz", Volume(tiny.hu_volume(), tiny.AFFINE))
    series = scans.write_series(folder / "series", scans.series(PatientName=PATIENT))
    with zipfile.ZipFile(folder / "dicom.zip", "w") as packed:
        for file in sorted(series.rglob("*")):
            packed.write(file, file.name)
    return folder


@pytest.fixture(scope="session")
def server(home, studies, tmp_path_factory):
    conf = {"tokenizer": home / "tokenizer.pt", "align": home / "aligned", "max_upload_mb": 4}
    process, started = start(ROOT / "app", studies, tmp_path_factory.mktemp("place") / "run", conf=conf)
    try:
        wait_for(process, started)
        yield started
    finally:
        end(process)


@pytest.fixture(scope="session")
def expected(home, studies):
    """Tokens and reconstruction as they are made without a server."""
    ct = CTTokenizer.from_pretrained(home / "tokenizer.pt")
    tokens = ct.encode(studies / f"{PATIENT}.nii.gz")
    return tokens, onto_grid(ct.decode(tokens), tokens.source_shape, tokens.source_affine)
