"""TLS of a sidecar process: who is let in, what clients check, and how certificates change."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.client.tls import ClientTls
from adaptive_spec.config.load import load_settings
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.certificates import Certificates
from adaptive_spec.sidecar.http_server import MAX_PER_CLIENT, WebServer
from adaptive_spec.sidecar.view import CurrentView
from tests.support.certificates import Authority
from tests.support.processes import PATIENCE_S, SidecarProcess, assert_one_line, run_cli, wait_for


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@contextlib.contextmanager
def _sidecar(tmp_path: Path, **settings: Path) -> Iterator[SidecarProcess]:
    config = tmp_path / "config.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    with SidecarProcess(tmp_path / "run", tmp_path / "profiles", "--config", str(config)) as sidecar:
        assert sidecar.url.startswith("https://127.0.0.1:")
        yield sidecar
        assert "Traceback" not in sidecar.stop()


def _certificate(sidecar: SidecarProcess) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with _socket(sidecar) as connection, context.wrap_socket(connection) as tls:
        return tls.getpeercert(binary_form=True) or b""


def _socket(sidecar: SidecarProcess) -> socket.socket:
    parts = urlsplit(sidecar.url)
    return socket.create_connection((parts.hostname, parts.port or 0), timeout=PATIENCE_S)


def test_clients_check_the_server(tmp_path: Path, authority: Authority) -> None:
    certfile = authority.issue("server.pem", "127.0.0.1")
    with _sidecar(tmp_path, certfile=certfile) as sidecar:
        folder = ("--runtime-dir", sidecar.runtime_dir)
        assert run_cli("ctl", "status", *folder).returncode == 0, "the sidecar of one's own folder is known by its file"
        assert run_cli("doctor", "--alive", *folder).returncode == 0
        elsewhere = ("--runtime-dir", tmp_path / "none", "--url", sidecar.url)
        assert run_cli("ctl", "status", *elsewhere, "--ca", authority.ca).returncode == 0
        foreign = Authority(tmp_path, "foreign")
        for options in ((), ("--ca", foreign.ca)):
            assert_one_line(run_cli("ctl", "status", *elsewhere, *options), "no sidecar answers", "certificate verify failed")
        assert_one_line(run_cli("watch", *elsewhere, "--ca", foreign.ca), "certificate verify failed")
        other_name = f"https://localhost:{urlsplit(sidecar.url).port}"
        wrong = run_cli("ctl", "status", "--runtime-dir", tmp_path / "none", "--url", other_name, "--ca", authority.ca)
        assert_one_line(wrong, "no sidecar answers", "certificate verify failed")
        token = sidecar.runtime_dir / "control.token"
        refused = run_cli("ctl", "pause", *elsewhere, "--ca", authority.ca, "--token-file", token)
        assert_one_line(refused, "no engine is attached")


def test_clients_without_a_certificate_get_no_answer(tmp_path: Path, authority: Authority) -> None:
    foreign = Authority(tmp_path, "foreign")
    certfile = foreign.issue("server.pem", "127.0.0.1")
    with _sidecar(tmp_path, certfile=certfile, client_ca=authority.ca) as sidecar:
        folder = ("--runtime-dir", sidecar.runtime_dir)
        let_in = authority.issue("client.pem", "operator")
        assert run_cli("ctl", "status", *folder, "--cert", let_in).returncode == 0
        elsewhere = ("--runtime-dir", tmp_path / "none", "--url", sidecar.url, "--ca", foreign.ca)
        assert run_cli("ctl", "status", *elsewhere, "--cert", let_in).returncode == 0
        assert_one_line(run_cli("ctl", "status", *folder), "no sidecar answers")
        assert_one_line(run_cli("ctl", "status", *folder, "--cert", foreign.issue("other.pem", "operator")), "no sidecar answers")
        assert run_cli("doctor", "--alive", *folder).returncode == 0, "a probe needs no certificate"


def test_a_changed_certificate_is_followed(tmp_path: Path, authority: Authority) -> None:
    certfile = authority.issue("server.pem", "127.0.0.1")
    with _sidecar(tmp_path, certfile=certfile) as sidecar:
        first = _certificate(sidecar)
        authority.issue("server.pem", "127.0.0.1")
        wait_for(lambda: _certificate(sidecar) != first, "the new certificate")
        second = _certificate(sidecar)
        assert run_cli("ctl", "status", "--runtime-dir", sidecar.runtime_dir).returncode == 0
        certfile.write_text("no certificate")
        wait_for(lambda: "TLS: the certificate in use stays: certfile: " in sidecar.log.read_text(), "the log to say so")
        assert _certificate(sidecar) == second
        authority.issue("server.pem", "127.0.0.1")
        wait_for(lambda: _certificate(sidecar) not in (first, second), "the third certificate")


def test_clients_that_do_not_speak_tls_keep_no_one_out(tmp_path: Path, authority: Authority) -> None:
    with _sidecar(tmp_path, certfile=authority.issue("server.pem", "127.0.0.1")) as sidecar, contextlib.ExitStack() as held:
        for index in range(2 * MAX_PER_CLIENT):
            connection = held.enter_context(_socket(sidecar))
            if index % 3:
                with contextlib.suppress(OSError):
                    connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01" if index % 3 == 1 else b"GET / HTTP/1.1\r\n\r\n")
        assert run_cli("ctl", "status", "--runtime-dir", sidecar.runtime_dir).returncode == 0
        for garbage in (b"\x00" * 4096, b"\x16\x03\x03" + b"\xff" * 65_536, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            connection = held.enter_context(_socket(sidecar))
            with contextlib.suppress(ConnectionError):
                connection.sendall(garbage)
                while answer := connection.recv(4096):
                    assert not answer.startswith(b"HTTP/")
        assert run_cli("ctl", "status", "--runtime-dir", sidecar.runtime_dir).returncode == 0


def test_an_ended_connection_holds_no_memory(tmp_path: Path, authority: Authority) -> None:
    """Without a collection of garbage: asyncio has 256 KiB of buffers for each."""
    certificates = Certificates(authority.issue("server.pem", "127.0.0.1"), None, None)
    server = WebServer(CurrentView(time.monotonic()), "127.0.0.1", 0, "token", (), certificates)
    context = ssl.create_default_context(cafile=authority.ca)
    gc.disable()
    try:
        for index in range(20):
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
                if index % 2:
                    with context.wrap_socket(connection, server_hostname="127.0.0.1") as tls:
                        tls.sendall(b"GET / HTTP/1.1\r\n")
        wait_for(lambda: sum(type(item) is SSLProtocol for item in gc.get_objects()) <= 1, "the connections to be let go")
    finally:
        gc.enable()
        server.close()


def test_old_versions_are_refused(tmp_path: Path, authority: Authority) -> None:
    with _sidecar(tmp_path, certfile=authority.issue("server.pem", "127.0.0.1")) as sidecar:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with _socket(sidecar) as connection, pytest.raises(OSError, match=r"(?i)protocol|version|alert|reset|EOF"):
            context.wrap_socket(connection)


def test_files_that_cannot_be_used(tmp_path: Path, authority: Authority) -> None:
    good, other = authority.issue("server.pem", "127.0.0.1"), authority.issue("other.pem", "127.0.0.1")
    text = tmp_path / "text.pem"
    text.write_text("text")
    text.chmod(0o600)
    readable = tmp_path / "readable.pem"
    readable.write_bytes(good.read_bytes())
    readable.chmod(0o644)
    locked = tmp_path / "locked.pem"
    locked.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n" + authority.ca.read_text()
    )
    locked.chmod(0o600)
    for files, words in (
        ((tmp_path / "none", None, None), "certfile: .*No such file"),
        ((tmp_path, None, None), "certfile: .*Is a directory"),
        ((Path("/dev/zero"), None, None), "certfile: '/dev/zero': not a regular file"),
        ((text, None, None), f"certfile: '{text}': must be a certificate as PEM"),
        ((locked, None, None), f"certfile: '{locked}': must be a certificate as PEM, with its key, without a password"),
        ((readable, None, None), "must not be readable by others nor writable by its group, got mode 0644"),
        ((good, other, None), "key values mismatch"),
        ((good, readable, None), f"keyfile: '{readable}': holds a key"),
        ((good, None, text), f"client_ca: '{text}': must be certificates as PEM"),
    ):
        with pytest.raises(BadInput, match=words):
            Certificates(*files)
    for tls, words in (
        (ClientTls(ca=tmp_path / "none"), "--ca: "),
        (ClientTls(ca=text), f"--ca: '{text}': must be a PEM file"),
        (ClientTls(cert=text), f"--cert: '{text}': must be a PEM file"),
        (ClientTls(key=good), "--key: needs --cert, which is not given"),
    ):
        with pytest.raises(BadInput, match=words):
            ControlClient("https://127.0.0.1:1", tls=tls)
    with pytest.raises(BadInput, match="need a URL that begins with https://"):
        ControlClient("http://127.0.0.1:1", tls=ClientTls(ca=authority.ca))
    config = tmp_path / "config.yaml"
    config.write_text(f"certfile: {text}\nport: 0\nruntime_dir: {tmp_path / 'run'}\nprofile_dir: {tmp_path / 'profiles'}\n")
    assert_one_line(run_cli("sidecar", "--config", config), f"certfile: '{text}': must be a certificate as PEM")
    for key in ("keyfile", "client_ca"):
        config.write_text(f"{key}: {good}\n")
        with pytest.raises(BadInput, match=f"{key}: needs certfile, which is not set"):
            load_settings(config)
