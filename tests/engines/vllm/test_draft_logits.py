"""Confidences from a drafting's logits, kept until its end or looked at one by one: the same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaptive_spec.engines.common import host_probabilities
from adaptive_spec.engines.vllm import draft_logits
from adaptive_spec.engines.vllm.draft_logits import DraftLogits

ROWS, K, VOCABULARY = 3, 4, 50


@pytest.fixture(params=["by numpy", "kept", "one by one"])
def drafting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DraftLogits:
    if request.param != "by numpy":
        monkeypatch.setattr(host_probabilities, "FEW_ELEMENTS", 0)
    if request.param == "one by one":
        monkeypatch.setattr(draft_logits, "HELD_ELEMENTS", 0)
    found = DraftLogits(torch.device("cpu"))
    found.listen()
    return found


def logits(rows: int, positions: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 10 + positions)
    return [3.0 * torch.randn(rows, VOCABULARY, generator=generator) for _ in range(positions)]


def expected(found: list[Tensor]) -> Tensor:
    return torch.stack([torch.softmax(one, dim=-1).amax(dim=-1) for one in found], dim=1)


def test_position_by_position(drafting: DraftLogits) -> None:
    drafts = logits(ROWS, K)
    assert not drafting.seeing
    for one in drafts:
        drafting.look(one)
        assert drafting.seeing
    taken = drafting.take(ROWS)
    assert taken is not None
    values = taken.ready()
    assert values is not None
    assert values.tolist() == pytest.approx(expected(drafts).numpy(), abs=1e-6)
    assert not drafting.listening
    assert drafting.take(ROWS) is None, "they are given out once"


def test_all_positions_at_once_are_request_by_request(drafting: DraftLogits) -> None:
    [drafts] = logits(ROWS * K, 1)
    drafting.look(drafts)
    taken = drafting.take(ROWS)
    assert taken is not None
    assert taken.ready() == pytest.approx(expected([drafts]).reshape(ROWS, K).numpy(), abs=1e-6)


@pytest.mark.parametrize("rows", [(ROWS, ROWS + 1), (ROWS + 1,), (2 * ROWS, 2 * ROWS)])
def test_what_does_not_fit_the_requests_is_no_confidence(drafting: DraftLogits, rows: tuple[int, ...]) -> None:
    for number in rows:
        drafting.look(logits(number, 1)[0])
    assert drafting.take(ROWS) is None


def test_a_row_without_a_softmax_is_unknown(drafting: DraftLogits) -> None:
    drafts = logits(ROWS, 2)
    drafts[1][0] = float("nan")
    for one in drafts:
        drafting.look(one)
    taken = drafting.take(ROWS)
    assert taken is not None
    values = taken.ready()
    assert values is not None
    assert values[0, 1] == 0.0
    assert (values[1:] > 0.0).all()
