"""The status page in Chromium, of a sidecar process with a synthetic engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect
from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.control.counters import Event
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.sidecar.http_server import WebServer
from adaptive_spec.sidecar.view import CurrentView, View
from tests.sidecar.test_metrics import SNAPSHOT
from tests.sidecar.test_process import RunningEngine
from tests.support.browser import Watched, chromium, needs_chromium, watched
from tests.support.numbers_engine import engine_info
from tests.support.processes import SidecarProcess, wait_for

pytestmark = needs_chromium
Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def runtime_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "run"


@pytest.fixture(scope="module")
def engine(runtime_dir: Path) -> Iterator[RunningEngine]:
    engine = RunningEngine(runtime_dir)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def sidecar(runtime_dir: Path, engine: RunningEngine) -> Iterator[SidecarProcess]:
    with SidecarProcess(runtime_dir, runtime_dir.parent / "profiles") as sidecar:
        with engine.paused():  # a record overwritten before the sidecar attaches would be counted nowhere
            sidecar.wait_status(lambda status: status["engine_attached"], "the sidecar to attach")
        sidecar.wait_status(lambda status: status["mode"] == "active" and status["measured_gain"] is not None, "the sweep to end")
        yield sidecar


@pytest.fixture
def page(browser: Browser, sidecar: SidecarProcess) -> Iterator[Watched]:
    with watched(browser, sidecar.url) as page:
        expect(page.page.locator("#mode")).not_to_have_text("…")
        yield page
    assert page.errors == []


def _samples(sidecar: SidecarProcess) -> Samples:
    """Return values by metric name and the one label that is not constant."""
    constant = {"model", "gpu", "tp"}
    found = {}
    for family in text_string_to_metric_families(sidecar.get("/metrics")):
        for sample in family.samples:
            own = [value for label, value in sample.labels.items() if label not in constant]
            found[sample.name.removeprefix("adaptive_spec_"), own[0] if len(own) == 1 else ""] = sample.value
    return found


def _by_label(samples: Samples, name: str) -> dict[str, float]:
    return {label: value for (metric, label), value in samples.items() if metric == name}


def test_values_are_those_of_the_metrics(sidecar: SidecarProcess, engine: RunningEngine, page: Watched) -> None:
    with engine.paused():

        def all_read(status: dict[str, Any]) -> bool:
            return bool(status["decode_steps"] + status["dropped"].get("lost", 0) == engine.engine.steps)

        steps = sidecar.wait_status(all_read, "the last record")["decode_steps"]
        time.sleep(1.0)  # the gains and the curve follow with the next refit
        expect(page.page.locator("#steps")).to_have_text(f"{steps:,}")
        page.page.wait_for_timeout(1500)  # and the page with its next update
        m = _samples(sidecar)
        text = page.text
        modes = [mode for mode, on in _by_label(m, "mode").items() if on]
        assert [text("#mode")] == modes
        cells = page.page.eval_on_selector_all(
            "#k > button", "cells => cells.map(c => [c.dataset.from, c.dataset.to, c.dataset.k])"
        )
        shown = {str(b): float(k) for first, last, k in cells for b in range(int(first), int(last) + 1)}
        assert shown == _by_label(m, "policy_draft_tokens")
        batch = m["batch_size_requests", ""]
        assert text("#k-now") == f"K {shown[f'{batch:.0f}']:.0f}"
        assert text("#k-now-words") == f"at batch size {batch:.0f}"
        assert page.page.locator("#k > .now").count() == 1
        assert text("#goodput") == f"{m['goodput_tokens_per_second', '']:,.0f}"
        assert text("#gain") == f"{100 * m['policy_measured_gain_ratio', '']:+.1f} %"
        accepted, verified = _by_label(m, "accepted_tokens_total"), _by_label(m, "verified_tokens_total")
        assert text("#accepted") == f"{sum(accepted.values()) / sum(verified.values()):.2f}"
        assert text("#ece") == f"{m['calibration_error_ratio', '']:.3f}"
        assert text("#drift") == f"{m['drift_events_total', 'latency']:.0f}, {m['drift_events_total', 'calibration']:.0f}"
        assert text("#version") == f"{m['policy_version', '']:,.0f}"
        assert text("#steps") == f"{m['decode_steps_total', '']:,.0f}"
        tokens, ratios = _by_label(m, "tile_boundary_tokens"), _by_label(m, "tile_jump_ratio")
        words = [f"{tokens[i]:.0f} (\u00d7{ratios[i]:.2f})" for i in sorted(tokens, key=int)]
        assert len(words) >= 3
        assert text("#boundaries") == f"tile boundaries in tokens (latency jump): {', '.join(words)}"


def test_page_loads_nothing_from_elsewhere(sidecar: SidecarProcess, page: Watched) -> None:
    page.page.wait_for_selector("#goodput-plot canvas")
    assert {urlsplit(url).netloc for url in page.asked} == {urlsplit(sidecar.url).netloc}
    assert any(url.endswith("/vendor/uPlot.iife.min.js") for url in page.asked)


@pytest.mark.parametrize("plot", ["staircase", "reliability", "goodput-plot"])
def test_plots_are_drawn(page: Watched, plot: str) -> None:
    page.page.wait_for_selector(f"#{plot} canvas")
    drawn = """([id, wanted]) => {
        const canvas = document.querySelector(`#${id} canvas`);
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const seen = new Map();
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) {
            const colour = data.slice(i, i + 3).join();
            seen.set(colour, (seen.get(colour) || 0) + 1);
        }
        return wanted.every((colour) => seen.get(colour) > 40);
    }"""
    ink, blue, red = "27,31,36", "31,111,180", "198,40,40"
    # Fit and boundaries; calibrated and observed; goodput, once there are some points.
    wanted = {"staircase": [ink, red], "reliability": [ink, blue], "goodput-plot": [blue]}
    page.page.wait_for_function(drawn, arg=[plot, wanted[plot]])


def test_buttons(sidecar: SidecarProcess, engine: RunningEngine, runtime_dir: Path, page: Watched) -> None:
    token = (runtime_dir / "control.token").read_text().strip()
    page.page.fill("#token", token)
    for button, k, words in (("Pin K", "3", "pin: done, mode pinned"), ("Pause", None, "pause: done, mode paused")):
        if k is not None:
            page.page.select_option("#pin-k", k)
        page.page.click(f"text='{button}'")
        expect(page.page.locator("#said")).to_have_text(words)
        mode = words.rsplit(" ", 1)[1]
        assert _samples(sidecar)["mode", mode] == 1
        expect(page.page.locator("#mode")).to_have_text(mode)
    assert set(_by_label(_samples(sidecar), "policy_draft_tokens").values()) == {3.0}, "the pinned K stays while paused"
    assert engine.engine.tap.begun.k == 3
    page.page.reload()
    expect(page.page.locator("#token")).to_have_value(token)
    page.page.click("text='Resume'")
    expect(page.page.locator("#said")).to_have_text("resume: done, mode pinned")
    page.page.click("text='Unpin'")
    expect(page.page.locator("#said")).to_have_text("unpin: done, mode active")
    assert _samples(sidecar)["mode", "active"] == 1
    texts = page.page.eval_on_selector_all("#events li", "items => items.map(i => i.innerText)")
    assert any("pinned → paused" in text for text in texts)


def test_bad_token_is_refused(sidecar: SidecarProcess, browser: Browser) -> None:
    assert _samples(sidecar)["mode", "active"] == 1
    with watched(browser, sidecar.url) as page:
        expect(page.page.locator("#mode")).to_have_text("active")
        page.page.click("text='Pause'")
        expect(page.page.locator("#said")).to_contain_text("Enter the control token")
        page.page.fill("#token", "é è")
        page.page.click("text='Pause'")
        expect(page.page.locator("#said")).to_contain_text("must be ASCII characters")
        assert page.errors == []
        assert not any(url.endswith("/control") for url in page.asked)
        page.page.fill("#token", "wrong")
        page.page.click("text='Pause'")
        expect(page.page.locator("#said")).to_have_text(
            "pause: refused: wrong token: it must be the one in the sidecar's token file"
        )
        assert page.page.evaluate("sessionStorage.length") == 0
        assert len(page.errors) == 1, page.errors
        assert "403" in page.errors[0], "Chromium's message about the answer"
    assert _samples(sidecar)["mode", "active"] == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(sidecar: SidecarProcess, browser: Browser, scheme: Literal["light", "dark"]) -> None:
    with watched(browser, sidecar.url, scheme, 360, 740, device_scale_factor=2, is_mobile=True, has_touch=True) as page:
        page.page.wait_for_selector("#goodput-plot canvas")
        assert page.page.evaluate("document.documentElement.scrollWidth") == 360, "no horizontal scrolling"
        background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(247, 248, 250)", "dark": "rgb(16, 20, 24)"}[scheme]
        for plot in ("staircase", "reliability", "goodput-plot"):
            box = page.page.locator(f"#{plot} canvas").bounding_box()
            assert box is not None
            assert 250 < box["width"] <= 330
        assert page.errors == []


def _current_view(info: EngineInfo, *events: Event) -> CurrentView:
    current_view = CurrentView(time.monotonic())
    current_view.view = View(time.monotonic(), replace(SNAPSHOT, events=events), info, True)
    return current_view


def test_nothing_from_outside_becomes_markup(browser: Browser) -> None:
    nasty = "<img src=x onerror=alert(1)>"
    server = WebServer(_current_view(engine_info(nasty), Event(time.monotonic(), "swap", f"K 2→3: {nasty}")), "127.0.0.1", 0, "t")
    try:
        with watched(browser, server.url) as page:
            expect(page.page.locator("#engine")).to_contain_text(nasty)
            expect(page.page.locator("#events li")).to_contain_text(nasty)
            assert page.page.locator("img").count() == 0
            assert page.errors == []
    finally:
        server.close()


def test_before_an_engine_and_when_the_sidecar_dies(browser: Browser) -> None:
    server = WebServer(CurrentView(time.monotonic()), "127.0.0.1", 0, "t")
    with watched(browser, server.url) as page:
        expect(page.page.locator("#reason")).to_have_text("waiting for an engine")
        expect(page.page.locator("#boundaries")).to_have_text("no tile boundaries yet")
        assert page.page.is_disabled("text='Pause'")
        assert page.errors == []
        server.close()
        expect(page.page.locator("#mode")).to_have_text("no answer")
        assert page.page.locator("body.stale").count() == 1
        assert page.errors
        assert all("ERR_" in error for error in page.errors), "only Chromium's messages about the connection"


def test_history_grows(sidecar: SidecarProcess) -> None:
    def long_enough() -> dict[str, list[float | None]] | None:
        history: dict[str, list[float | None]] = json.loads(sidecar.get("/history.json"))
        return history if len(history["age_s"]) > 1 and history["goodput_tokens_per_s"][-1] else None

    history = wait_for(long_enough, "two points")
    ages = history["age_s"]
    assert ages == sorted(ages, reverse=True)
    assert len({len(column) for name, column in history.items() if name != "interval_s"}) == 1
    assert history["batch_size"][-1] == 2


def test_a_click_on_a_batch_size_shows_why_it_has_its_k(page: Watched, sidecar: SidecarProcess) -> None:
    expect(page.page.locator("#explain")).to_be_hidden()
    cell = page.page.locator("#k button.now")
    cell.click()
    expect(page.page.locator("#explain-title")).to_contain_text("Why this K at batch size")
    document = json.loads(sidecar.get("/explain.json"))
    expect(page.page.locator("#explain-plans tr.now td").first).to_have_text(str(document["k"]))
    expect(page.page.locator("#explain-plans tr")).to_have_count(1 + len(document["plans"]))
    page.page.locator("#explain-close").click()
    expect(page.page.locator("#explain")).to_be_hidden()
