"""Scenario files: a server, its traffic and its drift events. Unknown keys are errors; every error is one line.

The keys are described in docs/scenarios.md. Durations are simulated seconds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from adaptive_spec.config.load import validated
from adaptive_spec.config.yaml_file import read_yaml
from adaptive_spec.domain.allowed import AllowedFrom, allowed_at, ranges
from adaptive_spec.domain.arrays import Bools
from adaptive_spec.engines.simulated.curve import Curve, read_curve
from adaptive_spec.errors import BadInput
from adaptive_spec.offline.samples import MAX_NUM_TOKENS
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT, MAX_K_LIMIT

MS_LIMIT = 1e6
LAUNCH_K = 3
"""Draft length servers are launched with where the scenario has no launch_k, cut to max_k."""


def _curve_form(value: Any) -> str | list[list[float]]:
    """A CSV file's name or [[tokens, ms], ...]; what is in it is checked when it is read."""
    points = value if isinstance(value, list) else []
    pairs = all(isinstance(p, list) and len(p) == 2 and all(_is_number(x) for x in p) for p in points)
    if isinstance(value, str) and value:
        return value
    if points and pairs:
        return points
    raise PydanticCustomError("curve", "must be the name of a CSV file or a list of [tokens, ms]")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _running_form(value: Any) -> tuple[int, int]:
    """A count, or a range of counts; both become (lowest, highest)."""
    ends = value if isinstance(value, list) else [value, value]
    if len(ends) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in ends) or not 1 <= ends[0] <= ends[1]:
        raise PydanticCustomError("running", "must be a whole number >= 1 or a range [lo, hi] of such")
    if ends[1] > MAX_BATCH_LIMIT:
        raise PydanticCustomError("running", f"must be <= {MAX_BATCH_LIMIT}")
    return int(ends[0]), int(ends[1])


