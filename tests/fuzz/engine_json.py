"""What an engine says of itself: `engine.json`, the engine information in the ring's header, the address file."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from adaptive_spec.client.sidecar import ADDRESS_NAME, running_sidecar
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.runtime_folder import RoleLock
from adaptive_spec.sidecar.metrics import SnapshotCollector
from adaptive_spec.sidecar.status_document import status_document
from adaptive_spec.sidecar.view import CurrentView, View
from adaptive_spec.wire.engine_report import REPORT_NAME, EngineReport, parse_report, read_report, write_report
from tests.fuzz.target import FileTarget, one_line_of
from tests.support.wire import engine

REPORT = (
    b'{"pid": %d, "engine": "sglang 0.5.23", "state": "attached", "reason": "", "failures": {"verify": 2},'
    b' "counters": {"records": 7}, "level": 3}'
)


class EngineJson(FileTarget):
    """The first byte, modulo 3: a report, engine information, an address file. The rest is the file."""

    name = "engine-json"
    longest = 2048

    def __init__(self) -> None:
        super().__init__()
        self._roles = [RoleLock.acquire(self.folder, "engine"), RoleLock.acquire(self.folder, "sidecar")]

    def seeds(self) -> dict[str, bytes]:
        info = engine().to_json()
        named = replace(engine(), model="../../x" * 20, fingerprint=(("dtype", "bfloat16"), ("q", "none"))).to_json()
        return {
            "report": b"\0" + REPORT % os.getpid(), "info": b"\1" + info, "named": b"\1" + named,
            "address": b'\2{"url": "http://127.0.0.1:9477", "pid": 1}', "deep": b"\0" + b"[" * 1500,
            "infinite": b'\0{"pid": 1e999}',
            "huge": b'\0{"pid": 1, "engine": "e", "state": "attached", "reason": "", "failures": {}, "counters": {"a": 1'
            + b"0" * 400 + b"}}", "surrogate": b'\0{"pid": 1, "engine": "\\ud800", "state": "attached"}',
            "nan": b'\1{"tp": NaN}', "k": info.replace(b'"launch_k": 4', b'"launch_k": 99').join((b"\1", b"")),
        }  # fmt: skip

    def run(self, data: bytes) -> str:
        kind, content = (data[0] % 3 if data else 0), data[1:]
        return (self._report, self._info, self._address)[kind](content)

    def _report(self, content: bytes) -> str:
        _write(self.folder / REPORT_NAME, content)
        read = read_report(self.folder)  # of any content: never an exception
        try:
            report = parse_report(content)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            assert read is None
            return repr(error)
        assert read is None or read == report
        write_report(self.folder, replace(report, pid=os.getpid()))
        assert read_report(self.folder) == replace(report, pid=os.getpid())
        _shown(None, report)
        return ""

    def _info(self, content: bytes) -> str:
        try:
            info = EngineInfo.from_json(content)
        except ValueError as error:
            return one_line_of(error)
        assert EngineInfo.from_json(info.to_json()) == info
        name = info.profile_name
        assert name not in (".", "..")
        assert "/" not in name
        assert len(name.encode()) <= 255
        assert info.allowed_mask().any(axis=1).all()
        assert 1 <= info.digest < 2**64
        _shown(info, None)
        return ""

    def _address(self, content: bytes) -> str:
        _write(self.folder / ADDRESS_NAME, content)
        url = running_sidecar(self.folder)
        return "no address" if url is None else ""

    def close(self) -> None:
        for role in self._roles:
            role.release()
        super().close()


def _shown(info: EngineInfo | None, report: EngineReport | None) -> None:
    """All that the sidecar shows of it can be made."""
    view = CurrentView(0.0)
    view.view = View(time.monotonic(), None, info, report=report)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(view))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]  # prometheus_client leaves it out
    assert text.endswith(b"# EOF\n")
    assert status_document(view.view, 0.0, 1.0)


def _write(path: Path, content: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
