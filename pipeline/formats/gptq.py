"""The GPTQ layout, 2, 3, 4 and 8 bits: version 1 (``checkpoint_format: gptq``), symmetric, and version 2 (``gptq_v2``),
symmetric and asymmetric.

Dimension suffixes: O = out_features, I = in_features, G = groups of a row, P = packed words.

Per linear: ``qweight`` int32 [I * b / 32, O], packed along in_features; ``qzeros`` int32 [G, O * b / 32], packed along
out_features, holding **zero - 1** in version 1 (7 for symmetric 4-bit codes: every word 0x77777777) and the zero point
itself in version 2; ``scales`` float16 [G, O]; ``g_idx`` int32 [I], i // group_size, since groups stay static. A weight
is scale * (code - zero).
Three-bit codes fill three words by 32, two of them split over a border (10 whole, a split one, 10, a split one, 10),
which is the same dense bit stream as at the other widths; I and O must be multiples of 32 then.

A file of one version under the label of the other makes engines emit noise, so ``unpack`` insists on the stored zero of
its version where grids are symmetric. Version 1 has no asymmetric ones: a zero point of 0 would be stored as -1 and
borrow from its neighbour in the word. Of 3-bit codes there is a layout by planes (``gptq_p``) as well, which is neither
written nor read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import FormatError
from pipeline.formats.codec import require_holdable
from pipeline.formats.packing import WORD_BITS, codes_in_words, load_scale, pack_rows, store_scale, take, unpack_rows
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.spec import FORMAT_BITS, Format


class GptqCodec:
    """Codec of the GPTQ layout, in one of its versions.

    Attributes:
        format: ``gptq`` or ``gptq_v2``.
    """

    def __init__(self, format_: Format) -> None:
        """Take the version that the format names."""
        self.format = format_
        self._taken_off = 1 if format_ is Format.GPTQ else 0

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """Return the names of the four tensors of this layout."""
        return ("qweight", "qzeros", "scales", "g_idx")

    def check(self, name: str, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        """Return what keeps the layout from holding the linear: width, symmetry, or a size that words do not divide."""
        if scheme.bits not in FORMAT_BITS[self.format]:
            legal = ", ".join(map(str, FORMAT_BITS[self.format]))
            return f"{name}: format {self.format} holds {legal} bits, not {scheme.bits}"
        if not scheme.symmetric and self.format is Format.GPTQ:
            return f"{name}: format gptq holds symmetric grids only"
        if in_features % scheme.group_size:
            return f"{name}: group size {scheme.group_size} does not divide {in_features} columns"
        num_codes, num_words = codes_in_words(scheme.bits)
        words = "a word" if num_words == 1 else f"{num_words} words"
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size % num_codes:
                packs = f"format {self.format} packs {num_codes} codes into {words}"
                return f"{name}: {packs}, which does not divide {what} {size}"
        return None

    def num_bytes(self, out_features: int, in_features: int, scheme: Scheme, scale_bytes: int) -> int:
        """Return the bytes of the four tensors."""
        groups = in_features // scheme.group_size
        words = (in_features + groups) * out_features * scheme.bits // WORD_BITS
        return 4 * words + 2 * groups * out_features + 4 * in_features

    def pack(self, name: str, linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the four tensors; scales are float16 whatever ``scale_dtype`` says."""
        require_holdable(self, name, linear)
        bits, columns = linear.scheme.bits, linear.codes_OI.shape[1]
        device = linear.codes_OI.device
        return {
            f"{name}.qweight": pack_rows(linear.codes_OI, bits).t().contiguous(),
            f"{name}.qzeros": pack_rows((linear.zero_OG - self._taken_off).t(), bits),
            f"{name}.scales": store_scale(name, linear.scale_OG, torch.float16).t().contiguous(),
            f"{name}.g_idx": _sequential(columns, linear.scheme.group_size, device),
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scale and zero point; another version's content and columns out of order are refused."""
        out_features, in_features = _sizes(name, tensors, scheme)
        if (reason := self.check(name, out_features, in_features, scheme)) is not None:
            raise FormatError(reason)
        num_groups, bits = in_features // scheme.group_size, scheme.bits
        qweight = take(name, tensors, "qweight", [torch.int32], [in_features * bits // WORD_BITS, out_features])
        qzeros = take(name, tensors, "qzeros", [torch.int32], [num_groups, out_features * bits // WORD_BITS])
        scales = take(name, tensors, "scales", [torch.float16], [num_groups, out_features])
        g_idx = take(name, tensors, "g_idx", [torch.int32], [in_features])
        if not torch.equal(g_idx, _sequential(in_features, scheme.group_size, g_idx.device)):
            raise FormatError(f"{name}.g_idx is not i // {scheme.group_size}: columns stored out of order are not read")
        stored_zero_GO = unpack_rows(qzeros, bits, out_features)
        if scheme.symmetric and not bool((stored_zero_GO == scheme.middle - self._taken_off).all()):
            raise self._label_disagrees(name, scheme)
        codes_OI = unpack_rows(qweight.t(), bits, in_features)
        scale_OG = load_scale(f"{name}.scales", scales).t().contiguous()
        return codes_OI, scale_OG, (stored_zero_GO + self._taken_off).t().contiguous()

    def _label_disagrees(self, name: str, scheme: Scheme) -> FormatError:
        versions = {Format.GPTQ: (1, "zero - 1"), Format.GPTQ_V2: (2, "the zero point")}
        (version, what), (other, _) = (versions[f] for f in sorted(versions, key=lambda f: f is not self.format))
        other_label = next(f for f in versions if f is not self.format)
        stored, theirs = scheme.middle - self._taken_off, scheme.middle - 1 + self._taken_off
        return FormatError(
            f"{name}.qzeros must hold {stored} everywhere (version {version} stores {what})",
            hint=f"{theirs} everywhere is version {other} content: label it checkpoint_format {other_label}",
            code="format.label_disagrees",
        )


def _sequential(in_features: int, group_size: int, device: torch.device) -> Tensor:
    return (torch.arange(in_features, device=device) // group_size).to(torch.int32)


def _sizes(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """Return out_features and in_features as ``qweight`` has them; ``take`` judges everything else by these."""
    qweight = tensors.get(f"{name}.qweight")
    if qweight is None or qweight.ndim != 2 or not qweight.numel():
        raise FormatError(f"{name}.qweight is missing or no matrix", code="format.missing_tensor")
    return qweight.shape[1], qweight.shape[0] * WORD_BITS // scheme.bits
