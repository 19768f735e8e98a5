"""Grafana: the dashboards pushed and checked, and an annotation for every swap and drift event.

All that is said to Grafana goes through `Grafana`, a client with a timeout for every call and a few retries. A failure is one
line that names the address and what to do; the token is in no line. The annotator lives in a thread of its own with a bounded
queue: the sidecar's loop hands events over and never waits. What Grafana is too slow or too ill to take is dropped and counted.

Needs the extra `grafana` (grafana-api); it is imported when something is said, not before.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adaptive_spec.config.settings import GrafanaSettings
from adaptive_spec.control.counters import Event
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.errors import BadInput

TAG = "adaptive-spec"
FOLDER_UID = "adaptive-spec"
ATTEMPTS = 3
FIRST_PAUSE_S = 0.5
MARKED_KINDS = ("swap", "drift")

log = logging.getLogger(__name__)
Document = dict[str, Any]


class GrafanaError(Exception):
    """Grafana refused, failed or did not answer. The message is one line; it never holds the token."""


class Grafana:
    """One Grafana server.

    url: "http://host:port/prefix". token: of a service account. timeout_s: of one attempt, > 0. attempts: >= 1; connection
    failures, time-outs and 5xx are tried again after 0.5, 1, 2 ... s, refusals (4xx) are not. sleep: waits so many seconds.
    Raises BadInput for a URL that is none and where grafana-api is not installed.
    """

    def __init__(
        self, url: str, token: str, timeout_s: float = 10.0, attempts: int = ATTEMPTS,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            # A URL may carry a password: it is not said again.
            raise BadInput(
                "--grafana-url: is not allowed: must be like https://HOST:PORT/PREFIX, without user, password and query"
            )
        try:
            port = parts.port
        except ValueError as error:
            raise BadInput("--grafana-url: is not allowed: its port must be 0..65535") from error
        try:
            from grafana_api.grafana_face import GrafanaFace
        except ImportError as error:
            raise BadInput("grafana: grafana-api is missing: install the extra, pip install 'adaptive-spec[grafana]'") from error
        prefix = parts.path.strip("/")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.url = url.rstrip("/")
        self._token, self._attempts, self._sleep = token, attempts, sleep
        self._face = GrafanaFace(
            auth=token,
            host=host,
            port=port,
            protocol=parts.scheme,
            url_path_prefix=f"{prefix}/" if prefix else "",
            timeout=timeout_s,
        )

    def ensure_folder(self, title: str, uid: str = FOLDER_UID) -> bool:
        """Make the folder if it is not there; True when it was made. Raises GrafanaError."""
        if self._ask("read the folder", lambda: self._face.folder.get_folder(uid), missing=True) is not None:
            return False
        self._ask("make the folder", lambda: self._face.folder.create_folder(title, uid))
        return True

    def dashboard(self, uid: str) -> Document | None:
        """The dashboard as Grafana has it, None where it has none. Raises GrafanaError."""
        answer = self._ask(f"read dashboard {uid}", lambda: self._face.dashboard.get_dashboard(uid), missing=True)
        return None if answer is None else dict(answer["dashboard"])

    def put_dashboard(self, dashboard: Document, folder_uid: str, message: str) -> None:
        """Write a dashboard, over one of the same uid. Raises GrafanaError."""
        body = {"dashboard": dashboard, "folderUid": folder_uid, "message": message, "overwrite": True}
        self._ask(f"write dashboard {dashboard['uid']}", lambda: self._face.dashboard.update_dashboard(body))

    def annotate(self, time_ms: int, tags: Sequence[str], text: str) -> None:
        """Write an annotation. time_ms: Unix milliseconds. Raises GrafanaError."""
        self._ask("annotate", lambda: self._face.annotations.add_annotation(time_from=time_ms, tags=list(tags), text=text))

    def _ask(self, what: str, call: Callable[[], Any], missing: bool = False) -> Any:
        """Do one call, again where that may help. missing: 404 is an answer, None. Raises GrafanaError."""
        import requests
        from grafana_api.grafana_api import GrafanaClientError, GrafanaException

        for attempt in range(1, self._attempts + 1):
            try:
                return call()
            except GrafanaClientError as error:
                if missing and error.status_code == 404:
                    return None
                raise GrafanaError(self._line(what, _refusal(error.status_code, str(error.message)))) from None
            except GrafanaException as error:
                reason = f"the server failed with status {error.status_code}"
            except requests.exceptions.Timeout:
                reason = "the server did not answer in time"
            except requests.exceptions.ConnectionError:
                reason = "no server answers there"
            except (requests.exceptions.RequestException, ValueError, KeyError, TypeError):
                raise GrafanaError(self._line(what, "the answer is not one of Grafana: is this its address?")) from None
            if attempt < self._attempts:
                self._sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        raise GrafanaError(self._line(what, f"{reason}, {self._attempts} attempts"))

    def _line(self, what: str, reason: str) -> str:
        line = " ".join(f"{self.url}: cannot {what}: {reason}".split())
        return line.replace(self._token, "(token)") if self._token else line


def _refusal(status: int, message: str) -> str:
    known = {
        401: "the token is not accepted (401): give one of a service account with the role Editor",
        403: "the token may not do that (403): its service account needs the role Editor",
        404: "there is nothing at this address (404): is this Grafana, and is its path prefix in the URL?",
        412: "somebody else has changed it meanwhile (412): try again",
    }
    return known.get(status, f"refused with status {status}: {message[:200]}")


# -- dashboards --------------------------------------------------------------------------------------------------------


def shipped_dashboards() -> dict[str, Document]:
    """Our dashboards by name, in the order they are listed. Raises BadInput when they are not installed."""
    folder = resources.files("adaptive_spec") / "dashboards"
    if not folder.is_dir():
        folder = Path(__file__).parents[2] / "dashboards"
    found = {p.name.removesuffix(".json"): json.loads(p.read_text("utf-8")) for p in folder.iterdir() if p.name.endswith(".json")}
    if not found:
        raise BadInput("dashboards: none is installed with this package")
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Finding:
    """What is so of one dashboard: state "current", "different" or "missing"."""

    name: str
    uid: str
    state: str


def check_dashboards(grafana: Grafana) -> list[Finding]:
    """Compare what Grafana has with what we ship. Raises GrafanaError."""
    findings = []
    for name, ours in shipped_dashboards().items():
        theirs = grafana.dashboard(ours["uid"])
        state = "missing" if theirs is None else "current" if _essence(theirs) == _essence(ours) else "different"
        findings.append(Finding(name, ours["uid"], state))
    return findings


def push_dashboards(grafana: Grafana, folder: str, message: str) -> list[Finding]:
    """Write what is missing or different into the folder; returns what was found before. Raises GrafanaError."""
    grafana.ensure_folder(folder)
    findings = check_dashboards(grafana)
    shipped = shipped_dashboards()
    for finding in findings:
        if finding.state != "current":
            grafana.put_dashboard(shipped[finding.name], FOLDER_UID, message)
    return findings


def _essence(dashboard: Mapping[str, Any]) -> Document:
    """A dashboard without what Grafana numbers itself."""
    return {key: value for key, value in dashboard.items() if key not in ("id", "version", "iteration")}


# -- annotations -------------------------------------------------------------------------------------------------------


@dataclass
class AnnotationCounts:
    """How many annotations Grafana took, and how many were dropped by reason: "queue_full", "refused" or "closed"."""

    sent: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Annotator:
    """Writes swaps and drift events to Grafana as annotations, tagged adaptive-spec, their kind, model and gpu.

    `offer` belongs to the sidecar's loop: it looks at the snapshot's newest events, queues the new ones and returns at once. A
    queue that is full drops its oldest event: the newest tell more. One thread sends; a failure drops that event.
    """

    def __init__(self, grafana: Grafana, queue_length: int, unix_s: Callable[[], float] = time.time) -> None:
        self.counts = AnnotationCounts()
        self._grafana, self._unix_s = grafana, unix_s
        self._queue: deque[tuple[int, list[str], str]] = deque()
        self._length = queue_length
        self._change = threading.Condition()
        self._closing = self._failed = False
        self._last: Event | None = None
        self._thread = threading.Thread(target=self._send, name="grafana", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, settings: GrafanaSettings) -> Annotator | None:
        """The annotator a configuration asks for, None where it asks for none. Raises BadInput."""
        if settings.url is None:
            return None
        token = read_token(settings.token_file, "grafana.token_file") if settings.token_file else ""
        return cls(Grafana(settings.url, token, settings.timeout_s, attempts=2), settings.queue_length)

    def offer(self, snapshot: Snapshot, info: EngineInfo, now_s: float) -> None:
        """Queue the events that are new. now_s: the clock of the events. Never waits, never raises."""
        fresh: list[Event] = []
        for event in reversed(snapshot.events):
            if event is self._last:
                break
            fresh.append(event)
        if not fresh:
            return
        self._last = fresh[0]
        unix_s = self._unix_s()
        with self._change:
            for event in reversed(fresh):
                if event.kind in MARKED_KINDS:
                    time_ms = round(1e3 * (unix_s - (now_s - event.time_s)))
                    self._queue.append((time_ms, [TAG, event.kind, info.model, info.gpu], event.text))
            while len(self._queue) > self._length:
                self._queue.popleft()
                self.counts.dropped["queue_full"] += 1
            self._change.notify()

    def close(self) -> None:
        """Send no more; what is queued is dropped and counted. Returns at once: a call under way dies with the process."""
        with self._change:
            self._closing = True
            self.counts.dropped["closed"] += len(self._queue)
            self._queue.clear()
            self._change.notify()

    def _send(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                time_ms, tags, text = self._queue.popleft()
            try:
                self._grafana.annotate(time_ms, tags, text)
                self.counts.sent += 1
                self._failed = False
            except Exception as error:
                self.counts.dropped["refused"] += 1
                if not self._failed:
                    # Anything but a GrafanaError is a fault of ours or of the library: its words might hold the token.
                    words = str(error) if isinstance(error, GrafanaError) else type(error).__name__
                    log.warning("annotations: %s; further ones are only counted", words)
                self._failed = True


def read_token(path: Path, name: str) -> str:
    """Read a token file; name: what the operator calls it. Raises BadInput."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{name}: '{path}' is not allowed: cannot be read; must be a file with a token") from error
    if not token or not token.isascii() or len(token.split()) != 1:
        raise BadInput(f"{name}: '{path}' is not allowed: holds no token; must be one line of text")
    return token


def summary(findings: Iterable[Finding], pushed: bool) -> list[str]:
    """One line for each dashboard."""
    words = {"missing": "created", "different": "updated", "current": "unchanged"} if pushed else {}
    return [f"{finding.uid}: {words.get(finding.state, finding.state)}" for finding in findings]
