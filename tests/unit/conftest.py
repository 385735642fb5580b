"""What unit tests share: a tiny tokenizer's output folder, and two prepared cases for it."""

import numpy as np
import pytest

from app.dataset import writer
from app.tokens.tokenizer import CTTokenizer
from tests.tiny_tokenizer import AFFINE, hu_volume, make_network, save


@pytest.fixture(scope="session")
def output_dir(tmp_path_factory):
    return save(make_network(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A prepared dataset of two cases."""
    folder = tmp_path_factory.mktemp("prepared")
    side = {"source_shape": [60, 60, 60], "source_affine": np.diag([-2.0, -2.0, 5.0, 1.0]).tolist()}
    for name, shift in (("case_a", 0), ("case_b", 1)):
        hu = np.roll(hu_volume(), shift, 0)
        writer.write_case(folder, name, hu, affine=AFFINE, windows=["lung"], sidecar=side)
    return folder


@pytest.fixture
def tokenizer(output_dir):
    return CTTokenizer.from_pretrained(output_dir, device="cpu")
