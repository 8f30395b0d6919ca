"""Numbers and lists derived from facts."""

from __future__ import annotations

import math

import pytest

from pipeline.publish.figures import (
    Folded,
    WidthRow,
    bits_per_parameter,
    bits_per_quantized_weight,
    describe_scheme,
    family,
    fold_names,
    judge,
    kind_of,
    list_exceptions,
    predicted_kl,
    quantized_share,
    width_rows,
    worst_modules,
)
from pipeline.spec import VariantSpec, parse_variant
from tests.factories import make_facts, make_module


@pytest.mark.parametrize(
    ("variant", "group_size", "expected"),
    [
        ("gptq-w4-g128", 128, 4 + 20 / 128),  # scale and zero point
        ("gptq-w4-g128-ct", 128, 4 + 16 / 128),  # symmetric: no zero point stored
        ("awq-w4-g64", 64, 4 + 20 / 64),
        ("rtn-w8-channel", -1, 8 + 16 / 1024),
        ("gptq-w3-g64", 64, 3 + (16 + 3) / 64),
        ("awq-w2-g64", 64, 2 + (16 + 2) / 64),
    ],
)
def test_effective_bits_count_scales_and_stored_zero_points(variant: str, group_size: int, expected: float) -> None:
    spec = parse_variant(variant)
    facts = make_facts(spec, modules=(make_module(bits=spec.bits, group_size=group_size),))
    assert bits_per_quantized_weight(facts) == pytest.approx(expected)


def test_effective_bits_are_weighted_by_size_and_leave_out_16_bit() -> None:
    small = make_module("a.x", out_features=1024, in_features=1024, group_size=128)
    large = make_module("a.y", out_features=3072, in_features=1024, group_size=64)
    kept = make_module("a.z", bits=16, group_size=0)
    assert bits_per_quantized_weight(make_facts(modules=(small, large, kept))) == pytest.approx(
        4 + 0.25 * 20 / 128 + 0.75 * 20 / 64
    )
    assert bits_per_quantized_weight(make_facts(modules=(kept,))) is None


def test_bits_per_parameter_of_the_source_dtype_is_sixteen() -> None:
    facts = make_facts()
    assert bits_per_parameter(facts.model_copy(update={"size_bytes": facts.source.size_bytes})) == 16


def test_the_quantized_share_counts_weights() -> None:
    facts = make_facts(modules=(make_module(), make_module("a.z", bits=16, group_size=0)))
    assert quantized_share(facts) == pytest.approx(1024 * 1024 / facts.source.num_parameters)


def test_worst_modules_come_in_falling_order_without_unquantized_ones() -> None:
    errors = {"b": 0.1, "a": 0.1, "c": 0.3, "d": 0.2}
    modules = [make_module(name, relative_error=error) for name, error in errors.items()]
    modules.append(make_module("e", bits=16, relative_error=0.9))
    assert [module.name for module in worst_modules(make_facts(modules=tuple(modules)), 3)] == ["c", "d", "a"]


def test_every_figure_is_judged_against_its_budget() -> None:
    facts = make_facts(modules=(make_module(relative_error=0.36, degradations=("x",)),))
    assert [(row.value, row.budget, row.kept) for row in judge(facts)] == [
        ("0.36", "0.35", False),
        ("0.0612", "0.75", True),
        ("1.059", "1.75", True),
        ("1", "0", False),
    ]


def test_a_figure_that_is_no_number_keeps_no_budget_and_no_budget_judges_nothing() -> None:
    facts = make_facts()
    broken = facts.model_copy(update={"quality": facts.quality.model_copy(update={"kl": math.nan})})
    assert judge(broken)[1].kept is False
    budgets = facts.verdict.budgets.model_copy(update={"max_kl": None})
    free = facts.model_copy(update={"verdict": facts.verdict.model_copy(update={"budgets": budgets})})
    assert (judge(free)[1].budget, judge(free)[1].kept) == ("not judged", None)


