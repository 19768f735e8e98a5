"""What `adaptive-spec doctor` reports of an installed vLLM. Nothing of vLLM is imported: its source is read.

python -m adaptive_spec.engines.vllm.doctor_checks        one JSON line: [[state, subject, text], ...]
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata

from adaptive_spec.engines.common.plugin_settings import plugin_settings
from adaptive_spec.engines.releases import version_refusal
from adaptive_spec.engines.vllm import contract
from adaptive_spec.engines.vllm.plugin import WAY_OUT, lacking, vllm_version
from adaptive_spec.errors import BadInput

GROUP = "vllm.general_plugins"
ENTRY_POINT = "adaptive_spec"


def findings() -> list[tuple[str, str, str]]:
    """(state, subject, text) as `doctor.Finding` has them."""
    found: list[tuple[str, str, str]] = []
    version = vllm_version()
    reason = version_refusal("vLLM", version, contract.SUPPORTED_RELEASES, WAY_OUT)
    if reason is None:
        found.append(("ok", "vllm", f"{version}, supported"))
    else:
        found.append(("note", "vllm", f"{reason}: the plugin does not attach; see docs/vllm.md"))
    missing = {group: text for group in contract.GROUPS if (text := lacking((group,)))}
    found.extend(("note", "vllm hooks", f"{group}: vLLM lacks {text}") for group, text in missing.items())
    if not missing:
        found.append(("ok", "vllm hooks", f"all that is needed was found: {', '.join(contract.GROUPS)}"))
    found.append(_entry_point())
    try:
        settings = plugin_settings(os.environ)
    except BadInput as error:
        found.append(("broken", "vllm plugin", str(error)))
    else:
        words = "inert: ADAPTIVE_SPEC_MODE is not set here" if settings.mode == "off" else f"mode {settings.mode}"
        found.append(("ok", "vllm plugin", words))
    return found


def _entry_point() -> tuple[str, str, str]:
    allowed = os.environ.get("VLLM_PLUGINS")
    if ENTRY_POINT not in {entry.name for entry in metadata.entry_points(group=GROUP)}:
        return ("broken", "vllm entry point", f"{GROUP} has no {ENTRY_POINT}: install adaptive-spec again in this environment")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        return ("note", "vllm entry point", f"VLLM_PLUGINS is {allowed!r}: the plugin is not loaded; add {ENTRY_POINT}")
    return ("ok", "vllm entry point", f"{ENTRY_POINT} is in {GROUP}")


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(findings()) + "\n")
