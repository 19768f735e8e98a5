"""What a server is called, and what else decides its step times and acceptance: see `EngineInfo.model` and `fingerprint`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaptive_spec.domain.engine_info import fingerprint_of, hash_of, shortened
from adaptive_spec.regular_file import read_regular_file

LARGEST_CONFIG_BYTES = 4 << 20
HUB_PREFIX = "models--"
_NO_IDENTITY = ("_name_or_path", "transformers_version", "_commit_hash")
"""Keys of a model's configuration that change with the place it is loaded from, or the library that loads it."""


def known(source: object, names: Iterable[str]) -> dict[str, Any]:
    """Return attributes of a server's arguments by name; None for one that a release lacks."""
    return {name: getattr(source, name, None) for name in names}


def model_name(path: str, served: object = None) -> str:
    """Return the name of a model: the one it is served by where the operator gave one, else from its path.

    served: text, or a list of it. A server without such a name serves its path, which is not taken. Of a snapshot of the hub's
    cache (`models--ORG--NAME/snapshots/HASH`) the name is ORG/NAME. Any other path gives its last part.
    """
    first = served[0] if isinstance(served, (list, tuple)) and served else served
    if isinstance(first, str) and first.strip() and first != path:
        return shortened(first)
    parts = [part for part in path.split("/") if part]
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith(HUB_PREFIX):
        return shortened(parts[-3].removeprefix(HUB_PREFIX).replace("--", "/"))
    return shortened(parts[-1]) if parts else "unknown"


def config_hash(path: object, loaded: object = None) -> str | None:
    """Return a hash of a model's configuration; None where there is neither. Raises nothing.

    path: of the model's folder. loaded: the configuration as the server holds it, with `to_dict`; preferred, since a name of the
    hub is no folder.
    """
    try:
        content: Any = loaded.to_dict() if loaded is not None else None  # type: ignore[attr-defined]
        if not isinstance(content, Mapping):
            content = json.loads(read_regular_file(Path(str(path)) / "config.json", LARGEST_CONFIG_BYTES, follow_links=True).data)
        return hash_of({key: value for key, value in content.items() if key not in _NO_IDENTITY})
    except Exception:  # whatever a server's object or a file holds: the other fields remain
        return None


def fingerprint(
    *, engine: str, target: str | None, draft: str | None, target_path: str, draft_path: object, **options: object
) -> tuple[tuple[str, str], ...]:
    """Return the fingerprint. engine: with its version. target, draft: `config_hash`; without one the last part of the path.

    options: what the server was started with, by name; those that are None are left out.
    """
    fields = {name: value for name, value in options.items() if isinstance(value, (str, int, float, bool))}
    fields |= {"engine": engine, "target": target or model_name(target_path)}
    if draft_path or draft:
        fields["draft"] = draft or model_name(str(draft_path))
    return fingerprint_of(fields)
