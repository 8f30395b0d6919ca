"""Laws of the formats: packing loses nothing at any width and shape, and damage is a FormatError or harmless."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import FormatError
from pipeline.formats.codec import codec_for, prove_round_trip
from pipeline.formats.config import quantization_config, read_quantization_config
from pipeline.formats.names import cover
from pipeline.formats.packing import pack_rows, unpack_rows
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.spec import FORMAT_BITS, Format, parse_variant
from tests.factories import UNSOLVED

LAWS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True, scope="module")
def _package_loaded() -> None:
    """Load the package that owns a format before hypothesis measures anything."""
    from compressed_tensors.compressors.pack_quantized import helpers

    assert helpers


def _linear(rows: int, columns: int, scheme: Scheme, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    shape = rows, columns // scheme.group_size
    scale = torch.ldexp(
        torch.randint(128, 256, shape, generator=generator) / 128, torch.randint(-14, 15, shape, generator=generator)
    )
    zero = torch.full(shape, scheme.middle, dtype=torch.uint8)
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.max_code + 1, shape, generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, scheme.max_code + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    return QuantizedLinear(scheme, codes, scale, zero, UNSOLVED)


held = st.one_of(
    st.tuples(st.just(Format.GPTQ), st.sampled_from([2, 3, 4, 8]), st.just(True)),
    st.tuples(st.just(Format.GPTQ_V2), st.sampled_from([2, 3, 4, 8]), st.booleans()),
    st.tuples(st.just(Format.AWQ), st.just(4), st.just(False)),
    st.tuples(st.just(Format.COMPRESSED_TENSORS), st.sampled_from([2, 3, 4, 5, 6, 8]), st.booleans()),
)


@LAWS
@given(held, st.integers(1, 12), st.integers(1, 5), st.integers(1, 24), seeds)
def test_what_check_accepts_comes_back_exactly_and_what_it_rejects_is_refused(
    kind: tuple[Format, int, bool], row_units: int, groups: int, group_size: int, seed: int
) -> None:
    format_, bits, symmetric = kind
    scheme = Scheme(bits, group_size, symmetric)
    for row_factor, column_factor in ((1, 1), (8, 1), (32, 32)):
        rows, columns = row_units * row_factor, groups * group_size * column_factor
        linear = _linear(rows, columns, scheme, seed)
        codec = codec_for(format_)
        if codec.check("x", rows, columns, scheme) is not None:
            with pytest.raises(FormatError):
                codec.pack("x", linear, torch.bfloat16)
            continue
        prove_round_trip(codec, "x", linear, codec.pack("x", linear, torch.bfloat16))


@LAWS
@given(st.integers(1, 70), st.integers(1, 140), st.sampled_from([2, 3, 4, 8]), st.booleans(), seeds)
def test_packing_equals_the_owning_package(rows: int, columns: int, bits: int, is_transposed: bool, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes = codes.t() if is_transposed else codes
    packed = pack_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32((codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8), bits))
    assert torch.equal(unpack_rows(packed, bits, codes.shape[1]), codes)


def _damaged(tensor: Tensor, how: int, generator: torch.Generator) -> Tensor | None:
    match how:
        case 0:
            return None
        case 1:
            return tensor.to(torch.float64)
        case 2:
            return tensor[: tensor.shape[0] // 2]
        case 3:
            return tensor.reshape(-1)
        case 4:
            return tensor.t().contiguous() if tensor.ndim == 2 else tensor[None]
        case _:
            noise = torch.randint(0, 256, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
            return noise.view(tensor.dtype).view(tensor.shape)


@LAWS
@given(held, st.integers(0, 3), st.integers(0, 5), seeds)
def test_damage_is_a_format_error_or_leaves_something_well_formed(
    kind: tuple[Format, int, bool], which: int, how: int, seed: int
) -> None:
    format_, bits, symmetric = kind
    scheme = Scheme(bits, 16, symmetric)
    codec = codec_for(format_)
    rows, columns = (32, 96) if bits == 3 else (16, 48)
    tensors = codec.pack("x", _linear(rows, columns, scheme, seed), torch.float16)
    key = list(tensors)[which % len(tensors)]
    damaged = _damaged(tensors.pop(key), how, torch.Generator().manual_seed(seed))
    if damaged is not None:
        tensors[key] = damaged
    try:
        codes, scale, zero = codec.unpack("x", tensors, scheme)
    except FormatError:
        return
    assert (codes.dtype, list(codes.shape)) == (torch.uint8, [rows, columns])
    assert int(codes.max()) <= scheme.max_code
    assert int(zero.max()) <= scheme.max_code
    assert bool((scale.isfinite() & (scale > 0)).all())


names = st.lists(
    st.sampled_from(
        [f"model.layers.{b}.{leaf}" for b in range(4) for leaf in ("a.q", "a.k", "m.0.up", "m.1.up", "m.d")]
    ),
    unique=True,
    min_size=1,
)


@LAWS
@given(names, names)
def test_patterns_cover_exactly_the_names_meant(meant: list[str], others: list[str]) -> None:
    import re

    every = [*meant, *others]
    patterns = [re.compile(pattern) for pattern in cover(meant, every)]
    matched = {name for name in every if any(pattern.match(name) for pattern in patterns)}
    assert matched == set(meant)


@LAWS
@given(
    st.sampled_from([Format.GPTQ, Format.COMPRESSED_TENSORS]),
    st.dictionaries(names.map(lambda found: found[0]), st.sampled_from([None, 32, 64, 128]), min_size=1),
    st.data(),
)
def test_any_mixture_of_grids_reads_back_as_written(
    format_: Format, sizes: dict[str, int | None], data: st.DataObject
) -> None:
    bits = data.draw(st.sampled_from(FORMAT_BITS[format_]))
    variant = parse_variant(f"gptq-w{bits}-g128" if format_ is Format.GPTQ else f"rtn-w{bits}-g128")
    schemes = {name: None if size is None else Scheme(bits, size, True) for name, size in sizes.items()}
    if not any(schemes.values()):
        with pytest.raises(FormatError):
            quantization_config(format_, schemes, variant, "0")
        return
    reader = read_quantization_config(quantization_config(format_, schemes, variant, "0"))
    assert {name: reader.scheme(name, 128) for name in schemes} == schemes
