"""Which server arguments the plugin supports: the reason why it cannot decide K or observe, in the form SGLang gives its own."""

from __future__ import annotations

from typing import Any

from adaptive_spec.engines.common.identity import known
from adaptive_spec.wire.slot import MAX_K_LIMIT

OBSERVED = ("EAGLE", "EAGLE3", "STANDALONE", "NGRAM")
"""Algorithms whose steps are observed where K cannot change. DSPARK has reasons of its own."""
DEVICES = ("cpu", "cuda")
"""ROCm is "cuda" too. On another device neither the stage clock nor the copies of confidences to the host are known to work."""


def refusal(server_args: Any) -> str | None:
    """Return why the steps of a server cannot even be observed, None if they can. Not for DSPARK."""
    from sglang.srt.arg_groups.overrides import resolving_view

    cfg = resolving_view(server_args)
    algorithm = cfg.speculative_algorithm
    if algorithm is not None and algorithm not in OBSERVED:
        return f"speculative_algorithm={algorithm} is not supported (only {', '.join(OBSERVED)} and DSPARK)"
    reason = _other_worker(algorithm) or _other_work(cfg)
    if reason is not None or algorithm is None:
        return reason
    steps, tokens = cfg.speculative_num_steps, cfg.speculative_num_draft_tokens
    longest = int((tokens or 1) - 1 if algorithm == "NGRAM" else steps or 0)
    if longest > MAX_K_LIMIT:
        return f"{longest} draft tokens per request are not supported (at most {MAX_K_LIMIT})"
    if cfg.speculative_use_rejection_sampling:
        return "speculative_use_rejection_sampling=True is not supported (confidences of sampled drafts are not measured)"
    return None


def _other_worker(algorithm: str | None) -> str | None:
    """The reason of a platform that brings its own worker, where this release of SGLang knows such platforms."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    of_platform = getattr(SpeculativeAlgorithm.from_string(algorithm), "get_platform_worker_cls", None)
    found = of_platform() if of_platform is not None and algorithm is not None else None
    return f"the platform serves {algorithm} with {found.__name__}" if found is not None else None


def _other_work(cfg: Any) -> str | None:
    """The reason of a server whose forward passes are not decode steps of one batch on one device."""
    device = str(cfg.device).partition(":")[0]
    if device not in DEVICES:
        return f"device={cfg.device} is not supported (must be cpu or cuda: of others numpy cannot read the tensors)"
    if cfg.disaggregation_mode == "prefill":
        return "disaggregation_mode=prefill is not supported (such a server decodes nothing)"
    if cfg.pp_size > 1:
        return f"pp_size={cfg.pp_size} is not supported (the next chain is drafted at the end of a step)"
    for name, at_once in known(cfg, ("enable_two_batch_overlap", "enable_pdmux")).items():
        if at_once:
            return f"{name}=True is not supported (two batches share the time of a step)"
    return None


def unsupported_reason(server_args: Any) -> str | None:
    """Return why adaptive-spec cannot decide K under the given server args, or None if supported.

    SGLang's own reasons come first: K cannot change where SGLang cannot change it.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.speculative.adaptive_spec_params import adaptive_unsupported_reason

    reason = adaptive_unsupported_reason(server_args)
    if reason is not None:
        return str(reason)
    reason = refusal(server_args)
    if reason is not None:
        return reason
    if not resolving_view(server_args).speculative_adaptive:
        return "speculative_adaptive=False (pass --speculative-adaptive, so that SGLang captures more than one K)"
    return None


def dspark_unsupported_reason(server_args: Any) -> str | None:
    """Return why the plugin does not attach to a DSPARK server, or None if it can observe its steps."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    cfg = resolving_view(server_args)
    platform_worker = SpeculativeAlgorithm.DSPARK.get_platform_worker_cls()
    if platform_worker is not None:
        return f"the platform serves DSPARK with {platform_worker.__name__}"
    if not str(cfg.device).startswith("cuda"):
        return f"device={cfg.device} is not supported for DSPARK (must be cuda: elsewhere copies to the host would block)"
    if cfg.pp_size > 1:
        return f"pp_size={cfg.pp_size} is not supported for DSPARK (only the last stage plans)"
    if cfg.disaggregation_mode == "prefill":
        return "disaggregation_mode=prefill is not supported (such a server decodes nothing)"
    gamma = int(cfg.speculative_num_draft_tokens) - 1
    if gamma > MAX_K_LIMIT:
        return f"{gamma} draft tokens per request are not supported (at most {MAX_K_LIMIT})"
    return None
