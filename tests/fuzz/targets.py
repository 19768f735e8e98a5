"""The targets by name. Each is imported when it is asked for: what is imported to fuzz it is what its coverage is measured of."""

from __future__ import annotations

import importlib

from tests.fuzz.target import Target

TARGETS = {
    "csv": "csv_files.CsvFiles",
    "yaml": "yaml_files.YamlFiles",
    "npz": "npz_files.NpzFiles",
    "page": "policy_page.PolicyPages",
    "ring": "record_ring.RecordRings",
    "engine-json": "engine_json.EngineJson",
    "models": "models.Models",
    "http": "http_requests.HttpRequests",
}


def target_class(name: str) -> type[Target]:
    """The class of a target."""
    module, _, attribute = TARGETS[name].partition(".")
    found: type[Target] = getattr(importlib.import_module(f"tests.fuzz.{module}"), attribute)
    return found
