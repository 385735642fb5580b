"""MONAI Label 0.8.5 as a real server, asked over HTTP: by plain requests and by its own client. See docs/serving.md."""

import base64
import concurrent.futures
import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from app.export.export import write_bundle
from app.tokens.tokenizer import CTTokenizer
from app.tokens.volumes import onto_grid
from tests import scans
from tests import tiny_tokenizer as tiny
from tests.label_server import PATIENT, SECONDS_TO_START, end, start, tokens_of, wait_for
from tests.runs import ROOT

pytestmark = pytest.mark.label
requests = pytest.importorskip("requests")
pytest.importorskip("monailabel")
WITH_A_GAP = "1.2.3.5"
ORTHANC_DICOMWEB = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"  # as Debian has it


@pytest.fixture(scope="module")
def dicomweb(tmp_path_factory):
    """Orthanc, a real DICOMweb server, with one CT series; and the files of that series."""
    if shutil.which("Orthanc") is None:
        pytest.skip("no Orthanc here (apt-get install orthanc orthanc-dicomweb)")
    place = tmp_path_factory.mktemp("orthanc")
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        http, dicom = probe.getsockname()[1], other.getsockname()[1]
    settings = {
        "HttpPort": http,
        "DicomPort": dicom,
        "StorageDirectory": str(place / "db"),
        "Plugins": [ORTHANC_DICOMWEB],
    }
    settings |= {"RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomWeb": {"Enable": True}}
    (place / "orthanc.json").write_text(json.dumps(settings))
    with open(place / "log", "w") as log:
        process = subprocess.Popen(["Orthanc", str(place / "orthanc.json")], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{http}"
    try:
        for _ in range(60):
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{url}/system", timeout=5)
                break
            time.sleep(0.5)
        series = scans.write_series(place / "series", scans.series(PatientName=PATIENT))
        slices = scans.series(PatientName=PATIENT, SeriesInstanceUID=WITH_A_GAP)
        holed = scans.write_series(place / "holed", slices[:5] + slices[6:])
        for file in sorted([*series.iterdir(), *holed.iterdir()]):
            assert requests.post(f"{url}/instances", data=file.read_bytes(), timeout=30).ok
        yield f"{url}/dicom-web", series
    finally:
        process.kill()
        process.wait()


def test_a_series_of_a_dicomweb_server_gives_the_tokens_of_its_files(home, dicomweb, tmp_path):
    """By the id that viewers know it by; MONAI Label fetches it, the gate sees DICOM, and nothing of it is left."""
    url, series = dicomweb
    (name,) = {str(pydicom.dcmread(file).SeriesInstanceUID) for file in series.iterdir()}
    process, server = start(ROOT / "app", url, tmp_path / "run", conf={"tokenizer": home / "tokenizer.pt"})
    try:
        wait_for(process, server)
        assert requests.get(f"{server.url}/datastore/", timeout=30).json()["total"] == 2
        answer = server.ask("tokenize", params={"image": name})
        assert answer.status_code == 200, answer.text
        expected = CTTokenizer.from_pretrained(home / "tokenizer.pt").encode(series)
        assert np.array_equal(tokens_of(answer, tmp_path).codes, expected.codes)
        back = server.ask("reconstruct", params={"image": name, "output": "image"})
        (tmp_path / "back.nii.gz").write_bytes(back.content)
        assert nibabel.load(tmp_path / "back.nii.gz").shape == expected.source_shape
        holed = server.ask("tokenize", params={"image": WITH_A_GAP})
        assert holed.status_code == 422 and holed.json()["detail"]["code"] == "MISSING_SLICES"
        gone = server.ask("tokenize", params={"image": f"{name}.1"})
        assert gone.status_code == 404 and gone.json()["detail"]["code"] == "NO_SOURCE"
        assert PATIENT not in server.log.read_text() + answer.text + gone.text
    finally:
        end(process)
    assert not list((tmp_path / "run").rglob("*.dcm"))


def test_info_shows_models_and_options(server):
    models = requests.get(f"{server.url}/info/", timeout=10).json()["models"]
    assert list(models) == ["tokenize", "reconstruct", "ask", "report", "show_answer"]
    assert models["reconstruct"]["config"]["window"][:2] == ["HU", "lung"]
    assert models["ask"]["config"] == {"question": "", "max_3d_tokens": [40, 20, 10], "max_new_tokens": 256}


def test_tokens_over_http_are_those_of_the_command(server, expected, tmp_path):
    answer = server.ask("tokenize", params={"image": PATIENT})
    assert answer.status_code == 200
    found = tokens_of(answer, tmp_path)
    assert np.array_equal(found.codes, expected[0].codes) and np.array_equal(found.coords, expected[0].coords)


def test_a_reconstruction_comes_back_on_the_scans_own_grid(server, studies, expected, tmp_path):
    file = tmp_path / "back.nii.gz"
    file.write_bytes(server.ask("reconstruct", params={"image": PATIENT, "output": "image"}).content)
    image, scan = nibabel.load(file), nibabel.load(studies / f"{PATIENT}.nii.gz")
    assert image.shape == scan.shape and np.allclose(image.affine, scan.affine, atol=1e-4)
    assert np.array_equal(np.asarray(image.dataobj), np.rint(expected[1].hu).astype(np.int16))


def test_a_window_clips_what_comes_back(server, tmp_path):
    file = tmp_path / "back.nii.gz"
    sent = {"params": json.dumps({"window": "bone"})}
    file.write_bytes(server.ask("reconstruct", params={"image": PATIENT, "output": "image"}, data=sent).content)
    hu = np.asarray(nibabel.load(file).dataobj)
    assert hu.min() >= -450 and hu.max() <= 1050


def test_tokens_that_are_uploaded_are_decoded(server, expected, tmp_path):
    packed = base64.b64decode(server.ask("tokenize", params={"image": PATIENT}).json()["npz"])
    answer = server.ask("reconstruct", files={"file": ("tokens.npz", packed)}, params={"output": "image"})
    (tmp_path / "back.nii.gz").write_bytes(answer.content)
    hu = np.asarray(nibabel.load(tmp_path / "back.nii.gz").dataobj)
    assert np.array_equal(hu, np.rint(expected[1].hu).astype(np.int16))


def test_uploads_and_dicom_give_the_tokens_of_the_same_scan_on_disk(server, studies, home, tmp_path):
    ct = CTTokenizer.from_pretrained(home / "tokenizer.pt")
    nifti = server.ask("tokenize", files={"file": (f"{PATIENT}.nii.gz", (studies / f"{PATIENT}.nii.gz").read_bytes())})
    assert np.array_equal(tokens_of(nifti, tmp_path).codes, ct.encode(studies / f"{PATIENT}.nii.gz").codes)
    dicom = ct.encode(studies / "series").codes
    upload = server.ask("tokenize", files={"file": ("dicom.zip", (studies / "dicom.zip").read_bytes())})
    for answer in (server.ask("tokenize", params={"image": "dicom"}),
                   server.ask("tokenize", params={"image": "series"}), upload):  # fmt: skip
        assert np.array_equal(tokens_of(answer, tmp_path).codes, dicom)


def test_monai_labels_own_client_gets_image_and_json(server, tmp_path):
    from monailabel.client import MONAILabelClient

    client = MONAILabelClient(server.url, tmpdir=str(tmp_path))
    file, told = client.infer("reconstruct", PATIENT, {"window": ["HU", "lung"]})
    assert nibabel.load(file).shape == tiny.SHAPE and told["tokens"] > 0
    file, told = client.infer("ask", PATIENT, {"question": "On which side?"})
    assert not file and json.loads(told)["question"] == "On which side?"  # JSON alone it gives as bytes


def test_answers_carry_provenance_and_the_notice_and_no_name(server):
    sent = {"params": json.dumps({"question": "On which side?", "max_new_tokens": 8, "max_3d_tokens": "20"})}
    asked = server.ask("ask", params={"image": PATIENT}, data=sent)
    report = server.ask("report", params={"image": PATIENT}, data={"params": json.dumps({"max_new_tokens": 8})})
    for answer in (asked, report):
        assert answer.status_code == 200
        told = answer.json()
        assert told["notice"] == "Research use only, not for diagnosis." and isinstance(told["answer"], str)
        assert len(told["provenance"]["scan_sha256"]) == len(told["provenance"]["tokenizer_sha256"]) == 64
        assert PATIENT not in answer.text and "/" not in answer.text.replace("\\/", "/").replace("not for", "")
    assert asked.json()["provenance"]["settings"]["max_3d_tokens"] == 20


def test_two_at_once_get_their_own_answers(server, expected, tmp_path):
    calls = [("tokenize", {"image": PATIENT}), ("ask", {"image": PATIENT}), ("tokenize", {"image": "dicom"})]
    data = {"params": json.dumps({"question": "On which side?", "max_new_tokens": 4})}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda call: server.ask(call[0], params=call[1], data=data), calls))
    assert [answer.status_code for answer in done] == [200, 200, 200]
    assert np.array_equal(tokens_of(done[0], tmp_path).codes, expected[0].codes)
    assert "answer" in done[1].json() and done[2].json()["provenance"] != done[0].json()["provenance"]


