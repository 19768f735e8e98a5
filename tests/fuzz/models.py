"""What is learnt from foreign numbers: restored models, records and samples of right form with any values."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.arrays import AnyArray
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.offline.fit_pairs import fit_pairs
from adaptive_spec.offline.fit_samples import fit_samples
from adaptive_spec.storage.archive import Archive, archive_bytes, load_archive, parse_archive
from adaptive_spec.wire.policy_payload import check_policy
from adaptive_spec.wire.slot import HEAD, SlotLayout, decode_slot
from tests.fuzz.npz_files import same_arrays
from tests.fuzz.target import Target
from tests.support.numbers_engine import engine_info

WRITTEN = Path(__file__).parents[1] / "written_before"
KINDS = ("latency_model", "calibration", "checkpoint")
REFITS = 2
JUMP_THRESHOLD = 0.15
LAYOUT = SlotLayout.of(8, 4)
SPECIAL = (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e308, -1e308, 1e-320, 2.0**63, 0.5)


class Models(Target):
    """The first byte, modulo 6. 0, 1, 2: the rest edits the arrays of a good latency model, calibration or checkpoint, which is
    written anew with a right checksum and restored. 3: the rest is records, which a controller learns. 4, 5: samples of
    latency or acceptance, which are fitted.

    Whatever the numbers are: they are refused, or what follows from them is finite and what is published valid.
    """

    name = "models"
    longest = 2048
    share = 0.02  # one input takes tens of milliseconds

    def __init__(self) -> None:
        profile = WRITTEN / "profiles" / "numbers_cpu_tp1"
        self.good: dict[str, Archive] = {
            "latency_model": load_archive(profile / "latency_model.npz", "latency_model"),
            "calibration": load_archive(profile / "calibration.npz", "calibration"),
            "checkpoint": load_archive(WRITTEN / "checkpoint.npz", "checkpoint"),
        }
        self.info = engine_info()

    def seeds(self) -> dict[str, bytes]:
        edits = {f"{kind}_{n}": bytes([number]) + bytes([n, n % 6, 0, n, n]) * (n + 1)
                 for number, kind in enumerate(KINDS) for n in range(8)}  # fmt: skip
        records = b"".join(
            HEAD.pack(n + 1, n, n * 10**7, 100, 0, 6, 6, 2, 2, 2, 0, 1e-3, 4e-3, 0.0, 6e-3)
            + np.full(4, 0.7, np.float32).tobytes() + np.arange(2, dtype=np.uint32).tobytes() + bytes([2, 2, n % 3, 1])
            for n in range(4)
        )  # fmt: skip
        doubles = np.linspace(0.01, 0.02, 24)
        return {
            **edits, "records": b"\3" + records, "latency": b"\4" + doubles.tobytes(), "pairs": b"\5" + doubles.tobytes(),
            "extreme": b"\4" + np.array([1e-9, 3600.0, 1.0, 3e-5]).tobytes(),
        }  # fmt: skip

    def run(self, data: bytes) -> str:
        kind, rest = (data[0] % 6 if data else 0), data[1:]
        # An overflow on the way is no fault, if what comes of it is refused.
        with np.errstate(all="ignore"):
            return self._run(kind, rest)

    def _run(self, kind: int, rest: bytes) -> str:
        if kind < len(KINDS):
            return self._restored(KINDS[kind], rest)
        return (self._learnt, _fitted_latency, _fitted_pairs)[kind - len(KINDS)](rest)

    def _restored(self, kind: str, edits: bytes) -> str:
        good = self.good[kind]
        arrays = edited(good.arrays, edits)
        archive = parse_archive(archive_bytes(kind, arrays, good.meta), kind, "n")
        same_arrays(arrays, archive.arrays)
        controller = Controller(ControllerSettings(), self.info)
        try:
            if kind == "checkpoint":
                controller.restore(archive.arrays)
            elif kind == "latency_model":
                controller.restore_profile(archive.arrays, self.good["calibration"].arrays)
            else:
                controller.restore_profile(self.good["latency_model"].arrays, archive.arrays)
        except (ValueError, OverflowError, RecursionError) as error:
            return repr(error)
        _decided(controller)
        return ""

    def _learnt(self, data: bytes) -> str:
        controller = Controller(ControllerSettings(), self.info)
        learnt = 0
        while data:
            record, data = _next_record(data)
            if record is None or record.invalid_reason() is not None:
                continue  # the reader drops it
            learnt += 1
            policy = controller.observe(record, float(learnt))
            if policy is not None:
                check_policy(policy)
        _decided(controller)
        return "" if learnt else "no record"


def _decided(controller: Controller) -> None:
    for refit in range(REFITS):
        policy = controller.refit(1e3 + refit)
        if policy is not None:
            check_policy(policy)
    controller.snapshot(2e3)
    controller.state()


def _next_record(data: bytes) -> tuple[StepRecord | None, bytes]:
    """The record at the beginning, where it fits the layout, and what follows."""
    slot = data[: LAYOUT.slot_bytes].ljust(LAYOUT.slot_bytes, b"\0")
    record = decode_slot(slot, LAYOUT)
    if record is None:
        return None, data[HEAD.size :]
    return record, data[HEAD.size + len(record.verify_len) * (4 * record.k + 6) :]


def _fitted_latency(data: bytes) -> str:
    seconds = np.frombuffer(data[: len(data) // 8 * 8], np.float64)
    seconds = seconds[(seconds >= 1e-9) & (seconds <= 3600)]  # as the reader of CSV files
    if not len(seconds):
        return "no sample"
    fitted = fit_samples(np.arange(len(seconds)) * 7 % 60 + 1, seconds, JUMP_THRESHOLD)
    assert fitted.segments
    assert all(np.isfinite((s.intercept_s, s.slope_s_per_token)).all() for s in fitted.segments)
    assert all(np.isfinite(b.jump_ratio) for b in fitted.boundaries)
    return ""


def _fitted_pairs(data: bytes) -> str:
    scores = np.frombuffer(data[: len(data) // 8 * 8], np.float64)
    scores = scores[(scores > 0) & (scores <= 1)]
    if not len(scores):
        return "no pair"
    fitted = fit_pairs(scores, np.arange(len(scores)) * 5 % 7 < 4)
    assert np.isfinite((fitted.ece, fitted.brier, fitted.log_loss)).all()
    return ""


def edited(arrays: Mapping[str, AnyArray], edits: bytes) -> dict[str, AnyArray]:
    """Change arrays as the bytes say, five for an edit: which array, what is done, where (two bytes), and a value."""
    changed = {name: array.copy() for name, array in arrays.items()}
    names = sorted(changed)
    for at in range(0, len(edits) - 4, 5):
        which, action, high, low, value = edits[at : at + 5]
        name = names[which % len(names)]
        array = changed[name]
        place = (high << 8 | low) % max(array.size, 1)
        if action % 6 == 0 and array.size:
            raw = bytearray(array.tobytes())
            raw[place * array.itemsize + value % array.itemsize] ^= value | 1
            changed[name] = np.frombuffer(raw, array.dtype).reshape(array.shape)
        elif action % 6 == 1 and array.size and array.dtype.kind == "f":
            array.reshape(-1)[place] = SPECIAL[value % len(SPECIAL)]
        elif action % 6 == 2 and array.ndim:
            changed[name] = array[:place]
        elif action % 6 == 3:
            with suppress(ValueError, OverflowError):  # a text that is no number
                changed[name] = array.astype((np.float32, np.int64, np.uint8, "U4", "S8", np.bool_)[value % 6])
        elif action % 6 == 4:
            changed[name] = array.reshape(-1) if value % 2 else array[np.newaxis]
        else:
            changed[name] = np.zeros(0)
    return changed
