"""Fuzz one target: `python -m tests.fuzz.one_target NAME FOLDER...`. Started by `tests.fuzz`.

With atheris, libFuzzer changes the inputs, guided by the coverage of this package. Where atheris is not installed (it has wheels
for Linux on x86-64 only) they are changed at random, which finds less.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path

from tests.fuzz.target import Target
from tests.fuzz.targets import target_class

try:
    import atheris
except ImportError:
    atheris = None

GUIDED = atheris is not None
SEED = 1
DONE = "inputs run: "
"""Begins the last line of a run without a fault."""
SLOWEST_INPUT_S = 30.0
"""Of processor time: on a machine with other work the wall clock shows faults that are none."""
NUMBERS = (0, 1, 127, 128, 255)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("folders", nargs="+", type=Path, help="of inputs to begin with; new ones are kept in the first")
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--faults", type=Path, required=True, help="folder of the inputs that show a fault")
    parser.add_argument("--libfuzzer", action="append", default=[], help="an argument of libFuzzer")
    given = parser.parse_args()
    with atheris.instrument_imports(include=["adaptive_spec", "yaml"]) if atheris is not None else nullcontext():
        kind = target_class(given.target)
    warnings.simplefilter("error")
    run = Run(kind(), given.inputs, given.seconds)
    if atheris is None:
        _at_random(run, given.folders, given.faults)
    else:
        places = [*map(str, given.folders), f"-artifact_prefix={given.faults}/", f"-max_len={kind.longest}", "-runs=-1"]
        atheris.Setup([sys.argv[0], *places, *given.libfuzzer], run)
        atheris.Fuzz()


class Run:
    """Calls the target, and ends the process when enough was done: libFuzzer, when it ends it, leaves Python no time to close.

    inputs, seconds: 0 for no bound.
    """

    def __init__(self, target: Target, inputs: int, seconds: int) -> None:
        self.target = target
        self.done = 0
        self._inputs = inputs
        self._until_s = time.monotonic() + seconds if seconds else float("inf")

    def __call__(self, data: bytes) -> None:
        try:
            if self.done == self._inputs > 0 or time.monotonic() > self._until_s:
                self.target.close()
                print(f"{DONE}{self.done}", flush=True)
                os._exit(0)
            self.done += 1
            begun_s = time.process_time()
            self.target.run(data)
            if (taken_s := time.process_time() - begun_s) > SLOWEST_INPUT_S:
                raise AssertionError(f"the input took {taken_s:.0f} s of processor time")
        except BaseException:
            with suppress(Exception):
                self.target.close()
            raise


def _at_random(run: Run, folders: list[Path], faults: Path) -> None:
    inputs = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*"))] or [b""]
    numbers = random.Random(SEED)
    while True:
        chosen = changed(numbers.choice(inputs), numbers.choice(inputs), numbers)[: run.target.longest]
        data = inputs[run.done] if run.done < len(inputs) else chosen
        try:
            run(data)
        except BaseException:
            (faults / "crash").write_bytes(data)
            raise


def changed(data: bytes, other: bytes, numbers: random.Random) -> bytes:
    """Return an input with up to four changes: bytes replaced, inserted, deleted, or taken from another input."""
    new = bytearray(data)
    for _ in range(numbers.randint(1, 4)):
        at, length = numbers.randint(0, len(new)), numbers.randint(1, 16)
        piece = bytes(numbers.choice((numbers.choice(NUMBERS), numbers.randrange(256))) for _ in range(length))
        place = numbers.randint(0, len(other))
        new[at : at + numbers.choice((0, 1, length))] = numbers.choice((b"", piece[:1], piece, other[place : place + length]))
    return bytes(new)


if __name__ == "__main__":
    main()
