"""What happens with each matrix: the plan's rules."""

from __future__ import annotations

import pytest

from pipeline.errors import PlanError
from pipeline.graph.schemes import plan_matrices, quantized_part, require_known_names
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


def test_skip_leaves_indivisible_matrices_unquantized() -> None:
    variant = VariantSpec.model_validate({**parse_variant("gptq-w4-g128").model_dump(), "group_fallback": "skip"})
    plans = plan_matrices(variant, MODEL)
    assert [plan.scheme is None for plan in plans.values()] == [True, True, False]
    assert plans["model.layers.0.attn.q"].note == "left unquantized: group size 128 does not divide in_features 576"


def test_refuse_names_the_first_matrix() -> None:
    variant = VariantSpec.model_validate({**parse_variant("gptq-w4-g128").model_dump(), "group_fallback": "refuse"})
    with pytest.raises(PlanError, match=r"model\.layers\.0\.attn\.q"):
        plan_matrices(variant, MODEL)


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(PlanError, match="would quantize nothing"):
        plan_matrices(parse_variant("gptq-w4-g128"), [[group(72, ("attn.q", 64))]])


def test_linears_that_engines_fuse_stay_unquantized_together() -> None:
    ignoring = {**parse_variant("gptq-w4-g64").model_dump(), "ignore": ["re:attn\\.k$"]}
    plans = plan_matrices(VariantSpec.model_validate(ignoring), MODEL)
    assert plans["model.layers.0.attn.k"].note == "left unquantized: the spec ignores it"
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


PARALLEL = [
    [
        group(128, *((f"self_attn.{leaf}_proj", 128) for leaf in "qkv"), ("mlp.fc1", 256)),
        group(128, ("self_attn.dense", 128)),
        group(256, ("mlp.fc2", 128)),
    ]
]
"""Attention and feed-forward side by side, reading one norm's output (Phi, Cohere, GPT-J)."""


def ignoring(*patterns: str, name: str = "gptq-w4-g64") -> VariantSpec:
    return VariantSpec.model_validate({**parse_variant(name).model_dump(), "ignore": patterns})


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("re:fc1$", {"mlp.fc1": "left unquantized: the spec ignores it"}),
        (
            "re:k_proj$",
            {
                "self_attn.q_proj": "left unquantized with self_attn.k_proj, which engines fuse it with "
                "(left unquantized: the spec ignores it)",
                "self_attn.k_proj": "left unquantized: the spec ignores it",
                "self_attn.v_proj": "left unquantized with self_attn.k_proj, which engines fuse it with "
                "(left unquantized: the spec ignores it)",
            },
        ),
    ],
)
def test_only_members_of_one_module_are_fused(pattern: str, kept: dict[str, str]) -> None:
    plans = plan_matrices(ignoring(pattern), PARALLEL)
    found = {plan.linear.local_name: plan.note for plan in plans.values() if plan.scheme is None}
    assert found == kept
    assert {plan.note for plan in plans.values() if plan.scheme is not None} == {""}


def test_a_group_is_solved_without_the_members_that_stay_unquantized() -> None:
    shared = PARALLEL[0][0]
    for pattern, quantized in (("re:fc1$", shared.linears[:3]), ("re:v_proj$", shared.linears[3:])):
        plans = plan_matrices(ignoring(pattern), PARALLEL)
        part = quantized_part(shared, plans)
        assert part is not None
        assert part.linears == quantized
        assert quantized_part(PARALLEL[0][1], plans) == PARALLEL[0][1]
    assert quantized_part(shared, plan_matrices(ignoring("re:(_proj|fc1)$"), PARALLEL)) is None


@pytest.mark.parametrize("name", ["gptq-w4-g128", "awq-w4-g128"])
def test_one_hopeless_width_does_not_spoil_the_size_of_the_others(name: str) -> None:
    widths = {"a": 576, "b": 1536, "c": 1024, "d": 104}
    plans = plan_matrices(parse_variant(name), [[group(width, (leaf, 256)) for leaf, width in widths.items()]])
    found = {plan.linear.local_name: plan.scheme and plan.scheme.group_size for plan in plans.values()}
    assert found == {"a": 64, "b": 64, "c": 64, "d": None}
    assert plans["model.layers.0.d"].note == "left unquantized: group size 64 does not divide in_features 104"
    assert "128 does not divide every in_features" in plans["model.layers.0.c"].note


def test_a_gptq_file_has_one_group_size() -> None:
    # 48 divides 144 and 96, 32 divides 64 and 96: no size serves all three, so the one that serves most is taken.
    plans = plan_matrices(parse_variant("gptq-w4-g48"), [[group(w, (f"m{w}", 256)) for w in (144, 96, 64)]])
    assert [plan.scheme and plan.scheme.group_size for plan in plans.values()] == [48, 48, None]


def test_the_width_of_an_ignored_linear_lowers_no_group_size() -> None:
    model = [[group(576, ("attn.q", 576)), group(1536, ("mlp.down", 576))]]
    plans = plan_matrices(ignoring("re:attn", name="awq-w4-g128"), model)
    assert [plan.scheme and plan.scheme.group_size for plan in plans.values()] == [None, 128]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("model.layers.0.mlp.dwon", "model.layers.0.mlp.down"),
        ("layers.0.attn.q", "model.layers.0.attn.q"),
        ("re:downn$", "mlp.down"),
        ("re:^zzz", "attn.k, attn.q, lm_head, mlp.down"),
    ],
)
def test_an_ignore_that_names_nothing_is_an_error_with_what_is_near(pattern: str, hint: str) -> None:
    names = [*plan_matrices(parse_variant("gptq-w4-g64"), MODEL), "lm_head"]
    require_known_names(ignoring("lm_head", "re:down$", "model.layers.0.attn.q"), names)
    with pytest.raises(PlanError) as caught:
        require_known_names(ignoring("re:down$", pattern), names)
    assert f"ignore {pattern!r} names no linear" in caught.value.message
    assert hint in caught.value.hint


def test_ignoring_everything_is_an_error_that_says_so() -> None:
    with pytest.raises(PlanError, match="would quantize nothing: the spec ignores every linear"):
        plan_matrices(ignoring("re:."), MODEL)
