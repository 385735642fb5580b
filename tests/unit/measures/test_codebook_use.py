"""When the use of a codebook counts as collapsed."""

import pytest
import torch

from app.measures.tokenizer_metrics import is_collapsed


@pytest.mark.parametrize(
    ("counts", "collapsed"),
    [
        ([100, 0, 0, 0], True),
        ([97, 1, 1, 1], True),
        ([50, 50, 0, 0], False),
        ([1, 0, 0, 0], False),  # one latent cannot use two codes
        ([10] * 81 + [0] * 8111, False),  # 810 latents of 8192 codes: 81 are a tenth of what they could use
        ([1000] * 81 + [0] * 8111, True),  # of 81,000 latents: under a hundredth of the codes
        ([1000] * 83 + [0] * 8109, False),
    ],
)
def test_a_codebook_is_collapsed_when_one_code_or_under_a_hundredth_is_in_use(counts, collapsed):
    assert is_collapsed(torch.tensor(counts, dtype=torch.float64)) is collapsed
