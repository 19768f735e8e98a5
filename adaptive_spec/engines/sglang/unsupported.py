"""Why K cannot be decided under the given server arguments, in SGLang's own manner."""

from __future__ import annotations

from typing import Any


def unsupported_reason(server_args: Any) -> str | None:
    """Return why adaptive-spec cannot decide K under the given server args, or None if supported.

    SGLang's own reasons come first, in its own words: what it cannot adapt, nobody can adapt for it.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.speculative.adaptive_spec_params import adaptive_unsupported_reason

    reason = adaptive_unsupported_reason(server_args)
    if reason is not None:
        return str(reason)
    cfg = resolving_view(server_args)
    if cfg.speculative_use_rejection_sampling:
        return "speculative_use_rejection_sampling=True is not supported (drafts are sampled, their confidence is another one)"
    if cfg.pp_size > 1:
        return f"pp_size={cfg.pp_size} is not supported (the next chain is drafted at the end of a step)"
    if cfg.dp_size > 1:
        return f"dp_size={cfg.dp_size} is not supported (start one server and one sidecar per replica)"
    if not cfg.speculative_adaptive:
        return "speculative_adaptive=False (pass --speculative-adaptive, so that SGLang captures more than one K)"
    return None


def can_observe(server_args: Any) -> bool:
    """Whether decode steps can be watched although K cannot change: EAGLE drafting one chain, one replica, one stage."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.speculative.adaptive_spec_params import adaptive_unsupported_reason

    cfg = resolving_view(server_args)
    return (
        adaptive_unsupported_reason(server_args) is None
        and not cfg.speculative_use_rejection_sampling
        and cfg.pp_size == 1
        and cfg.dp_size == 1
    )
