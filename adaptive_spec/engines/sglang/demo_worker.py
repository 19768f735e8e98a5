"""The engine process of `demo --engine sglang`: a real SGLang server on the CPU kit with SGLang's default
adaptive configuration (other K at every batch size), and traffic whose acceptance changes.

    python -m adaptive_spec.engines.sglang.demo_worker --runtime-dir DIR --status FILE [--duration S] [--rounds N] [--compare]

The server is started with the plugin and ends with this process; the rest is in `common.server_demonstration`. It ends after
--duration or --rounds, or on SIGTERM or SIGINT, and then writes a last status.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from adaptive_spec.client.sglang import ServerApi
from adaptive_spec.engines.common.rounds import Arm
from adaptive_spec.engines.common.server_demonstration import DemoPlan, DemoServer, demonstrate, free_port
from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from adaptive_spec.errors import BadInput

OWN = Arm("sglang-own", "shadow")
"""SGLang's own adaptive policy decides while the sidecar's policies do not act; see docs/sglang.md, When no policy acts."""


def demo_server(runtime_dir: Path, log: Path) -> DemoServer:
    """Start the server. Raises BadInput when the kit cannot be installed."""
    kit, port = CpuKit(), free_port()
    kit.install()
    command = kit.command("python", "-m", "sglang.launch_server", *kit.server_flags(port, adaptive=""))
    return DemoServer("SGLang", command, ServerApi(f"http://127.0.0.1:{port}"), runtime_dir, log)


@click.command(help=__doc__)
@click.option("--runtime-dir", type=click.Path(path_type=Path), required=True, help="folder shared with the sidecar")
@click.option("--status", "status_file", type=click.Path(path_type=Path), required=True, help="JSON file written every 0.5 s")
@click.option("--duration", type=click.FloatRange(min=0.0, min_open=True), help="seconds; default: until a signal")
@click.option("--rounds", type=click.IntRange(min=1), help="alternating rounds against other ways of choosing K")
@click.option(
    "--compare", is_flag=True, help="rounds with every K that the server runs at each batch size, not the launch K alone"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the traffic")
def main(runtime_dir: Path, status_file: Path, duration: float | None, rounds: int | None, compare: bool, seed: int) -> None:
    try:
        server = demo_server(runtime_dir, status_file.with_name("server.log"))
        demonstrate(server, runtime_dir, status_file, DemoPlan(duration, seed, rounds, compare), OWN)
    except BadInput as error:
        click.echo(str(error), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
