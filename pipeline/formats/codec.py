"""What a checkpoint format does with one linear, and the proof that it loses nothing.

Dimension suffixes: O = out_features (rows), I = in_features, G = groups of a row.

A codec is stateless. ``pack`` and ``unpack`` are exact inverses on codes, scales and zero points; ``prove_round_trip``
checks that on the very tensors that are published, which also proves that label and content agree (a zero point stored
by the rules of another version of the format comes back different).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import FormatError
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.spec import Format


class Codec(Protocol):
    """One checkpoint format."""

    @property
    def format(self) -> Format:
        """The format's name."""
        ...

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """Return what is appended (after a dot) to the linear's name for each of its tensors."""
        ...

    def check(self, name: str, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        """Return why the format cannot hold such a linear, naming it, or None when it can."""
        ...

    def num_bytes(self, out_features: int, in_features: int, scheme: Scheme, scale_bytes: int) -> int:
        """Return the bytes of a linear's tensors.

        Args:
            out_features: Rows.
            in_features: Columns.
            scheme: Its grid.
            scale_bytes: Bytes of a scale where the format stores it in the source's dtype (compressed-tensors).
        """
        ...

    def pack(self, name: str, linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the linear's tensors by full name, contiguous.

        Args:
            name: Name of the linear in the checkpoint, without ``.weight``.
            linear: Codes and grid.
            scale_dtype: Dtype of the source's weights. compressed-tensors stores scales in it; the layouts of GPTQ and
                AWQ fix float16 and do not look at it.

        Raises:
            FormatError: when ``check`` objects or a scale is not exact in the dtype it is stored in.
        """
        ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (uint8 [O, I]), scale (float32 [O, G]) and zero point (uint8 [O, G]).

        Raises:
            FormatError: naming the tensor that is missing, misshapen, of the wrong dtype, or contradicts the scheme.
        """
        ...


def codec_for(format_: Format) -> Codec:
    """Return the codec of a format."""
    from pipeline.formats.awq import AwqCodec
    from pipeline.formats.compressed import CompressedCodec
    from pipeline.formats.gptq import GptqCodec

    match format_:
        case Format.GPTQ | Format.GPTQ_V2:
            return GptqCodec(format_)
        case Format.AWQ:
            return AwqCodec()
        case Format.COMPRESSED_TENSORS:
            return CompressedCodec()


def require_holdable(codec: Codec, name: str, linear: QuantizedLinear) -> None:
    """Return when the codec can hold the linear.

    Raises:
        FormatError: with the codec's reason.
    """
    out_features, in_features = linear.codes_OI.shape
    if (reason := codec.check(name, out_features, in_features, linear.scheme)) is not None:
        raise FormatError(reason, code="format.cannot_hold")


def prove_round_trip(codec: Codec, name: str, linear: QuantizedLinear, tensors: Mapping[str, Tensor]) -> None:
    """Return when ``tensors``, as packed, read back as exactly this linear.

    Raises:
        FormatError: naming the linear and which of codes, scales and zero points came back different.
    """
    codes_OI, scale_OG, zero_OG = codec.unpack(name, tensors, linear.scheme)
    pairs = {
        "codes": (codes_OI, linear.codes_OI),
        "scales": (scale_OG, linear.scale_OG),
        "zero points": (zero_OG, linear.zero_OG),
    }
    different = [what for what, (read, written) in pairs.items() if not torch.equal(read, written)]
    if different:
        raise FormatError(
            f"{name}: {' and '.join(different)} come back different from format {codec.format}",
            code="format.round_trip",
        )
