"""The command line. Exit status 0, or 2 with one line on stderr that says what is not allowed; never a traceback for that."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from adaptive_spec import __version__
from adaptive_spec.errors import BadInput

DEFAULT_RUNTIME_DIR = Path("/dev/shm/adaptive-spec")
PATH = click.Path(path_type=Path)
COMMANDS = ("status", "pause", "resume", "shadow", "active", "pin", "unpin", "refit", "resweep")

_runtime_dir = click.option(
    "--runtime-dir", type=PATH, default=DEFAULT_RUNTIME_DIR, show_default=True, help="Folder the sidecar shares with its engine."
)
_url = click.option("--url", help="Address of the sidecar's HTTP server; found in the runtime directory when not given.")
_token_file = click.option("--token-file", type=PATH, help="File with the control token; in the runtime directory by default.")


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="adaptive-spec")
def cli() -> None:
    """Keep the draft length K of speculative decoding right on a live LLM server."""


@cli.command()
@click.option("--latency", type=PATH, help="CSV with the header num_tokens,latency_ms.")
@click.option("--calibration", type=PATH, help="CSV with the header cumulative_score,accepted (0 or 1).")
@click.option("--out", type=PATH, required=True, help="Folder for latency_model.npz, calibration.npz and plots/.")
@click.option(
    "--jump-threshold", type=click.FloatRange(0.02, 2.0), default=0.15, show_default=True,
    help="Relative jump that makes a tile boundary.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def fit(latency: Path | None, calibration: Path | None, out: Path, jump_threshold: float, as_json: bool) -> None:
    """Fit both models offline to recorded samples and draw them."""
    if latency is None and calibration is None:
        raise BadInput("--latency, --calibration: neither is given: must be at least one of them")
    from rich.console import Console

    with Console(stderr=True).status("fitting"):
        from adaptive_spec.offline.fit import fit_files

        result = fit_files(latency, calibration, out, jump_threshold)
    if as_json:
        click.echo(json.dumps(result.document()))
        return
    from adaptive_spec.cli.tables import fit_tables

    console = Console()
    for table in fit_tables(result):
        console.print(table)
    console.print(f"written to {out}", highlight=False)


@cli.command()
@click.option("--config", type=PATH, help="YAML configuration, see docs/configuration.md.")
@click.option("--runtime-dir", type=PATH, help="Overrides runtime_dir of the configuration.")
@click.option("--profile-dir", type=PATH, help="Overrides profile_dir.")
@click.option("--host", help="Overrides host.")
@click.option("--port", type=click.IntRange(0, 65535), help="Overrides port; 0 takes a free one.")
def sidecar(config: Path | None, **overrides: Any) -> None:
    """Run the sidecar: learn from an engine's step records, decide K, serve /metrics and the status page."""
    # One core is the sidecar's; linear algebra on all cores would take them from the engine. Before numpy is imported.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from adaptive_spec.config.load import load_settings

    settings = load_settings(config, {key: value for key, value in overrides.items() if value is not None})
    from adaptive_spec.sidecar.process import run_sidecar

    run_sidecar(settings)


