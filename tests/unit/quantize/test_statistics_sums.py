"""Statistics are sums: they grow, merge, change basis and survive storage."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import QuantizationError
from pipeline.quantize.shrinkage import shrink
from pipeline.quantize.statistics import accumulate, empty, from_tensors, merge, rescale, to_tensors

X = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_second_moment_matches_float64_for_every_float_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = X.to(dtype)
        statistics = accumulate(empty(12), x)
        exact = x.double().t() @ x.double()
        assert statistics.second_moment_II.dtype is torch.float32
        torch.testing.assert_close(statistics.second_moment_II.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(statistics.abs_sum_I.double(), x.double().abs().sum(0), rtol=1e-6, atol=1e-6)
        assert torch.equal(statistics.abs_max_I, x.float().abs().amax(0))
        assert statistics.num_tokens == 40


def test_merge_of_slices_is_the_whole_and_repeats_bit_for_bit() -> None:
    parts = [accumulate(empty(12), part) for part in X.split(7)]
    whole = accumulate(empty(12), X)
    first, second = merge(parts), merge(parts)
    assert first.num_tokens == whole.num_tokens
    assert torch.equal(first.abs_max_I, whole.abs_max_I)
    torch.testing.assert_close(first.second_moment_II, whole.second_moment_II)
    torch.testing.assert_close(first.abs_sum_I, whole.abs_sum_I)
    assert torch.equal(first.second_moment_II, second.second_moment_II)


def test_merge_leaves_its_parts_alone() -> None:
    parts = [accumulate(empty(12), part) for part in X.split(20)]
    before = parts[0].second_moment_II.clone()
    merge(parts)
    assert torch.equal(parts[0].second_moment_II, before)


def test_merge_refuses_nothing_and_different_widths() -> None:
    with pytest.raises(QuantizationError, match="no statistics"):
        merge([])
    with pytest.raises(QuantizationError, match="cannot be merged"):
        merge([empty(3), empty(4)])


def test_no_tokens_change_nothing() -> None:
    statistics = accumulate(empty(12), X[:0])
    assert statistics.num_tokens == 0
    assert not statistics.second_moment_II.any()


def test_inputs_of_the_wrong_width_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"\[40, 12\]"):
        accumulate(empty(11), X)


def test_rescaled_statistics_are_those_of_rescaled_inputs() -> None:
    scale = torch.rand(12, generator=torch.Generator().manual_seed(2)) + 0.5
    x = X.float()
    rescaled, direct = rescale(accumulate(empty(12), x), scale), accumulate(empty(12), x / scale)
    torch.testing.assert_close(rescaled.second_moment_II, direct.second_moment_II)
    torch.testing.assert_close(rescaled.abs_sum_I, direct.abs_sum_I)
    torch.testing.assert_close(rescaled.abs_max_I, direct.abs_max_I)
    assert rescaled.num_tokens == direct.num_tokens
    assert rescale(shrink(direct, 0.2), scale).shrinkage == 0.2


def test_storage_round_trip_is_exact() -> None:
    statistics = shrink(accumulate(empty(12), X), 0.3)
    again = from_tensors(to_tensors(statistics))
    assert torch.equal(again.second_moment_II, statistics.second_moment_II)
    assert torch.equal(again.abs_sum_I, statistics.abs_sum_I)
    assert torch.equal(again.abs_max_I, statistics.abs_max_I)
    assert again.num_tokens == statistics.num_tokens
    assert again.shrinkage == 0.3


@pytest.mark.parametrize("name", ["second_moment", "abs_sum", "abs_max", "num_tokens", "shrinkage"])
def test_damaged_storage_names_the_tensor(name: str) -> None:
    tensors = to_tensors(accumulate(empty(12), X))
    with pytest.raises(QuantizationError, match=name):
        from_tensors({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(QuantizationError, match=name):
        from_tensors(tensors | {name: tensors[name].to(torch.bfloat16)})
