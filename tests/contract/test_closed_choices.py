"""A new member of a table of choices is one row: a toy row is added and the path that uses it is run.

docs/contributing.md says where each table lies.
"""

import json
import shutil
import sys
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.evaluation import answer_pages, answer_scores
from app.measures.findings import FINDING_SCORES, FindingScore
from app.prepare import read_scan
from app.prepare.files import Ref, sniff
from app.prepare.formats import READERS
from app.prepare.volume_file import VolumeFile
from app.shared.refusals import Refused
from app.shared.scan_formats import FORMATS, Format
from app.text.manifests import read_rows
from app.text.rows import TextRow
from app.training import checkpoints, key_rules, pictures, preflight, train
from networks import make_vqvae, presets, projector, qwen, tiny_qwen
from networks.fsq import FiniteScalarQuantizer
from networks.losses import LOSS_TYPES, TokenizerLoss, reconstruction
from networks.presets import PRESETS, Preset
from networks.residual import QUANTIZERS
from networks.sparse import SparseTensor
from tests.scans import sample
from transforms import RandTranslated, Sparsifyd
from transforms.sparse import KEEPS, Keep, densify
from transforms.windows import WINDOWS, hu_from_windows, window_file_name, window_values


@pytest.fixture
def add_row(monkeypatch):
    """Puts one more row into a table, wherever it is imported."""

    def add(table, name, row):
        longer = MappingProxyType({**table, name: row})
        for module in list(sys.modules.values()):
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if value is table:
                    monkeypatch.setattr(module, attribute, longer)

    return add


def test_a_window_is_one_row(add_row):
    add_row(WINDOWS, "toy", (100, 1000))
    assert window_file_name("toy") == "toy_w100_l1000.npy"
    values = window_values(np.array([950, 1000, 1025]), ["toy"])
    assert values[:, 0].tolist() == [-1, 0, 0.5] and hu_from_windows(values, ["toy"])[1:].tolist() == [1000, 1025]
    assert key_rules._are_of(WINDOWS)(["toy"])
    network = make_vqvae("tiny", windows=["toy", "lung"])
    assert network.sizes.in_channels == 2


def test_a_sparsification_is_one_row(add_row):
    add_row(KEEPS, "toy", Keep(lambda hu, _, spacing: hu > spacing * 100, "nearest", by_window=False))
    hu = np.zeros((4, 4, 4), np.int16)
    hu[1, 2, 3], hu[0, 0, 0] = 900, 100
    item = Sparsifyd("image", keep="toy")({"image": hu, "affine": np.diag([2.0, 2, 2, 1])})  # kept above 200 HU
    assert item["coords"].tolist() == [[1, 2, 3]] and item["values"].tolist() == [900]
    assert (densify(item["values"], item["coords"], hu.shape, fill=KEEPS["toy"].fill) == 900).all()


def test_a_reconstruction_error_is_one_row(add_row):
    add_row(LOSS_TYPES, "toy", lambda diff: diff.abs() ** 3)
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)
    truth = SparseTensor(torch.zeros(2, 1), coords, spatial_shape=(8, 8, 8), batch_size=1)
    loss = reconstruction(truth.replace(torch.tensor([[2.0], [0.0]])), truth, loss_type="toy")
    assert loss.item() == 4.0


def test_a_loss_term_is_a_value_of_the_forward_pass_and_a_weight():
    loss = TokenizerLoss()
    loss.weights["toy"] = 2.0
    network = make_vqvae("tiny", windows=["lung"])
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)
    x = SparseTensor(torch.zeros(2, 1), coords, spatial_shape=(48, 48, 48), batch_size=1)
    output = network(x)._asdict()
    plain = TokenizerLoss()(SimpleNamespace(**output), x)["loss"]
    terms = loss(SimpleNamespace(**output, toy=torch.tensor(3.0, requires_grad=True)), x)
    assert terms["toy"] == 3 and terms["loss"].item() == pytest.approx(plain.item() + 6, rel=1e-5)


