"""Large tables outside the blocks, token embeddings and the output head, computed with in the dtype they are stored in:
the rows of the tokens at hand are converted, or the head's rows a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.skeleton.calls import BlockForward
from pipeline.skeleton.modules import set_tensor

TABLE_ELEMENTS = 1 << 25
"""Tables up to this size (128 MB in float32) are converted as a whole: for every token anew would be slower. Part of
the order of summation, as the next one."""

HEAD_PART_ELEMENTS = 1 << 23
"""Elements of the output head that are converted together (32 MB in float32)."""


class Tables:
    """What the tables of a model's embeddings (of which there may be one for each layer) and head are.

    Attributes:
        names: Of the parameters that may be one: those of torch's own classes alone, which say what a forward is.
        held: Tables in the dtype that they are stored in, by name; the modules compute with these where there are some.
    """

    def __init__(self, net: Any, inside: tuple[str, ...], dtype: torch.dtype) -> None:
        """Have the modules of ``net`` compute from tables, but for those whose names begin with one of ``inside``."""
        self.names: list[str] = []
        self.held: dict[str, Tensor] = {}
        self._dtype = dtype
        embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
        num_tokens = getattr(embedding, "num_embeddings", None)
        for name, module in net.named_modules():
            if name.startswith(inside):
                continue
            table = f"{name}.weight"
            if isinstance(module, nn.Embedding) and module.max_norm is None and module.num_embeddings == num_tokens:
                module.padding_idx = None  # matters to gradients only, and has to be among the rows at hand
                self._take(table, module, _embed)
            elif module is head and type(head) is nn.Linear:
                self._take(table, module, _apply_head)

    def among(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which of some weights are tables too large to be converted as a whole."""
        possible = {name: weights[name] for name in self.names if name in weights}
        return {name: tensor for name, tensor in possible.items() if tensor.numel() > TABLE_ELEMENTS}

    def _take(self, table: str, module: nn.Module, parts: _ByParts) -> None:
        whole = module.forward

        def forward(x: Tensor) -> Any:
            found = self.held.get(table)
            return whole(x) if found is None else parts(module, whole, found, x, self._dtype)

        vars(module)["forward"] = forward
        self.names.append(table)


_ByParts = Callable[[nn.Module, BlockForward, Tensor, Tensor, torch.dtype], Tensor]
"""What a module gives, from its own forward, a table in the stored dtype, its input, and the dtype to compute in."""


def _embed(module: nn.Module, whole: BlockForward, table_VH: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the embedding gives for token ids: its own forward over the rows of those that occur."""
    occurring, places = torch.unique(ids, return_inverse=True)
    before = module._parameters["weight"]
    set_tensor(module, "weight", table_VH[occurring].to(dtype))
    try:
        output: Tensor = whole(places)
    finally:
        module._parameters["weight"] = before
    return output


def _apply_head(module: nn.Module, whole: BlockForward, table_VH: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the output head gives, [..., vocabulary]."""
    output = x.new_empty(*x.shape[:-1], table_VH.shape[0])
    num_rows = max(1, HEAD_PART_ELEMENTS // table_VH.shape[1])
    for start in range(0, table_VH.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        output[..., rows] = nn.functional.linear(x, table_VH[rows].to(dtype))
    bias = module._parameters["bias"]
    return output if bias is None else output.add_(bias)
