"""Files that commands write where an option says: checked before the work, written after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaptive_spec.errors import BadInput
from adaptive_spec.storage.archive import write_atomically


def check_folder_of(path: Path, field: str) -> None:
    """Raise BadInput unless the folder of an output file exists. field: the option, such as "--json"."""
    if not path.absolute().parent.is_dir():
        raise BadInput(f"{field}: '{path}': no such folder '{path.parent}'")


def write_json(path: Path, document: dict[str, Any], field: str) -> None:
    """Write a JSON document. Raises BadInput when that fails."""
    try:
        write_atomically(path.absolute(), (json.dumps(document, indent=1) + "\n").encode())
    except OSError as error:
        raise BadInput(f"{field}: '{path}': cannot be written: {error.strerror or error}") from error
