"""Options of a request: shown as a viewer needs them, and nothing unchecked gets further."""

import pytest

from app.serving import options
from app.serving.options import Options
from networks.presets import preset

SIZES = preset("tiny")
LEVELS = SIZES.changed(quantizer_levels=3)


def test_defaults_come_first_and_levels_only_where_there_are_several():
    assert options.shown("tokenize", SIZES, budget=None) == {"support": False}
    assert options.shown("tokenize", LEVELS, budget=None) == {"levels": [3, 2, 1], "support": False}
    assert options.shown("reconstruct", SIZES, budget=None)["window"][:2] == ["HU", "lung"]
    assert options.shown("report", SIZES, budget=40) == {"max_3d_tokens": [40, 20, 10], "max_new_tokens": 256}


def test_what_a_client_sends_back_is_read_as_it_means_it():
    shown = options.shown("reconstruct", LEVELS, budget=None)
    assert options.read("reconstruct", shown, shown) == Options(window=None, levels=3)  # echoed whole
    assert options.read("reconstruct", {"window": "bone", "levels": "2"}, shown) == Options(window="bone", levels=2)
    assert options.read("reconstruct", {"device": "cuda", "image": "/x"}, shown) == Options()
    asked = options.shown("ask", SIZES, budget=40)
    assert options.read("ask", {"question": " why? "}, asked) == Options(question="why?")


@pytest.mark.parametrize(
    ("model", "sent"),
    [
        ("reconstruct", {"window": "wide"}),
        ("reconstruct", {"window": {"lung": 1}}),
        ("reconstruct", {"levels": 4}),
        ("reconstruct", {"levels": "-1"}),
        ("reconstruct", {"levels": 1.5}),
        ("reconstruct", {"levels": True}),
        ("tokenize", {"support": "perhaps"}),
        ("ask", {}),
        ("ask", {"question": "   "}),
        ("ask", {"question": "x" * 2001}),
        ("ask", {"question": {"a": 1}}),
        ("ask", {"question": "why?", "max_3d_tokens": 41}),
        ("ask", {"question": "why?", "max_new_tokens": 100000}),
    ],
)
def test_an_option_out_of_its_choices_is_refused_in_our_own_words(model, sent):
    with pytest.raises(ValueError) as caught:
        options.read(model, sent, options.shown(model, LEVELS, budget=40))
    assert caught.value.code == "BAD_VALUE" and "xx" not in str(caught.value)
