"""Configurations: read back as written, as loaders read them, and refused when they contradict themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.errors import FormatError
from pipeline.formats.config import quantization_config, read_quantization_config
from pipeline.quantize.types import Scheme
from pipeline.spec import Format, VariantSpec, parse_variant

LEAVES = (
    *(f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
)
NAMES = tuple(f"model.layers.{block}.{leaf}" for block in range(12) for leaf in LEAVES)
VARIANTS = {
    Format.GPTQ: parse_variant("gptq-w4-g64"),
    Format.GPTQ_V2: parse_variant("gptq-w4-g64-gptq_v2-asym"),
    Format.AWQ: parse_variant("awq-w4-g64"),
    Format.COMPRESSED_TENSORS: parse_variant("rtn-w4-g64"),
}
Schemes = dict[str, Scheme | None]


def _uniform(format_: Format) -> Schemes:
    scheme = Scheme(4, 64, VARIANTS[format_].symmetric)
    return {**dict.fromkeys(NAMES, scheme), "lm_head": None}


def _written(format_: Format, schemes: Mapping[str, Scheme | None], variant: VariantSpec | None = None) -> Any:
    config = quantization_config(format_, schemes, variant or VARIANTS[format_], "1.2.3")
    return json.loads(json.dumps(config))


def _read(config: Mapping[str, Any], schemes: Mapping[str, Scheme | None], in_features: int = 1536) -> Schemes:
    reader = read_quantization_config(config)
    return {name: reader.scheme(name, in_features) for name in schemes}


def _some_kept(format_: Format) -> Schemes:
    schemes = _uniform(format_)
    return schemes | {"model.layers.3.mlp.down_proj": None, "model.layers.11.self_attn.o_proj": None}


def _column_kept(format_: Format) -> Schemes:
    return {name: None if name.endswith("down_proj") else scheme for name, scheme in _uniform(format_).items()}


def _mixed_groups(format_: Format) -> Schemes:
    wide = Scheme(4, 128, VARIANTS[format_].symmetric)
    return {name: wide if name.endswith("down_proj") else scheme for name, scheme in _uniform(format_).items()}


def _mixed_attention(format_: Format) -> Schemes:
    wide = Scheme(4, 128, VARIANTS[format_].symmetric)
    attention = ("q_proj", "k_proj", "v_proj")
    return {name: wide if name.endswith(attention) else scheme for name, scheme in _uniform(format_).items()}


def _one_block_differs(format_: Format) -> Schemes:
    wide = Scheme(8, 32, VARIANTS[format_].symmetric)
    return {name: wide if ".5." in name else scheme for name, scheme in _uniform(format_).items()}


def _renamed(format_: Format) -> Schemes:
    """A vision model with one column kept, every linear under the model's name and the checkpoint's."""
    both: Schemes = {}
    for name, scheme in _column_kept(format_).items():
        both |= {name.replace("model.", f"{prefix}.", 1): scheme for prefix in ("model.language_model", "text")}
    vision = ("model.vision_tower.layers.0.self_attn.q_proj", "vision_tower.layers.0.self_attn.q_proj")
    return {**both, **dict.fromkeys(vision), "text.lm_head": None}


def _prefixless(format_: Format) -> Schemes:
    """One column kept, every linear under the model's name and without its prefix."""
    both: Schemes = {}
    for name, scheme in _some_kept(format_).items():
        both |= {name: scheme, name.removeprefix("model."): scheme}
    return both


