"""What `adaptive-spec doctor` reports of an installed SGLang. Run in its own process: SGLang's import is slow and prints.

python -m adaptive_spec.engines.sglang.doctor_checks        one JSON line: [[state, subject, text], ...]
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata

from adaptive_spec.engines.sglang.hook_targets import DSPARK_NEEDED, DSPARK_TARGETS, TARGETS, TESTED_VERSIONS, missing_targets
from adaptive_spec.engines.sglang.plugin_settings import plugin_settings
from adaptive_spec.errors import BadInput

GROUP = "sglang.srt.plugins"
ENTRY_POINT = "adaptive_spec"


def findings() -> list[tuple[str, str, str]]:
    """(state, subject, text) as `doctor.Finding` has them."""
    found: list[tuple[str, str, str]] = []
    version = metadata.version("sglang")
    tested = ", ".join(TESTED_VERSIONS)
    if version in TESTED_VERSIONS:
        found.append(("ok", "sglang", f"{version}, tested"))
    else:
        text = f"{version} is not one of the tested versions ({tested}): the plugin does not attach; see docs/sglang.md"
        found.append(("note", "sglang", text))
    missing = missing_targets()
    for text in missing:
        found.append(("note", "sglang hooks", f"{text}: the plugin does not attach"))
    if not missing:
        found.append(("ok", "sglang hooks", f"all {len(TARGETS)} targets found"))
    missing = missing_targets(DSPARK_TARGETS, DSPARK_NEEDED)
    for text in missing:
        found.append(("note", "sglang dspark hooks", f"{text}: the plugin does not attach to DSPARK servers"))
    if not missing:
        found.append(("ok", "sglang dspark hooks", f"all {len(DSPARK_TARGETS)} targets found"))
    found.append(_entry_point())
    try:
        settings = plugin_settings(os.environ)
    except BadInput as error:
        found.append(("broken", "sglang plugin", str(error)))
    else:
        words = "inert: ADAPTIVE_SPEC_MODE is not set here" if settings.mode == "off" else f"mode {settings.mode}"
        found.append(("ok", "sglang plugin", words))
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
