"""The table of what the plugin uses of SGLang: it is complete, and releases whose wheels are cached meet it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from adaptive_spec.engines.sglang import contract
from adaptive_spec.engines.static_contract import Need
from tests.engines.release_matrix import MATRICES, cache_folder, cached_wheel, row_of
from tests.support.engine_uses import Use, attributes, imports, paths

SOURCES = sorted(p for p in Path(contract.__file__).parent.glob("*.py") if p.name != "contract.py")
TENSORS = {
    *(
        "astype",
        "clone",
        "contiguous",
        "copy_",
        "cpu",
        "detach",
        "dtype",
        "float",
        "item",
        "numpy",
        "query",
        "reshape",
        "shape",
        "to",
    ),
    *("tolist", "type", "view"),
}
"""Of tensors, arrays and CUDA events."""
OURS = {
    *(
        "after_draft",
        "after_draft_forward",
        "after_extend",
        "before_draft_forward",
        "before_extend",
        "encode",
        "send",
    ),
    *("temperatures", "check", "decode", "get"),
}
"""Attributes of the plugin's own objects that it holds as `Any`, of strings, and of PyTorch's store. Names of SGLang belong into
the contract."""


def names_of(need: Need) -> set[str]:
    """Paths that a need stands for."""
    return {need.path, *(f"{need.path}.{name}" for name in need.attributes)}


COVERED = {name for need in contract.NEEDS for name in names_of(need)}


def uncovered(uses: list[Use]) -> list[str]:
    """Paths that are no need, no class or module above one, and no attribute of one."""
    return [
        f"{use.name} (line {use.line})"
        for use in uses
        if use.name not in COVERED and not any(name.startswith(use.name + ".") for name in COVERED)
    ]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_import_and_path_is_in_the_contract(source: Path) -> None:
    tree = ast.parse(source.read_text())
    assert uncovered([*imports(tree, "sglang"), *paths(tree, "sglang.srt.")]) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_attribute_is_in_the_contract(source: Path) -> None:
    known = {name.rpartition(".")[2] for name in COVERED} | {word for need in contract.NEEDS for word in need.keywords}
    unknown = {use for use in attributes(ast.parse(source.read_text()), "sglang") if use.name not in known | TENSORS | OURS}
    assert not unknown, "an attribute of SGLang belongs into contract.NEEDS, one of the plugin's own objects into OURS"


def test_the_search_for_uses_sees_them() -> None:
    """What the two tests above would miss if the search were broken."""
    sources = {path.name: ast.parse(path.read_text()) for path in SOURCES}
    imported = {use.name for tree in sources.values() for use in imports(tree, "sglang")}
    read = {use.name for tree in sources.values() for use in attributes(tree, "sglang")}
    assert "sglang.srt.runtime_context.get_parallel" in imported
    assert {"tp_rank", "seq_lens_sum", "num_correct_drafts_per_req_cpu", "topk_p", "_verify_planner", "rid"} <= read


def test_a_use_that_is_not_in_the_contract_is_reported() -> None:
    tree = ast.parse(
        "from typing import Any\nfrom sglang.srt.moved import gone\n_A = 'sglang.srt.'\nX = _A + 'other.Class.method'\n"
        "def f(worker: Any):\n    own = worker._target_worker\n    return own.brand_new\n"
    )
    assert uncovered([*imports(tree, "sglang"), *paths(tree, "sglang.srt.")]) == [
        "sglang.srt.moved.gone (line 2)",
        "sglang.srt.other.Class.method (line 4)",
    ]
    assert {use.name for use in attributes(tree, "sglang")} == {"_target_worker", "brand_new"}


def test_every_need_is_in_a_known_group_and_hooks_are_named_once() -> None:
    assert {need.group for need in contract.NEEDS} == set(contract.GROUPS)
    for groups in (contract.EAGLE_GROUPS, contract.DSPARK_GROUPS, *((contract.OBSERVE, one) for one in contract.WATCHED_GROUPS)):
        hooks = Counter(need.hook for need in contract.needs_of(groups) if need.hook)
        assert set(hooks.values()) == {1}
        assert set(hooks) <= {need.hook for group in groups for need in contract.hooks_of(group)}
    with pytest.raises(KeyError, match="no such group"):
        contract.needs_of(["no such group"])


def test_the_contract_imports_nothing_heavy() -> None:
    """It is read in every process of a server, and by `doctor`."""
    code = (
        "import sys; import adaptive_spec.engines.sglang.contract, adaptive_spec.engines.releases; "
        "print([m for m in ('sglang', 'torch', 'numpy', 'adaptive_spec.wire') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("release", MATRICES["sglang"].releases)
def test_a_cached_release_meets_its_groups(release: str) -> None:
    """`make sglang-matrix` fetches the wheels."""
    wheel = cached_wheel("sglang", release, cache_folder("sglang"))
    if wheel is None:
        pytest.skip(f"no wheel of sglang {release} in {cache_folder('sglang')}: make sglang-matrix fetches it")
    row = row_of(MATRICES["sglang"], release, wheel)
    assert row.failed == [], [str(found) for found in (row.missing or {}).values()]
