"""Which layer produces a linear group's input, so that its channels can be rescaled without changing the model.

If a group reads x and every other path from the producer to x is linear, dividing the producer's output channels by s
and multiplying the group's columns by s changes nothing. The candidates (the norm whose output the group reads; a
linear of the same block, whole, or its last rows where projections are fused, with one row feeding the same dimension
of several query heads) are not believed but tried: the block is run with the change, and a candidate counts only when
the output stays the same. So v -> o and up -> down are found in any architecture where they hold, and nothing is
listed per model.

A router reads what its experts read and stays unquantized: where it reads the group's input, its columns are multiplied
by s as the group's are (it *follows*). All experts are run on all tokens, or a change could hide in one that no token
was sent to; what is inside one expert is tried on that expert alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.skeleton.experts import all_tokens, find_routers
from pipeline.skeleton.groups import LinearGroup
from pipeline.skeleton.model import PROBE_TOKENS, Skeleton
from pipeline.skeleton.modules import is_linear

TOLERANCE = 1e-4
"""Relative difference up to which a change counts as none. Float32 gives about 1e-6; a gate whose inputs are so small
that its activation function is nearly linear still gives 1e-3."""


class Fold(StrEnum):
    """How a producer takes up a division of its output by s."""

    ROWS = "rows"
    """A linear: rows of its weight and bias are divided."""
    SCALE = "scale"
    """A norm with output ``weight * x_hat``: weight (and bias) are divided."""
    SCALE_PLUS_ONE = "scale_plus_one"
    """A norm with output ``(1 + weight) * x_hat``: 1 + weight is divided."""


@dataclass(frozen=True)
class Producer:
    """The layer whose output channels a group's input channels come from.

    Attributes:
        local_name: Its name inside the block.
        fold: How it takes up a division.
        first_row: First output channel that feeds the group.
        row_of_I: For each input channel of the group, the output channel (from ``first_row``) that it comes from.
        is_transposed: Whether a linear's weight is stored as [in, out].
        followers: Local names of the layers beside the group that read its input, [rows, in], and stay unquantized.
    """

    local_name: str
    fold: Fold
    first_row: int
    row_of_I: tuple[int, ...]
    is_transposed: bool = False
    followers: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Number of output channels that feed the group."""
        return max(self.row_of_I) + 1


@torch.no_grad()
def find_producers(skeleton: Skeleton, groups: Sequence[LinearGroup]) -> list[Producer | None]:
    """Return each group's producer, or None where rescaling is not possible. The weights of the block must be attached,
    for groups inside one expert those of the expert."""
    block = skeleton.block(groups[0].block)
    with all_tokens(block):
        return [_first_that_holds(skeleton, block, group) for group in groups]


def _first_that_holds(skeleton: Skeleton, block: nn.Module, group: LinearGroup) -> Producer | None:
    run_scope = _scope(skeleton, block, group)
    with _inputs(block, (*find_routers(block), group.linears[0].local_name)) as inputs, _outputs(block) as outputs:
        run_scope()
    own_input = inputs.pop(group.linears[0].local_name)
    followers = tuple(name for name, x in inputs.items() if x.shape == own_input.shape and torch.equal(x, own_input))

    def run() -> Tensor:
        # What the block adds to the residual stream, and what reads the input itself: a change may hide in neither.
        with _outputs(block) as outputs:
            added = run_scope()
        own = [outputs[name] for name in (*(linear.local_name for linear in group.linears), *followers)]
        return torch.cat([part.flatten() / part.norm() for part in (added, *own)])

    baseline = run()
    for found in _candidates(skeleton, block, group, outputs):
        producer = replace(found, followers=followers)
        scale_R = _probe_scale(producer.num_rows).to(baseline)
        with _rescaled(block, group, producer, scale_R):
            changed = run()
        if (changed - baseline).norm() <= TOLERANCE * baseline.norm():
            return producer
    return None


def _scope(skeleton: Skeleton, block: nn.Module, group: LinearGroup) -> Callable[[], Tensor]:
    """Return what runs the least that a group and its producer are in, and gives what comes out: the group's expert,
    or the block, of which the residual stream is left out."""
    generator = torch.Generator().manual_seed(group.block)
    call = skeleton.calls(1, PROBE_TOKENS)[group.block]
    hidden_BLH = torch.randn(1, PROBE_TOKENS, skeleton.hidden_size, generator=generator)
    hidden_BLH = hidden_BLH.to(device=skeleton.device, dtype=skeleton.dtype)
    if group.expert:
        expert = block.get_submodule(group.expert)
        return lambda: expert(hidden_BLH[0])
    return lambda: call.run(block, hidden_BLH) - hidden_BLH


