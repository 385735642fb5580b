"""What viewers send, to the letter, and what they make of the reply; and the page for what they cannot show.

Neither 3D Slicer nor OHIF is started. Slicer's module MONAILabel speaks through MONAI Label's own client, which is used
here as the module uses it: which models it lists, a session for a loaded volume, options from a form, a label map read
by SimpleITK, segments named by `label_names`. OHIF's requests are those of the plug-in that MONAI Label ships.
"""

import http.client
import json
import time

import nibabel
import numpy as np
import pytest

from tests.browser import SECONDS, Browser
from tests.label_server import PATIENT

pytestmark = pytest.mark.label
requests = pytest.importorskip("requests")
pytest.importorskip("monailabel")
QUESTION = "On which side?"
SLICER_LISTS = ("segmentation", "deepgrow", "deepedit", "scribbles")
OHIF_LISTS = ("segmentation", "deepgrow", "deepedit", "vista3d")


@pytest.fixture
def client(server, tmp_path):
    from monailabel.client import MONAILabelClient

    return MONAILabelClient(server.url, tmpdir=str(tmp_path), client_id="slicer")


def form_of(model):
    """Options as the module's table gives them back: text of a choice or a field, numbers as numbers."""
    return {name: str(value[0]) if isinstance(value, list) else value for name, value in model["config"].items()}


def test_viewers_list_the_one_model_that_they_can_show(client):
    told = client.info()
    assert {"name", "labels", "models", "trainers", "strategies", "datastore"} <= set(told) and told["labels"] == []
    for kinds in (SLICER_LISTS, OHIF_LISTS):
        assert [name for name, model in told["models"].items() if model["type"] in kinds] == ["show_answer"]
    assert told["models"]["show_answer"]["labels"] == []


def test_slicer_gets_a_segment_that_is_named_by_the_answer_where_it_rests(client, server, studies):
    """A loaded volume becomes a session; the reply is a label map in the volume's own place."""
    import SimpleITK as sitk

    scan = studies / f"{PATIENT}.nii.gz"
    session = client.create_session(str(scan))["session_id"]
    assert client.get_session(session)["image"]
    params = {**form_of(client.info()["models"]["show_answer"]), "question": QUESTION, "max_new_tokens": 4}
    file, told = client.infer("show_answer", "CT_1", params, session_id=session)
    asked = {"question": QUESTION, "max_new_tokens": 4}
    plain = server.ask("ask", params={"image": PATIENT}, data={"params": json.dumps(asked)}).json()
    assert told["answer"] == plain["answer"] and told["notice"] == plain["notice"]
    (name,) = (told["label_names"]) if isinstance(told, dict) else ()
    assert " ".join(plain["answer"].split()) in name or plain["answer"] == ""
    assert "research use only, not for diagnosis" in name and told["label_names"][name] == 1
    labels, volume = sitk.ReadImage(file), sitk.ReadImage(str(scan))
    assert labels.GetSize() == volume.GetSize()
    for part in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert np.allclose(getattr(labels, part)(), getattr(volume, part)(), atol=1e-4)
    found = np.unique(sitk.GetArrayViewFromImage(labels))
    assert found.tolist() == [0, 1]
    client.remove_session(session)
    assert PATIENT not in json.dumps(told) and "CT_1" not in server.log.read_text()


def test_a_session_is_no_path_no_archive_and_no_name(server, studies):
    """MONAI Label joins whatever it is given to a folder, removes what it finds there, and unpacks what it is sent."""
    scan = (studies / f"{PATIENT}.nii.gz").read_bytes()
    sent = {"files": {"files": (f"{PATIENT}.Doe.nii.gz", scan)}, "timeout": 60}
    made = requests.put(f"{server.url}/session/", **sent).json()
    assert PATIENT not in json.dumps(made) and made["session_info"]["image"].endswith("/scan.nii.gz")
    (place,) = {file.parent for file in server.home.rglob("scan.nii.gz")}
    (place.parent / "meta.info").write_text(json.dumps({"image": str(place / "scan.nii.gz")}))  # of a session `..`
    for call, path in (("GET", "/session/.."), ("DELETE", "/session/%2e%2e"), ("DELETE", "/session/.."),
                       ("DELETE", "/session/" + "a" * 8)):  # fmt: skip
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request(call, path)
        assert connection.getresponse().status in (307, 404, 405), path
    assert (place / "scan.nii.gz").is_file()
    asked = server.ask("tokenize", params={"session_id": "../sessions", "image": ""})
    assert asked.status_code == 404, asked.text
    packed = requests.put(f"{server.url}/session/", params={"uncompress": True}, **sent)
    assert (packed.status_code, packed.json()["detail"]["code"]) == (422, "BAD_CALL")
    requests.delete(f"{server.url}/session/{made['session_id']}", timeout=60)
    assert not place.exists()


def test_a_report_is_what_slicer_gets_without_a_question(client):
    file, told = client.infer("show_answer", PATIENT, {"question": "", "max_new_tokens": "4"})
    assert file.endswith(".nii.gz") and told["question"].startswith("Write")


