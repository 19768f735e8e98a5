"""The name of the processor a PyTorch engine computes on."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Short name of the processor that computes: "AMD EPYC 9654", "NVIDIA H200", ..."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        name = found.group(1)
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*$|\d+-Core|\bProcessor\b", " ", name)
    return " ".join(name.split()) or "cpu"
