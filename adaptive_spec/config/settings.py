"""Settings, each with its range and the effect of larger and smaller values. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adaptive_spec.config.checks import FilePath, FolderPath, HostName, StoreUrl, WebUrl
from adaptive_spec.runtime_folder import DEFAULT_SERVER_PORT, default_runtime_dir


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatencySettings(_Section):
    """Learning of step times."""

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
            "Samples remembered per token count, 8..100000. Larger: steadier estimates, slower to "
            "follow a change. Smaller: the reverse."
        ),
    )


class AcceptanceSettings(_Section):
    """Learning of acceptance."""

    memory_steps: int = Field(
        400,
        ge=20,
        le=1_000_000,
        description=(
            "Decode steps remembered by the calibration, 20..1000000. Larger: steadier, slower to follow. Smaller: the reverse."
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

    k_min: int = Field(
        0,
        ge=0,
        le=32,
        description=(
            "Smallest K ever chosen, by table, trial, pin or step choice, 0..32. 0 allows speculation to be off. An engine "
            "that always drafts the same K (SGLang's DSPARK) verifies at least so many draft tokens per request of a step, "
            "on the mean."
        ),
    )
    k_max: int = Field(
        32,
        ge=0,
        le=32,
        description=(
            "Largest K ever chosen, as for `k_min`, 0..32, cut to what the engine can run. An engine that always drafts the "
            "same K verifies at most so many draft tokens per request of a step, on the mean."
        ),
    )
    min_dwell_s: float = Field(
        1.0,
        ge=0.0,
        le=3600.0,
        description=(
            "Shortest time between swaps, seconds, 0..3600. Larger: fewer swaps, slower reaction. "
            "Smaller: faster reaction, K may change back and forth."
        ),
    )
    min_gain: float = Field(
        0.005,
        ge=0.0,
        le=1.0,
        description=(
            "Predicted relative gain a swap needs beyond its uncertainty, 0..1. Larger: fewer swaps. Smaller: swaps follow noise."
        ),
    )
    slo_tpot_ms: float | None = Field(
        None,
        gt=0.0,
        le=1e6,
        description=(
            "Target for the time per output token of every request, milliseconds, above 0 and at most 1000000. Of the K "
            "whose expected time per token stays within it for the slowest request, the one with the most goodput is chosen; "
            "where none does, the K with the least time per token. Smaller: shorter drafts, less goodput. "
            "Empty: the most goodput, whatever a single request waits. With a target the step choice of an engine is off."
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
    control_share: float = Field(
        0.002,
        ge=0.0,
        le=0.05,
        description=(
            "Share of decode steps that run the launch K, so that the gain over it is measured with a standard error, 0..0.05; "
            "what they lose is paid from `probe_budget`. Larger: the error shrinks sooner. 0: off, the gain is an estimate."
        ),
    )
    max_age_s: float = Field(
        30.0,
        ge=1.0,
        le=86_400.0,
        description=("Age of the sidecar's heartbeat, seconds, beyond which no policy acts (see `fallback`), 1..86400."),
    )
    fallback: Literal["stock", "launch"] = Field(
        "stock",
        description=(
            "Who chooses K while no policy of the sidecar acts: stock (the engine's own adaptive policy where it has one, as "
            "SGLang with --speculative-adaptive, else the launch K) or launch (the launch K)."
        ),
    )
    rollback_loss: float = Field(
        0.05,
        ge=0.005,
        le=1.0,
        description=(
            "Measured loss against the previous policy's prediction at which a swap is taken back, 0.005..1. "
            "Smaller: more rollbacks."
        ),
    )


class SweepSettings(_Section):
    """The cold-start sweep."""

    samples_per_count: int = Field(
        4,
        ge=2,
        le=100,
        description=("Steps measured at each token count, 2..100. Larger: surer boundaries, longer sweep."),
    )
    max_steps: int = Field(1500, ge=10, le=1_000_000, description="Decode steps the sweep may take at most, 10..1000000.")
    max_tokens: int = Field(1024, ge=1, le=65_536, description="Largest token count the sweep measures, 1..65536.")
    max_loss_s: float = Field(
        2.0,
        ge=0.0,
        le=86_400.0,
        description=(
            "Decode time that one sweep may lose against the best plan known, seconds, 0..86400; always at least three steps of "
            "that plan. A sweep ends before a trial that is expected to lose more than is left; `probe_budget` pays for what is "
            "measured later. Without effect on the embedded engine. Larger: more is measured at a slow server's cold start. "
            "Smaller: less time is lost there."
        ),
    )


class ControllerSettings(_Section):
    """The controller."""

    mode: Literal["active", "shadow"] = Field("active", description="active: act on the engine. shadow: decide and report only.")
    refit_interval_s: float = Field(
        0.5,
        ge=0.05,
        le=600.0,
        description=("Seconds between refits, 0.05..600. Larger: less work for the sidecar. Smaller: faster reaction."),
    )
    latency: LatencySettings = LatencySettings()
    acceptance: AcceptanceSettings = AcceptanceSettings()
    policy: PolicySettings = PolicySettings()
    sweep: SweepSettings = SweepSettings()


class GrafanaSettings(_Section):
    """Annotations in Grafana for every swap and drift event. Needs the extra `grafana`."""

    url: WebUrl | None = Field(
        None, min_length=1, description="URL of Grafana, with its path prefix if it has one. None: no annotations."
    )
    token_file: FilePath | None = Field(
        None, description="File with the token of a service account that may write annotations. None: no token is sent."
    )
    timeout_s: float = Field(
        5.0,
        ge=0.1,
        le=60.0,
        description="Seconds Grafana may take to answer, 0.1..60. Larger: fewer events are dropped while Grafana is slow.",
    )
    queue_length: int = Field(
        64,
        ge=1,
        le=10_000,
        description="Events queued for a slow Grafana, 1..10000; beyond that the oldest are dropped and counted.",
    )


class SidecarSettings(_Section):
    """The sidecar's own configuration file."""

    runtime_dir: FolderPath = Field(
        default_factory=default_runtime_dir,
        description=(
            "Folder of the ring and the policy page, shared with the engine: only for the user of both, mode 0700. Default: "
            "`/dev/shm/adaptive-spec-USER-PORT`, with the user's number and `server_port`."
        ),
    )
    profile_dir: FolderPath = Field(
        Path("profiles"), description="Folder of profiles, one sub-folder per model, GPU and TP degree."
    )
    profile_store: StoreUrl | None = Field(
        None,
        min_length=1,
        description=(
            "fsspec URL of profiles shared by a fleet, like `file:///mnt/profiles` or `s3://bucket/profiles`: replicas of the "
            "same model, GPU and TP degree start from the newest valid one. None: every replica runs its own sweep. Needs the "
            "extra `store`, and the storage's own fsspec package."
        ),
    )
    profile_store_key_file: FilePath | None = Field(
        None,
        description=(
            "File with a key, at least 32 characters, shared by the fleet: profiles given to the store are signed with it "
            "(HMAC-SHA256), and a profile without a valid signature is not taken. Must not be readable by others. None: profiles "
            "are not signed and signatures are not checked."
        ),
    )
    host: HostName = Field("127.0.0.1", min_length=1, description="Address the HTTP server binds. Default: loopback only.")
    allowed_hosts: list[HostName] = Field(
        [],
        max_length=64,
        description=(
            "Further names by which requests may call the sidecar in `Host`, 0..64 names without ports: that of a service or "
            "a proxy. Always taken: `localhost`, loopback addresses, `host`, the machine's own name and, where `host` is beyond "
            "loopback, every IP address. Other names are refused with status 421."
        ),
    )
    port: int = Field(9477, ge=0, le=65_535, description="Port of the HTTP server, 0..65535. 0: a free port.")
    certfile: FilePath | None = Field(
        None,
        description=(
            "Certificate of the HTTP server, PEM, with its intermediate certificates: the server then speaks https only (TLS 1.2 "
            "or newer). A change of the file is followed within 5 s, for new connections. None: http."
        ),
    )
    keyfile: FilePath | None = Field(
        None,
        description=(
            "Key of `certfile`, PEM, without a password; must not be readable by others. None: the key is in `certfile`."
        ),
    )
    client_ca: FilePath | None = Field(
        None,
        description=(
            "Certificates, PEM, of the authorities whose clients are let in (mutual TLS): a client without a certificate that "
            "one of them signed gets no answer, to no request. None: clients need no certificate. Needs `certfile`."
        ),
    )
    control_token_file: FilePath | None = Field(
        None,
        description=("File with the token that `ctl` must send. None: a token is created at start in runtime_dir, mode 0600."),
    )
    checkpoint_interval_s: float = Field(
        10.0,
        ge=1.0,
        le=3600.0,
        description=("Seconds between checkpoints, 1..3600. Larger: a restart loses more. Smaller: more writes."),
    )
    poll_interval_s: float = Field(
        0.02,
        ge=0.001,
        le=1.0,
        description=("Seconds between reads of the ring, 0.001..1. Larger: less CPU, slower reaction, records may be lost."),
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line printed.")
    server_port: int = Field(
        DEFAULT_SERVER_PORT,
        ge=1,
        le=65_535,
        description="Port of the LLM server, 1..65535: part of the default of `runtime_dir`, so that each server has its own.",
    )
    server_metrics: bool = Field(
        True,
        description=(
            "Whether the sidecar shows the LLM server's own numbers, from its `http://127.0.0.1:PORT/metrics`, asked every 5 s "
            "while the plugin gives no records, true or false. Needs a `server_port` that is set, or a `runtime_dir` whose "
            "default name has the port. False: the server is never asked, `server_reported` stays empty."
        ),
    )
    controller: ControllerSettings = ControllerSettings()
    grafana: GrafanaSettings = GrafanaSettings()

    @model_validator(mode="after")
    def _folder_of_the_server(self) -> Self:
        """Without a folder of its own: the default one of the server's port."""
        if "runtime_dir" not in self.model_fields_set:
            self.__dict__["runtime_dir"] = default_runtime_dir(self.server_port)  # the model is frozen once it is made
        return self
