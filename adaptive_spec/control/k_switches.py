"""Why K changed from one step to the next, by the flags of their records."""

from __future__ import annotations

from typing import Literal

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepFlag, StepRecord

Reason = Literal["table", "step_choice", "trial", "allowed", "fallback"]
REASONS: tuple[Reason, ...] = ("table", "step_choice", "trial", "allowed", "fallback")


def switch_reason(before: StepRecord | None, record: StepRecord, info: EngineInfo) -> Reason | None:
    """Why K of `record` differs from that of the step before it; None: it does not, or the engine was restarted.

    fallback: the engine left or took up the policy. trial: a trial began or ended. allowed: the K before is not allowed at this
    batch size. step_choice: the step choice left the table's K or came back to it. table: the policy's table has another K, for
    another batch size or in another version.
    """
    if before is None or record.step <= before.step or record.k == before.k:
        return None
    flags = record.flags | before.flags
    if flags & StepFlag.FALLBACK or not record.policy_version or not before.policy_version:
        return "fallback"
    if flags & StepFlag.TRIAL:
        return "trial"
    if record.flags & StepFlag.LIMITED or before.k not in info.allowed_k(record.batch_size):
        return "allowed"
    return "step_choice" if flags & StepFlag.STEP_CHOICE else "table"
