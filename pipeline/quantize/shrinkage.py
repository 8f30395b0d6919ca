"""How far a second moment can be trusted, and what solvers are given in its place.

Dimension suffixes: I = in_features, R = rows of a tile.

The second moment of some thousand tokens is an estimate. Its diagonal is a good one; of its many off-diagonal entries
a part is chance, and of what solvers gain through these as much is lost on other text. So the correlations
r_ij = H_ij / sqrt(H_ii H_jj) are drawn towards zero: what is solved with is H_ij (1 - a) off the diagonal, and H_ii on
it. The share a that leaves the least expected squared error of all correlations together is
sum of Var(r_ij) / sum of E(r_ij^2) over i != j (Ledoit and Wolf 2004, 10.1016/S0047-259X(03)00096-4, towards the
diagonal as Schaefer and Strimmer 2005, 10.2202/1544-6115.1175). They find the variances from single observations, which
were independent there. Tokens of one text are not, so here they are found from how the halves of the text differ: for
means A and B over n and m tokens, the variance of the mean over all is (A - B)^2 n m / (n + m)^2 in expectation, and of
the millions of entries of a sum that is plenty.

What a row's error dw loses on the calibration tokens themselves follows from both: dw H dw^T without shrinkage is
(dw H' dw^T - a sum_i H_ii dw_i^2) / (1 - a), H' being the shrunk moment.

Nothing is factored or solved for it, it does not depend on bits or groups, and dividing inputs by scales changes
nothing about it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.quantize.types import Statistics

ROWS = 256
"""Rows of a moment that are looked at together."""


def estimate_shrinkage(first: Statistics, second: Statistics) -> float:
    """Return the share a of the off-diagonal entries of the sum of both second moments that is to be taken off.

    Sums over entries are made in float64. 0.0 where nothing can be told: when either has no tokens, or no two inputs
    were ever there at once.

    Args:
        first: Sums over one part of the calibration tokens.
        second: Sums over the rest, of the same channels.
    """
    n, m = first.num_tokens, second.num_tokens
    if not n or not m:
        return 0.0
    one_II, other_II = first.second_moment_II, second.second_moment_II
    diagonal_I = one_II.diagonal() + other_II.diagonal()
    inverse_I = torch.where(diagonal_I > 0, diagonal_I.rsqrt(), torch.zeros_like(diagonal_I))
    apart, whole = (torch.zeros((), dtype=torch.float64, device=inverse_I.device) for _ in range(2))
    for start in range(0, inverse_I.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        # Correlations' shares of either part: they add up to the correlation of all tokens.
        one_RI, other_RI = (moment_II[rows] * inverse_I[rows, None] * inverse_I for moment_II in (one_II, other_II))
        for part_RI in (one_RI, other_RI):
            part_RI.diagonal(start).zero_()
        whole += (one_RI + other_RI).square_().sum(dtype=torch.float64)
        apart += one_RI.mul_((n + m) / n).sub_(other_RI, alpha=(n + m) / m).square_().sum(dtype=torch.float64)
    share = float(apart) * (n / (n + m)) * (m / (n + m)) / float(whole) if float(whole) > 0 else 0.0
    # What is not finite is told apart by who solves, with the name of what it is.
    return min(share, 1.0) if math.isfinite(share) else 0.0


def shrink(statistics: Statistics, share: float) -> Statistics:
    """Return the statistics with a share of the second moment's off-diagonal entries taken off.

    The second moment is changed in place and belongs to the result: use the result and forget the argument.

    Args:
        statistics: Sums, not shrunk yet.
        share: Between 0, which leaves all, and 1, which leaves the diagonal alone.
    """
    return replace(
        statistics, second_moment_II=shrink_moment(statistics.second_moment_II, share), shrinkage=float(share)
    )


def shrink_moment(moment_II: Tensor, share: float) -> Tensor:
    """Take a share of the off-diagonal entries of ``moment_II`` [I, I] off in place, and return it."""
    if share:
        diagonal_I = moment_II.diagonal().clone()
        moment_II.mul_(1 - share).diagonal().copy_(diagonal_I)
    return moment_II


def unshrunk_losses(loss_O: Tensor, delta_OI: Tensor, diagonal_I: Tensor, share: float) -> Tensor:
    """Return dw H dw^T of every row, float64 [O], for H before it was shrunk.

    Where all was taken off, nothing is known of it: then it is that of the diagonal, as it is given.

    Args:
        loss_O: float64 [O], the same for the shrunk moment.
        delta_OI: float32 [O, I], the rows dw.
        diagonal_I: float32 [I], H's diagonal.
        share: What was taken off.
    """
    if not 0 < share < 1:
        return loss_O
    alone_O = delta_OI.square().mul_(diagonal_I).sum(-1, dtype=torch.float64)
    return loss_O.sub(alone_O, alpha=share).div_(1 - share).clamp_min_(0.0)
