"""`adaptive-spec replay`: estimates from a recorded trace what other policies would have decided and given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from adaptive_spec.cli.output_files import check_folder_of, write_json
from adaptive_spec.cli.tables import number
from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.simulated.peers.sglang_ema import AdaptiveParams, build_params
from adaptive_spec.errors import BadInput
from adaptive_spec.offline.replay import Plan, Replay, ReplayedPolicy, ReplayedStatic, replay
from adaptive_spec.storage.trace import Trace, load_trace

DEFAULT_POLICIES = "adaptive,static,ema"


class ReplayedEma:
    """SGLang's own adaptive rule. It learns from the accepted tokens within its own K, as far as the trace has verified them."""

    def __init__(self, info: EngineInfo, wide: bool) -> None:
        self._params: AdaptiveParams
        self._params, self.origin = build_params(info.max_k, wide)

    def decide(self, record: StepRecord) -> Plan:
        return Plan(self._params.get_steps_for_batch(record.batch_size))

    def learn(self, record: StepRecord, plan: Plan) -> None:
        accepted = [min(int(n), plan.k) for n in record.accept_len]
        self._params.on_verify_complete(accepted, record.batch_size)


def policies_of(asked: str, info: EngineInfo) -> dict[str, ReplayedPolicy]:
    """Return the policies to replay besides adaptive, which is always replayed. Raises BadInput for an unknown name."""
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
            raise BadInput(f"--policies: {name!r}: must be one of {known}")
    return found


def replay_file(path: Path, asked: str, settings: ControllerSettings, json_file: Path | None) -> None:
    """Replay a trace, print the tables, write the JSON. Raises BadInput."""
    if json_file is not None:
        check_folder_of(json_file, "--json")
    trace = load_trace(path)
    if trace.info.max_k == 0:
        raise BadInput(f"TRACE: '{path}': must be of an engine that can draft, got one that runs K 0 only")
    policies = policies_of(asked, trace.info)
    errors = Console(stderr=True, markup=False, emoji=False)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("replaying", total=len(trace.records) * (len(policies) + 2))
        try:
            result = replay(trace.info, trace.records, policies, settings, lambda steps: progress.advance(bar, steps))
        except ValueError as error:
            raise BadInput(f"TRACE: '{path}': {error}") from error
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 110
    for table in replay_tables(trace, result):
        console.print(table)
    for name, policy in policies.items():
        if isinstance(policy, ReplayedEma):
            console.print(f"{name}: {policy.origin}", highlight=False)
    if json_file is not None:
        write_json(json_file, document(trace, result), "--json")


def document(trace: Trace, result: Replay) -> dict[str, Any]:
    """Return what `--json` writes. Gains are relative to what ran; low and high are the ends of a 90 % interval."""
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
    """Return two tables: the trace and the errors of the models on it, and the estimate for each policy."""
    info, snapshot = trace.info, result.snapshot
    about = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "trace": f"{result.steps:,} steps of {info.name} {info.model} on {info.gpu}, {trace.lost:,} lost while recording",
        "goodput": f"{result.goodput:,.1f} tokens/s over {result.seconds:,.1f} s of decoding, as it ran",
        "calibration": f"{snapshot.calibration_kind}, ECE {number(snapshot.calibration_error, '.3f')}, "
        f"Brier {number(snapshot.calibration_brier, '.3f')}, log loss {number(snapshot.calibration_log_loss, '.3f')}",
        "step time": f"predicted before each step was measured: mean error {number(result.step_time_mape, '.1%')}, "
        f"bias {number(result.step_time_bias, '+.1%')}",
        "tile boundaries": ", ".join(str(boundary.tokens) for boundary in snapshot.boundaries) or "none found",
    }
    for name, words in rows.items():
        about.add_row(Text(name, style="dim"), words)
    table = Table(
        title="estimated goodput of each policy on this trace (90 % interval)", title_justify="left",
        caption="supported: steps whose plan was verified in the trace; the others are extrapolated", caption_justify="left",
    )  # fmt: skip
    table.add_column("policy", no_wrap=True)
    for words in ("tokens/s", "vs. what ran", "interval", "mean K", "supported"):
        table.add_column(words, justify="right", no_wrap=True)
    for name, one in result.estimates.items():
        table.add_row(
            name, f"{one.goodput:,.1f}", f"{one.gain:+.1%}", f"{one.gain_low:+.1%} .. {one.gain_high:+.1%}", f"{one.mean_k:.2f}",
            f"{one.supported:.0%}", style="bold" if name == "adaptive" else None,
        )  # fmt: skip
    return [about, table]
