"""`make soak`: an hour of the demo, then a week of records in fast time. Does anything grow? What was the worst call?

The demo is the embedded engine under its usual load and a real sidecar whose `/metrics` is scraped. The week is virtual: each
hour has a busy part of steps, STEP_S long, whose batch size, acceptance and speed change with the hour; the records go through a
real ring into a controller, which refits when it is due. Exit status 1 when something grew beyond GROWTH.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire.ring import RingReader, RingWriter
from benchmarks.ingestion import engine_info, made_records
from benchmarks.surroundings import folder_in_memory, resident_mb, started_client
from benchmarks.timed_tap import CALLS, SlowCall

SAMPLE_S = 5.0
DAYS, HOURS = 7, 24
STEP_S = 0.025
POLL_RECORDS = 512
GROWTH = {"MB": 5.0, "descriptors": 2.0, "files": 2.0, "series": 30.0}
"""Most that a figure may grow over the second half, by its unit. Memory: what the allocator keeps of a refit's arrays comes and
goes by a few megabytes; a leak of 100 bytes a record would be 50 MB in the demo's hour. Series: a boundary more or fewer is six
of them, and 0 to 7 boundaries were shown within five minutes of the demo on a busy machine; nothing else came or went."""


@dataclass(frozen=True)
class Trend:
    """first, last: means of the first and last tenth. slope_per_hour: least squares over the second half. grew: in that half."""

    name: str
    unit: str
    first: float
    last: float
    slope_per_hour: float
    grew: float

    @property
    def flat(self) -> bool:
        return self.grew <= GROWTH[self.unit]


def trend(name: str, unit: str, times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """Return how a figure developed. times_s: rising, seconds. At least four values."""
    times, found = np.asarray(times_s, np.float64), np.asarray(values, np.float64)
    tenth, half = max(len(found) // 10, 1), len(found) // 2
    centred = times[half:] - times[half:].mean()
    slope_per_s = float(centred @ (found[half:] - found[half:].mean())) / float(centred @ centred)
    grew = slope_per_s * float(times[-1] - times[half])
    return Trend(name, unit, float(found[:tenth].mean()), float(found[-tenth:].mean()), 3600.0 * slope_per_s, grew)


# -- the demo ----------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """Of the two processes and their folder, at one time."""

    time_s: float
    sidecar_mb: float
    engine_mb: float
    sidecar_descriptors: int
    engine_descriptors: int
    files: int
    series: int


UNITS = {
    "sidecar_mb": "MB", "engine_mb": "MB", "sidecar_descriptors": "descriptors", "engine_descriptors": "descriptors",
    "files": "files", "series": "series",
}  # fmt: skip


def demo(folder: Path, seconds: float) -> tuple[list[Sample], dict[str, Any], dict[str, Any]]:
    """Run it; returns the samples, the sidecar's last status and what the tap measured."""
    run_dir, profiles, times = folder / "run", folder / "profiles", folder / "times.json"
    command = [sys.executable, "-m", "adaptive_spec.cli", "sidecar", "--runtime-dir", str(run_dir)]
    command += ["--profile-dir", str(profiles), "--port", "0"]
    status = folder / "engine.json"
    samples: list[Sample] = []
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as sidecar:
        try:
            client = started_client(run_dir)
            command = [sys.executable, "-m", "benchmarks.soak_worker", str(times), "--runtime-dir", str(run_dir)]
            command += ["--status", str(status), "--duration", str(seconds)]
            with subprocess.Popen(command, stdout=log, stderr=log) as engine:
                begun_s = time.monotonic()
                while engine.poll() is None:
                    time.sleep(SAMPLE_S)
                    if status.exists():
                        page = urllib.request.urlopen(client.url + "/metrics", timeout=30).read().decode()
                        series = sum(not line.startswith("#") for line in page.splitlines())
                        try:
                            pids = sidecar.pid, engine.pid
                            memory = resident_mb(pids[0]), resident_mb(pids[1])
                            descriptors = _descriptors(pids[0]), _descriptors(pids[1])
                        except (FileNotFoundError, IndexError):  # the engine has just ended
                            break
                        files = sum(len(names) for _, _, names in os.walk(folder))
                        samples.append(Sample(time.monotonic() - begun_s, *memory, *descriptors, files, series))
            if engine.returncode != 0:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            last = client.status()
        finally:
            sidecar.terminate()
    return samples, last, json.loads(times.read_bytes())


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# -- the week ----------------------------------------------------------------------------------------------------------


class Hour(NamedTuple):
    """Of the virtual week. state_kb: a checkpoint's arrays. refit_ms: the slowest."""

    memory_mb: float
    state_kb: float
    events: int
    refits: int
    refit_p99_ms: float
    refit_ms: float


