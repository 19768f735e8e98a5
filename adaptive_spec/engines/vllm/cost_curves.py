"""Step times for vLLM's own adaptive verification (DSpark), in its terms, from a policy.

vLLM measures two curves once, while the server starts: draft milliseconds by requests, and verify milliseconds by tokens. Its
`AdaptiveVerificationManager.set_cost_curves` takes them; here they are those of the sidecar's live models. They travel with the
scheduler's output, so every rank replaces them before the same step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptive_spec.domain.policy import Mode, Policy

MOST_POINTS = 512
"""Most points of the verify curve: it is pickled to every rank. vLLM takes the next larger point's time for what lies between."""

Curves = tuple[list[tuple[int, float]], list[tuple[int, float]]]
RESTORE: Curves = ([], [])
"""Put back what vLLM measured at its start."""


class CostCurves:
    """Which curves are due. Every version of a policy is sent once; without one, or before step times were measured, `RESTORE`
    is sent once.
    """

    def __init__(self) -> None:
        self._sent: int = 0

    def due(self, policy: Policy | None, max_batch: int) -> Curves | None:
        """The curves to send with this step, None for none. policy: None where none acts."""
        if policy is not None and (policy.mode is Mode.SWEEP or not policy.fixed_s.any()):
            policy = None
        version = policy.version if policy is not None else 0
        if version == self._sent:
            return None
        self._sent = version
        return curves_of(policy, max_batch) if policy is not None else RESTORE


def curves_of(policy: Policy, max_batch: int) -> Curves:
    """(requests, draft ms), (tokens, verify ms): those times of a step that depend on requests, and on tokens."""
    sizes = range(1, min(max_batch, policy.fixed_s.shape[1] - 1) + 1)
    draft = [(b, 1e3 * float(policy.fixed_s[policy.max_k, b])) for b in sizes]
    tokens = np.unique(np.linspace(1, len(policy.verify_s) - 1, min(len(policy.verify_s) - 1, MOST_POINTS)).round().astype(int))
    return draft, [(int(t), 1e3 * float(policy.verify_s[t])) for t in tokens]


class LiveCurves:
    """In a worker: puts curves into vLLM's manager."""

    def __init__(self) -> None:
        self._at_launch: Any = None

    def put(self, manager: Any, curves: Curves) -> None:
        """Replace the curves, or restore those of the start. Every rank calls it in the same step: vLLM broadcasts them."""
        if self._at_launch is None:
            self._at_launch = manager.cost_tables
        if curves == RESTORE:
            manager.cost_tables = self._at_launch
        else:
            manager.set_cost_curves(*curves)
