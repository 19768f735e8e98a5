from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.config.settings import GrafanaSettings
from adaptive_spec.control.counters import Event
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.grafana import Annotator, Grafana, GrafanaError, check_dashboards, push_dashboards, shipped_dashboards
from tests.sidecar.test_metrics import SNAPSHOT
from tests.support.grafana_server import TOKEN, GrafanaServer
from tests.support.numbers_engine import NumbersEngine, engine_info
from tests.support.processes import SidecarProcess, assert_one_line, run_cli, wait_for


@pytest.fixture
def server() -> Iterator[GrafanaServer]:
    with GrafanaServer() as server:
        yield server


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


def client(server: GrafanaServer, token: str = TOKEN, **options: float) -> Grafana:
    return Grafana(server.url, token, timeout_s=options.get("timeout_s", 5.0), sleep=lambda _: None)


def dashboards(command: str, server: GrafanaServer, token_file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_cli("dashboards", command, "--grafana-url", server.url, "--token-file", token_file, *more)


# -- dashboards --------------------------------------------------------------------------------------------------------


def test_push_is_idempotent_and_check_agrees(server: GrafanaServer, token_file: Path) -> None:
    before = dashboards("check", server, token_file)
    assert before.returncode == 1
    assert before.stdout.splitlines() == [f"adaptive-spec-{n}: missing" for n in ("calibration", "health", "latency", "overview")]
    assert server.writes() == [], "check writes nothing"

    first = dashboards("push", server, token_file, "--folder", "Inference")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == [f"adaptive-spec-{n}: created" for n in ("calibration", "health", "latency", "overview")]
    assert server.folders == {"adaptive-spec": "Inference"}
    assert set(server.dashboards) == {d["uid"] for d in shipped_dashboards().values()}

    written = len(server.writes())
    again = dashboards("push", server, token_file, "--folder", "Inference")
    assert again.returncode == 0
    assert again.stdout.splitlines() == [line.replace("created", "unchanged") for line in first.stdout.splitlines()]
    assert len(server.writes()) == written, "nothing is written a second time"
    assert dashboards("check", server, token_file).returncode == 0

    server.dashboards["adaptive-spec-overview"]["title"] = "somebody's"
    changed = dashboards("check", server, token_file)
    assert (changed.returncode, "adaptive-spec-overview: different" in changed.stdout) == (1, True)
    assert "adaptive-spec-overview: updated" in dashboards("push", server, token_file).stdout
    assert server.dashboards["adaptive-spec-overview"]["title"] == "adaptive-spec: overview"
    assert TOKEN not in first.stdout + first.stderr + again.stdout + changed.stdout


def test_what_is_written_is_what_is_shipped(server: GrafanaServer) -> None:
    push_dashboards(client(server), "adaptive-spec", "test")
    bodies = [body for method, path, body in server.requests if path.endswith("/dashboards/db")]
    assert [body["dashboard"] for body in bodies] == list(shipped_dashboards().values())
    assert all((b["folderUid"], b["overwrite"], b["message"]) == ("adaptive-spec", True, "test") for b in bodies)
    assert {f.state for f in check_dashboards(client(server))} == {"current"}


def test_a_wrong_token_is_reported_but_not_shown(server: GrafanaServer, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("glsa_wrong-secret")
    wrong.chmod(0o600)
    result = dashboards("push", server, wrong)
    assert_one_line(result, server.url, "cannot read the folder", "401", "service account")
    assert "wrong-secret" not in result.stderr


@pytest.mark.parametrize(("status", "words"), [(403, "role Editor"), (404, "path prefix"), (418, "told so")])
def test_refusals_are_not_retried(server: GrafanaServer, status: int, words: str) -> None:
    server.status = status
    with pytest.raises(GrafanaError, match=words):
        client(server).annotate(0, [], "")
    assert len(server.requests) == 1


def test_a_folder_is_found_by_its_title_too(server: GrafanaServer) -> None:
    server.folders["made-by-hand"] = "Inference"
    push_dashboards(client(server), "Inference", "test")
    assert server.folders == {"made-by-hand": "Inference"}, "no second folder of that title"
    assert {b["folderUid"] for _, path, b in server.requests if path.endswith("/dashboards/db")} == {"made-by-hand"}


@pytest.mark.parametrize("status", [409, 412])
def test_a_folder_that_somebody_creates_at_the_same_time_is_used(server: GrafanaServer, status: int) -> None:
    server.folder_made_meanwhile, server.folder_conflict = "theirs", status
    push_dashboards(client(server), "Inference", "test")
    assert {b["folderUid"] for _, path, b in server.requests if path.endswith("/dashboards/db")} == {"theirs"}


def test_a_dashboard_of_the_same_title_is_named_as_what_it_is(server: GrafanaServer, token_file: Path) -> None:
    title = shipped_dashboards()["health"]["title"]
    server.dashboards["by-hand"] = {"uid": "by-hand", "title": title}
    result = dashboards("push", server, token_file)
    assert_one_line(result, "write dashboard adaptive-spec-health", "same title (412)", "rename", "--folder")
    assert "try again" not in result.stderr


def test_a_missing_prefix_is_no_missing_dashboard(server: GrafanaServer, token_file: Path) -> None:
    """Reading tolerates 404, writing does not, so a wrong address is detected."""
    result = run_cli("dashboards", "push", "--grafana-url", server.url.removesuffix("/grafana"), "--token-file", token_file)
    assert_one_line(result, "cannot create the folder", "404", "path prefix")


def test_failures_are_retried_and_then_reported(server: GrafanaServer) -> None:
    server.failures = 2
    client(server).annotate(1, ["a"], "text")
    assert len(server.annotations) == 1
    assert len(server.requests) == 3
    server.failures = 99
    with pytest.raises(GrafanaError, match=r"cannot annotate: the server failed with status 500 \(3 attempts\)"):
        client(server).annotate(1, ["a"], "text")


def test_retries_wait_longer_each_time(server: GrafanaServer) -> None:
    pauses: list[float] = []
    server.failures = 99
    with pytest.raises(GrafanaError):
        Grafana(server.url, TOKEN, attempts=4, sleep=pauses.append).annotate(1, [], "")
    assert pauses == [0.5, 1.0, 2.0]


def test_a_hung_server(server: GrafanaServer, token_file: Path) -> None:
    server.hangs = True
    assert_one_line(dashboards("check", server, token_file, "--timeout", "0.2"), "did not answer in time (3 attempts)")


def test_no_server_at_the_address(token_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    result = run_cli("dashboards", "check", "--grafana-url", url, "--token-file", token_file)
    assert_one_line(result, url, "connection failed (3 attempts)")


def test_something_that_is_not_grafana(server: GrafanaServer, token_file: Path) -> None:
    server.html = True
    assert_one_line(dashboards("check", server, token_file), "the answer is not from Grafana")


def test_bad_input(tmp_path: Path, token_file: Path) -> None:
    for url in (
        "grafana:3000",
        "ftp://x",
        "http://",
        "http://x:99999",
        "https://admin:geheim@x/",
        "http://[::1",
        "http://\u2100",
    ):
        result = run_cli("dashboards", "push", "--grafana-url", url, "--token-file", token_file)
        assert_one_line(result, "--grafana-url", "must be")
        assert "geheim" not in result.stderr
    empty = tmp_path / "empty"
    empty.write_text("\n")
    empty.chmod(0o600)
    for path in (empty, tmp_path / "none"):
        assert_one_line(
            run_cli("dashboards", "push", "--grafana-url", "http://x", "--token-file", path), "--token-file", str(path), "must be"
        )
    assert_one_line(run_cli("dashboards", "check"), "--grafana-url")


# -- annotations -------------------------------------------------------------------------------------------------------


def test_every_swap_and_drift_event_becomes_one_annotation(server: GrafanaServer) -> None:
    events = [
        Event(100.0, "mode", "sweep → active", 1),
        Event(101.0, "swap", "K 3→5 at batch 4", 2),
        Event(102.5, "drift", "latency", 3),
    ]
    annotator = Annotator(client(server), 64, unix_s=lambda: 1_000_000.0)
    for count in (2, 2, 3, 3):
        annotator.offer(replace(SNAPSHOT, events=tuple(events[:count])), engine_info(), 103.0, 1)
    wait_for(lambda: annotator.counts.sent == 2, "two annotations")
    assert [(a["time"], a["tags"], a["text"]) for a in server.annotations] == [
        (999_998_000, ["adaptive-spec", "swap", "numbers", "cpu"], "K 3→5 at batch 4"),
        (999_999_500, ["adaptive-spec", "drift", "numbers", "cpu"], "latency"),
    ]
    annotator.close()
    assert annotator.counts.dropped.total() == 0


def test_a_slow_grafana_does_not_block_and_drops_are_counted(server: GrafanaServer) -> None:
    server.hangs = True
    annotator = Annotator(client(server), 3)
    events: list[Event] = []
    begun_s = time.monotonic()
    for i in range(50):
        events.append(Event(float(i), "swap", f"swap {i}", i + 1))
        annotator.offer(replace(SNAPSHOT, events=tuple(events)), engine_info(), float(i), 1)
    assert time.monotonic() - begun_s < 5.0, "offer does not wait for the server"
    assert annotator.counts.sent == 0
    assert annotator.counts.dropped["queue_full"] in (46, 47), "one is being sent, three are queued"
    annotator.close()
    assert annotator.counts.dropped["closed"] == 3
    assert time.monotonic() - begun_s < 5.0


def test_refusals_are_counted_and_logged_once(server: GrafanaServer, caplog: pytest.LogCaptureFixture) -> None:
    server.status = 401
    annotator = Annotator(client(server), 64)
    events = tuple(Event(float(i), "swap", f"swap {i}", i + 1) for i in range(5))
    annotator.offer(replace(SNAPSHOT, events=events), engine_info(), 9.0, 1)
    wait_for(lambda: annotator.counts.dropped["refused"] == 5, "five refusals")
    assert len(caplog.records) == 1
    server.status = 0
    annotator.offer(replace(SNAPSHOT, events=(*events, Event(6.0, "drift", "x", 6))), engine_info(), 9.0, 1)
    wait_for(lambda: annotator.counts.sent == 1, "the annotation after the refusals")
    annotator.close()


def test_events_of_equal_content_made_anew_for_every_view_are_sent_once(server: GrafanaServer) -> None:
    """The reasons of a swap are added to a copy of its event, a new one four times a second."""
    annotator = Annotator(client(server), 64)
    for _ in range(20):
        events = (Event(1.0, "drift", "latency", 7), Event(1.0, "swap", "K 3→5", 8))
        annotator.offer(replace(SNAPSHOT, events=events), engine_info(), 9.0, 1)
    wait_for(lambda: annotator.counts.sent == 2, "two annotations")
    annotator.offer(replace(SNAPSHOT, events=(Event(2.0, "swap", "K 5→3", 9),)), engine_info(), 9.0, 1)
    wait_for(lambda: annotator.counts.sent == 3, "the next one")
    other = replace(SNAPSHOT, events=(Event(3.0, "swap", "K 1→2", 1),))
    annotator.offer(other, engine_info(), 9.0, 2)
    wait_for(lambda: annotator.counts.sent == 4, "the one of another session")
    for session in (1, 2, 1):  # the first data-parallel rank is another one, and then the same again
        annotator.offer(replace(SNAPSHOT, events=events) if session == 1 else other, engine_info(), 9.0, session)
    annotator.offer(replace(other, events=(*other.events, Event(4.0, "swap", "K 2→3", 2))), engine_info(), 9.0, 2)
    wait_for(lambda: annotator.counts.sent == 5, "the last one")
    assert [a["text"] for a in server.annotations] == ["latency", "K 3→5", "K 5→3", "K 1→2", "K 2→3"]
    annotator.close()


def test_a_rotated_token_is_used_at_once(server: GrafanaServer, token_file: Path) -> None:
    annotator = Annotator.of(GrafanaSettings(url=server.url, token_file=token_file))
    assert annotator is not None
    annotator.offer(replace(SNAPSHOT, events=(Event(1.0, "swap", "before", 1),)), engine_info(), 9.0, 1)
    wait_for(lambda: annotator.counts.sent == 1, "the annotation with the first token")
    server.token = "glsa_next-token"
    token_file.write_text("")  # in the middle of being replaced: the token at hand is used, and refused
    annotator.offer(replace(SNAPSHOT, events=(Event(2.0, "swap", "between", 2),)), engine_info(), 9.0, 1)
    wait_for(lambda: annotator.counts.dropped["refused"] == 1, "the refusal")
    token_file.write_text("glsa_next-token\n")
    annotator.offer(replace(SNAPSHOT, events=(Event(3.0, "swap", "after", 3),)), engine_info(), 9.0, 1)
    wait_for(lambda: annotator.counts.sent == 2, "the annotation with the next token")
    annotator.close()


def test_what_a_configuration_asks_for(tmp_path: Path) -> None:
    assert Annotator.of(GrafanaSettings()) is None
    with pytest.raises(BadInput, match=r"grafana\.token_file"):
        Annotator.of(GrafanaSettings(url="http://x", token_file=tmp_path / "none"))


def test_a_sidecar_annotates(server: GrafanaServer, tmp_path: Path, token_file: Path) -> None:
    runtime_dir = tmp_path / "runtime"
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"grafana": {"url": server.url, "token_file": str(token_file)}}))
    engine = NumbersEngine(runtime_dir)
    (tmp_path / "profiles").mkdir()
    with SidecarProcess(runtime_dir, tmp_path / "profiles", "--config", str(config)) as sidecar:
        assert sidecar.url

        def swapped() -> bool:
            engine.run(0.2)
            return any("swap" in annotation["tags"] for annotation in server.annotations)

        wait_for(swapped, "the swap after the sweep")
        families = {f.name: f for f in text_string_to_metric_families(sidecar.get("/metrics"))}
        wait_for(lambda: "adaptive_spec_annotations_total" in sidecar.get("/metrics"), "the counter")
        assert "adaptive_spec_annotations_dropped" in families
        first = next(a for a in server.annotations if "swap" in a["tags"])
        assert abs(first["time"] / 1e3 - time.time()) < 60
        assert first["text"].startswith("K ")
        log = sidecar.stop()
    assert TOKEN not in log
    with SidecarProcess(runtime_dir, tmp_path / "profiles", "--config", str(config)) as sidecar:
        told = sidecar.wait_status(lambda s: s["origin"] == "checkpoint", "the restarted sidecar")["events"]
        for _ in range(10):
            engine.run(0.2)
            wait_for(lambda: sidecar.status()["loop_age_s"] < 1.0, "a living loop")
        told = sidecar.status()["events"]
        sent = [(a["time"], a["text"]) for a in server.annotations]
        assert len(sent) == len(set(sent)), "each event once, over a restart too"
        sidecar.stop()
    engine.close()
    assert all(event["id"] > 1 for event in told), "ids go on after a restart"