def test_a_codebook_is_a_name_and_a_row(add_row, monkeypatch):
    class Halves(FiniteScalarQuantizer):
        """Codes of which only the lower half is used."""

        def forward(self, rows):
            return super().forward(-rows.abs())

    monkeypatch.setattr(presets, "CODEBOOKS", (*presets.CODEBOOKS, "toy"))
    add_row(QUANTIZERS, "toy", lambda sizes: Halves(sizes.num_embeddings, sizes.latent_channels))
    stage = json.loads((train.bundles_folder() / "vq_stage1.json").read_text())
    levels = ConfigParser({**stage, "demo": True, "codebook": "toy"}).get_parsed_content("quantizer_levels")
    network = make_vqvae(
        "tiny", codebook="toy", num_embeddings=64, resolution=16, windows=["lung"], quantizer_levels=levels
    )
    assert levels == 1, "what knows of no levels is asked for none"
    assert type(network.vq) is Halves and network.sizes.codebook == "toy"
    coords = torch.nn.functional.pad(torch.ones(16, 16, 16).nonzero(), (1, 0)).int()
    x = SparseTensor(torch.rand(len(coords), 1), coords, spatial_shape=(16,) * 3, batch_size=1)
    tokens = network.eval().encode(x)
    assert len(tokens.codes) == 8 and network.decode(tokens).feats.isfinite().all()
    assert type(checkpoints.build_vqvae(Preset.from_tensor(network.sizes.to_tensor())).vq) is Halves


def test_a_language_family_is_a_row_and_its_class(monkeypatch, tmp_path):
    stock = qwen.FAMILIES["qwen3_vl"]

    class ToyConfig(stock.config_class):
        model_type = "toy_vl"

    class Toy(stock):
        config_class = ToyConfig

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "toy_vl", ToyConfig)  # as its package would
    language, words = tiny_qwen.build_tiny(["left right nodule"], family="qwen3_vl", width=32, num_layers=1)
    language.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "toy_vl", "architectures": ["Toy"]}))
    with pytest.raises(ValueError, match=r"must be a Qwen2-VL or Qwen3-VL, got .* of type toy_vl"):
        qwen.load_language(tmp_path)
    monkeypatch.setitem(qwen.FAMILIES, "toy_vl", Toy)
    loaded, _ = qwen.load_language(tmp_path)
    ids = torch.tensor([words.encode("left nodule")])
    with torch.no_grad():
        given, expected = (model.eval()(input_ids=ids).logits for model in (loaded, language))
    assert type(loaded) is Toy and torch.allclose(given, expected, atol=1e-5)


def test_a_training_stage_is_a_file_with_both_its_defaults(tmp_path, monkeypatch):
    shutil.copytree(train.bundles_folder(), tmp_path / "bundles")
    config = json.loads((tmp_path / "bundles" / "vq_stage1.json").read_text())
    config["max_steps"] = "$7 if @demo else 70_000"
    (tmp_path / "bundles" / "toy_stage.json").write_text(json.dumps(config))
    monkeypatch.setattr(train, "bundles_folder", lambda: tmp_path / "bundles")
    assert "toy_stage" in train.stages()
    parser = ConfigParser(preflight.load_config([str(train._file_of("toy_stage"))]))
    parser["demo"] = True
    assert parser.get_parsed_content("max_steps") == 7
    with pytest.raises(Refused, match=r"UNKNOWN_STAGE: there is no stage toy_stages\. Did you mean toy_stage"):
        train._file_of("toy_stages")


