"""A new member of a table of choices is one row: a toy row is added and the path that uses it is run.

docs/contributing.md says where each table lies.
"""

import sys
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch

from app.prepare import read_scan
from app.prepare.files import FORMATS, Format, Ref, sniff
from app.prepare.formats import READERS, VolumeFile
from app.training import key_rules
from networks import make_vqvae
from networks.losses import LOSS_TYPES, TokenizerLoss, reconstruction
from networks.presets import PRESETS
from networks.sparse import SparseTensor
from tests.scans import sample
from transforms import Sparsifyd
from transforms.sparse import KEEPS, Keep, densify, fill_for
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
    assert key_rules._are_windows(["toy"])
    network = make_vqvae("tiny", windows=["toy", "lung"])
    assert network.sizes.in_channels == 2


def test_a_sparsification_is_one_row(add_row):
    add_row(KEEPS, "toy", Keep(lambda hu, _, spacing: hu > spacing * 100, "nearest", by_window=False))
    hu = np.zeros((4, 4, 4), np.int16)
    hu[1, 2, 3], hu[0, 0, 0] = 900, 100
    item = Sparsifyd("image", keep="toy")({"image": hu, "affine": np.diag([2.0, 2, 2, 1])})  # kept above 200 HU
    assert item["coords"].tolist() == [[1, 2, 3]] and item["values"].tolist() == [900]
    assert (densify(item["values"], item["coords"], hu.shape, fill=fill_for("toy")) == 900).all()


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


def test_a_preset_is_one_row(add_row):
    add_row(PRESETS, "toy", PRESETS["tiny"].changed(latent_channels=4, num_embeddings=16))
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
