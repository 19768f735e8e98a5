"""Which vLLM servers the plugin decides K for, observes only, or refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DATA_PARALLEL_TITLE = "EngineCore_DP"
"""In the title of each EngineCore of a server with data parallelism; others are called EngineCore."""
V2_FOLLOWS_K_FROM = (0, 32)
"""First release whose V2 model runner verifies as many drafts as the schedule asks for; before, it always verified all."""


def refusal(config: Any, version: str, title: str = "") -> str | None:
    """Why the plugin does not attach to a server, None if it does. config: vLLM's VllmConfig. title: of this process."""
    if config.speculative_config is None:
        return "the server does not speculate: --speculative-config is not set"
    parallel = config.parallel_config
    # Each EngineCore of a dense model is told a size of 1 when it starts; its title and, beyond the first, its index tell.
    if parallel.data_parallel_size > 1 or parallel.data_parallel_index > 0 or DATA_PARALLEL_TITLE in title:
        return (
            "data parallelism: vLLM drops the schedule of K there, because ranks that choose different K would wait for each "
            "other for ever; K is fixed"
        )
    if bool(config.use_v2_model_runner) and release_numbers(version) < V2_FOLLOWS_K_FROM:
        return f"the V2 model runner of vLLM {version} ignores K (from 0.32.0 on it does not); VLLM_USE_V2_MODEL_RUNNER=0 helps"
    return None


def process_title() -> str:
    """The title that vLLM gave to this process, such as "VLLM::EngineCore"; "" where there is no /proc."""
    try:
        return Path("/proc/self/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""


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
