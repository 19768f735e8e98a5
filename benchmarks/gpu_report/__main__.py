"""Measure this machine's device and write a report: CUDA where there is one, else the CPU with narrower layers.

The brute-force latency of 1..1024 verified tokens with the shapes of a real model; what the cold-start sweep finds of its
boundaries; what the tap costs; adaptive K against every fixed K. Step times are measured, acceptance is simulated from the
rates of a scenario.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from adaptive_spec import __version__
from adaptive_spec.domain.staircase import Boundary
from adaptive_spec.engines.simulated.adaptive import Adaptive
from adaptive_spec.engines.simulated.decider import Decider, Static
from adaptive_spec.engines.simulated.scenario import load_scenario, scenario_from
from adaptive_spec.engines.torch_device import device_name
from adaptive_spec.offline.fit_samples import fit_samples
from adaptive_spec.offline.plots import draw, empty_plot_data
from adaptive_spec.storage.archive import write_atomically
from benchmarks.gpu_report.server import TimedServer
from benchmarks.gpu_report.shapes import SHAPES, Forward, narrowed
from benchmarks.gpu_report.tap_overhead import tap_cost
from benchmarks.gpu_report.timing import Timer, measure

ROOT = Path(__file__).parent.parent.parent
ACCEPTANCE = ROOT / "tests" / "scenarios" / "h100-70b-chat-to-code.yaml"
MAX_TOKENS, DENSE_TOKENS = 1024, 64
BLOCK_STEPS = 16


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write, made if missing.")
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="llama-3-8b", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--narrow", type=click.IntRange(1, 32), help="Divide every width by this.  [default: 1 on CUDA, 16 on the CPU]")
@click.option("--layers", type=click.IntRange(1, 200), help="Layers to compute.  [default: all on CUDA, 8 on the CPU]")
@click.option(
    "--every", type=click.IntRange(1, 256), help="Step between token counts above 64.  [default: 1 on CUDA, 16 on the CPU]"
)
@click.option("--rounds", type=click.IntRange(3, 10_000), help="Samples of each count.  [default: 30 on CUDA, 7 on the CPU]")
@click.option("--requests", type=click.IntRange(1, 128), help="Requests of the comparison.  [default: 16 on CUDA, 4 on the CPU]")
@click.option("--max-k", type=click.IntRange(1, 7), default=5, show_default=True, help="Largest K of the comparison.")
@click.option("--seconds", type=click.FloatRange(1.0, 3600.0), default=10.0, show_default=True, help="Decode time of each arm.")
@click.option(
    "--context", type=click.IntRange(8, 65536), default=512, show_default=True, help="Tokens of each request in its KV cache."
)
def main(
    out: Path, shape: str, device: str, narrow: int | None, layers: int | None, every: int | None, rounds: int | None,
    requests: int | None, max_k: int, seconds: float, context: int,
) -> None:  # fmt: skip
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device: cuda: no CUDA device is available here; must be cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    chosen, used = torch.device("cuda" if cuda else "cpu"), narrowed(SHAPES[shape], narrow or (1 if cuda else 16))
    computed = min(layers or (used.layers if cuda else 8), used.layers)
    torch.set_num_threads(1)
    requests = requests or (16 if cuda else 4)
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--out: '{out}': cannot be made: {error.strerror or error}") from error
    console = Console(stderr=True)
    about = {
        "device": device_name(chosen), "cuda": cuda, "shape": used.name, "shape_source": used.source, "layers_computed": computed,
        "layers_of_the_model": used.layers, "context_tokens": context, "adaptive_spec": __version__, "torch": torch.__version__,
        "cuda_version": torch.version.cuda, "python": platform.python_version(), "platform": platform.platform(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu_report", *sys.argv[1:]]),
        "note": "step times are measured on the device; acceptance is simulated from the rates of h100-70b-chat-to-code",
    }  # fmt: skip
    most = max(MAX_TOKENS, requests * (max_k + 1))
    verify, draft = Timer(Forward(used, computed, most, context, chosen)), Timer(Forward(used, 1, requests, context, chosen))
    step = every or (1 if cuda else 16)
    counts = [*range(1, DENSE_TOKENS + 1), *range(DENSE_TOKENS + step, MAX_TOKENS + 1, step)]
    total = (rounds or (30 if cuda else 7)) + 2
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{len(counts)} token counts", total=total)
        samples_s = measure(verify, counts, total - 2, lambda: progress.advance(bar))
    curve, brute = write_curve(out, counts, samples_s, about)
    scenario_file = write_scenario(out, counts, curve, requests, max_k, about)
    with tempfile.TemporaryDirectory() as folder:
        tap = tap_cost(verify, Path(folder) / "run", requests, min(max_k, 3), 200)
    arms, swept = compare(scenario_file, verify, draft, max_k, seconds)
    reached = [b.tokens for b in brute if b.tokens < requests * (max_k + 1)]
    report: dict[str, Any] = {
        **about,
        "boundaries_brute_force": [[b.tokens, b.jump_ratio] for b in brute],
        "boundaries_learnt_online": swept["boundaries"], "boundaries_within_reach": reached, "sweep_steps": swept["sweep_steps"],
        "tap": {"with_ms": 1e3 * tap.with_tap_s, "without_ms": 1e3 * tap.without_s, "calls_us": 1e6 * tap.calls_s,
                "share_of_step": tap.calls_s / tap.without_s},
        "goodput_tokens_per_s": arms,
        "adaptive_over_best_fixed": arms["adaptive"] / max(value for name, value in arms.items() if name != "adaptive"),
    }  # fmt: skip
    write_atomically(out / "report.json", json.dumps(report, indent=1).encode() + b"\n")
    show(report, cuda)


def write_curve(
    out: Path, counts: list[int], samples_s: NDArray[np.float64], about: dict[str, Any]
) -> tuple[NDArray[np.float64], tuple[Boundary, ...]]:
    """Write curve.csv, samples.csv and the plots. Returns median ms [counts] and the boundaries of a fit to all samples."""
    ms = samples_s * 1e3
    low, median, high = np.quantile(ms, (0.1, 0.5, 0.9), axis=0)
    head = "".join(f"# {name}: {value}\n" for name, value in about.items())
    rows = "".join(f"{n},{m:.5f},{a:.5f},{b:.5f}\n" for n, m, a, b in zip(counts, median, low, high, strict=True))
    write_atomically(out / "curve.csv", f"{head}num_tokens,latency_ms,p10_ms,p90_ms\n{rows}".encode())
    pairs = [(n, float(value)) for row in ms for n, value in zip(counts, row, strict=True)]
    lines = "".join(f"{n},{value:.5f}\n" for n, value in pairs)
    write_atomically(out / "samples.csv", f"{head}num_tokens,latency_ms\n{lines}".encode())
    fit = fit_samples(np.array([n for n, _ in pairs]), np.array([value for _, value in pairs]) * 1e-3, 0.15)
    data = empty_plot_data(f"{about['shape']} on {about['device']}", "")
    data["samples"], data["medians"] = pairs, list(zip(counts, median.tolist(), strict=True))
    data["segments"] = [(s.first, s.last, 1e3 * s.intercept_s, 1e3 * s.slope_s_per_token) for s in fit.segments]
    data["boundaries"] = [(b.tokens, b.jump_ratio) for b in fit.boundaries]
    data["token_counts"] = [(n, float(len(samples_s))) for n in counts]
    draw(data, out / "plots")
    return median, fit.boundaries


def write_scenario(
    out: Path, counts: list[int], curve: NDArray[np.float64], requests: int, max_k: int, about: dict[str, Any]
) -> Path:
    """Write scenario.yaml, which `adaptive-spec bench` runs: the measured curve, and the acceptance of another scenario."""
    rates = load_scenario(ACCEPTANCE).file
    classes = {name: {**kind.model_dump(), "accept": kind.accept[:max_k], "context": 0} for name, kind in rates.classes.items()}
    rising = np.maximum.accumulate(curve)
    document = {
        "name": f"{about['shape']} on {about['device']}"[:200], "granularity": "batch", "max_k": max_k,
        "duration_s": 600.0, "seed": 1,
        "latency": {
            "verify_curve": [[n, round(float(ms), 5)] for n, ms in zip(counts, rising, strict=True)],
            "noise": {"sigma": 0.03},
        },
        "classes": classes, "mean_output_tokens": 200,
        "timeline": [{"at_s": 0, "running": requests, "mix": {"chat": 0.5, "code": 0.5}}],
    }  # fmt: skip
    head = "".join(f"# {name}: {value}\n" for name, value in about.items())
    write_atomically(out / "scenario.yaml", f"{head}{yaml.safe_dump(document, sort_keys=False)}".encode())
    return out / "scenario.yaml"


def compare(
    scenario_file: Path, verify: Timer, draft: Timer, max_k: int, seconds: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run adaptive and every fixed K in alternating blocks of steps on the same requests. Returns tokens/s by arm,
    and what the sweep found.
    """
    scenario = scenario_from(yaml.safe_load(scenario_file.read_text()), str(scenario_file), scenario_file.parent)
    deciders: dict[str, Decider] = {f"static-{k}": Static(k) for k in range(max_k + 1)}
    adaptive = Adaptive(scenario)
    deciders["adaptive"] = adaptive
    servers = {name: TimedServer(scenario, 1, verify, draft) for name in deciders}
    while adaptive.controller.snapshot(0.0).sweep_progress < 1.0:
        servers["adaptive"].run_steps(adaptive, BLOCK_STEPS)
    swept = adaptive.controller.snapshot(0.0)
    began = {name: (server.tokens, server.time_s) for name, server in servers.items()}
    while min(server.time_s - began[name][1] for name, server in servers.items()) < seconds:
        for name, server in servers.items():
            if server.time_s - began[name][1] < seconds:
                server.run_steps(deciders[name], BLOCK_STEPS)
    arms = {name: (server.tokens - began[name][0]) / (server.time_s - began[name][1]) for name, server in servers.items()}
    boundaries = [[b.tokens, b.jump_ratio] for b in adaptive.controller.snapshot(0.0).boundaries]
    return arms, {"sweep_steps": swept.sweep_steps, "boundaries": boundaries}


def show(report: dict[str, Any], cuda: bool) -> None:
    """Print the report in short."""
    out = Console(highlight=False, soft_wrap=True)
    if not cuda:
        out.print("no CUDA device: this is the CPU, with narrower layers")
    out.print(f"{report['shape']}, {report['layers_computed']} of {report['layers_of_the_model']} layers, on {report['device']}")
    for name, words in (("boundaries_brute_force", "brute force"), ("boundaries_learnt_online", "learnt online")):
        found = ", ".join(f"{int(tokens)} (x{ratio:.2f})" for tokens, ratio in report[name])
        out.print(f"boundaries, {words}: {found or 'none'}")
    tap = report["tap"]
    out.print(f"tap: {tap['calls_us']:.1f} us of a {tap['without_ms']:.2f} ms forward ({tap['share_of_step']:.2%})")
    for name, goodput in report["goodput_tokens_per_s"].items():
        out.print(f"{name}: {goodput:,.1f} tokens/s")
    out.print(f"adaptive / best fixed: {report['adaptive_over_best_fixed']:.3f}, after a sweep of {report['sweep_steps']} steps")


if __name__ == "__main__":
    try:
        main.main(standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"gpu-report: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
