"""Codecs against independent bit-by-bit readers, against the owning package, and against damage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from pipeline.errors import FormatError
from pipeline.formats.codec import Codec, codec_for, prove_round_trip
from pipeline.formats.packing import pack_rows, unpack_rows
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.spec import Format

MakeLinear = Callable[..., QuantizedLinear]
NARROW = [Scheme(2, 16, True), Scheme(3, 16, True)]
NARROW_ASYMMETRIC = [Scheme(2, 16, False), Scheme(3, 16, False)]
SYMMETRIC = [Scheme(4, 16, True), Scheme(8, 16, True)]
ASYMMETRIC = [Scheme(4, 16, False), Scheme(8, 16, False)]
SPLIT = [Scheme(bits, 16, symmetric) for bits in (5, 6) for symmetric in (True, False)]
HOLDABLE = [
    *((Format.GPTQ, scheme) for scheme in NARROW + SYMMETRIC),
    *((Format.GPTQ_V2, scheme) for scheme in NARROW + SYMMETRIC + NARROW_ASYMMETRIC + ASYMMETRIC),
    (Format.AWQ, ASYMMETRIC[0]),
    *((Format.COMPRESSED_TENSORS, scheme) for scheme in NARROW + SYMMETRIC + ASYMMETRIC + SPLIT),
]


def _fit(scheme: Scheme, rows: int, columns: int) -> tuple[int, int]:
    """Return the next sizes that fill whole words at 2 and 3 bits."""
    unit = {2: 16, 3: 32}.get(scheme.bits, 1)
    return rows + -rows % unit, columns + -columns % unit


def _bits(word: int, start: int, width: int) -> int:
    return ((word & 0xFFFFFFFF) >> start) & ((1 << width) - 1)


def _stream(words: list[int], bits: int, count: int) -> list[int]:
    """Return the codes of a dense little-endian bit stream, read from one long number."""
    number = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return [number >> bits * i & (1 << bits) - 1 for i in range(count)]


def _read_gptq(name: str, tensors: dict[str, Tensor], bits: int, group_size: int, taken_off: int = 1) -> Tensor:
    """Return the float64 weight [O, I], code by code as the layout is described."""
    qweight, qzeros = tensors[f"{name}.qweight"].tolist(), tensors[f"{name}.qzeros"].tolist()
    scales, g_idx = tensors[f"{name}.scales"].double(), tensors[f"{name}.g_idx"].tolist()
    rows, columns = len(qweight[0]), len(g_idx)
    zeros = [_stream(words, bits, rows) for words in qzeros]
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for o in range(rows):
        for i, code in enumerate(_stream([words[o] for words in qweight], bits, columns)):
            weight[o, i] = scales[g_idx[i], o] * (code - (zeros[g_idx[i]][o] + taken_off))
    return weight


def _read_awq(name: str, tensors: dict[str, Tensor], bits: int, group_size: int) -> Tensor:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight, qzeros = tensors[f"{name}.qweight"].tolist(), tensors[f"{name}.qzeros"].tolist()
    scales = tensors[f"{name}.scales"].double()
    weight = torch.zeros(len(qweight[0]) * 8, len(qweight), dtype=torch.float64)
    for i in range(weight.shape[1]):
        for word in range(len(qweight[0])):
            for nibble in range(8):
                o = 8 * word + order[nibble]
                code = _bits(qweight[i][word], 4 * nibble, 4)
                zero = _bits(qzeros[i // group_size][word], 4 * nibble, 4)
                weight[o, i] = scales[i // group_size, o] * (code - zero)
    return weight


def _read_compressed(name: str, tensors: dict[str, Tensor], bits: int, group_size: int) -> Tensor:
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    packed, scales = tensors[f"{name}.weight_packed"].tolist(), tensors[f"{name}.weight_scale"].double()
    zeros = tensors[f"{name}.weight_zero_point"].tolist() if f"{name}.weight_zero_point" in tensors else None
    codes = [_stream(words, bits, columns) for words in packed]
    stored = [_stream([words[g] for words in zeros], bits, rows) for g in range(scales.shape[1])] if zeros else None
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for o in range(rows):
        for i in range(columns):
            group = i // group_size
            zero = stored[group][o] if stored is not None else 1 << bits - 1
            weight[o, i] = scales[o, group] * (codes[o][i] - zero)
    return weight


READERS = {
    Format.GPTQ: _read_gptq,
    Format.GPTQ_V2: partial(_read_gptq, taken_off=0),
    Format.AWQ: _read_awq,
    Format.COMPRESSED_TENSORS: _read_compressed,
}


@pytest.mark.parametrize(("format_", "scheme"), HOLDABLE, ids=str)
def test_an_independent_reader_sees_the_same_weights(make_linear: MakeLinear, format_: Format, scheme: Scheme) -> None:
    linear = make_linear(*_fit(scheme, 16, 48), scheme)
    tensors = codec_for(format_).pack("a.b", linear, torch.bfloat16)
    read = READERS[format_]("a.b", tensors, scheme.bits, scheme.group_size)
    assert torch.equal(read, linear.dequantize().double())


@pytest.mark.parametrize(("format_", "scheme"), HOLDABLE, ids=str)
def test_unpacking_is_the_exact_inverse_and_tensors_are_ready_to_write(
    make_linear: MakeLinear, format_: Format, scheme: Scheme
) -> None:
    codec = codec_for(format_)
    linear = make_linear(*_fit(scheme, 72, 96), scheme)
    tensors = codec.pack("a.b", linear, torch.float16)
    assert list(tensors) == [f"a.b.{suffix}" for suffix in codec.suffixes(scheme)]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    codes, scale, zero = codec.unpack("a.b", tensors, scheme)
    assert torch.equal(codes, linear.codes_OI)
    assert torch.equal(scale, linear.scale_OG)
    assert torch.equal(zero, linear.zero_OG)
    prove_round_trip(codec, "a.b", linear, tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 8), (5, 9), (2, 31), (4, 32), (3, 33), (70, 130)], ids=str)
def test_packing_equals_the_owning_package_at_odd_shapes(shape: tuple[int, int], bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    signed = (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size(shape)), signed)
    assert torch.equal(unpack_rows(packed, bits, shape[1]), codes)


def test_chunks_leave_no_seams(monkeypatch: pytest.MonkeyPatch, make_linear: MakeLinear) -> None:
    for format_, scheme in HOLDABLE:
        linear = make_linear(*_fit(scheme, 72, 96), scheme)
        whole = codec_for(format_).pack("x", linear, torch.float16)
        for module in ("packing", "awq"):
            monkeypatch.setattr(f"pipeline.formats.{module}.CHUNK_CODES", 96 * 8 * 2)
        pieces = codec_for(format_).pack("x", linear, torch.float16)
        assert all(torch.equal(pieces[key], whole[key]) for key in whole)
        prove_round_trip(codec_for(format_), "x", linear, whole)
        monkeypatch.undo()


@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("scheme", SYMMETRIC + ASYMMETRIC, ids=str)
def test_the_owning_package_decompresses_to_the_same_weights(
    make_linear: MakeLinear, scheme: Scheme, whole_row: bool
) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = Scheme(scheme.bits, 48, scheme.symmetric) if whole_row else scheme
    linear = make_linear(20, 48, scheme)
    tensors = codec_for(Format.COMPRESSED_TENSORS).pack("m", linear, torch.float32)
    strategy = {"strategy": "channel"} if whole_row else {"strategy": "group", "group_size": scheme.group_size}
    args = QuantizationArgs(num_bits=scheme.bits, type="int", symmetric=scheme.symmetric, **strategy)
    local = {key.removeprefix("m."): value for key, value in tensors.items()}
    decompressed = PackedQuantizationCompressor.decompress(local, QuantizationScheme(targets=["Linear"], weights=args))
    assert torch.equal(decompressed["weight"], linear.dequantize())


def test_known_words_of_symmetric_four_bit_zeros(make_linear: MakeLinear) -> None:
    tensors = codec_for(Format.GPTQ).pack("x", make_linear(16, 32, SYMMETRIC[0]), torch.float16)
    assert set(tensors["x.qzeros"].flatten().tolist()) == {0x77777777}
    assert tensors["x.g_idx"].tolist() == [0] * 16 + [1] * 16
    assert tensors["x.scales"].dtype is torch.float16


def test_known_words_of_symmetric_two_and_three_bit_zeros(make_linear: MakeLinear) -> None:
    """Stored are 1 = 0b01 and 3 = 0b011, over and over; the latter starts anew where 32 zeros fill three words."""
    two, three = (codec_for(Format.GPTQ).pack("x", make_linear(64, 32, scheme), torch.float16) for scheme in NARROW)
    assert two["x.qzeros"].tolist() == [[0x55555555] * 4] * 2
    assert [word & 0xFFFFFFFF for word in three["x.qzeros"][1].tolist()] == [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D] * 2


def test_known_words_of_three_bit_codes(make_linear: MakeLinear) -> None:
    """By hand from the layout: code 10 leaves its two low bits at the top of the first word and its high bit at the
    bottom of the second; code 21 one low bit at the top of the second and two high ones at the bottom of the third."""
    linear = make_linear(32, 64, NARROW[1])
    linear.codes_OI.zero_()
    for column, code in {0: 7, 9: 2, 10: 0b101, 11: 6, 21: 0b011, 22: 4, 31: 5, 32 + 10: 0b011}.items():
        linear.codes_OI[5, column] = code
    words = codec_for(Format.GPTQ).pack("x", linear, torch.float16)["x.qweight"][:, 5].tolist()
    first = 7 | 2 << 27 | 0b01 << 30
    second = 0b1 | 6 << 1 | 0b1 << 31
    third = 0b01 | 4 << 2 | 5 << 29
    assert [word & 0xFFFFFFFF for word in words] == [first, second, third, 0b11 << 30, 0, 0]
    assert (first, second, third) == (0x50000007, 0x8000000D, 0xA0000011)


def test_known_words_of_two_bit_codes(make_linear: MakeLinear) -> None:
    linear = make_linear(16, 16, NARROW[0])
    linear.codes_OI[3] = torch.tensor([3, 0, 1, 2] + [0] * 11 + [2])
    word = codec_for(Format.GPTQ).pack("x", linear, torch.float16)["x.qweight"][0, 3].item()
    assert word & 0xFFFFFFFF == 0x80000093


@pytest.mark.parametrize(
    ("label", "content", "said"),
    [(Format.GPTQ, Format.GPTQ_V2, "version 2"), (Format.GPTQ_V2, Format.GPTQ, "version 1")],
)
def test_content_under_the_other_version_s_label_is_caught(
    make_linear: MakeLinear, label: Format, content: Format, said: str
) -> None:
    linear = make_linear(16, 32, SYMMETRIC[0])
    tensors = codec_for(content).pack("x", linear, torch.float16)
    words = {Format.GPTQ: 0x77777777, Format.GPTQ_V2: -0x77777778}
    assert set(tensors["x.qzeros"].flatten().tolist()) == {words[content]}
    with pytest.raises(FormatError, match="must hold") as caught:
        prove_round_trip(codec_for(label), "x", linear, tensors)
    assert caught.value.code == "format.label_disagrees"
    assert f"{said} content: label it checkpoint_format {content}" in caught.value.hint


def test_asymmetric_zero_points_of_0_come_back_from_version_2_alone(make_linear: MakeLinear) -> None:
    linear = make_linear(16, 32, ASYMMETRIC[0])
    linear.zero_OG.zero_()
    tensors = codec_for(Format.GPTQ_V2).pack("x", linear, torch.float16)
    prove_round_trip(codec_for(Format.GPTQ_V2), "x", linear, tensors)
    with pytest.raises(FormatError, match="symmetric grids only"):
        codec_for(Format.GPTQ).pack("x", linear, torch.float16)


def test_columns_stored_out_of_order_are_refused(make_linear: MakeLinear) -> None:
    tensors = codec_for(Format.GPTQ).pack("x", make_linear(16, 32, SYMMETRIC[0]), torch.float16)
    tensors["x.g_idx"] = tensors["x.g_idx"].flip(0).contiguous()
    with pytest.raises(FormatError, match=r"x\.g_idx"):
        codec_for(Format.GPTQ).unpack("x", tensors, SYMMETRIC[0])


def test_proof_names_what_came_back_different(make_linear: MakeLinear) -> None:
    linear = make_linear(16, 32, ASYMMETRIC[0])
    codec = codec_for(Format.COMPRESSED_TENSORS)
    tensors = codec.pack("x", linear, torch.float16)
    flipped = tensors["x.weight_packed"].clone()
    flipped[3, 1] ^= 1
    with pytest.raises(FormatError, match="x: codes come back different"):
        prove_round_trip(codec, "x", linear, tensors | {"x.weight_packed": flipped})
    with pytest.raises(FormatError, match="x: scales come back different"):
        prove_round_trip(codec, "x", linear, tensors | {"x.weight_scale": tensors["x.weight_scale"] * 2})


def test_codes_too_wide_for_the_format_do_not_survive_the_proof(make_linear: MakeLinear) -> None:
    for format_, scheme in HOLDABLE:
        if scheme.bits == 8 or format_ is Format.AWQ:
            continue
        linear = make_linear(32, 32, scheme)
        linear.codes_OI[0, 0] = 1 << scheme.bits
        tensors = codec_for(format_).pack("x", linear, torch.float16)
        with pytest.raises(FormatError, match="codes come back different"):
            prove_round_trip(codec_for(format_), "x", linear, tensors)


@pytest.mark.parametrize(
    ("format_", "rows", "columns", "scheme", "reason"),
    [
        (Format.GPTQ, 12, 32, Scheme(4, 16, True), "out_features 12"),
        (Format.GPTQ, 16, 20, Scheme(4, 10, True), "in_features 20"),
        (Format.GPTQ, 10, 32, Scheme(8, 16, True), "out_features 10"),
        (Format.GPTQ, 16, 40, Scheme(4, 16, True), "does not divide 40"),
        (Format.GPTQ, 16, 32, Scheme(4, 16, False), "symmetric"),
        (Format.GPTQ, 16, 32, Scheme(5, 16, True), "holds 2, 3, 4, 8 bits, not 5"),
        (Format.GPTQ, 32, 48, Scheme(3, 16, True), "packs 32 codes into 3 words, which does not divide in_features 48"),
        (Format.GPTQ, 48, 32, Scheme(3, 16, True), "does not divide out_features 48"),
        (Format.GPTQ, 32, 32, Scheme(3, 16, False), "symmetric"),
        (Format.GPTQ, 16, 24, Scheme(2, 8, True), "packs 16 codes into a word, which does not divide in_features 24"),
        (Format.GPTQ, 24, 32, Scheme(2, 16, True), "does not divide out_features 24"),
        (Format.AWQ, 12, 32, Scheme(4, 16, False), "out_features 12"),
        (Format.AWQ, 16, 40, Scheme(4, 16, False), "does not divide 40"),
        (Format.AWQ, 16, 32, Scheme(4, 16, True), "asymmetric"),
        (Format.AWQ, 16, 32, Scheme(8, 16, False), "not 8"),
        (Format.COMPRESSED_TENSORS, 16, 40, Scheme(4, 16, True), "does not divide 40"),
        (Format.COMPRESSED_TENSORS, 16, 32, Scheme(7, 16, True), "holds 2, 3, 4, 5, 6, 8 bits, not 7"),
        (Format.AWQ, 16, 32, Scheme(3, 16, False), "not 3"),
    ],
)
def test_what_a_format_cannot_hold_is_said_and_refused(
    make_linear: MakeLinear, format_: Format, rows: int, columns: int, scheme: Scheme, reason: str
) -> None:
    codec = codec_for(format_)
    said = codec.check("blk.q", rows, columns, scheme)
    assert said is not None
    assert said.startswith("blk.q: ")
    assert reason in said
    if columns % scheme.group_size == 0:
        with pytest.raises(FormatError, match=reason):
            codec.pack("blk.q", make_linear(rows, columns, scheme), torch.float16)


@pytest.mark.parametrize(("format_", "scheme"), HOLDABLE, ids=str)
def test_what_a_format_can_hold_is_not_refused(format_: Format, scheme: Scheme) -> None:
    assert codec_for(format_).check("x", *_fit(scheme, 16, 32), scheme) is None


def test_scales_that_would_change_are_refused(make_linear: MakeLinear) -> None:
    linear = make_linear(16, 32, SYMMETRIC[0])
    linear.scale_OG[0, 0] = 1 + 2**-9  # exact in float16, not in bfloat16
    codec_for(Format.COMPRESSED_TENSORS).pack("x", linear, torch.float16)
    with pytest.raises(FormatError, match="not exact in bfloat16"):
        codec_for(Format.COMPRESSED_TENSORS).pack("x", linear, torch.bfloat16)
    linear.scale_OG[0, 0] = 1e-9
    with pytest.raises(FormatError, match="not exact in float16"):
        codec_for(Format.GPTQ).pack("x", linear, torch.bfloat16)
    with pytest.raises(FormatError, match="float8"):
        codec_for(Format.COMPRESSED_TENSORS).pack("x", linear, torch.float8_e4m3fn)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("format_", "scheme"), HOLDABLE, ids=str)
def test_scales_that_cannot_be_are_refused(
    make_linear: MakeLinear, format_: Format, scheme: Scheme, bad: float
) -> None:
    codec = codec_for(format_)
    tensors = codec.pack("x", make_linear(*_fit(scheme, 16, 32), scheme), torch.float16)
    key = "x.weight_scale" if format_ is Format.COMPRESSED_TENSORS else "x.scales"
    tensors[key][1, 1] = bad
    with pytest.raises(FormatError, match=key):
        codec.unpack("x", tensors, scheme)


def _refuses(codec: Codec, tensors: dict[str, Tensor], scheme: Scheme) -> bool:
    """Return whether reading raises a FormatError that names the linear; any other exception passes through."""
    try:
        codec.unpack("x", tensors, scheme)
    except FormatError as error:
        return "x." in error.message or "x:" in error.message
    return False


def _damage(tensor: Tensor) -> dict[str, Tensor | None]:
    return {
        "missing": None,
        "float64": tensor.double(),
        "int16": tensor.to(torch.int16),
        "empty": tensor[:0],
        "scalar": tensor.flatten()[0],
        "one row less": tensor[:-1],
        "one row more": torch.cat([tensor, tensor[-1:]]),
        "three dimensions": tensor[None, None] if tensor.ndim == 1 else tensor[None],
        "flat": tensor.flatten() if tensor.ndim > 1 else tensor[:, None],
    }


@pytest.mark.parametrize(("format_", "scheme"), HOLDABLE, ids=str)
def test_damaged_tensors_are_format_errors_and_nothing_else(
    make_linear: MakeLinear, format_: Format, scheme: Scheme
) -> None:
    codec: Codec = codec_for(format_)
    tensors = codec.pack("x", make_linear(*_fit(scheme, 16, 48), scheme), torch.float16)
    for key, tensor in tensors.items():
        for damage, damaged in _damage(tensor).items():
            changed = {k: v for k, v in tensors.items() if k != key}
            if damaged is not None:
                changed[key] = damaged
            assert _refuses(codec, changed, scheme), f"{key} {damage} was accepted"


@pytest.mark.parametrize("shape", [[16, -48], [0, 48], [16, 50], [16, 96], [2**62, 2**62]], ids=str)
def test_a_lying_shape_is_a_format_error(make_linear: MakeLinear, shape: list[int]) -> None:
    codec = codec_for(Format.COMPRESSED_TENSORS)
    for scheme in (SYMMETRIC[0], ASYMMETRIC[0]):
        tensors = codec.pack("x", make_linear(16, 48, scheme), torch.float16)
        tensors["x.weight_shape"] = torch.tensor(shape)
        with pytest.raises(FormatError, match="x"):
            codec.unpack("x", tensors, scheme)


@pytest.mark.parametrize(("format_", "scheme"), HOLDABLE, ids=str)
def test_reading_with_another_width_is_refused(make_linear: MakeLinear, format_: Format, scheme: Scheme) -> None:
    codec = codec_for(format_)
    tensors = codec.pack("x", make_linear(*_fit(scheme, 16, 48), scheme), torch.float16)
    for bits in {2, 3, 4, 5, 6, 8} - {scheme.bits}:
        with pytest.raises(FormatError, match="x"):
            codec.unpack("x", tensors, Scheme(bits, 16, scheme.symmetric))


def test_zero_points_of_a_symmetric_configuration_are_a_contradiction(make_linear: MakeLinear) -> None:
    codec = codec_for(Format.COMPRESSED_TENSORS)
    tensors = codec.pack("x", make_linear(16, 48, ASYMMETRIC[0]), torch.float16)
    with pytest.raises(FormatError, match="weight_zero_point is there"):
        codec.unpack("x", tensors, SYMMETRIC[0])
    with pytest.raises(FormatError, match="weight_g_idx"):
        codec.unpack("x", tensors | {"x.weight_g_idx": torch.zeros(48, dtype=torch.int32)}, ASYMMETRIC[0])


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (24, 48), (136, 80)])
@pytest.mark.parametrize(("format_", "scheme"), HOLDABLE, ids=str)
def test_size_is_known_from_the_shape_alone(
    format_: Format, scheme: Scheme, rows: int, columns: int, make_linear: MakeLinear
) -> None:
    rows, columns = _fit(scheme, rows, columns)
    for dtype in (torch.bfloat16, torch.float32):
        packed = codec_for(format_).pack("m", make_linear(rows, columns, scheme), dtype)
        stated = codec_for(format_).num_bytes(rows, columns, scheme, dtype.itemsize)
        assert stated == sum(tensor.nbytes for tensor in packed.values())


def test_size_counts_words_that_are_not_full(make_linear: MakeLinear) -> None:
    scheme, codec = Scheme(4, 9, False), codec_for(Format.COMPRESSED_TENSORS)
    packed = codec.pack("m", make_linear(5, 27, scheme), torch.float16)
    assert codec.num_bytes(5, 27, scheme, 2) == sum(tensor.nbytes for tensor in packed.values())
