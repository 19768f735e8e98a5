"""A profile of an engine with another fingerprint is not taken, and the message names the field."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.errors import BadInput
from adaptive_spec.storage.profile import (
    Profile,
    ProfileError,
    check_writable,
    difference_of,
    identity_meta,
    load_profile,
    save_profile,
)
from tests.support.wire import engine

INFO = replace(engine(), fingerprint=(("dtype", "bfloat16"), ("quantization", "fp8")))
PROFILE = Profile({"a": np.ones(2)}, {"b": np.ones(3)})


def test_the_same_engine_after_a_restart_takes_it(tmp_path: Path) -> None:
    save_profile(tmp_path / "p", INFO, PROFILE, {})
    assert load_profile(tmp_path / "p", replace(INFO, pid=1)) is not None


@pytest.mark.parametrize(
    ("fingerprint", "words"),
    [
        ((("dtype", "bfloat16"), ("quantization", "awq")), "quantization: must be awq, got fp8"),
        ((("dtype", "float16"), ("quantization", "fp8")), "dtype: must be float16, got bfloat16"),
        ((("dtype", "bfloat16"),), "quantization: must be None, got fp8"),
        ((("dtype", "bfloat16"), ("draft", "x"), ("quantization", "fp8")), "draft: must be x, got None"),
        ((), "dtype: must be None, got bfloat16"),
    ],
)
def test_another_fingerprint_is_refused_by_field(tmp_path: Path, fingerprint: tuple[tuple[str, str], ...], words: str) -> None:
    save_profile(tmp_path / "p", INFO, PROFILE, {})
    with pytest.raises(ProfileError, match=f"is of another engine: {words}$"):
        load_profile(tmp_path / "p", replace(INFO, fingerprint=fingerprint))


@pytest.mark.parametrize("stated", [None, 3, [], "x", {"dtype": "a\nb" * 500}, {"dtype": {"deep": 1}}])
def test_a_damaged_fingerprint_is_one_short_line(stated: object) -> None:
    difference = difference_of({**identity_meta(INFO), "fingerprint": stated}, INFO)
    assert difference
    assert difference.isprintable()
    assert len(difference) < 400


def test_a_profile_without_a_fingerprint_is_of_an_engine_without_one() -> None:
    plain = engine()
    meta = {"engine": identity_meta(plain)["engine"]}
    assert difference_of(meta, plain) == ""
    assert difference_of(meta, INFO) == "dtype: must be bfloat16, got None"


def test_a_full_profile_disk_does_not_keep_a_sidecar_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = (tmp_path / "m_g_tp1" / f".policy.json.{name}.tmp" for name in ("x", "y"))
    old.parent.mkdir()
    old.touch()
    young.touch()
    os.utime(old, (1.0, 1.0))

    def failing(number: int) -> None:
        def fail(**_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(tempfile, "TemporaryFile", fail)

    failing(errno.ENOSPC)
    check_writable(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)
    failing(errno.EROFS)
    with pytest.raises(BadInput, match=r"profile_dir: '.*': Read-only file system"):
        check_writable(tmp_path)
