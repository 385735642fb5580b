"""The chain of `demo`: what runs, what does not run again, what is refused. The stages here only say that they ran."""

import json

import pytest
from typer.testing import CliRunner

from app import demo
from app.__main__ import app
from app.shared.refusals import Refused
from app.shared.version import VERSION


@pytest.fixture
def chain(monkeypatch):
    """Three stages that note their name; `chain.stop` raises in the one it names."""

    class Chain:
        ran: list[str] = []  # noqa: RUF012 (one a test)
        stop: dict[str, BaseException] = {}  # noqa: RUF012

    chain = Chain()
    chain.ran, chain.stop = [], {}

    def stage(name):
        def run(given):
            if name in chain.stop:
                raise chain.stop[name]
            chain.ran.append(name)
            print(f"{name} talks")
            (given.out / name).write_text("whole")
            return {"of": name}

        return demo.Stage(10, f"does {name}", run, name)

    monkeypatch.setattr(demo, "STAGES", {name: stage(name) for name in ("one", "two", "three")})
    monkeypatch.setattr(demo, "show", lambda given, record: (given.out / "index.html").write_text("page"))
    return chain


def test_stages_run_in_their_order_and_what_they_print_is_in_the_log(chain, tmp_path, capsys):
    done = demo.demo(str(tmp_path / "out"))
    assert chain.ran == ["one", "two", "three"] and (tmp_path / "out/index.html").read_text() == "page"
    assert {name: part["result"] for name, part in done["stages"].items()} == {n: {"of": n} for n in chain.ran}
    told = capsys.readouterr()
    assert "talks" not in told.out + told.err
    assert [line.split(":")[0] for line in told.err.splitlines()] == ["one", "two", "three"]
    log = (tmp_path / "out/demo.log").read_text().splitlines()
    assert log == ["==== one", "one talks", "==== two", "two talks", "==== three", "three talks"]


def test_a_second_call_does_nothing_again(chain, tmp_path):
    first = demo.demo(str(tmp_path))
    again = demo.demo(str(tmp_path))
    assert chain.ran == ["one", "two", "three"] and again["stages"] == first["stages"]


@pytest.mark.parametrize(
    ("ending", "status"),
    [(KeyboardInterrupt(), 130), (Refused("STOPPED", "ended by SIGTERM at step 3", status=143), 143)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_stopped_chain_goes_on_where_it_was(chain, tmp_path, ending, status):
    chain.stop = {"two": ending}
    with pytest.raises(Refused, match="the same command again") as end:
        demo.demo(str(tmp_path))
    assert (end.value.code, end.value.status) == ("STOPPED", status)
    chain.stop = {}
    demo.demo(str(tmp_path))
    assert chain.ran == ["one", "two", "three"]


def test_what_follows_a_stage_whose_files_are_gone_is_done_again(chain, tmp_path):
    demo.demo(str(tmp_path))
    (tmp_path / "two").unlink()
    demo.demo(str(tmp_path))
    assert chain.ran == ["one", "two", "three", "two", "three"]


def test_what_rests_on_a_stage_that_was_done_again_is_not_taken_for_done(chain, tmp_path):
    demo.demo(str(tmp_path))
    (tmp_path / "one").unlink()
    chain.stop = {"two": KeyboardInterrupt()}
    with pytest.raises(Refused, match="STOPPED"):
        demo.demo(str(tmp_path))
    chain.stop = {}
    demo.demo(str(tmp_path))
    assert chain.ran == ["one", "two", "three", "one", "two", "three"]


def test_a_refusal_of_a_stage_is_told_as_it_is(chain, tmp_path):
    chain.stop = {"two": Refused("DISK_FULL", "no room", "make room", status=2)}
    with pytest.raises(Refused, match="DISK_FULL: no room"):
        demo.demo(str(tmp_path))


def say(*call, status):
    done = CliRunner().invoke(app, ["demo", *map(str, call)])
    assert done.exit_code == status, done.output
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.output
    return done.stderr


def test_an_out_that_is_something_else_is_refused_in_one_line(chain, tmp_path):
    assert say("", status=2).startswith("BAD_VALUE: OUT is empty")
    file = tmp_path / "file"
    file.write_text("mine")
    assert say(file, status=2).startswith(f"NO_OUTPUT: {file} is a file")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert say(other, status=2).startswith(f"NO_OUTPUT: {other} holds something that is no demo")
    assert [path.name for path in other.iterdir()] == ["notes.txt"] and chain.ran == []


def test_a_demo_of_another_seed_or_with_a_damaged_record_is_refused(chain, tmp_path):
    demo.demo(str(tmp_path), seed=1)
    assert "of version" in say(tmp_path, "--seed", 2, status=2) and "seed 1" in say(tmp_path, "--seed", 2, status=2)
    whole = {"version": VERSION, "seed": 1}
    stages = [{**whole, "stages": part} for part in (3, {"one": 3}, {"one": {"seconds": "x", "result": {}}})]
    for damage in ("{", "[" * 100_000, "3", '{"version": 1}', *map(json.dumps, stages)):
        (tmp_path / "demo.json").write_text(damage)
        assert say(tmp_path, "--seed", 1, status=2).startswith(f"NO_OUTPUT: {tmp_path}/demo.json is damaged"), damage
    assert chain.ran == ["one", "two", "three"]


def test_the_summary_says_times_answers_and_where_the_page_lies():
    asked = {"answers": [{"question": "Is it?", "answer": "no", "known": "yes"}], "notice": "Not for diagnosis."}
    stages = {"vae": {"seconds": 70.0, "result": {}}, "ask": {"seconds": 5.0, "result": asked}}
    assert demo.lines({"stages": stages, "page": "demo/index.html"}) == [
        "vae          1:10",
        "ask          0:05",
        "all          1:15",
        "",
        "Is it?",
        "  no  (known: yes)",
        "",
        "Not for diagnosis.",
        "Look at demo/index.html in a browser.",
    ]


def test_the_share_of_a_stage_is_that_of_its_last_whole_row(tmp_path):
    given = demo.Demo(tmp_path, 0, demo.Sizes(steps={"vae": 40}))
    share = demo.share_of(given, "vae")
    assert share() is None
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/metrics.jsonl").write_text(json.dumps({"step": 10}) + "\n")
    assert share() == 0.25
    assert demo.share_of(given, "align")() is None