SHAPES = [
    _uniform,
    _some_kept,
    _column_kept,
    _mixed_groups,
    _mixed_attention,
    _one_block_differs,
    _renamed,
    _prefixless,
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format_", list(Format))
def test_configuration_reads_back_as_written(format_: Format, shape: Any) -> None:
    schemes = shape(format_)
    if format_ is Format.AWQ and len({scheme for scheme in schemes.values() if scheme}) > 1:
        with pytest.raises(FormatError, match="one grid for all linears"):
            _written(format_, schemes)
        return
    config = _written(format_, schemes)
    assert _read(config, schemes) == schemes
    assert read_quantization_config(config).format is format_


@pytest.mark.parametrize("format_", list(Format))
def test_whole_rows_are_written_as_minus_one_and_read_per_matrix(format_: Format) -> None:
    variant = VARIANTS[format_].model_copy(update={"group_size": -1})
    schemes: Schemes = {
        "model.layers.0.a": Scheme(4, 576, variant.symmetric),
        "model.layers.0.b": Scheme(4, 1536, variant.symmetric),
    }
    config = _written(format_, schemes, variant)
    reader = read_quantization_config(config)
    assert reader.scheme("model.layers.0.a", 576) == schemes["model.layers.0.a"]
    assert reader.scheme("model.layers.0.b", 1536) == schemes["model.layers.0.b"]
    if format_ is Format.COMPRESSED_TENSORS:
        assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    else:
        assert config["group_size"] == -1


def test_uniform_gptq_configuration_is_the_plain_one() -> None:
    config = _written(Format.GPTQ, _uniform(Format.GPTQ))
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "true_sequential": False,
        "damp_percent": 0.01,
        "meta": {
            "quantizer": ["bitmill:1.2.3"],
            "variant": "gptq-w4-g64",
            "act_order": True,
            "static_groups": True,
        },
    }


def test_uniform_awq_configuration_is_the_plain_one() -> None:
    config = _written(Format.AWQ, _uniform(Format.AWQ))
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
        "meta": {"quantizer": ["bitmill:1.2.3"], "variant": "awq-w4-g64"},
    }


def test_uniform_compressed_configuration_targets_the_class() -> None:
    config = _written(Format.COMPRESSED_TENSORS, _uniform(Format.COMPRESSED_TENSORS))
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["format"] == config["format"] == "pack-quantized"
    assert group["weights"]["num_bits"] == 4
    assert group["weights"]["group_size"] == 64
    assert group["weights"]["type"] == "int"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("symmetric", "shape", "unpacks"),
    [(False, _uniform, True), (False, _some_kept, True), (False, _mixed_groups, False), (True, _uniform, False)],
)
def test_asymmetric_files_of_one_grid_are_unpacked_while_loading(symmetric: bool, shape: Any, unpacks: bool) -> None:
    from transformers import CompressedTensorsConfig

    variant = parse_variant("rtn-w4-g64" if symmetric else "rtn-w4-g64-asym")
    schemes = {
        name: None if scheme is None else Scheme(scheme.bits, scheme.group_size, symmetric)
        for name, scheme in shape(Format.COMPRESSED_TENSORS).items()
    }
    config = _written(Format.COMPRESSED_TENSORS, schemes, variant)
    assert config.get("dequantize", False) is unpacks
    # transformers takes the key from the file, and our own reader passes over it.
    assert CompressedTensorsConfig.from_dict(dict(config)).dequantize is unpacks
    assert _read(config, schemes) == schemes


