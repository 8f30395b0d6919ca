"""The AWQ GEMM layout: asymmetric, 4 bits.

Dimension suffixes: O = out_features, I = in_features, G = groups of a row, W = words of 8 rows (O / 8).

Per linear: ``qweight`` int32 [I, O / 8], packed along out_features; ``qzeros`` int32 [G, O / 8], packed the same way,
holding the true zero; ``scales`` float16 [G, O]. Nibble k of word c belongs to row 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[k].
A weight is scale * (code - zero).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import FormatError
from pipeline.formats.codec import require_holdable
from pipeline.formats.packing import CHUNK_CODES, load_scale, store_scale, take
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.spec import FORMAT_BITS, Format

NIBBLE_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Row (of a word's 8) that each nibble belongs to, from the lowest nibble up."""


class AwqCodec:
    """Codec of the AWQ GEMM layout."""

    format = Format.AWQ

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """Return the names of the three tensors of this layout."""
        return ("qweight", "qzeros", "scales")

    def check(self, name: str, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        """Return what keeps the layout from holding the linear: width, symmetry, or rows that words do not divide."""
        if scheme.bits not in FORMAT_BITS[Format.AWQ]:
            return f"{name}: format awq holds 4 bits, not {scheme.bits}"
        if scheme.symmetric:
            return f"{name}: format awq stores zero points, the grid must be asymmetric"
        if in_features % scheme.group_size:
            return f"{name}: group size {scheme.group_size} does not divide {in_features} columns"
        if out_features % 8:
            return f"{name}: format awq packs 8 rows into a word, which does not divide out_features {out_features}"
        return None

    def num_bytes(self, out_features: int, in_features: int, scheme: Scheme, scale_bytes: int) -> int:
        """Return the bytes of the three tensors."""
        groups = in_features // scheme.group_size
        return (in_features + groups) * out_features * scheme.bits // 8 + 2 * groups * out_features

    def pack(self, name: str, linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the three tensors; scales are float16 whatever ``scale_dtype`` says."""
        require_holdable(self, name, linear)
        return {
            f"{name}.qweight": _pack_columns(linear.codes_OI),
            f"{name}.qzeros": _pack_columns(linear.zero_OG),
            f"{name}.scales": store_scale(name, linear.scale_OG, torch.float16).t().contiguous(),
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scale and zero point."""
        found = tensors.get(f"{name}.qweight")
        if found is None or found.ndim != 2 or not found.numel():
            raise FormatError(f"{name}.qweight is missing or no matrix", code="format.missing_tensor")
        in_features, num_words = found.shape
        if (reason := self.check(name, num_words * 8, in_features, scheme)) is not None:
            raise FormatError(reason)
        num_groups = in_features // scheme.group_size
        qweight = take(name, tensors, "qweight", [torch.int32], [in_features, num_words])
        qzeros = take(name, tensors, "qzeros", [torch.int32], [num_groups, num_words])
        scales = take(name, tensors, "scales", [torch.float16], [num_groups, num_words * 8])
        scale_OG = load_scale(f"{name}.scales", scales).t().contiguous()
        return _unpack_columns(qweight), scale_OG, _unpack_columns(qzeros)


def _pack_columns(codes_OI: Tensor) -> Tensor:
    """Return int32 [I, O / 8] of uint8 [O, I]: combined along rows, where a row is contiguous, then transposed as
    words, which moves an eighth of the elements."""
    num_rows, num_columns = codes_OI.shape
    codes_W8I = codes_OI.reshape(num_rows // 8, 8, num_columns)
    words_WI = torch.empty(num_rows // 8, num_columns, dtype=torch.int32, device=codes_OI.device)
    chunk = max(1, CHUNK_CODES // (8 * num_columns))
    for start in range(0, num_rows // 8, chunk):
        part_W8I = codes_W8I[start : start + chunk]
        word_WI = words_WI[start : start + chunk]
        word_WI.zero_()
        for byte in range(4):
            low, high = NIBBLE_ROWS[2 * byte], NIBBLE_ROWS[2 * byte + 1]
            pair_WI = (part_W8I[:, high] << 4).bitwise_or_(part_W8I[:, low])
            word_WI.bitwise_or_(pair_WI.to(torch.int32).bitwise_left_shift_(8 * byte))
    return words_WI.t().contiguous()


def _unpack_columns(words_IW: Tensor) -> Tensor:
    """Return uint8 [O, I] of int32 [I, O / 8], the exact inverse of ``_pack_columns``."""
    words_WI = words_IW.t().contiguous()
    num_words, num_columns = words_WI.shape
    codes_W8I = torch.empty(num_words, 8, num_columns, dtype=torch.uint8, device=words_IW.device)
    chunk = max(1, CHUNK_CODES // (8 * num_columns))
    for start in range(0, num_words, chunk):
        for nibble, row in enumerate(NIBBLE_ROWS):
            shifted = words_WI[start : start + chunk] >> (4 * nibble)
            codes_W8I[start : start + chunk, row] = shifted.bitwise_and_(15).to(torch.uint8)
    return codes_W8I.view(num_words * 8, num_columns)
