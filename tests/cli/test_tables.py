from __future__ import annotations

from adaptive_spec.cli.tables import k_ranges, number


def test_k_ranges_joins_equal_neighbours() -> None:
    assert k_ranges({"1": 4, "2": 4, "3": 2, "10": 2}) == "1-2: 4, 3: 2, 10: 2"
    assert k_ranges({}) == "none yet"


def test_number() -> None:
    assert number(None, ".1f") == "-"
    assert number(1234.56, ",.1f") == "1,234.6"