def _as_vllm_reads(config: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    """Return bits and group size of a (possibly fused) linear as vLLM's gptq code finds them."""
    for pattern, over in config.get("dynamic", {}).items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return None
        elif re.match(pattern.removeprefix("+:"), name):
            return over.get("bits", config["bits"]), over.get("group_size", config["group_size"])
    return config["bits"], config["group_size"]


def test_fused_linears_find_the_grid_of_their_parts() -> None:
    config = _written(Format.GPTQ, _mixed_attention(Format.GPTQ))
    assert _as_vllm_reads(config, "model.layers.11.self_attn.qkv_proj") == (4, 128)
    assert _as_vllm_reads(config, "model.layers.11.self_attn.o_proj") == (4, 64)
    assert _as_vllm_reads(config, "model.layers.11.mlp.gate_up_proj") == (4, 64)
    config = _written(Format.GPTQ, _one_block_differs(Format.GPTQ))
    assert _as_vllm_reads(config, "model.layers.5.self_attn.qkv_proj") == (8, 32)
    assert _as_vllm_reads(config, "model.layers.5.mlp.gate_up_proj") == (8, 32)
    assert _as_vllm_reads(config, "model.layers.6.mlp.gate_up_proj") == (4, 64)
    kept = {name: None if "_attn" in name and ".5." in name else s for name, s in _uniform(Format.GPTQ).items()}
    assert _as_vllm_reads(_written(Format.GPTQ, kept), "model.layers.5.self_attn.qkv_proj") is None


def test_patterns_stay_few_where_whole_columns_differ() -> None:
    assert list(_written(Format.GPTQ, _mixed_groups(Format.GPTQ))["dynamic"]) == [
        r"+:^model\.layers\.\d+\.mlp\.down_proj$"
    ]
    groups = _written(Format.COMPRESSED_TENSORS, _mixed_groups(Format.COMPRESSED_TENSORS))["config_groups"]
    assert groups["group_1"]["targets"] == [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]
    assert len(groups["group_0"]["targets"]) == 6


def _as_optimum_reads(config: Mapping[str, Any], name: str) -> bool:
    """Return whether transformers (through optimum) quantizes a linear of a block."""
    listed = config.get("modules_in_block_to_quantize")
    return listed is None or any(name.endswith(ending) for endings in listed for ending in endings)


@pytest.mark.parametrize("shape", [_uniform, _some_kept, _column_kept, _renamed, _prefixless])
def test_transformers_and_the_configuration_agree_on_what_is_quantized(shape: Any) -> None:
    schemes = {name: scheme for name, scheme in shape(Format.GPTQ).items() if "lm_head" not in name}
    config = _written(Format.GPTQ, schemes)
    assert {name: _as_optimum_reads(config, name) for name in schemes} == {
        name: scheme is not None for name, scheme in schemes.items()
    }


def test_in_block_names_are_short_where_they_tell_linears_apart() -> None:
    config = _written(Format.GPTQ, _column_kept(Format.GPTQ))
    assert config["modules_in_block_to_quantize"] == [[leaf for leaf in LEAVES if leaf != "mlp.down_proj"]]
    assert "modules_in_block_to_quantize" not in _written(Format.GPTQ, _uniform(Format.GPTQ))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_the_owning_package_matches_names_to_the_same_grids(shape: Any) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    schemes = shape(Format.COMPRESSED_TENSORS)
    config = QuantizationConfig.model_validate(_written(Format.COMPRESSED_TENSORS, schemes))
    for name, scheme in schemes.items():
        if any(match_name(name, ignored) for ignored in config.ignore or []):
            assert scheme is None, name
            continue
        found = [
            (group.weights.num_bits, group.weights.group_size)
            for group in config.config_groups.values()
            if any(target == "Linear" or match_name(name, target) for target in group.targets)
        ]
        assert scheme is not None
        assert found == [(scheme.bits, scheme.group_size)]


@pytest.mark.parametrize("shape", [_some_kept, _column_kept, _renamed, _prefixless])
def test_transformers_skips_exactly_what_awq_leaves_alone(shape: Any) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    schemes = shape(Format.AWQ)
    listed = _written(Format.AWQ, schemes)["modules_to_not_convert"]
    assert {name: should_convert_module(name, listed) for name in schemes} == {
        name: scheme is not None for name, scheme in schemes.items()
    }


def test_awq_refuses_a_name_that_hides_in_a_quantized_one() -> None:
    schemes: Schemes = {"layers.0.mlp.gate": None, "layers.0.mlp.gate_proj": Scheme(4, 64, False)}
    with pytest.raises(FormatError, match=r"skip layers\.0\.mlp\.gate_proj too"):
        _written(Format.AWQ, schemes)


@pytest.mark.parametrize("format_", list(Format))
def test_nothing_quantized_has_no_configuration(format_: Format) -> None:
    with pytest.raises(FormatError, match="no linear is quantized"):
        _written(format_, dict.fromkeys(NAMES))


def test_grids_that_the_format_lacks_are_refused_when_writing() -> None:
    with pytest.raises(FormatError, match="symmetric"):
        _written(Format.GPTQ, {"a": Scheme(4, 64, False)})
    with pytest.raises(FormatError, match="asymmetric"):
        _written(Format.AWQ, {"a": Scheme(4, 64, True)})


BAD = {
    Format.GPTQ: [
        ({"format": "gptq_v2"}, "it says version 1 .gptq. and version 2"),
        ({"checkpoint_format": "gptq_p"}, "gptq_p is not read"),
        ({"checkpoint_format": "marlin"}, "marlin is not read"),
        ({"sym": False}, "sym is False"),
        ({"sym": None}, "sym is None"),
        ({"bits": 5}, "bits 5 is none of 2, 3, 4, 8"),
        ({"bits": "4"}, "bits '4'"),
        ({"bits": True}, "bits True"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": None}, "group_size None"),
        ({"dynamic": ["x"]}, "dynamic is no mapping"),
        ({"dynamic": {"+:(": {}}}, "no regular expression"),
        ({"dynamic": {"+:x": {"bits": 5}}}, "bits 5"),
        ({"dynamic": {"+:x": {"sym": False}}}, "no readable override"),
        ({"dynamic": {"+:x": None}}, "no readable override"),
        ({"modules_in_block_to_quantize": "x"}, "is no list"),
        ({"modules_in_block_to_quantize": [[1]]}, "is no list of names"),
    ],
    Format.GPTQ_V2: [
        ({"checkpoint_format": "gptq"}, "sym is False"),
        ({"sym": None}, "symmetry None"),
        ({"bits": 6}, "bits 6 is none of 2, 3, 4, 8"),
        ({"dynamic": {"+:x": {"sym": True}}}, "no readable override"),
    ],
    Format.AWQ: [
        ({"version": "gemv"}, "'gemv' is not read"),
        ({"version": 1}, "1 is not read"),
        ({"zero_point": False}, "zero_point is False"),
        ({"bits": 8}, "bits 8"),
        ({"bits": 3}, "bits 3 is none of 4"),
        ({"group_size": "64"}, "group_size '64'"),
        ({"modules_to_not_convert": "lm_head"}, "is no list of names"),
    ],
    Format.COMPRESSED_TENSORS: [
        ({"format": "int-quantized"}, "int-quantized"),
        ({"quantization_status": "frozen"}, "frozen"),
        ({"quantization_status": "nonsense"}, "is not valid"),
        ({"config_groups": {"group_0": 1}}, "is not valid"),
        ({"config_groups": {"NO_PRESET": ["Linear"]}}, "is not valid"),
        ({"config_groups": {"FP8_DYNAMIC": ["Linear"]}}, "weights in float-quantized, not in format pack-quantized"),
        ({"config_groups": {"MXFP4A16": ["Linear"]}}, "whose inputs are not rounded are not read"),
        (
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 7, "group_size": 64}}}},
            "bits 7",
        ),
        ({"config_groups": {"group_0": {"targets": ["re:("], "weights": {"group_size": 64}}}}, "no regular expression"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "only static weight"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
        ({"ignore": ["re:("]}, "no regular expression"),
    ],
}


