"""The controller in simulated decode loops whose records hold no confidence: K follows the rates of the positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptive_spec.domain.policy import Granularity
from tests.support.simulated_server import SimulatedServer, engine_info, staircase

BATCH = Granularity.BATCH


def goodput(confidences_known: bool, granularity: Granularity = BATCH) -> float:
    """Tokens per second over 1000 steps after 1000 steps."""
    server = SimulatedServer(engine_info(granularity), staircase(), confidences_known=confidences_known)
    server.run(1000)
    return server.run(1000)


@pytest.mark.parametrize(("batch_size", "accept"), [(2, 0.5), (8, 0.8), (40, 0.65)])
def test_k_by_rates_alone_reaches_the_goodput_of_the_best_k(batch_size: int, accept: float) -> None:
    server = SimulatedServer(
        engine_info(BATCH), staircase(), accept=accept, batch_size=batch_size, confidences_known=False
    )  # fmt: skip
    server.run(1000)
    assert server.run(1000) > 0.96 * server.static_goodput(server.best_static())


def test_at_batch_granularity_it_is_nearly_what_it_is_with_confidences() -> None:
    assert goodput(False) > 0.98 * goodput(True)


def test_at_request_granularity_all_requests_are_alike() -> None:
    server = SimulatedServer(engine_info(BATCH), staircase())
    assert goodput(False, Granularity.REQUEST) > 0.96 * server.static_goodput(server.best_static())


def test_a_collapsed_draft_is_noticed_by_its_counts() -> None:
    """By forgetting alone: the same requests go on, so there are none to compare with those before."""
    server = SimulatedServer(engine_info(BATCH), staircase(), accept=0.85, confidences_known=False)
    server.run(2000)
    assert server.planner.policy is not None
    assert server.planner.policy.draft_length(8, 4800) >= 3
    server.accept = 0.05
    server.run(1500)
    assert server.planner.policy.draft_length(8, 4800) <= 1


def test_changed_traffic_is_one_drift_by_the_share_of_accepted_first_tokens() -> None:
    """Requests of 40 steps each, so that there are new ones to compare with those before."""
    server = SimulatedServer(engine_info(BATCH), staircase(), accept=0.85, confidences_known=False)

    def run(steps: int) -> None:
        for _ in range(steps):
            record = server.step()
            ids = record.request_ids + np.uint32(1000 * (server.steps // 40))
            server.controller_sees(replace(record, request_ids=ids))

    run(2500)
    assert server.controller.counters.drift["calibration"] == 0
    server.accept = 0.45
    run(800)
    assert server.controller.counters.drift["calibration"] == 1
    texts = [event.text for event in server.controller.counters.events if "first draft tokens" in event.text]
    assert len(texts) == 1
    assert "acceptance of first draft tokens moved from 8" in texts[0]


def calibration_error(server: SimulatedServer) -> float | None:
    return server.controller.models.acceptance.reliability.ece


def test_confidences_that_begin_to_be_known_are_used() -> None:
    server = SimulatedServer(engine_info(BATCH), staircase(), slope=0.6, bias=-0.5, confidences_known=False)
    server.run(1000)
    assert calibration_error(server) is None
    server.confidences_known = True
    server.run(1000)
    error = calibration_error(server)
    assert error is not None
    assert error < 0.05
