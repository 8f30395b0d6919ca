"""The grid of every (row, group): which scales can be stored, which scale and zero point err least.

Dimension suffixes: O = out_features (rows), I = in_features, G = groups of a row, g = columns of a group (I = G * g),
R = rows of the chunk at hand.

Scales are storable ones (``storable.py``). As a bonus scale * code is exact in float32.

Search
    Each (row, group) minimises its own loss over scale s and zero point z, with q(w) = clamp(round(w / s) + z):
    sum_i h_i (w_i - s (q_i - z))^2 for a diagonal importance h (the diagonal of the second moment), or
    dw H_gg dw^T for the group's block of the second moment. The loss is jagged in s, so it is evaluated rather than
    differentiated: first fractions of the unclipped scale, then the weighted least-squares scale of the best codes
    found, then neighbours at ever smaller steps (and z +- 1). A candidate is kept only where it lowers the loss, so
    the result is never worse than the unclipped grid. Fractions above 1 find the grid of weights that were already
    rounded once. Cost: about 25 evaluations; on the CPU a compiled loop over groups that are in cache
    (``kernels.py``), elsewhere 7 elementwise passes each.

Floating-point grids have a search of their own (``float_grid.py``).

Degenerate groups (zero, constant, tiny, huge) need no special case: the scale is clamped to the storable range, and a
zero weight has the zero point as its code, which dequantizes to exactly 0. A clamped scale costs precision, or clips:
``clipping`` tells which ones were, and ``solve`` reports how many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.quantize import float8, kernels
from pipeline.quantize.float_grid import fit_float_scales
from pipeline.quantize.storable import MAX_SCALE, MIN_SCALE, storable_scale
from pipeline.quantize.types import Scheme

IMPORTANCE_FLOOR = 1e-3
"""Importance of a channel that calibration never woke, as a fraction of the mean: text in use may wake it."""

FRACTIONS = (1.15, 1.075, 0.975, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
"""Coarse candidates, as fractions of the scale that clips nothing."""

FLOAT_SPARE = 2.0**-4
"""What is left of the wished scale when a floating-point grid's is held at the smallest storable one without loss worth
a word: the largest weight then is 28 of 448, and 11 powers of two lie between it and the smallest normal number."""

STEPS = (1.03, 0.97, 1.015, 0.985, 1.0075, 0.9925, 1.00375, 0.99625)
"""Fine candidates, relative to the best so far; the last ones reach the storable neighbours."""

CHUNK_ELEMENTS = 1 << 26
"""Weights searched at once on accelerators, where few launches matter more than cache."""


def encode(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest codes, uint8 [O, I]: clamp(round(weight / scale) + zero, 0, 2**bits - 1), ties to even; of a
    floating-point grid the patterns of the numbers nearest to weight / scale."""
    num_rows, num_columns = weight_OI.shape
    code = weight_OI.view(num_rows, -1, scheme.group_size) / scale_OG[..., None]
    if scheme.is_float:
        return float8.encode(code).view(num_rows, num_columns)
    code.round_().add_(zero_OG.to(torch.float32)[..., None]).clamp_(0, scheme.max_code)
    return code.to(torch.uint8).view(num_rows, num_columns)


def channel_importance(diagonal_I: Tensor) -> Tensor:
    """Return float32 [I]: the second moment's diagonal over its mean, floored at IMPORTANCE_FLOOR; ones when no input
    was alive."""
    mean = diagonal_I.mean(dtype=torch.float64)
    if not mean > 0:
        return torch.ones_like(diagonal_I)
    return (diagonal_I / mean).to(torch.float32).clamp_min(IMPORTANCE_FLOOR)


def block_importance(second_moment_II: Tensor, group_size: int) -> Tensor:
    """Return float32 [G, g, g]: the groups' diagonal blocks over the mean diagonal, each diagonal raised by
    IMPORTANCE_FLOOR, so that channels that calibration never woke keep a say; identities when nothing was alive."""
    num_groups = second_moment_II.shape[0] // group_size
    blocks_Ggg = second_moment_II.reshape(num_groups, group_size, num_groups, group_size)
    blocks_Ggg = torch.diagonal(blocks_Ggg, dim1=0, dim2=2).permute(2, 0, 1)
    mean = second_moment_II.diagonal().mean(dtype=torch.float64)
    identity_gg = torch.eye(group_size, dtype=torch.float32, device=second_moment_II.device)
    if not mean > 0:
        return identity_gg.repeat(num_groups, 1, 1)
    return (blocks_Ggg / mean).to(torch.float32) + IMPORTANCE_FLOOR * identity_gg


