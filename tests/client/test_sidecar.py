"""The client of the sidecar: what it sends, and one line for each failure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_spec.client.sidecar import ADDRESS_NAME, TOKEN_NAME, ControlClient
from adaptive_spec.errors import BadInput
from tests.client.canned_server import CannedServer


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with CannedServer(
        {"GET /status.json": (200, b'{"mode": "active"}'), "POST /control": (200, b'{"ok": true}')}
    ).running() as made:
        yield made


def test_status_is_read_without_the_token(server: CannedServer) -> None:
    assert ControlClient(server.url, "secret").status() == {"mode": "active"}
    assert "Authorization" not in server.requests[0].headers


def test_commands_are_sent_with_the_token(server: CannedServer) -> None:
    client = ControlClient(server.url + "/", "secret")
    assert client.send("pause") == client.send("pin", 0) == {"ok": True}
    assert [json.loads(seen.body) for seen in server.requests] == [{"command": "pause"}, {"command": "pin", "k": 0}]
    assert {seen.headers["Authorization"] for seen in server.requests} == {"Bearer secret"}


def test_a_proxy_of_the_environment_is_not_used(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert ControlClient(server.url).status() == {"mode": "active"}


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (409, b'{"error": "not now"}', "refused: not now"),
        (500, b"<html>", "refused: status 500"),
        (200, b"<html>", "no sidecar answers"),
        (200, b"[]", "no sidecar answers: the answer is not a JSON object"),
    ],
)
def test_other_answers_are_one_line(server: CannedServer, status: int, body: bytes, words: str) -> None:
    server.answers["POST /control"] = (status, body)
    with pytest.raises(BadInput) as error:
        ControlClient(server.url).send("pause")
    assert str(error.value).startswith(f"{server.url}: {words}")
    assert "\n" not in str(error.value)


def test_no_answer_is_one_line() -> None:
    with pytest.raises(BadInput, match=r"^http://127\.0\.0\.1:1: no sidecar answers: Connection refused$"):
        ControlClient("http://127.0.0.1:1").status()


def test_a_sidecar_is_found_by_its_runtime_directory(server: CannedServer, tmp_path: Path) -> None:
    (tmp_path / ADDRESS_NAME).write_text(json.dumps({"url": server.url}))
    (tmp_path / TOKEN_NAME).write_text("kept\n")
    ControlClient.find(tmp_path, None, None).send("pause")
    (tmp_path / "own").write_text("own")
    ControlClient.find(tmp_path, None, tmp_path / "own").send("pause")
    ControlClient.find(tmp_path / "none", server.url, None).send("pause")
    assert [seen.headers["Authorization"] for seen in server.requests] == ["Bearer kept", "Bearer own", "Bearer "]


def test_what_cannot_be_found_is_one_line(tmp_path: Path) -> None:
    for text in (None, "", "[]", "{}"):
        if text is not None:
            (tmp_path / ADDRESS_NAME).write_text(text)
        with pytest.raises(BadInput, match=r"^--runtime-dir: '.*': no sidecar runs there; give --url$"):
            ControlClient.find(tmp_path, None, None)
    with pytest.raises(BadInput, match=r"^--token-file: '.*none': cannot be read$"):
        ControlClient.find(tmp_path, "http://127.0.0.1:1", tmp_path / "none")
    with pytest.raises(BadInput, match=r"^--url: must begin with http:// or https://, got 'ftp://x'$"):
        ControlClient("ftp://x")