def test_the_reply_is_the_multipart_that_viewers_take_apart(server):
    asked = {"params": json.dumps({"question": QUESTION, "max_new_tokens": 4})}
    reply = server.ask("show_answer", params={"image": PATIENT}, files={"params": (None, asked["params"])})
    assert reply.headers["content-type"].startswith("multipart/form-data; boundary=")
    heads = [part.split(b"\r\n\r\n")[0] for part in reply.content.split(b"--" + reply.content.split(b"\r\n")[0][2:])]
    assert any(b'name="params"' in head and b"application/json" in head for head in heads)
    assert any(b'name="image"' in head and b".nii.gz" in head for head in heads)


def test_ohif_is_refused_what_it_could_show_on_the_wrong_side(server):
    """Its plug-in asks for an NRRD and lays the voxels over the series in its own order, whatever the header says."""
    sent = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, "restore_label_idx": False}
    form = {"params": (None, json.dumps(sent))}
    reply = server.ask("show_answer", params={"image": "series", "output": "image"}, files=form)
    detail = reply.json()["detail"]
    assert (reply.status_code, detail["code"]) == (422, "BAD_VALUE")
    assert "wrong side" in detail["message"] and "/answers" in detail["remedy"]
    assert requests.get(f"{server.url}/ohif/", timeout=30).status_code == 200


def wait_until(browser, expression):
    until = time.monotonic() + SECONDS
    while not browser.ask(expression):
        assert time.monotonic() < until, browser.ask("document.body.innerText")
        time.sleep(0.2)


def test_a_person_asks_on_the_servers_own_page(server, tmp_path):
    """In Chromium: what viewers have no place for, by the id that they know an image by."""
    asked = {"question": QUESTION, "max_new_tokens": 4}
    plain = server.ask("ask", params={"image": PATIENT}, data={"params": json.dumps(asked)}).json()
    browser = Browser()
    try:
        for width, scheme in ((1280, "light"), (380, "dark")):
            browser.open(f"{server.url}/answers?image={PATIENT}", width=width, scheme=scheme)
            wait_until(browser, "document.getElementsByName('question').length == 1")
            listed = "[...document.getElementById('images').options].map(o => o.value)"
            wait_until(browser, f"{listed}.length > 0")  # the list comes by a request of its own
            assert browser.ask(listed).count(PATIENT) == 1
            browser.ask(f"document.getElementsByName('question')[0].value = {QUESTION!r}")
            browser.ask("document.getElementsByName('max_new_tokens')[0].value = 4")
            browser.ask("document.getElementById('send').click()")
            wait_until(browser, f"document.getElementById('title').textContent == {QUESTION!r}")
            shown = browser.ask("document.getElementById('text').textContent")
            assert shown == (plain["answer"] or "(no words)")
            assert "scan_sha256" in browser.ask("document.getElementById('more').textContent")
            assert browser.ask("document.documentElement.scrollWidth") <= width
            browser.screenshot(tmp_path / f"answers_{width}_{scheme}.png")
        browser.ask("document.getElementById('image').value = 'nobody'; document.getElementById('send').click()")
        wait_until(browser, "document.getElementById('text').className == 'refused'")
        assert browser.ask("document.getElementById('text').textContent").startswith("NO_SOURCE. ")
        select = "document.getElementById('model').value = '{}';"
        change = "document.getElementById('model').dispatchEvent(new Event('change'));"
        for model, file in (("reconstruct", "reconstruction.nii.gz"), ("tokenize", "tokens.npz"),
                            ("show_answer", "where.nii.gz")):  # fmt: skip
            browser.ask(select.format(model) + change)
            image = f"document.getElementById('image').value = '{PATIENT}';"
            browser.ask(image + "document.getElementById('send').click()")
            wait_until(browser, f"document.querySelector('#files a')?.textContent == '{file}'")
            assert browser.ask("document.getElementById('text').className") == ""
        assert browser.complaints in ([], [c for c in browser.complaints if "404" in c])  # the refusal's own line
        assert {url.split("?")[0].removeprefix(server.url) for url in browser.loaded} <= {
            "/answers", "/info/", "/datastore/", "/infer/ask", "/infer/reconstruct", "/infer/tokenize",
            "/infer/show_answer",
        }  # fmt: skip
    finally:
        browser.close()


def test_a_page_of_another_site_cannot_show_it_in_a_frame(server):
    reply = requests.get(f"{server.url}/answers", timeout=30)
    assert reply.status_code == 200 and reply.headers["x-frame-options"] == "DENY"
    assert "frame" not in reply.text and PATIENT not in reply.text
    elsewhere = requests.get(f"{server.url}/answers", headers={"Host": "elsewhere.example"}, timeout=30)
    assert elsewhere.status_code == 403


def test_a_reconstruction_is_a_volume_to_load_beside_the_scan(server, studies, tmp_path):
    """Not a label map: viewers that take every result for one would show HU as thousands of segments."""
    assert requests.get(f"{server.url}/info/", timeout=30).json()["models"]["reconstruct"]["type"] == "others"
    reply = server.ask("reconstruct", params={"image": PATIENT, "output": "image"})
    (tmp_path / "back.nii.gz").write_bytes(reply.content)
    image, scan = nibabel.load(tmp_path / "back.nii.gz"), nibabel.load(studies / f"{PATIENT}.nii.gz")
    assert image.shape == scan.shape and np.allclose(image.affine, scan.affine, atol=1e-4)
