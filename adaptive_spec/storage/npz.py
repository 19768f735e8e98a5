"""Reads npz files of unknown origin: no pickle, and no more memory than was agreed.

Everything is checked before memory is taken for it: the length of the zip directory, the inflated sizes that it states (zipfile
inflates no more of an entry than that), and the size that the header of an array states against the bytes that are there.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile

import numpy as np

from adaptive_spec.domain.arrays import AnyArray

MOST_ENTRIES = 512
"""A profile has about 60 arrays."""
LARGEST_DIRECTORY = MOST_ENTRIES * 256
"""Bytes. An entry of the directory is 46 bytes, a name and its extra fields; zipfile reads the whole directory at once."""
_PLAIN_KINDS = "biufSU"
"""Of numpy: no complex numbers, which lose their imaginary part with a warning where they are used."""
_END = struct.Struct("<4s4H2LH")
"""The end record of a zip file: signature, four counts, size and place of the directory, length of the comment."""


def read_npz(data: bytes, largest_inflated: int) -> dict[str, AnyArray]:
    """Return the arrays by name. largest_inflated: bytes of all arrays together.

    Raises ValueError for what is beyond a bound, and any other exception that zipfile, zlib and numpy raise for damaged data.
    """
    _check_directory(data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = file.infolist()
        if len(entries) > MOST_ENTRIES:
            raise ValueError(f"must have at most {MOST_ENTRIES} entries, got {len(entries)}")
        inflated = sum(entry.file_size for entry in entries)
        if inflated > largest_inflated:
            raise ValueError(f"must be at most {largest_inflated} bytes when inflated, got {inflated}")
        arrays: dict[str, AnyArray] = {}
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError("the same entry occurs twice")
            # zlib inflates by pieces, as zipfile asks for; its bz2 and lzma inflate a whole block, whatever was asked for.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"compression method must be stored or deflated, got {entry.compress_type}")
            with file.open(entry) as stream:
                arrays[name] = _array(stream.read(entry.file_size + 1))
    return arrays


def _check_directory(data: bytes) -> None:
    """Check the end record: zipfile reads as much as it states. Raises ValueError."""
    end = data.rfind(b"PK\x05\x06")
    if end < 0 or len(data) - end < _END.size:
        raise ValueError("not a zip file")
    *_, size, _, comment = _END.unpack_from(data, end)
    if end + _END.size + comment != len(data) or data[end - 20 : end - 16] == b"PK\x06\x07":
        raise ValueError("not a zip file, or one of more than 4 GiB")
    if size > LARGEST_DIRECTORY:
        raise ValueError(f"zip directory must be at most {LARGEST_DIRECTORY} bytes long, got {size}")


def _array(data: bytes) -> AnyArray:
    """Read one array of the npy format. Raises ValueError."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"npy version must be 1.0 or 2.0, got {version[0]}.{version[1]}")
    if dtype.kind not in _PLAIN_KINDS or dtype.itemsize == 0 or dtype.subdtype is not None:
        raise ValueError(f"dtype must be a real number, a boolean or text, got {dtype.kind!r}")
    there = len(data) - stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != there:
        raise ValueError(f"an array of {there} bytes states another size")
    # An empty array may have a huge other dimension, and a copy of a row of it would be huge.
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize > max(len(data), 1 << 20):
        raise ValueError("an empty array has a dimension that is too long")
    stream.seek(0)
    array: AnyArray = np.lib.format.read_array(stream, allow_pickle=False)
    return array
