"""A replica that only writes profiles: python -m tests.store_writer URL COUNT SEED. Run by test_profile_store.py."""

from __future__ import annotations

import sys
import time

from adaptive_spec.profile_store import ProfileStore
from tests.test_profile_store import numbered
from tests.wire import engine


def main() -> None:
    store = ProfileStore(sys.argv[1])
    for index in range(int(sys.argv[2])):
        store.save(engine(), numbered(1000 * int(sys.argv[3]) + index), time.time())


if __name__ == "__main__":
    main()
