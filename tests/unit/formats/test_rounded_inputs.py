"""Codes that lie one to a byte, for linears whose inputs are rounded: codecs and configurations against their owner."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.errors import FormatError
from pipeline.formats.codec import codec_for, prove_round_trip
from pipeline.formats.config import quantization_config, read_quantization_config
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.spec import PER_CHANNEL, Activations, Format, NumberType, parse_variant

MakeLinear = Callable[..., QuantizedLinear]
CODEC = codec_for(Format.COMPRESSED_TENSORS)
INT8 = Scheme(8, 48, True, NumberType.INT, Activations.DYNAMIC)
FLOAT8 = Scheme(8, 48, True, NumberType.FLOAT, Activations.DYNAMIC)
VARIANTS = {INT8: parse_variant("w8a8-int8"), FLOAT8: parse_variant("fp8-dynamic")}
BOTH = pytest.mark.parametrize("scheme", [INT8, FLOAT8], ids=["int8", "float8"])


@pytest.fixture
def linear(make_linear: MakeLinear, scheme: Scheme) -> QuantizedLinear:
    """A linear with codes of every kind but those that are no number."""
    made = make_linear(24, 48, scheme)
    is_number = (made.codes_OI & 0x7F != 0x7F) | (not scheme.is_float)
    return replace(made, codes_OI=torch.where(is_number, made.codes_OI, torch.tensor(0, dtype=torch.uint8)))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_are_what_the_owning_package_reads_and_come_back_exactly(
    linear: QuantizedLinear, scheme: Scheme, dtype: torch.dtype
) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors = CODEC.pack("a.b", linear, dtype)
    assert list(tensors) == [f"a.b.{suffix}" for suffix in CODEC.suffixes(scheme)] == ["a.b.weight", "a.b.weight_scale"]
    assert tensors["a.b.weight"].dtype is (torch.float8_e4m3fn if scheme.is_float else torch.int8)
    assert sum(tensor.nbytes for tensor in tensors.values()) == CODEC.num_bytes(24, 48, scheme, 2)
    weights = QuantizationArgs(num_bits=8, type=scheme.type.value, symmetric=True, strategy="channel")
    theirs = dequantize(tensors["a.b.weight"], tensors["a.b.weight_scale"].float(), None, weights, dtype=torch.float32)
    assert torch.equal(theirs, linear.dequantize())
    prove_round_trip(CODEC, "a.b", linear, tensors)


@BOTH
def test_another_code_is_no_round_trip(linear: QuantizedLinear, scheme: Scheme) -> None:
    tensors = CODEC.pack("a.b", linear, torch.bfloat16)
    tensors["a.b.weight"].view(torch.uint8)[3, 5] ^= 1
    with pytest.raises(FormatError, match="codes come back different"):
        prove_round_trip(CODEC, "a.b", linear, tensors)


@BOTH
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"weight": None}, "a.b.weight is missing"),
        ({"weight_scale": None}, "a.b.weight_scale is missing"),
        ({"weight": torch.zeros(24, 48)}, "a.b.weight is float32"),
        ({"weight": torch.zeros((), dtype=torch.int8)}, r"a.b.weight is int8 \[\]"),
        ({"weight": torch.zeros(24, 47, dtype=torch.int8)}, r"a.b.weight is int8 \[24, 47\]"),
        ({"weight_scale": torch.ones(24, 2, dtype=torch.bfloat16)}, r"a.b.weight_scale is bfloat16 \[24, 2\]"),
        ({"weight_scale": torch.ones(23, 1, dtype=torch.bfloat16)}, r"a.b.weight_scale is bfloat16 \[23, 1\]"),
    ],
    ids=str,
)
def test_damaged_tensors_are_named(
    linear: QuantizedLinear, scheme: Scheme, damage: dict[str, Any], reason: str
) -> None:
    tensors = CODEC.pack("a.b", linear, torch.bfloat16) | {f"a.b.{key}": value for key, value in damage.items()}
    with pytest.raises(FormatError, match=reason):
        CODEC.unpack("a.b", {name: tensor for name, tensor in tensors.items() if tensor is not None}, scheme)


@pytest.mark.parametrize("scheme", [FLOAT8], ids=["float8"])
def test_codes_that_are_no_number_are_refused(linear: QuantizedLinear, scheme: Scheme) -> None:
    tensors = CODEC.pack("a.b", linear, torch.bfloat16)
    tensors["a.b.weight"].view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(FormatError, match=r"a.b.weight has numbers that are NaN"):
        CODEC.unpack("a.b", tensors, scheme)


@BOTH
def test_groups_within_a_row_are_refused(scheme: Scheme) -> None:
    reason = CODEC.check("a.b", 24, 96, scheme)
    assert reason == "a.b: with rounded inputs format compressed-tensors holds 8 bits and one scale for a row"


def _config(scheme: Scheme) -> dict[str, Any]:
    schemes = {"model.layers.0.q_proj": scheme, "model.layers.0.o_proj": replace(scheme, group_size=96)}
    schemes |= {"model.layers.0.gate": None, "lm_head": None}
    config = quantization_config(Format.COMPRESSED_TENSORS, schemes, VARIANTS[scheme], "1.2.3")
    return json.loads(json.dumps(config))  # type: ignore[no-any-return]


@BOTH
def test_configurations_are_those_of_the_owning_package_s_presets_and_read_back(scheme: Scheme) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme

    config = _config(scheme)
    preset = preset_name_to_scheme("FP8_DYNAMIC" if scheme.is_float else "INT8", ["Linear"])
    (group,) = config["config_groups"].values()
    for part in ("weights", "input_activations"):
        theirs = getattr(preset, part).model_dump(mode="json", exclude_none=True)
        # An observer only tells what calibrates; nobody does here.
        assert {key: group[part].get(key) for key in theirs if key != "observer"} == {
            key: value for key, value in theirs.items() if key != "observer"
        }
    assert config["format"] == group["format"] == ("float-quantized" if scheme.is_float else "int-quantized")
    reader = read_quantization_config(config)
    assert reader.scheme("model.layers.0.q_proj", 48) == scheme
    assert reader.scheme("model.layers.0.o_proj", 96) == replace(scheme, group_size=96)
    assert reader.scheme("model.layers.0.gate", 48) is reader.scheme("lm_head", 48) is None


@BOTH
@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("input_activations", {"dynamic": False, "strategy": "tensor"}, "dynamic: False, are not read"),
        ("input_activations", {"strategy": "tensor"}, "by tensor"),
        ("input_activations", {"symmetric": False}, "are not read"),
        ("input_activations", {"num_bits": 4}, "of 4 bits"),
        ("weights", {"strategy": "group", "group_size": 16}, "only symmetric weights by channel are read"),
        ("format", "pack-quantized", "not in format pack-quantized"),
    ],
    ids=str,
)
def test_other_ways_to_round_inputs_are_refused(scheme: Scheme, part: str, change: Any, reason: str) -> None:
    config = _config(scheme)
    group = config["config_groups"]["group_0"]
    group[part] = change if isinstance(change, str) else group[part] | change
    with pytest.raises(FormatError, match=reason):
        read_quantization_config(config)


def test_inputs_of_another_type_and_weights_without_them_are_refused() -> None:
    config = _config(FLOAT8)
    group = config["config_groups"]["group_0"]
    group["input_activations"] = _config(INT8)["config_groups"]["group_0"]["input_activations"]
    with pytest.raises(FormatError, match="inputs as int"):
        read_quantization_config(config)
    del group["input_activations"]
    with pytest.raises(FormatError, match="whose inputs are not rounded are not read"):
        read_quantization_config(config)


def test_whole_rows_stay_whole_rows() -> None:
    assert VARIANTS[INT8].group_size == VARIANTS[FLOAT8].group_size == PER_CHANNEL
