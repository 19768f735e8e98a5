"""The explanation of a K: the numbers the decision used."""

from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings, PolicySettings
from adaptive_spec.control.explanation import Explanation
from adaptive_spec.domain.policy import Granularity
from tests.control.test_controller import server
from tests.support.simulated_server import SimulatedServer


def explained(s: SimulatedServer, batch_size: int) -> Explanation:
    considered = s.controller.snapshot(s.now_s).considered
    assert considered is not None
    return considered.explain(batch_size, s.controller.models.context)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_its_parts_add_up_and_its_best_is_the_tables_k(granularity: Granularity) -> None:
    s = server(granularity)
    s.run(200)
    for batch_size in (1, s.batch_size, 31):
        e = explained(s, batch_size)
        assert [plan.k for plan in e.plans] == list(s.controller.info.allowed_k(batch_size))
        for plan in e.plans:
            assert plan.goodput == pytest.approx(plan.tokens / plan.step_s)
            if granularity is Granularity.BATCH:
                assert sum(plan.stage_s.values()) == pytest.approx(plan.step_s)
        assert all(plan.gain is not None for plan in e.plans)
        margin = {p.k: 1.0 if p.k == e.before else (1.0 + (p.gain or 0.0)) / (1.0 + p.hurdle) for p in e.plans}
        assert margin[e.wanted] == max(margin.values())
    table = s.controller.k_by_batch_size()
    assert table[s.batch_size] == explained(s, s.batch_size).wanted


def test_a_rail_is_named() -> None:
    s = server(settings=ControllerSettings(policy=PolicySettings(k_max=2)))
    s.run(50)
    e = explained(s, 4)
    assert e.wanted <= 2
    assert {plan.k for plan in e.plans if plan.verdict == "outside k_min..k_max = 0..2"} == set(range(3, 9)) & {
        plan.k for plan in e.plans
    }


def test_a_k_that_was_rolled_back_is_named() -> None:
    s = server()
    s.run(100)
    decision = s.controller._decision
    considered = decision.considered
    assert considered is not None
    banned = np.zeros(considered.goodput.shape, dtype=bool)
    k = next(plan.k for plan in explained(s, 4).plans if plan.k != considered.wanted[4, 0])
    banned[4, 0, k] = True
    object.__setattr__(considered, "banned", banned)
    assert next(plan.verdict for plan in explained(s, 4).plans if plan.k == k) == "rolled back lately"
