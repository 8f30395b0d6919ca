"""Statistics of experts: over all tokens, over those that the router sent there, and blended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.calibrate.collections import COUNTS, Sums, blend, conclude, plan_collections
from pipeline.calibrate.forward import forward_block
from pipeline.graph.outline import Source, open_folder
from pipeline.quantize.shrinkage import estimate_shrinkage, shrink
from pipeline.quantize.statistics import accumulate, empty
from pipeline.quantize.types import Statistics
from pipeline.skeleton.groups import LinearGroup
from pipeline.spec import ExpertStatistics
from tests.architectures import MIXTURES, make_model

BLOCK = -1
LAMBDA = 0.25


class Inputs(NamedTuple):
    """What transformers' own experts get at one block, and what its fused parameters make of it."""

    x_TH: Tensor
    chosen_Tk: Tensor
    gate_up: Tensor

    def routed(self, number: int) -> Tensor:
        """Return what the router sends to an expert, [tokens, hidden]."""
        return self.x_TH[(self.chosen_Tk == number).any(-1)]

    def before_down(self, number: int, x_TH: Tensor) -> Tensor:
        """Return what an expert's down reads, [tokens, width]."""
        gate, up = (x_TH @ self.gate_up[number].T).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


FolderOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp(name) / name)
        return made[name]

    return folder


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def direct(folder: Path, hidden_NLH: Tensor) -> Inputs:
    """Return what the experts of the last block read when ``hidden_NLH`` enters the block of transformers' model."""
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layer, seen = net.model.layers[BLOCK], []
    layer.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    positions = torch.arange(hidden_NLH.shape[1])[None]
    mask = torch.full((1, 1, 16, 16), float("-inf")).triu(1)
    layer(hidden_NLH, attention_mask=mask, position_embeddings=net.model.rotary_emb(hidden_NLH, positions))
    return Inputs(seen[0][0], seen[0][1], layer.mlp.experts.gate_up_proj.detach())


def collected(source: Source, hidden_NLH: Tensor) -> list[tuple[LinearGroup, Sums, Statistics | None]]:
    """Return for each group of the last block its own sums, and those that they are drawn towards."""
    skeleton, groups, mode = source.outline.skeleton, source.outline.groups[BLOCK], source.outline.experts
    index = skeleton.num_blocks - 1
    collections = plan_collections(groups, mode)
    with skeleton.attached(index, skeleton.dense(index, source.block(index))):
        _, sums = forward_block(skeleton, index, hidden_NLH, collections)
    shared = [None if place is None else sums[place].statistics for place in collections.shared]
    return list(zip(groups, sums, shared, strict=False))


def statistics_of(x_TI: Tensor) -> Statistics:
    return accumulate(empty(x_TI.shape[1]), x_TI)


def assert_alike(found: Statistics, expected: Statistics) -> None:
    assert found.num_tokens == expected.num_tokens
    size = float(expected.second_moment_II.norm()) + 1e-12
    assert float((found.second_moment_II - expected.second_moment_II).norm()) < 1e-4 * size
    torch.testing.assert_close(found.abs_sum_I, expected.abs_sum_I, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.abs_max_I, expected.abs_max_I, rtol=1e-3, atol=1e-5)


def number_of(group: LinearGroup) -> int:
    return int(group.expert.rpartition(".")[2])


@pytest.mark.parametrize("name", MIXTURES)
def test_all_tokens_are_those_of_gate_and_up_once_and_of_every_down(
    name: str, folder_of: FolderOf, hidden: Tensor
) -> None:
    inputs = direct(folder_of(name), hidden)
    found = collected(open_folder(folder_of(name)), hidden)
    together = [(group, sums) for group, sums, _ in found if len({linear.expert for linear in group.linears}) > 2]
    ((group, sums),) = together
    assert_alike(sums.statistics, statistics_of(inputs.x_TH))
    num_experts = inputs.gate_up.shape[0]
    assert sums.routed_E.tolist() == [inputs.routed(number).shape[0] for number in range(num_experts)]
    downs = [(group, sums) for group, sums, _ in found if group.expert]
    assert len(downs) == num_experts
    for group, sums in downs:
        own = number_of(group)
        assert_alike(sums.statistics, statistics_of(inputs.before_down(own, inputs.x_TH)))
        assert sums.routed_E.tolist() == [inputs.routed(own).shape[0]]


@pytest.mark.parametrize("mode", [ExpertStatistics.ROUTED, ExpertStatistics.SHRINKAGE])
@pytest.mark.parametrize("name", MIXTURES)
def test_routed_tokens_are_those_that_the_router_sent_to_the_expert_each_once(
    name: str, mode: ExpertStatistics, folder_of: FolderOf, hidden: Tensor
) -> None:
    inputs = direct(folder_of(name), hidden)
    groups = collected(open_folder(folder_of(name), experts=mode), hidden)
    experts = [item for item in groups if item[0].expert]
    assert len(experts) == 2 * inputs.gate_up.shape[0]
    for group, sums, shared in experts:
        own = number_of(group)
        routed = inputs.routed(own)
        is_down = group.linears[0].local_name.endswith("down_proj")

        def read(x_TH: Tensor, own: int = own, is_down: bool = is_down) -> Tensor:
            return inputs.before_down(own, x_TH) if is_down else x_TH

        assert sums.routed_E.tolist() == [routed.shape[0]]
        assert_alike(sums.statistics, statistics_of(read(routed)))
        assert (shared is not None) == (mode is ExpertStatistics.SHRINKAGE)
        if shared is not None:
            everything = read(inputs.x_TH)
            assert_alike(shared, statistics_of(everything))
            blended = blend(sums.statistics, shared, LAMBDA)
            moments = [x.T @ x / max(len(x), 1) for x in (read(routed), everything)]
            n = len(everything)
            expected = n * (moments[0] + LAMBDA * moments[1]) / (1 + LAMBDA) if len(routed) else n * moments[1]
            assert float((blended.second_moment_II - expected).norm()) < 1e-4 * float(expected.norm())
            assert blended.num_tokens == n
    assert all(sums.routed_E.numel() == 0 and shared is None for group, sums, shared in groups if not group.expert)


