"""GPTQ: columns are rounded one after another, each making up for the errors of those before it.

Dimension suffixes: O = out_features (rows), I = in_features (columns, in solving order once permuted), G = groups of a
row, B = columns of a block, R = rows of the tile at hand (as the fast dimension: column j of the weight is row j here),
N = tiles that are solved together.

The law. For a row, minimise e H e^T over codes, e = w - dequantized(q). Factor H = R R^T with R *upper* triangular
(damped, columns in solving order). Then e H e^T = |e R|^2 = sum_j R_jj^2 (e_j + sum_{k<j} e_k F_kj)^2 with
F_kj = R_kj / R_jj, and the best code of column j, given those before it, is the one nearest to
w_j + sum_{k<j} e_k F_kj.

This is the recursion of GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the form of LDLQ (Chee et al. 2023,
arXiv:2307.13304): GPTQ's factor U of the inverse, H^-1 = U^T U, is R^-1, and the codes are the same. It needs no
inverse: one Cholesky factorization (n^3/3) instead of factor, invert, factor (4n^3/3), and the condition number enters
once. The factorization runs in float64, because damping at 1 % leaves condition numbers around 100 n, where an
inverse in float32 has few digits left. R comes from the ordinary Cholesky factor of H with rows and columns reversed,
of which half is ever in memory (``cholesky.py``).

Blocks. F is applied in blocks of 128 columns: one matrix product brings in all errors of earlier blocks, then one
matrix-vector product per column those of its own block. The sums are the same in another order, so the block size
changes nothing but rounding in the last bit. The tile is kept transposed, so that a column of the weight is contiguous
and a step costs six in-place operations.

Groups are static: the grid is fixed from the original weights before the first column, hence ``act_order`` (columns by
falling diagonal of H, ties in place) permutes only the solving order and never the stored layout.

Inputs that were zero on every token have a zero row and column in H. They get the mean diagonal instead: no coupling
to others, so they are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.finite import is_finite
from pipeline.quantize import kernels, triton_kernels
from pipeline.quantize.cholesky import LowerTiles
from pipeline.quantize.types import Scheme

BLOCK_SIZE = 128
"""Columns between two matrix products with all earlier errors."""


@dataclass(frozen=True)
class SolvedColumns:
    """What solving the columns of some rows gave. Of rows that did not stay finite nothing means anything.

    Attributes:
        codes_OI: uint8 [O, I].
        loss_O: float64 [O], e H e^T, from the residuals: the damped loss is sum_j R_jj^2 residual_j^2, and what damping
            made of it is taken off again. Its error is some float32 roundings of the damped loss.
        error_norm_O: float64 [O], |e|^2.
        is_finite_O: bool [O], which rows stayed finite.
    """

    codes_OI: Tensor
    loss_O: Tensor
    error_norm_O: Tensor
    is_finite_O: Tensor


@dataclass(frozen=True)
class Factor:
    """What the columns need of H; rows share it.

    Attributes:
        order_I: int64 [I], the column that is solved at each step.
        feedback_II: float32 [I, I] in solving order, strictly upper: F_kj = R_kj / R_jj.
        pivot_I: float64 [I] in solving order: R_jj^2.
        added_I: float64 [I] in solving order: what was added to H's diagonal before it was factored.
        damping: Fraction of the mean diagonal that was added to the diagonal.
    """

    order_I: Tensor
    feedback_II: Tensor
    pivot_I: Tensor
    added_I: Tensor
    damping: float

    def tensors(self) -> dict[str, Tensor]:
        """Return the factor as named tensors; ``of`` is the exact inverse."""
        damping = torch.tensor([self.damping], dtype=torch.float64)
        columns = {"order": self.order_I, "pivot": self.pivot_I, "added": self.added_I}
        return {**columns, "feedback": self.feedback_II, "damping": damping}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Factor:
        """Return the factor that ``tensors`` were made from."""
        order_I, feedback_II, pivot_I, added_I, damping = (
            tensors[name] for name in ("order", "feedback", "pivot", "added", "damping")
        )
        return cls(order_I, feedback_II, pivot_I, added_I, float(damping.item()))


def damping_ladder(first: float) -> Iterator[float]:
    """Yield the damping fractions to try: ``first``, then ten times as much each, and 1.0 at last."""
    rung = first
    while rung < 1.0:
        yield rung
        rung *= 10
    yield 1.0


def factor(second_moment_II: Tensor, damping: float, act_order: bool) -> Factor | None:
    """Return the factor of H + damping * mean(diag H) * I, or None when that is not positive definite.

    Args:
        second_moment_II: float32 [I, I], symmetric.
        damping: Fraction of the mean diagonal, positive.
        act_order: Solve columns in falling order of H's diagonal instead of as stored.
    """
    diagonal_I = second_moment_II.diagonal()
    num_columns = diagonal_I.shape[0]
    order_I = torch.arange(num_columns, device=diagonal_I.device)
    if act_order:
        order_I = torch.sort(diagonal_I, descending=True, stable=True).indices
    reverse_I = order_I.flip(0)
    damped_I = diagonal_I[reverse_I].to(torch.float64)
    mean = damped_I.mean()
    if not mean > 0:
        mean = torch.ones_like(mean)
    undamped_I = damped_I
    damped_I = torch.where(damped_I == 0, mean, damped_I) + damping * mean

    def damped_rows(first: int, last: int) -> Tensor:
        rows = second_moment_II[reverse_I[first:last]][:, reverse_I[:last]].to(torch.float64)
        rows.diagonal(first).copy_(damped_I[first:last])
        return rows

    lower = LowerTiles.factor(num_columns, damped_rows)
    if lower is None:
        return None
    pivot_I = lower.diagonal()
    feedback_II = torch.zeros_like(second_moment_II)
    for rows, columns, tile in lower.take():
        scaled = (tile / pivot_I[columns]).to(torch.float32)
        if rows == columns:
            scaled = scaled.tril_(-1)
        if not is_finite(scaled):
            return None
        feedback_II[_reversed(rows, num_columns), _reversed(columns, num_columns)] = scaled.flip(0, 1)
    return Factor(order_I, feedback_II, pivot_I.square().flip(0), (damped_I - undamped_I).flip(0), damping)


def _reversed(span: slice, length: int) -> slice:
    """Return where a span lies when positions are counted from the other end."""
    return slice(length - span.stop, length - span.start)


@dataclass(frozen=True)
class Target:
    """What codes are wanted for: rows of one linear, on a grid, by the statistics of its input.

    Attributes:
        weight_OI: [O, I], finite.
        scale_OG: [O, G], same dtype, positive.
        zero_OG: uint8 [O, G].
        factored: The factor of the second moment.
    """

    weight_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    factored: Factor


def solve_columns(targets: Sequence[Target], scheme: Scheme, block_size: int = BLOCK_SIZE) -> list[SolvedColumns]:
    """Return the codes of every row of every target, and what they err.

    On a GPU the columns of a block are solved for all targets at once: one launch, which has more to do than the rows
    of one small linear. Everything else is done target by target, in products of the same shape whatever is solved
    together, so a target's codes do not depend on the others.

    Accumulates in the dtype of the weights and the factors (float32 in use), losses in float64.

    Args:
        targets: At least one; their weights are of one shape.
        scheme: Their grid; its group size divides I.
        block_size: Columns in a block; does not change the result beyond rounding.
    """
    factors = [target.factored for target in targets]
    num_rows, num_columns = targets[0].weight_OI.shape
    weight_NIR = targets[0].weight_OI.new_empty(len(targets), num_columns, num_rows)
    for target, own_IR in zip(targets, weight_NIR, strict=True):
        torch.index_select(target.weight_OI.t().contiguous(), 0, target.factored.order_I, out=own_IR)
    scale_NGR = _together([target.scale_OG.t().contiguous() for target in targets])
    zero_NGR = _together([target.zero_OG.t().to(scale_NGR.dtype).contiguous() for target in targets])
    group_NI = _together([factored.order_I // scheme.group_size for factored in factors])
    pivot_NI, added_NI = (_together([getattr(one, name) for one in factors]) for name in ("pivot_I", "added_I"))
    error_NIR, step_NIR = torch.empty_like(weight_NIR), torch.empty_like(weight_NIR)
    loss_NR, error_norm_NR = (weight_NIR.new_zeros(len(targets), num_rows, dtype=torch.float64) for _ in range(2))
    for start in range(0, num_columns, block_size):
        block = slice(start, min(start + block_size, num_columns))
        target_NBR = weight_NIR[:, block].clone(memory_format=torch.contiguous_format)
        if start:
            for target_BR, factored, error_IR in zip(target_NBR, factors, error_NIR, strict=True):
                target_BR.addmm_(factored.feedback_II[:start, block].t(), error_IR[:start])
        # Transposed: what feeds into a column is contiguous.
        feedback_NBB = _together([factored.feedback_II[block, block].t().contiguous() for factored in factors])
        grids = (target_NBR, weight_NIR[:, block], feedback_NBB, group_NI[:, block], scale_NGR, zero_NGR)
        found = (step_NIR[:, block], error_NIR[:, block], loss_NR, error_norm_NR)
        _solve_block(grids, scheme.max_code, (pivot_NI[:, block], added_NI[:, block], *found))
    is_finite_NR = torch.ones_like(loss_NR, dtype=torch.bool)
    if not is_finite(error_NIR):
        is_finite_NR = error_NIR.isfinite().all(1)
    codes = [
        _codes(target, step_IR, scheme, factored.order_I)
        for target, step_IR, factored in zip(targets, step_NIR, factors, strict=True)
    ]
    return list(map(SolvedColumns, codes, loss_NR.clamp_min_(0.0), error_norm_NR, is_finite_NR))


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one, with their number in front; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _codes(target: Target, step_IR: Tensor, scheme: Scheme, order_I: Tensor) -> Tensor:
    """Return uint8 [O, I] from steps in solving order."""
    inverse_I = torch.empty_like(order_I)
    inverse_I[order_I] = torch.arange(order_I.shape[0], device=order_I.device)
    step_OI = step_IR.index_select(0, inverse_I).t()
    code_OGg = step_OI.reshape(*target.scale_OG.shape, scheme.group_size) + target.zero_OG.to(step_OI.dtype)[..., None]
    return code_OGg.to(torch.uint8).view(target.weight_OI.shape)


def _solve_block(grids: Sequence[Tensor], max_code: int, rest: Sequence[Tensor]) -> None:
    """Do for each of N targets what ``kernels.solve_block`` does, by the loops for where the tensors are.

    Args:
        grids: Its arguments before the largest code, each with N in front.
        max_code: The largest code.
        rest: Its arguments after that, likewise.
    """
    if triton_kernels.take(grids[0]):
        arguments: list[Any] = [*grids, max_code, *rest]
        triton_kernels.solve_block(*arguments)
        return
    for own in zip(*grids, *rest, strict=True):
        arguments = [*own[: len(grids)], max_code, *own[len(grids) :]]
        if kernels.take(grids[0]):
            arguments = [each.numpy() if isinstance(each, Tensor) else np.float32(each) for each in arguments]
            kernels.solve_block(*arguments)
        else:
            _solve_block_in_torch(*arguments)


def _solve_block_in_torch(
    target_BR: Tensor,
    weight_BR: Tensor,
    feedback_BB: Tensor,
    group_B: Tensor,
    scale_GR: Tensor,
    zero_GR: Tensor,
    max_code: int,
    pivot_B: Tensor,
    added_B: Tensor,
    step_BR: Tensor,
    error_BR: Tensor,
    loss_R: Tensor,
    error_norm_R: Tensor,
) -> None:
    """Do the same on any device and in any dtype, one operation after another."""
    low_GR = -zero_GR
    high_GR = low_GR + max_code
    residual_BR = torch.empty_like(target_BR)
    for j, group in enumerate(group_B.tolist()):
        target_R, step_R, scale_R = target_BR[j], step_BR[j], scale_GR[group]
        if j:
            target_R.addmv_(error_BR[:j].t(), feedback_BB[j, :j])
        torch.div(target_R, scale_R, out=step_R).round_()
        torch.clamp(step_R, low_GR[group], high_GR[group], out=step_R)
        torch.addcmul(target_R, step_R, scale_R, value=-1, out=residual_BR[j])
        torch.mul(step_R, scale_R, out=target_R)
        torch.sub(weight_BR[j], target_R, out=error_BR[j])
    squared_BR = error_BR.to(torch.float64).square()
    loss_R += pivot_B @ residual_BR.to(torch.float64).square_() - added_B @ squared_BR
    error_norm_R += squared_BR.sum(0)
