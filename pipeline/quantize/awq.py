"""Activation-aware scaling: channels that see large inputs get finer steps.

Dimension suffixes: O = out_features (rows of the whole stack), I = in_features, G = groups of a row.

The law (Lin et al. 2023, arXiv:2306.00978). For positive scales s, W x = (W s)(x / s): the weight is stored scaled and
its input arrives scaled down by whatever produces it (a norm's weight or the linear before). Rounding (W s) gives
channel i the error of the group's step divided by s_i. s = (mean|x|)^exponent, normalised to be centred on 1; the
exponent is searched, coarse to fine, for the least tr(dW H dW^T) with dW = Q(W s) / s - W. This is the same loss as
re-running the layer on all tokens, from the second moment alone: matrix products only, no tokens.

The exponent 0 (no scaling) is among the candidates, and the winner is compared with it once more at the end, on grids
that are searched if those of the solve are to be. SEARCH_ROWS rows (``scales.py``) at most, evenly spread over the
stack, stand for all throughout; until the end their grids span the range, as the loss depends on that but its
dependence on the exponent hardly does. On these rows scaling is never worse than leaving it.

The change of basis itself (weights, statistics and whatever produces the input) belongs to the block, and so does its
rounding to the model's dtype. ``solve`` then gets the scaled weight with ``statistics.rescale``d statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantize.checks import require_solvable
from pipeline.quantize.grid import channel_importance, encode, fit_grid
from pipeline.quantize.loss import row_losses
from pipeline.quantize.scales import MAX_SCALE_RATIO, FoundScales, sample_rows, search_exponent
from pipeline.quantize.solve import SolveOptions
from pipeline.quantize.types import Scheme, Statistics, dequantize

MEAN_FLOOR = 1e-3
"""Least mean|x| of a channel as a fraction of the average: a channel that calibration never woke is not shrunk away."""


def search_scales(weight_OI: Tensor, statistics: Statistics, scheme: Scheme, options: SolveOptions) -> FoundScales:
    """Return the scales that lower the rounding loss of all linears that share one input the most.

    Args:
        weight_OI: float32 [O, I], the rows of all of them.
        statistics: Statistics of their input.
        scheme: Their grid.
        options: Whether the grids that the winner is judged on are searched or span the range.

    Returns:
        Losses are tr(dW H dW^T) / num_tokens of rounding to nearest.

    Raises:
        QuantizationError: naming what is not finite, has no tokens, or does not fit together.
    """
    require_solvable(weight_OI, statistics, scheme)
    device = weight_OI.device
    second_moment_II = statistics.second_moment_II.to(device)
    mean_I = statistics.abs_sum_I.to(device) / statistics.num_tokens
    sample_OI = sample_rows(weight_OI)

    def loss_of(exponent: float, search: bool = False) -> float:
        return _scaled_loss(sample_OI, scales_for(mean_I, exponent), second_moment_II, scheme, search)

    best, _ = search_exponent(loss_of)
    unscaled = loss_of(0.0, options.clip_search)
    scaled = loss_of(best, options.clip_search) if best else unscaled
    if not scaled < unscaled:
        best, scaled = 0.0, unscaled
    per_token = 1 / statistics.num_tokens
    return FoundScales(scales_for(mean_I, best), best, unscaled * per_token, scaled * per_token)


def scales_for(mean_I: Tensor, exponent: float) -> Tensor:
    """Return float32 [I]: mean|x| to the exponent, centred so that the largest and smallest scale are reciprocal.

    The exponent 0 and an input that was never alive give exact ones.
    """
    average = mean_I.mean(dtype=torch.float64)
    if exponent == 0.0 or not average > 0:
        return torch.ones_like(mean_I)
    scale_I = (mean_I.to(torch.float64) / average).clamp_min(MEAN_FLOOR).pow(exponent)
    scale_I /= (scale_I.amin() * scale_I.amax()).sqrt()
    return scale_I.clamp(1 / MAX_SCALE_RATIO, MAX_SCALE_RATIO).to(torch.float32)


def _scaled_loss(weight_OI: Tensor, scale_I: Tensor, second_moment_II: Tensor, scheme: Scheme, search: bool) -> float:
    """Return tr(dW H dW^T), dW = Q(W s) / s - W. The grid is fitted to scaled weights, so its importance is that of
    the scaled inputs, diag(H) / s^2."""
    scaled_OI = weight_OI * scale_I
    importance_I = channel_importance(second_moment_II.diagonal() / scale_I.square())
    scale_OG, zero_OG = fit_grid(scaled_OI, importance_I, scheme, search)
    rounded_OI = dequantize(encode(scaled_OI, scale_OG, zero_OG, scheme), scale_OG, zero_OG, scheme)
    return float(row_losses(rounded_OI.div_(scale_I).sub_(weight_OI), second_moment_II).sum())
