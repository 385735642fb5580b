"""Batches made ready beside the device's work: without a card nothing but the work itself."""

import torch

from app.training.side_stream import SideStream


def test_without_a_card_work_is_done_in_place_and_nothing_is_held():
    beside, device = SideStream(), torch.device("cpu")
    with beside(device):
        batch = torch.arange(3)
    beside.hold(batch, device)
    assert batch.tolist() == [0, 1, 2] and beside.stream is None and not beside.held
