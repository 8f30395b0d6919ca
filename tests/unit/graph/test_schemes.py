"""What happens with each matrix: the plan's rules."""

from __future__ import annotations

import pytest

from pipeline.errors import PlanError
from pipeline.graph.schemes import plan_matrices
from pipeline.quantize.types import Scheme
from pipeline.skeleton.groups import LinearGroup, LinearRef
from pipeline.spec import VariantSpec, parse_variant


def group(in_features: int, *members: tuple[str, int], block: int = 0, transposed: bool = False) -> LinearGroup:
    prefix = f"model.layers.{block}."
    return LinearGroup(
        block, tuple(LinearRef(name, prefix + name, rows, in_features, transposed) for name, rows in members)
    )


MODEL = [[group(576, ("attn.q", 576), ("attn.k", 192)), group(1536, ("mlp.down", 576))]]


def test_divisible_matrices_get_the_variant_s_scheme() -> None:
    plans = plan_matrices(parse_variant("gptq-w4-g64"), MODEL)
    assert [plan.scheme for plan in plans.values()] == [Scheme(4, 64, True)] * 3
    assert [plan.note for plan in plans.values()] == [""] * 3


@pytest.mark.parametrize("name", ["gptq-w4-g128", "awq-w4-g128", "awq-w4-g128-ct"])
def test_one_size_is_lowered_for_the_whole_checkpoint(name: str) -> None:
    plans = plan_matrices(parse_variant(name), MODEL)
    assert {plan.scheme.group_size for plan in plans.values() if plan.scheme} == {64}
    assert all("128 does not divide every in_features" in plan.note for plan in plans.values())


def test_symmetric_compressed_tensors_lowers_only_where_needed() -> None:
    plans = plan_matrices(parse_variant("gptq-w4-g128-ct"), MODEL)
    assert [plan.scheme.group_size for plan in plans.values() if plan.scheme] == [64, 64, 128]
    assert plans["model.layers.0.mlp.down"].note == ""


def test_skip_leaves_indivisible_matrices_in_16_bit() -> None:
    variant = VariantSpec.model_validate({**parse_variant("gptq-w4-g128").model_dump(), "group_fallback": "skip"})
    plans = plan_matrices(variant, MODEL)
    assert [plan.scheme is None for plan in plans.values()] == [True, True, False]
    assert plans["model.layers.0.attn.q"].note == "left in 16 bit: group size 128 does not divide in_features 576"


def test_refuse_names_the_first_matrix() -> None:
    variant = VariantSpec.model_validate({**parse_variant("gptq-w4-g128").model_dump(), "group_fallback": "refuse"})
    with pytest.raises(PlanError, match=r"model\.layers\.0\.attn\.q"):
        plan_matrices(variant, MODEL)


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(PlanError, match="would quantize nothing"):
        plan_matrices(parse_variant("gptq-w4-g128"), [[group(72, ("attn.q", 64))]])


def test_linears_that_engines_fuse_stay_in_16_bit_together() -> None:
    ignoring = {**parse_variant("gptq-w4-g64").model_dump(), "ignore": ["re:attn\\.k$"]}
    plans = plan_matrices(VariantSpec.model_validate(ignoring), MODEL)
    assert plans["model.layers.0.attn.k"].note == "left in 16 bit: the spec ignores it"
    assert plans["model.layers.0.attn.q"].scheme is None
    assert "fuse" in plans["model.layers.0.attn.q"].note
    assert plans["model.layers.0.mlp.down"].scheme is not None


def test_per_channel_groups_are_whole_rows() -> None:
    plans = plan_matrices(parse_variant("rtn-w8-channel"), MODEL)
    assert [plan.scheme.group_size for plan in plans.values() if plan.scheme] == [576, 576, 1536]


@pytest.mark.parametrize("name", ["rtn-w8-g64", "awq-w4-g64", "gptq-w4-g64-ct-asym"])
def test_transposed_linears_are_refused_in_formats_whose_loaders_pass_them_over(name: str) -> None:
    model = [[group(64, ("attn.c_attn", 192), transposed=True)], [group(64, ("mlp.c_fc", 256), transposed=True)]]
    with pytest.raises(PlanError, match="stored transposed") as caught:
        plan_matrices(parse_variant(name), model)
    assert "gptq" in caught.value.hint
    mixed = [[*model[0], group(64, ("mlp.up", 256))]]
    plans = plan_matrices(parse_variant(name), mixed)
    assert [plan.scheme is None for plan in plans.values()] == [True, False]


def test_transposed_linears_are_quantized_in_format_gptq() -> None:
    plans = plan_matrices(parse_variant("rtn-w8-g64-gptq"), [[group(64, ("attn.c_attn", 192), transposed=True)]])
    assert all(plan.scheme for plan in plans.values())
