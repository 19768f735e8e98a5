"""The counters of a metrics page, and whether one went back."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
OF_THE_PROCESS = ("process_", "adaptive_spec_controller_failures", "adaptive_spec_annotations", "adaptive_spec_engine_")
"""Counters that begin at 0 with each process, which a counter may, or that are the engine's."""


def counters_of(page: str) -> Series:
    """Return counters and histograms, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        if family.type in ("counter", "histogram") and not family.name.startswith(OF_THE_PROCESS)
        for sample in family.samples
    }


def went_back(before: Series, after: Series) -> list[str]:
    """Return the series that are less than before or gone. Nothing is said of an empty page: no engine is shown on it yet."""
    return [f"{name} {value} -> {after.get(name)}" for name, value in before.items() if after and after.get(name, -1.0) < value]


def accounted(series: Series) -> float:
    """Return the records that were learnt or dropped."""
    return sum(v for (name, _), v in series.items() if name.startswith("adaptive_spec_observations"))
