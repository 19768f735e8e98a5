"""Every target on its seeds, the kept corpus and some changed inputs; `make fuzz` runs far more."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import __main__ as driver
from tests.fuzz.one_target import GUIDED, Run, changed
from tests.fuzz.target import CORPUS, Target, corpus_of, one_line_of
from tests.fuzz.targets import TARGETS, target_class

EXAMPLES = {"models": 15, "http": 60}
LARGEST_CORPUS = 256 << 10
"""Bytes of all kept inputs together."""


@pytest.fixture(scope="module", params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    target = target_class(request.param)()
    yield target
    target.close()


def test_seeds_and_kept_inputs(target: Target) -> None:
    inputs = {**target.seeds(), **corpus_of(target)}
    valid = [name for name, data in inputs.items() if target.run(data) == ""]
    assert valid, "nothing behind the first check is reached"
    assert len(valid) < len(inputs), "nothing is refused"


def test_changed_inputs(target: Target) -> None:
    pool = list(target.seeds().values())

    @settings(max_examples=EXAMPLES.get(target.name, 150), suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(pool), st.sampled_from(pool), st.randoms(use_true_random=False))
    def run(data: bytes, other: bytes, numbers: random.Random) -> None:
        target.run(changed(data, other, numbers)[: target.longest])

    run()


def test_arbitrary_inputs(target: Target) -> None:
    @settings(max_examples=EXAMPLES.get(target.name, 100), suppress_health_check=list(HealthCheck), database=None)
    @given(st.binary(max_size=300))
    def run(data: bytes) -> None:
        target.run(data)

    run()


def test_the_kept_inputs_are_small() -> None:
    folders = {path.name for path in CORPUS.iterdir()}
    assert folders == set(TARGETS)
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) <= LARGEST_CORPUS


class Faulty(Target):
    """Raises for one input in some thousand."""

    name = "faulty"
    longest = 8

    def seeds(self) -> dict[str, bytes]:
        return {"a": b"a"}

    def run(self, data: bytes) -> str:
        if data[:1] == b"b":
            raise IndexError("not documented")
        return ""


def test_a_fault_ends_the_run_with_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "faulty", "test_targets.Faulty")
    monkeypatch.setattr(driver, "BUILD", tmp_path)
    code = "import sys\nfrom tests.fuzz.targets import TARGETS\nTARGETS['faulty'] = 'test_targets.Faulty'\n"
    code += "from tests.fuzz.one_target import main\nmain()"
    real = subprocess.Popen

    def started(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", "tests.fuzz.one_target"]
        return real([sys.executable, "-c", code, *command[3:]], **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(subprocess, "Popen", started)
    result = driver.fuzz("faulty", 200_000, 0)
    assert "IndexError: not documented" in result.fault
    assert [path.read_bytes()[:1] for path in (tmp_path / "faulty" / "faults").iterdir()] == [b"b"]


def test_a_run_ends_after_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    status: list[int] = []

    def ended(code: int) -> None:
        status.append(code)
        raise SystemExit

    monkeypatch.setattr("os._exit", ended)
    run = Run(Faulty(), 3, 0)
    for _ in range(3):
        run(b"a")
    with pytest.raises(SystemExit):
        run(b"a")
    assert (status, run.done) == ([0], 3)


def test_an_error_must_be_one_line() -> None:
    assert one_line_of(ValueError("port: wrong")) == "port: wrong"
    for message in ("", "a\nb", "a\0b", "x" * 5000):
        with pytest.raises(AssertionError):
            one_line_of(ValueError(message))


def test_atheris_is_there_where_it_has_wheels() -> None:
    wheels = sys.platform == "linux" and sys.version_info[:2] <= (3, 14)
    assert GUIDED or not wheels
