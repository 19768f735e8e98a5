"""`make bench`: every benchmark, each in a process of its own, with what must be reached beside the figures."""

from __future__ import annotations

import os
import subprocess
import sys

BENCHMARKS = {
    "hot_path": "in the server's process; wanted: write p50 <= 5 us, p99 <= 25 us; read the policy p50 <= 1 us; plan <= 1 ms",
    "protections": "what each protection on that path costs: with and without it, in turn; medians of 300 rounds",
    "plugin_step": "Python time of the SGLang plugin in one decode step, at 1, 64 and 256 requests",
    "refit": "in the sidecar",
    "ingestion": "in the sidecar, one core",
    "ranks": "four tensor-parallel ranks, gloo",
    "confidences": "draft confidences of EAGLE: what they cost on this CPU, what they gain in simulation",
    "memory": "a sidecar process fed an hour's worth of records",
}


def main(names: list[str]) -> int:
    """Run the named benchmarks (none: all); returns the number of those that failed."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"bench: {unknown[0]!r} is not allowed: must be one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    failed = 0
    for name in names or BENCHMARKS:
        print(f"\n{name}: {BENCHMARKS[name]}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], env=environment, check=False).returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