@pytest.mark.parametrize(
    ("format_", "change", "reason"),
    [(format_, change, reason) for format_, cases in BAD.items() for change, reason in cases],
    ids=str,
)
def test_contradictions_are_format_errors(format_: Format, change: dict[str, Any], reason: str) -> None:
    config = _written(format_, _uniform(format_)) | change
    with pytest.raises(FormatError, match=reason):
        read_quantization_config(config)


@pytest.mark.parametrize("config", [{}, {"quant_method": "fp8"}, {"quant_method": None}, {"quant_method": ["gptq"]}])
def test_unknown_kinds_are_refused_with_the_known_ones(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="none of gptq, awq, compressed-tensors"):
        read_quantization_config(config)


def test_configurations_of_other_tools_are_read() -> None:
    gptq = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "dynamic": {r"-:.*\.gate$": {}, r".*\.2\..*": {"bits": 8}},
    }
    reader = read_quantization_config(gptq)
    assert reader.scheme("model.layers.0.mlp.gate", 256) is None
    assert reader.scheme("model.layers.2.mlp.up_proj", 256) == Scheme(8, 128, True)
    assert reader.scheme("model.layers.0.mlp.up_proj", 256) == Scheme(4, 128, True)
    assert reader.scheme("lm_head", 256) is None
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}
    assert read_quantization_config(awq).scheme("model.layers.0.x", 256) == Scheme(4, 128, False)
    assert read_quantization_config(awq).scheme("lm_head", 256) is None
    skipping = read_quantization_config(awq | {"modules_to_not_convert": ["mlp.gate", "visual"]})
    assert skipping.scheme("model.layers.0.mlp.gate", 256) is None
    assert skipping.scheme("visual.blocks.0.fc", 256) is None
    assert skipping.scheme("model.layers.0.mlp.gate_proj", 256) == Scheme(4, 128, False)
    preset = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"W4A16": ["Linear"]},
        "ignore": ["lm_head", "re:.*router$"],
    }
    assert read_quantization_config(preset).scheme("a.b", 256) == Scheme(4, 128, True)
    assert read_quantization_config(preset).scheme("a.router", 256) is None
