"""`adaptive-spec candidates`: from a profile to a file for SGLang's `--speculative-adaptive-config`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Table

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.errors import BadInput
from adaptive_spec.models.model_set import ModelSet
from adaptive_spec.offline.draft_length_choice import Choice, choose, config_document, goodput_by_traffic
from adaptive_spec.storage.archive import write_atomically
from adaptive_spec.storage.profile import load_profile, profiled_engine


def candidates_of(folder: Path, states: int, max_batch: int | None) -> Choice:
    """Choose the states to capture for a profile. Raises BadInput when there is none, or nothing was learnt yet."""
    try:
        info = profiled_engine(folder)
        profile = load_profile(folder, info)
        if profile is None:
            raise ValueError("there is no profile in it")
        models = ModelSet(ControllerSettings(), info)
        models.take(profile.latency, profile.calibration)
        models.fit()
        # What was not measured is interpolated from what was, so that a K nobody has captured yet can be wished for.
        models.info = replace(info, candidates=tuple(range(info.max_k + 1)))
        models.fit()
    except ValueError as error:
        raise BadInput(f"PROFILE: '{folder}' is not allowed: {error}; must be a profile folder") from error
    forecast = models.forecast
    if forecast is None or info.max_k == 0:
        raise BadInput(f"PROFILE: '{folder}' is not allowed: nothing was learnt in it; must be of a finished sweep")
    rows = min(max_batch or info.max_batch, info.max_batch)
    requests = np.arange(1, rows + 1)[:, None]
    context = min(1, forecast.goodput.shape[1] - 1)
    seconds = requests * forecast.tokens_per_request[1 : rows + 1, context] / forecast.goodput[1 : rows + 1, context]
    conditional, _ = models.acceptance.conditional_rates()
    return choose(goodput_by_traffic(np.asarray(conditional, np.float64), seconds), states)


def write_config(choice: Choice, path: Path) -> None:
    """Write SGLang's file. Raises BadInput when it cannot be written."""
    try:
        write_atomically(path.absolute(), (json.dumps(config_document(choice), indent=1) + "\n").encode())
    except OSError as error:
        raise BadInput(f"--out: '{path}' is not allowed: {error.strerror}; must be a file that can be written") from error


def choice_tables(choice: Choice) -> tuple[Table, Table]:
    """For people: K by batch size, and what each captured K is worth."""
    ranges = Table("batch size", "K to capture", title=f"states {', '.join(map(str, choice.ks))}", title_justify="left")
    for part in choice.ranges:
        ranges.add_row(
            str(part.first) if part.first == part.last else f"{part.first} to {part.last}", ", ".join(map(str, part.ks))
        )
    worth = Table(
        "without K", title=f"with all of them {choice.loss:.2%} of goodput is lost against every K", title_justify="left"
    )
    for heading in ("loses on average", "at worst"):
        worth.add_column(heading, justify="right")
    for k, (mean, worst) in choice.dropping.items():
        worth.add_row(str(k), f"{mean:.2%}", f"{worst:.2%}")
    return ranges, worth
