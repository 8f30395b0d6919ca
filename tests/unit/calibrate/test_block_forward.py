"""One block over one token slice: output and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.calibrate import forward
from pipeline.calibrate.collections import Collections, plan_collections
from pipeline.calibrate.forward import forward_block
from pipeline.errors import CalibrationError
from pipeline.graph.outline import Source, open_folder
from pipeline.spec import ExpertStatistics
from tests.architectures import make_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_folder(make_model("llama", tmp_path_factory.mktemp("llama")))


def collections(source: Source) -> Collections:
    return plan_collections(source.outline.groups[0], ExpertStatistics.ALL)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(source: Source) -> Iterator[dict[str, Tensor]]:
    weights = source.block(0)
    with source.outline.skeleton.attached(0, weights):
        yield weights


def test_statistics_are_those_of_each_group_s_input(source: Source, hidden: Tensor, weights: dict[str, Tensor]) -> None:
    skeleton = source.outline.skeleton
    output, sums = forward_block(skeleton, 0, hidden, collections(source))
    statistics = [item.statistics for item in sums]
    assert torch.equal(output, skeleton.run_block(0, hidden))
    assert [item.num_tokens for item in statistics] == [48] * 4
    # The first group reads the normed hidden states, which are easily computed here.
    x_TI = skeleton.block(0).input_layernorm(hidden).flatten(0, 1).double()
    first = statistics[0]
    torch.testing.assert_close(first.second_moment_II.double(), x_TI.T @ x_TI, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(first.abs_sum_I.double(), x_TI.abs().sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(first.abs_max_I.double(), x_TI.abs().amax(0), rtol=1e-6, atol=0)


def test_sequences_are_taken_a_few_at_a_time_without_changing_the_output(
    source: Source, hidden: Tensor, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = source.outline.skeleton
    whole, together = forward_block(skeleton, 0, hidden, collections(source))
    monkeypatch.setattr(forward, "MICRO_BATCH_TOKENS", 16)
    parts, apart = forward_block(skeleton, 0, hidden, collections(source))
    torch.testing.assert_close(parts, whole)
    for one, other in zip(together, apart, strict=True):
        moments = one.statistics.second_moment_II, other.statistics.second_moment_II
        torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-3)
        assert one.statistics.num_tokens == other.statistics.num_tokens


def test_without_groups_nothing_is_collected_and_no_hook_stays(
    source: Source, hidden: Tensor, weights: dict[str, Tensor]
) -> None:
    skeleton = source.outline.skeleton
    _, sums = forward_block(skeleton, 0, hidden, Collections())
    forward_block(skeleton, 0, hidden, collections(source))
    assert sums == []
    assert not any(module._forward_pre_hooks for module in skeleton.block(0).modules())


def test_output_that_is_not_finite_is_an_error_with_the_block(
    source: Source, hidden: Tensor, weights: dict[str, Tensor]
) -> None:
    hidden[1, 3] = float("inf")
    with pytest.raises(CalibrationError, match=r"block 0 gives \d+ values that are not finite") as caught:
        forward_block(source.outline.skeleton, 0, hidden, Collections())
    assert caught.value.code == "calibration.not_finite"


def test_hidden_states_are_those_of_transformers(source: Source) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(4, 4096, (2, 16), generator=torch.Generator().manual_seed(3))
    net = AutoModelForCausalLM.from_pretrained(Path(source.folder), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = net(tokens, output_hidden_states=True).hidden_states
    skeleton = source.outline.skeleton
    skeleton.attach_outer(source.outer())
    hidden = skeleton.embed(tokens)
    skeleton.detach_outer()
    torch.testing.assert_close(hidden, expected[0])
    with skeleton.attached(0, source.block(0)):
        hidden, _ = forward_block(skeleton, 0, hidden, Collections())
    torch.testing.assert_close(hidden, expected[1], rtol=1e-4, atol=1e-5)
