"""The picture of a tokenizer's card."""

import pytest
from matplotlib.figure import Figure

from app.evaluation import card


@pytest.mark.parametrize(("levels", "named"), [(1, [""]), (4, [0, 1, 2, 3]), (24, [0, 23])])
def test_the_legend_of_code_use_has_room(levels, named):
    axis = Figure().subplots()
    codes = {"used": [2] * levels, "perplexity": [1.7] * levels, "num_embeddings": 2}
    card._code_use(axis, {"code_counts": [[3, 1]] * levels, "codes": codes})
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == [
        *(f"level {i}: 2 used, perplexity 2" if levels > 1 else "2 used, perplexity 2" for i in named),
        "equal use",
    ]
    assert len(axis.lines) == levels + 1
