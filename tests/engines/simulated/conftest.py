"""A small scenario to change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptive_spec.engines.simulated.scenario import Scenario, scenario_from

SMALL: dict[str, Any] = {
    "name": "small",
    "granularity": "batch",
    "max_k": 3,
    "duration_s": 10,
    "seed": 1,
    "latency": {
        "verify_curve": [[1, 10.0], [16, 12.0], [32, 20.0], [64, 30.0]],
        "graph_batch_sizes": [1, 2, 4, 8, 16],
        "token_buckets": None,
        "draft_fixed_ms": 0.5,
        "draft_ms_per_step": 1.0,
        "context_ms_per_1k_tokens": 0.1,
        "overhead_ms": 2.0,
        "noise": {"sigma": 0.0, "spike_rate": 0.0, "spike_factor": 1.0},
    },
    "classes": {
        "chat": {
            "accept": [0.7, 0.6, 0.5],
            "concentration": 4,
            "request_spread": 0.0,
            "context": 1000,
            "score_slope": 1.0,
            "score_bias": 0.0,
        },
        "code": {
            "accept": [0.9, 0.9, 0.9],
            "concentration": 4,
            "request_spread": 0.5,
            "context": 2000,
            "score_slope": 0.5,
            "score_bias": -0.5,
        },
    },
    "timeline": [{"at_s": 0, "running": 6, "mix": {"chat": 1.0}}],
    "drift": [],
    "mean_output_tokens": 100,
}

Small = Callable[..., Scenario]


@pytest.fixture
def small() -> Small:
    """small(duration_s=5, **{"latency.overhead_ms": 1}): the small scenario with some keys changed."""

    def make(**changes: Any) -> Scenario:
        data = copy.deepcopy(SMALL)
        for dotted, value in changes.items():
            *path, last = dotted.split(".")
            inner = data
            for key in path:
                inner = inner[key]
            inner[last] = value
        return scenario_from(data, "small.yaml", Path("."))

    return make
