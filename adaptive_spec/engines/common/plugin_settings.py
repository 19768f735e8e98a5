"""A plugin's settings, from environment variables: the command line of its process is the engine's.

| variable | meaning |
|---|---|
| ADAPTIVE_SPEC_MODE | off (default), shadow (observe and report) or active (decide K) |
| ADAPTIVE_SPEC_CONFIG | the sidecar's YAML. Used: runtime_dir; max_age_s and fallback of controller.policy; |
| | controller.mode where ADAPTIVE_SPEC_MODE is not set |
| ADAPTIVE_SPEC_RUNTIME_DIR | folder shared with the sidecar; takes precedence over the configuration. Without either: |
| | /dev/shm/adaptive-spec-USER-PORT, with the user's number and the server's port |
| ADAPTIVE_SPEC_FALLBACK | who chooses K while no policy acts: stock (default, SGLang's own adaptive policy), launch (launch K); |
| | takes precedence over the configuration |
| ADAPTIVE_SPEC_BATCH_SCORES | step choice from the batch's own scores: auto (default), on, off; never with several ranks of |
| | SGLang; with vLLM: a verify length for each request |
| ADAPTIVE_SPEC_CONFIDENCES | draft confidences of EAGLE: on, off; takes precedence over the configuration, whose default is on |
| ADAPTIVE_SPEC_RANKS_TIMEOUT_S | seconds that rank 0 allows the others to answer, outside the steps, 1..3600, default 60 |
| ADAPTIVE_SPEC_UNTESTED_SGLANG | 1: also attach to an untested SGLang version if all hook targets are found |
| ADAPTIVE_SPEC_UNTESTED_VLLM | 1: the same for vLLM |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import default_runtime_dir, dp_rank_dir

PREFIX = "ADAPTIVE_SPEC_"
MODES = ("off", "shadow", "active")
FALLBACKS = ("stock", "launch")
LONGEST_SHOWN = 100


@dataclass(frozen=True)
class PluginSettings:
    """See the module. default_folder: whether runtime_dir follows the server's port, see `of_server`."""

    mode: Literal["off", "shadow", "active"] = "off"
    runtime_dir: Path = field(default_factory=default_runtime_dir)
    max_age_s: float = 30.0
    batch_scores: Literal["auto", "on", "off"] = "auto"
    ranks_timeout_s: int = 60
    untested_sglang: bool = False
    fallback: Literal["stock", "launch"] = "stock"
    confidences: Literal["on", "off"] = "on"
    untested_vllm: bool = False
    default_folder: bool = False

    def of_server(self, port: int) -> PluginSettings:
        """Return these settings for a server on a port: without a folder of its own in environment or configuration, it has one
        by its port.
        """
        return replace(self, runtime_dir=default_runtime_dir(port)) if self.default_folder else self

    def of_dp_rank(self, rank: int | None) -> PluginSettings:
        """Return these settings for a data-parallel rank, which has a folder of its own in the server's; None: without one."""
        return self if rank is None else replace(self, runtime_dir=dp_rank_dir(self.runtime_dir, rank))


def plugin_settings(environment: Mapping[str, str]) -> PluginSettings:
    """Read the settings. Raises BadInput, one line, for a value that is not allowed or a configuration that cannot be read."""
    mode = _choice(environment, "MODE", MODES, "")
    config = environment.get(PREFIX + "CONFIG", "")
    if mode == "off" or not (mode or config):
        return PluginSettings()
    runtime_dir, max_age_s, fallback, confidences = default_runtime_dir(), 30.0, "stock", "on"
    named = bool(environment.get(PREFIX + "RUNTIME_DIR"))
    if config:
        from adaptive_spec.config.load import load_settings

        settings = load_settings(Path(config))
        mode = mode or settings.controller.mode
        policy = settings.controller.policy
        runtime_dir, max_age_s = settings.runtime_dir, policy.max_age_s
        named |= bool(settings.model_fields_set & {"runtime_dir", "server_port"})
        fallback = policy.fallback
        confidences = "on" if settings.controller.acceptance.confidences else "off"
    runtime_dir = Path(environment.get(PREFIX + "RUNTIME_DIR") or runtime_dir)
    return PluginSettings(
        cast(Literal["off", "shadow", "active"], mode), runtime_dir, max_age_s,
        cast(Literal["auto", "on", "off"], _choice(environment, "BATCH_SCORES", ("auto", "on", "off"), "auto")),
        _whole(environment, "RANKS_TIMEOUT_S", 1, 3600, 60),
        _choice(environment, "UNTESTED_SGLANG", ("0", "1"), "0") == "1",
        cast(Literal["stock", "launch"], _choice(environment, "FALLBACK", FALLBACKS, fallback)),
        cast(Literal["on", "off"], _choice(environment, "CONFIDENCES", ("on", "off"), confidences)),
        _choice(environment, "UNTESTED_VLLM", ("0", "1"), "0") == "1",
        not named,
    )  # fmt: skip


def _choice(environment: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = environment.get(PREFIX + name, "").strip().lower()
    if not value:
        return default
    if value not in allowed:
        raise BadInput(f"{PREFIX}{name}: must be one of {', '.join(allowed)}, got {value[:LONGEST_SHOWN]!r}")
    return value


def _whole(environment: Mapping[str, str], name: str, low: int, high: int, default: int) -> int:
    text = environment.get(PREFIX + name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not low <= int(text) <= high:
        raise BadInput(f"{PREFIX}{name}: must be a whole number in {low}..{high}, got {text[:LONGEST_SHOWN]!r}")
    return int(text)
