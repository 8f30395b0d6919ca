"""What becomes of a job for a GPU where Triton is missing. ``tests/kernels`` tests the loops."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from pipeline.errors import QuantizationError
from pipeline.graph import convert
from pipeline.quantize import triton_kernels


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pipeline.quantize.triton_loops", raising=False)
    triton_kernels.load.cache_clear()
    yield
    triton_kernels.load.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_without_triton_nothing_is_computed_another_way() -> None:
    with pytest.raises(QuantizationError, match="Triton, which cannot be imported") as caught:
        triton_kernels.add_products(torch.zeros(16, 16), torch.zeros(3, 16, dtype=torch.bfloat16))
    assert caught.value.code == "quantize.no_triton"


@pytest.mark.usefixtures("without_triton")
def test_a_job_for_a_gpu_is_refused_at_once_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = convert.RunOptions(work_dir="work", workers=1, device="cuda")  # type: ignore[arg-type]
    with pytest.raises(QuantizationError) as caught:
        convert.require_device(options)
    assert caught.value.code == "quantize.no_triton"
    assert "--device cpu" in caught.value.hint


def test_loops_for_gpus_are_for_gpus_only() -> None:
    assert not triton_kernels.take(torch.zeros(1))
    assert not triton_kernels.take(torch.zeros(1, dtype=torch.bfloat16))
