"""`adaptive-spec bench`: policies against each other on the same scenarios, in virtual time."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from adaptive_spec.engines.simulated.catalogue import build, policy_names
from adaptive_spec.engines.simulated.peers.sglang_ema import build_params
from adaptive_spec.engines.simulated.random_scenarios import random_scenarios, save_random
from adaptive_spec.engines.simulated.report import MANY_PHASES, result_table, summary_table
from adaptive_spec.engines.simulated.results import Result, Run
from adaptive_spec.engines.simulated.scenario import Scenario, load_scenario
from adaptive_spec.engines.simulated.server import SimulatedServer
from adaptive_spec.errors import BadInput
from adaptive_spec.storage.archive import write_atomically

Progress = Callable[[float], None]


def run_policy(name: str, scenario: Scenario, seed: int, warm: bool = False, each: Progress | None = None) -> Run:
    """Run one policy through a scenario. each: called every 1024 steps with the simulated time."""
    server = SimulatedServer(scenario, seed)
    return server.run(build(name, scenario, server, seed, warm), each=each)


def run_scenarios(
    scenarios: Sequence[Scenario], asked: str, seed: int | None, warm: bool, jobs: int, advance: Progress | None = None
) -> list[Result]:
    """Run the given policies and the oracle.

    seed: in place of the scenarios' own. jobs: processes; the results do not depend on it. advance: called with simulated
    seconds that are done.
    """
    names = [policy_names(asked, scenario) for scenario in scenarios]
    tasks = [
        (index, name, scenario.file.seed if seed is None else seed)
        for index, scenario in enumerate(scenarios)
        for name in dict.fromkeys([*names[index], "oracle"])
    ]
    # Longest first, so that no long task runs alone at the end.
    tasks.sort(key=lambda task: task[1] != "adaptive")
    runs: dict[tuple[int, str], Run] = {}
    if jobs == 1:
        for index, name, used in tasks:
            runs[index, name] = _run_here(scenarios[index], name, used, warm, advance)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
            waiting: dict[Future[Run], tuple[int, str]] = {
                pool.submit(run_policy, name, scenarios[index], used, warm): (index, name) for index, name, used in tasks
            }
            for done in as_completed(waiting):
                index, name = waiting[done]
                runs[index, name] = done.result()
                if advance is not None:
                    advance(scenarios[index].file.duration_s)
    return [
        Result(scenario, {name: runs[index, name] for name in names[index]}, runs[index, "oracle"])
        for index, scenario in enumerate(scenarios)
    ]


def _run_here(scenario: Scenario, name: str, seed: int, warm: bool, advance: Progress | None) -> Run:
    done_s = 0.0

    def each(time_s: float) -> None:
        nonlocal done_s
        if advance is not None:
            advance(time_s - done_s)
        done_s = time_s

    run = run_policy(name, scenario, seed, warm, each)
    each(scenario.file.duration_s)
    return run


def chosen_scenarios(paths: Sequence[Path], count: int | None, save: Path | None, seed: int | None) -> list[Scenario]:
    """The scenarios of the files, or `count` drawn with `seed` (default 0) and written to `save`. Raises BadInput."""
    if count is None:
        if not paths:
            raise BadInput("SCENARIO.yaml: must be at least one scenario file, or --random N, got none")
        if save is not None:
            raise BadInput(f"--save: must come with --random, got {str(save)!r} alone")
        return [load_scenario(path) for path in paths]
    if paths:
        raise BadInput(f"--random: must come without scenario files, got {str(paths[0])!r}")
    if save is not None:
        try:
            save_random(save, count, seed or 0)
        except OSError as error:
            raise BadInput(f"--save: {str(save)!r} cannot be written: {error.strerror or error}") from error
    return random_scenarios(count, seed or 0)


def bench(
    paths: Sequence[Path], count: int | None, save: Path | None, policies: str, seed: int | None, json_file: Path | None,
    warm: bool, jobs: int | None,
) -> None:  # fmt: skip
    """Run, print the tables, write the JSON. Raises BadInput before anything has run. count, save: see `chosen_scenarios`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # One run uses one core. Linear algebra threads would compete for it. Must be set before a child loads numpy.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    scenarios = chosen_scenarios(paths, count, save, seed)
    if count is not None:
        seed = None  # each drawn scenario has a seed of its own
    names = [policy_names(policies, scenario) for scenario in scenarios]
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise BadInput(f"--json: {str(json_file)!r} cannot be written: no such folder")
    errors = Console(stderr=True, markup=False, emoji=False)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f} simulated s"),
        TimeElapsedColumn(), console=errors, transient=True, disable=not errors.is_terminal,
    )  # fmt: skip
    total_s = sum(
        len(dict.fromkeys([*asked, "oracle"])) * scenario.file.duration_s
        for asked, scenario in zip(names, scenarios, strict=True)
    )
    with progress:
        bar = progress.add_task("simulating", total=total_s)
        results = run_scenarios(
            scenarios, policies, seed, warm, jobs or os.cpu_count() or 1, lambda seconds: progress.advance(bar, seconds)
        )
    console = Console(markup=False, emoji=False)
    for result in results:
        if not console.is_terminal:  # a file or a pipe has no width: no figure is cut
            console.width = 68 + 13 * min(len(result.oracle.phases), MANY_PHASES)
        console.print(result_table(result, seed, warm))
        for name, run in result.runs.items():
            if run.failures:
                failed = f"{name}: {run.failures} calls of the controller failed; it fell back each time"
                console.print(failed, style="red", highlight=False)
    if count is not None:
        console.print(summary_table(results))
    for wide in (False, True):
        if any(("ema-wide" if wide else "ema") in result.runs for result in results):
            console.print(f"{'ema-wide' if wide else 'ema'}: {build_params(7, wide)[1]}", highlight=False)
    if json_file is not None:
        document = {"version": 1, "scenarios": [result.document(expected=count is not None) for result in results]}
        try:
            write_atomically(json_file.absolute(), json.dumps(document, indent=1).encode() + b"\n")
        except OSError as error:
            raise BadInput(f"--json: {str(json_file)!r} cannot be written: {error.strerror or error}") from error
