"""A model that was built to try the chain is not taken for one of patients."""

import pytest

from app.language import ask


class Assistant:
    def __init__(self, base):
        self.settings = {"base_model": base}

    def open_all(self, _path):
        yield ValueError("scan.nii.gz: refused")


@pytest.mark.parametrize(
    ("base", "warned"), [({"name": None, "built": "qwen2_vl"}, True), ({"name": "Qwen/Qwen2-VL-2B"}, False)]
)
def test_answers_of_a_tiny_model_built_here_come_with_a_word_on_patients(base, warned, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ask.CTAssistant, "from_pretrained", lambda *_args, **_given: Assistant(base))
    ask.ask(str(tmp_path), ["why?"], align="outputs/align")
    assert ("outputs/align is tiny, built to try the chain: it says nothing of patients" in caplog.text) == warned
