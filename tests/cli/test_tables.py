from __future__ import annotations

from adaptive_spec.cli.tables import k_words, number


def test_k_words_joins_runs() -> None:
    assert k_words({"1": 4, "2": 4, "3": 2, "10": 2}) == "1-2: 4, 3: 2, 10: 2"
    assert k_words({}) == "none yet"


def test_number() -> None:
    assert number(None, ".1f") == "-"
    assert number(1234.56, ",.1f") == "1,234.6"
