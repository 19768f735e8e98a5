"""Settings, with the range of each and what larger and smaller values do. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatencySettings(_Section):
    """How step times are learnt."""

    jump_threshold: float = Field(
        0.15,
        ge=0.02,
        le=2.0,
        description=(
            "Relative jump that makes a tile boundary, 0.02..2. Larger: only big steps are reported. "
            "Smaller: noise may look like a boundary."
        ),
    )
    memory_samples: int = Field(
        64,
        ge=8,
        le=100_000,
        description=(
            "Samples a token count remembers, 8..100000. Larger: steadier estimates, slower to "
            "follow a change. Smaller: the reverse."
        ),
    )


class AcceptanceSettings(_Section):
    """How acceptance is learnt."""

    memory_steps: int = Field(
        400,
        ge=20,
        le=1_000_000,
        description=(
            "Decode steps a calibration remembers, 20..1000000. Larger: steadier, slower to follow traffic. Smaller: the reverse."
        ),
    )
    confidences: bool = Field(
        True,
        description=(
            "on: the SGLang plugin computes the draft's confidences for EAGLE, a pass over the logits of every drafted token. "
            "off: it does not, and acceptance is learnt from accepted counts alone."
        ),
    )


class PolicySettings(_Section):
    """Guard rails of the decision."""

    k_min: int = Field(0, ge=0, le=32, description="Smallest K ever chosen, 0..32. 0 allows speculation to be switched off.")
    k_max: int = Field(32, ge=0, le=32, description="Largest K ever chosen, 0..32, cut to what the engine can run.")
    min_dwell_s: float = Field(
        1.0,
        ge=0.0,
        le=3600.0,
        description=(
            "Seconds a policy stays at least, 0..3600. Larger: fewer swaps, slower reaction. Smaller: quicker, may flap."
        ),
    )
    min_gain: float = Field(
        0.005,
        ge=0.0,
        le=1.0,
        description=(
            "Predicted relative gain a swap needs beyond its own uncertainty, 0..1. Larger: fewer swaps. Smaller: chases noise."
        ),
    )
    probe_budget: float = Field(
        0.008,
        ge=0.0,
        le=0.2,
        description=(
            "Share of decode time that may be spent on measuring plans that are not the best, 0..0.2. 0 switches probing off."
        ),
    )
    max_age_s: float = Field(
        30.0,
        ge=1.0,
        le=86_400.0,
        description=("Seconds without a sign of life from the sidecar after which the engine returns to its launch K, 1..86400."),
    )
    rollback_loss: float = Field(
        0.05,
        ge=0.005,
        le=1.0,
        description=(
            "Measured loss against the previous policy's prediction at which a swap is taken back, 0.005..1. "
            "Smaller: more nervous."
        ),
    )


class SweepSettings(_Section):
    """The cold-start sweep."""

    samples_per_count: int = Field(
        4, ge=2, le=100, description=("Steps measured at each token count, 2..100. Larger: surer boundaries, longer sweep.")
    )
    max_steps: int = Field(1500, ge=10, le=1_000_000, description="Decode steps the sweep may take at most, 10..1000000.")
    max_tokens: int = Field(1024, ge=1, le=65_536, description="Largest token count the sweep measures, 1..65536.")


class ControllerSettings(_Section):
    """Everything the pure controller needs."""

    mode: Literal["active", "shadow"] = Field("active", description="active: act on the engine. shadow: decide and report only.")
    refit_interval_s: float = Field(
        0.5,
        ge=0.05,
        le=600.0,
        description=("Seconds between refits, 0.05..600. Larger: less sidecar work. Smaller: quicker reaction."),
    )
    latency: LatencySettings = LatencySettings()
    acceptance: AcceptanceSettings = AcceptanceSettings()
    policy: PolicySettings = PolicySettings()
    sweep: SweepSettings = SweepSettings()


class GrafanaSettings(_Section):
    """Annotations in Grafana for every swap and drift event. Needs the extra `grafana`."""

    url: str | None = Field(
        None, min_length=1, description="Address of Grafana, with its path prefix if it has one. None: no annotations."
    )
    token_file: Path | None = Field(
        None, description="File with the token of a service account that may write annotations. None: none is shown."
    )
    timeout_s: float = Field(
        5.0,
        ge=0.1,
        le=60.0,
        description="Seconds Grafana may take to answer, 0.1..60. Larger: fewer are dropped while it is slow.",
    )
    queue_length: int = Field(
        64,
        ge=1,
        le=10_000,
        description="Events that wait for a slow Grafana, 1..10000; beyond that the oldest are dropped and counted.",
    )


class SidecarSettings(_Section):
    """The sidecar's own configuration file."""

    runtime_dir: Path = Field(
        Path("/dev/shm/adaptive-spec"), description="Folder of the ring and the policy page, shared with the engine."
    )
    profile_dir: Path = Field(Path("profiles"), description="Folder of profiles, one sub-folder per model, GPU and TP degree.")
    profile_store: str | None = Field(
        None,
        min_length=1,
        description=(
            "fsspec URL of profiles shared by a fleet, as `file:///mnt/profiles` or `s3://bucket/profiles`: replicas of the same "
            "model, GPU and TP degree start from the newest valid one. None: every replica sweeps for itself. Needs the extra "
            "`store`, and the storage's own fsspec package."
        ),
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address the HTTP server binds. Loopback unless told otherwise.")
    port: int = Field(9477, ge=0, le=65_535, description="Port of the HTTP server, 0..65535. 0 takes a free one.")
    control_token_file: Path | None = Field(
        None,
        description=("File with the token `ctl` must show. None: a token is made at start and kept, mode 0600, in runtime_dir."),
    )
    checkpoint_interval_s: float = Field(
        10.0,
        ge=1.0,
        le=3600.0,
        description=("Seconds between checkpoints, 1..3600. Larger: a restart forgets more. Smaller: more writing."),
    )
    poll_interval_s: float = Field(
        0.02,
        ge=0.001,
        le=1.0,
        description=(
            "Seconds between looks at the ring, 0.001..1. Larger: less CPU, later reaction, records may be overwritten."
        ),
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line printed.")
    controller: ControllerSettings = ControllerSettings()
    grafana: GrafanaSettings = GrafanaSettings()
