"""The project's own reference loader: packed tensors back to the dense weights that the release stands for.

Independent of the solver's results: it sees only tensors and ``quantization_config``, as an engine would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.formats.codec import codec_for
from pipeline.formats.config import read_quantization_config
from pipeline.quantize.activations import round_inputs
from pipeline.quantize.types import Scheme, dequantize
from pipeline.skeleton.groups import LinearRef
from pipeline.skeleton.inputs import InputFunction
from pipeline.spec import Activations

MIN_NORMAL_F16, MAX_F16 = 2.0**-14, 65504.0
"""The range in which float16 keeps its full precision."""


def scale_problems(name: str, scale_OG: Tensor) -> list[str]:
    """Return what is wrong with a linear's scales: not finite, not positive, or outside float16's normal range."""
    scale_OG = scale_OG.float()
    bad = ~((scale_OG >= MIN_NORMAL_F16) & (scale_OG <= MAX_F16))  # NaN compares false, so it is bad
    if not bad.any():
        return []
    row, group = (int(i) for i in bad.nonzero()[0])
    return [
        f"{name}: {int(bad.sum())} scales not normal in float16, first {float(scale_OG[row, group])!r} "
        f"at row {row}, group {group}"
    ]


class DenseReader:
    """Turns the tensors of a checkpoint into dense weights.

    An empty ``quantization_config`` means that nothing is quantized, so the source is read by the same code.
    """

    def __init__(self, quantization_config: Mapping[str, Any] | None, linears: Sequence[LinearRef]) -> None:
        """Prepare for a checkpoint.

        Raises:
            FormatError: when the config is unknown or contradicts itself.
        """
        self._schemes = read_quantization_config(quantization_config) if quantization_config else None
        self._linears = {linear.name: linear for linear in linears}

    def stored_names(self, name: str) -> list[str]:
        """Return the checkpoint tensors that hold the tensor that is called ``name`` when nothing is quantized."""
        found = self._quantized(name)
        if found is None or self._schemes is None:
            return [name]
        linear, scheme = found
        return [f"{linear.name}.{suffix}" for suffix in codec_for(self._schemes.format).suffixes(scheme)]

    def scales(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return the scales float32 [O, G] of a quantized weight, None of another tensor.

        Raises:
            FormatError: when its tensors are missing or damaged.
        """
        found = self._quantized(name)
        if found is None or self._schemes is None:
            return None
        return codec_for(self._schemes.format).unpack(found[0].name, tensors, found[1])[1]

    def dense(self, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return dense weights by local name; quantized ones are float32 in the layout of the checkpoint.

        Args:
            names: Unquantized checkpoint name by local name.
            tensors: Tensors of the checkpoint, at least those of ``stored_names``.

        Raises:
            FormatError: when a quantized tensor is missing or damaged.
        """
        return {local: self._weight(name, tensors) for local, name in names.items()}

    def input_functions(self) -> dict[str, InputFunction]:
        """Return what becomes of the inputs of each linear that does not take them as they are, by its name in the
        checkpoint; it is one function for all linears of a scheme."""
        found = {name: scheme for name in self._linears if (scheme := self.scheme(name)) is not None}
        rounded = {name: scheme for name, scheme in found.items() if scheme.activations is not Activations.NONE}
        functions = {scheme: partial(round_inputs, scheme=scheme) for scheme in rounded.values()}
        return {name: functions[scheme] for name, scheme in rounded.items()}

    def _weight(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        found = self._quantized(name)
        if found is None or self._schemes is None:
            return tensors[name]
        linear, scheme = found
        codes_OI, scale_OG, zero_OG = codec_for(self._schemes.format).unpack(linear.name, tensors, scheme)
        return linear.to_rows(dequantize(codes_OI, scale_OG, zero_OG, scheme))

    def _quantized(self, name: str) -> tuple[LinearRef, Scheme] | None:
        linear = self._linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        scheme = None if linear is None else self.scheme(linear.name)
        return None if linear is None or scheme is None else (linear, scheme)

    def scheme(self, name: str) -> Scheme | None:
        """Return the grid of a linear by its name; None when it is not quantized."""
        return None if self._schemes is None else self._schemes.scheme(name, self._linears[name].in_features)
