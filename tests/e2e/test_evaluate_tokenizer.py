"""The tokenizer's card through its bundle: on the built-in phantoms' kind of data, for real, and with mistakes."""

import json

import numpy as np
import pytest
import torch

from app.dataset.prepared import find_cases
from app.dataset.writer import write_case
from app.evaluation.tokenizer_evaluation import TokenizerEvaluation
from app.phantoms.phantoms import make_phantom
from app.shared.refusals import Refused
from app.tokens.open_scan import open_scan
from app.tokens.tokenizer import CTTokenizer
from app.training import checkpoints, seals
from networks import make_vqvae
from tests.runs import TINY, assert_refused, run_in


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory, cohort):
    """An untrained tokenizer of two levels whose codebooks lie over real encoder outputs."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    sizes = {"resolution": 24, "spacing": 16.0, "widths": (8, 8, 8), "model_channels": 16, "num_blocks": 1}
    network = make_vqvae("tiny", **sizes, num_embeddings=4, quantizer_levels=2).eval()
    made = CTTokenizer(network, digest="")
    with torch.no_grad():
        cases = [open_scan(case, network.sizes.windows) for case in find_cases(cohort)]
        rows = torch.cat([network.encoder(made.on_device(made.rows_of(scan.volume)))[0].feats for scan in cases])
        network.vq.start_from(rows, generator=torch.Generator().manual_seed(0))
    (folder / "ckpts").mkdir()
    state = network.state_dict()
    checkpoints.save_set(folder, 1, {"vqvae": state, "vqvae_ema0.9999": state}, {"step": 1})
    return folder


@pytest.fixture(scope="module")
def card(output_dir, cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    TokenizerEvaluation(dataset_dir=str(cohort), tokenizer=str(output_dir), output_dir=str(folder)).run()
    return folder


def test_refined_codes_are_judged_where_asked_for(output_dir, cohort, tmp_path, monkeypatch):
    asked = []
    encode = CTTokenizer.encode
    monkeypatch.setattr(
        CTTokenizer, "encode", lambda *rest, **how: (asked.append(how["refine"]), encode(*rest, **how))[1]
    )
    given = {"dataset_dir": str(cohort), "tokenizer": str(output_dir), "output_dir": str(tmp_path), "max_cases": 1}
    assert TokenizerEvaluation(**given, refine=2).run()["data"]["refined"] == 2 and asked == [2]
    assert "Codes refined in 2 steps." in (tmp_path / "tokenizer_card.md").read_text()


def test_card_as_json(card, cohort, output_dir):
    found = json.loads((card / "tokenizer_card.json").read_text())
    assert found["data"] == {
        "dataset": "data",
        "split": "val",
        "cases": 2,
        "patients": 2,
        "not_judged": {},
        "refined": 0,
    }
    assert found["tokenizer"]["sizes"]["quantizer_levels"] == found["codes"]["levels"] == 2
    state = checkpoints.read_tensors(checkpoints.averaged_file(output_dir))
    assert found["tokenizer"]["sha256"] == seals.weights_hash(state)
    assert set(found["errors"]) == {"codes alone", "stored support", "shuffled codes"}
    assert found["beyond"]["mean"] == 0, "phantoms lie on the very grid"
    for row in found["per_case"]:
        parts = {name: share for name, share in row["share"].items() if name != "foreground"}
        assert sum(parts.values()) == pytest.approx(1)
        tissues = row["errors"]["stored support"]["tissues"]
        # the body's error is that of its parts, weighed by their share
        body = sum(tissues[name]["mae"] * share for name, share in parts.items() if name != "air" and share > 0)
        assert tissues["foreground"]["mae"] == pytest.approx(body / row["share"]["foreground"], rel=1e-4)
    counts = found["code_counts"]
    assert [sum(level) for level in counts] == [sum(row["tokens"] for row in found["per_case"])] * 2
    assert found["codes"]["used"] == [sum(n > 0 for n in level) for level in counts]
    assert found["support"]["foreground_kept"]["mean"] > 0.99  # keep is body


def test_the_card_counts_all_bits_and_stands_beside_other_codecs(card):
    found = json.loads((card / "tokenizer_card.json").read_text())
    rates = found["rate"]
    parts = ("cells", "codes", "header")
    whole = sum(rates[f"{part}_per_foreground_voxel"]["mean"] for part in parts)
    assert rates["bits_per_foreground_voxel"]["mean"] == pytest.approx(whole)
    row = found["per_case"][0]["rate"]
    assert row["bits"] == pytest.approx(row["bits_per_token"] * found["per_case"][0]["tokens"])
    assert row["code_bits_per_token"] < row["bits_per_token"] and row["support_per_foreground_voxel"] > 0
    assert set(found["codecs"]) >= {"JPEG 2000"} and 0.5 < found["codecs"]["JPEG 2000"]["bits_of_ours"]["mean"] < 2
    assert 0 < found["codecs"]["JPEG 2000"]["mae"]["mean"] < found["codecs"]["JPEG 2000"]["rmse"]["mean"] < 2000
    text = (card / "tokenizer_card.md").read_text()
    for part in ("which cells exist", "stored support, besides", "| JPEG 2000 |", "never used"):
        assert part in text, part
    assert ("x265 was not asked: PyAV is not installed" in text) == ("x265" not in found["codecs"])


def test_a_card_of_fewer_levels_is_of_fewer_bits(output_dir, cohort, tmp_path):
    settings = {"dataset_dir": str(cohort), "tokenizer": str(output_dir), "max_cases": 1}
    one, two = (TokenizerEvaluation(**settings, output_dir=str(tmp_path / str(n)), levels=n).run() for n in (1, 2))
    assert (one["codes"]["levels"], two["codes"]["levels"]) == (1, 2)
    assert one["rate"]["bits"]["mean"] < two["rate"]["bits"]["mean"]
    with pytest.raises(Refused, match=r"^BAD_VALUE: levels must lie in 1..2, the levels of this tokenizer, got 3"):
        TokenizerEvaluation(**settings, output_dir=str(tmp_path / "3"), levels=3).run()


def test_card_as_text_and_picture(card):
    text = (card / "tokenizer_card.md").read_text()
    for part in ("## Error in HU", "| **body** |", "soft_tissue (W 400, L 50)", "| 1 | ", "Dice of decoded", "case_4"):
        assert part in text, part
    assert "nan" not in text and "no verdict from 2 patients, it takes 20" in text
    assert (card / "tokenizer_card.png").read_bytes().startswith(b"\x89PNG")


def test_a_case_that_cannot_be_judged_is_told_and_the_rest_judged(output_dir, tmp_path):
    hu = make_phantom(7, size=24, spacing=16.0)
    for name, volume in (("whole", hu.hu), ("empty", np.full_like(hu.hu, -1000))):
        write_case(tmp_path / "data", name, volume, affine=hu.affine, windows=[], organs={"body": volume > -300})
    settings = {"dataset_dir": str(tmp_path / "data"), "tokenizer": str(output_dir), "output_dir": str(tmp_path)}
    found = TokenizerEvaluation(**settings, split=None).run()
    assert found["data"]["cases"] == 1 and found["data"]["not_judged"] == {"empty": "no body is found in it"}
    assert "Not judged: empty." in (tmp_path / "tokenizer_card.md").read_text()
    assert found["labels"]["body"]["kept"]["mean"] > 0.99
    assert "| body | 100.00 % |" in (tmp_path / "tokenizer_card.md").read_text()


def test_what_lies_beyond_the_grid_is_told(output_dir, tmp_path):
    """A phantom twice as large as the grid; the body's error is of what the grid holds."""
    made = make_phantom(7, size=24, spacing=16.0)
    wide = np.diag([2.0, 2.0, 2.0, 1.0]) @ made.affine
    write_case(tmp_path / "data", "wide", made.hu, affine=wide, windows=[])
    settings = {"dataset_dir": str(tmp_path / "data"), "tokenizer": str(output_dir), "output_dir": str(tmp_path)}
    found = TokenizerEvaluation(**settings, split=None).run()
    inner = made.hu[6:18, 6:18, 6:18]
    share = 1 - np.count_nonzero(inner > -400) / np.count_nonzero(made.hu > -400)
    assert found["beyond"]["mean"] == pytest.approx(share) and share > 0.2
    assert f"beyond the grid: not judged | {100 * share:.2f} % |" in (tmp_path / "tokenizer_card.md").read_text()


