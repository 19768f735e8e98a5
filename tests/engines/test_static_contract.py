"""The static checker, on small packages made for the test. None of them could be imported."""

from __future__ import annotations

import sys
import types
import zipfile
from pathlib import Path

import pytest

from adaptive_spec.engines.source_tree import SourceTree, open_wheel
from adaptive_spec.engines.static_contract import Need, installed, unmet

WORKER = """
import package_that_does_not_exist
from .base import Base as Parent

class Worker(Parent):
    launch: int = 3

    def __init__(self, size):
        self.size, self.rows = size, 0
        setattr(self, "by_setattr", 1)
        self.register_buffer("buffer", None)

    @property
    def ready(self):
        return True

    def step(self, batch, *, wait=False):
        for row in batch:
            self.verify(row)
        return launch(batch)

    def open(self, *rows, **options): ...
"""
BASE = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from .hidden import OnlyForTypes
else:
    Fallback = int

class Base:
    def __init__(self):
        self.inherited = 1

    def verify(self, row, strict): ...
"""


def tree_of(folder: Path, **modules: str) -> SourceTree:
    """A package `engine` of the given modules; `a__b` is the module b of the sub-package a."""
    for name, text in {"__init__": "", **modules}.items():
        path = (
            folder / "engine" / Path(*name.split("__")).with_suffix(".py")
            if "__init__" not in name
            else folder / "engine/__init__.py"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return SourceTree(folder)


@pytest.fixture
def tree(tmp_path: Path) -> SourceTree:
    return tree_of(tmp_path, worker=WORKER, base=BASE)


def texts(tree: SourceTree, *needs: Need) -> list[str]:
    return [found.text for found in unmet(tree, needs)]


def test_what_is_there_is_met(tree: SourceTree) -> None:
    assert texts(
        tree,
        Need("g", "engine.worker"),
        Need("g", "engine.worker.Worker.step", ("self", "batch"), ("wait",), calls=("verify", "launch"), hook="step"),
        Need("g", "engine.worker.Worker", ("size",), called=True, extensible=True),
        Need("g", "engine.worker.Worker.open", ("self", "a", "b"), ("anything",)),
        Need("g", "engine.base.Fallback"),
    ) == []  # fmt: skip


@pytest.mark.parametrize("name", ["launch", "size", "rows", "by_setattr", "buffer", "ready", "step", "inherited", "verify"])
def test_attributes_of_objects_are_found_wherever_they_are_set(tree: SourceTree, name: str) -> None:
    assert texts(tree, Need("g", "engine.worker.Worker", attributes=(name,))) == []


@pytest.mark.parametrize(
    "path",
    [
        "engine.gone",
        "engine.gone.Worker",
        "engine.worker.Gone",
        "engine.worker.Worker.gone",
        "engine.worker.Worker.step.deeper",
        "other.worker",
        "engine.base.OnlyForTypes",
    ],
)
def test_a_missing_target_is_named(tree: SourceTree, path: str) -> None:
    found = unmet(tree, [Need("group", path)])
    assert [(one.group, str(one)) for one in found] == [("group", f"{path}: not there")]


@pytest.mark.parametrize(
    ("need", "text"),
    [
        (Need("g", "engine.worker.Worker.step", ("self", "rows")), "parameter 2 is batch, not rows"),
        (Need("g", "engine.worker.Worker.step", ("self", "batch", "wait")), "no positional parameter wait"),
        (Need("g", "engine.worker.Worker.step", ("self",), ("timeout",)), "no parameter timeout"),
        (Need("g", "engine.worker.Worker.verify", ("self", "row"), called=True), "requires a parameter strict as well"),
        (Need("g", "engine.worker.Worker", ("size", "rows")), "no positional parameter rows"),
        (Need("g", "engine.worker.Worker", attributes=("gone",)), "no attribute gone"),
        (Need("g", "engine.worker.Worker.step", attributes=("gone",)), "not a class"),
        (Need("g", "engine.worker.Worker.step", calls=("draft",)), "does not call draft"),
        (Need("g", "engine.worker.Worker.ready", hook="ready"), "not a function that can be hooked"),
        (Need("g", "engine.worker.Worker.launch", hook="launch"), "not a function that can be hooked"),
        (Need("g", "engine.base.Fallback", ("a",)), "not a function or class"),
    ],
)
def test_what_changed_is_named(tree: SourceTree, need: Need, text: str) -> None:
    assert texts(tree, need) == [text]


@pytest.mark.parametrize(
    "old",
    [
        "from engine.new.place import Worker",
        "from .new.place import Worker",
        "from engine.new import place\nWorker = place.Worker",
        "from engine.new.place import *",
        "from .new.place import Worker as Renamed\nWorker = Renamed",
        "try:\n    from missing_package import Worker\nexcept ImportError:\n    from .new.place import Worker",
        "try:\n    from .gone import Worker\nexcept ImportError:\n    from .new.place import Worker",
    ],
)
def test_a_class_that_moved_is_found_by_its_re_export(tmp_path: Path, old: str) -> None:
    moved = "class Worker:\n    def step(self, batch): ...\n"
    tree = tree_of(tmp_path, worker=old, new____init__="", new__place=moved)
    (tmp_path / "engine/new/__init__.py").write_text("")
    assert texts(tree, Need("g", "engine.worker.Worker.step", ("self", "batch"), hook="step")) == []
    assert texts(tree, Need("g", "engine.worker.Worker", attributes=("gone",))) == ["no attribute gone"]


def test_a_re_export_of_something_gone_is_not_there(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, worker="from .base import Worker", base="")
    assert texts(tree, Need("g", "engine.worker.Worker")) == ["not there"]


def test_modules_that_import_each_other_end(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, a="from .b import X", b="from .a import X")
    assert texts(tree, Need("g", "engine.a.X")) == ["not there"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("@dataclass\nclass Table(Base):\n    bias: float\n    rows: int = 0\n", []),
        ("class Table(Struct):\n    bias: float\n    scale: float\n", ["requires a parameter scale as well"]),
        ("class Table:\n    rows: int = 0\n", ["no parameter bias"]),
    ],
)
def test_a_constructor_made_of_fields(tmp_path: Path, text: str, wrong: list[str]) -> None:
    tree = tree_of(tmp_path, table="class Base:\n    extra: int = 0\n" + text)
    assert texts(tree, Need("g", "engine.table.Table", keywords=("bias",), called=True)) == wrong


@pytest.mark.parametrize(
    "text",
    [
        "class Result(msgspec.Struct):\n    a: int\n",
        "@dataclass(slots=True)\nclass Result:\n    a: int\n",
        "class Result:\n    __slots__ = ('a',)\n",
    ],
)
def test_objects_that_take_no_attribute_of_others(tmp_path: Path, text: str) -> None:
    need = Need("g", "engine.result.Result", extensible=True)
    assert texts(tree_of(tmp_path, result=text), need) == ["takes no attributes of others (slots)"]


def test_a_class_that_answers_any_name_must_have_it_written_in_its_module(tmp_path: Path) -> None:
    text = "NAMES = ('tp_rank',)\nclass Context:\n    def __getattr__(self, name): ...\n"
    tree = tree_of(tmp_path, context=text)
    assert texts(tree, Need("g", "engine.context.Context", attributes=("tp_rank", "gone"))) == ["no attribute gone"]


def test_a_module_this_python_cannot_parse_is_named(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, broken="def (:\n")
    (found,) = texts(tree, Need("g", "engine.broken.X"))
    assert found.startswith("its source cannot be read: invalid syntax")


def test_a_wheel_is_read_as_it_is(tmp_path: Path) -> None:
    wheel = tmp_path / "engine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("engine/__init__.py", "")
        file.writestr("engine/worker.py", WORKER)
        file.writestr("engine/base.py", BASE)
    assert texts(open_wheel(wheel), Need("g", "engine.worker.Worker", attributes=("inherited", "gone"))) == ["no attribute gone"]


def test_an_installed_package_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree_of(tmp_path, worker="raise SystemExit\n" + BASE)
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = installed("engine")
    assert tree is not None
    assert texts(tree, Need("g", "engine.worker.Base.verify", ("self", "row"))) == []
    assert "engine" not in sys.modules
    assert installed("no_such_package_anywhere") is None


def test_a_stand_in_module_is_not_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "engine_stand_in", types.ModuleType("engine_stand_in"))
    assert installed("engine_stand_in") is None
