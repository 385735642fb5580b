"""The three stages one after another as a user runs them, the recipes over them, and resuming each to the bit."""

import json
import re
import shutil

import pytest
import torch

from app.training import checkpoints, seals
from app.training.step import TrainStep
from tests.runs import make_place, rows_of, run_in, timeless, weights_of

STEPS = {"max_steps": 6, "i_save": 3, "val_interval": 3}
STAGES = ("vae", "vq_stage1", "vq_stage2")


def run(place, stage, cohort, *overlays, **settings):
    files = [f"bundles/{name}.json" for name in (stage, *overlays)]
    mine = {"num_embeddings": None, **settings} if stage == "vae" else settings
    return run_in(place, str(files) if overlays else files[0], dataset_dir=cohort, **{**STEPS, **mine})


def story(folder):
    """Every row, less what another machine would tell otherwise."""
    return timeless(rows_of(folder, None))


def changed(first, second):
    return {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}


@pytest.fixture(scope="module")
def chain(cohort, tmp_path_factory):
    """Every stage with its default folders: each finds the one before."""
    place = make_place(tmp_path_factory.mktemp("chain"))
    ends = {}
    for stage in STAGES:
        ends[stage] = run(place, stage, cohort)
        assert ends[stage].status == 0, ends[stage].err
    return place, ends


@pytest.fixture
def earlier(chain, place):
    shutil.copytree(chain[0] / "outputs", place / "outputs")
    return place / "outputs"


def test_each_stage_finds_the_one_before_and_says_so(chain):
    ends = chain[1]
    assert re.search(
        r"autoencoder weights from outputs/vae/ckpts/vae_ema0.9999_step000000[36].pt", ends["vq_stage1"].out
    )
    assert "Warm-up" not in ends["vq_stage1"].out
    assert re.search(r"weights from outputs/vq_stage1/ckpts/vqvae_ema0.9999_step000000[36].pt", ends["vq_stage2"].out)


