"""What an LLM server says of itself at its own `/metrics`: level 0, all that can be shown while the plugin gives no records.

The plugin was refused, has detached, or is not installed. SGLang has the numbers with `--enable-metrics`, vLLM without
`--disable-log-stats`. They are the server's own: nothing is learnt from them, and they decide nothing.
"""

from __future__ import annotations

import http.client
import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.client.server import HttpServer
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.errors import one_line
from adaptive_spec.runtime_folder import server_port_of_folder

INTERVAL_S = 5.0
"""Between two questions. Prometheus itself asks every 15 s by default, and SGLang sets its gauges every 40 decode steps."""
TIMEOUT_S = 2.0
"""Of connecting and of each read. A server that is loading a model answers nothing for longer: it is asked again."""
OLDEST_S = 4 * INTERVAL_S
"""Numbers older than this are not shown: the newest question is still without an answer."""
LARGEST_ANSWER = 4 << 20
"""Bytes. The kits' servers, of one rank each, answered with 54 KB (vLLM 0.32.0) and 94 KB (SGLang), most of it histograms.
Each data-parallel rank has its own.
"""
MOST_SAMPLES = 4096
"""Of the names below: 64 data-parallel ranks with 8 others each have 2048 on SGLang."""
LONGEST_REASON = 200

SUMS = (
    "sglang:num_running_reqs", "sglang:gen_throughput", "vllm:num_requests_running", "vllm:generation_tokens_total",
    "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total",
)  # fmt: skip
"""Added up over the data-parallel ranks."""
MEANS = ("sglang:spec_accept_length", "sglang:spec_accept_rate")
"""Averaged over the data-parallel ranks that have one, 0 is none: SGLang does not tell how many steps each is of."""
RANK_LABELS = ("dp_rank", "engine")
"""Data-parallel ranks, in SGLang and in vLLM. Samples that differ in other labels are of the same requests: tensor-parallel ranks
with `--enable-metrics-for-all-schedulers`, and parts of a total by priority.
"""

log = logging.getLogger(__name__)


class Reading(NamedTuple):
    """Values of one answer by name, at a time in CLOCK_MONOTONIC seconds. A name that the server does not have is missing."""

    time_s: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class ServerReported:
    """The server's own numbers, None where it does not tell or they are not known yet.

    url: asked. time_s: of the answer, CLOCK_MONOTONIC seconds. accept_length: tokens per request and verification, with the bonus
    token, >= 1. accept_rate: accepted / drafted tokens, 0..1. running_requests: >= 0. tokens_per_s: output tokens. SGLang's are
    its own recent means, vLLM's those since the question before. failure: why there are no numbers, one line, else "".
    """

    url: str
    time_s: float
    accept_length: float | None = None
    accept_rate: float | None = None
    running_requests: float | None = None
    tokens_per_s: float | None = None
    failure: str = ""


def parse_answer(body: bytes, time_s: float) -> Reading:
    """Return the values of a server's /metrics. Raises ValueError, one line, for anything but one of SGLang or vLLM."""
    wanted = {*SUMS, *MEANS}
    # Only these lines are parsed: the rest is histograms, and the parser holds the interpreter's lock.
    lines = [line for line in body.decode(errors="replace").split("\n") if line.split("{", 1)[0].split(" ", 1)[0] in wanted]
    if len(lines) > MOST_SAMPLES:
        raise ValueError(f"more than {MOST_SAMPLES} samples")
    by_rank: dict[str, dict[tuple[str, ...], float]] = {}
    try:
        samples = [sample for family in text_string_to_metric_families("\n".join(lines) + "\n") for sample in family.samples]
    except Exception as error:  # the parser raises many kinds for a damaged line
        raise ValueError("the answer is not in Prometheus' text format") from error
    for sample in samples:
        if math.isfinite(sample.value) and sample.value >= 0:
            ranks = by_rank.setdefault(sample.name, {})
            rank = tuple(sample.labels.get(label, "") for label in RANK_LABELS)
            ranks[rank] = max(ranks.get(rank, 0.0), sample.value)
    values = {name: sum(ranks.values()) for name, ranks in by_rank.items() if name in SUMS}
    lengths = {rank: value for rank, value in by_rank.get("sglang:spec_accept_length", {}).items() if value > 0}
    rates = by_rank.get("sglang:spec_accept_rate", {})
    for name, found in (
        ("sglang:spec_accept_length", list(lengths.values())),
        # An idle SGLang sets the rate to 0 and leaves the length: drafts were accepted, so the rate is not known.
        ("sglang:spec_accept_rate", [rate for rank, rate in rates.items() if rate > 0 or lengths.get(rank) == 1]),
    ):
        if found:
            values[name] = sum(found) / len(found)
    if not values:
        raise ValueError("no number of SGLang or vLLM in the answer; vLLM gives none with --disable-log-stats")
    return Reading(time_s, values)


