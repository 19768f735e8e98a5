"""The probability of the most likely token: PyTorch's operators here, the Triton kernels in their interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaptive_spec.engines.common import max_probability as module
from adaptive_spec.engines.common.max_probability import UNKNOWN, max_probability


def test_it_is_the_softmax_maximum_in_the_shape_of_the_rows() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 100, dtype=torch.float64)
    wanted = torch.softmax(logits, dim=-1).amax(dim=-1)
    torch.testing.assert_close(max_probability(logits).double(), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(max_probability(logits.transpose(0, 1)).double(), wanted.T, atol=1e-6, rtol=1e-5)
    assert max_probability(torch.full((2, 7), -1e9)).tolist() == pytest.approx([1 / 7, 1 / 7])
    assert max_probability(torch.tensor([1000.0, 0.0]).half()).item() == 1.0
    assert max_probability(torch.zeros(0, 4, 9)).shape == (0, 4)


def test_a_row_without_a_softmax_is_unknown() -> None:
    logits = torch.zeros(5, 4)
    logits[1, 2], logits[2], logits[3, 0], logits[4, 1:] = torch.nan, -torch.inf, torch.inf, -torch.inf
    assert max_probability(logits).tolist() == [0.25, UNKNOWN, UNKNOWN, UNKNOWN, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_inputs_are_handled_in_groups_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(23, 50).to(dtype)
    logits[4, 4], logits[22] = torch.nan, -torch.inf
    at_once = max_probability(logits)
    monkeypatch.setattr(module, "GROUP_ELEMENTS", 120)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    seen: list[int] = []
    softmax = torch.softmax

    def counted(rows: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append(len(rows))
        return softmax(rows, **kwargs)

    monkeypatch.setattr(torch, "softmax", counted)
    assert torch.equal(max_probability(logits), at_once)
    assert seen == [2] * 11 + [1]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    checks = Path(__file__).with_name("max_probability_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


class Rows:
    """As much of logits on a GPU as is looked at before the kernel runs."""

    device, dtype, shape = torch.device("cuda", 0), torch.float16, (3, 100)

    def stride(self, dimension: int) -> int:
        return (100, 1)[dimension]

    def data_ptr(self) -> int:
        return 1 << 20


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A kernel that is a function of the test's, on a device there is not. capturing: a graph is being captured."""
    state = SimpleNamespace(capturing=False, error=None, calls=0)

    def run(rows: Any) -> str:
        state.calls += 1
        if state.error is not None:
            raise state.error
        return "by the kernel"

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    name = "adaptive_spec.engines.common.max_probability_kernel"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(split_max_probability=run))
    return state


def test_nothing_is_compiled_while_a_graph_is_captured(kernel: SimpleNamespace) -> None:
    kernels, rows = module._Kernel(), Rows()
    kernel.capturing = True
    assert kernels.of(rows) is None  # type: ignore[arg-type]  # a stand-in
    kernel.capturing = False
    assert kernels.of(rows) == "by the kernel"  # type: ignore[arg-type]  # as above
    kernel.capturing = True
    assert kernels.of(rows) == "by the kernel"  # type: ignore[arg-type]  # as above
    rows.dtype = torch.bfloat16
    assert kernels.of(rows) is None, "another type of logits is another kernel"  # type: ignore[arg-type]  # as above
    assert kernel.calls == 2


def test_a_kernel_that_fails_is_not_tried_again(kernel: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    kernels = module._Kernel()
    kernel.error = RuntimeError("no C compiler")
    assert kernels.of(Rows()) is None  # type: ignore[arg-type]  # a stand-in
    kernel.error = None
    assert kernels.of(Rows()) is None  # type: ignore[arg-type]  # as above
    assert kernel.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "adaptive-spec: no Triton kernel for confidences, PyTorch is used: no C compiler"
    ]
