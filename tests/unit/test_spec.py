"""Specs: short names, files, overrides, budgets, and errors that name the key."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.errors import SpecError
from pipeline.spec import (
    BUDGETS_BY_BITS,
    FORMAT_BITS,
    Activations,
    Format,
    GateSpec,
    Method,
    NumberType,
    Propagate,
    VariantSpec,
    build_spec,
    load_spec,
    parse_variant,
    resolve_budgets,
)

MINIMAL: dict[str, Any] = {"source": "org/model", "variants": ["gptq-w4-g128"], "targets": ["out"]}
EVERY_VARIANT = [
    *(
        {"method": method, "bits": bits, "group_size": group, "symmetric": symmetric, "format": format_}
        for method, format_, symmetric, group in itertools.product(Method, Format, (True, False), (-1, 16, 64, 128))
        for bits in FORMAT_BITS[format_]
        if (format_ is not Format.GPTQ or symmetric) and (format_ is not Format.AWQ or not symmetric)
        if not method.is_smooth
    ),
    *(
        {"method": method, "type": type_, "activations": Activations.DYNAMIC}
        for method, type_ in itertools.product(Method, NumberType)
        if method is Method.RTN or (type_ is NumberType.INT and method not in (Method.AWQ, Method.AWQ_GPTQ))
    ),
]


@pytest.mark.parametrize("fields", EVERY_VARIANT, ids=lambda fields: VariantSpec.model_validate(fields).name)
def test_every_variant_has_a_short_name_that_means_it(fields: dict[str, Any]) -> None:
    variant = VariantSpec.model_validate(fields)
    assert parse_variant(variant.name) == variant


def test_short_names_are_distinct() -> None:
    names = [VariantSpec.model_validate(fields).name for fields in EVERY_VARIANT]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "format_", "symmetric"),
    [
        ("gptq-w4-g128", Format.GPTQ, True),
        ("awq-w4-g128", Format.AWQ, False),
        ("awq-w8-g128", Format.COMPRESSED_TENSORS, False),
        ("awq-w4-g128-gptq", Format.GPTQ, True),
        ("awq-w3-g64", Format.GPTQ, True),
        ("awq-w2-g64", Format.GPTQ, True),
        ("gptq-w3-g64", Format.GPTQ, True),
        ("gptq-w4-g64-gptq_v2", Format.GPTQ_V2, True),
        ("gptq-w4-g64-gptq_v2-asym", Format.GPTQ_V2, False),
        ("awq-w4-g64-gptq_v2", Format.GPTQ_V2, False),
        ("gptq-w2-channel", Format.GPTQ, True),
        ("rtn-w3-g64", Format.GPTQ, True),
        ("rtn-w2-g64", Format.GPTQ, True),
        ("rtn-w8-g128", Format.COMPRESSED_TENSORS, True),
        ("rtn-w4-g64-awq", Format.AWQ, False),
        ("gptq-w4-g64-ct-asym", Format.COMPRESSED_TENSORS, False),
        ("gptq-w3-g64-ct", Format.COMPRESSED_TENSORS, True),
        ("gptq-w5-g64", Format.COMPRESSED_TENSORS, True),
        ("awq-w6-g64", Format.COMPRESSED_TENSORS, False),
        ("rtn-w5-channel", Format.COMPRESSED_TENSORS, True),
        ("gptq-w4.0-g64", Format.COMPRESSED_TENSORS, True),
        ("gptq-w3.25-g64-gptq", Format.GPTQ, True),
        ("awq-w4.5-g64", Format.COMPRESSED_TENSORS, False),
    ],
)
def test_what_a_name_leaves_out_is_what_its_format_holds(name: str, format_: Format, symmetric: bool) -> None:
    variant = parse_variant(name)
    assert (variant.format, variant.symmetric, variant.name) == (format_, symmetric, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fancy", "method-wBITS-gGROUP"),
        ("gptq-w7-g128", "bits"),
        ("gptq-w5-g64-gptq", r"holds 2, 3, 4, 8 bits, not 5 \(formats that do: compressed-tensors\)"),
        ("awq-w8-g64-awq", "format awq holds 4 bits, not 8"),
        ("gptq-w4-g64-asym", "symmetric grids only"),
        ("rtn-w9-g64", "bits"),
        ("awq-w3-g64-awq", r"format awq holds 4 bits, not 3 \(formats that do: gptq, gptq_v2, compressed-tensors\)"),
        ("awq-w2-g64-asym", "symmetric grids only"),
        ("awq-w4-g64-sym", "stores zero points"),
        ("gptq-w4-g12", "multiple of 8"),
        ("awq-w4.5-g64-awq", "one width for all linears"),
        ("gptq-w9.5-g64", "less than or equal to 8"),
        ("gptq-w4.-g64", "method-wBITS-gGROUP"),
        ("gptq-w4-g128-", "method-wBITS-gGROUP"),
        ("GPTQ-w4-g128", "method-wBITS-gGROUP"),
    ],
)
def test_a_name_that_cannot_be_meant_is_refused_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        parse_variant(name)
    assert name in caught.value.message
    assert "\n" not in caught.value.message
    assert "{'" not in caught.value.message


def write(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


def test_flags_override_a_file_key_by_key(tmp_path: Path) -> None:
    file = write(tmp_path, yaml.safe_dump(MINIMAL | {"calibration": {"samples": 3, "length": 64}}))
    spec = load_spec(file, {"calibration": {"samples": 5}, "targets": ["elsewhere"]})
    assert (spec.calibration.samples, spec.calibration.length, spec.targets) == (5, 64, ("elsewhere",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variants": []}, "variants"),
        ({"variants": ["gptq-w4-g128", "gptq-w4-g128"]}, "two variants are called gptq-w4-g128"),
        ({"variants": [{"method": "gptq", "bitz": 4}]}, r"variants.0.bitz: unknown key; legal here: .*bits"),
        ({"calibration": {"smaples": 3}}, "calibration.smaples: unknown key; legal here: .*samples"),
        ({"calibration": {"samples": 0}}, r"calibration.samples: .*greater than or equal to 1 \(got 0\)"),
        ({"gates": {"prompts": [{"promt": "x"}]}}, "gates.prompts.0.promt: unknown key; legal here: expect, prompt"),
        ({"surprise": 1}, "surprise: unknown key; legal here: .*source"),
        ({"gates": {"prompt": []}}, "gates.prompt: unknown key; legal here: .*prompts"),
        ({"variants": [{"method": "gptq", "ignore": ["a", "re:("]}]}, r"variants.0.ignore.1: '\(' is no regular"),
        ({"gates": {"prompts": [{"prompt": "x", "expect": "("}]}}, r"gates.prompts.0.expect: '\(' is no regular"),
        ({"gates": {"prompts": [{"prompt": ""}]}}, "gates.prompts.0.prompt: .*nothing to continue"),
        ({"gates": {"prompts": [{"prompt": " \n"}]}}, "gates.prompts.0.prompt: .*nothing to continue"),
        ({"gates": {"prompts": []}}, "gates.prompts: .*at least 1 item"),
        ({"gates": {"generated_tokens": 7}}, "gates.generated_tokens: .*greater than or equal to 8"),
    ],
)
def test_a_wrong_key_or_value_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        build_spec(MINIMAL | change, "spec test.yaml")


@pytest.mark.parametrize(
    "change", [{"variants": [{"method": "gptq", "ignore": ["re:("]}]}, {"gates": {"prompts": [{"prompt": " "}]}}]
)
def test_a_list_whose_only_entry_is_wrong_is_not_called_empty_too(change: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        build_spec(MINIMAL | change, "spec test.yaml")
    assert len(caught.value.message.splitlines()) == 2


@pytest.mark.parametrize(("text", "words"), [("a: [", "not YAML"), ("- 1", "not a mapping"), ("\x00", "not YAML")])
def test_a_file_that_is_no_spec_is_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        load_spec(write(tmp_path, text), {})
    assert str(tmp_path / "spec.yaml") in caught.value.message
    with pytest.raises(SpecError, match="No such file"):
        load_spec(tmp_path / "absent.yaml", {})


def test_a_spec_cannot_be_changed() -> None:
    spec = build_spec(MINIMAL, "test")
    with pytest.raises(ValidationError):
        spec.source = "other"  # type: ignore[misc]


def test_ignore_takes_whole_names_and_expressions() -> None:
    variant = VariantSpec(method=Method.RTN, ignore=("model.layers.0.mlp.up_proj", "re:layers\\.1\\..*down"))
    assert variant.ignores("model.layers.0.mlp.up_proj")
    assert variant.ignores("model.layers.1.mlp.down_proj")
    assert not variant.ignores("model.layers.0.mlp.up_proj.extra")
    assert not variant.ignores("model.layers.11.mlp.up_proj")


def test_every_width_has_budgets_and_narrower_codes_no_tighter_ones() -> None:
    assert sorted(BUDGETS_BY_BITS) == sorted({bits for held in FORMAT_BITS.values() for bits in held})
    for narrow, wide in itertools.pairwise(sorted(BUDGETS_BY_BITS)):
        assert all(BUDGETS_BY_BITS[narrow][key] >= budget for key, budget in BUDGETS_BY_BITS[wide].items())


@pytest.mark.parametrize("bits", sorted(BUDGETS_BY_BITS))
def test_auto_budgets_depend_on_the_bits_and_null_is_not_judged(bits: int) -> None:
    variant = parse_variant(f"rtn-w{bits}-g128")
    budgets = resolve_budgets(GateSpec(max_perplexity_ratio=None), variant)
    assert budgets.max_kl == BUDGETS_BY_BITS[bits]["max_kl"]
    assert budgets.max_perplexity_ratio is None
    assert resolve_budgets(GateSpec(max_kl=0.5), variant).max_kl == 0.5


def test_several_widths_are_held_to_the_least_one_and_to_their_average() -> None:
    budgets = resolve_budgets(GateSpec(), parse_variant("gptq-w4.5-g64"), {3: 10, 4: 40, 6: 50})
    assert budgets.max_relative_error == BUDGETS_BY_BITS[3]["max_relative_error"]
    assert budgets.max_kl == BUDGETS_BY_BITS[4]["max_kl"]
    assert resolve_budgets(GateSpec(), parse_variant("gptq-w7.5-g64"), {6: 25, 8: 75}).max_kl == 0.1


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("gptq-w4.0-g64", (3, 4, 5, 6)),
        ("gptq-w4.5-g64-gptq", (3, 4, 8)),
        ("gptq-w3.0-g64", (3, 4, 5)),
        ("gptq-w2.5-g64", (2, 3, 4)),
        ("gptq-w5.7-g64", (4, 5, 6, 8)),
        ("gptq-w8.0-g64", (6, 8)),
        ("gptq-w4-g64", ()),
    ],
)
def test_widths_to_choose_from_lie_around_the_average(name: str, choices: tuple[int, ...]) -> None:
    assert parse_variant(name).choices == choices


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({}, "give one of average_bits, weights and memory, not none"),
        ({"average_bits": 4.5, "weights": "1GB"}, "not average_bits and weights"),
        ({"weights": "some"}, "'some' is no size"),
        ({"average_bits": 4.5, "choices": [4]}, "nothing to choose from: .* holds 4 of"),
        ({"average_bits": 4.5, "choices": [4, 7]}, "Input should be 2, 3, 4, 5, 6 or 8"),
    ],
)
def test_a_mix_that_cannot_be_meant_is_refused_with_the_reason(mix: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        build_spec({"source": "x", "targets": ["y"], "variants": [{"method": "gptq", "mix": mix}]}, "test")


def test_widths_and_mix_exclude_each_other_and_need_a_format_that_holds_them() -> None:
    both = {"method": "gptq", "mix": {"average_bits": 4.5}, "widths": {"re:down": 8}}
    unheld = {"method": "gptq", "format": "gptq", "widths": {"re:down": 6}}
    for fields, words in ((both, "mix chooses every width itself"), (unheld, "holds 2, 3, 4, 8 bits, not 6")):
        with pytest.raises(SpecError, match=words):
            build_spec({"source": "x", "targets": ["y"], "variants": [fields]}, "test")


@pytest.mark.parametrize(
    ("name", "format_", "symmetric"),
    [
        ("awq-gptq-w4-g64", Format.AWQ, False),
        ("awq-gptq-w3-g64", Format.GPTQ, True),
        ("awq-gptq-w4-g128-ct-sym", Format.COMPRESSED_TENSORS, True),
        ("awq-gptq-w4-g128-gptq-seq", Format.GPTQ, True),
    ],
)
def test_a_method_of_two_words_is_told_from_a_format(name: str, format_: Format, symmetric: bool) -> None:
    found = parse_variant(name)
    assert (found.name, found.method) == (name, Method.AWQ_GPTQ)
    assert (found.format, found.symmetric) == (format_, symmetric)
    assert parse_variant("awq-w4-g64-gptq").method is Method.AWQ


@pytest.mark.parametrize(
    ("plain", "suffix", "schedule"),
    [
        ("gptq-w4-g64", "seq", Propagate.QUANTIZED),
        ("awq-w3-g128-ct-sym", "seq", Propagate.QUANTIZED),
        ("gptq-w4.5-g64", "twopass", Propagate.TWO_PASS),
        ("rtn-w8-channel", "twopass", Propagate.TWO_PASS),
        ("gptq-w3-g64", "trueseq", Propagate.TRUE_SEQUENTIAL),
        ("rtn-w4-g64", "trueseq", Propagate.TRUE_SEQUENTIAL),
    ],
)
def test_a_short_name_says_the_schedule(plain: str, suffix: str, schedule: Propagate) -> None:
    found, float_one = parse_variant(f"{plain}-{suffix}"), parse_variant(plain)
    assert (found.name, found.propagate) == (f"{plain}-{suffix}", schedule)
    assert float_one.propagate is Propagate.FLOAT
    assert found.model_copy(update={"propagate": Propagate.FLOAT, "name": plain}) == float_one
    assert found.compensated_share == {"seq": 0.3, "twopass": 0.0, "trueseq": 0.3}[suffix]
    assert float_one.compensated_share == 0.0
    given = VariantSpec.model_validate({**found.model_dump(), "name": "", "compensation": 0.5})
    assert given.compensated_share == 0.5
    assert given.name.startswith(f"{found.name}-x")


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
def test_scales_that_change_what_was_solved_before_are_refused(method: str) -> None:
    with pytest.raises(SpecError, match=rf"not for {method}, whose scales change .* choose quantized, or method gptq"):
        parse_variant(f"{method}-w4-g64-trueseq")


def test_what_a_short_name_does_not_say_is_in_the_name_all_the_same() -> None:
    plain = VariantSpec(method=Method.GPTQ, format=Format.GPTQ, group_size=64)
    others = [
        VariantSpec.model_validate({**plain.model_dump(), "name": "", **change}).name
        for change in ({"ignore": ["re:down"]}, {"ignore": ["re:up"]}, {"damping": 0.05}, {"act_order": False})
    ]
    assert plain.name == "gptq-w4-g64"
    assert len(set(others)) == 4
    assert all(name.startswith("gptq-w4-g64-x") for name in others)
    mixes = [{"weights": "1GB"}, {"weights": "2GB"}, {"average_bits": 4.5}, {"average_bits": 4.5, "samples": 4}]
    mixed = [VariantSpec.model_validate({"method": "gptq", "mix": mix}).name for mix in mixes]
    assert len(set(mixed)) == 4
    assert mixed[2] == "gptq-w4.5-g128"
    assert all(name.startswith("gptq-mix-g128-x") for name in mixed[:2])
    named = VariantSpec.model_validate({**plain.model_dump(), "name": "mine", "damping": 0.05})
    assert named.name == "mine"


def test_an_engine_is_demanded_once() -> None:
    spec = build_spec({**MINIMAL, "gates": {"engines": ["transformers"]}}, "test")
    assert [engine.value for engine in spec.gates.engines] == ["transformers"]
    for engines, reason in ((["transformers"] * 2, "an engine is named twice"), (["vllm"], "'transformers'")):
        with pytest.raises(SpecError, match=reason):
            build_spec({**MINIMAL, "gates": {"engines": engines}}, "test")
