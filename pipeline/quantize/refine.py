"""Refinement: a solved row's scales, zero points and codes, each made better while the others stay.

Dimension suffixes: O = out_features (rows), I = in_features, G = groups of a row, g = columns of a group, B = columns
of a block, R = rows of a tile (as the fast dimension, as in ``gptq.py``).

The law. For a row, L = e H e^T with e = w - s (q - z), H damped. Let p = e H, the pull. Then L changes, exactly, by

- scale: s + d for a group of steps u = q - z: -2 d u.p + d^2 u H_gg u^T, least at d = u.p / (u H_gg u^T). The storable
  scale nearest to that is taken where it lowers L.
- zero point: z + 1, or z - 1, with the codes as they are: +-2 s sum(p) + s^2 sum(H_gg), over the group. Taken where
  that is negative.
- code: q_j + k: -2 k s p_j + (k s)^2 H_jj, least at k = p_j / (s H_jj). The nearest code of the grid is taken: the
  parabola is symmetric, so it never raises L.

A round goes through the groups in order, in each first the scale, then the zero point, then the codes one after
another: cyclic coordinate descent on L from what a solver found. The pull is kept up inside the group with H_gg, and
once a group for all columns, so that a round costs twice the product of the rows with H, as GPTQ does. It starts from
the pull anew, as sums of float32 drift.

A row takes what a round has made of it only where the loss without damping is lower; so it never ends up worse. These
losses are sums in float64, as errors cancel in them. A row is done when a round gains less than ``LEAST_GAIN`` of its
loss. What becomes of a row depends on no other one.

Sweeps over codes are the descent of QuantEase (Behdin et al. 2023, arXiv:2309.01885); scales by least squares given the
codes are common to it and others. Damping holds back what fits the calibration text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.quantize import kernels
from pipeline.quantize.loss import row_losses
from pipeline.quantize.storable import storable_scale
from pipeline.quantize.types import Scheme, dequantize

BLOCK_SIZE = 128
"""Columns whose codes are changed between two matrix products with what that does to the others of their group."""

LEAST_GAIN = 1e-3
"""A row that gains less in a round, as a fraction of its loss, is done."""

LEAST_ADDED = 1e-30
"""Where damping adds no more than this to the second moment's diagonal, no input was ever alive: there is no loss, and
what float32 divides by may be zero."""


@dataclass(frozen=True)
class FoundRows:
    """Codes and grids of some rows, and what these err.

    Attributes:
        codes_OI: uint8 [O, I].
        scale_OG: float32 [O, G], storable.
        zero_OG: uint8 [O, G].
        loss_O: float64 [O], e H e^T without damping.
        error_norm_O: float64 [O], |e|^2.
        rounds_O: int64 [O], rounds of refinement that lowered the row's loss.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    loss_O: Tensor
    error_norm_O: Tensor
    rounds_O: Tensor


