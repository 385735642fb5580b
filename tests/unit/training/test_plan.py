"""`scale: auto`: what a run becomes when keys are left open, and what is refused."""

import pytest

from app.phantoms import phantoms
from app.shared.refusals import Refused
from app.training import plan
from app.training.plan import make_plan
from networks.presets import PRESETS


@pytest.fixture(autouse=True)
def no_phantoms(monkeypatch):
    monkeypatch.setattr(phantoms, "ensure_cohort", lambda out: out)


@pytest.mark.parametrize(("stage", "name"), list(enumerate(plan.STAGES)))
def test_without_data_it_is_the_demo(stage, name):
    made = make_plan(stage)
    assert (made.scale, made.preset, made.sizes) == ("demo", "tiny", PRESETS["tiny"])
    assert made.dataset_dir == "outputs/phantoms" and made.num_workers == 0
    assert made.max_steps == plan.DEMO["max_steps"][name] < 2000 and made.learning_rate > 0
    assert (made.max_shift, made.norm, made.quantizer_levels) == (4, "sample", 2)
    assert made.i_save <= made.max_steps and made.val_interval <= made.max_steps


@pytest.mark.parametrize(("stage", "steps", "loss"), [(0, 100_000, "l1"), (1, 100_000, "l1"), (2, 200_000, "l1_l2")])
def test_with_data_it_is_the_real_thing(stage, steps, loss):
    made = make_plan(stage, dataset_dir="cohort")
    assert (made.scale, made.preset, made.dataset_dir) == ("full", "base", "cohort")
    assert (made.max_steps, made.learning_rate, made.lr_scheduler, made.loss_type) == (steps, 1e-4, "cosine", loss)
    assert (made.max_shift, made.norm, made.quantizer_levels) == (0.25, "voxel", 1)
    assert make_plan(stage, dataset_dir="cohort", preset="direct3d_s2").norm == "sample", "as published"
    assert made.batch_size_per_gpu == 2 and (made.i_print, made.i_save) == (100, 5000)


def test_scale_and_preset_can_be_forced_and_are_said(caplog):
    with caplog.at_level("INFO"):
        made = make_plan(1, scale="demo", dataset_dir="cohort", preset="base")
    assert (made.scale, made.preset, made.dataset_dir) == ("demo", "base", "cohort")
    assert "scale demo" in caplog.text and "preset base" in caplog.text and "cohort" in caplog.text


def test_windows_are_all_four_or_those_asked_for():
    assert make_plan(1).windows == ["lung", "bone", "soft_tissue", "brain"]
    assert make_plan(1, window_type="bone").windows == ["bone"]
    assert make_plan(1, windows=["lung", "brain"]).windows == ["lung", "brain"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scale": "full"}, "NO_DATA: scale full needs data"),
        ({"scale": "huge"}, "BAD_VALUE: scale must be auto, demo or full, got 'huge'"),
        ({"preset": "giant"}, "BAD_VALUE: preset must be one of tiny, base, large, direct3d_s2, got 'giant'"),
        ({"windows": ["lung"], "window_type": "bone"}, "BAD_VALUE: windows and window_type are both given"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(Refused) as end:
        make_plan(1, **settings)
    assert end.value.status == 2 and str(end.value).startswith(says)


@pytest.mark.parametrize(
    ("key", "environment", "chosen"),
    [(None, None, "auto"), (None, "spconv", "spconv"), ("torch", "spconv", "torch"), (None, "torchsparse", "auto")],
)
def test_the_key_wins_over_the_environment_and_foreign_backends_mean_auto(
    key, environment, chosen, monkeypatch, caplog
):
    if environment:
        monkeypatch.setenv("SPARSE_BACKEND", environment)
    with caplog.at_level("INFO"):
        assert make_plan(1, sparse_backend=key).sparse_backend == chosen
    assert ("SPARSE_BACKEND=torchsparse is not among" in caplog.text) == (environment == "torchsparse")


def test_an_alignment_speaks_of_what_the_demo_can_show_and_of_everything_in_data(tmp_path, monkeypatch):
    from app.language import align_setup

    monkeypatch.setattr(align_setup.qwen, "family_of", lambda name: "qwen2_vl")
    (tmp_path / "reports.csv").write_text("image,report\n")
    demo, full = align_setup.make_align_plan(), align_setup.make_align_plan(data=str(tmp_path / "reports.csv"))
    assert (demo.scale, demo.about, demo.language, demo.train_language) == (
        "demo",
        ["pleural effusion"],
        "tiny_qwen2_vl",
        True,
    )
    assert (full.scale, full.about, full.language, full.train_language) == (
        "full",
        None,
        align_setup.STOCK_MODEL,
        False,
    )
    assert not align_setup.make_align_plan(use_lora=True).train_language
    assert align_setup.make_align_plan(dummy_data=True, dummy_samples=9).num_phantoms == 9