def test_an_output_picture_is_one_row(add_row, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(pictures, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    looked = pictures.PICTURES["input"].look
    add_row(
        pictures.PICTURES,
        "toy",
        pictures.Picture(lambda sample, channel, half: sample.image[channel] * 0 + half, looked),
    )
    image = np.zeros((1, 8, 6), np.float32)
    pictures.montage([pictures.Sample("c", ("lung",), image, image, np.zeros((1, 1)))], tmp_path / "m.png", title="t")
    shown = {axes.get_title(): axes.images[0].get_array() for axes in figures[0].axes if axes.get_title()}
    assert list(shown) == ["input", "reconstruction", "difference", "codes", "toy"]
    assert (shown["toy"] == 750).all()


def test_a_clinical_metric_is_one_row(add_row):
    add_row(FINDING_SCORES, "toy", FindingScore(lambda counts: float(counts.false_alarms.sum()), is_tested=True))
    rows = [TextRow(f"c{n}", "Report?", "a pleural effusion", kind="report", patient=f"p{n}") for n in range(4)]
    names = (*answer_scores.COLUMNS, "reference")
    answers = {name: ["a pleural effusion"] * 4 for name in names} | {"real": ["emphysema and a pleural effusion"] * 4}
    reports = answer_scores.report_scores(rows, answers)
    assert reports["findings"]["scores"]["real"]["toy"] == 4
    answer_scores.add_verdicts(reports, reports["findings"])
    gap = reports["findings"]["gaps"]["shuffled"]["toy"]
    assert gap["difference"] == 4 and gap["verdict"]
    result = {"rows": 4, "patients": 4, "left_out": {}, "questions": None, "reports": reports}
    (line,) = [line for line in answer_pages.table_lines(result) if line.startswith("| findings: toy")]
    assert line.startswith("| findings: toy | 4.000 | 0.000 |")


def test_a_preset_is_one_row(add_row):
    add_row(PRESETS, "toy", PRESETS["tiny"].changed(latent_channels=4, num_embeddings=16))
    assert key_rules.PRESETS["toy"].num_embeddings == 16
    network = make_vqvae("toy")
    assert network.vq.codebook.shape == (16, 4)


def test_a_raw_format_is_a_row_and_a_reader(add_row, tmp_path):
    hu = sample(np.diag([2.0, 2, 2, 1]), (12, 10, 8)).astype(np.int16)
    path = tmp_path / "scan.toy"
    path.write_bytes(b"TOY!" + np.asfortranarray(hu).astype("<i2").tobytes(order="F"))

    def read_toy(ref):
        return VolumeFile(ref, ref, hu.shape, np.diag([2.0, 2, 2, 1]), "<i2", 4, "raw")

    assert sniff(Ref(str(path))) == "other"
    add_row(FORMATS, "toy", Format(lambda head: head[:4] == b"TOY!", (".toy",)))
    add_row(READERS, "toy", read_toy)
    assert sniff(Ref(str(path))) == "toy"
    (volume,) = read_scan(path, assume_hu=True)
    assert (volume.hu == hu).all() and volume.affine[0, 0] == 2
    (tmp_path / "scan.txt").write_text("No nodule.")
    (row,) = read_rows(tmp_path)
    assert row.path == path and row.patient == "scan", "its name is known without its ending too"


def test_a_limit_is_changed_in_one_place(monkeypatch):
    def allows(name, value):
        return key_rules.RULES[name].allows(value)

    assert allows("quantizer_levels", 64) and allows("projector_layers", 64) and allows("max_shift", 0.9)
    monkeypatch.setitem(presets.LIMITS, "quantizer_levels", (1, 2))
    monkeypatch.setattr(projector, "MAX_LAYERS", 2)
    assert [allows(name, 2) for name in ("quantizer_levels", "projector_layers")] == [True, True]
    assert [allows(name, 3) for name in ("quantizer_levels", "projector_layers")] == [False, False]
    with pytest.raises(ValueError, match=r"quantizer_levels must be within 1 and 2, got 3"):
        make_vqvae("tiny", quantizer_levels=3)
    with pytest.raises(ValueError, match=r"projector_layers must lie in 1\.\.2, got 3"):
        projector.Projector(8, 12, num_layers=3)


def test_rules_ask_constructors_for_their_limits(monkeypatch):
    made = RandTranslated.__init__

    def half_at_most(self, *keys, max_shift):
        if max_shift > 0.5:
            raise ValueError("max_shift must be at most a half")
        made(self, *keys, max_shift=max_shift)

    monkeypatch.setattr(RandTranslated, "__init__", half_at_most)
    assert [key_rules.RULES["max_shift"].allows(share) for share in (0.5, 0.6)] == [True, False]
