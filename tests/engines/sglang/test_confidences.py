"""Confidences out of logits, and their way through static buffers and pinned memory, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive_spec.engines.common.host_probabilities import FEW_ELEMENTS, few_max_probabilities
from adaptive_spec.engines.common.pinned_ring import PinnedRing
from adaptive_spec.engines.common.steps_in_flight import MOST_OPEN
from adaptive_spec.engines.sglang.confidences import (
    ConfidenceTap,
    LogitConfidences,
    LogitsTap,
    StaticBuffers,
)


def _output(logits: Tensor) -> Any:
    return SimpleNamespace(next_token_logits=logits)


class Runner:
    """A draft model runner that gives out what a test lays in."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def forward(self, batch: object) -> Any:
        return SimpleNamespace(logits_output=self.outputs.pop(0))


def test_chain_of_a_step_comes_in_order() -> None:
    torch.manual_seed(0)
    runner, logits = Runner(), [torch.randn(2, 50) for _ in range(3)]
    worker = SimpleNamespace(draft_runner=runner, speculative_num_steps=4, cuda_graph_runner_for_draft_extend=None)
    tap = ConfidenceTap(worker, 8, 5, torch.device("cpu"))
    runner.outputs = [_output(x) for x in logits]
    tap.before_draft_forward()
    for _ in logits:
        runner.forward(object())
    tap.after_draft_forward()
    first = torch.tensor([[0.25], [0.5]])
    values = tap.after_draft(first, 4).ready()
    assert values is not None
    assert values.shape == (2, 4)
    assert values[:, 0].tolist() == [0.25, 0.5]
    for column, x in enumerate(logits, start=1):
        np.testing.assert_allclose(values[:, column], torch.softmax(x, -1).max(-1).values, rtol=1e-6)
    worker.speculative_num_steps = 1
    tap.before_draft_forward()
    tap.after_draft_forward()
    values = tap.after_draft(first, 1).ready()
    assert values is not None
    assert values.tolist() == [[0.25], [0.5]], "K = 1 drafts without a forward"
    worker.speculative_num_steps = 3
    tap.before_draft_forward()
    with pytest.raises(ValueError, match="0 draft forwards for K = 3"):
        tap.after_draft_forward()


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("forwards", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_few_logits_have_the_same_confidences_by_numpy(rows: int, forwards: int, scale: float) -> None:
    torch.manual_seed(1)
    logits = [torch.randn(rows, 60) * scale for _ in range(forwards)]
    before = [x.clone() for x in logits]
    found = few_max_probabilities(logits)
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch.cat([torch.softmax(x, -1).amax(-1) for x in logits]), rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(logits, before, strict=True)), "the server's logits stay as they were"


@pytest.mark.parametrize(
    "logits",
    [torch.full((2, 5), np.nan), torch.full((1, 5), -np.inf), torch.zeros(1, 5).bfloat16(), torch.zeros(2, FEW_ELEMENTS)],
)
def test_other_logits_are_left_to_pytorch(logits: Tensor) -> None:
    """Rows without a softmax, which must become unknown and not a warning; other types; many."""
    assert few_max_probabilities([logits]) is None


def test_first_position_travels_in_topk_p() -> None:
    runner = Runner()
    worker = SimpleNamespace(draft_runner=runner, speculative_num_steps=3, cuda_graph_runner_for_draft_extend=None)
    tap = ConfidenceTap(worker, 8, 5, torch.device("cpu"))
    whole, rows = torch.randn(8, 50), torch.tensor([1, 6])
    output = _output(whole)
    runner.outputs = [output]
    tap.before_extend()
    runner.forward(object())
    output.next_token_logits = whole[rows]  # SGLang re-binds the output to the selected rows
    following = SimpleNamespace(topk_p=torch.ones(2, 1))
    tap.after_extend(following)
    torch.testing.assert_close(following.topk_p.reshape(-1), torch.softmax(whole[rows], -1).max(-1).values)
    tap.before_extend()
    stub = torch.zeros(2, 1)
    following = SimpleNamespace(topk_p=stub)
    tap.after_extend(following)
    assert following.topk_p is stub, "draft-extend was skipped"


def test_first_position_of_a_replayed_graph() -> None:
    logits = torch.randn(2, 50)
    graph = SimpleNamespace(execute=lambda batch, rows: _output(logits))
    worker = SimpleNamespace(draft_runner=Runner(), speculative_num_steps=3, cuda_graph_runner_for_draft_extend=graph)
    tap = ConfidenceTap(worker, 8, 5, torch.device("cpu"))
    for _ in range(2):
        tap.before_extend()
        graph.execute(object(), object())
        following = SimpleNamespace(topk_p=torch.ones(2, 1))
        tap.after_extend(following)
        torch.testing.assert_close(following.topk_p.reshape(-1), torch.softmax(logits, -1).max(-1).values)


def test_an_unused_tap_changes_nothing() -> None:
    runner = Runner()
    tap = LogitsTap(runner, "forward")
    runner.outputs = [_output(torch.zeros(1, 2))] * 2
    assert runner.forward(object()).logits_output is not None
    assert tap.take() == []
    tap.listen(lambda result: result.no_such_field)
    assert runner.forward(object()).logits_output is not None, "what cannot be picked is SGLang's result all the same"
    assert tap.take() == [None]