def test_no_case_that_can_be_judged_is_one_plain_line(output_dir, tmp_path):
    hu = make_phantom(7, size=24, spacing=16.0)
    write_case(tmp_path / "data", "empty", np.full_like(hu.hu, -1000), affine=hu.affine, windows=[])
    settings = {"dataset_dir": str(tmp_path / "data"), "tokenizer": str(output_dir), "output_dir": str(tmp_path)}
    with pytest.raises(Refused) as end:
        TokenizerEvaluation(**settings, split=None).run()
    assert (
        str(end.value) == "NO_CASES: none of 1 cases can be judged; empty: no body is found in it. Check the dataset."
    )


def test_where_the_card_cannot_go_is_said_before_any_work(output_dir, cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "app.evaluation.tokenizer_evaluation.evaluate_case", lambda *given: pytest.fail("it was said too late")
    )
    (tmp_path / "mine").write_text("x")
    settings = {"dataset_dir": str(cohort), "tokenizer": str(output_dir), "output_dir": str(tmp_path / "mine" / "card")}
    with pytest.raises(Refused, match=f"^NO_OUTPUT: {tmp_path / 'mine'} is a file, output_dir"):
        TokenizerEvaluation(**settings).run()


def test_the_card_lies_beside_the_checkpoint_by_default(output_dir, cohort):
    TokenizerEvaluation(dataset_dir=str(cohort), tokenizer=str(output_dir), max_cases=1).run()
    assert (output_dir / "tokenizer_card.md").is_file()


def run(place, **settings):
    return run_in(place, "bundles/evaluate_tokenizer.json", run_id="run", **dict.fromkeys(TINY), **settings)


def test_bundle_run(place, cohort, output_dir):
    end = run(place, dataset_dir=cohort, tokenizer=output_dir, output_dir="card", split="train")
    assert end.status == 0, end.err[-2000:]
    assert json.loads((place / "card" / "tokenizer_card.json").read_text())["data"]["cases"] == 3


def test_a_missing_tokenizer_is_one_line(place, cohort):
    end = run(place, dataset_dir=cohort, tokenizer="nowhere")
    assert_refused(end, code="NO_TOKENIZER", naming=["nowhere does not exist"])
