"""What contract tests of samples share: a small prepared dataset."""

import numpy as np
import pytest

from app.dataset import writer
from tests.sample_data import blob


@pytest.fixture
def dataset_dir(tmp_path, rng):
    """Five training and two validation cases of different size, 24 voxels of 4 mm."""
    root, rows = tmp_path / "set", []
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    for number in range(7):
        case = writer.write_case(root, f"case{number}", blob(rng, 7 + number / 2), affine=affine, windows=["lung"])
        row = writer.metadata_row(case, windows=["lung"])
        rows.append({**row, "split": "val" if number >= 5 else "train"})
    writer.write_metadata(root, rows)
    return root
