"""How much a model's predictions change with the outputs of each of its linears.

For a small error e of a linear's output at some position, the divergence from the model's own next-token
distributions grows as KL = e^T F e / 2, where F is the Fisher information: the mean of g g^T, g the gradient of -log p
of a token drawn from the model's own distribution (its second-order expansion; Pascanu and Bengio, arXiv 1301.3584).
Of F the diagonal is kept, and the positions' errors are taken to be uncorrelated. With the second moment H of the
linear's inputs over T tokens, an error dW of its weights costs, in nats per token,

    KL = sum over rows o of  E[g_o^2] / 2 * (dW H dW^T)_oo / T

which is what solvers minimize, row by row, times what one backward pass gives. This says where bits are worth most; it
is not the divergence of a whole release, whose errors are large and add up.

The pass goes through the blocks one at a time, forwards and back, so that the weights of one are in memory; what enters
each block is kept meanwhile. Cost: three forward passes, and reading all weights twice.

Dimension suffixes: N = sequences, L = positions, H = hidden size, V = vocabulary, O = a linear's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline import heap
from pipeline.errors import CalibrationError
from pipeline.finite import is_finite
from pipeline.precision import Precision
from pipeline.skeleton.model import Skeleton

LOGIT_ELEMENTS = 1 << 24
"""Logits that are there at a time (64 MB, four times over)."""


def output_sensitivity(
    skeleton: Skeleton,
    tokens_NL: Tensor,
    load: Callable[[int], Mapping[str, Tensor]],
    linears: Sequence[Sequence[str]],
    vocabulary_size: int,
    precision: Precision,
    seed: int,
) -> dict[tuple[int, str], Tensor]:
    """Return for linears by block and local name the sum over all positions of g_o^2, float32 [O]; see the top.

    Needs ``attach_outer``. Deterministic for a seed on one kind of processor.

    Args:
        skeleton: The model.
        tokens_NL: int64 token ids.
        load: Gives the weights of one block by local name.
        linears: Local names of each block's linears.
        vocabulary_size: Logits of one position that stand for tokens.
        precision: Of matrix products in decoder blocks.
        seed: Of what tokens are drawn.

    Raises:
        CalibrationError: when a block computes something that torch has no gradient of, or one is not finite.
    """
    drawn = torch.Generator(device=skeleton.device).manual_seed(seed)
    hidden = [skeleton.embed(row[None]) for row in tokens_NL]
    entered: list[list[Tensor]] = []
    for index in range(skeleton.num_blocks):
        with skeleton.attached(index, load(index), precision):
            entered.append(hidden)
            hidden = [skeleton.run_block(index, states_BLH) for states_BLH in hidden]
    gradients = [_prediction_gradient(skeleton, states_BLH, vocabulary_size, drawn) for states_BLH in hidden]
    found: dict[tuple[int, str], Tensor] = {}
    for index in reversed(range(skeleton.num_blocks)):
        with (
            skeleton.attached(index, load(index), precision) as block,
            _watching(block, linears[index]) as sums,
        ):
            states = zip(entered.pop(), gradients, strict=True)
            gradients = [_back_through(skeleton, index, *pair) for pair in states]
        found |= {(index, name): total for name, total in sums.items()}
    if not all(map(is_finite, found.values())):
        raise CalibrationError(
            "gradients of the source's predictions are not finite, so widths cannot be weighed",
            code="calibration.not_finite",
            hint="try precision: float32, or give widths yourself",
        )
    return found


def _prediction_gradient(
    skeleton: Skeleton, hidden_BLH: Tensor, vocabulary_size: int, drawn: torch.Generator
) -> Tensor:
    """Return the gradient of -log p of one drawn token for each position with respect to the final hidden states."""
    rows = max(1, LOGIT_ELEMENTS // vocabulary_size)
    parts: list[Tensor] = []
    for part_BLH in torch.split(hidden_BLH, rows, dim=1):
        leaf_BLH = part_BLH.detach().requires_grad_()
        with torch.enable_grad():
            logits_LV = skeleton.logits_with_gradient(leaf_BLH)[0, :, :vocabulary_size]
        # The gradient of -log softmax is the distribution itself, less one at the token.
        slope_LV = torch.softmax(logits_LV.detach(), dim=-1)
        token_L1 = torch.multinomial(slope_LV, 1, generator=drawn)
        slope_LV.scatter_add_(1, token_L1, slope_LV.new_full(token_L1.shape, -1.0))
        parts += torch.autograd.grad(logits_LV, leaf_BLH, slope_LV)
    return torch.cat(parts, dim=1)


def _back_through(skeleton: Skeleton, index: int, entered_BLH: Tensor, gradient_BLH: Tensor) -> Tensor:
    """Return the gradient with respect to what enters a block from that with respect to what leaves it."""
    leaf_BLH = entered_BLH.detach().requires_grad_()
    with torch.enable_grad():
        left_BLH = skeleton.run_block_with_gradient(index, leaf_BLH)
    try:
        (found,) = torch.autograd.grad(left_BLH, leaf_BLH, gradient_BLH)
    except RuntimeError as error:  # torch has no class of its own for what has no gradient
        if heap.is_lack_of_memory(error):
            raise
        raise CalibrationError(
            f"block {index} of {skeleton.architecture} gives no gradients: {error}",
            code="calibration.no_gradient",
            hint="mixed precision cannot choose widths for this model; give them in widths, or one for all in bits",
        ) from error
    return found


@contextmanager
def _watching(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, squared gradients of linears' outputs are added up in what is given, by local name."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(gradient: Tensor) -> None:
            total_O = gradient.detach().float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + total_O

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            sums.setdefault(name, output.new_zeros(output.shape[-1], dtype=torch.float32))
            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = [block.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
