"""The fault suite on one pair of processes, fault after fault; in full at night."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.scenarios import CI, FAULTS, NIGHTLY, Amounts, swept_pair


@pytest.mark.parametrize("amounts", [CI, pytest.param(NIGHTLY, marks=pytest.mark.nightly)], ids=["ci", "nightly"])
def test_the_pair_survives_every_fault(tmp_path: Path, amounts: Amounts) -> None:
    with swept_pair(tmp_path) as pair:
        for fault in FAULTS:
            print(f"{fault.what}: {fault.run(pair, amounts)}")
