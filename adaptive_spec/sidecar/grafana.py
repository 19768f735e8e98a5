"""Grafana: writes and checks the dashboards, and writes an annotation for every swap and drift event.

All requests go through `Grafana`, a client with a timeout for every call and a few retries. A failure is one line that names the
address and what to do; it never contains the token. The annotator sends from its own thread, through a bounded queue, so the
sidecar's loop never waits. Events that Grafana does not take in time are dropped and counted.

Needs the extra `grafana` (grafana-api), which is imported at the first use.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adaptive_spec import regular_file
from adaptive_spec.config.checks import web_url
from adaptive_spec.config.settings import GrafanaSettings
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.errors import BadInput

TAG = "adaptive-spec"
FOLDER_UID = "adaptive-spec"
ATTEMPTS = 3
FIRST_PAUSE_S = 0.5
MARKED_KINDS = ("swap", "drift")
REMEMBERED_SESSIONS = 64
"""Sessions whose last event id is kept: more than one only where the first data-parallel rank changes."""
LARGEST_TOKEN_FILE = 4096
"""Bytes of a token file at most."""

log = logging.getLogger(__name__)
Document = dict[str, Any]


class GrafanaError(Exception):
    """Grafana refused, failed or did not answer. The message is one line and never contains the token.

    status: HTTP status of a refusal, 4xx; 0 for anything else.
    """

    def __init__(self, line: str, status: int = 0) -> None:
        super().__init__(line)
        self.status = status


class Grafana:
    """One Grafana server.

    url: "http://host:port/prefix". token: of a service account. timeout_s: of one attempt, > 0. attempts: >= 1; connection
    errors, timeouts and 5xx answers are retried after 0.5, 1, 2 ... s, 4xx answers are not. sleep: called with the pause in
    seconds. newest_token: called before every call for the token to use from then on, so that a rotated one is used at once; what
    it raises leaves the token as it was. Raises BadInput for an invalid URL and when grafana-api is not installed.
    """

    def __init__(
        self, url: str, token: str, timeout_s: float = 10.0, attempts: int = ATTEMPTS,
        sleep: Callable[[float], object] = time.sleep, newest_token: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        try:
            parts = urlsplit(web_url(url))
        except ValueError as error:  # a URL may contain a password, so it is not repeated in the message
            raise BadInput(f"--grafana-url: {error}") from error
        try:
            from grafana_api.grafana_face import GrafanaFace
        except ImportError as error:
            raise BadInput(
                "grafana: grafana-api is not installed: install the extra 'grafana' (pip install '.[grafana]' in a checkout)"
            ) from error
        prefix = parts.path.strip("/")
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self.url = url.rstrip("/")
        self._token, self._attempts, self._sleep, self._newest_token = token, attempts, sleep, newest_token

        def face(token: str) -> Any:
            return GrafanaFace(
                auth=token,
                host=host,
                port=parts.port,
                protocol=parts.scheme,
                url_path_prefix=f"{prefix}/" if prefix else "",
                timeout=timeout_s,
            )

        self._face_of = face
        self._face = face(token)

    def ensure_folder(self, title: str, uid: str = FOLDER_UID) -> str:
        """Return the uid of the folder: the one with this title, else the one with `uid`, else a new one. Raises GrafanaError."""
        found = self._find_folder(title, uid)
        if found is not None:
            return found
        try:
            self._ask("create the folder", lambda: self._face.folder.create_folder(title, uid))
        except GrafanaError as error:
            # 409, of older servers 412: somebody has created it since.
            if error.status not in (409, 412) or (found := self._find_folder(title, uid)) is None:
                raise
            return found
        return uid

    def _find_folder(self, title: str, uid: str) -> str | None:
        ours = self._ask("read the folder", lambda: self._face.folder.get_folder(uid), missing=True)
        if ours is not None and ours["title"] == title:
            return uid
        folders = self._ask("list the folders", lambda: self._face.folder.get_all_folders(), missing=True) or ()
        titled = next((str(folder["uid"]) for folder in folders if folder["title"] == title), None)
        return titled or (uid if ours is not None else None)

    def dashboard(self, uid: str) -> Document | None:
        """Return the dashboard as Grafana has it, None when it has none with this uid. Raises GrafanaError."""
        answer = self._ask(f"read dashboard {uid}", lambda: self._face.dashboard.get_dashboard(uid), missing=True)
        return None if answer is None else dict(answer["dashboard"])

    def put_dashboard(self, dashboard: Document, folder_uid: str, message: str) -> None:
        """Create a dashboard or overwrite the one with the same uid. Raises GrafanaError."""
        body = {"dashboard": dashboard, "folderUid": folder_uid, "message": message, "overwrite": True}
        self._ask(f"write dashboard {dashboard['uid']}", lambda: self._face.dashboard.update_dashboard(body))

    def annotate(self, time_ms: int, tags: Sequence[str], text: str) -> None:
        """Write an annotation. time_ms: Unix milliseconds. Raises GrafanaError."""
        self._ask("annotate", lambda: self._face.annotations.add_annotation(time_from=time_ms, tags=list(tags), text=text))

    def _ask(self, what: str, call: Callable[[], Any], missing: bool = False) -> Any:
        """Make one call, with retries. missing: return None on 404. Raises GrafanaError."""
        import requests
        from grafana_api.grafana_api import GrafanaClientError, GrafanaException

        self._follow_token()
        for attempt in range(1, self._attempts + 1):
            try:
                return call()
            except GrafanaClientError as error:
                if missing and error.status_code == 404:
                    return None
                reason = _refusal(error.status_code, error.response, str(error.message))
                raise GrafanaError(self._line(what, reason), error.status_code) from None
            except GrafanaException as error:
                reason = f"the server failed with status {error.status_code}"
            except requests.exceptions.Timeout:
                reason = "the server did not answer in time"
            except requests.exceptions.ConnectionError:
                reason = "connection failed"
            except (requests.exceptions.RequestException, ValueError, KeyError, TypeError):
                raise GrafanaError(self._line(what, "the answer is not from Grafana: check the address")) from None
            if attempt < self._attempts:
                self._sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        raise GrafanaError(self._line(what, f"{reason} ({self._attempts} attempts)"))

    def _follow_token(self) -> None:
        if self._newest_token is None:
            return
        try:
            token = self._newest_token()
        except BadInput:  # in the middle of being replaced, or gone: the one at hand may still be good
            return
        if token != self._token:
            self._token, self._face = token, self._face_of(token)

    def _line(self, what: str, reason: str) -> str:
        line = " ".join(f"{self.url}: cannot {what}: {reason}".split())
        return line.replace(self._token, "(token)") if self._token else line


def _refusal(status: int, response: object, message: str) -> str:
    """Why Grafana refused, and what to do. response: its answer, in which `status` names the kind of a 409 or 412."""
    kind = response.get("status") if isinstance(response, Mapping) else None
    if status in (409, 412) and kind == "plugin-dashboard":
        return f"it belongs to a plugin ({status}): copy it under another uid"
    if status in (409, 412) and kind != "version-mismatch":
        # With "overwrite", as we write, a conflict is one of names: trying again cannot help.
        return (
            f"the folder has another one of the same title ({status}): delete or rename that one, or choose another folder "
            f"with --folder; Grafana says: {message[:200]}"
        )
    known = {
        401: "token not accepted (401): use one of a service account with the role Editor",
        403: "permission denied (403): the token's service account needs the role Editor",
        404: "not found (404): check that this is Grafana and that its path prefix is in the URL",
        409: "changed by someone else at the same time (409): try again",
        412: "changed by someone else at the same time (412): try again",
    }
    return known.get(status, f"refused with status {status}: {message[:200]}")


# -- dashboards --------------------------------------------------------------------------------------------------------


def shipped_dashboards() -> dict[str, Document]:
    """Return the dashboards of this package by name, sorted. Raises BadInput when they are not installed."""
    folder = resources.files("adaptive_spec") / "dashboards"
    if not folder.is_dir():
        folder = Path(__file__).parents[2] / "dashboards"
    found = {p.name.removesuffix(".json"): json.loads(p.read_text("utf-8")) for p in folder.iterdir() if p.name.endswith(".json")}
    if not found:
        raise BadInput("dashboards: no dashboard is installed with this package")
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Finding:
    """Result of comparing one dashboard: state is "current", "different" or "missing"."""

    name: str
    uid: str
    state: str


def check_dashboards(grafana: Grafana) -> list[Finding]:
    """Compare the dashboards in Grafana with those of this package. Raises GrafanaError."""
    findings = []
    for name, ours in shipped_dashboards().items():
        theirs = grafana.dashboard(ours["uid"])
        state = "missing" if theirs is None else "current" if _comparable(theirs) == _comparable(ours) else "different"
        findings.append(Finding(name, ours["uid"], state))
    return findings


def push_dashboards(grafana: Grafana, folder: str, message: str) -> list[Finding]:
    """Write the missing and different dashboards to the folder; returns the state before. Raises GrafanaError."""
    uid = grafana.ensure_folder(folder)
    findings = check_dashboards(grafana)
    shipped = shipped_dashboards()
    for finding in findings:
        if finding.state != "current":
            grafana.put_dashboard(shipped[finding.name], uid, message)
    return findings


def _comparable(dashboard: Mapping[str, Any]) -> Document:
    """Return a dashboard without the numbers that Grafana assigns."""
    return {key: value for key, value in dashboard.items() if key not in ("id", "version", "iteration")}


# -- annotations -------------------------------------------------------------------------------------------------------


@dataclass
class AnnotationCounts:
    """Annotations written to Grafana, and those dropped by reason: the queue was full, Grafana did not take it, or the sidecar
    ended.
    """

    sent: int = 0
    dropped: Counter[str] = field(default_factory=lambda: Counter(queue_full=0, refused=0, closed=0))


class Annotator:
    """Writes swaps and drift events to Grafana as annotations, tagged adaptive-spec, kind, model and gpu.

    The sidecar's loop calls `offer`, which queues the new events of a snapshot and returns at once. Every event is queued once:
    its id is larger than those before it in its session. A full queue drops its oldest event. One thread sends; a failure drops
    the event.
    """

    def __init__(self, grafana: Grafana, queue_length: int, unix_s: Callable[[], float] = time.time) -> None:
        self.counts = AnnotationCounts()
        self._grafana, self._unix_s = grafana, unix_s
        self._queue: deque[tuple[int, list[str], str]] = deque()
        self._length = queue_length
        self._change = threading.Condition()
        self._closing = self._failed = False
        self._last_ids: dict[int, int] = {}
        """By session, the one offered last at the end."""
        self._thread = threading.Thread(target=self._send, name="grafana", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, settings: GrafanaSettings) -> Annotator | None:
        """Return the annotator that the settings ask for, None without a Grafana URL. Raises BadInput."""
        if settings.url is None:
            return None
        read = partial(read_token, settings.token_file, "grafana.token_file") if settings.token_file else None
        token = read() if read else ""
        return cls(Grafana(settings.url, token, settings.timeout_s, attempts=2, newest_token=read), settings.queue_length)

    def offer(self, snapshot: Snapshot, info: EngineInfo, now_s: float, session: int) -> None:
        """Queue the new events. now_s: on the clock of the events. session: whose ids they are. Never waits, never raises."""
        last_id = self._last_ids.pop(session, 0)
        fresh = [event for event in snapshot.events if event.id > last_id]
        self._last_ids[session] = fresh[-1].id if fresh else last_id
        if len(self._last_ids) > REMEMBERED_SESSIONS:
            del self._last_ids[next(iter(self._last_ids))]
        if not fresh:
            return
        unix_s = self._unix_s()
        with self._change:
            for event in fresh:
                if event.kind in MARKED_KINDS:
                    time_ms = round(1e3 * (unix_s - (now_s - event.time_s)))
                    self._queue.append((time_ms, [TAG, event.kind, info.model, info.gpu], event.text))
            while len(self._queue) > self._length:
                self._queue.popleft()
                self.counts.dropped["queue_full"] += 1
            self._change.notify()

    def close(self) -> None:
        """Stop sending; queued events are dropped and counted. Returns at once: a running call ends with the process."""
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
                time_ms, tags, event_text = self._queue.popleft()
            try:
                self._grafana.annotate(time_ms, tags, event_text)
                self.counts.sent += 1
                self._failed = False
            except Exception as error:
                self.counts.dropped["refused"] += 1
                if not self._failed:
                    # The text of any other error might contain the token.
                    text = str(error) if isinstance(error, GrafanaError) else type(error).__name__
                    log.warning("annotations: %s; further failures are only counted", text)
                self._failed = True


def read_token(path: Path, name: str) -> str:
    """Read a token file. name: the option or setting that names it. Raises BadInput."""
    try:
        token = regular_file.read_token(path, LARGEST_TOKEN_FILE).decode().strip()
    except PermissionError as error:
        raise BadInput(f"{name}: '{path}': {error.strerror}") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: '{path}': cannot be read; must be a file with a token") from error
    if not token or not token.isascii() or len(token.split()) != 1:
        raise BadInput(f"{name}: '{path}': no token in it; must be one line of text")
    return token


def summary(findings: Iterable[Finding], pushed: bool) -> list[str]:
    """Return one line for each dashboard."""
    words = {"missing": "created", "different": "updated", "current": "unchanged"} if pushed else {}
    return [f"{finding.uid}: {words.get(finding.state, finding.state)}" for finding in findings]