CurveField = Annotated[str | list[list[float]], PlainValidator(_curve_form)]
RunningField = Annotated[tuple[int, int], PlainValidator(_running_form)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Noise(_Part):
    """Noise of step times: lognormal with mean 1; with probability spike_rate a step is multiplied by spike_factor.

    Spells of slowness, as a neighbour on the machine makes them: all steps are multiplied by spell_factor for a uniform time of
    0.5 to 1.5 spell_s, then run undisturbed for an exponential time of mean spell_gap_s. spell_gap_s 0: no spells.
    """

    sigma: float = Field(0.0, ge=0.0, le=2.0)
    spike_rate: float = Field(0.0, ge=0.0, le=1.0)
    spike_factor: float = Field(1.0, ge=1.0, le=1e4)
    spell_gap_s: float = Field(0.0, ge=0.0, le=1e6)
    spell_s: float = Field(1.0, gt=0.0, le=1e6)
    spell_factor: float = Field(1.0, ge=1.0, le=1e4)


class Latency(_Part):
    """Step times. graph_batch_sizes applies at batch granularity, token_buckets at request granularity."""

    verify_curve: CurveField
    graph_batch_sizes: list[int] | None = None
    token_buckets: list[int] | None = None
    draft_fixed_ms: float = Field(0.0, ge=0.0, le=MS_LIMIT)
    draft_ms_per_step: float = Field(0.0, ge=0.0, le=MS_LIMIT)
    context_ms_per_1k_tokens: float = Field(0.0, ge=0.0, le=MS_LIMIT)
    overhead_ms: float = Field(0.0, ge=0.0, le=MS_LIMIT)
    k_switch_ms: float = Field(0.0, ge=0.0, le=MS_LIMIT)
    noise: Noise = Noise()

    @field_validator("graph_batch_sizes", "token_buckets")
    @classmethod
    def check_buckets(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if value is not None and (not value or value[0] < 1 or any(b <= a for a, b in itertools.pairwise(value))):
            raise PydanticCustomError("buckets", "must be ascending whole numbers >= 1, or null")
        limit = MAX_BATCH_LIMIT if info.field_name == "graph_batch_sizes" else MAX_NUM_TOKENS
        if value is not None and value[-1] > limit:
            raise PydanticCustomError("buckets", f"must be <= {limit}")
        return value


class RequestClass(_Part):
    """A kind of requests; accept: mean acceptance of draft positions 1, 2, ... given that all before were accepted."""

    accept: list[float]
    concentration: float = Field(gt=0.0, le=1e6)
    request_spread: float = Field(0.0, ge=0.0, le=20.0)
    context: int = Field(0, ge=0, le=100_000_000)
    score_slope: float = Field(1.0, gt=0.0, le=100.0)
    score_bias: float = Field(0.0, ge=-100.0, le=100.0)

    @field_validator("accept")
    @classmethod
    def check_accept(cls, value: list[float]) -> list[float]:
        if not value or not all(0.0 < a < 1.0 for a in value):
            raise PydanticCustomError("accept", "must be probabilities, each > 0 and < 1")
        return value


class TimelineEntry(_Part):
    """Load and mix from at_s on. running: lowest and highest count; one number stands for both."""

    at_s: float = Field(ge=0.0, le=1e9)
    running: RunningField
    mix: dict[str, float]

    @field_validator("mix")
    @classmethod
    def check_mix(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or min(value.values()) < 0.0 or abs(sum(value.values()) - 1.0) > 0.02:
            raise PydanticCustomError("mix", "must be shares >= 0 of classes that sum to 1")
        return value


class DriftEvent(_Part):
    """Something changes at at_s: the latency scale, the curve, or a class's acceptance or scores."""

    at_s: float = Field(ge=0.0, le=1e9)
    latency_scale: float | None = Field(None, gt=0.0, le=1e3)
    verify_curve: CurveField | None = None
    class_name: str | None = Field(None, alias="class")
    accept: list[float] | None = None
    score_slope: float | None = Field(None, gt=0.0, le=100.0)
    score_bias: float | None = Field(None, ge=-100.0, le=100.0)

    @field_validator("accept")
    @classmethod
    def check_accept(cls, value: list[float] | None) -> list[float] | None:
        return None if value is None else RequestClass.check_accept(value)

    @model_validator(mode="after")
    def check_whole(self) -> DriftEvent:
        of_class = (self.accept, self.score_slope, self.score_bias) != (None, None, None)
        if of_class and self.class_name is None:
            raise PydanticCustomError("drift", "must name the class whose accept, score_slope or score_bias changes")
        if self.class_name is not None and not of_class:
            raise PydanticCustomError("drift", "must change accept, score_slope or score_bias of the class")
        if not of_class and self.latency_scale is None and self.verify_curve is None:
            raise PydanticCustomError(
                "drift", "must have latency_scale, verify_curve, or class with accept, score_slope or score_bias"
            )
        return self


class ScenarioFile(_Part):
    """The file as it is written."""

    name: str = Field(min_length=1, max_length=200)
    granularity: Literal["batch", "request"]
    max_k: int = Field(ge=1, le=MAX_K_LIMIT)
    duration_s: float = Field(gt=0.0, le=1e7)
    seed: int = Field(0, ge=0, le=2**63)
    latency: Latency
    classes: dict[str, RequestClass]
    timeline: list[TimelineEntry]
    drift: list[DriftEvent] | None = None
    mean_output_tokens: float = Field(200.0, ge=1.0, le=1e9)
    k_by_batch: dict[int, list[int]] | None = None
    launch_k: int | None = Field(None, ge=0, le=MAX_K_LIMIT)

    @field_validator("k_by_batch")
    @classmethod
    def check_k_by_batch(cls, value: dict[int, list[int]] | None) -> dict[int, list[int]] | None:
        if value is not None and (not value or min(value) != 1 or max(value) > MAX_BATCH_LIMIT):
            raise PydanticCustomError("k_by_batch", "must be K by batch size, from 1 on")
        if value is not None and any(not ks or ks != sorted(set(ks)) or ks[0] < 0 for ks in value.values()):
            raise PydanticCustomError("k_by_batch", "must be ascending K >= 0 for each batch size")
        return value


@dataclass(frozen=True)
class Scenario:
    """A checked scenario with its curves read. curve: at the start. drift: by time; curves: of each drift event or None."""

    file: ScenarioFile
    curve: Curve
    drift: tuple[DriftEvent, ...]
    curves: tuple[Curve | None, ...]

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def ragged(self) -> bool:
        """Whether verify lengths may differ from request to request."""
        return self.file.granularity == "request"

    @property
    def max_k(self) -> int:
        return self.file.max_k

    @property
    def launch_k(self) -> int:
        return min(LAUNCH_K, self.max_k) if self.file.launch_k is None else self.file.launch_k

    @cached_property
    def allowed_from(self) -> AllowedFrom:
        """K by batch size, as an engine says it; () when every K runs at every batch size.

        As in SGLang, a batch takes the K of the size it is padded to, and the launch K is allowed everywhere.
        """
        if self.file.k_by_batch is None:
            return ()
        graphs = self.file.latency.graph_batch_sizes or []
        wanted = tuple((b, tuple(sorted({*ks, self.launch_k}))) for b, ks in sorted(self.file.k_by_batch.items()))
        padded = [next((g for g in graphs if g >= b), b) for b in range(1, self.max_batch + 1)]
        return ranges([allowed_at(wanted, b) for b in padded])

    def allowed_k(self, batch_size: int) -> tuple[int, ...]:
        """K that the server runs at a batch size, ascending."""
        return allowed_at(self.allowed_from, batch_size) if self.allowed_from else tuple(range(self.max_k + 1))

    def allowed_mask(self) -> Bools:
        """[max_batch + 1, max_k + 1], whether the server runs K at a batch size. Row 0 is row 1."""
        return np.array([np.isin(np.arange(self.max_k + 1), self.allowed_k(max(b, 1))) for b in range(self.max_batch + 1)])

    @property
    def max_batch(self) -> int:
        """Most requests a step can have: the largest graph, or what the timeline asks for."""
        graphs = self.file.latency.graph_batch_sizes or [1]
        return min(max(graphs[-1], *(entry.running[1] for entry in self.file.timeline)), MAX_BATCH_LIMIT)

    @property
    def phase_starts(self) -> tuple[float, ...]:
        """Simulated seconds at which something changes, from 0 on, before the end."""
        times = {entry.at_s for entry in self.file.timeline} | {event.at_s for event in self.drift}
        return tuple(sorted(t for t in times if t < self.file.duration_s))


def load_scenario(path: Path) -> Scenario:
    """Read and check a scenario file. Raises BadInput with one line: file, dotted key, value, what is allowed."""
    return scenario_from(read_yaml(path), str(path), path.parent)


def scenario_from(data: object, name: str, folder: Path) -> Scenario:
    """Check a parsed scenario; `name` begins the line of a BadInput, `folder` is where its curves' names start."""
    if data is None:
        raise BadInput(f"{name}: must be a scenario, got an empty file")
    file = validated(ScenarioFile, data, name)
    _check_timeline(file, name)
    _check_classes(file, name)
    for batch_size, ks in (file.k_by_batch or {}).items():
        if ks[-1] > file.max_k:
            raise BadInput(f"{name}: k_by_batch.{batch_size}: must be <= {file.max_k} (max_k), got {ks[-1]}")
    if file.launch_k is not None and file.launch_k > file.max_k:
        raise BadInput(f"{name}: launch_k: must be <= {file.max_k} (max_k), got {file.launch_k}")
    events = sorted(enumerate(file.drift or []), key=lambda numbered: numbered[1].at_s)
    curve = read_curve(file.latency.verify_curve, folder, f"{name}: latency.verify_curve")
    curves = tuple(
        None if event.verify_curve is None else read_curve(event.verify_curve, folder, f"{name}: drift.{index}.verify_curve")
        for index, event in events
    )
    scenario = Scenario(file, curve, tuple(event for _, event in events), curves)
    largest = scenario.max_batch * (file.max_k + 1)
    fields = ["latency.verify_curve", *(f"drift.{index}.verify_curve" for index, _ in events)]
    for field, one in zip(fields, (curve, *curves), strict=True):
        if one is not None and (lowest := float(one.table(largest).min())) <= 0.0:
            raise BadInput(
                f"{name}: {field}: must be > 0 ms up to {largest} tokens, got {lowest:.3g}: "
                "the line through the last two points falls"
            )
    return scenario


def _check_timeline(file: ScenarioFile, name: str) -> None:
    if not file.timeline:
        raise BadInput(f"{name}: timeline: must have an entry with at_s 0, got []")
    if file.timeline[0].at_s != 0.0:
        raise BadInput(f"{name}: timeline.0.at_s: must be 0, got {file.timeline[0].at_s:g}")
    for index in range(1, len(file.timeline)):
        at_s, before_s = file.timeline[index].at_s, file.timeline[index - 1].at_s
        if at_s <= before_s:
            raise BadInput(f"{name}: timeline.{index}.at_s: must be > {before_s:g}, that of the entry before, got {at_s:g}")


def _check_classes(file: ScenarioFile, name: str) -> None:
    known = ", ".join(file.classes)
    if not file.classes:
        raise BadInput(f"{name}: classes: must have at least one class, got {{}}")
    lengths = {f"classes.{key}.accept": kind.accept for key, kind in file.classes.items()}
    lengths |= {f"drift.{i}.accept": event.accept for i, event in enumerate(file.drift or []) if event.accept is not None}
    for field, accept in lengths.items():
        if len(accept) < file.max_k:
            raise BadInput(f"{name}: {field}: must have at least max_k = {file.max_k} values, got {len(accept)}")
    for index, entry in enumerate(file.timeline):
        for key in entry.mix:
            if key not in file.classes:
                raise BadInput(f"{name}: timeline.{index}.mix.{key}: unknown class: must be one of {known}")
    for index, event in enumerate(file.drift or []):
        if event.class_name is not None and event.class_name not in file.classes:
            raise BadInput(f"{name}: drift.{index}.class: must be one of {known}, got {event.class_name!r}")
