"""Errors of a sweep through a server's API; tests/engines/sglang runs one on a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from adaptive_spec.cli.server_sweep import PROMPTS, default_batch_sizes, parse_batch_sizes, read_prompts
from adaptive_spec.client.server import HeldBatch
from adaptive_spec.client.sglang import ServerApi
from adaptive_spec.errors import BadInput


def test_default_sizes_are_doublings_and_the_largest() -> None:
    assert default_batch_sizes(1) == [1]
    assert default_batch_sizes(16) == [1, 2, 4, 8, 16]
    assert default_batch_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert default_batch_sizes(4096)[-1] == 64


def test_sizes_are_parsed() -> None:
    assert parse_batch_sizes("8,1,2,2", 8) == [1, 2, 8]
    for text in ("", "a", "0", "1,9", "1;2"):
        with pytest.raises(BadInput, match=r"--batch-sizes: must be whole numbers in 1\.\.8, like 1,2,4,8, got"):
            parse_batch_sizes(text, 8)


def test_prompts_are_read(tmp_path: Path) -> None:
    assert read_prompts(None) == PROMPTS
    file = tmp_path / "prompts"
    file.write_text("one\n\n two \n")
    assert read_prompts(file) == ["one", "two"]
    file.write_text("\n")
    with pytest.raises(BadInput, match="file is empty"):
        read_prompts(file)
    with pytest.raises(BadInput, match="cannot be read"):
        read_prompts(tmp_path / "none")


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "file:///etc", "http://x:99999", "http://x:y", "http://[::1", "user:secret@x"]
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(BadInput, match=r"^--url: must be like http://HOST:PORT, got [^s]*; without user, password and query$"):
        ServerApi(url)


class _Refusing(BaseHTTPRequestHandler):
    """Answers every request with an error, as an overloaded server does."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(503, {"error": "too many requests"})

    def do_GET(self) -> None:
        self._answer(200, {"max_running_requests": 4})

    def _answer(self, status: int, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_refusal_of_the_server_is_reported(refusing: str) -> None:
    api = ServerApi(refusing)
    assert api.info()["max_running_requests"] == 4
    with pytest.raises(OSError, match="status 503"):
        api.generate("x", 4)
    with HeldBatch(api, 3, ["x"], 4) as batch:
        assert not batch.wait(10.0)
    assert batch.failure is not None
    assert "503" in batch.failure


def test_no_server_answers() -> None:
    with pytest.raises(BadInput, match="must be a running SGLang server"):
        ServerApi("127.0.0.1:1").info()
