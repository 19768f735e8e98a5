"""The client of the sidecar: what it sends, and one line for each failure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_spec.client.sidecar import ADDRESS_NAME, TOKEN_NAME, ControlClient, running_sidecar
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import RoleLock
from tests.client.canned_server import CannedServer
from tests.support.processes import assert_one_line, run_cli


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
        (200, b"[" * 100_000, "no sidecar answers: "),
        (409, b"[" * 100_000, "refused: status 409"),
        (409, b'{"error": "\\u001b[31mred\\nnext"}', "refused: ?[31mred?next"),
    ],
)
def test_other_answers_are_one_line(server: CannedServer, status: int, body: bytes, words: str) -> None:
    server.answers["POST /control"] = (status, body)
    with pytest.raises(BadInput) as error:
        ControlClient(server.url).send("pause")
    assert str(error.value).startswith(f"{server.url}: {words}")
    assert "\n" not in str(error.value)


def test_an_answer_cannot_write_to_the_terminal_as_it_likes(server: CannedServer) -> None:
    server.answers["GET /status.json"] = (200, b'{"mode": "\\u001b]0;x\\u0007", "a": [{"\\u009b": "\\u202e"}], "n": 1}')
    assert ControlClient(server.url).status() == {"mode": "?]0;x?", "a": [{"?": "?"}], "n": 1}


def test_an_answer_without_end_is_not_kept(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_spec.client.sidecar.LARGEST_ANSWER", 1000)
    server.answers["GET /status.json"] = (200, b'{"mode": "' + b"x" * 1000 + b'"}')
    with pytest.raises(BadInput, match="no sidecar answers: the answer is longer than 1000 bytes"):
        ControlClient(server.url).status()


@pytest.mark.parametrize("arguments", [("status",), ("explain",), ("pause",)])
@pytest.mark.parametrize("body", [b"{}", b'{"mode": 1, "k_by_batch_size": {"x": []}, "plans": 5, "k": 1, "k_before": 2}'])
def test_the_answer_of_something_else_is_one_line(server: CannedServer, arguments: tuple[str, ...], body: bytes) -> None:
    server.answers = dict.fromkeys(("GET /status.json", "GET /explain.json", "POST /control"), (200, body))
    result = run_cli("ctl", *arguments, "--url", server.url)
    if arguments == ("pause",) and b"mode" in body:
        assert result.stdout == "pause: done, mode 1\n"
    else:
        assert_one_line(result, f"{server.url}: the answer is not one of a sidecar of this version")


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@127.0.0.1:1", "http://127.0.0.1:1/?sig=secret", "http://127.0.0.1:1/#secret", "http://x:99999",
        "http://x:y", "http://[::1", "http://", "http://a b", "http://a\nb", "http://\udcff", "http://a\x1b[31m",
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_used_is_one_line_without_its_secrets(url: str) -> None:
    with pytest.raises(BadInput, match=r"^--url: must be like http://HOST:PORT, got '") as error:
        ControlClient(url)
    assert "secret" not in str(error.value)
    assert str(error.value).isprintable()


def test_a_token_that_cannot_be_sent_is_none(server: CannedServer, tmp_path: Path) -> None:
    """The HTTP library would show it in its error."""
    sidecar = _runs_in(tmp_path, server.url)
    for text in ("secret\nsecret", "s\u20accret", "s\0cret", "\n"):
        (tmp_path / TOKEN_NAME).write_text(text)
        ControlClient.find(tmp_path, None, None).send("pause")
    assert {seen.headers["Authorization"] for seen in server.requests} == {"Bearer "}
    sidecar.release()


def test_no_answer_is_one_line() -> None:
    with pytest.raises(BadInput, match=r"^http://127\.0\.0\.1:1: no sidecar answers: Connection refused$"):
        ControlClient("http://127.0.0.1:1").status()


def test_a_sidecar_is_found_by_its_runtime_directory(server: CannedServer, tmp_path: Path) -> None:
    sidecar = _runs_in(tmp_path, server.url)
    ControlClient.find(tmp_path, None, None).send("pause")
    (tmp_path / "own").write_text("own")
    (tmp_path / "own").chmod(0o600)
    ControlClient.find(tmp_path, None, tmp_path / "own").send("pause")
    ControlClient.find(tmp_path / "none", server.url, None).send("pause")
    assert [seen.headers["Authorization"] for seen in server.requests] == ["Bearer kept", "Bearer own", "Bearer "]
    sidecar.release()


def _runs_in(folder: Path, url: str) -> RoleLock:
    """What a sidecar leaves in its runtime directory."""
    (folder / ADDRESS_NAME).write_text(json.dumps({"url": url, "pid": os.getpid()}))
    (folder / TOKEN_NAME).write_text("kept\n")
    (folder / TOKEN_NAME).chmod(0o600)
    return RoleLock.acquire(folder, "sidecar")


def test_the_local_token_goes_to_the_running_sidecar_only(server: CannedServer, tmp_path: Path) -> None:
    """Not to another address, and not to the address of a sidecar that has ended, whose port another program may have."""
    sidecar = _runs_in(tmp_path, server.url)
    with CannedServer({"POST /control": (200, b"{}")}).running() as other:
        ControlClient.find(tmp_path, other.url, None).send("pause")
        assert [seen.headers["Authorization"] for seen in other.requests] == ["Bearer "]
    ControlClient.find(tmp_path, server.url + "/", None).send("pause")
    sidecar.release()
    ControlClient.find(tmp_path, server.url, None).send("pause")
    assert [seen.headers["Authorization"] for seen in server.requests] == ["Bearer kept", "Bearer "]
    with pytest.raises(BadInput, match="no sidecar runs there"):
        ControlClient.find(tmp_path, None, None)


def test_an_address_that_another_sidecar_left_is_not_used(server: CannedServer, tmp_path: Path) -> None:
    sidecar = _runs_in(tmp_path, server.url)
    (tmp_path / ADDRESS_NAME).write_text(json.dumps({"url": server.url, "pid": os.getpid() + 1}))
    assert running_sidecar(tmp_path) is None
    sidecar.release()


@pytest.mark.parametrize("what", ["mode of the folder", "link to the folder", "mode of the token", "link to the token"])
def test_what_others_can_use_is_not_used(server: CannedServer, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    sidecar = _runs_in(folder, server.url)
    if what == "mode of the folder":
        folder.chmod(0o770)
    elif what == "link to the folder":
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    elif what == "mode of the token":
        (folder / TOKEN_NAME).chmod(0o640)
    else:
        (folder / TOKEN_NAME).rename(tmp_path / "token")
        (folder / TOKEN_NAME).symlink_to(tmp_path / "token")
    ControlClient.find(folder, server.url, None).send("pause")
    assert [seen.headers["Authorization"] for seen in server.requests] == ["Bearer "]
    sidecar.release()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with CannedServer({}).running() as other, CannedServer({"POST /control": (status, b"")}).running() as server:
        server.headers = {"Location": other.url + "/control"}
        with pytest.raises(BadInput, match=f"refused: status {status}"):
            ControlClient(server.url, "secret").send("pause")
        assert not other.requests


def test_what_cannot_be_found_is_one_line(tmp_path: Path) -> None:
    for text in (None, "", "[]", "{}"):
        if text is not None:
            (tmp_path / ADDRESS_NAME).write_text(text)
        with pytest.raises(BadInput, match=r"^--runtime-dir: '.*': no sidecar runs there; give --url$"):
            ControlClient.find(tmp_path, None, None)
    with pytest.raises(BadInput, match=r"^--token-file: '.*none': cannot be read$"):
        ControlClient.find(tmp_path, "http://127.0.0.1:1", tmp_path / "none")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o664)
    with pytest.raises(BadInput, match=r"^--token-file: '.*token': must not be writable by others or its group, got mode 0664$"):
        ControlClient.find(tmp_path, "http://127.0.0.1:1", tmp_path / "token")
    with pytest.raises(BadInput, match=r"^--url: must begin with http:// or https://, got 'ftp://x'$"):
        ControlClient("ftp://x")