def refine_rows(
    weight_OI: Tensor, found: FoundRows, second_moment_II: Tensor, scheme: Scheme, damping: float, rounds: int
) -> FoundRows:
    """Return rows with lower losses, or as they were.

    Args:
        weight_OI: float32 [O, I], finite.
        found: Their codes and grids, and what these err.
        second_moment_II: float32 [I, I], symmetric.
        scheme: Grid; its group size divides I.
        damping: Fraction of H's mean diagonal that is added to its diagonal.
        rounds: How many at most.
    """
    if not rounds:
        return found
    added = damping * float(second_moment_II.diagonal().mean(dtype=torch.float64))
    if not added > LEAST_ADDED:
        return found

    def err(grids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the errors of codes and grids, and their losses."""
        codes_OI, scale_OG, zero_OG = grids
        delta_OI = dequantize(codes_OI, scale_OG, zero_OG, scheme).sub_(weight_OI)
        return delta_OI, row_losses(delta_OI, second_moment_II, torch.float64)

    _, loss_O = err((found.codes_OI, found.scale_OG, found.zero_OG))
    best, is_active_O = replace(found, loss_O=loss_O), torch.ones_like(loss_O, dtype=torch.bool)
    for _ in range(rounds):
        codes_OI, scale_OG, zero_OG = grids = _round(weight_OI, best, second_moment_II, scheme, added)
        delta_OI, loss_O = err(grids)
        is_taken_O = is_active_O & (loss_O < best.loss_O)
        is_active_O = is_taken_O & (best.loss_O - loss_O > LEAST_GAIN * best.loss_O)
        best = FoundRows(
            codes_OI=torch.where(is_taken_O[:, None], codes_OI, best.codes_OI),
            scale_OG=torch.where(is_taken_O[:, None], scale_OG, best.scale_OG),
            zero_OG=torch.where(is_taken_O[:, None], zero_OG, best.zero_OG),
            loss_O=torch.where(is_taken_O, loss_O, best.loss_O),
            error_norm_O=torch.where(is_taken_O, delta_OI.square_().sum(-1, dtype=torch.float64), best.error_norm_O),
            rounds_O=best.rounds_O + is_taken_O,
        )
        if not bool(is_active_O.any()):
            break
    return best


def _round(
    weight_OI: Tensor, found: FoundRows, second_moment_II: Tensor, scheme: Scheme, added: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points after one round, with ``added`` on H's diagonal."""
    num_rows, num_columns = weight_OI.shape
    size = scheme.group_size
    # Copies, as they are changed in place: a transposed row is contiguous as it is.
    scale_GR, zero_GR = (
        grid_OG.t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        for grid_OG in (found.scale_OG, found.zero_OG)
    )
    code_IR = found.codes_OI.t().to(torch.float32)
    step_IR = code_IR.view(-1, size, num_rows).sub(zero_GR[:, None]).view(num_columns, num_rows)
    error_IR = weight_OI.t() - step_IR.view(-1, size, num_rows).mul(scale_GR[:, None]).view(num_columns, num_rows)
    pull_IR = torch.addmm(error_IR, second_moment_II, error_IR, beta=added)
    for group in range(num_columns // size):
        columns = slice(group * size, (group + 1) * size)
        step_gR, scale_R, zero_R = step_IR[columns], scale_GR[group], zero_GR[group]
        moment_gg = second_moment_II[columns, columns].clone()
        moment_gg.diagonal().add_(added)
        before_gR = step_gR * scale_R
        pull_gR = pull_IR[columns].clone()
        _refit_scale(pull_gR, moment_gg, step_gR, scale_R)
        if not scheme.symmetric:
            _refit_zero(pull_gR, moment_gg, step_gR, scale_R, zero_R, scheme.max_code)
        _descend(pull_gR, moment_gg, step_gR, scale_R, zero_R, scheme.max_code)
        change_gR = before_gR.sub_(step_gR * scale_R)
        pull_IR.addmm_(second_moment_II[:, columns], change_gR)
        pull_IR[columns].add_(change_gR, alpha=added)
    code_IR = step_IR.view(-1, size, num_rows).add(zero_GR[:, None]).view(num_columns, num_rows)
    codes_OI = code_IR.t().to(torch.uint8).contiguous()
    return codes_OI, scale_GR.t().contiguous(), zero_GR.t().to(torch.uint8).contiguous()


def _refit_scale(pull_gR: Tensor, moment_gg: Tensor, step_gR: Tensor, scale_R: Tensor) -> None:
    """Change a group's scale to the storable one that is nearest to the best, where that is better."""
    moved_gR = moment_gg @ step_gR
    top_R, bottom_R = (step_gR * pull_gR).sum(0), (step_gR * moved_gR).sum(0)
    # A group whose codes are all zero points has nothing to fit; NaN compares false.
    change_R = storable_scale(torch.nan_to_num(scale_R + top_R / bottom_R)) - scale_R
    is_better_R = change_R * (change_R * bottom_R - 2 * top_R) < 0
    change_R = torch.where(is_better_R, change_R, 0.0)
    scale_R.add_(change_R)
    pull_gR.sub_(moved_gR.mul_(change_R))


def _refit_zero(
    pull_gR: Tensor, moment_gg: Tensor, step_gR: Tensor, scale_R: Tensor, zero_R: Tensor, max_code: int
) -> None:
    """Change a group's zero point by one either way, its codes staying as they are, where that is better."""
    moved_g = moment_gg.sum(1, keepdim=True)
    total = moved_g.sum()
    for shift in (1.0, -1.0):
        raised_R = shift * scale_R  # what it adds to the error of every column
        is_better_R = raised_R * (2 * pull_gR.sum(0) + raised_R * total) < 0
        is_better_R &= (zero_R + shift >= 0) & (zero_R + shift <= max_code)
        taken_R = is_better_R.to(scale_R.dtype)
        zero_R.add_(taken_R, alpha=shift)
        step_gR.sub_(taken_R, alpha=shift)
        pull_gR.add_(moved_g * (raised_R * taken_R))


def _descend(
    pull_gR: Tensor, moment_gg: Tensor, step_gR: Tensor, scale_R: Tensor, zero_R: Tensor, max_code: int
) -> None:
    """Change a group's codes one after another."""
    size = step_gR.shape[0]
    for start in range(0, size, BLOCK_SIZE):
        block, rest = slice(start, min(start + BLOCK_SIZE, size)), slice(start + BLOCK_SIZE, size)
        before_BR = step_gR[block].clone()
        # Of the columns left in the group it is known what the block did to them when their turn comes.
        _descend_block(pull_gR[block], moment_gg[block, block], step_gR[block], scale_R, zero_R, max_code)
        if rest.start < size:
            pull_gR[rest].addmm_(moment_gg[rest, block], before_BR.sub_(step_gR[block]).mul_(scale_R))


def _descend_block(
    pull_BR: Tensor, moment_BB: Tensor, step_BR: Tensor, scale_R: Tensor, zero_R: Tensor, max_code: int
) -> None:
    """Do what ``kernels.descend_block`` does, with the same arguments, by the loops for where the tensors are."""
    if kernels.take(pull_BR):
        moment = np.ascontiguousarray(moment_BB.numpy())
        kernels.descend_block(
            pull_BR.numpy(), moment, scale_R.numpy(), zero_R.numpy(), np.float32(max_code), step_BR.numpy()
        )
        return
    low_R, high_R = -zero_R, max_code - zero_R
    for j in range(step_BR.shape[0]):
        wished_R = step_BR[j] + pull_BR[j] / (scale_R * moment_BB[j, j])
        step_R = torch.minimum(torch.maximum(wished_R, low_R), high_R).round_()
        change_R = (step_BR[j] - step_R) * scale_R
        step_BR[j] = step_R
        pull_BR.addr_(moment_BB[j], change_R)
