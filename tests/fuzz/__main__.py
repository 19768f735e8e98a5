"""`make fuzz`: fuzz every reader of foreign bytes, one after another or some at a time.

    python -m tests.fuzz [TARGET...] [--inputs N] [--seconds S] [--jobs J]

A target ends after N inputs or S seconds, whichever is first; 0: no such end. An input that shows a fault is kept below
build/fuzz, and the exit status is 1. Kept inputs of earlier runs: tests/fuzz/corpus and build/fuzz.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.one_target import DONE, GUIDED
from tests.fuzz.target import CORPUS
from tests.fuzz.targets import TARGETS, target_class

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
HANGS_S = 600
"""An input that takes so long by the wall clock never ends."""
LARGEST_MB = 2000
"""Resident memory of a process that fuzzes; they begin with about 200 MB."""
PATIENCE_S = 120.0
"""For a process to start and to end, beside --seconds."""
SHOWN_LINES = 40


class Result(NamedTuple):
    """inputs: run. fault: what was printed, "" for none."""

    inputs: int
    seconds: float
    kept: int
    fault: str


def fuzz(name: str, inputs: int, seconds: int) -> Result:
    """Fuzz one target in a process of its own. inputs, seconds: 0 for no bound."""
    target = target_class(name)
    home = BUILD / name
    corpus, seeds, faults = home / "corpus", home / "seeds", home / "faults"
    for folder in (corpus, seeds, faults):
        folder.mkdir(parents=True, exist_ok=True)
    write_seeds(name, seeds)
    kept = [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
    runs = max(int(inputs * target.share), 1) if inputs else 0
    command = [
        sys.executable, "-m", "tests.fuzz.one_target", name, str(corpus), str(seeds), *kept, f"--inputs={runs}",
        f"--seconds={seconds}", f"--faults={faults}", f"--libfuzzer=-timeout={HANGS_S}",
        f"--libfuzzer=-rss_limit_mb={LARGEST_MB}",
    ]  # fmt: skip
    begun_s = time.monotonic()
    with (home / "log").open("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            status = process.wait(seconds + PATIENCE_S if seconds else None)
        except BaseException:
            process.kill()
            process.wait()
            raise
    text = (home / "log").read_text(errors="replace")
    done = re.findall(rf"^{DONE}(\d+)$", text, re.MULTILINE)
    fault = "" if status == 0 and done else "\n".join(text.splitlines()[-SHOWN_LINES:]) or f"exit status {status}"
    return Result(int(done[-1]) if done else 0, time.monotonic() - begun_s, len(os.listdir(corpus)), fault)


def write_seeds(name: str, folder: Path) -> None:
    """Write the inputs to begin with. The target of HTTP starts a sidecar for it."""
    target = target_class(name)()
    try:
        for file, data in target.seeds().items():
            (folder / file).write_bytes(data)
    finally:
        target.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz what is read from outside the process.")
    parser.add_argument("targets", nargs="*", help=f"{', '.join(TARGETS)}; all by default")
    parser.add_argument("--inputs", type=int, default=0, help="inputs of a target; a share of them where one takes long")
    parser.add_argument("--seconds", type=int, default=60, help="longest time of a target; 0: no bound")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    given = parser.parse_args()
    names = given.targets or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            parser.error(f"TARGET: must be one of {', '.join(TARGETS)}, got {name!r}")
    if given.inputs < 0 or given.seconds < 0 or not (given.inputs or given.seconds):
        parser.error("--inputs, --seconds: must be at least 0, and one of them above 0")
    if not GUIDED:
        print("atheris is not installed: inputs are changed at random, without coverage", flush=True)
    failed = False
    with ThreadPoolExecutor(max(given.jobs, 1)) as pool:
        running = {name: pool.submit(fuzz, name, given.inputs, given.seconds) for name in names}
        for name, future in running.items():
            result = future.result()
            failed |= bool(result.fault)
            words = "no fault" if not result.fault else f"FAULT, see {BUILD / name}\n{result.fault}"
            print(f"{name:12} {result.inputs:9,} inputs in {result.seconds:6.1f} s, {result.kept:5} kept: {words}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
