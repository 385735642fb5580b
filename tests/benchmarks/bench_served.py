"""MONAI Label with this app as a process of its own: how long requests take, cold, warm and two at once; its memory.

    python -m tests.benchmarks.bench_served SCAN [--tokenizer ct_base] [--align outputs/align] [--rounds 3]

Runs in the environment of docs/serving.md. Correct first: the served tokens are those that CTTokenizer gives here.
"""

import argparse
import base64
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from app.tokens.token_files import read_tokens
from app.tokens.tokenizer import CTTokenizer
from tests.label_server import Server, end, start, wait_for
from tests.runs import ROOT

QUESTION = {"question": "Is there a pleural effusion?", "max_new_tokens": 32}


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def asked(server: Server, model: str, image: str) -> dict:
    reply = server.ask(model, params={"image": image, "output": "json"}, data={"params": json.dumps(QUESTION)})
    assert reply.status_code == 200, reply.text
    return reply.json()


def of_process(pid: int) -> tuple[float, float]:
    """CPU seconds so far and GiB at most, of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(peak.split()[1]) / 2**20


def row(server: Server, pid: int, model: str, image: str, rounds: int) -> dict:
    """One model: its first request, the median of those after it, and two that come together."""
    cold = seconds(lambda: asked(server, model, image))
    cpu = of_process(pid)[0]
    warm = median(seconds(lambda: asked(server, model, image)) for _ in range(rounds))
    cpu = (of_process(pid)[0] - cpu) / rounds
    with ThreadPoolExecutor(2) as pool:
        both = seconds(lambda: list(pool.map(lambda _: asked(server, model, image), range(2))))
    return {"model": model, "cold": cold, "warm": warm, "warm CPU": cpu, "two at once": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--tokenizer", help="none: as the server chooses")
    parser.add_argument("--align")
    parser.add_argument("--models", default="tokenize,reconstruct,ask,show_answer")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    conf = {name: getattr(given, name) for name in ("tokenizer", "align") if getattr(given, name)}
    conf = {name: str(Path(value).resolve()) if Path(value).exists() else value for name, value in conf.items()}
    with tempfile.TemporaryDirectory() as folder:
        studies = Path(folder, "studies")
        studies.mkdir()
        shutil.copy(given.scan, studies / f"scan{''.join(given.scan.suffixes)}")
        begun = time.perf_counter()
        process, server = start(ROOT / "app", studies, Path(folder, "run"), conf=conf)
        try:
            models = wait_for(process, server).json()["models"]
            started, idle = time.perf_counter() - begun, of_process(process.pid)[1]
            rows = []
            for name in [name for name in given.models.split(",") if name in models]:
                rows.append(row(server, process.pid, name, "scan", given.rounds))
            peak = of_process(process.pid)[1]
            Path(folder, "t.npz").write_bytes(base64.b64decode(asked(server, "tokenize", "scan")["npz"]))
        finally:
            end(process)
        served = read_tokens(Path(folder, "t.npz"))
        here = CTTokenizer.from_pretrained(conf.get("tokenizer")).encode(given.scan)
        assert np.array_equal(served.codes, here.codes), "served tokens are not those made here"
    print(f"{'s':14}" + "".join(f"{name:>14}" for name in list(rows[0])[1:]))
    for one in rows:
        print(f"{one['model']:14}" + "".join(f"{value:14.2f}" for value in list(one.values())[1:]))
    about = {"start_s": round(started, 1), "idle_gib": round(idle, 2), "peak_gib": round(peak, 2)}
    about |= {"tokens": len(served.codes), "load": os.getloadavg(), "rows": rows}
    print(json.dumps({"benchmark": "served", **about}))


if __name__ == "__main__":
    main()
