"""The benchmarks' decoder, which shares no code with the codecs, against hand-made words and against the codecs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.peers.decoder import UnreadableCheckpointError, dequantize_packed, read_checkpoint, unpack_stream
from pipeline.formats.codec import codec_for
from pipeline.formats.config import quantization_config
from pipeline.quantize.types import QuantizedLinear, Scheme, dequantize
from pipeline.spec import Format, Method, VariantSpec

MakeLinear = Callable[..., QuantizedLinear]
LINEAR = "model.layers.0.mlp.up_proj"
HOLDABLE = [
    *((Format.GPTQ, Scheme(bits, 32, True)) for bits in (2, 3, 4, 8)),
    *((Format.GPTQ_V2, Scheme(bits, 32, symmetric)) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    (Format.AWQ, Scheme(4, 32, False)),
    *(
        (Format.COMPRESSED_TENSORS, Scheme(bits, 32, symmetric))
        for bits in (2, 3, 4, 5, 6, 8)
        for symmetric in (True, False)
    ),
]


def words(*rows: list[int]) -> Tensor:
    """Return rows of 32-bit words, given without sign, as int32."""
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    """Write a checkpoint and return its folder."""
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({} if config is None else {"quantization_config": config}))
    return folder


def linear(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the linear's name."""
    return {f"{LINEAR}.{suffix}": tensor for suffix, tensor in parts.items()}


def gptq_parts() -> dict[str, Tensor]:
    """Two groups of 4 inputs, 8 outputs, 4 bits: the code of input i and output o is i + o, zero points say 7."""
    column = [sum((i + o) << 4 * i for i in range(8)) for o in range(8)]
    return {
        "qweight": words(column),
        "qzeros": words([0x77777777], [0x77777777]),
        "scales": torch.stack([torch.full((8,), 0.5), torch.full((8,), 0.25)]).half(),
        "g_idx": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32),
    }


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 4, "sym": True, "checkpoint_format": "gptq"} | changes


