"""Checks of `cost_curves` on vLLM's own AdaptiveVerificationManager, in the kit's environment; exit status 0 when they hold.

The manager's constructor needs CUDA streams, so the object is made without it: `set_cost_curves`, the tables and the choice of
the budget are vLLM's own code.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.worker.gpu.spec_decode import adaptive_verification as vllm_module

from adaptive_spec.domain.policy import Granularity, Mode, Policy
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.method_hooks import hook_method
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.vllm.cost_curves import RESTORE, CostCurves, Curves, LiveCurves
from adaptive_spec.engines.vllm.step_notes import CURVES_ATTRIBUTE, NOTES_ATTRIBUTE, STEP_ATTRIBUTE
from adaptive_spec.engines.vllm.worker_attachment import WorkerAttachment

K, REQUESTS = 7, 8


def policy(version: int, token_s: float, mode: Mode = Mode.ACTIVE) -> Policy:
    verify_s = (0.002 + token_s * np.arange(REQUESTS * (K + 1) + 1)).astype(np.float32)
    return Policy(
        version, mode, True, Granularity.REQUEST, K, np.full((REQUESTS + 1, 1), K, np.uint8), np.zeros(0, np.float32),
        np.full((K + 1, REQUESTS + 1), 0.001, np.float32), verify_s,
        0.0, SurvivalMap(np.full((K, GRID_POINTS), 0.5, np.float32), True), False,
    )  # fmt: skip


def manager() -> Any:
    made: Any = object.__new__(vllm_module.AdaptiveVerificationManager)
    slots = {f"r{i}": i for i in range(REQUESTS)}
    made.req_states = SimpleNamespace(
        max_num_reqs=REQUESTS, max_num_batched_tokens=REQUESTS * (K + 1), num_speculative_steps=K, req_id_to_index=slots,
        num_computed_tokens_np=np.full(REQUESTS, 50), prefill_len=SimpleNamespace(np=np.full(REQUESTS, 10)),
    )  # fmt: skip
    made.num_speculative_steps, made.num_bonus_tokens, made._max_total_logits = K, 1, 1 << 20
    made._cudagraph_limit, made._stale_idx, made._batch_budget = 0, 0, None
    made._stale_confidences = [SimpleNamespace(np=np.full((REQUESTS, K), 0.8))]
    return made


def tokens_verified(made: Any) -> int:
    return int(made.get_num_tokens({f"r{i}": K + 1 for i in range(REQUESTS)}, {f"r{i}": [1] * K for i in range(REQUESTS)}))


def through_the_hooks(made: Any, curves: Curves, version: int) -> None:
    """As in a server: curves come with a step, and how many tokens vLLM chose leaves with its result."""
    guard = Guard("vLLM", "")
    attachment = WorkerAttachment(PluginSettings(mode="active"), guard)
    hook_method(
        "vllm.v1.worker.gpu.spec_decode.adaptive_verification.AdaptiveVerificationManager.get_num_tokens",
        guard.around("budget", None, attachment.budget_after),
    )
    worker = SimpleNamespace(model_runner=SimpleNamespace(adaptive_verification=made))
    step = SimpleNamespace(**{STEP_ATTRIBUTE: version, CURVES_ATTRIBUTE: curves})
    result = SimpleNamespace(model_runner_output=SimpleNamespace(sampled_token_ids=None))
    attachment.curves_before(worker, step)
    chosen = tokens_verified(made)
    attachment.outcome_after(None, result, worker)
    assert getattr(result.model_runner_output, NOTES_ATTRIBUTE) == [{"step": version, "tokens": chosen}]
    assert REQUESTS <= chosen < REQUESTS * (K + 1), chosen
    # A step without drafts asks for no budget, and a server without adaptive verification has none.
    attachment.curves_before(worker, step)
    attachment.outcome_after(None, plain := SimpleNamespace(sampled_token_ids=[]), worker)
    attachment.curves_before(SimpleNamespace(model_runner=SimpleNamespace(adaptive_verification=None)), step)
    attachment.outcome_after(None, plain, worker)
    assert not hasattr(plain, NOTES_ATTRIBUTE)
    assert guard.failures == {}


def main() -> None:
    ours: Any = vllm_module
    ours.get_tp_group = lambda: SimpleNamespace(broadcast_object=lambda value, src: value)  # one rank
    made, live, curves = manager(), LiveCurves(), CostCurves()
    made.set_cost_curves([(1, 1.0), (REQUESTS, 1.0)], [(1, 2.0), (REQUESTS * (K + 1), 2.0)])  # flat: more tokens cost nothing
    at_launch = made.cost_tables
    everything = tokens_verified(made)
    assert everything == REQUESTS * (K + 1), everything
    assert curves.due(policy(1, 0.01, Mode.SWEEP), REQUESTS) is None, "nothing is measured yet"
    dear = curves.due(policy(1, 0.01), REQUESTS)
    assert dear is not None
    live.put(made, dear)
    assert abs(made.cost_tables[1][10] - 102.0) < 1e-3, "2 ms and 10 ms for each token"
    few = tokens_verified(made)
    assert REQUESTS <= few < everything, few
    assert curves.due(policy(1, 0.01), REQUESTS) is None, "sent once"
    cheap = curves.due(policy(2, 0.0), REQUESTS)
    assert cheap is not None
    live.put(made, cheap)
    assert tokens_verified(made) == everything
    back = curves.due(None, REQUESTS)
    assert back == RESTORE
    live.put(made, back)
    assert made.cost_tables is at_launch
    assert curves.due(None, REQUESTS) is None
    through_the_hooks(made, dear, 3)


if __name__ == "__main__":
    main()
