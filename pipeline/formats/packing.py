"""Codes into 32-bit words and back, and checked access to the tensors of a checkpoint.

Dimension suffixes: O = rows, I = columns, P = columns of packed words.

Codes of 2 to 8 bits lie densely and little-endian along a row: code i of b bits sits at bits b * i of the row's bit
stream, word by word. GPTQ, AWQ (after its interleave) and compressed-tensors all reduce to this by transposing. Widths
that divide a word start anew in each; of the others 32 codes fill b words, some of them split over a border.

Packing folds lanes of neighbouring codes together (shift, or, cut off) in chunks that stay in cache. Widths that divide
a word need one step: two codes of 4 bits in a lane of 16, four of 2 bits in a lane of 32. The others are folded by
pairs, fours and eights until a lane of 64 holds 8 b bits, four of which make b words. Unpacking does the same
backwards. Measured with ``benchmarks/pack.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import FormatError

WORD_BITS = 32

CHUNK_CODES = 1 << 18
"""Codes packed at once: 256 kB and its 16-bit temporaries stay in a CPU core's cache."""


def codes_in_words(bits: int) -> tuple[int, int]:
    """Return the least number of codes that fill whole words, and the number of these words: 32 and 3 for 3 bits."""
    shared = math.gcd(WORD_BITS, bits)
    return WORD_BITS // shared, bits // shared