def week(folder: Path, records_per_hour: int, days: int = DAYS) -> list[Hour]:
    """Learn the records of a week; returns one entry for each hour."""
    info = engine_info()
    writer = RingWriter.create(folder / "week.ring", info)
    reader = RingReader.open(folder / "week.ring")
    controller = Controller(ControllerSettings(), info)
    rng = np.random.default_rng(7)
    hours, made = [], made_records(POLL_RECORDS)
    for hour in range(days * HOURS):
        now_s, slow = 3600.0 * hour, float(np.exp(rng.normal(0.0, 0.1)))
        taken_ms: list[float] = []
        most = max(1, round(64 * abs(np.sin(np.pi * (hour % HOURS + 0.5) / HOURS))))
        worse = float(rng.uniform(0.5, 1.0))
        for first in range(0, records_per_hour, POLL_RECORDS):
            for record in made[: min(POLL_RECORDS, records_per_hour - first)]:
                writer.write(_of_the_hour(record, rng, most, slow, worse))
            for record in reader.poll(POLL_RECORDS):
                now_s += STEP_S
                controller.observe(record, now_s)
                if controller.refit_due(now_s):
                    begun_s = time.perf_counter()
                    controller.refit(now_s)
                    taken_ms.append(1e3 * (time.perf_counter() - begun_s))
        snapshot = controller.snapshot(now_s)
        state = sum(array.nbytes for array in controller.state().values())
        p99 = float(np.quantile(taken_ms, 0.99)) if taken_ms else 0.0
        hours.append(
            Hour(resident_mb(os.getpid()), state / 1e3, len(snapshot.events), len(taken_ms), p99, max(taken_ms, default=0.0))
        )
    if reader.lost or reader.torn or reader.invalid or controller.counters.observations != days * HOURS * records_per_hour:
        raise RuntimeError("not every record was learnt")
    return hours


def _of_the_hour(record: StepRecord, rng: np.random.Generator, most: int, slow: float, worse: float) -> StepRecord:
    rows = int(rng.integers(1, most + 1))
    verify_len = record.verify_len[:rows]
    tokens = int(verify_len.sum()) + rows
    accept_len = np.minimum(record.accept_len[:rows], (worse * 8 * rng.random(rows)).astype(np.uint8))
    verify_s = slow * (0.012 + 0.002 * (tokens // 64))
    return replace(
        record, batch_size=rows, kv_tokens=rows * int(rng.integers(50, 8000)), num_tokens=tokens, padded_tokens=tokens,
        verify_s=verify_s, step_s=verify_s + 0.007, verify_len=verify_len, accept_len=np.minimum(accept_len, verify_len),
        confidences=record.confidences[:rows], request_ids=rng.integers(0, 1 << 32, rows, dtype=np.uint32),
    )  # fmt: skip


# -- what is printed ---------------------------------------------------------------------------------------------------


def trend_lines(trends: Sequence[Trend]) -> list[str]:
    lines = [f"{'':24s}{'start':>10s}{'end':>10s}{'per hour, second half':>24s}"]
    for one in trends:
        verdict = "flat" if one.flat else f"GREW by {one.grew:.1f} {one.unit}"
        lines.append(f"{one.name:24s}{one.first:10.1f}{one.last:10.1f}{one.slope_per_hour:+24.2f}  {verdict}")
    return lines


def slow_call_lines(times: dict[str, Any]) -> list[str]:
    """One line for each kind of call, and one for each of its slowest."""
    lines = []
    for name in CALLS:
        found = times[name]
        lines.append(
            f"{name}: {found['calls']:,} calls, mean {1e3 * found['total_ms'] / max(found['calls'], 1):.1f} us; slowest:"
        )
        for fields in found["slowest"][:3]:
            slow = SlowCall(*fields)
            whose = "its own work" if slow.ours else "the thread was not run"
            lines.append(
                f"    {slow.wall_ms:8.2f} ms, {slow.cpu_ms:8.2f} ms of them on a processor: {whose}; switched {slow.switched}, "
                f"page faults {slow.faults}+{slow.major_faults}, collections {slow.collections}, step {slow.step}"
                f"{', took a policy over' if slow.adopted else ''}"
            )
    return lines


@click.command()
@click.option("--seconds", type=click.FloatRange(min=30.0), default=3600.0, show_default=True, help="Of the demo.")
@click.option("--records-per-hour", type=click.IntRange(1), default=12_000, show_default=True, help="Of the virtual week.")
@click.option("--only", type=click.Choice(["demo", "week"]), help="One of the two.")
def main(seconds: float, records_per_hour: int, only: str | None) -> None:
    """Run the demo for an hour, then a week of records in fast time."""
    trends: list[Trend] = []
    with folder_in_memory() as folder:
        if only != "week":
            samples, status, times = demo(folder, seconds)
            seen_s = [sample.time_s for sample in samples]
            found = [trend(name, unit, seen_s, [getattr(s, name) for s in samples]) for name, unit in UNITS.items()]
            dropped = sum(status["dropped"].values())
            click.echo(f"demo: {samples[-1].time_s:,.0f} s, {status['observations']:,} records learnt, {dropped} dropped")
            click.echo("\n".join([*trend_lines(found), *slow_call_lines(times)]))
            trends += found
        if only != "demo":
            begun_s = time.monotonic()
            hours = week(folder, records_per_hour)
            at_s = [3600.0 * hour for hour in range(len(hours))]
            found = [
                trend("week: memory_mb", "MB", at_s, [hour.memory_mb for hour in hours]),
                trend("week: state_mb", "MB", at_s, [hour.state_kb / 1e3 for hour in hours]),
            ]
            learnt, refits = records_per_hour * len(hours), sum(hour.refits for hour in hours)
            click.echo(f"week: {learnt:,} records and {refits:,} refits in {time.monotonic() - begun_s:,.0f} s")
            p99 = [hour.refit_p99_ms for hour in hours]
            click.echo(f"refit: p99 of an hour {np.median(p99):.1f} ms (median), {max(p99):.1f} ms (worst hour), slowest "
                       f"{max(hour.refit_ms for hour in hours):.1f} ms")  # fmt: skip
            click.echo("\n".join(trend_lines(found)))
            trends += found
    click.echo(f"largest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:,.0f} MB")
    sys.exit(0 if all(one.flat for one in trends) else 1)


if __name__ == "__main__":
    main()
