"""Which server arguments the plugin supports: the reason why it cannot decide K or observe, in the form SGLang gives its own."""

from __future__ import annotations

from typing import Any

from adaptive_spec.wire.slot import MAX_K_LIMIT


def unsupported_reason(server_args: Any) -> str | None:
    """Return why adaptive-spec cannot decide K under the given server args, or None if supported.

    SGLang's own reasons come first: K cannot change where SGLang cannot change it.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.speculative.adaptive_spec_params import adaptive_unsupported_reason

    reason = adaptive_unsupported_reason(server_args)
    if reason is not None:
        return str(reason)
    cfg = resolving_view(server_args)
    if cfg.speculative_use_rejection_sampling:
        return "speculative_use_rejection_sampling=True is not supported (confidences of sampled drafts are not measured)"
    if cfg.pp_size > 1:
        return f"pp_size={cfg.pp_size} is not supported (the next chain is drafted at the end of a step)"
    if cfg.dp_size > 1:
        return f"dp_size={cfg.dp_size} is not supported (start one server and one sidecar per replica)"
    if not cfg.speculative_adaptive:
        return "speculative_adaptive=False (pass --speculative-adaptive, so that SGLang captures more than one K)"
    return None


def can_observe(server_args: Any) -> bool:
    """Whether decode steps can be observed although K cannot change: EAGLE with one chain, one replica, one pipeline stage."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.speculative.adaptive_spec_params import adaptive_unsupported_reason

    cfg = resolving_view(server_args)
    return (
        adaptive_unsupported_reason(server_args) is None
        and not cfg.speculative_use_rejection_sampling
        and cfg.pp_size == 1
        and cfg.dp_size == 1
    )


def dspark_unsupported_reason(server_args: Any) -> str | None:
    """Return why the plugin does not attach to a DSPARK server, or None if it can observe its steps."""
    from sglang.srt.arg_groups.overrides import resolved_view, resolving_view
    from sglang.srt.runtime_context import attn_dp_enabled_of
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    cfg = resolving_view(server_args)
    platform_worker = SpeculativeAlgorithm.DSPARK.get_platform_worker_cls()
    if platform_worker is not None:
        return f"the platform serves DSPARK with {platform_worker.__name__}"
    if not str(cfg.device).startswith("cuda"):
        return f"device={cfg.device} is not supported for DSPARK (must be cuda: elsewhere copies to the host would block)"
    if attn_dp_enabled_of(resolved_view(server_args)):
        return "attention DP is not supported (its ranks plan different batches)"
    if cfg.pp_size > 1:
        return f"pp_size={cfg.pp_size} is not supported for DSPARK (only the last stage plans)"
    if cfg.dp_size > 1:
        return f"dp_size={cfg.dp_size} is not supported (start one server and one sidecar per replica)"
    if cfg.disaggregation_mode == "prefill":
        return "disaggregation_mode=prefill is not supported (such a server decodes nothing)"
    gamma = int(cfg.speculative_num_draft_tokens) - 1
    if gamma > MAX_K_LIMIT:
        return f"{gamma} draft tokens per request are not supported (at most {MAX_K_LIMIT})"
    return None
