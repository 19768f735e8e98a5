"""The command line: all commands and their options. What a command does is in the module of its name.

Imports are inside the commands, so that `--help` is quick and only the parts that a command needs must be installed. Exit status:
0 on success, 2 on bad input, with one line on stderr and no traceback.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import click

from adaptive_spec import __version__
from adaptive_spec.domain.commands import CONTROL_COMMANDS
from adaptive_spec.errors import BadInput

PATH = click.Path(path_type=Path)


class Finite(click.FloatRange):
    """A range of finite numbers: `nan` is in every range of click, and `inf` in one without an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


_runtime_dir = click.option(
    "--runtime-dir", type=PATH,
    help="Folder that sidecar and engine share.  [default: /dev/shm/adaptive-spec-USER-PORT of the running server, port 30000]",
)  # fmt: skip
_url = click.option("--url", help="Address of the sidecar's HTTP server.  [default: read from the runtime directory]")
_token_file = click.option(
    "--token-file", type=PATH,
    help="File with the control token.  [default: in the runtime directory, for the sidecar that runs there]",
)  # fmt: skip


_ca = click.option(
    "--ca", type=PATH,
    help="With https: file of certificates to trust.  [default: the system's, or the certificate of the sidecar that runs there]",
)  # fmt: skip
_cert = click.option("--cert", type=PATH, help="With https: file of this client's certificate, for a sidecar with client_ca.")
_key = click.option("--key", type=PATH, help="With https: file of the key of --cert.  [default: it is in that file]")


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="adaptive-spec")
def cli() -> None:
    """Adapt the draft length K of speculative decoding on a live LLM server."""


