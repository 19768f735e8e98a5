"""The models that ship, on the prompts that ship."""

import pytest
import torch

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.engines.embedded.decoder import Decoder
from adaptive_spec.engines.embedded.lossless import LosslessCheck, greedy_alone
from adaptive_spec.engines.embedded.models import MAX_BATCH, MAX_K, Models, engine_info, load_models
from adaptive_spec.engines.embedded.quantised import WEIGHT_BITS
from adaptive_spec.engines.embedded.requests import Request
from adaptive_spec.engines.embedded.weights import load_prompts
from adaptive_spec.engines.torch_device import device_name
from adaptive_spec.errors import BadInput
from tests.engines.embedded.scripted_tap import RecordingTap


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models()


def test_the_draft_is_visibly_better_on_code_and_the_output_is_the_targets_own(models: Models) -> None:
    accepted: dict[str, float] = {}
    check = LosslessCheck()
    for kind, prompts in load_prompts().items():
        tap = RecordingTap(2)
        decoder = Decoder(models.target, models.draft, tap)
        for i, prompt in enumerate(prompts[::4]):
            decoder.submit(Request(i, prompt, 40, kind=kind))
        while not decoder.idle:
            decoder.step(MAX_BATCH)
        verified = sum(int((r.verify_len > 0).sum()) for r in tap.records)
        accepted[kind] = sum(int((r.accept_len > 0).sum()) for r in tap.records) / verified
        for request in decoder.finished[:2]:
            check.check(models.target, request)
    assert accepted["code"] > accepted["prose"] + 0.03
    assert accepted["code"] > 0.6
    assert (check.equal, check.checked) == (4, 4)


def test_the_bounds_that_make_attention_exact_hold_with_room(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    products, largest = [], []
    mix = models.target._mix

    def measured(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        products.append(float(q.norm(dim=-1).max() * keys.norm(dim=-1).max()))
        largest.append(float(values.abs().max()))
        return mix(q, keys, values, bias)

    monkeypatch.setattr(models.target, "_mix", measured)
    for prompts in load_prompts().values():
        greedy_alone(models.target, b"\n".join(prompts)[:300], 1)
    assert max(products) < 2**24 / 2  # in units: any partial sum of q @ k is exact
    assert max(largest) * 2**WEIGHT_BITS < 2**24 / 1.5  # any partial sum of weights @ values is exact


def test_the_engine_describes_itself(models: Models) -> None:
    info = engine_info(models)
    assert EngineInfo.from_json(info.to_json()) == info
    assert info.model == "byte-4.8m"
    assert info.candidates == tuple(range(MAX_K + 1))
    assert info.gpu == device_name(torch.device("cpu"))
    assert 0 < len(info.gpu) < 40
    assert info.holds_batch


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_bad_input() -> None:
    with pytest.raises(BadInput, match="device cuda"):
        load_models("cuda")