def _candidates(
    skeleton: Skeleton, block: nn.Module, group: LinearGroup, outputs: dict[str, Tensor]
) -> Iterator[Producer]:
    identity = tuple(range(group.in_features))
    called = list(outputs)
    first_member = min(called.index(linear.local_name) for linear in group.linears)
    for name in reversed(called[:first_member]):  # the nearest layer before the group first
        module = block.get_submodule(name)
        if is_linear(module):
            rows = outputs[name].shape[-1]
            for mapping in _head_mappings(skeleton, group.in_features):
                needed = max(mapping) + 1
                if needed <= rows:
                    transposed = not isinstance(module, nn.Linear)
                    yield Producer(name, Fold.ROWS, rows - needed, mapping, transposed)
        elif (fold := _norm_fold(module, group.in_features)) is not None:
            yield Producer(name, fold, 0, identity)


def _head_mappings(skeleton: Skeleton, in_features: int) -> Iterator[tuple[int, ...]]:
    """Yield channel maps: one to one, and each value dimension to all query heads of its key-value head."""
    yield tuple(range(in_features))
    config = skeleton.net.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    repeat, dims = heads // kv_heads, in_features // heads
    if repeat > 1 and dims * heads == in_features:
        yield tuple((channel // dims // repeat) * dims + channel % dims for channel in range(in_features))


def _norm_fold(module: nn.Module, in_features: int) -> Fold | None:
    """Return how a norm's weight enters its output, by trying it; None when it is no norm over these channels."""
    weight = getattr(module, "weight", None)
    if weight is None or tuple(weight.shape) != (in_features,):
        return None
    probe = torch.linspace(-1, 1, 3 * in_features, dtype=weight.dtype, device=weight.device).view(3, in_features)
    probe = probe + probe.square()
    scale_I = _probe_scale(in_features).to(weight)
    bias = getattr(module, "bias", None)
    offset = bias if bias is not None else 0.0
    before = module(probe) - offset
    for fold in (Fold.SCALE, Fold.SCALE_PLUS_ONE):
        with _weight_replaced(module, divide_norm(weight, scale_I, fold)):
            after = module(probe) - offset
        if (after * scale_I - before).norm() <= TOLERANCE * before.norm():
            return fold
    return None


def divide_norm(weight_I: Tensor, scale_I: Tensor, fold: Fold) -> Tensor:
    """Return the norm weight [I] whose output is the old one divided by ``scale_I``."""
    match fold:
        case Fold.SCALE | Fold.ROWS:
            return weight_I / scale_I
        case Fold.SCALE_PLUS_ONE:
            return (1 + weight_I) / scale_I - 1


@contextmanager
def _weight_replaced(module: nn.Module, weight: Tensor) -> Iterator[None]:
    before = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module._parameters["weight"] = before


@contextmanager
def _rescaled(block: nn.Module, group: LinearGroup, producer: Producer, scale_R: Tensor) -> Iterator[None]:
    """Divide the producer's output rows by ``scale_R`` and multiply the group's inputs back."""
    rows = slice(producer.first_row, producer.first_row + producer.num_rows)
    scale_I = scale_R[list(producer.row_of_I)]
    following = [block.get_submodule(name) for name in producer.followers]

    def divide(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., rows] /= scale_R
        return changed

    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * scale_I, *args[1:])

    with ExitStack() as stack:
        handles = [block.get_submodule(producer.local_name).register_forward_hook(divide)]
        for linear in group.linears:
            handles.append(block.get_submodule(linear.local_name).register_forward_pre_hook(multiply))
        for handle in handles:
            stack.callback(handle.remove)
        for module in following:
            stack.enter_context(_weight_replaced(module, module.get_parameter("weight") * scale_I))
        yield


@contextmanager
def _outputs(block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the context, the output of every leaf layer with a weight, by local name in calling order."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output  # of a router's, the logits
            if isinstance(first, Tensor):
                outputs.setdefault(name, first)

        return record

    leaves = [(n, m) for n, m in block.named_modules() if not list(m.children()) and hasattr(m, "weight")]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _inputs(block: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, what layers are first called on, [tokens, features], by local name."""
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, args[0].flatten(0, -2))

        return record

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _probe_scale(size: int) -> Tensor:
    """Return fixed factors between 0.5 and 2 that no symmetry of the channels leaves alone."""
    return torch.exp2(torch.rand(size, generator=torch.Generator().manual_seed(size)) * 2 - 1)
