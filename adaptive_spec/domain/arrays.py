"""Array types by what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
"""Single precision: what crosses the process boundary (confidences, seconds and probabilities of a policy)."""
AnyFloats = NDArray[np.floating]
"""Floats of either precision."""
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Lengths = NDArray[np.uint8]
"""Draft tokens by request, [rows]: verify_len, accept_len."""
KTable = NDArray[np.uint8]
"""K by batch size and context bucket, [max_batch + 1, contexts]."""
RequestIds = NDArray[np.uint32]
"""The engine's own number of each request, [rows]."""
AnyArray = NDArray[Any]
Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name, as an archive holds them."""
