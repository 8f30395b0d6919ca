"""A variant's dense weights, as its packed files stand for them, and what it makes of the inputs of linears."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from pipeline.graph.dag import Kind
from pipeline.graph.stages.call import Call
from pipeline.validate.dense import DenseReader


class VariantReader:
    """Dense weights of one variant from its packed blocks, or of the source when there are none."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._packs = {need.block: need for need in call.needs(Kind.PACK)}
        linears = [linear for block in call.source.outline.groups for group in block for linear in group.linears]
        self._reader = DenseReader(call.params["quantization_config"], linears)

    def rounding_inputs(self) -> AbstractContextManager[None]:
        """Within the context, the skeleton's linears round their inputs as the variant's do; the source's do not."""
        return self._call.skeleton.inputs_taken_through(self._reader.input_functions() if self._packs else {})

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return the dense weights of one block by local name."""
        if index not in self._packs:
            return self._call.source.block_to_pass(index)
        return self._reader.dense(self._call.skeleton.block_tensors(index), self._call.get(self._packs[index]))
