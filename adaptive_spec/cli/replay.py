"""`adaptive-spec replay`: read a trace, run policies' decisions over it, show and write what that says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adaptive_spec.cli.tables import number
from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.simulated.peers.sglang_ema import AdaptiveParams, build_params
from adaptive_spec.errors import BadInput
from adaptive_spec.offline.replay import Plan, Replay, ReplayedPolicy, ReplayedStatic, replay
from adaptive_spec.storage.archive import write_atomically
from adaptive_spec.storage.trace import Trace, load_trace

DEFAULT_POLICIES = "adaptive,static,ema"


class ReplayedEma:
    """SGLang's own rule; it sees what would have been accepted of its own K, as far as the trace knows."""

    def __init__(self, info: EngineInfo, wide: bool) -> None:
        self._params: AdaptiveParams
        self._params, self.origin = build_params(info.max_k, wide)

    def decide(self, record: StepRecord) -> Plan:
        return Plan(self._params.get_steps_for_batch(record.batch_size))

    def learn(self, record: StepRecord, plan: Plan) -> None:
        accepted = [min(int(n), plan.k) for n in record.accept_len]
        self._params.on_verify_complete(accepted, record.batch_size)


def policies_of(asked: str, info: EngineInfo) -> dict[str, ReplayedPolicy]:
    """Policies beside adaptive, which is always replayed. Raises BadInput for a name there is not."""
    found: dict[str, ReplayedPolicy] = {}
    statics = [f"static-{k}" for k in info.candidates]
    for name in (part.strip() for part in asked.split(",")):
        if name == "static":
            found |= {one: ReplayedStatic(int(one.removeprefix("static-"))) for one in statics}
        elif name in statics:
            found[name] = ReplayedStatic(int(name.removeprefix("static-")))
        elif name in ("ema", "ema-wide"):
            found[name] = ReplayedEma(info, wide=name == "ema-wide")
        elif name != "adaptive":
            known = ", ".join(["adaptive", "static", *statics, "ema", "ema-wide"])
            raise BadInput(f"--policies: {name!r} is not allowed: must be of {known}")
    return found


def replay_file(path: Path, asked: str, settings: ControllerSettings, json_file: Path | None) -> None:
    """Replay a trace, print the tables, write the JSON. Raises BadInput."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise BadInput(f"--json: '{json_file}' is not allowed: its folder does not exist")
    trace = load_trace(path)
    policies = policies_of(asked, trace.info)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("replaying", total=len(trace.records) * (len(policies) + 2))
        try:
            result = replay(trace.info, trace.records, policies, settings, lambda steps: progress.advance(bar, steps))
        except ValueError as error:
            raise BadInput(f"TRACE: '{path}' is not allowed: {error}") from error
    console = Console()
    if not console.is_terminal:
        console.width = 110
    for table in replay_tables(trace, result):
        console.print(table)
    for name, policy in policies.items():
        if isinstance(policy, ReplayedEma):
            console.print(f"{name}: {policy.origin}", highlight=False)
    if json_file is not None:
        try:
            write_atomically(json_file.absolute(), json.dumps(document(trace, result), indent=1).encode() + b"\n")
        except OSError as error:
            raise BadInput(f"--json: '{json_file}' cannot be written: {error.strerror or error}") from error


def document(trace: Trace, result: Replay) -> dict[str, Any]:
    """What `--json` writes. Gains are relative to what ran; low and high bound 90 %."""
    snapshot = result.snapshot
    return {
        "version": 1,
        "trace": {
            "engine": trace.info.name, "model": trace.info.model, "granularity": str(trace.info.granularity),
            "steps": result.steps, "lost": trace.lost, "seconds": result.seconds, "goodput_tokens_per_s": result.goodput,
        },
        "calibration": {
            "kind": snapshot.calibration_kind, "ece": snapshot.calibration_error, "brier": snapshot.calibration_brier,
            "log_loss": snapshot.calibration_log_loss, "curve": [list(point) for point in snapshot.calibration_curve],
        },
        "step_time": {"mape": result.step_time_mape, "bias": result.step_time_bias},
        "boundaries": [boundary.tokens for boundary in snapshot.boundaries],
        "policies": {
            name: {
                "goodput_tokens_per_s": one.goodput, "gain_ratio": one.gain, "gain_low": one.gain_low, "gain_high": one.gain_high,
                "mean_k": one.mean_k, "supported_share": one.supported,
            }
            for name, one in result.estimates.items()
        },
    }  # fmt: skip


def replay_tables(trace: Trace, result: Replay) -> list[Table]:
    """For people: what the trace is, how the models did on it, what each policy would have given."""
    info, snapshot = trace.info, result.snapshot
    about = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "trace": f"{result.steps:,} steps of {info.name} {info.model} on {info.gpu}, {trace.lost:,} lost while recording",
        "goodput": f"{result.goodput:,.1f} tokens/s over {result.seconds:,.1f} s of decoding, as it ran",
        "calibration": f"{snapshot.calibration_kind}, ECE {number(snapshot.calibration_error, '.3f')}, "
        f"Brier {number(snapshot.calibration_brier, '.3f')}, log loss {number(snapshot.calibration_log_loss, '.3f')}",
        "step time": f"predicted before it was measured: mean error {number(result.step_time_mape, '.1%')}, "
        f"bias {number(result.step_time_bias, '+.1%')}",
        "tile boundaries": ", ".join(str(boundary.tokens) for boundary in snapshot.boundaries) or "none seen",
    }
    for name, words in rows.items():
        about.add_row(f"[dim]{name}[/dim]", words)
    table = Table(
        title="what would have been (decisions replayed, outcomes estimated; 90 % interval)", title_justify="left",
        caption="supported: steps whose plan lay within what was verified; the rest is extrapolated", caption_justify="left",
    )  # fmt: skip
    table.add_column("policy", no_wrap=True)
    for words in ("tokens/s", "against what ran", "interval", "mean K", "supported"):
        table.add_column(words, justify="right", no_wrap=True)
    for name, one in result.estimates.items():
        table.add_row(
            name, f"{one.goodput:,.1f}", f"{one.gain:+.1%}", f"{one.gain_low:+.1%} .. {one.gain_high:+.1%}", f"{one.mean_k:.2f}",
            f"{one.supported:.0%}", style="bold" if name == "adaptive" else None,
        )  # fmt: skip
    return [about, table]
