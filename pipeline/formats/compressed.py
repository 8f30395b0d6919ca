"""compressed-tensors: ``pack-quantized`` of 2, 3, 4, 5, 6 and 8 bits, symmetric and asymmetric; ``int-quantized`` and
``float-quantized``, whose inputs are rounded too.

Dimension suffixes: O = out_features, I = in_features, G = groups of a row, P = packed words.

``int-quantized`` and ``float-quantized``, per linear: ``weight`` [O, I], int8 (the code less 128) or float8_e4m3fn, and
``weight_scale`` [O, 1] in the model's dtype. What becomes of inputs is in config.json alone.

``pack-quantized``, per linear: ``weight_packed`` int32 [O, ceil(I * b / 32)], packed along each row, stored value =
signed code + 2**(b-1), which is the unsigned code; ``weight_scale`` [O, G] in the model's dtype; ``weight_shape`` int64
[2]; asymmetric grids add ``weight_zero_point`` int32 [ceil(O * b / 32), G], packed along out_features. Symmetric grids
have their zero point at the middle, the signed 0.

The layout belongs to the ``compressed-tensors`` package. Four-bit codes and all zero points are read by its own
``unpack_from_int32``, so that the round-trip proof of a release asks the owner. Writing uses ``packing.pack_rows``,
over ten times faster than the package's ``pack_to_int32``, and codes of other widths are read by
``packing.unpack_rows``, as the package's reader is fast for four bits only. Both equal the package bit for bit: tests
compare them at odd shapes. The package is imported where it is used: it takes seconds to load.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import FormatError
from pipeline.formats.codec import require_holdable
from pipeline.formats.layouts import Layout, layout_of
from pipeline.formats.packing import WORD_BITS, load_scale, pack_rows, store_scale, take, unpack_rows
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.spec import FORMAT_BITS, Format

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class CompressedCodec:
    """Codec of compressed-tensors."""

    format = Format.COMPRESSED_TENSORS

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """Return the names of the two tensors, or of the three packed ones, or four with zero points."""
        if layout_of(scheme) is not Layout.PACKED:
            return ("weight", "weight_scale")
        symmetric = ("weight_packed", "weight_scale", "weight_shape")
        return symmetric if scheme.symmetric else (*symmetric, "weight_zero_point")

    def check(self, name: str, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        """Return what keeps the layout from holding the linear: width or group size."""
        if scheme.bits not in FORMAT_BITS[Format.COMPRESSED_TENSORS]:
            legal = ", ".join(map(str, FORMAT_BITS[Format.COMPRESSED_TENSORS]))
            return f"{name}: format compressed-tensors holds {legal} bits, not {scheme.bits}"
        if in_features % scheme.group_size:
            return f"{name}: group size {scheme.group_size} does not divide {in_features} columns"
        if layout_of(scheme) is not Layout.PACKED and (scheme.bits, scheme.group_size) != (8, in_features):
            return f"{name}: with rounded inputs format compressed-tensors holds 8 bits and one scale for a row"
        return None

    def num_bytes(self, out_features: int, in_features: int, scheme: Scheme, scale_bytes: int) -> int:
        """Return the bytes of the tensors."""
        if layout_of(scheme) is not Layout.PACKED:
            return out_features * (in_features + scale_bytes)
        groups, bits = in_features // scheme.group_size, scheme.bits
        words = out_features * _num_words(in_features, bits)
        words += 0 if scheme.symmetric else groups * _num_words(out_features, bits)
        return 4 * words + scale_bytes * groups * out_features + 2 * 8

    def pack(self, name: str, linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors, with scales in ``scale_dtype``."""
        require_holdable(self, name, linear)
        if scale_dtype not in SCALE_DTYPES:
            raise FormatError(f"{name}: format compressed-tensors stores no scales in {scale_dtype}")
        bits = linear.scheme.bits
        scale = store_scale(name, linear.scale_OG, scale_dtype).contiguous()
        if layout_of(linear.scheme) is not Layout.PACKED:
            return {f"{name}.weight": _as_bytes(linear), f"{name}.weight_scale": scale}
        tensors = {
            f"{name}.weight_packed": pack_rows(linear.codes_OI, bits),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(linear.codes_OI.shape, dtype=torch.int64),
        }
        if not linear.scheme.symmetric:
            tensors[f"{name}.weight_zero_point"] = pack_rows(linear.zero_OG.t(), bits).t().contiguous()
        return tensors

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scale and zero point; what is packed is read by the owning package."""
        if layout_of(scheme) is not Layout.PACKED:
            return self._unpack_bytes(name, tensors, scheme)
        shape = take(name, tensors, "weight_shape", [torch.int64, torch.int32], [2])
        out_features, in_features = (int(size) for size in shape.tolist())
        if out_features <= 0 or in_features <= 0:
            raise FormatError(f"{name}.weight_shape is {shape.tolist()}", code="format.wrong_tensor")
        if (reason := self.check(name, out_features, in_features, scheme)) is not None:
            raise FormatError(reason)
        if f"{name}.weight_g_idx" in tensors:
            raise FormatError(f"{name}.weight_g_idx: columns stored out of order are not read")
        num_groups, bits = in_features // scheme.group_size, scheme.bits
        packed = take(name, tensors, "weight_packed", [torch.int32], [out_features, _num_words(in_features, bits)])
        scale = take(name, tensors, "weight_scale", SCALE_DTYPES, [out_features, num_groups])
        if bits == 4:
            codes_OI = _unpack(packed, scheme, (out_features, in_features), packed_dim=1)
        else:
            codes_OI = unpack_rows(packed, bits, in_features)
        if scheme.symmetric:
            zero_OG = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
            if f"{name}.weight_zero_point" in tensors:
                raise FormatError(f"{name}.weight_zero_point is there, but the configuration says symmetric")
        else:
            packed_shape = [_num_words(out_features, bits), num_groups]
            packed_zero = take(name, tensors, "weight_zero_point", [torch.int32], packed_shape)
            zero_OG = _unpack(packed_zero, scheme, (out_features, num_groups), packed_dim=0)
        return codes_OI, load_scale(f"{name}.weight_scale", scale), zero_OG

    def _unpack_bytes(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scale and zero point of a linear whose codes lie one to a byte."""
        found = tensors.get(f"{name}.weight")
        rows = found.shape[0] if found is not None and found.ndim == 2 else 1
        dtype = torch.float8_e4m3fn if scheme.is_float else torch.int8
        stored = take(name, tensors, "weight", [dtype], [rows, scheme.group_size])
        if (reason := self.check(name, rows, scheme.group_size, scheme)) is not None:
            raise FormatError(reason)
        scale = take(name, tensors, "weight_scale", SCALE_DTYPES, [rows, 1])
        zero_OG = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
        # The bit pattern of a signed code less 128 is that of the code with the highest bit turned over.
        codes_OI = stored.view(torch.uint8) ^ scheme.middle
        if scheme.is_float and bool((codes_OI & 0x7F == 0x7F).any()):
            raise FormatError(f"{name}.weight has numbers that are NaN", code="format.wrong_tensor")
        return codes_OI, load_scale(f"{name}.weight_scale", scale), zero_OG


def _as_bytes(linear: QuantizedLinear) -> Tensor:
    """Return the codes as they lie one to a byte: int8 [O, I], or float8_e4m3fn."""
    codes_OI = linear.codes_OI ^ linear.scheme.middle
    return codes_OI.view(torch.float8_e4m3fn if linear.scheme.is_float else torch.int8).contiguous()


def _num_words(num_codes: int, bits: int) -> int:
    return -(-num_codes * bits // WORD_BITS)


def _unpack(words: Tensor, scheme: Scheme, shape: tuple[int, int], packed_dim: int) -> Tensor:
    """Return uint8 codes of ``shape`` through the package's own reader."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    signed: Tensor = unpack_from_int32(words, scheme.bits, torch.Size(shape), packed_dim=packed_dim)
    # The two's complement byte of (code - middle) plus middle is the code, modulo 256.
    return signed.contiguous().view(torch.uint8) + scheme.middle
