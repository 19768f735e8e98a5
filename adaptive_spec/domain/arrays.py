"""Array types by what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
KTable = NDArray[np.uint8]
"""K by batch size and context bucket, [max_batch + 1, contexts]."""
Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name, as an archive holds them."""
