"""A real HTTP server that speaks the routes of Grafana's API we use, with what can go wrong on the way."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any, Self

TOKEN = "glsa_real-token_0123456789"


class GrafanaServer:
    """Folders, dashboards and annotations in memory, under /grafana/api; `requests` holds (method, path, body) in order.

    failures: so many of the next requests get status 500. status: all requests get it. hangs: requests wait until the end.
    token: the one it takes. folder_made_meanwhile: uid of a folder that somebody else creates just before ours, answered with
    folder_conflict. html: a page in place of JSON, like a login page of something else.
    """

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.annotations: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.token = TOKEN
        self.folder_made_meanwhile = ""
        self.folder_conflict = 409
        self.failures = self.status = 0
        self.hangs = self.html = False
        self.over = threading.Event()
        grafana = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                grafana._answer(self, None)

            def do_POST(self) -> None:
                grafana._answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/grafana"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def writes(self) -> list[str]:
        return [path for method, path, _ in self.requests if method == "POST"]

    def _answer(self, handler: http.server.BaseHTTPRequestHandler, body: Any) -> None:
        self.requests.append((handler.command, handler.path, body))
        if self.hangs:
            self.over.wait(60.0)
            return
        if self.html:
            self._send(handler, 200, b"<html>log in</html>", "text/html")
            return
        status, document = self._carry_out(handler, body)
        self._send(handler, status, json.dumps(document).encode(), "application/json")

    def _carry_out(self, handler: http.server.BaseHTTPRequestHandler, body: Any) -> tuple[int, Any]:
        if self.failures:
            self.failures -= 1
            return 500, {"message": "database is locked"}
        if self.status:
            return self.status, {"message": "told so"}
        if handler.headers.get("Authorization") != f"Bearer {self.token}":
            # As Grafana does not, a careless proxy may: the header comes back in the answer.
            return 401, {"message": f"invalid API key {handler.headers.get('Authorization')}"}
        path = handler.path.removeprefix("/grafana/api")
        if path == handler.path:
            return 404, {"message": "Not found"}
        if handler.command == "GET" and path.startswith("/folders/"):
            uid = path.rpartition("/")[2]
            return (200, {"uid": uid, "title": self.folders[uid]}) if uid in self.folders else (404, {"message": "no folder"})
        if path == "/folders":
            if handler.command == "GET":
                return 200, [{"uid": uid, "title": title} for uid, title in self.folders.items()]
            if self.folder_made_meanwhile:
                self.folders[self.folder_made_meanwhile] = body["title"]
            if body["title"] in self.folders.values() or body["uid"] in self.folders:
                return self.folder_conflict, {"message": "a folder with the same name already exists", "status": "name-exists"}
            self.folders[body["uid"]] = body["title"]
            return 200, body
        if handler.command == "GET" and path.startswith("/dashboards/uid/"):
            found = self.dashboards.get(path.rpartition("/")[2])
            return (200, {"dashboard": found, "meta": {}}) if found else (404, {"message": "Dashboard not found"})
        if path == "/dashboards/db":
            return self._save(body)
        if path == "/annotations":
            self.annotations.append(body)
            return 200, {"message": "Annotation added", "id": len(self.annotations)}
        return 404, {"message": "Not found"}

    def _save(self, body: Any) -> tuple[int, Any]:
        dashboard = dict(body["dashboard"])
        before = self.dashboards.get(dashboard["uid"])
        if any(d["title"] == dashboard["title"] and d["uid"] != dashboard["uid"] for d in self.dashboards.values()):
            return 412, {"message": "A dashboard with the same name in the folder already exists", "status": "name-exists"}
        if before and not body["overwrite"]:
            return 412, {"message": "The dashboard has been changed by someone else", "status": "version-mismatch"}
        if body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        version = before["version"] + 1 if before else 1
        dashboard |= {"id": 40 + len(self.dashboards), "version": version}
        self.dashboards[dashboard["uid"]] = dashboard
        return 200, {"uid": dashboard["uid"], "version": version, "status": "success"}

    @staticmethod
    def _send(handler: http.server.BaseHTTPRequestHandler, status: int, data: bytes, kind: str) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
