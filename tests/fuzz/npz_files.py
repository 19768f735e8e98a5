"""Archives: profiles, checkpoints and traces. `models.py` has what is restored from them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np

from adaptive_spec.domain.arrays import AnyArray
from adaptive_spec.storage.archive import ArchiveError, archive_bytes, parse_archive
from adaptive_spec.storage.signature import SignatureError, check_signature, signed
from tests.fuzz.target import Target, one_line_of

KEY = b"k" * 32


class NpzFiles(Target):
    """The first byte: bit 0 whether a signature is expected. The rest is the file."""

    name = "npz"
    longest = 4096

    def seeds(self) -> dict[str, bytes]:
        small = archive_bytes("latency_model", {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(0, np.uint8)}, {"engine": "e"})
        plain = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(small)) as packed, zipfile.ZipFile(plain, "w") as stored:
            for entry in packed.infolist():
                stored.writestr(entry.filename, packed.read(entry))
        return {"deflated": b"\0" + small, "stored": b"\0" + plain.getvalue(), "signed": b"\1" + signed(small, "n", KEY)}

    def run(self, data: bytes) -> str:
        return self._signed(data[1:]) if data[:1] and data[0] & 1 else self._file(data[1:])

    def _file(self, data: bytes) -> str:
        try:
            archive = parse_archive(data, "latency_model", "n")
        except ArchiveError as error:
            return one_line_of(error)
        again = parse_archive(archive_bytes("latency_model", archive.arrays, archive.meta), "latency_model", "n")
        same_arrays(archive.arrays, again.arrays)
        assert again.meta == archive.meta
        return ""

    def _signed(self, data: bytes) -> str:
        try:
            check_signature(data, "n", KEY)
        except SignatureError as error:
            return one_line_of(error)
        return self._file(data)


def same_arrays(left: Mapping[str, AnyArray], right: Mapping[str, AnyArray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.shape, array.tobytes()) == (right[name].dtype, right[name].shape, right[name].tobytes())
