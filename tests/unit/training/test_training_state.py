"""What a resumed run takes from `misc_…` and `warmup_…` files is vetted: whatever is foreign is refused in one line."""

import os

import pytest
import torch

from app.shared.refusals import Refused
from app.training import checkpoints
from app.training.training_state import check_parameters, read_state


def trained(*, steps: int = 3) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    return optimizer


def content(optimizer) -> dict:
    return {"step": 3, "optimizer": optimizer.state_dict(), "schedule": {}, "scaler": {}, "num_averaged": 3}


def saved(folder, misc: dict):
    (folder / "ckpts").mkdir(exist_ok=True)
    checkpoints.save_set(folder, 3, {}, misc)
    return checkpoints.step_file(folder, "misc", 3)


def test_what_was_saved_is_what_is_read(tmp_path):
    optimizer = trained()
    misc = read_state(saved(tmp_path, content(optimizer)), step=3, optimizer=optimizer, counts=("num_averaged",))
    assert misc["num_averaged"] == 3 and misc["step"] == 3
    assert torch.equal(misc["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_an_older_file_without_a_hash_is_read(tmp_path):
    optimizer = trained()
    path = tmp_path / "misc.pt"
    torch.save(content(optimizer), path)
    assert read_state(path, step=3, optimizer=optimizer)["step"] == 3


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def state_of(misc: dict) -> dict:
    return misc["optimizer"]["state"][0]


FOREIGN = {
    "a list": lambda misc: [misc],
    "code": lambda misc: {**misc, "scaler": Code()},
    "no optimizer": lambda misc: {k: v for k, v in misc.items() if k != "optimizer"},
    "another step": lambda misc: {**misc, "step": 4},
    "a step of truth": lambda misc: {**misc, "step": True},
    "averaged too often": lambda misc: {**misc, "num_averaged": 10**9},
    "averaged less than never": lambda misc: {**misc, "num_averaged": -1},
    "averaged a text": lambda misc: {**misc, "num_averaged": "3"},
    "optimizer of a list": lambda misc: {**misc, "optimizer": []},
    "state of a list": lambda misc: {**misc, "optimizer": {**misc["optimizer"], "state": []}},
    "no moments": lambda misc: {**misc, "optimizer": {**misc["optimizer"], "state": {}}},
    "no groups": lambda misc: {**misc, "optimizer": {**misc["optimizer"], "param_groups": []}},
    "groups of text": lambda misc: {**misc, "optimizer": {**misc["optimizer"], "param_groups": ["a"]}},
    "not a number": lambda misc: (state_of(misc)["exp_avg"].fill_(float("nan")), misc)[1],
    "another shape": lambda misc: (state_of(misc).update(exp_avg=torch.zeros(2, 2)), misc)[1],
    "a list for a tensor": lambda misc: (state_of(misc).update(exp_avg=[0.0] * 6), misc)[1],
    "a square below 0": lambda misc: (state_of(misc)["exp_avg_sq"].sub_(1), misc)[1],
    "a moment too few": lambda misc: (state_of(misc).pop("exp_avg_sq"), misc)[1],
    "steps of years": lambda misc: (state_of(misc)["step"].fill_(1e9), misc)[1],
    "a parameter too many": lambda misc: (misc["optimizer"]["state"].update({7: state_of(misc)}), misc)[1],
    "a rate of text": lambda misc: (misc["optimizer"]["param_groups"][0].update(lr="fast"), misc)[1],
    "a scale that is none": lambda misc: {**misc, "scaler": {"scale": float("nan")}},
    "a scaler of a list": lambda misc: {**misc, "scaler": [1.0]},
}


@pytest.mark.parametrize("change", FOREIGN)
def test_foreign_content_is_refused_in_one_line(tmp_path, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = trained()
    path = tmp_path / "misc_step0000003.pt"
    torch.save(FOREIGN[change](content(optimizer)), path)
    with pytest.raises(Refused) as caught:
        read_state(path, step=3, optimizer=trained(), counts=("num_averaged",))
    assert caught.value.code == "BAD_CHECKPOINT" and path.name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "code_ran").exists()


def test_numbers_that_could_be_ours_but_were_not_saved_are_refused(tmp_path):
    optimizer = trained()
    path = saved(tmp_path, content(optimizer))
    misc = checkpoints.read_tensors(path)
    state_of(misc)["exp_avg"].mul_(1.01)
    torch.save(misc, path)
    with pytest.raises(Refused, match="not what was saved"):
        read_state(path, step=3, optimizer=optimizer)


def test_weights_to_go_on_with_have_the_shapes_of_the_run():
    own = {"proj.weight": torch.zeros(2, 3)}
    check_parameters({"proj.weight": torch.ones(2, 3)}, own, path="align_step0000003.pt")
    for foreign in (
        {},
        [],
        {"proj.weight": torch.ones(3)},
        {"proj.weight": [1.0]},
        {"proj.weight": torch.full((2, 3), float("inf"))},
        {"proj.weight": torch.ones(2, 3), "more": torch.ones(1)},
    ):
        with pytest.raises(Refused, match=r"BAD_CHECKPOINT: align_step0000003\.pt"):
            check_parameters(foreign, own, path="align_step0000003.pt")
