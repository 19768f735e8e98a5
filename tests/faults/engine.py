"""A stand-in for an LLM server: a process that runs decode steps through the real tap, as numbers, without torch.

    python -m tests.faults.engine --runtime-dir DIR --state FILE

It writes FILE, replaced whole, ten times a second: what it counted by itself, to compare with what the sidecar says. While
FILE.pause exists it makes no steps. It ends on SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

import click

from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.wire.engine_report import EngineReport, write_report
from tests.faults.marks import MarkingTap
from tests.support.numbers_engine import NumbersEngine

SLOTS = 4096
"""Records in the ring: what is written in some 20 s, so that a sidecar that is restarted finds all of them."""
PAUSE_S = 0.005
"""Between two steps."""


@click.command()
@click.option("--runtime-dir", type=click.Path(path_type=Path), required=True)
@click.option("--state", type=click.Path(path_type=Path), required=True)
@click.option("--max-age", type=float, default=5.0, help="seconds of the heartbeat beyond which the launch K is taken")
def main(runtime_dir: Path, state: Path, max_age: float) -> None:
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, stop)
    engine = NumbersEngine(runtime_dir, max_age_s=max_age, slots=SLOTS, tap=MarkingTap)
    pause = state.with_name(state.name + ".pause")
    temporary = state.with_name(state.name + ".tmp")
    write_at_s = 0.0
    while not stopping:
        paused = pause.exists()
        if not paused:
            engine.step()
        now_s = time.monotonic()
        if now_s >= write_at_s:
            write_at_s = now_s + 0.1
            counters = engine.tap.counters._asdict()
            document = {
                "pid": os.getpid(), "steps": engine.steps, "paused": paused, "k": engine.tap.begun.k,
                "fallback": bool(engine.tap.begun.flags & StepFlag.FALLBACK), "refused": engine.tap.refused,
                "output_tokens": engine.output_tokens, "verified_tokens": engine.verified_tokens,
                "accepted_tokens": engine.accepted_tokens,
            }  # fmt: skip
            temporary.write_text(json.dumps(document | counters))
            temporary.replace(state)
            with contextlib.suppress(OSError):  # as the plugins do: a report that cannot be written is written later
                write_report(runtime_dir, EngineReport(os.getpid(), "numbers", "attached", counters=counters))
        time.sleep(PAUSE_S)
    engine.close()


if __name__ == "__main__":
    main()
