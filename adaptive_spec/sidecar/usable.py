"""Whether models can be used: restored, fitted, a policy encoded and a snapshot made of them, with a controller of its own.

Whatever is read is checked so before it is used, and whatever is kept before it is written: models that cannot be used would be
carried over every restart, and from one replica to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.storage.profile import Profile
from adaptive_spec.wire.policy_page import encode_policy, payload_bytes


def check_profile(profile: Profile, settings: ControllerSettings, info: EngineInfo) -> None:
    """Raise an exception when a profile cannot be used by this engine."""
    controller = Controller(settings, info)
    controller.restore_profile(profile.latency, profile.calibration)
    _check(controller)
    if controller.models.forecast is None:
        raise ValueError("it has no measurements")


def check_checkpoint(arrays: Mapping[str, NDArray[Any]], settings: ControllerSettings, info: EngineInfo) -> None:
    """Raise an exception when a checkpoint cannot be used by this engine."""
    controller = Controller(settings, info)
    controller.restore(arrays)
    _check(controller)


def _check(controller: Controller) -> None:
    policy = controller.refit(0.0)
    if policy is not None:
        length, info = len(encode_policy(policy)), controller.info
        if length > (most := payload_bytes(info.max_batch, info.max_k)):
            raise ValueError(f"its policy must be at most {most} bytes, got {length}")
    controller.snapshot(0.0)
