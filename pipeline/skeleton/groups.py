"""Which linears of a decoder block share one input: found by running the block on the meta device.

A linear group is the set of linears that are called on the same tensor (q/k/v, gate/up). Its members share their
input statistics and are solved as rows of one matrix. Linears that the forward pass never calls, and parameters that
are no linears, stay unquantized and are named with the reason. So do routers of experts.

In a mixture of experts, gate and up of all experts of a block share one input where every expert sees all tokens, and
are one group; where each sees its own, they are a group for each expert. Every expert's down has an input of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.skeleton.calls import BlockCall
from pipeline.skeleton.experts import all_tokens, expert_of, find_routers
from pipeline.skeleton.model import PROBE_TOKENS, Skeleton
from pipeline.skeleton.modules import is_linear
from pipeline.spec import ExpertStatistics


@dataclass(frozen=True)
class LinearRef:
    """One linear of a block.

    Attributes:
        local_name: Name inside the block, for example ``self_attn.q_proj``.
        name: Name in the checkpoint without ``.weight``, for example ``model.layers.0.self_attn.q_proj``.
        out_features: Rows.
        in_features: Columns.
        is_transposed: Whether the checkpoint stores the weight as [in, out] (GPT-2's Conv1D).
        expert: Name inside the block of the expert that it is a part of, for example ``mlp.experts.3``; or empty.
    """

    local_name: str
    name: str
    out_features: int
    in_features: int
    is_transposed: bool
    expert: str = ""

    @property
    def experts(self) -> str:
        """Name inside the block of the experts that it is one's part of, for example ``mlp.experts``; or empty."""
        return self.expert.rpartition(".")[0]

    def to_rows(self, stored: Tensor) -> Tensor:
        """Return the weight as [out_features, in_features] from what the checkpoint stores (its own inverse)."""
        return stored.T.contiguous() if self.is_transposed else stored


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that are called on the same tensor, in the order of the calls."""

    block: int
    linears: tuple[LinearRef, ...]

    @property
    def label(self) -> str:
        """Name for people and paths: the members' last name parts, for example ``q_proj+k_proj+v_proj``, those of
        experts with their number, ``experts.3.down_proj``, or once for all, ``experts.gate_proj+experts.up_proj``."""
        number = f"{self.expert.rpartition('.')[2]}." if self.expert else ""
        parts = [(linear.local_name.rpartition(".")[2], linear.expert) for linear in self.linears]
        return "+".join(dict.fromkeys(f"experts.{number}{leaf}" if expert else leaf for leaf, expert in parts))

    @property
    def expert(self) -> str:
        """Name inside the block of the expert that all members are parts of; empty when they are not of one."""
        owners = {linear.expert for linear in self.linears}
        return owners.pop() if len(owners) == 1 else ""

    @property
    def in_features(self) -> int:
        """Columns, the same for all members."""
        return self.linears[0].in_features


def linear_groups(
    skeleton: Skeleton, index: int, experts: ExpertStatistics = ExpertStatistics.ALL
) -> tuple[LinearGroup, ...]:
    """Return the linear groups of one block in the order in which the forward pass first calls them.

    Args:
        skeleton: The model.
        index: Of the block.
        experts: Which tokens the statistics of experts are of: those that share all tokens are one group.
    """

    def inputs_of(block: nn.Module, call: BlockCall, hidden_BLH: Tensor) -> list[tuple[str, Tensor, int]]:
        seen_by_all = all_tokens(block) if experts is ExpertStatistics.ALL else nullcontext()
        with linear_inputs(block) as inputs, seen_by_all:
            call.run(block, hidden_BLH)
        return inputs

    shape = (1, PROBE_TOKENS, skeleton.hidden_size)
    inputs = skeleton.tried(index, skeleton.calls(1, PROBE_TOKENS)[index], shape, inputs_of)
    block = skeleton.block(index)
    names, routers = skeleton.block_tensors(index), find_routers(block)
    members: dict[tuple[Any, ...], list[LinearRef]] = {}
    for local_name, tensor, version in inputs:
        if local_name not in routers:
            members.setdefault((*_place(tensor), version), []).append(_reference(block, local_name, names))
    return tuple(LinearGroup(index, tuple(linears)) for linears in members.values())


def sequential_steps(groups: Sequence[LinearGroup]) -> tuple[tuple[int, ...], ...]:
    """Return the positions of a block's groups step by step, as they are solved one after the other: in the order of
    their calls, but what experts have under the same names at once, as no expert reads what another one gives."""
    steps: dict[Any, list[int]] = {}
    for position, group in enumerate(groups):
        leaves = tuple(linear.local_name.rpartition(".")[2] for linear in group.linears)
        steps.setdefault((group.linears[0].experts, leaves) if group.expert else position, []).append(position)
    return tuple(map(tuple, steps.values()))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common that hold the same tokens, [..., features], in one memory: experts are
    called on tokens in a row, [tokens, hidden], and shared experts on the sequences that they are of."""
    if not tensor.is_contiguous():
        return (id(tensor),)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel(), tensor.shape[-1]


@contextmanager
def linear_inputs(block: nn.Module) -> Iterator[list[tuple[str, Tensor, int]]]:
    """Within the context, every first call of a linear appends its local name, the input tensor, and how often that was
    written to in place so far, to the list given."""
    seen: list[tuple[str, Tensor, int]] = []
    called: set[str] = set()

    def hook(local_name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if local_name not in called:
                called.add(local_name)
                seen.append((local_name, args[0], args[0]._version))

        return record

    linears = [(name, module) for name, module in block.named_modules() if is_linear(module)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _reference(block: nn.Module, local_name: str, names: dict[str, str]) -> LinearRef:
    module = block.get_submodule(local_name)
    is_transposed = not isinstance(module, nn.Linear)
    shape = block.get_parameter(local_name + ".weight").shape
    rows, columns = (shape[1], shape[0]) if is_transposed else (shape[0], shape[1])
    stored = names[local_name + ".weight"].removesuffix(".weight")
    return LinearRef(local_name, stored, rows, columns, is_transposed, expert_of(local_name, block))
