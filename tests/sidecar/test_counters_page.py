from __future__ import annotations

from pathlib import Path

import pytest

from adaptive_spec.sidecar.counters_page import SLOT_BYTES, SLOTS_OFFSET, CountersPage, KeptCounters


def _kept(position: int) -> KeptCounters:
    return KeptCounters(("m", "cpu", 1), 2**63 + position, position, 3, {"steps": position})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counters.page"


def test_the_last_one_saved_is_loaded(path: Path) -> None:
    page = CountersPage(path)
    assert page.load() is None
    for position in range(5):
        page.save(_kept(position))
        assert CountersPage(path).load() == _kept(position)
    again = CountersPage(path)
    again.load()
    again.save(_kept(9))
    assert CountersPage(path).load() == _kept(9)


def test_of_a_write_that_was_cut_short_the_one_before_it_is_loaded(path: Path) -> None:
    page = CountersPage(path)
    page.save(_kept(1))
    page.save(_kept(2))
    whole = path.read_bytes()
    page.save(_kept(3))
    after = path.read_bytes()
    changed = [i for i in range(len(whole)) if whole[i] != after[i]]
    assert min(changed) >= SLOTS_OFFSET + SLOT_BYTES, "the slot of the older content"
    for cut in changed:
        path.write_bytes(after[:cut] + whole[cut:])
        assert CountersPage(path).load() == _kept(2)
        path.write_bytes(whole[:cut] + after[cut:])  # the blocks of a file may reach the disk in any order
        assert CountersPage(path).load() in (_kept(2), _kept(3))


def test_a_deleted_page_is_made_again(path: Path) -> None:
    page = CountersPage(path)
    page.save(_kept(1))
    path.unlink()
    page.save(_kept(2))
    assert CountersPage(path).load() == _kept(2)
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "damaged"),
        (b"nonsense", "damaged"),
        (bytes(300_000), "damaged"),
        (b"ADSPCNTR\x01\0\0\0" + bytes(300_000), "damaged"),
        (b"ADSPCNTR\x02\0\0\0" + bytes(300_000), "foreign"),
        (b"\x7fELF and so on" + bytes(300_000), "foreign"),
    ],
)
def test_what_is_no_page_is_set_aside(path: Path, content: bytes, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    page = CountersPage(path)
    assert page.load() is None
    assert path.with_name(f"counters.page.{kind}-1").read_bytes() == content
    assert "cannot be used" in caplog.text
    page.save(_kept(1))
    assert CountersPage(path).load() == _kept(1)


def test_too_much_is_refused_and_the_last_content_stays(path: Path) -> None:
    page = CountersPage(path)
    page.save(_kept(1))
    with pytest.raises(ValueError, match="at most"):
        page.save(_kept(2)._replace(counters={"steps": "x" * SLOT_BYTES}))
    assert CountersPage(path).load() == _kept(1)
