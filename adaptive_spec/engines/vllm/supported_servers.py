"""Which vLLM servers the plugin decides K for, observes only, or refuses."""

from __future__ import annotations

import re
from typing import Any

V2_FOLLOWS_K_FROM = (0, 32)
"""First release whose V2 model runner verifies as many drafts as the schedule asks for; before, it always verified all."""


def refusal(config: Any, version: str) -> str | None:
    """Why the plugin does not attach to a server, None if it does. config: vLLM's VllmConfig."""
    if config.speculative_config is None:
        return "the server does not speculate: --speculative-config is not set"
    if config.parallel_config.data_parallel_size > 1:
        return (
            "data parallelism: vLLM drops the schedule of K there, because ranks that choose different K would wait for each "
            "other for ever; K is fixed"
        )
    if bool(config.use_v2_model_runner) and release_numbers(version) < V2_FOLLOWS_K_FROM:
        return f"the V2 model runner of vLLM {version} ignores K (from 0.32.0 on it does not); VLLM_USE_V2_MODEL_RUNNER=0 helps"
    return None


def observe_only(config: Any, lookup: Any) -> str | None:
    """Why K cannot be changed on a server that can be observed, None if it can."""
    if bool(getattr(config.speculative_config, "enable_adaptive_verification", False)):
        return "vLLM's own adaptive verification chooses what is verified; it is given the measured step times"
    if not lookup:
        return "no schedule of K: launch with num_speculative_tokens_per_batch_size in --speculative-config"
    return None


def release_numbers(version: str) -> tuple[int, ...]:
    """(0, 32, 0) of "0.32.0+cpu"."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])
