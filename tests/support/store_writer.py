"""A replica that only writes profiles: python -m tests.support.store_writer URL COUNT SEED. Run by test_profile_store.py."""

from __future__ import annotations

import sys
import time

import numpy as np

from adaptive_spec.storage.profile import Profile
from adaptive_spec.storage.profile_store import ProfileStore, StoredProfile
from tests.support.wire import engine


def numbered(number: int) -> Profile:
    """A profile that is whole only if all its arrays say the same."""
    return Profile({"a": np.full(500, number), "head.b": np.full((3, 3), number)}, {"c": np.full(2000, number)})


def number_of(stored: StoredProfile | None) -> int | None:
    """The number of a `numbered` profile that was loaded, None for no profile. Fails when its arrays differ."""
    if stored is None:
        return None
    found = {int(v) for arrays in stored.profile for array in arrays.values() for v in array.ravel()}
    assert len(found) == 1, "a mixture of two"
    return found.pop()


def accept_any(profile: Profile) -> None:
    """The `usable` check of `ProfileStore.load` that refuses nothing."""


def main() -> None:
    store = ProfileStore(sys.argv[1])
    for index in range(int(sys.argv[2])):
        store.save(engine(), numbered(1000 * int(sys.argv[3]) + index), time.time())


if __name__ == "__main__":
    main()