def pack_rows(codes_OI: Tensor, bits: int) -> Tensor:
    """Return int32 [O, ceil(I * bits / 32)]: codes packed along each row, the last word filled up with zero bits.

    Args:
        codes_OI: uint8 [O, I], values below 2**bits.
        bits: 2 to 8.
    """
    num_words = -(-codes_OI.shape[1] * bits // WORD_BITS)
    num_codes, _ = codes_in_words(bits)
    codes_OI = torch.nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % num_codes)).contiguous()
    if bits == 8:
        return _reinterpret(codes_OI, torch.int32)
    num_rows, num_columns = codes_OI.shape
    bytes_OP = torch.empty(num_rows, num_columns * bits // 8, dtype=torch.uint8, device=codes_OI.device)
    chunk_rows = max(1, CHUNK_CODES // max(num_columns, 1))
    for start in range(0, num_rows, chunk_rows):
        bytes_OP[start : start + chunk_rows] = _fold(codes_OI[start : start + chunk_rows], bits)
    return _reinterpret(bytes_OP, torch.int32)[:, :num_words].contiguous()


def unpack_rows(words_OP: Tensor, bits: int, num_columns: int) -> Tensor:
    """Return uint8 [O, num_columns], the exact inverse of ``pack_rows``."""
    _, num_words = codes_in_words(bits)
    if missing := -words_OP.shape[1] % num_words:
        words_OP = torch.nn.functional.pad(words_OP, (0, missing))
    words_OP = words_OP.contiguous()
    if bits == 8:
        return _reinterpret(words_OP, torch.uint8)[:, :num_columns].contiguous()
    num_rows, num_padded = words_OP.shape[0], words_OP.shape[1] * WORD_BITS // bits
    codes_OI = torch.empty(num_rows, num_padded, dtype=torch.uint8, device=words_OP.device)
    chunk_rows = max(1, CHUNK_CODES // max(num_padded, 1))
    for start in range(0, num_rows, chunk_rows):
        codes_OI[start : start + chunk_rows] = _unfold(words_OP[start : start + chunk_rows], bits)
    return codes_OI[:, :num_columns].contiguous()


def _fold(codes_OI: Tensor, bits: int) -> Tensor:
    """Return the packed bytes of contiguous rows, uint8 [O, I * bits / 8]. Codes beyond their width come back
    different, which the round-trip proof finds."""
    match bits:
        case 2:
            # A lane holds codes a, b, c, d in its bytes; its low byte becomes a | b << 2 | c << 4 | d << 6.
            four = _reinterpret(codes_OI, torch.int32)
            low = (four >> 6).bitwise_or_(four).bitwise_or_(four >> 12).bitwise_or_(four >> 18)
            return low.to(torch.uint8)
        case 4:
            pair = _reinterpret(codes_OI, torch.int16)
            # A lane is low | high << 8; or-ing it with itself >> 4 leaves low | high << 4 in the low byte.
            return (pair >> 4).bitwise_or_(pair).to(torch.uint8)
        case _:
            return _reinterpret(_fold_split(codes_OI, bits), torch.uint8)


def _fold_split(codes_OI: Tensor, bits: int) -> Tensor:
    """Return int32 [O, I * bits / 32] of a width that does not divide a word."""
    lanes = _reinterpret(codes_OI, torch.int64)
    for half in (8, 16, 32):
        filled = half * bits // 8
        low, high = _halves(half, filled, filled)
        lanes = (lanes >> half - filled).bitwise_and_(high).bitwise_or_(lanes & low)
    num_codes, num_words = codes_in_words(bits)
    neighbours, filled = lanes.view(lanes.shape[0], -1, num_codes // 8).unbind(2), 8 * bits
    words = []
    for begin in range(0, num_words * WORD_BITS, WORD_BITS):
        first, last = begin // filled, (begin + WORD_BITS - 1) // filled
        word = neighbours[first] >> begin - first * filled
        for number in range(first + 1, last + 1):
            word = word | neighbours[number] << number * filled - begin
        words.append(word.to(torch.int32))
    return torch.stack(words, dim=2).flatten(1)


def _halves(half: int, filled: int, place: int) -> tuple[int, int]:
    """Return two masks of 64 bits, as torch takes them: in each lane of two halves, the ``filled`` lowest bits, and as
    many from ``place`` on."""
    low = sum(((1 << filled) - 1) << start for start in range(0, 64, 2 * half))
    high = low << place
    return low, high - (1 << 64) if high >> 63 else high


def _unfold(words_OP: Tensor, bits: int) -> Tensor:
    """Return the codes of contiguous rows of words, uint8 [O, P * 32 / bits]."""
    match bits:
        case 2:
            lanes = _reinterpret(words_OP, torch.uint8).to(torch.int32)
            lanes = (lanes << 12).bitwise_or_(lanes).bitwise_and_(0x000F000F)
            lanes = (lanes << 6).bitwise_or_(lanes).bitwise_and_(0x03030303)
        case 4:
            lanes = _reinterpret(words_OP, torch.uint8).to(torch.int16)
            lanes = (lanes << 4).bitwise_or_(lanes).bitwise_and_(0x0F0F)
        case _:
            lanes = _unfold_split(words_OP, bits)
    return _reinterpret(lanes, torch.uint8)


def _unfold_split(words_OP: Tensor, bits: int) -> Tensor:
    """Return int64 [O, P * 4 / bits]: lanes of eight codes, a byte each."""
    _, num_words = codes_in_words(bits)
    words, filled = words_OP.view(words_OP.shape[0], -1, num_words).to(torch.int64).unbind(2), 8 * bits
    neighbours = []  # above their codes they have signs and what belongs to others, which is cut off below
    for begin in range(0, num_words * WORD_BITS, filled):
        first, last = begin // WORD_BITS, (begin + filled - 1) // WORD_BITS
        lane = words[first] >> begin - first * WORD_BITS
        for number in range(first + 1, last + 1):
            place = number * WORD_BITS - begin
            lane = lane & ((1 << place) - 1) | words[number] << place
        neighbours.append(lane)
    lanes = torch.stack(neighbours, dim=2).flatten(1)
    for half in (32, 16, 8):
        filled = half * bits // 8
        low, high = _halves(half, filled, half)
        lanes = (lanes << half - filled).bitwise_and_(high).bitwise_or_(lanes & low)
    return lanes


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
