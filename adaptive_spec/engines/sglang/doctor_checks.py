"""What `adaptive-spec doctor` reports of an installed SGLang. Run in its own process: SGLang's import is slow and prints.

python -m adaptive_spec.engines.sglang.doctor_checks        one JSON line: [[state, subject, text], ...]
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata

from adaptive_spec.engines.common.plugin_settings import plugin_settings
from adaptive_spec.engines.releases import version_refusal
from adaptive_spec.engines.sglang import contract
from adaptive_spec.engines.sglang.plugin import WAY_OUT, lacking
from adaptive_spec.errors import BadInput

GROUP = "sglang.srt.plugins"
ENTRY_POINT = "adaptive_spec"


def findings() -> list[tuple[str, str, str]]:
    """(state, subject, text) as `doctor.Finding` has them."""
    found: list[tuple[str, str, str]] = []
    version = metadata.version("sglang")
    reason = version_refusal("SGLang", version, contract.SUPPORTED_RELEASES, WAY_OUT)
    if reason is None:
        found.append(("ok", "sglang", f"{version}, supported"))
    else:
        found.append(("note", "sglang", f"{reason}: the plugin does not attach; see docs/sglang.md"))
    found.extend(_hooks())
    found.append(_entry_point())
    try:
        settings = plugin_settings(os.environ)
    except BadInput as error:
        found.append(("broken", "sglang plugin", str(error)))
    else:
        words = "inert: ADAPTIVE_SPEC_MODE is not set here" if settings.mode == "off" else f"mode {settings.mode}"
        found.append(("ok", "sglang plugin", words))
    return found


def _hooks() -> list[tuple[str, str, str]]:
    """One finding per group of the contract that is not met, one for each algorithm whose groups all are."""
    found: list[tuple[str, str, str]] = []
    for subject, groups in (("sglang hooks", contract.EAGLE_GROUPS), ("sglang dspark hooks", (contract.DSPARK,))):
        missing = {group: text for group in groups if (text := lacking((group,)))}
        found.extend(("note", subject, f"{group}: SGLang lacks {text}") for group, text in missing.items())
        if not missing:
            found.append(("ok", subject, f"all that is needed was found: {', '.join(groups)}"))
    return found


def _entry_point() -> tuple[str, str, str]:
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if ENTRY_POINT not in {entry.name for entry in metadata.entry_points(group=GROUP)}:
        return ("broken", "sglang entry point", f"{GROUP} has no {ENTRY_POINT}: install adaptive-spec again in this environment")
    if allowed and ENTRY_POINT not in {name.strip() for name in allowed.split(",")}:
        return ("note", "sglang entry point", f"SGLANG_PLUGINS is {allowed!r}: the plugin is not loaded; add {ENTRY_POINT}")
    return ("ok", "sglang entry point", f"{ENTRY_POINT} is in {GROUP}")


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(findings()) + "\n")
