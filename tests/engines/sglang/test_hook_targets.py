from __future__ import annotations

from adaptive_spec.engines.sglang.hook_targets import DSPARK_NEEDED, DSPARK_TARGETS, NEEDED, TARGETS, missing_targets


def test_without_sglang_every_target_is_missing() -> None:
    missing = missing_targets()
    assert len(missing) >= len(TARGETS)
    assert all("ModuleNotFoundError" in line for line in missing)


def test_each_algorithm_has_targets_of_its_own() -> None:
    assert len(missing_targets(DSPARK_TARGETS, DSPARK_NEEDED)) == len(DSPARK_TARGETS) + len(DSPARK_NEEDED)
    assert not any("dspark" in path for path in (*(target.path for target in TARGETS), *NEEDED))
    assert {target.path for target in TARGETS}.isdisjoint(target.path for target in DSPARK_TARGETS)
