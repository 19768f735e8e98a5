"""`adaptive-spec candidates`: chooses the K to capture from a profile, and writes SGLang's
`--speculative-adaptive-config`, or the schedule of vLLM's `--speculative-config`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from adaptive_spec.cli.output_files import write_json
from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.engines.vllm.launch_schedule import KEY
from adaptive_spec.errors import BadInput, one_line
from adaptive_spec.models.model_set import ModelSet
from adaptive_spec.offline.draft_length_choice import Choice, choose, config_document, goodput_by_traffic, schedule_document
from adaptive_spec.storage.profile import load_profile, profiled_engine


def candidates_of(folder: Path, states: int, max_batch: int | None) -> Choice:
    """Choose the K to capture, at most `states` of them. Raises BadInput without a profile of a finished sweep."""
    try:
        info = profiled_engine(folder)
        profile = load_profile(folder, info)
        if profile is None:
            raise ValueError("no profile in it")
        models = ModelSet(ControllerSettings(), info)
        models.take(profile.latency, profile.calibration)
        models.fit()
        # All K are allowed here: the cost of one that was never captured is interpolated from those that were.
        models.info = replace(info, candidates=tuple(range(info.max_k + 1)))
        models.fit()
    except Exception as error:  # whatever its files hold
        raise BadInput(f"PROFILE: '{folder}': {one_line(error)}; must be a profile folder") from error
    forecast = models.forecast
    if forecast is None or info.max_k == 0:
        raise BadInput(f"PROFILE: '{folder}': no measurements in it; must be from a finished sweep")
    rows = min(max_batch or info.max_batch, info.max_batch)
    requests = np.arange(1, rows + 1)[:, None]
    context = min(1, forecast.goodput.shape[1] - 1)
    seconds = requests * forecast.tokens_per_request[1 : rows + 1, context] / forecast.goodput[1 : rows + 1, context]
    conditional, _ = models.acceptance.conditional_rates()
    return choose(goodput_by_traffic(np.asarray(conditional, np.float64), seconds), states)


def engine_of(folder: Path) -> str:
    """Name of the engine that a profile is of. Raises BadInput without one."""
    try:
        return profiled_engine(folder).name
    except ValueError as error:
        raise BadInput(f"PROFILE: '{folder}': {error}; must be a profile folder") from error


def config_for(choice: Choice, engine: str) -> dict[str, Any]:
    """The configuration of an engine with these K: SGLang's file, or what vLLM's `--speculative-config` must contain."""
    if engine != "vllm":
        return config_document(choice)
    return {"num_speculative_tokens": max(choice.ks[-1], 1), KEY: schedule_document(choice)}


def write_config(document: dict[str, Any], path: Path) -> None:
    """Write an engine's configuration. Raises BadInput when it cannot be written."""
    write_json(path, document, "--out")


def choice_tables(choice: Choice) -> tuple[Table, Table]:
    """Return two tables: K by batch size, and the goodput lost without each captured K."""
    ranges = Table("batch size", "K to capture", title=f"states {', '.join(map(str, choice.ks))}", title_justify="left")
    for part in choice.ranges:
        ranges.add_row(
            str(part.first) if part.first == part.last else f"{part.first} to {part.last}", ", ".join(map(str, part.ks))
        )
    worth = Table(
        "without K",
        title=f"estimated goodput lost with these K, compared with capturing every K: {choice.loss:.2%}",
        title_justify="left",
    )
    for heading in ("mean loss", "largest loss"):
        worth.add_column(heading, justify="right")
    for k, (mean, worst) in choice.dropping.items():
        worth.add_row(str(k), f"{mean:.2%}", f"{worst:.2%}")
    return ranges, worth
