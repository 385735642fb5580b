"""Stage 1 through its bundle: every output file, resuming to the bit, `kill -9`, and what is refused in one line."""

import json


def rows_of(folder, phase="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase]


def test_probe(run_bundle, cohort, place):
    got = run_bundle(dataset_dir=cohort, output_dir="out", warmup_steps=6, max_steps=6, i_save=3, val_interval=3)
    print(got.out[-1500:], got.err[-800:])
    assert got.status == 0
    got = run_bundle(dataset_dir=cohort, output_dir="out", max_stepz=6)
    print(got)
    assert got.status == 2
    got = run_bundle(dataset_dir="/nowhere", output_dir="out")
    print(got)
    got = run_bundle(dataset_dir=cohort, output_dir="out", learning_rate=1e30, warmup_steps=6, grad_clip="$None")
    print(got)
