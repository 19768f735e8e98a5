"""Resident memory of a real sidecar process over the records of an hour, written as fast as it reads them.

An hour of an engine whose steps take 25 ms, at batch 64 and K 7: 144,000 records. The sidecar's wall clock runs at its own
pace meanwhile, so there are fewer refits and checkpoints than in an hour, and everything that grows with records grows in full.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.wire.ring import RingWriter
from benchmarks.ingestion import engine_info, made_records
from benchmarks.surroundings import resident_mb, started_client

HOUR_RECORDS = 144_000
CHUNK = 256
TIMEOUT_S = 60.0
WANTED_PEAK_MB, WANTED_GROWTH_MB = 200.0, 2.0


def run(folder: Path, records: int) -> dict[str, Any]:
    """Feed a sidecar in `folder`; returns megabytes (10^6 bytes) of resident memory."""
    runtime_dir = folder / "run"
    runtime_dir.mkdir(mode=0o700)
    writer = RingWriter.create(runtime_dir / RING_NAME, engine_info())
    made = made_records(CHUNK)
    command = [sys.executable, "-m", "adaptive_spec.cli", "sidecar", "--runtime-dir", str(runtime_dir)]
    command += ["--profile-dir", str(folder / "profiles"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as sidecar:
        try:
            client = started_client(runtime_dir)
            used = []
            begun = time.monotonic()
            for fed in range(CHUNK, records + 1, CHUNK):
                for record in made:
                    writer.write(record)
                _await_learnt(client, fed - CHUNK)
                used.append(resident_mb(sidecar.pid))
            _await_learnt(client, writer.written)
            used.append(resident_mb(sidecar.pid))
            dropped = client.status()["dropped"]
        finally:
            sidecar.terminate()
    half = used[len(used) // 2 :]
    part = max(len(half) // 4, 1)
    return {
        "records": writer.written,
        "seconds": time.monotonic() - begun,
        "dropped": sum(dropped.values()),
        "peak_mb": max(used),
        "last_mb": used[-1],
        # The mean of the last quarter of the last half against its first quarter: a single sample is too noisy.
        "growth_over_last_half_mb": sum(half[-part:]) / part - sum(half[:part]) / part,
        "wanted_peak_mb": WANTED_PEAK_MB,
    }


def _await_learnt(client: ControlClient, records: int) -> None:
    """Wait until all but the last chunk is learnt, so that the ring of 1024 never overflows."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while client.status().get("observations", 0) < records:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the sidecar has not learnt {records} records within {TIMEOUT_S:g} s")
        time.sleep(0.05)


@click.command()
@click.option("--records", type=click.IntRange(10 * CHUNK), default=HOUR_RECORDS, show_default=True, help="Records fed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(records: int, as_json: bool) -> None:
    """Measure the sidecar's memory."""
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), records)
    if as_json:
        click.echo(json.dumps(figures, indent=1))
        return
    what = f"sidecar, {figures['records']:,} records, {figures['dropped']} lost"
    click.echo(f"{what:52s} peak {figures['peak_mb']:6.1f} MB  wanted <= {WANTED_PEAK_MB:g} MB")
    click.echo(f"{'growth over the last half':52s}      {figures['growth_over_last_half_mb']:6.1f} MB")


if __name__ == "__main__":
    main()
