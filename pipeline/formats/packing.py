"""Codes into 32-bit words and back, and checked access to the tensors of a checkpoint.

Dimension suffixes: O = rows, I = columns, P = columns of packed words.

Codes of 4 or 8 bits lie densely and little-endian along a row: code i of b bits sits at bits b * i of the row's bit
stream, word by word. GPTQ, AWQ (after its interleave) and compressed-tensors all reduce to this by transposing.
Packing works on 16-bit lanes of two codes: shift, or, truncate, in chunks that stay in cache. Measured with
``benchmarks/pack.py``: several GB of 16-bit weights per second and core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import FormatError

WORD_BITS = 32

CHUNK_CODES = 1 << 18
"""Codes packed at once: 256 kB and its 16-bit temporaries stay in a CPU core's cache."""


def pack_rows(codes_OI: Tensor, bits: int) -> Tensor:
    """Return int32 [O, ceil(I * bits / 32)]: codes packed along each row, the last word filled up with zero bits.

    Args:
        codes_OI: uint8 [O, I], values below 2**bits.
        bits: 4 or 8.
    """
    per_word = WORD_BITS // bits
    codes_OI = torch.nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % per_word)).contiguous()
    if bits == 8:
        return _reinterpret(codes_OI, torch.int32)
    num_rows, num_columns = codes_OI.shape
    bytes_OP = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8, device=codes_OI.device)
    chunk_rows = max(1, CHUNK_CODES // max(num_columns, 1))
    for start in range(0, num_rows, chunk_rows):
        pair = _reinterpret(codes_OI[start : start + chunk_rows], torch.int16)
        # A lane is low | high << 8; or-ing it with itself >> 4 leaves low | high << 4 in the low byte.
        bytes_OP[start : start + chunk_rows] = (pair >> 4).bitwise_or_(pair).to(torch.uint8)
    return _reinterpret(bytes_OP, torch.int32)


def unpack_rows(words_OP: Tensor, bits: int, num_columns: int) -> Tensor:
    """Return uint8 [O, num_columns], the exact inverse of ``pack_rows``."""
    bytes_OP = _reinterpret(words_OP.contiguous(), torch.uint8)
    if bits == 8:
        return bytes_OP[:, :num_columns].contiguous()
    lanes = bytes_OP.to(torch.int16)
    lanes = (lanes << 4).bitwise_or_(lanes).bitwise_and_(0x0F0F)
    return _reinterpret(lanes, torch.uint8)[:, :num_columns].contiguous()


def _reinterpret(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes of a contiguous matrix as ``dtype``, row by row. A matrix of one row may be contiguous and
    still have any stride between rows, which a plain ``view`` refuses."""
    num_columns = rows.shape[1] * rows.element_size() // dtype.itemsize
    return rows.view(-1).view(dtype).view(rows.shape[0], num_columns)


def take(
    name: str,
    tensors: Mapping[str, Tensor],
    suffix: str,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int],
) -> Tensor:
    """Return the tensor ``name.suffix`` after checking that it is there with one of the dtypes and the shape.

    Raises:
        FormatError: naming the tensor, what it is and what it should be.
    """
    full_name = f"{name}.{suffix}"
    tensor = tensors.get(full_name)
    if tensor is None:
        raise FormatError(f"{full_name} is missing", code="format.missing_tensor")
    if tensor.dtype not in dtypes or list(tensor.shape) != list(shape):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise FormatError(f"{full_name} is {found}, expected {wanted} {list(shape)}", code="format.wrong_tensor")
    return tensor


def store_scale(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale in ``dtype``.

    Raises:
        FormatError: when that would change a value.
    """
    stored = scale.to(dtype)
    if not torch.equal(stored.to(torch.float32), scale):
        raise FormatError(f"{name}: a scale is not exact in {str(dtype).removeprefix('torch.')}")
    return stored


def load_scale(name: str, stored: Tensor) -> Tensor:
    """Return the scale in float32.

    Raises:
        FormatError: when a scale is not finite and positive.
    """
    scale = stored.to(torch.float32)
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise FormatError(f"{name}: a scale is not finite and positive", code="format.bad_scale")
    return scale