def test_names_that_differ_in_numbers_fold_when_the_text_is_the_same() -> None:
    entries = [("m.0.q", "x"), ("m.1.q", "x"), ("m.2.q", "y"), ("m.0.experts.3.w1", "x"), ("m.1.experts.4.w1", "x")]
    assert fold_names(entries) == (
        Folded("m.*.q", 2, "x"),
        Folded("m.2.q", 1, "y"),
        Folded("m.*.experts.*.w1", 2, "x"),
    )


def test_exceptions_say_how_and_why() -> None:
    note = "group size 128 does not divide 576"
    modules = (
        make_module("m.0.q", group_size=64, note=note),
        make_module("m.0.o", bits=16, group_size=0, note="left unquantized: the spec ignores it"),
        make_module("m.0.v"),
    )
    assert list_exceptions(make_facts(modules=modules)) == (
        Folded("m.0.q", 1, f"4 bit, groups of 64: {note}"),
        Folded("m.0.o", 1, "left unquantized: the spec ignores it"),
    )


def test_the_family_holds_this_variant_once_smallest_first() -> None:
    rows = family(make_facts(size_bytes=160_000_000))
    assert [(row.variant, row.is_this) for row in rows] == [
        ("awq-w4-g128", False),
        ("gptq-w4-g128", True),
        ("rtn-w8-g128", False),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "q_proj"),
        ("model.layers.3.mlp.experts.17.w1", "experts.w1"),
        ("experts", "experts"),
    ],
)
def test_kinds_are_the_same_in_every_block(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_schemes_are_described_in_words() -> None:
    assert describe_scheme(parse_variant("gptq-w4-g128"), [make_module()]) == "4-bit GPTQ, symmetric, groups of 128"
    rows = make_module(bits=8, group_size=-1)
    assert describe_scheme(parse_variant("rtn-w8-channel-asym"), [rows]) == (
        "8-bit round to nearest, asymmetric, one scale per row"
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((96, 96), "groups of 96"),
        ((64, 64), "groups of 64 (96 asked)"),
        ((32, 96), "groups of 96 and 32"),
        ((32, 64), "groups of 64 and 32 (96 asked)"),
        ((), "groups of 96"),
    ],
)
def test_a_scheme_states_the_groups_that_the_linears_have(sizes: tuple[int, ...], expected: str) -> None:
    modules = [make_module(group_size=size) for size in sizes]
    modules.append(make_module(bits=16, group_size=0, note="ignored by the spec"))
    spec = VariantSpec.model_validate({"method": "gptq", "format": "gptq", "group_size": 96})
    assert describe_scheme(spec, modules).endswith(f"symmetric, {expected}")


def test_several_widths_are_said_with_their_average_and_where_they_are() -> None:
    modules = [
        make_module(f"model.layers.{block}.{name}", block=block, bits=bits)
        for name, widths in {"q_proj": (3, 4, 4, 4, 6), "k_proj": (3, 4, 4, 4, 6), "down_proj": (4,) * 5}.items()
        for block, bits in enumerate(widths)
    ]
    modules.append(make_module("model.layers.0.o_proj", bits=16, group_size=0))
    facts = make_facts("gptq-w4.0-g128", modules=tuple(modules))
    assert describe_scheme(facts.variant, facts.modules).startswith(
        "3-, 4- and 6-bit (4.13 on average) GPTQ, symmetric"
    )
    assert width_rows(facts) == (
        WidthRow(("q_proj", "k_proj"), 3, "0"),
        WidthRow(("q_proj", "k_proj"), 4, "1-3"),
        WidthRow(("q_proj", "k_proj"), 6, "4"),
        WidthRow(("down_proj",), 4, "0-4"),
    )
    assert predicted_kl(facts) is None
    foretold = make_facts(modules=tuple(module.model_copy(update={"predicted_kl": 0.25}) for module in modules[:2]))
    assert predicted_kl(foretold) == 0.5


def test_one_width_needs_no_table() -> None:
    assert width_rows(make_facts("gptq-w4-g128")) == ()