def packed_config(bits: int, *, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "symmetric": symmetric}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_stream_is_one_long_number_whatever_the_width(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (3, 45), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    rows = []
    for row in values.tolist():
        number = sum(value << bits * i for i, value in enumerate(row))
        rows.append([number >> 32 * word & 0xFFFFFFFF for word in range(-(-45 * bits // 32))])
    assert torch.equal(unpack_stream(words(*rows), bits, 45), values)


def test_stream_refuses_words_to_spare() -> None:
    with pytest.raises(ValueError, match="2 words are no row of 8 values of 4 bits"):
        unpack_stream(words([0, 0]), 4, 8)


def test_gptq_stores_zero_points_less_one(tmp_path: Path) -> None:
    read = read_checkpoint(write(tmp_path, linear(gptq_parts()), gptq_config()))
    expected_OI = torch.tensor([[(i + o - 8) * (0.5 if i < 4 else 0.25) for i in range(8)] for o in range(8)])
    assert torch.equal(read.weights[f"{LINEAR}.weight"], expected_OI)
    assert (read.label, read.linears) == ("gptq", {LINEAR: 4})
    assert read.weight_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_gptq_v2_stores_zero_points_as_they_are(tmp_path: Path) -> None:
    parts = gptq_parts() | {"qzeros": words([0x88888888], [0x88888888])}
    read = read_checkpoint(write(tmp_path, linear(parts), gptq_config(checkpoint_format="gptq_v2")))
    expected_OI = torch.tensor([[(i + o - 8) * (0.5 if i < 4 else 0.25) for i in range(8)] for o in range(8)])
    assert torch.equal(read.weights[f"{LINEAR}.weight"], expected_OI)


def test_gptq_inputs_of_one_group_need_not_be_neighbours(tmp_path: Path) -> None:
    parts = gptq_parts() | {"g_idx": torch.tensor([0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.int32)}
    read = read_checkpoint(write(tmp_path, linear(parts), gptq_config(desc_act=True)))
    expected_OI = torch.tensor([[(i + o - 8) * (0.25 if i % 2 else 0.5) for i in range(8)] for o in range(8)])
    assert torch.equal(read.weights[f"{LINEAR}.weight"], expected_OI)


def test_gptq_label_that_contradicts_the_zero_points_is_refused(tmp_path: Path) -> None:
    write(tmp_path, linear(gptq_parts()), gptq_config(checkpoint_format="gptq_v2"))
    with pytest.raises(UnreadableCheckpointError, match="symmetric, but zero points are not all 8"):
        read_checkpoint(tmp_path)


def test_awq_interleaves_outputs(tmp_path: Path) -> None:
    # The nibbles of a word from the lowest: outputs 0, 2, 4, 6, 1, 3, 5, 7; the code of output o is o, or o + 1.
    parts = {
        "qweight": words([0x75316420], [0x86427531]),
        "qzeros": words([0x11111111]),
        "scales": torch.full((1, 8), 2.0).half(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 2, "zero_point": True, "version": "GEMM"}
    read = read_checkpoint(write(tmp_path, linear(parts), config))
    expected_OI = torch.tensor([[2.0 * (o - 1), 2.0 * o] for o in range(8)])
    assert torch.equal(read.weights[f"{LINEAR}.weight"], expected_OI)
    assert (read.label, read.linears) == ("gemm", {LINEAR: 4})


def test_pack_quantized_zero_points_are_packed_along_outputs(tmp_path: Path) -> None:
    parts = {
        "weight_packed": words([0x76543210], [0xFEDCBA98]),
        "weight_scale": torch.tensor([[1.0, 2.0], [4.0, 8.0]]).bfloat16(),
        "weight_shape": torch.tensor([2, 8]),
        "weight_zero_point": words([0x21], [0x43]).T.contiguous(),
    }
    read = read_checkpoint(write(tmp_path, linear(parts), packed_config(4, symmetric=False)))
    first = [(code - 1) * 1.0 for code in range(4)] + [(code - 3) * 2.0 for code in range(4, 8)]
    second = [(code - 2) * 4.0 for code in range(8, 12)] + [(code - 4) * 8.0 for code in range(12, 16)]
    assert torch.equal(read.weights[f"{LINEAR}.weight"], torch.tensor([first, second]))


def test_pack_quantized_of_whole_values_a_word_is_told_by_its_size() -> None:
    codes = [i % 8 for i in range(64)]
    stream = sum(code << 3 * i for i, code in enumerate(codes))
    dense = [stream >> 32 * word & 0xFFFFFFFF for word in range(6)]
    loose = [sum(code << 3 * i for i, code in enumerate(codes[start : start + 10])) for start in range(0, 64, 10)]
    others = {"weight_scale": torch.ones(1, 1), "weight_shape": torch.tensor([1, 64])}
    expected_OI = torch.tensor([[code - 4.0 for code in codes]])
    for row in (dense, loose):
        weight_OI, bits = dequantize_packed({"weight_packed": words(row)} | others, 3)
        assert torch.equal(weight_OI, expected_OI)
        assert bits == 3


def test_number_of_words_that_two_layouts_share_is_refused(tmp_path: Path) -> None:
    parts = {
        "weight_packed": words([0, 0]),
        "weight_scale": torch.ones(1, 1),
        "weight_shape": torch.tensor([1, 20]),
    }
    write(tmp_path, linear(parts), packed_config(3))
    with pytest.raises(UnreadableCheckpointError, match="2 words of 20 values of 3 bits may be of two layouts"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(("format_", "scheme"), HOLDABLE)
def test_what_the_codecs_pack_is_read_back(
    format_: Format, scheme: Scheme, make_linear: MakeLinear, tmp_path: Path
) -> None:
    quantized = make_linear(96, 128, scheme)
    norm = torch.randn(128).bfloat16()
    tensors = codec_for(format_).pack(LINEAR, quantized, torch.bfloat16) | {"model.norm.weight": norm}
    variant = VariantSpec(
        method=Method.RTN,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        format=format_,
    )
    config = quantization_config(format_, {LINEAR: scheme, "lm_head": None}, variant, "0")
    read = read_checkpoint(write(tmp_path, tensors, config))
    expected_OI = dequantize(quantized.codes_OI, quantized.scale_OG, quantized.zero_OG, scheme)
    assert read.weights.keys() == {f"{LINEAR}.weight", "model.norm.weight"}
    assert torch.equal(read.weights[f"{LINEAR}.weight"], expected_OI)
    assert torch.equal(read.weights["model.norm.weight"], norm.float())
    assert read.linears == {LINEAR: scheme.bits}


def test_source_is_read_as_it_is(tmp_path: Path) -> None:
    weight = torch.randn(4, 8).bfloat16()
    read = read_checkpoint(write(tmp_path, {f"{LINEAR}.weight": weight}, None))
    assert torch.equal(read.weights[f"{LINEAR}.weight"], weight.float())
    assert (read.label, read.linears) == ("none", {})


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (linear(gptq_parts()), {"quant_method": "gguf"}, "cannot read gguf"),
        (linear(gptq_parts()), gptq_config(checkpoint_format="marlin"), "cannot read gptq of format marlin"),
        ({f"{LINEAR}.weight": torch.ones(8, 8)}, gptq_config(), "no tensor is quantized"),
        (linear(gptq_parts() | {"weight": torch.ones(8, 8)}), gptq_config(), "quantized and dense"),
        (
            linear({name: tensor for name, tensor in gptq_parts().items() if name != "scales"}),
            gptq_config(),
            f"{LINEAR} has no scales",
        ),
        (linear(gptq_parts() | {"qzeros": words([0, 0], [0, 0])}), gptq_config(), "fit no width"),
    ],
    ids=["method", "label", "nothing", "twice", "missing", "width"],
)
def test_what_it_does_not_know_is_refused(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, tensors, config)
    with pytest.raises(UnreadableCheckpointError, match=message):
        read_checkpoint(tmp_path)