@cli.command()
@click.option("--latency", type=PATH, help="CSV with the header num_tokens,latency_ms.")
@click.option("--calibration", type=PATH, help="CSV with the header cumulative_score,accepted (0 or 1).")
@click.option("--out", type=PATH, required=True, help="Folder for latency_model.npz, calibration.npz and plots/.")
@click.option(
    "--jump-threshold", type=Finite(0.02, 2.0), default=0.15, show_default=True,
    help="Smallest relative latency jump that counts as a tile boundary.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def fit(latency: Path | None, calibration: Path | None, out: Path, jump_threshold: float, as_json: bool) -> None:
    """Fit both models to recorded samples. Plots the latency model and the calibration."""
    if latency is None and calibration is None:
        raise BadInput("--latency, --calibration: at least one of them is required")
    from rich.console import Console

    with Console(stderr=True, markup=False, emoji=False).status("fitting"):
        from adaptive_spec.offline.fit import fit_files

        result = fit_files(latency, calibration, out, jump_threshold)
    if as_json:
        click.echo(json.dumps(result.document()))
        return
    from adaptive_spec.cli.tables import fit_tables

    console = Console(markup=False, emoji=False)
    for table in fit_tables(result):
        console.print(table)
    console.print(f"written to {out}", highlight=False)


@cli.command()
@click.option("--config", type=PATH, help="YAML configuration, see docs/configuration.md.")
@click.option("--runtime-dir", type=PATH, help="Overrides runtime_dir of the configuration.")
@click.option("--server-port", type=click.IntRange(1, 65535), help="Overrides server_port of the configuration.")
@click.option("--profile-dir", type=PATH, help="Overrides profile_dir of the configuration.")
@click.option("--host", help="Overrides host of the configuration.")
@click.option("--port", type=click.IntRange(0, 65535), help="Overrides port of the configuration; 0: a free port.")
def sidecar(config: Path | None, **overrides: Any) -> None:
    """Run the sidecar. It learns from an engine's step records, chooses K, and serves /metrics and the status page."""
    # The sidecar uses one core: linear algebra on all cores would slow the engine. Set before numpy is imported.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from adaptive_spec.config.load import load_settings

    given = {key: value for key, value in overrides.items() if value is not None}
    settings = load_settings(config, given)
    from adaptive_spec.sidecar.process import run_sidecar

    run_sidecar(settings, lambda: load_settings(config, given))


@cli.command()
@click.option(
    "--mode", type=click.Choice(["active", "shadow"]), help="Set K, or observe only.  [default: from the configuration]"
)
@click.option("--config", type=PATH, help="YAML configuration of sidecar and plugin, see docs/configuration.md.")
@click.option("--runtime-dir", type=PATH, help="Overrides runtime_dir of the configuration.")
@click.option("--profile-dir", type=PATH, help="Overrides profile_dir of the configuration.")
@click.option("--host", help="Overrides host of the sidecar's HTTP server.")
@click.option("--port", type=click.IntRange(0, 65535), help="Overrides port of the sidecar's HTTP server; 0: a free port.")
@click.option("--engine", type=click.Choice(["sglang", "vllm"]), default="sglang", show_default=True, help="Server to run.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def serve(mode: str | None, config: Path | None, engine: str, flags: tuple[str, ...], **overrides: Any) -> int:
    """Run an SGLang or vLLM server together with a sidecar. Usage: adaptive-spec serve [OPTIONS] -- SERVER FLAGS"""
    from adaptive_spec.cli.serve import ServeOptions, run_serve

    given = {key: value for key, value in overrides.items() if value is not None}
    return run_serve(ServeOptions(mode, config, given, flags, engine))


@cli.command()
@click.option("--url", help="Address of an SGLang or vLLM server, to sweep each batch size; or of a sidecar.")
@_runtime_dir
@_token_file
@_ca
@_cert
@_key
@click.option(
    "--timeout",
    type=Finite(min=0.0, min_open=True),
    default=900.0,
    show_default=True,
    help="Most seconds to wait (with a server: per batch size).",
)
@click.option("--batch-sizes", help="With a server: batch sizes, like 1,2,4,8.  [default: powers of two]")
@click.option("--prompts", type=PATH, help="With a server: file with one prompt per line, similar to your traffic.")
@click.option("--api-key", envvar="SGLANG_API_KEY", default="", help="With a server: its API key.")
def sweep(
    url: str | None, runtime_dir: Path | None, token_file: Path | None, timeout: float, batch_sizes: str | None,
    prompts: Path | None, api_key: str, ca: Path | None, cert: Path | None, key: Path | None,
) -> None:  # fmt: skip
    """Run a new sweep and show its progress. With --url of a server, one batch size after the other is swept."""
    from adaptive_spec.cli.runtime_dirs import chosen_runtime_dir
    from adaptive_spec.cli.server_sweep import is_sidecar, read_prompts, server_api, sweep_server
    from adaptive_spec.cli.sweep import watch_sweep
    from adaptive_spec.client.sidecar import ControlClient
    from adaptive_spec.client.tls import ClientTls

    runtime_dir, tls = chosen_runtime_dir(runtime_dir, url), ClientTls(ca, cert, key)
    if url is None or is_sidecar(url, runtime_dir, tls):
        client = ControlClient.find(runtime_dir, url, token_file, tls)
        with client.reading():
            watch_sweep(client, timeout)
        return
    client = ControlClient.find(runtime_dir, None, token_file, tls)
    sweep_server(server_api(url, api_key, client), client, batch_sizes, read_prompts(prompts), timeout)


@cli.command()
@click.argument("command", type=click.Choice(("status", "explain", *CONTROL_COMMANDS)))
@click.argument("number", type=int, required=False, metavar="[K | BATCH]")
@_url
@_runtime_dir
@_token_file
@_ca
@_cert
@_key
@click.option("--dp-rank", type=int, help="With status and explain: this data-parallel rank; default: the first.")
@click.option("--json", "as_json", is_flag=True, help="With status and explain: print the answer as JSON.")
def ctl(
    command: str, number: int | None, url: str | None, runtime_dir: Path | None, token_file: Path | None, dp_rank: int | None,
    as_json: bool, ca: Path | None, cert: Path | None, key: Path | None,
) -> None:  # fmt: skip
    """Show or change what a running sidecar does. `pin K` uses one K at all batch sizes until `unpin`. `explain [BATCH]` shows
    why a batch size (default: that of the latest step) has its K. A command is for all data-parallel ranks of the server.
    """
    from adaptive_spec.wire.slot import MAX_BATCH_LIMIT, MAX_K_LIMIT

    if command == "pin" and (number is None or not 0 <= number <= MAX_K_LIMIT):
        raise BadInput(
            f"K: required for pin: must be a whole number in 0..{MAX_K_LIMIT}, got {'none' if number is None else number}"
        )
    if command == "explain" and number is not None and not 1 <= number <= MAX_BATCH_LIMIT:
        raise BadInput(f"BATCH: must be a whole number in 1..{MAX_BATCH_LIMIT}, got {number}")
    if command not in ("pin", "explain") and number is not None:
        raise BadInput(f"K: only allowed for pin, got {number} with {command}")
    if dp_rank is not None and (command not in ("status", "explain") or dp_rank < 0):
        raise BadInput(f"--dp-rank: only with status and explain, and at least 0, got {dp_rank} with {command}")
    from adaptive_spec.cli.runtime_dirs import chosen_runtime_dir
    from adaptive_spec.client.sidecar import ControlClient
    from adaptive_spec.client.tls import ClientTls

    client = ControlClient.find(chosen_runtime_dir(runtime_dir, url), url, token_file, ClientTls(ca, cert, key))
    if command not in ("status", "explain"):
        with client.reading():
            click.echo(f"{command}: done, mode {client.send(command, number)['mode']}")
        return
    document = client.status(dp_rank) if command == "status" else client.explain(number, dp_rank)
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    from rich.console import Console

    from adaptive_spec.cli.tables import explain_tables, status_table

    console = Console(markup=False, emoji=False)
    if command == "explain" and not console.is_terminal:  # a file or a pipe has no width: no column is cut
        console.width = 200
    with client.reading():
        for part in [status_table(document)] if command == "status" else list(explain_tables(document)):
            console.print(part)


@cli.command()
@_url
@_runtime_dir
@_ca
@_cert
@_key
def watch(url: str | None, runtime_dir: Path | None, ca: Path | None, cert: Path | None, key: Path | None) -> None:
    """Show a running sidecar live until Ctrl-C: mode, goodput, K by batch size, staircase, events. Lines where no terminal is."""
    from rich.console import Console

    from adaptive_spec.cli.runtime_dirs import chosen_runtime_dir
    from adaptive_spec.cli.watch import watch as watch_sidecar
    from adaptive_spec.client.sidecar import ControlClient
    from adaptive_spec.client.tls import ClientTls

    client = ControlClient.find(chosen_runtime_dir(runtime_dir, url), url, None, ClientTls(ca, cert, key))
    with client.reading():
        watch_sidecar(client, Console(highlight=False, markup=False, emoji=False))


@cli.command()
@click.argument("profile", type=PATH)
@click.option(
    "--states", type=click.IntRange(1, 33), default=4, show_default=True, help="Most K to capture; each takes GPU memory."
)
@click.option("--max-batch", type=click.IntRange(1, 4096), help="Largest batch size.  [default: that of the profile]")
@click.option(
    "--engine", type=click.Choice(["sglang", "vllm"]), help="Whose configuration to write.  [default: the profile's engine]"
)
@click.option("--out", type=PATH, help="File to write: SGLang's --speculative-adaptive-config, or vLLM's schedule.")
@click.option("--json", "as_json", is_flag=True, help="Print the choice as JSON.")
def candidates(
    profile: Path, states: int, max_batch: int | None, engine: str | None, out: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Choose the K a server should capture. PROFILE: a folder in profile_dir, of a finished sweep."""
    from adaptive_spec.cli.candidates import candidates_of, choice_tables, config_for, engine_of, write_config

    choice = candidates_of(profile, states, max_batch)
    engine = engine or engine_of(profile)
    config = config_for(choice, engine)
    if out is not None:
        write_config(config, out)
    if as_json:
        dropping = {str(k): {"mean": mean, "worst": worst} for k, (mean, worst) in choice.dropping.items()}
        document = {"states": list(choice.ks), "loss": choice.loss, "dropping": dropping, "config": config}
        click.echo(json.dumps(document, indent=1))
        return
    from rich.console import Console

    for table in choice_tables(choice):
        Console(markup=False, emoji=False).print(table)
    if engine == "vllm":
        Console(markup=False, emoji=False).print(
            f"for --speculative-config, beside method and model: {json.dumps(config)}", highlight=False, soft_wrap=True
        )
    if out is not None:
        Console(markup=False, emoji=False).print(f"written to {out}", highlight=False)


@cli.command()
@_runtime_dir
@click.option("--profile-dir", type=PATH, default=Path("profiles"), show_default=True, help="Folder of profiles.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that the sidecar would use.")
@click.option("--port", type=click.IntRange(0, 65535), default=9477, show_default=True, help="Port that the sidecar would use.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option(
    "--alive", is_flag=True,
    help="Only ask, by its heartbeat file, whether the loop of the sidecar in the runtime directory runs.",
)  # fmt: skip
def doctor(runtime_dir: Path | None, profile_dir: Path, host: str, port: int, as_json: bool, alive: bool) -> None:
    """Check this machine. Exit status 1 when something essential does not work."""
    from adaptive_spec.cli.runtime_dirs import chosen_runtime_dir

    if alive:
        from adaptive_spec.cli.alive import alive_line

        line, lives = alive_line(chosen_runtime_dir(runtime_dir))
        click.echo(line)
        raise click.exceptions.Exit(0 if lives else 1)
    from adaptive_spec.cli.doctor import examine

    findings = examine(chosen_runtime_dir(runtime_dir), profile_dir, host, port)
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        from rich.console import Console

        from adaptive_spec.cli.tables import findings_table

        Console(markup=False, emoji=False).print(findings_table(findings))
    if any(finding.state == "broken" for finding in findings):
        raise click.exceptions.Exit(1)


@cli.command()
@click.option("--duration", type=Finite(min=1.0), help="Seconds to run.  [default: until Ctrl-C]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the sidecar's HTTP server.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=9477,
    show_default=True,
    help="Port of the sidecar's HTTP server; 0: a free port.",
)
@click.option("--json", "json_file", type=PATH, help="File to write the results to.")
@click.option("--compare", is_flag=True, help="Also run every fixed K on the same prompts, alternating, and print the ratios.")
@click.option(
    "--engine", type=click.Choice(["embedded", "sglang", "vllm"]), default="embedded", show_default=True, help="Engine to run."
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    help="sglang, vllm: alternating rounds on the same prompts against the server's own policy, if it has one, and the launch K. "
    "Without --duration the run ends after them.  [default: 8 for sglang]",
)
@click.option(
    "--neighbours",
    type=click.IntRange(0, 64),
    default=0,
    show_default=True,
    help="Programs to run beside the engine that each take a core in bursts of 0.2 to 3 s, as on a busy machine.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for the order of the prompts.")
@click.option("--profile-dir", type=PATH, help="Folder to keep the profile in for the next run.  [default: not kept]")
def demo(
    duration: float | None, host: str, port: int, json_file: Path | None, compare: bool, engine: str, rounds: int | None,
    neighbours: int, seed: int, profile_dir: Path | None,
) -> None:  # fmt: skip
    """Run an engine and a sidecar on real text. Shows what the sidecar learns and decides."""
    if engine == "embedded" and rounds is not None:
        raise BadInput(f"--rounds: must be with --engine sglang or vllm, got {rounds} with 'embedded'")
    if engine == "sglang":
        rounds = rounds or 8
        from adaptive_spec.engines.sglang.cpu_kit import CpuKit

        CpuKit().install()  # before the live view starts: the first installation takes minutes
    elif engine == "vllm":
        from adaptive_spec.engines.vllm.cpu_kit import CpuKit as VllmCpuKit

        VllmCpuKit().install()
    from adaptive_spec.cli.demo import DemoOptions, run_demo

    if status := run_demo(DemoOptions(duration, host, port, json_file, compare, seed, profile_dir, engine, rounds, neighbours)):
        raise click.exceptions.Exit(status)


@cli.command()
@click.argument("scenarios", nargs=-1, type=PATH, metavar="[SCENARIO.yaml...]")
@click.option("--random", "count", type=click.IntRange(1, 10_000), help="Draw so many scenarios at random, instead of files.")
@click.option("--save", type=PATH, help="Folder to write the drawn scenarios to, as files; created if missing.")
@click.option("--policies", default="adaptive,oracle,static,ema", show_default=True, help="Policies to run, separated by commas.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed, instead of that of the scenarios; with --random: of the draw.")
@click.option("--json", "json_file", type=PATH, help="File to write the results to.")
@click.option("--warm", is_flag=True, help="Start adaptive from a profile of the first phase instead of a sweep.")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Number of processes; does not change the results.  [default: one per core]"
)
def bench(
    scenarios: tuple[Path, ...], count: int | None, save: Path | None, policies: str, seed: int | None, json_file: Path | None,
    warm: bool, jobs: int | None,
) -> None:  # fmt: skip
    """Compare policies on a simulated server in virtual time. Scenario files: docs/scenarios.md."""
    from adaptive_spec.engines.simulated.bench import bench as run_bench

    run_bench(scenarios, count, save, policies, seed, json_file, warm, jobs)


@cli.command()
@_runtime_dir
@click.option("--out", type=PATH, required=True, help="Trace file to write.")
@click.option(
    "--steps",
    type=click.IntRange(2, 10_000_000),
    default=20_000,
    show_default=True,
    help="Most steps to keep; the newest are kept.",
)
@click.option(
    "--max-mb", type=click.IntRange(1, 65_536), default=256, show_default=True, help="Most memory for the trace, in MiB."
)
@click.option("--duration", type=Finite(min=0.0, min_open=True), help="Seconds to run.  [default: until Ctrl-C]")
def record(runtime_dir: Path | None, out: Path, steps: int, max_mb: int, duration: float | None) -> None:
    """Record the steps of a live engine to a trace file. The trace is for `replay`."""
    from adaptive_spec.cli.record import record_trace
    from adaptive_spec.cli.runtime_dirs import chosen_runtime_dir

    trace = record_trace(chosen_runtime_dir(runtime_dir, role="engine"), out, steps, max_mb << 20, duration)
    click.echo(f"{len(trace.records)} steps of {trace.info.name} {trace.info.model} written to {out}, {trace.lost} lost")


@cli.command()
@click.argument("trace", type=PATH)
@click.option("--policies", default="adaptive,static,ema", show_default=True, help="Policies to replay, separated by commas.")
@click.option("--config", type=PATH, help="YAML configuration of the sidecar; its controller settings are used.")
@click.option("--json", "json_file", type=PATH, help="File to write the results to.")
def replay(trace: Path, policies: str, config: Path | None, json_file: Path | None) -> None:
    """Estimate the goodput of other policies on a TRACE. Their decisions are replayed, the outcomes are estimated."""
    from adaptive_spec.config.load import load_settings

    settings = load_settings(config).controller
    from adaptive_spec.cli.replay import replay_file

    replay_file(trace, policies, settings, json_file)


@cli.group()
def dashboards() -> None:
    """Write the Grafana dashboards, or check them."""


_grafana_url = click.option("--grafana-url", required=True, help="Address of Grafana, including its path prefix.")
_grafana_token = click.option(
    "--token-file", type=PATH, help="File with the token of a service account with the role Editor.  [default: GRAFANA_TOKEN]"
)
_grafana_timeout = click.option(
    "--timeout", type=Finite(min=0.0, min_open=True, max=600.0), default=10.0, show_default=True,
    help="Seconds to wait for each answer; there are three attempts.",
)  # fmt: skip


def _grafana(url: str, token_file: Path | None, timeout: float) -> Any:
    from adaptive_spec.sidecar.grafana import Grafana, read_token

    token = read_token(token_file, "--token-file") if token_file else os.environ.get("GRAFANA_TOKEN", "")
    return Grafana(url, token, timeout)


@dashboards.command()
@_grafana_url
@_grafana_token
@_grafana_timeout
@click.option("--folder", default="adaptive-spec", show_default=True, help="Title of the folder, if it must be created.")
def push(grafana_url: str, token_file: Path | None, timeout: float, folder: str) -> None:
    """Write the missing and different dashboards. The others are not changed."""
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
    """Compare the dashboards in Grafana with ours. Exit status 1 when one is missing or different."""
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path need not be Unicode text
    try:
        status = cli.main(standalone_mode=False)
    except (BadInput, click.ClickException) as error:
        message = " ".join((error.format_message() if isinstance(error, click.ClickException) else str(error)).split())
        # It may hold a value as it was given, and a terminal obeys some characters.
        click.echo(f"adaptive-spec: {message if message.isprintable() else repr(message)[1:-1]}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # The reader of stdout has closed it: avoid an error message when Python flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)