def fit_grid(weight_OI: Tensor, importance: Tensor, scheme: Scheme, search: bool) -> tuple[Tensor, Tensor]:
    """Return scale (float32 [O, G], storable) and zero point (uint8 [O, G]) of every group.

    Every row's grid depends on that row alone. Without ``search`` the grid spans the group's range with the smallest
    storable scale that clips nothing.

    Args:
        weight_OI: float32 [O, I], finite.
        importance: float32 [I] (diagonal) or [G, g, g] (blocks), see ``channel_importance``, ``block_importance``.
        scheme: Grid; its group size divides I. Asymmetric ranges always include 0.
        search: Whether to minimise the loss, or only to span the range.
    """
    num_rows, num_columns = weight_OI.shape
    num_groups = num_columns // scheme.group_size
    scale_OG = torch.empty(num_rows, num_groups, dtype=torch.float32, device=weight_OI.device)
    zero_OG = torch.empty(num_rows, num_groups, dtype=torch.uint8, device=weight_OI.device)
    if scheme.is_float:
        return fit_float_scales(weight_OI, importance, scheme.group_size, search), zero_OG.zero_()
    if kernels.take(weight_OI):
        fractions, steps = (np.array(values, np.float32) for values in (FRACTIONS, STEPS))
        kernels.fit_grid(
            weight_OI.contiguous().numpy(),
            importance.view(num_groups, scheme.group_size, -1).contiguous().numpy(),
            scheme.symmetric,
            np.float32(scheme.max_code),
            search,
            fractions,
            steps,
            scale_OG.numpy(),
            zero_OG.numpy(),
        )
        return scale_OG, zero_OG
    if importance.ndim == 1:
        importance = importance.view(num_groups, scheme.group_size)
    # A power of two, so that equal row tiles are cut into equal chunks: see solve.py on bit-identity.
    chunk_rows = 1 << max(CHUNK_ELEMENTS // num_columns, 1).bit_length() - 1
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, start + chunk_rows)
        weight_RGg = weight_OI[rows].reshape(-1, num_groups, scheme.group_size)
        scale_OG[rows], zero_OG[rows] = _fit_chunk(weight_RGg, importance, scheme, search)
    return scale_OG, zero_OG


def _fit_chunk(weight_RGg: Tensor, importance: Tensor, scheme: Scheme, search: bool) -> tuple[Tensor, Tensor]:
    low_RG, wished_RG = _wished_scale(weight_RGg, scheme)
    scale_RG = storable_scale(wished_RG, round_up=True)
    zero_RG = _zero_for(low_RG, scale_RG, scheme)
    if not search:
        return scale_RG, zero_RG
    best = _Best(weight_RGg, importance, scheme, scale_RG, zero_RG)
    for fraction in FRACTIONS:
        candidate_RG = storable_scale(wished_RG * fraction)
        best.offer(candidate_RG, _zero_for(low_RG * fraction, candidate_RG, scheme))
    best.offer(best.least_squares_scale(), best.zero_RG)
    best.offer_zero_neighbours()
    for step in STEPS:
        best.offer(storable_scale(best.scale_RG * step), best.zero_RG)
    best.offer_zero_neighbours()
    return best.scale_RG, best.zero_RG