@cli.command()
@click.option("--mode", type=click.Choice(["active", "shadow"]), help="Decide K, or only observe; default: the configuration's.")
@click.option("--config", type=PATH, help="YAML configuration, see docs/configuration.md; for sidecar and plugin.")
@click.option("--runtime-dir", type=PATH, help="Overrides runtime_dir of the configuration.")
@click.option("--profile-dir", type=PATH, help="Overrides profile_dir.")
@click.option("--host", help="Overrides host, of the sidecar's HTTP server.")
@click.option("--port", type=click.IntRange(0, 65535), help="Overrides port, of the sidecar's HTTP server; 0 takes a free one.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def serve(mode: str | None, config: Path | None, flags: tuple[str, ...], **overrides: Any) -> int:
    """Run an SGLang server with the sidecar beside it: adaptive-spec serve [OPTIONS] -- SGLANG SERVER FLAGS."""
    from adaptive_spec.cli.serve import ServeOptions, run_serve

    given = {key: value for key, value in overrides.items() if value is not None}
    return run_serve(ServeOptions(mode, config, given, flags))


@cli.command()
@click.option("--url", help="Address of an SGLang server, whose batches are then held; or of a sidecar.")
@_runtime_dir
@_token_file
@click.option(
    "--timeout", type=click.FloatRange(min=0.0, min_open=True), default=900.0, show_default=True, help="Seconds to wait."
)
@click.option("--batch-sizes", help="With a server: sizes to hold, like 1,2,4,8; default: powers of two.")
@click.option("--prompts", type=PATH, help="With a server: file of prompts, one a line, like your traffic's.")
@click.option("--api-key", envvar="SGLANG_API_KEY", default="", help="With a server that asks for one.")
def sweep(
    url: str | None, runtime_dir: Path, token_file: Path | None, timeout: float, batch_sizes: str | None, prompts: Path | None,
    api_key: str,
) -> None:  # fmt: skip
    """A (new) sweep in a running sidecar, watched to its end; with --url of a server, batch size by batch size."""
    from adaptive_spec.cli.server_sweep import is_sidecar, read_prompts, sweep_server
    from adaptive_spec.cli.sweep import watch_sweep
    from adaptive_spec.client.sidecar import ControlClient

    if url is None or is_sidecar(url):
        watch_sweep(ControlClient.find(runtime_dir, url, token_file), timeout)
        return
    from adaptive_spec.client.sglang import ServerApi

    client = ControlClient.find(runtime_dir, None, token_file)
    sweep_server(ServerApi(url, api_key), client, batch_sizes, read_prompts(prompts), timeout)


@cli.command()
@click.argument("command", type=click.Choice(COMMANDS))
@click.argument("k", type=click.IntRange(0, 32), required=False)
@_url
@_runtime_dir
@_token_file
@click.option("--json", "as_json", is_flag=True, help="With status: print /status.json as it is.")
def ctl(command: str, k: int | None, url: str | None, runtime_dir: Path, token_file: Path | None, as_json: bool) -> None:
    """Show or change what a running sidecar does. `pin K` holds one K for all batch sizes until `unpin`."""
    if (command == "pin") != (k is not None):
        raise BadInput(f"K: {k!r} is not allowed: must be a whole number in 0..32 for pin, and absent otherwise")
    from adaptive_spec.client.sidecar import ControlClient

    client = ControlClient.find(runtime_dir, url, token_file)
    if command != "status":
        click.echo(f"{command}: done, mode {client.send(command, k)['mode']}")
        return
    document = client.status()
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    from rich.console import Console

    from adaptive_spec.cli.tables import status_table

    Console().print(status_table(document))


@cli.command()
@click.argument("profile", type=PATH)
@click.option("--states", type=click.IntRange(1, 33), default=4, show_default=True, help="Most K to capture; each costs memory.")
@click.option("--max-batch", type=click.IntRange(1, 4096), help="Largest batch size to plan for; default: the profile's.")
@click.option("--out", type=PATH, help="Write the file for --speculative-adaptive-config.")
@click.option("--json", "as_json", is_flag=True, help="Print the choice as JSON.")
def candidates(profile: Path, states: int, max_batch: int | None, out: Path | None, as_json: bool) -> None:
    """Choose the K an SGLang server should capture, from what a sweep measured (PROFILE: a folder of profile_dir)."""
    from adaptive_spec.cli.candidates import candidates_of, choice_tables, write_config

    choice = candidates_of(profile, states, max_batch)
    if out is not None:
        write_config(choice, out)
    if as_json:
        from adaptive_spec.offline.draft_length_choice import config_document

        dropping = {str(k): {"mean": mean, "worst": worst} for k, (mean, worst) in choice.dropping.items()}
        document = {"states": list(choice.ks), "loss": choice.loss, "dropping": dropping, "config": config_document(choice)}
        click.echo(json.dumps(document, indent=1))
        return
    from rich.console import Console

    for table in choice_tables(choice):
        Console().print(table)
    if out is not None:
        Console().print(f"written to {out}", highlight=False)


@cli.command()
@_runtime_dir
@click.option("--profile-dir", type=PATH, default=Path("profiles"), show_default=True, help="Folder of profiles.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the sidecar would bind.")
@click.option("--port", type=click.IntRange(0, 65535), default=9477, show_default=True, help="Port the sidecar would bind.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(runtime_dir: Path, profile_dir: Path, host: str, port: int, as_json: bool) -> None:
    """Say what works here and what does not. Exit status 1 when something essential is broken."""
    from adaptive_spec.cli.doctor import examine

    findings = examine(runtime_dir, profile_dir, host, port)
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        from rich.console import Console

        from adaptive_spec.cli.tables import findings_table

        Console().print(findings_table(findings))
    if any(finding.state == "broken" for finding in findings):
        raise click.exceptions.Exit(1)


@cli.command()
@click.option("--duration", type=click.FloatRange(min=1.0), help="Seconds; until Ctrl-C when not given.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the sidecar's HTTP server.")
@click.option("--port", type=click.IntRange(0, 65535), default=9477, show_default=True, help="Its port; 0 takes a free one.")
@click.option("--json", "json_file", type=PATH, help="Write the figures of the run to this file.")
@click.option("--compare", is_flag=True, help="Also run every fixed K on the same prompts, in turn, and print the ratios.")
@click.option("--engine", type=click.Choice(["embedded", "sglang"]), default="embedded", show_default=True, help="Engine to run.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the prompts' order.")
@click.option("--profile-dir", type=PATH, help="Keep the profile here and use it next time; a fresh one is thrown away.")
def demo(
    duration: float | None, host: str, port: int, json_file: Path | None, compare: bool, engine: str, seed: int,
    profile_dir: Path | None,
) -> None:  # fmt: skip
    """See it work: a real engine on real text, the sidecar beside it, and what they decide."""
    if engine == "sglang":
        from adaptive_spec.engines.sglang.cpu_kit import CpuKit

        CpuKit().install()  # before anything is shown: it takes minutes the first time
    from adaptive_spec.cli.demo import DemoOptions, run_demo

    if status := run_demo(DemoOptions(duration, host, port, json_file, compare, seed, profile_dir, engine)):
        raise click.exceptions.Exit(status)


@cli.command()
@click.argument("scenarios", nargs=-1, required=True, type=PATH, metavar="SCENARIO.yaml...")
@click.option(
    "--policies", default="adaptive,oracle,static,ema", show_default=True, help="Which to run, by name, separated by commas."
)
@click.option("--seed", type=click.IntRange(min=0), help="In place of the scenarios' own.")
@click.option("--json", "json_file", type=PATH, help="Write the results to this file.")
@click.option("--warm", is_flag=True, help="Let adaptive start from a profile of the first phase, not from a sweep.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; one per core by default. Results do not depend on it.")
def bench(
    scenarios: tuple[Path, ...], policies: str, seed: int | None, json_file: Path | None, warm: bool, jobs: int | None
) -> None:
    """Run policies against each other in a simulated server, in virtual time. Scenario files: docs/scenarios.md."""
    from adaptive_spec.engines.simulated.bench import bench as run_bench

    run_bench(scenarios, policies, seed, json_file, warm, jobs)


@cli.command()
@_runtime_dir
@click.option("--out", type=PATH, required=True, help="Trace file to write.")
@click.option("--steps", type=click.IntRange(2, 10_000_000), default=20_000, show_default=True, help="Newest steps to keep.")
@click.option("--max-mb", type=click.IntRange(1, 65_536), default=256, show_default=True, help="Memory the trace may take.")
@click.option("--duration", type=click.FloatRange(min=0.0, min_open=True), help="Seconds; until Ctrl-C when not given.")
def record(runtime_dir: Path, out: Path, steps: int, max_mb: int, duration: float | None) -> None:
    """Record what a live engine does, to judge policies on it with `replay`. The newest steps are kept."""
    from adaptive_spec.cli.record import record_trace

    trace = record_trace(runtime_dir, out, steps, max_mb << 20, duration)
    click.echo(f"{len(trace.records)} steps of {trace.info.name} {trace.info.model} written to {out}, {trace.lost} lost")


@cli.command()
@click.argument("trace", type=PATH)
@click.option("--policies", default="adaptive,static,ema", show_default=True, help="Which to replay, separated by commas.")
@click.option("--config", type=PATH, help="The sidecar's YAML configuration: the controller's settings are taken from it.")
@click.option("--json", "json_file", type=PATH, help="Write the results to this file.")
def replay(trace: Path, policies: str, config: Path | None, json_file: Path | None) -> None:
    """Say what policies would have decided on a recorded TRACE, and what that would have given, before one goes active."""
    from adaptive_spec.config.load import load_settings

    settings = load_settings(config).controller
    from adaptive_spec.cli.replay import replay_file

    replay_file(trace, policies, settings, json_file)


@cli.group()
def dashboards() -> None:
    """Grafana dashboards: write ours to a Grafana server, or see whether it has them as they are shipped."""


_grafana_url = click.option("--grafana-url", required=True, help="Address of Grafana, with its path prefix if it has one.")
_grafana_token = click.option(
    "--token-file", type=PATH, help="File with the token of a service account with the role Editor; GRAFANA_TOKEN without it."
)
_grafana_timeout = click.option(
    "--timeout", type=click.FloatRange(min=0.0, min_open=True, max=600.0), default=10.0, show_default=True,
    help="Seconds for an answer; there are three attempts.",
)  # fmt: skip


def _grafana(url: str, token_file: Path | None, timeout: float) -> Any:
    from adaptive_spec.sidecar.grafana import Grafana, read_token

    token = read_token(token_file, "--token-file") if token_file else os.environ.get("GRAFANA_TOKEN", "")
    return Grafana(url, token, timeout)


@dashboards.command()
@_grafana_url
@_grafana_token
@_grafana_timeout
@click.option("--folder", default="adaptive-spec", show_default=True, help="Title of the folder, where it must be made.")
def push(grafana_url: str, token_file: Path | None, timeout: float, folder: str) -> None:
    """Write the dashboards that are missing or different. The same again changes nothing."""
    from adaptive_spec.sidecar.grafana import GrafanaError, push_dashboards, summary

    try:
        findings = push_dashboards(_grafana(grafana_url, token_file, timeout), folder, f"adaptive-spec {__version__}")
    except GrafanaError as error:
        raise BadInput(str(error)) from error
    for line in summary(findings, pushed=True):
        click.echo(line)


@dashboards.command()
@_grafana_url
@_grafana_token
@_grafana_timeout
def check(grafana_url: str, token_file: Path | None, timeout: float) -> int:
    """Say of each dashboard whether Grafana has it as shipped. Exit status 1 when one is missing or different."""
    from adaptive_spec.sidecar.grafana import GrafanaError, check_dashboards, summary

    try:
        findings = check_dashboards(_grafana(grafana_url, token_file, timeout))
    except GrafanaError as error:
        raise BadInput(str(error)) from error
    for line in summary(findings, pushed=False):
        click.echo(line)
    return int(any(finding.state != "current" for finding in findings))


def main() -> None:
    """Entry point of `adaptive-spec`."""
    try:
        status = cli.main(standalone_mode=False)
    except (BadInput, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"adaptive-spec: {' '.join(message.split())}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; let nothing complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)
