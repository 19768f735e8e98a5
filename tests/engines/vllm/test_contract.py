"""The table of what the plugin uses of vLLM: it is complete, and releases whose wheels are cached meet it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_spec.engines.vllm import contract
from tests.engines.release_matrix import MATRICES, cache_folder, cached_wheel, row_of
from tests.support.engine_uses import imports, paths

SOURCES = sorted(p for p in Path(contract.__file__).parent.glob("*.py") if p.name not in ("contract.py", "cpu_kit.py"))
ATTACHMENTS = ("scheduler_attachment.py", "worker_attachment.py", "supported_servers.py", "cost_curves.py", "draft_logits.py")
OBJECTS = {
    "scheduler", "request", "r", "output", "parallel", "result", "config", "runner", "proposer", "worker", "manager", "known",
    "sampling",
    "stats",
}  # fmt: skip
"""Variables of the plugin that hold objects of vLLM."""
ELSEWHERE = {"__dict__", "append", "get", "pop", "items", "type", "compute_logits"}
"""compute_logits: of every draft model; the contract asks whether `_greedy_sample` calls it."""
COVERED = {name for need in contract.NEEDS for name in (need.path, *(f"{need.path}.{a}" for a in need.attributes))}
ATTRIBUTES = {name.rpartition(".")[2] for name in COVERED}


def read_of(source: Path) -> set[str]:
    """Attributes that are read of variables in `OBJECTS`, also of what is reached through them."""

    def root(node: ast.expr) -> str:
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Attribute):
            if root(node) in OBJECTS:
                found.add(node.attr)
            held = node.value
            if isinstance(held, ast.Attribute) and held.attr == "_scheduler":
                found.add(node.attr)
    return found - ELSEWHERE


@pytest.mark.parametrize("name", ATTACHMENTS)
def test_every_attribute_is_in_the_contract(name: str) -> None:
    source = Path(contract.__file__).with_name(name)
    assert read_of(source) - ATTRIBUTES == set(), "an attribute of vLLM belongs into contract.NEEDS"


def test_the_search_for_attributes_sees_them() -> None:
    read = {a for name in ATTACHMENTS for a in read_of(Path(contract.__file__).with_name(name))}
    assert {
        "dynamic_sd_lookup",
        "spec_token_ids",
        "sampled_token_ids",
        "data_parallel_size",
        "cost_tables",
        "input_batch",
    } <= read


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_import_and_path_is_in_the_contract(source: Path) -> None:
    tree = ast.parse(source.read_text())
    used = [use.name for use in (*imports(tree, "vllm"), *paths(tree, "vllm.v1."))]
    assert [name for name in used if not any(known == name or known.startswith(name + ".") for known in COVERED)] == []


def test_every_hook_is_a_method_of_its_attachment() -> None:
    from adaptive_spec.engines.vllm.scheduler_attachment import SchedulerAttachment
    from adaptive_spec.engines.vllm.worker_attachment import WorkerAttachment

    scheduler = {need.hook for g in (contract.OBSERVE, contract.COUNTS_AND_K) for need in contract.hooks_of(g)} - {"init_worker"}
    worker = {
        need.hook
        for g in (contract.STAGE_TIMES, contract.CONFIDENCES, contract.ADAPTIVE_VERIFICATION)
        for need in contract.hooks_of(g)
    }
    for owner, hooks in ((SchedulerAttachment, scheduler), (WorkerAttachment, worker)):
        for hook in hooks:
            assert any(hasattr(owner, name) for name in (hook, f"{hook}_before", f"{hook}_after")), hook
    with pytest.raises(KeyError, match="no such group"):
        contract.needs_of(["no such group"])


def test_the_contract_imports_nothing_heavy() -> None:
    code = (
        "import sys; import adaptive_spec.engines.vllm.contract, adaptive_spec.engines.releases; "
        "print([m for m in ('vllm', 'torch', 'numpy', 'adaptive_spec.wire') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_plugin_imports_no_torch_and_no_vllm_until_it_hooks() -> None:
    code = (
        "import sys; import adaptive_spec.engines.vllm.plugin as p, adaptive_spec.engines.vllm.scheduler_attachment, "
        "adaptive_spec.engines.vllm.worker_attachment; p.register(); "
        "print([m for m in ('vllm', 'torch', 'pydantic', 'scipy', 'river') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("release", MATRICES["vllm"].releases)
def test_a_cached_release_meets_its_groups(release: str) -> None:
    """`make vllm-matrix` fetches the wheels."""
    matrix = MATRICES["vllm"]
    wheel = cached_wheel(matrix.package, release, cache_folder(matrix.package))
    if wheel is None:
        pytest.skip(f"no wheel of vLLM {release} in {cache_folder(matrix.package)}: make vllm-matrix fetches it")
    row = row_of(matrix, release, wheel)
    assert row.failed == [], [str(found) for found in (row.missing or {}).values()]