def server_reported(url: str, now: Reading, before: Reading | None) -> ServerReported:
    """Return the numbers of a reading. before: the one before, None without one; vLLM has counters, which need two."""
    values = now.values
    running = values.get("sglang:num_running_reqs", values.get("vllm:num_requests_running"))
    tokens_per_s, length, rate = (values.get(name) for name in ("sglang:gen_throughput", *MEANS))
    if before is not None and now.time_s > before.time_s:
        output = _increase("vllm:generation_tokens_total", now, before)
        accepted = _increase("vllm:spec_decode_num_accepted_tokens_total", now, before)
        drafts = _increase("vllm:spec_decode_num_drafts_total", now, before)
        drafted = _increase("vllm:spec_decode_num_draft_tokens_total", now, before)
        if output is not None:
            tokens_per_s = output / (now.time_s - before.time_s)
        if accepted is not None and drafts:
            length = 1 + accepted / drafts
        if accepted is not None and drafted:
            rate = accepted / drafted
    return ServerReported(url, now.time_s, length, rate, running, tokens_per_s)


def _increase(name: str, now: Reading, before: Reading) -> float | None:
    """Increase of a counter; None where it is missing or has fallen: another server answers since."""
    if name not in now.values or name not in before.values or now.values[name] < before.values[name]:
        return None
    return now.values[name] - before.values[name]


class ServerMetrics:
    """Asks the server on this host for its numbers, in a thread of its own, while they are wanted.

    port: of the server, on 127.0.0.1. interval_s: between two questions. No method waits for the server, and none raises.
    """

    def __init__(self, port: int, interval_s: float = INTERVAL_S) -> None:
        self.url = f"http://127.0.0.1:{port}/metrics"
        self._server, self._interval_s = HttpServer(f"http://127.0.0.1:{port}"), interval_s
        self._newest: ServerReported | None = None
        self._before: Reading | None = None
        self._said: set[str] = set()
        self._wanted, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, settings: SidecarSettings) -> ServerMetrics | None:
        """Return one for the settings, None where it is switched off or the server's port is not known."""
        known = "server_port" in settings.model_fields_set
        port = settings.server_port if known else server_port_of_folder(settings.runtime_dir)
        return cls(port) if settings.server_metrics and port is not None else None

    def want(self, wanted: bool) -> None:
        """Say whether the numbers are wanted from now on: from the first time on which they are there is a thread."""
        if not wanted:
            self._wanted.clear()
            self._newest = None
            return
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._ask_again_and_again, name="server-metrics", daemon=True)
            self._thread.start()

    def newest(self, now_s: float) -> ServerReported | None:
        """Return the newest answer; None while it is not wanted, and before the first. now_s: CLOCK_MONOTONIC seconds."""
        newest = self._newest if self._wanted.is_set() else None
        if newest is not None and now_s - newest.time_s > OLDEST_S:
            return ServerReported(self.url, newest.time_s, failure=f"no answer for more than {OLDEST_S:g} s")
        return newest

    def close(self) -> None:
        """End the thread with its next pause. Returns at once: a running question ends with the process."""
        self._ended.set()
        self._wanted.set()

    def _ask_again_and_again(self) -> None:
        while not self._ended.is_set():
            if not self._wanted.is_set():
                self._before = None
                self._wanted.wait()
                continue
            newest = self._ask()
            if self._wanted.is_set():
                self._newest = newest
            self._ended.wait(self._interval_s)

    def _ask(self) -> ServerReported:
        try:
            status, body = self._server.ask("GET", "/metrics", None, TIMEOUT_S, LARGEST_ANSWER)
            if status == 404:
                raise ValueError("status 404: metrics are off; start SGLang with --enable-metrics")
            if status != 200:
                raise ValueError(f"status {status}")
            reading = parse_answer(body, time.monotonic())
            reported = server_reported(self.url, reading, self._before)
            self._before = reading
            return reported
        except Exception as error:  # whatever answers at that port
            text = getattr(error, "strerror", None) or one_line(error)
            reason = "".join(c for c in str(text) if c.isprintable())[:LONGEST_REASON]
            if isinstance(error, http.client.HTTPException):
                reason = f"the answer is not HTTP ({type(error).__name__})"  # its text is the other side's
            # Without a server nobody listens, and that is how a sidecar waits for one.
            if not isinstance(error, ConnectionRefusedError) and reason not in self._said:
                self._said.add(reason)
                log.warning("the server's own numbers: %s: %s; said once", self.url, reason)
            return ServerReported(self.url, time.monotonic(), failure=reason)