class Capture:
    """A ConfidenceTap as on a GPU: static buffers, pinned copies, and one logits buffer that every forward writes into."""

    def __init__(self, k: int) -> None:
        self.buffer = torch.zeros(2, 50)
        self.runner = SimpleNamespace(forward=self._forward)
        self.worker = SimpleNamespace(draft_runner=self.runner, speculative_num_steps=k, cuda_graph_runner_for_draft_extend=None)
        self.tap = ConfidenceTap(self.worker, 8, 5, torch.device("cpu"))
        self.event = Event()
        self.tap._static = StaticBuffers(8, torch.device("cpu"))
        self.tap._ring = PinnedRing(8, 5, lambda rows, columns: torch.zeros(rows, columns), lambda: self.event)
        self.tap._static.prepare(k)

    def _forward(self, logits: Tensor) -> Any:
        self.buffer.copy_(logits)
        return SimpleNamespace(logits_output=_output(self.buffer))


def test_captured_forwards_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    capture = Capture(4)
    logits = [torch.randn(2, 50) for _ in range(3)]
    capture.tap.before_draft_forward()
    for x in logits:
        capture.runner.forward(x)
    capture.tap.after_draft_forward()
    sent = capture.tap.after_draft(torch.tensor([[0.25], [0.5]]), 4)
    assert sent.ready() is None
    capture.event.done = True
    values = sent.ready()
    assert values is not None
    assert values[:, 0].tolist() == [0.25, 0.5]
    for column, x in enumerate(logits, start=1):
        np.testing.assert_allclose(values[:, column], torch.softmax(x, -1).max(-1).values, rtol=1e-6)


def test_static_buffers_keep_their_address() -> None:
    buffers = StaticBuffers(8, torch.device("cpu"))
    for k in (1, 3, 5):
        buffers.prepare(k)
    assert buffers.of(1, 4) is None
    view = buffers.of(5, 8)
    assert view is not None
    address = view.data_ptr()
    for value in (0.25, 0.75):
        buffers.store(5, torch.full((6, 4), value))
        buffers.prepare(5)
        now = buffers.of(5, 6)
        assert now is not None
        assert now.data_ptr() == address, "a graph would write here"
        assert (now == value).all()
    other = buffers.of(3, 8)
    assert other is not None
    assert (other == 0).all()
    with pytest.raises(KeyError):
        buffers.store(7, torch.zeros(2, 6))


class Event:
    """Done when the test says so."""

    done = False

    def record(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


def test_pinned_copies_are_taken_over_before_their_slot_is_used_again() -> None:
    events: list[Event] = []

    def new_event() -> Event:
        events.append(Event())
        return events[-1]

    ring = PinnedRing(4, 5, lambda rows, columns: torch.zeros(rows, columns), new_event)
    assert len(events) > MOST_OPEN, "every step the book keeps open has a slot of its own"
    sent = [ring.send(torch.full((2, 3), i / 10)) for i in range(MOST_OPEN)]
    assert all(one.ready() is None for one in sent)
    for event in events:
        event.done = True
    first = sent[0].ready()
    assert first is not None
    again = [ring.send(torch.full((1, 1), 9.0)) for _ in range(3 * MOST_OPEN)]
    assert again
    assert first.tolist() == [[0.0, 0.0, 0.0]] * 2
    last = sent[0].ready()
    assert last is first


def test_a_copy_is_contiguous_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not, PyTorch copies from a GPU through pageable memory, waiting for it."""
    copies: list[tuple[Tensor, Tensor]] = []
    copy = Tensor.copy_

    def watched(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert non_blocking
        copies.append((target, source))
        return copy(target, source)

    ring = PinnedRing(4, 5, lambda rows, columns: torch.zeros(rows, columns), Event)
    monkeypatch.setattr(Tensor, "copy_", watched)
    values = torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4).t()[:3]
    sent = ring.send(values)
    assert [(a.is_contiguous(), b.is_contiguous(), a.dtype == b.dtype) for a, b in copies] == [(True, True, True)]
    ring._slots[0][1].done = True
    found = sent.ready()
    assert found is not None
    assert found.tolist() == values.tolist()


def test_logits_become_confidences_under_fixed_temperatures() -> None:
    temperatures = np.array([1.0, 2.0, 0.5])
    tap = LogitConfidences(temperatures, 4, 3, torch.device("cpu"))
    logits = torch.tensor([[0.0, 1.0, -1.0], [1000.0, -1000.0, float("nan")]], dtype=torch.bfloat16)
    wanted = torch.sigmoid(logits[0].double() / torch.from_numpy(temperatures))
    sent = tap.send(logits)
    logits.zero_()  # SGLang's buffer of the next step
    found = sent.ready()
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)
    assert 0.999 < found[1, 0] < 1.0
    assert 0.0 < found[1, 1] < 0.001
    assert np.isnan(found[1, 2]), "unknown stays unknown"
    one = LogitConfidences(np.ones(()), 4, 3, torch.device("cpu")).send(torch.ones(1, 3)).ready()
    assert one is not None
    assert one.shape == (1, 3)


def test_logits_on_their_way_are_not_known_yet() -> None:
    tap, event = LogitConfidences(np.ones(3), 4, 3, torch.device("cpu")), Event()
    tap._ring = PinnedRing(4, 3, lambda rows, columns: torch.zeros(rows, columns), lambda: event)
    sent = tap.send(torch.zeros(2, 3))
    assert sent.ready() is None
    event.done = True
    found = sent.ready()
    assert found is not None
    assert found.tolist() == [[0.5] * 3] * 2