def test_what_is_outside_the_experts_is_summed_over_all_tokens_in_every_mode(
    folder_of: FolderOf, hidden: Tensor
) -> None:
    by_mode = {}
    for mode in ExpertStatistics:
        found = collected(open_folder(folder_of("deepseek_v3"), experts=mode), hidden)
        by_mode[mode] = {g.label: s.statistics for g, s, _ in found if not any(li.expert for li in g.linears)}
    assert set(by_mode[ExpertStatistics.ROUTED]) - set(by_mode[ExpertStatistics.ALL]) == {"gate_proj+up_proj"}
    for label, statistics in by_mode[ExpertStatistics.ALL].items():
        for mode in (ExpertStatistics.ROUTED, ExpertStatistics.SHRINKAGE):
            assert torch.equal(by_mode[mode][label].second_moment_II, statistics.second_moment_II)


def sums_of(x_TI: Tensor, *routed: int) -> Sums:
    return Sums(statistics_of(x_TI), torch.tensor(routed, dtype=torch.int64))


def test_sums_add_up_with_their_counts_and_come_back_from_storage() -> None:
    x_TI = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    first, second = sums_of(x_TI[:5], 5, 0), sums_of(x_TI[5:], 3, 4)
    both = first.plus(second)
    assert both.routed_E.tolist() == [8, 4]
    assert first.routed_E.tolist() == [5, 0]
    added = sums_of(x_TI[:5], 5, 0).add(second)
    assert torch.equal(added.statistics.second_moment_II, both.statistics.second_moment_II)
    again = Sums.of_tensors(both.tensors())
    assert torch.equal(again.routed_E, both.routed_E)
    assert torch.equal(again.statistics.abs_sum_I, both.statistics.abs_sum_I)
    assert COUNTS not in sums_of(x_TI).tensors()


def test_an_unseen_expert_has_the_shared_statistics_where_there_are_some_else_those_that_mean_rounding() -> None:
    shared = statistics_of(torch.randn(9, 4, generator=torch.Generator().manual_seed(3)))
    assert blend(empty(4), shared, LAMBDA) is shared
    alone = blend(empty(4), None, 0.0)
    assert torch.equal(alone.second_moment_II, torch.eye(4))
    assert alone.num_tokens == 1
    own = statistics_of(torch.ones(2, 4))
    assert blend(own, None, 0.0) is own


def halves_of(x_TI: Tensor, *counts: int) -> list[Sums]:
    return [sums_of(part, *counts) for part in (x_TI[: len(x_TI) // 2], x_TI[len(x_TI) // 2 :])]


def test_statistics_are_concluded_from_halves_that_stay_as_they_are() -> None:
    x_TI = torch.randn(40, 6, generator=torch.Generator().manual_seed(4))
    halves = halves_of(x_TI, 3)
    before = [half.statistics.second_moment_II.clone() for half in halves]
    found = conclude(halves, None, 0.0)
    share = estimate_shrinkage(*(half.statistics for half in halves))
    assert found.statistics.shrinkage == share > 0
    assert found.routed_E.tolist() == [6]
    expected = shrink(statistics_of(x_TI), share).second_moment_II
    torch.testing.assert_close(found.statistics.second_moment_II, expected)
    assert all(torch.equal(half.statistics.second_moment_II, own) for half, own in zip(halves, before, strict=True))


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_share_that_was_asked_for_is_taken_and_a_whole_tells_of_none(num_parts: int) -> None:
    x_TI = torch.randn(40, 6, generator=torch.Generator().manual_seed(5))
    cross_II = torch.randn(6, 6)
    parts = [
        replace(part, cross_II=cross_II.clone()) for part in (halves_of(x_TI) if num_parts > 1 else [sums_of(x_TI)])
    ]
    asked = conclude(parts, None, 0.0, 0.25)
    assert asked.statistics.shrinkage == 0.25
    total_II = num_parts * cross_II
    assert torch.equal(asked.crossed.diagonal(), total_II.diagonal())
    torch.testing.assert_close(asked.crossed[0, 1:], 0.75 * total_II[0, 1:])
    assert all(torch.equal(part.crossed, cross_II) for part in parts)
    torch.testing.assert_close(
        parts[0].statistics.second_moment_II, sums_of(x_TI[: 40 // num_parts]).statistics.second_moment_II
    )
    if num_parts == 1:
        assert conclude(parts, None, 0.0).statistics.shrinkage == 0.0


def test_an_expert_s_correlations_are_judged_by_what_it_is_drawn_towards_too() -> None:
    x_TI = torch.randn(60, 6, generator=torch.Generator().manual_seed(6))
    own, shared = halves_of(x_TI[20:36]), halves_of(x_TI)
    blended = [blend(a.statistics, b.statistics, LAMBDA) for a, b in zip(own, shared, strict=True)]
    assert conclude(own, shared, LAMBDA).statistics.shrinkage == estimate_shrinkage(*blended)
    # One that no token of a half was sent to is known from the shared ones there, and without these not at all.
    unseen = [own[0], Sums(empty(6), torch.zeros(0, dtype=torch.int64))]
    assert conclude(unseen, shared, LAMBDA).statistics.shrinkage > 0
    assert conclude(unseen, None, 0.0).statistics.shrinkage == 0.0
    assert conclude(unseen[1:] * 2, None, 0.0).statistics.shrinkage == 0.0