def test_stage_0_trains_all_but_has_no_codes(chain):
    out = chain[0] / "outputs/vae"
    assert changed(weights_of(out, 3, "vae"), weights_of(out, 6, "vae")) == {"encoder", "decoder", "subdivision"}
    assert not [name for name in weights_of(out, 6, "vae") if name.startswith("vq.")]
    fixed = [line for line in (out / "vae_model_summary.txt").read_text().splitlines() if line.endswith(" False")]
    assert len(fixed) == 8 and all("coder.components." in line or "coder.hu." in line for line in fixed)
    rows = [row for row in story(out) if "loss" in row]
    assert all(row["kl"] > 0 and row["vq"] == 0 for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(row["recon"] + 0.03 * row["kl"] + 0.1 * row["subdivision"], rel=1e-5)


def test_stage_1_trains_the_codebook_alone(chain):
    out = chain[0] / "outputs/vq_stage1"
    assert changed(weights_of(out, 3), weights_of(out, 6)) == {"vq", "subdivision"}
    source = checkpoints.read_tensors(checkpoints.averaged_file(chain[0] / "outputs/vae"))
    kept = weights_of(out, 6)
    assert all(torch.equal(source[n], kept[n]) for n in source if n.startswith(("encoder.", "decoder.")))


def test_stage_2_trains_everything_from_stage_1(chain):
    out = chain[0] / "outputs/vq_stage2"
    assert changed(weights_of(out, 3), weights_of(out, 6)) == {"encoder", "decoder", "vq", "subdivision"}
    for row in story(out):
        if "loss" in row:
            terms = row["recon"] + 0.25 * row["commitment"] + 0.1 * row["subdivision"]
            assert row["loss"] == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_resumes_to_the_bit(chain, earlier, place, cohort, stage):
    out, name = earlier / stage, "vae" if stage == "vae" else "vqvae"
    for part in (name, f"{name}_ema0.9999", "misc"):
        checkpoints.step_file(out, part, 6).unlink()
    end = run(place, stage, cohort, resume="latest")
    assert end.status == 0 and "resumed at step 3" in end.out, end.err
    assert story(out) == story(chain[0] / "outputs" / stage)
    assert not changed(weights_of(out, 6, name), weights_of(chain[0] / "outputs" / stage, 6, name))


@pytest.mark.parametrize("name", ["ExponentialLR", "cosine"])
def test_other_schedules_resume_to_the_bit(earlier, place, cohort, name):
    settings = {"lr_scheduler": name, "max_steps": 6}
    if name == "ExponentialLR":
        settings["lr_scheduler_options"] = "{'gamma': 0.9}"
    assert run(place, "vq_stage2", cohort, output_dir="a", **settings).status == 0
    shutil.copytree(place / "a", place / "b")
    for part in ("vqvae", "vqvae_ema0.9999", "misc"):
        checkpoints.step_file(place / "b", part, 6).unlink()
    end = run(place, "vq_stage2", cohort, output_dir="b", resume=3, **settings)
    assert end.status == 0, end.err
    assert story(place / "b") == story(place / "a")
    assert "the schedule was brought" not in end.out, "nothing changed"
    rates = [row["lr"] for row in story(place / "a") if "lr" in row]
    if name == "ExponentialLR":
        assert rates == pytest.approx([5e-4 * 0.9**n for n in range(1, 7)], rel=1e-4)
    assert rates[-1] < rates[0] <= 5e-4


def test_a_resumed_run_takes_its_own_rate_and_length(earlier, place, cohort):
    settings = {"learning_rate": 1e-5, "lr_scheduler": "constant", "warmup_lr_steps": 0, "max_steps": 9}
    end = run(place, "vq_stage2", cohort, resume="latest", **settings)
    assert end.status == 0, end.err
    rows = [row for row in story(earlier / "vq_stage2") if "lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["lr"] for row in rows[6:]] == [1e-5] * 3 and rows[0]["lr"] > 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-4},
        {"lr_scheduler_options": "{'step_size': 4}"},
        {"lr_scheduler": "cosine", "lr_scheduler_options": None},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_resumed_run_has_the_rates_of_a_run_that_had_its_settings_all_along(earlier, place, cohort, changes):
    began = {"lr_scheduler": "StepLR", "lr_scheduler_options": "{'step_size': 2}"}
    assert run(place, "vq_stage2", cohort, output_dir="a", **began).status == 0
    end = run(place, "vq_stage2", cohort, output_dir="a", resume=3, **{**began, **changes})
    assert end.status == 0, end.err
    assert run(place, "vq_stage2", cohort, output_dir="b", **{**began, **changes}).status == 0
    resumed, all_along = ([row["lr"] for row in story(place / name) if "lr" in row] for name in "ab")
    assert resumed[3:] == all_along[3:] and resumed[:3] != all_along[:3]
    assert "the schedule was brought to step 3 with this run's settings" in end.out


def test_the_original_recipe_resumed_takes_a_lower_rate(earlier, place, cohort):
    assert run(place, "vq_stage1", cohort, "recipe_ct").status == 0  # its codebook learns by gradient
    assert run(place, "vq_stage2", cohort, "recipe_ct").status == 0
    end = run(place, "vq_stage2", cohort, "recipe_ct", resume=3, learning_rate=1e-5)
    assert end.status == 0, end.err
    rates = [row["lr"] for row in story(earlier / "vq_stage2") if "lr" in row]
    decay = 0.01 ** (1 / 6)  # to a hundredth at the last of six steps
    assert rates == pytest.approx(
        [r * decay**n for n, r in enumerate([5e-3] * 3 + [1e-5] * 3, start=1)], rel=1e-3, abs=1e-8
    )
    assert rates[-1] == pytest.approx(1e-7, rel=1e-3)


def test_a_codebook_that_collapses_is_told_while_it_happens_and_what_to_do(earlier, place, cohort, monkeypatch):
    real = TrainStep.__call__

    def collapse(self, engine, batch):
        totals = real(self, engine, batch)
        if engine.state.iteration in (3, 4):
            self.codes = [torch.full_like(codes, 7) for codes in self.codes]
        return totals

    monkeypatch.setattr(TrainStep, "__call__", collapse)
    end = run(place, "vq_stage2", cohort, output_dir="new")
    assert end.status == 0, end.err
    (line,) = [line for line in end.out.splitlines() if "COLLAPSED_CODEBOOK" in line]
    assert "at step 3 1 of 16 codes" in line and "--learning_rate" in line and "--codebook ema" in line
    assert end.out.index("Step 2:") < end.out.index(line) < end.out.index("Step 4:")
    assert "the codebook is in use again at step 5" in end.out


def test_the_decoder_may_adapt_first(earlier, place, cohort):
    end = run(place, "vq_stage2", cohort, output_dir="held", decoder_steps=3, i_save=1, keep_last=9)
    assert end.status == 0, end.err
    held = place / "held"
    assert "encoder" not in changed(weights_of(held, 1), weights_of(held, 3))
    assert "decoder" in changed(weights_of(held, 1), weights_of(held, 3))
    assert "encoder" in changed(weights_of(held, 3), weights_of(held, 4))


@pytest.mark.parametrize(
    ("stage", "overlay"), [("vq_stage1", "recipe_ct"), ("vq_stage2", "recipe_ct"), ("vq_stage1", "recipe_shapellm")]
)
def test_the_original_recipes_run(earlier, place, cohort, stage, overlay):
    if (stage, overlay) == ("vq_stage2", "recipe_ct"):  # stage 1 of the same recipe: its codebook learns by gradient
        assert run(place, "vq_stage1", cohort, "recipe_ct").status == 0
    end = run(place, stage, cohort, overlay, output_dir="recipe")
    assert end.status == 0, end.err
    config = json.loads((place / "recipe/config.json").read_text())
    assert config["codebook"] == ("gradient" if overlay == "recipe_ct" else "ema")
    summary = (place / "recipe/vqvae_model_summary.txt").read_text()
    assert re.search(r"vq\.\S*embeddings.weight .* (True|EMA)\n", summary)[1] == (
        "True" if overlay == "recipe_ct" else "EMA"
    )


@pytest.mark.parametrize(
    "settings", [{"amp": "bf16"}, {"use_checkpoint": True}, {"codebook": "fsq"}, {"device": "cpu"}], ids=str
)
def test_switches_run(earlier, place, cohort, settings):
    end = run(place, "vq_stage1", cohort, output_dir="switched", **settings)
    assert end.status == 0, end.err
    rows = [row for row in story(place / "switched") if "loss" in row]
    plain = [row for row in story(earlier / "vq_stage1") if "loss" in row]
    if "use_checkpoint" in settings or "device" in settings:
        assert rows == plain
    elif settings.get("codebook") == "fsq":  # one code a cell beside the demo's twelve
        assert min(row["recon"] for row in rows[1:]) < rows[0]["recon"] < 0.5  # each step sees another sample
    else:
        assert all(abs(a["loss"] - b["loss"]) < 0.3 for a, b in zip(rows, plain, strict=True))


def refusal(end):
    assert end.status == 2 and len(end.error.splitlines()) == 1, end.err[-2000:]
    return end.error


def test_stage_2_from_a_stage_0_file_is_refused(earlier, place, cohort):
    line = refusal(run(place, "vq_stage2", cohort, output_dir="new", init_from="outputs/vae"))
    assert line.startswith("NO_CODEBOOK") and "stage 1" in line


def spoilt(state, how):
    """A checkpoint that loads, with something wrong inside."""
    if how == "lacks":
        return {name: tensor for name, tensor in state.items() if name != "encoder.out_layer.bias"}
    if how == "shape":
        return {**state, "encoder.out_layer.bias": torch.zeros(3)}
    return {**state, "_extra_state": torch.zeros(5, dtype=torch.uint8)}


@pytest.mark.parametrize("how", ["lacks", "shape", "sizes"])
def test_a_checkpoint_with_something_wrong_inside_is_refused(earlier, place, cohort, how):
    state = checkpoints.read_tensors(checkpoints.averaged_file(earlier / "vq_stage1"))
    state["_extra_state"] = seals.unsealed(state["_extra_state"])  # as older files: without the hash of the rest
    torch.save(spoilt(state, how), place / "spoilt.pt")
    line = refusal(run(place, "vq_stage2", cohort, output_dir="new", init_from="spoilt.pt"))
    assert line.startswith("BAD_CHECKPOINT") and "spoilt.pt" in line
    assert ("encoder.out_layer.bias" in line) == (how != "sizes")


def test_a_file_that_is_no_checkpoint_is_refused(place, cohort):
    (place / "text.pt").write_text("hello")
    line = refusal(run(place, "vq_stage2", cohort, output_dir="new", init_from="text.pt"))
    assert line.startswith("BAD_CHECKPOINT: text.pt cannot be read (it is no checkpoint")


@pytest.mark.parametrize("options", [None, "{'gama': 0.9}"])
def test_wrong_options_of_a_schedule_are_one_line(place, cohort, options):
    line = refusal(run(place, "vae", cohort, lr_scheduler="ExponentialLR", lr_scheduler_options=options))
    assert line.startswith("BAD_VALUE: lr_scheduler ExponentialLR") and "gam" in line


@pytest.mark.parametrize(
    ("value", "says"), [("$1/0", "division by zero"), ("$foo", "'foo' is not defined"), ("$1 if", "invalid syntax")]
)
def test_an_expression_that_fails_is_one_line(place, cohort, value, says):
    line = refusal(run(place, "vae", cohort, learning_rate=value))
    assert line.startswith(f"BAD_EXPRESSION: {value} gives ") and says in line


def test_stage_2_without_stage_1_is_refused_on_the_users_data(place, cohort):
    line = refusal(run(place, "vq_stage2", cohort, scale="full", preset="tiny", init_from="nowhere"))
    assert line.startswith("NO_STAGE1") and "vq_stage1.json" in line


def test_stage_2_of_other_data_is_refused(earlier, place, cohort):
    line = refusal(run(place, "vq_stage2", cohort, output_dir="new", windows="['lung','bone']"))
    assert line.startswith("OTHER_TOKENIZER") and "--windows \"['lung', 'bone', 'soft_tissue', 'brain']\"" in line
