"""Which tensor-parallel sizes load, from shapes."""

from __future__ import annotations

import pytest

from pipeline.facts import ModuleFacts
from pipeline.publish.tensor_parallel import Loading, TpAnswer, tp_answers
from pipeline.spec import parse_variant
from tests.factories import make_module

FAST, GENERAL, REFUSED = Loading.FAST, Loading.GENERAL, Loading.REFUSED


def loadings(*modules: ModuleFacts, variant: str = "gptq-w4-g128") -> list[Loading]:
    return [answer.loading for answer in tp_answers(modules, parse_variant(variant))]


def linear(leaf: str, out_features: int, in_features: int, **changes: object) -> ModuleFacts:
    name = f"model.layers.0.mlp.{leaf}"
    return make_module(name, out_features=out_features, in_features=in_features, **changes)


def test_llama_3_8b_loads_fast_everywhere() -> None:
    shapes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "gate_proj": (14336, 4096), "down_proj": (4096, 14336)}
    assert loadings(*(linear(leaf, *shape) for leaf, shape in shapes.items())) == [FAST] * 4


@pytest.mark.parametrize(
    ("leaf", "out_features", "in_features", "group_size", "expected"),
    [
        # Row-parallel: inputs are cut, and a group must stay whole.
        ("down_proj", 1024, 1024, 128, [FAST, FAST, FAST, FAST]),
        ("down_proj", 1024, 512, 128, [FAST, FAST, FAST, REFUSED]),
        ("down_proj", 1024, 512, 64, [FAST, FAST, FAST, GENERAL]),
        ("down_proj", 1024, 11008, 128, [FAST, FAST, REFUSED, REFUSED]),
        ("o_proj", 1024, 576, 64, [GENERAL, REFUSED, REFUSED, REFUSED]),
        # Column-parallel: outputs are cut, down to whole words of packed zero points.
        ("q_proj", 512, 1024, 128, [FAST, FAST, FAST, FAST]),
        ("q_proj", 256, 1024, 128, [FAST, FAST, FAST, GENERAL]),
        ("k_proj", 32, 1024, 128, [GENERAL, GENERAL, GENERAL, REFUSED]),
        ("q_proj", 20, 1024, 128, [REFUSED, REFUSED, REFUSED, REFUSED]),
        # Group sizes that the fast kernel does not know.
        ("q_proj", 1024, 1024, 16, [GENERAL, GENERAL, GENERAL, GENERAL]),
        # A name that says nothing must satisfy both; a replicated one is never cut.
        ("mystery", 1024, 512, 128, [FAST, FAST, FAST, REFUSED]),
        ("kv_a_proj_with_mqa", 576, 2048, 128, [FAST, FAST, FAST, FAST]),
    ],
)
def test_rules_of_one_linear(
    leaf: str, out_features: int, in_features: int, group_size: int, expected: list[Loading]
) -> None:
    assert loadings(linear(leaf, out_features, in_features, group_size=group_size)) == expected


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("gptq-w4-g128-gptq_v2", [FAST] * 4),
        ("gptq-w4-g128-gptq_v2-asym", [GENERAL] * 4),
        ("gptq-w8-g128-gptq_v2-asym", [GENERAL] * 4),
        ("gptq-w3-g128-gptq_v2-asym", [REFUSED] * 4),
    ],
)
def test_zero_points_of_gptq_v2_are_for_the_general_kernel(variant: str, expected: list[Loading]) -> None:
    assert loadings(linear("q_proj", 4096, 4096, bits=parse_variant(variant).bits), variant=variant) == expected


@pytest.mark.parametrize("variant", ["w8a8-int8", "fp8-dynamic"])
@pytest.mark.parametrize(
    ("leaf", "out_features", "in_features", "expected"),
    [
        # Nothing is packed, so whatever divides loads; the fast kernel wants multiples of 16.
        ("q_proj", 128, 40, [GENERAL] * 4),
        ("q_proj", 128, 48, [FAST] * 4),
        ("q_proj", 64, 576, [FAST, FAST, FAST, GENERAL]),
        ("q_proj", 20, 576, [GENERAL, GENERAL, GENERAL, REFUSED]),
        ("down_proj", 576, 64, [FAST, FAST, FAST, GENERAL]),
        ("down_proj", 576, 1028, [GENERAL, GENERAL, GENERAL, REFUSED]),
    ],
)
def test_codes_that_are_multiplied_only_have_to_divide(
    variant: str, leaf: str, out_features: int, in_features: int, expected: list[Loading]
) -> None:
    module = linear(leaf, out_features, in_features, bits=8, group_size=-1)
    assert loadings(module, variant=variant) == expected
    (one, *_) = tp_answers([module], parse_variant(variant))
    assert ("no multiple of 16" in one.reason) == (one.loading is GENERAL)


