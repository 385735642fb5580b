"""What a run's pictures show: the patient's right on the left and named, the case, differences in HU."""

import numpy as np
from matplotlib.figure import Figure

from app.prepare import preview
from app.shared.sides import write_sides
from app.training import pictures


def sample(case="case_7", channels=2):
    image = np.full((channels, 20, 16), -1.0, np.float32)
    image[:, 12:] = 1  # the patient's right: x runs from left to right
    codes = np.zeros((2, 2), np.float32)
    return pictures.Sample(case, ("lung", "soft_tissue")[:channels], image, image + 0.5, codes)


def drawn(monkeypatch, tmp_path, samples):
    figures = []
    monkeypatch.setattr(pictures, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    pixels = pictures.montage(samples, tmp_path / "m.png", title="a run")
    return figures[0], pixels


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_montage_names_sides_case_and_window_and_gives_differences_in_hu(monkeypatch, tmp_path):
    figure, pixels = drawn(monkeypatch, tmp_path, [sample(), sample("case_8")])
    panels = [axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]
    assert len(panels) == 3 * 4  # the first case in both windows, the second in the first
    assert [texts(axes)[-1] for axes in panels[::4]] == ["case_7\nlung", "case_7\nsoft_tissue", "case_8\nlung"]
    for axes in panels:
        assert texts(axes)[:4] == ["R", "L", "S", "I"]
        places = [text.get_position() for text in axes.texts[:4]]
        assert places[0][0] < 0.1 and places[1][0] > 0.9 and places[2][1] > 0.9 and places[3][1] < 0.1
    shown = panels[0].images[0].get_array()  # (Z, X) as drawn: what is bright lies at the patient's right
    assert (shown[:, :8] == 1).all() and (shown[:, 8:] == -1).all()
    changes = [panels[at].images[0] for at in (2, 6)]
    assert [float(change.get_array().max()) for change in changes] == [0.5 * 750, 0.5 * 200]
    assert [change.get_clim() for change in changes] == [(-750, 750), (-200, 200)]
    scales = [axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert scales == ["HU, red: too high"] * 3
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and np.ptp(pixels) > 200


def test_channels_that_are_no_windows_are_not_called_hu(monkeypatch, tmp_path):
    figure, _ = drawn(monkeypatch, tmp_path, [sample(channels=1)._replace(windows=())])
    assert "channel 0" in texts(figure.axes[0])[-1]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>"] == [
        "of the features, red: too high"
    ]


def test_a_preview_names_sides_and_case(tmp_path, monkeypatch):
    figures = []
    stock = Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *a, **k: figures.append(self) or stock(self, *a, **k))
    hu = np.full((24, 24, 24), -1000, np.int16)
    hu[6:18, 6:18, 6:18] = 40
    preview.write_preview(tmp_path, "case_9", hu, ("lung",), 4.0)
    (figure,) = figures
    assert figure.get_suptitle() == "case_9"
    seen = {axes.get_title().rpartition(" ")[2]: "".join(texts(axes)) for axes in figure.axes}
    assert seen == {"axial": "RLAP", "coronal": "RLSI", "sagittal": "PASI"}
    for axes in figure.axes:  # where R is said to be, x is high; where A is, y is
        low, high = axes.get_xlim()
        assert (low > high) == (not axes.get_title().endswith("sagittal"))


def test_letters_are_the_same_on_any_axes():
    axes = Figure().subplots()
    write_sides(axes, "sagittal")
    assert texts(axes) == ["P", "A", "S", "I"]
