"""Level 0: the server's own numbers, of real HTTP servers in a thread that answer as they like."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from adaptive_spec.cli.tables import status_table
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.runtime_folder import default_runtime_dir, server_port_of_folder
from adaptive_spec.sidecar import server_metrics
from adaptive_spec.sidecar.metrics import metrics_registry
from adaptive_spec.sidecar.server_metrics import ServerMetrics, ServerReported, parse_answer, server_reported
from adaptive_spec.sidecar.status_document import status_document
from adaptive_spec.sidecar.view import CurrentView, View
from adaptive_spec.wire.engine_report import EngineReport, State, write_report
from tests.support.numbers_engine import NumbersEngine
from tests.support.processes import SidecarProcess, run_cli, wait_for

RECORDED = Path(__file__).parent / "recorded_metrics"
SGLANG = (RECORDED / "sglang.txt").read_bytes()
VLLM = (RECORDED / "vllm.txt").read_bytes()
VLLM_LATER = (RECORDED / "vllm-later.txt").read_bytes()
"""Shortened answers of the kits' servers under load; `vllm-later` is of the same server, later."""

VLLM_RUNNING = 6.0
VLLM_TOKENS, VLLM_ACCEPTED, VLLM_DRAFTS, VLLM_DRAFTED = 10_622 - 4200, 6392 - 2492, 4337 - 1753, 21_685 - 8765
SGLANG_LENGTH, SGLANG_RATE, SGLANG_RUNNING, SGLANG_SPEED = 2.5357142857142856, 0.5119047619047619, 7.0, 627.5756636101434