@pytest.mark.parametrize("variant", ["gptq-w3-g128", "awq-w2-g64", "rtn-w3-channel"])
def test_two_and_three_bits_have_no_kernel_whatever_the_shapes(variant: str) -> None:
    spec = parse_variant(variant)
    answers = tp_answers([linear("q_proj", 4096, 4096, bits=spec.bits)], spec)
    why = f"vLLM's Marlin kernel takes codes of 4 and 8 bits only, not of {spec.bits}"
    assert answers == tuple(TpAnswer(size, REFUSED, reason=why) for size in (1, 2, 4, 8))
    assert loadings(linear("q_proj", 4096, 4096, bits=16, group_size=0), variant=variant) == [FAST] * 4


@pytest.mark.parametrize(("bits", "outputs", "fill"), [(4, 1032, 8), (8, 1028, 4)])
def test_outputs_per_rank_fill_whole_words_of_zero_points(bits: int, outputs: int, fill: int) -> None:
    fits, does_not = (linear("q_proj", size, 1024, bits=bits) for size in (outputs, outputs + fill // 2))
    (answer,) = tp_answers([does_not], parse_variant("gptq-w4-g128"), (1,))
    assert loadings(fits)[0] is GENERAL
    assert answer.reason == f"{outputs + fill // 2} outputs per rank do not fill words of {fill}"


@pytest.mark.parametrize(("bits", "expected"), [(4, REFUSED), (8, GENERAL)])
def test_narrow_codes_need_more_outputs_to_fill_a_word(bits: int, expected: Loading) -> None:
    module = linear("q_proj", 1028, 1024, bits=bits)
    assert loadings(module, variant=f"gptq-w{bits}-g128")[0] is expected


@pytest.mark.parametrize("stored", [-1, 512])
def test_one_scale_per_row_cuts_no_group(stored: int) -> None:
    module = linear("down_proj", 1024, 512, group_size=stored)
    assert loadings(module, variant="gptq-w4-channel") == [FAST, FAST, FAST, GENERAL]


def test_a_group_as_wide_as_the_row_is_cut_where_groups_were_asked_for() -> None:
    assert loadings(linear("down_proj", 1024, 128, group_size=128)) == [FAST, REFUSED, REFUSED, REFUSED]


def test_only_formats_with_a_second_kernel_load_on_odd_shapes() -> None:
    module = linear("o_proj", 1024, 576, group_size=64)
    assert loadings(module, variant="awq-w4-g64")[0] is GENERAL
    assert loadings(module, variant="gptq-w4-g64-ct")[0] is GENERAL
    assert loadings(module, variant="gptq-w4-g64-ct-asym")[0] is REFUSED


def test_an_unquantized_linear_only_has_to_divide() -> None:
    assert loadings(linear("down_proj", 100, 100, bits=16, group_size=0)) == [FAST, FAST, FAST, REFUSED]
    assert loadings(linear("gate", 7, 100, bits=16, group_size=0)) == [FAST] * 4
    assert loadings(linear("mystery", 7, 99, bits=16, group_size=0)) == [FAST] * 4


def test_the_answer_names_the_linear_and_the_rule_and_a_refusal_wins_over_a_slow_kernel() -> None:
    slow, refused = linear("q_proj", 32, 1024), linear("down_proj", 1024, 192)
    assert tp_answers([slow, refused], parse_variant("gptq-w4-g128"), (1,)) == (
        TpAnswer(1, REFUSED, "model.layers.0.mlp.down_proj", "192 inputs per rank are not whole groups of 128"),
    )
    assert tp_answers([slow], parse_variant("gptq-w4-g128"), (1,)) == (
        TpAnswer(1, GENERAL, "model.layers.0.mlp.q_proj", "32 outputs per rank are no multiple of 64"),
    )


def test_a_release_without_linears_loads() -> None:
    assert loadings() == [FAST] * 4


@pytest.mark.parametrize("variant", ["awq-w8-g128", "rtn-w8-g128-asym", "gptq-w8-channel-ct-asym"])
def test_zero_points_with_8_bit_codes_have_no_kernel_whatever_the_shapes(variant: str) -> None:
    perfect = linear("q_proj", 4096, 4096, bits=8)
    answers = tp_answers([perfect], parse_variant(variant))
    assert {answer.loading for answer in answers} == {REFUSED}
    assert all("zero points with 4-bit codes only" in answer.reason and not answer.module for answer in answers)
    assert loadings(perfect, variant="rtn-w8-g128") == [FAST] * 4
    assert loadings(linear("q_proj", 4096, 4096), variant="awq-w4-g128-ct") == [FAST] * 4
    assert loadings(linear("q_proj", 4096, 4096, bits=16, group_size=0), variant=variant) == [FAST] * 4
