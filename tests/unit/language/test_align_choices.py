"""What an alignment refuses before it begins."""

import pytest

from app.language.align_setup import check_choices
from app.shared.refusals import Refused


@pytest.mark.parametrize("own", [{"data": "{place}"}, {"dataset": "package.Own"}])
def test_phantoms_teach_no_detector_beside_data_of_ones_own(tmp_path, own):
    own = {name: value.format(place=tmp_path) for name, value in own.items()}
    settings = {"demo": False, "vl_model": "tiny_qwen2_vl"}
    with pytest.raises(Refused) as end:
        check_choices(**settings, **own, detector_phantoms=5)
    assert str(end.value).startswith("BAD_VALUE: detector_phantoms is 5") and end.value.status == 2
    assert "Leave --detector_phantoms out" in str(end.value)
    check_choices(**settings, **own)
    check_choices(**settings, detector_phantoms=5)
