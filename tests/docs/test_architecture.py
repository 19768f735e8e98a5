"""docs/architecture.md says what is there: the packages, their order, and the way of one record."""

from __future__ import annotations

import importlib
import re
import sys
import time
import tomllib
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from adaptive_spec.config.settings import ControllerSettings, SidecarSettings
from adaptive_spec.sidecar.metrics import metrics_registry
from adaptive_spec.sidecar.session import Session
from adaptive_spec.sidecar.status_document import status_document
from adaptive_spec.sidecar.view import CurrentView
from tests.support.numbers_engine import NumbersEngine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAME = r"`((?:\w+\.)+\w+)`"
MAX_STEPS = 3000
"""Decode steps after which a record must have gone the whole way; some 500 were enough."""


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def hops() -> list[list[str]]:
    """Names of each numbered item, in order."""
    items = re.split(r"^\d+\. ", section("The way of one record").split("\nWhere to look", 1)[0], flags=re.MULTILINE)[1:]
    return [[name for name in re.findall(NAME, item) if name.split(".")[0] in packages()] for item in items]


def packages() -> set[str]:
    return {path.parent.name for path in (ROOT / "adaptive_spec").glob("*/__init__.py")}


def resolve(name: str) -> Any:
    """The function or class of `package.module.Class.function`, below adaptive_spec."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["adaptive_spec", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name}: no such module")


def code_of(name: str) -> CodeType:
    function = resolve(name)
    code = getattr(function, "__code__", None)
    assert isinstance(code, CodeType), f"{name} is no function"
    return code


def test_table_names_exactly_the_packages_in_the_order_of_the_contract() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", section("Packages"), re.MULTILINE)
    assert set(rows) == packages()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    order = {name.strip(): i for i, layer in enumerate(layers) for name in re.split(r"[|:]", layer)}
    places = [order[name] for name in rows]
    assert places == sorted(places)


def test_every_function_that_the_page_names_exists() -> None:
    page = section("The way of one record") + section("Where K of a step is decided")
    names = [name for name in re.findall(NAME, page) if name.split(".")[0] in packages()]
    assert len(names) > 30
    for name in names:
        assert callable(resolve(name)), name


def test_a_record_takes_at_most_twelve_hops() -> None:
    assert 8 <= len(hops()) <= 12
    assert all(hops())


@pytest.fixture
def calls(tmp_path: Path) -> list[CodeType]:
    """Calls of the named functions, in order, from one record to the policy that follows from it and to the pages.

    Most records change no policy, so this is repeated with single records until one does.
    """
    wanted = {code_of(name) for hop in hops() for name in hop}
    seen: list[CodeType] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in wanted:
            seen.append(frame.f_code)

    engine = NumbersEngine(tmp_path / "runtime")
    controller = ControllerSettings(refit_interval_s=0.05)
    session = Session.open(
        SidecarSettings(runtime_dir=tmp_path / "runtime", profile_dir=tmp_path / "profiles", controller=controller)
    )
    assert session is not None
    current = CurrentView(time.monotonic())
    registry = metrics_registry(current)
    previous = sys.getprofile()
    try:
        while engine.steps < MAX_STEPS and not in_order(seen):
            session.run_once()  # nothing of the last round is left
            seen.clear()
            sys.setprofile(note)
            engine.step(4)
            session.run_once()
            engine.step(4)
            current.view = session.view(None)
            status_document(current.view, current.heartbeat_s, time.monotonic())
            list(registry.collect())
            sys.setprofile(previous)
    finally:
        sys.setprofile(previous)
        engine.close()
        session.close()
    return seen


def in_order(seen: list[CodeType]) -> bool:
    """Whether the named functions were called one after another in the order of the page, with or without others in between."""
    calls = iter(seen)
    return all(code_of(name) in calls for hop in hops() for name in hop)


def test_a_record_goes_the_way_the_page_says(calls: list[CodeType]) -> None:
    missing = [name for hop in hops() for name in hop if code_of(name) not in calls]
    assert missing == []
    assert in_order(calls)
