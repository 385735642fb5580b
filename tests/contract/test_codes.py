"""The one table of codes holds what the sources use and nothing else, and docs/codes.md is that table."""

import ast
import pickle
import re
from pathlib import Path

import pytest

from app.language.align_setup import RESUMED_WITH
from app.shared import codes
from app.shared.codes import CODES
from app.shared.refusals import Refused, as_refused, refusal_of

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("app", "transforms", "networks") for path in (ROOT / room).rglob("*.py"))
TELL = {"Refused", "Finding", "finding", "Problem"}  # what takes a code first
SPOKEN = re.compile(r"^([A-Z]{2,}(?:_[A-Z0-9]+)+): ")  # a line that begins with a code


def codes_in(source: str) -> set[str]:
    """Codes that a source names where a refusal, a finding or a problem is made, in a table of them, or in a line."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in TELL and node.args:
            used |= {part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (said := SPOKEN.match(node.value)):
            used.add(said[1])
    return {code for code in used if isinstance(code, str) and re.fullmatch(r"[A-Z][A-Z0-9_]+", code)}


def test_every_code_of_the_sources_is_in_the_table():
    used = {path: codes_in(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert len(set().union(*used.values())) > 90  # the rule has met real codes
    strange = {str(path.relative_to(ROOT)): found - set(CODES) for path, found in used.items() if found - set(CODES)}
    assert not strange, strange
    assert set(RESUMED_WITH.values()) <= set(CODES)


@pytest.mark.parametrize("name", ["app/check.py", "app/text/manifests.py"])
def test_every_problem_that_check_tells_is_in_the_table(name):
    constants = [
        node.value for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.Constant)
    ]
    told = {text for text in constants if isinstance(text, str) and re.fullmatch(r"[A-Z]+(_[A-Z]+)+", text)}
    assert len(told) >= 3 and told <= set(CODES), told - set(CODES)


def test_every_code_of_the_table_is_used():
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES if path.name != "codes.py")
    assert not [code for code in CODES if not re.search(rf"\b{code}\b", text)]


def test_the_rule_sees_codes_however_they_are_given():
    source = 'Refused("A_B", "x", "y")\nRefused("C_D" if x else "E_F", "z")\nlog.warning("GG_HH: %s", x)\nfinding("OK")'
    assert codes_in(source) == {"A_B", "C_D", "E_F", "GG_HH", "OK"}


def test_every_code_is_complete():
    for name, code in CODES.items():
        assert re.fullmatch(r"[A-Z0-9]+(_[A-Z0-9]+)*", name)
        assert code.kinds and set(code.kinds) <= set(codes.ENDINGS) and code.meaning and code.remedy
        assert "|" not in code.meaning + code.remedy and not code.remedy.endswith(".")


def test_the_page_of_codes_is_the_table():
    assert (ROOT / "docs/codes.md").read_text(encoding="utf-8") == codes.as_markdown(), codes.__doc__
    assert all(f"| `{name}` |" in codes.as_markdown() for name in CODES)


def test_a_refusal_is_one_line_with_the_table_s_remedy_and_status():
    refused = Refused("TOO_FEW_SLICES", "3 slices\nin it.")
    assert str(refused) == "TOO_FEW_SLICES: 3 slices in it. Give the whole series." and refused.status == 3
    assert str(Refused("UNKNOWN_KEY", "no key x", "did you mean y?")) == "UNKNOWN_KEY: no key x. Did you mean y?"
    with pytest.raises(KeyError):
        Refused("NO_SUCH_CODE", "x")


def test_a_refusal_survives_a_process():
    for refused in (Refused("NOT_CT", "x", skipped=True), Refused("NO_STAGE1", "y", "z", status=1)):
        again = pickle.loads(pickle.dumps(refused))
        assert str(again) == str(refused) and vars(again) == vars(refused)


def test_in_python_a_refusal_is_an_exception_like_any_other():
    with pytest.raises(ValueError, match=r"^BAD_VALUE: x\. Do that\.$") as end:
        raise Refused("BAD_VALUE", "x", "do that")
    assert refusal_of(end.value) is end.value and end.value.status == 2


def chained(*errors: Exception) -> Exception:
    """The last, caused by the one before it, and so on; each raised here."""
    for before, error in zip((None, *errors), errors, strict=False):
        try:
            raise error from before
        except Exception:
            continue
    return errors[-1]


def test_the_refusal_behind_a_chain_is_what_is_told():
    inner, outer = Refused("DAMAGED_TOKENS", "a"), Refused("EXISTS", "b")
    assert refusal_of(chained(OSError("x"), inner, RuntimeError("MONAI's"))) is inner
    assert refusal_of(chained(inner, outer, RuntimeError("MONAI's"))) is outer  # who catches one means the other
    assert refusal_of(RuntimeError("ours")) is None
    assert refusal_of(chained(ValueError("raised in a test, which is none of our rooms"))) is None
    assert refusal_of(FileNotFoundError(2, "No such file", "a.txt")).code == "BAD_PATH"
    assert refusal_of(OSError(28, "No space left")).status == 2
    assert refusal_of(chained(OSError("9 requested and 4 written"), OSError(28, "full"))).code == "DISK_FULL"
    assert refusal_of(KeyboardInterrupt()).status == 130


def test_values_that_transforms_and_networks_refuse_have_a_code_too():
    from transforms.windows import window_bounds

    with pytest.raises(ValueError, match="lungs") as end:
        window_bounds("lungs")
    made = refusal_of(end.value)
    assert made.code == as_refused(end.value).code == "BAD_VALUE" and made.status == 2 and "lungs" in made.what


@pytest.mark.parametrize("error", [Refused("DAMAGED_CASE", "case_7 is cut short", "prepare it again"), ValueError("x")])
def test_a_refusal_that_torch_made_text_of_is_read_again(error):
    from torch._utils import ExceptionWrapper

    try:
        raise error
    except ValueError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises((RuntimeError, ValueError)) as end:
        sent.reraise()
    told = refusal_of(end.value)
    if isinstance(error, Refused):
        assert str(told) == str(error) and told.status == 3
    else:
        assert told is None  # it was raised in a test