def _wished_scale(weight_RGg: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the lower end of every group's range (at most 0) and the scale that clips nothing of it, float32 [R, G]
    each; the scale is 0 for a group of zeros."""
    low_RG, high_RG = weight_RGg.amin(-1).clamp_max(0.0), weight_RGg.amax(-1).clamp_min(0.0)
    if scheme.is_float:
        return low_RG, torch.maximum(high_RG, -low_RG) / float8.MAX_NUMBER
    if scheme.symmetric:
        # The negative side has one code more, so the two sides ask for different scales.
        return low_RG, torch.maximum(high_RG / (scheme.middle - 1), low_RG / -scheme.middle)
    # Divided before subtracting: the range of finite float32 weights may overflow.
    return low_RG, high_RG / scheme.max_code - low_RG / scheme.max_code


@dataclass(frozen=True)
class Clipping:
    """What became of the ranges of each row's groups; rows are looked at alone, so a stack changes nothing.

    Attributes:
        num_below_O: int64 [O], groups that need a scale below ``MIN_SCALE / 2`` to clip nothing. A group of zeros needs
            none. From there up to ``MIN_SCALE`` the steps are less than twice as wide as they would be: a group loses
            less than a bit. On a floating-point grid these are the groups that need one below ``MIN_SCALE`` times
            ``FLOAT_SPARE``.
        num_above_O: int64 [O], groups that need a scale above ``MAX_SCALE`` to clip nothing.
        kept_O: float64 [O], the sum over groups of the scale over the one that clips nothing; 1 for a group of zeros.
    """

    num_below_O: Tensor
    num_above_O: Tensor
    kept_O: Tensor


def clipping(weight_OI: Tensor, scale_OG: Tensor, scheme: Scheme) -> Clipping:
    """Return what scales make of the ranges of a weight's groups.

    Args:
        weight_OI: float32 [O, I], finite.
        scale_OG: float32 [O, G].
        scheme: Grid; its group size divides I.
    """
    _, wished_OG = _wished_scale(weight_OI.view(weight_OI.shape[0], -1, scheme.group_size), scheme)
    least = MIN_SCALE * (FLOAT_SPARE if scheme.is_float else 0.5)
    below_OG = (wished_OG > 0) & (wished_OG < least)
    kept_OG = torch.where(wished_OG > 0, scale_OG.double() / wished_OG.double(), 1.0)
    return Clipping(below_OG.sum(-1), (wished_OG > MAX_SCALE).sum(-1), kept_OG.sum(-1))


def _zero_for(low_RG: Tensor, scale_RG: Tensor, scheme: Scheme) -> Tensor:
    """Return the zero point (float32 [R, G]) that puts the range's lower end at code 0."""
    if scheme.symmetric:
        return torch.full_like(scale_RG, scheme.middle)
    return (low_RG / scale_RG).round_().neg_().clamp_(0, scheme.max_code)


@dataclass
class _Best:
    """The best grid so far of every (row, group) of a chunk, and its loss (float32 [R, G])."""

    weight_RGg: Tensor
    importance: Tensor
    scheme: Scheme
    scale_RG: Tensor
    zero_RG: Tensor

    def __post_init__(self) -> None:
        self._work_RGg = torch.empty_like(self.weight_RGg)
        self._loss_RG = self._loss(self.scale_RG, self.zero_RG)

    def offer(self, scale_RG: Tensor, zero_RG: Tensor) -> None:
        """Take the candidate wherever its loss is lower (a NaN or infinite loss never is)."""
        loss_RG = self._loss(scale_RG, zero_RG)
        better_RG = loss_RG < self._loss_RG
        self._loss_RG = torch.where(better_RG, loss_RG, self._loss_RG)
        self.scale_RG = torch.where(better_RG, scale_RG, self.scale_RG)
        self.zero_RG = torch.where(better_RG, zero_RG, self.zero_RG)

    def offer_zero_neighbours(self) -> None:
        """Offer the zero points one below and one above; nothing to do when the zero point is fixed."""
        if not self.scheme.symmetric:
            for shift in (-1.0, 1.0):
                self.offer(self.scale_RG, (self.zero_RG + shift).clamp_(0, self.scheme.max_code))

    def least_squares_scale(self) -> Tensor:
        """Return the storable scale that fits the current codes best: sum h w u / sum h u^2 with u = code - zero."""
        diagonal_Gg = self.importance if self.importance.ndim == 2 else self.importance.diagonal(dim1=1, dim2=2)
        step_RGg = self._steps(self.scale_RG, self.zero_RG)
        top_RG = (step_RGg * self.weight_RGg).mul_(diagonal_Gg).sum(-1)
        bottom_RG = step_RGg.square_().mul_(diagonal_Gg).sum(-1)
        fitted_RG = torch.where(bottom_RG > 0, top_RG / bottom_RG, self.scale_RG)
        return storable_scale(fitted_RG.nan_to_num_(nan=MIN_SCALE))

    def _steps(self, scale_RG: Tensor, zero_RG: Tensor) -> Tensor:
        """Return code - zero, float32 [R, G, g], in the shared work buffer. The reciprocal can differ from
        ``encode``'s division at a tie, where both codes err alike."""
        step_RGg = torch.mul(self.weight_RGg, scale_RG.reciprocal()[..., None], out=self._work_RGg).round_()
        if self.scheme.symmetric:
            return step_RGg.clamp_(-self.scheme.middle, self.scheme.middle - 1)
        return step_RGg.clamp_(-zero_RG[..., None], self.scheme.max_code - zero_RG[..., None])

    def _loss(self, scale_RG: Tensor, zero_RG: Tensor) -> Tensor:
        delta_RGg = self._steps(scale_RG, zero_RG).mul_(scale_RG[..., None]).sub_(self.weight_RGg)
        if self.importance.ndim == 2:
            return delta_RGg.square_().mul_(self.importance).sum(-1)
        moved_GRg = torch.bmm(delta_RGg.transpose(0, 1), self.importance)
        return delta_RGg.mul_(moved_GRg.transpose(0, 1)).sum(-1)