class Answering(BaseHTTPRequestHandler):
    answer: Callable[[BaseHTTPRequestHandler], None]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        type(self).answer(self)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.asked: list[str] = []


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Server]:
    with Server(type("Handler", (Answering,), {"answer": staticmethod(answer)})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def says(body: bytes, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        with suppress(OSError):  # the client has closed: that is what a bound is for
            handler.wfile.write(body)

    return answer


@contextmanager
def asking(port: int, interval_s: float = 0.02) -> Iterator[ServerMetrics]:
    metrics = ServerMetrics(port, interval_s)
    metrics.want(True)
    try:
        yield metrics
    finally:
        metrics.close()


def first(metrics: ServerMetrics) -> ServerReported:
    found = wait_for(lambda: metrics.newest(time.monotonic()), "an answer")
    assert isinstance(found, ServerReported)
    return found


def test_sglang_as_recorded() -> None:
    with serving(says(SGLANG)) as server, asking(server.server_port) as metrics:
        found = first(metrics)
        assert server.asked[0] == "/metrics"
    assert found.failure == ""
    assert (found.accept_length, found.accept_rate) == (SGLANG_LENGTH, SGLANG_RATE)
    assert (found.running_requests, found.tokens_per_s) == (SGLANG_RUNNING, SGLANG_SPEED)


def test_vllm_as_recorded() -> None:
    """Rates of counters: the first answer has only what is a gauge."""
    before, now = parse_answer(VLLM, 10.0), parse_answer(VLLM_LATER, 12.0)
    found = server_reported("u", before, None)
    assert found == ServerReported("u", 10.0, running_requests=VLLM_RUNNING)
    found = server_reported("u", now, before)
    assert found.tokens_per_s == pytest.approx(VLLM_TOKENS / 2.0)
    assert found.accept_length == pytest.approx(1 + VLLM_ACCEPTED / VLLM_DRAFTS)
    assert found.accept_rate == pytest.approx(VLLM_ACCEPTED / VLLM_DRAFTED)
    restarted = server_reported("u", before._replace(time_s=14.0), now)
    assert (restarted.tokens_per_s, restarted.accept_length, restarted.accept_rate) == (None, None, None)


def test_vllm_is_asked_again() -> None:
    answers = iter([VLLM])
    with serving(lambda handler: says(next(answers, VLLM_LATER))(handler)) as server, asking(server.server_port) as metrics:
        found = wait_for(lambda: (one := metrics.newest(time.monotonic())) and one.accept_length and one, "two answers")
        assert found.accept_length == pytest.approx(1 + VLLM_ACCEPTED / VLLM_DRAFTS)


def test_ranks_are_added_up_and_parts_of_a_rank_are_not() -> None:
    text = """
sglang:num_running_reqs{dp_rank="0",priority=""} 5.0
sglang:num_running_reqs{dp_rank="0",priority="1"} 3.0
sglang:num_running_reqs{dp_rank="0",tp_rank="1"} 5.0
sglang:num_running_reqs{dp_rank="1"} 2.0
sglang:spec_accept_length{dp_rank="0"} 3.0
sglang:spec_accept_length{dp_rank="1"} 1.0
sglang:spec_accept_length{dp_rank="2"} 0.0
sglang:spec_accept_rate{dp_rank="0"} 0.5
sglang:spec_accept_rate{dp_rank="1"} 0.0
sglang:spec_accept_rate{dp_rank="2"} 0.0
sglang:gen_throughput{dp_rank="0"} NaN
sglang:gen_throughput{dp_rank="1"} +Inf
"""
    reading = parse_answer(text.encode(), 1.0)
    assert server_reported("u", reading, None) == ServerReported("u", 1.0, 2.0, 0.25, 7.0)


def test_an_idle_sglang_keeps_the_length_and_not_the_rate() -> None:
    """As the kit's server shows it."""
    reading = parse_answer(b"sglang:num_running_reqs 0.0\nsglang:spec_accept_length 2.08\nsglang:spec_accept_rate 0.0\n", 1.0)
    assert server_reported("u", reading, None) == ServerReported("u", 1.0, 2.08, None, 0.0)


@pytest.mark.parametrize(
    ("body", "status", "headers", "words"),
    [
        (b"Not Found", 404, {}, "start SGLang with --enable-metrics"),
        (b"", 302, {"Location": "http://127.0.0.1:9/metrics"}, "status 302"),
        (b"x" * 10_000_000, 200, {}, "longer than 4194304 bytes"),
        (os.urandom(10_000), 200, {}, "no number of SGLang or vLLM"),
        (b"<html>", 200, {}, "no number of SGLang or vLLM"),
        (b'sglang:num_running_reqs{a="b 1.0\nsglang:gen_throughput{ x\n', 200, {}, "not in Prometheus' text format"),
        (b"sglang:num_running_reqs 1\n" * 5000, 200, {}, "more than 4096 samples"),
        (SGLANG[:-100], 200, {"Content-Length": "99999"}, "ended before its end"),
    ],
    ids=["404", "redirect", "10 MB", "noise", "page", "damaged", "many", "cut"],
)
def test_other_answers_give_a_reason(
    body: bytes, status: int, headers: dict[str, str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(says(body, status, **headers)) as server, asking(server.server_port) as metrics:
        found = first(metrics)
        wait_for(lambda: len(server.asked) >= 4, "further questions")
    assert words in found.failure
    assert found == ServerReported(metrics.url, found.time_s, failure=found.failure)
    assert caplog.text.count("the server's own numbers") == 1, "said once"


def test_a_line_that_is_not_http(caplog: pytest.LogCaptureFixture) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"\x1b[31mSSH-2.0\r\n\r\n")

    with serving(answer) as server, asking(server.server_port) as metrics:
        assert first(metrics).failure == "the answer is not HTTP (BadStatusLine)"
    assert "\x1b" not in caplog.text


def test_a_server_that_hangs_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_metrics, "TIMEOUT_S", 0.2)
    released = threading.Event()

    def answer(_: BaseHTTPRequestHandler) -> None:
        released.wait(60)

    with serving(answer) as server, asking(server.server_port) as metrics:
        begin_s = time.perf_counter()
        assert metrics.newest(time.monotonic()) is None
        metrics.want(True)
        assert time.perf_counter() - begin_s < 0.1
        assert first(metrics).failure == "timed out"
        released.set()


def test_numbers_of_a_server_that_no_longer_answers_are_not_shown() -> None:
    with serving(says(SGLANG)) as server, asking(server.server_port, interval_s=60.0) as metrics:
        found = first(metrics)
        assert metrics.newest(found.time_s + 19.0) == found
        assert metrics.newest(found.time_s + 21.0) == ServerReported(
            metrics.url, found.time_s, failure="no answer for more than 20 s"
        )


def test_nobody_listens_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with serving(says(SGLANG)) as server:
        port = server.server_port
    caplog.set_level(logging.DEBUG)
    with asking(port) as metrics:
        assert first(metrics).failure == "Connection refused"
    assert caplog.text == ""


def test_questions_end_when_the_numbers_are_not_wanted() -> None:
    with serving(says(SGLANG)) as server, asking(server.server_port) as metrics:
        first(metrics)
        metrics.want(False)
        assert metrics.newest(time.monotonic()) is None
        wait_for(lambda: metrics._before is None, "the thread to wait")
        asked = len(server.asked)
        metrics.want(True)
        wait_for(lambda: len(server.asked) > asked, "a question")
        first(metrics)


def test_which_port_is_known() -> None:
    def port(**settings: object) -> str | None:
        found = ServerMetrics.of(SidecarSettings.model_validate(settings))
        return found.url if found else None

    assert port() == "http://127.0.0.1:30000/metrics"
    assert port(server_port=8000) == "http://127.0.0.1:8000/metrics"
    assert port(runtime_dir=str(default_runtime_dir(31000))) == "http://127.0.0.1:31000/metrics"
    assert port(runtime_dir="/run/adaptive-spec/run") is None
    assert port(runtime_dir="/run/adaptive-spec/run", server_port=8000) == "http://127.0.0.1:8000/metrics"
    assert port(server_port=8000, server_metrics=False) is None
    assert server_port_of_folder(default_runtime_dir(1).with_name("adaptive-spec-1-99999")) is None


def _shown(view: View) -> tuple[dict[str, object], str]:
    current = CurrentView(0.0)
    current.view = view
    text = generate_latest(metrics_registry(current)).decode()
    document = status_document(view, 0.0, 7.0)
    return document, "\n".join(line for line in text.splitlines() if line.startswith("adaptive_spec_server_reported"))


def test_what_is_shown() -> None:
    reported = ServerReported("http://127.0.0.1:1/metrics", 5.0, 2.5, 0.5, 4.0, None)
    document, metrics = _shown(View(6.0, server_reported=reported))
    assert document["server_reported"] == {
        "url": "http://127.0.0.1:1/metrics", "accept_length": 2.5, "accept_rate": 0.5, "running_requests": 4.0,
        "tokens_per_s": None, "age_s": 2.0, "failure": "",
    }  # fmt: skip
    assert "adaptive_spec_server_reported_accept_length_tokens 2.5\n" in metrics
    assert "adaptive_spec_server_reported_accept_ratio 0.5\n" in metrics
    assert "adaptive_spec_server_reported_running_requests 4.0\n" in metrics
    assert "tokens_per_second" not in metrics
    document, metrics = _shown(View(6.0, server_reported=ServerReported("u", 5.0, failure="status 500")))
    assert metrics == ""
    assert "none: u: status 500" in list(status_table(document).columns[1].cells).__repr__()
    document, metrics = _shown(View(6.0))
    assert ("server_reported" in document, metrics) == (False, "")
    rank = View(6.0, server_reported=reported)
    _, metrics = _shown(View(6.0, server_reported=reported, dp_ranks={0: rank, 1: View(6.0)}))
    assert "adaptive_spec_server_reported_running_requests 4.0\n" in metrics, "of the server, not of a rank"


@pytest.mark.parametrize("state", ["refused", "detached", "attached", "observing"])
def test_records_come_by_the_report(state: State) -> None:
    assert View(1.0, report=EngineReport(1, "e", state)).records_come == (state in ("attached", "observing"))


def test_a_sidecar_beside_a_refused_plugin_shows_the_servers_numbers(tmp_path: Path) -> None:
    """And stops when an engine attaches."""
    runtime_dir = tmp_path / "run"
    reason = "SGLang 99.0 is not a supported release"
    write_report(runtime_dir, EngineReport(os.getpid(), "sglang 99.0", "refused", reason, level=0))
    with (
        serving(says(SGLANG)) as server,
        SidecarProcess(runtime_dir, tmp_path / "profiles", "--server-port", str(server.server_port)) as sidecar,
    ):
        status = sidecar.wait_status(lambda s: s.get("server_reported"), "the server's numbers")
        assert status["reason"] == reason
        shown = status["server_reported"]
        assert (shown["accept_length"], shown["tokens_per_s"]) == (SGLANG_LENGTH, SGLANG_SPEED)
        assert shown["age_s"] < 10
        assert f"adaptive_spec_server_reported_running_requests {SGLANG_RUNNING}" in sidecar.get("/metrics")
        table = run_cli("ctl", "status", "--runtime-dir", runtime_dir).stdout
        assert f"{SGLANG_RUNNING:.0f} requests, accept length {SGLANG_LENGTH:.2f}" in " ".join(table.split()), table
        (runtime_dir / "engine.json").unlink()
        engine = NumbersEngine(runtime_dir)
        try:
            status = sidecar.wait_status(lambda s: s["engine_attached"], "the engine")
            assert "server_reported" not in status
            wait_for(lambda: "\nadaptive_spec_server_reported" not in sidecar.get("/metrics"), "the end of the gauges")
        finally:
            engine.close()
        assert "server's own numbers" not in sidecar.stop()
