"""The embedded engine's process with a `TimedTap`: `python -m benchmarks.soak_worker TIMES [arguments of the engine]`.

The file TIMES is written when the engine ends: a thread that wrote it meanwhile would be one more thing that delays a call.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adaptive_spec.engine_side.tap import EngineTap
from adaptive_spec.engines.embedded import worker
from benchmarks.timed_tap import TimedTap


def main() -> None:
    path = Path(sys.argv.pop(1))

    class Tap(TimedTap):
        def close(self) -> None:
            super().close()
            self.save(path)

    setattr(worker, EngineTap.__name__, Tap)  # the one name by which the engine's main opens its tap
    worker.main()


if __name__ == "__main__":
    main()