def packed(name, content):
    """An archive with one member."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("model", "given", "status", "code"),
    [
        ("tokenize", {"files": {"file": ("x.nii.gz", b"no scan")}}, 422, "CORRUPT_FILE"),
        ("tokenize", {"files": {"file": ("x.zip", b"PK\x03\x04")}}, 422, "CORRUPT_FILE"),
        ("tokenize", {"files": {"file": ("x.npz", b"no tokens")}}, 422, "DAMAGED_TOKENS"),
        ("tokenize", {"files": {"file": ("x.zip", packed("../../x.dcm", b"1"))}}, 422, "UNSAFE_ARCHIVE"),
        ("tokenize", {"files": {"file": ("x.zip", packed("x.dcm", bytes(50 << 20)))}}, 422, "UNSAFE_ARCHIVE"),
        ("tokenize", {"files": {"file": ("../../x.nii.gz", b"no scan")}}, 422, "CORRUPT_FILE"),
        ("tokenize", {"files": {"file": ("x.txt", b"a letter about a patient")}}, 422, "NO_CASES"),
        ("tokenize", {"params": {"image": "/etc/passwd"}}, 404, "NO_SOURCE"),
        ("tokenize", {"params": {"image": "../../etc/passwd"}}, 404, "NO_SOURCE"),
        ("tokenize", {"params": {"image": "nobody"}}, 404, "NO_SOURCE"),
        ("tokenize", {"params": {"image": "a" * 5000}}, 404, "NO_SOURCE"),
        ("nothing", {"params": {"image": PATIENT}}, 404, "NO_MODEL"),
        ("ask", {"params": {"image": PATIENT}}, 422, "BAD_VALUE"),
        ("ask", {"params": {"image": PATIENT}, "data": {"params": '{"question": "' + "x" * 3000 + '"}'}}, 422,
         "BAD_VALUE"),
        ("reconstruct", {"params": {"image": PATIENT}, "data": {"params": '{"window": "wide"}'}}, 422, "BAD_VALUE"),
        ("tokenize", {"files": {"file": ("x.nii.gz", bytes(5 << 20))}}, 413, "TOO_LARGE"),
        ("tokenize", {"params": {"image": PATIENT}, "headers": {"Origin": "http://elsewhere.example"}}, 403,
         "NOT_LOCAL"),
        ("tokenize", {"params": {"image": PATIENT}, "headers": {"Host": "elsewhere.example"}}, 403, "NOT_LOCAL"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_a_code(server, model, given, status, code):
    answer = server.ask(model, **given)
    assert (answer.status_code, answer.json()["detail"]["code"]) == (status, code), answer.text
    assert str(server.home) not in answer.text


def test_broken_calls_leave_the_server_up(server):
    for text, status, code in (("{no json", 422, "BAD_CALL"), ("[" * 100_000, 422, "BAD_CALL"), ("[1]", 500, "FAULT")):
        answer = server.ask("tokenize", params={"image": PATIENT}, data={"params": text})
        assert (answer.status_code, answer.json()["detail"]["code"]) == (status, code), text[:9]
    assert server.ask("ask", params={"image": PATIENT, "output": "image"}).status_code in (422, 500)
    assert requests.get(f"{server.url}/info/", timeout=10).status_code == 200


def test_the_server_listens_to_this_machine_alone(server):
    port = int(server.url.rpartition(":")[2])
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith("127."):
        assert "http://127.0.0.1" in server.log.read_text()
        return
    with pytest.raises(OSError), socket.create_connection((own, port), timeout=2):
        pass


def test_logs_hold_no_patient_and_no_upload_is_left(server):
    server.ask("tokenize", files={"file": (f"{PATIENT}.nii.gz", b"no scan")})
    for log in (server.log, ROOT / "app" / "logs" / "app.log"):
        assert PATIENT not in log.read_text() and "Traceback" not in log.read_text()
    left = [file.name for file in server.home.rglob("*.nii.gz")]
    assert not left


def test_a_bad_conf_ends_the_start_in_one_line(studies, tmp_path):
    for number, (conf, code) in enumerate([({"tokeniser": "x"}, "UNKNOWN_KEY"), ({"tokenizer": "x"}, "NO_TOKENIZER")]):
        process, server = start(ROOT / "app", studies, tmp_path / str(number), conf=conf)
        assert process.wait(timeout=SECONDS_TO_START) == 2
        text = server.log.read_text()
        assert code in text and "Traceback" not in text


def test_a_request_while_the_language_model_loads_waits_for_it(home):
    from app.serving.served import Served

    served = Served(tokenizer=str(home / "tokenizer.pt"), align=str(home / "aligned"))
    _, told = served.answer("ask", home / "scans/case0.npz", {"question": "On which side?", "max_new_tokens": 4})
    assert isinstance(told["answer"], str)


@pytest.mark.parametrize("tokenizer", ["tiny", "ct_base"])
def test_an_exported_bundle_serves_in_monai_labels_own_app(tokenizer, home, studies, tmp_path):
    """Dense HU through the inferer of its inference.json; of a tiny tokenizer, and of the one that ships."""
    app = tmp_path / "monaibundle"
    shutil.copytree(Path(sys.prefix, "monailabel", "sample-apps", "monaibundle"), app)
    made = CTTokenizer.from_pretrained(home / "tokenizer.pt" if tokenizer == "tiny" else tokenizer)
    write_bundle(app / "model" / "ct_tokens", made, name="ct_tokens", align=None, settings=None)
    conf = {"models": "ct_tokens", "zoo_source": "ngc", "sam2": "false", "skip_trainers": "true"}
    process, server = start(app, studies, tmp_path / "run", conf=conf, options=("--host", "127.0.0.1"))
    try:
        assert list(wait_for(process, server).json()["models"]) == ["ct_tokens"]
        answer = server.ask("ct_tokens", params={"image": PATIENT, "output": "image"})
        assert answer.status_code == 200, server.log.read_text()[-3000:]
    finally:
        end(process)
    (tmp_path / "back.nii.gz").write_bytes(answer.content)
    image = nibabel.load(tmp_path / "back.nii.gz")
    tokens = made.encode(studies / f"{PATIENT}.nii.gz")
    expected = onto_grid(made.decode(tokens), tokens.source_shape, tokens.source_affine)
    assert np.allclose(image.affine, tokens.source_affine, atol=1e-3)
    assert np.abs(np.asarray(image.dataobj) - np.rint(expected.hu)).max() <= 1
