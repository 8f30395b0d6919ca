"""Scales that make inputs easier to round, at the price of weights.

Dimension suffixes: O = out_features (rows of the whole stack), I = in_features.

The law (Xiao et al. 2022, arXiv:2211.10438). For positive scales s, W x = (W s)(x / s), as for activation-aware scaling
(``awq.py``), but inputs are rounded too, with one scale for a token: a channel far above the others leaves them few
codes. s_i = max|x_i|^a / max|W_:i|^(1 - a), centred on 1, moves what is large from inputs to weights; with a = 1/2, the
paper's, a channel's largest input and weight become alike.

Here a is searched for each linear input (``scales.py``), where 0 stands for no scaling. What counts is the sum of two
errors of the outputs: that of rounding weights, tr(dW H dW^T) / num_tokens, and what rounding inputs is expected to do
(``activations.py``). Both follow from statistics: no token is seen again. On the rows that are searched on, their sum
never is larger than without scales.

On the 135M model of docs/benchmarks.md, KL divergence with 8-bit weights rounded to nearest and 8-bit inputs: 0.0354
without scales, 0.0157 with a = 1/2, 0.0140 with the a of each input that has the least error on calibration tokens, run
one by one, and 0.0132 with the one found here (4 x 512 tokens each, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.quantize.activations import input_rounding_loss
from pipeline.quantize.checks import require_solvable
from pipeline.quantize.loss import row_losses
from pipeline.quantize.rtn import round_rows
from pipeline.quantize.scales import MAX_SCALE_RATIO, FoundScales, sample_rows, search_exponent
from pipeline.quantize.types import Scheme, Statistics, dequantize

LEAST_SHARE = 1e-5
"""Least of a channel's largest input and weight, as fractions of the largest of all, that scales are made of."""


def search_smooth_scales(
    weight_OI: Tensor, statistics: Statistics, scheme: Scheme, share: Callable[[Tensor], Tensor]
) -> FoundScales:
    """Return the scales that lower the error of rounding weights and inputs of all linears that share one input the
    most.

    Args:
        weight_OI: float32 [O, I], the rows of all of them.
        statistics: Statistics of their input.
        scheme: Their grid; inputs are rounded dynamically, to whole numbers.
        share: Gives channels (float32 [I]) that must share a scale the same one.

    Returns:
        Losses are tr(dW H dW^T) / num_tokens of rounding weights to nearest, and what rounding inputs adds to it.

    Raises:
        QuantizationError: naming what is not finite, has no tokens, or does not fit together.
    """
    require_solvable(weight_OI, statistics, scheme)
    device = weight_OI.device
    second_moment_II = statistics.second_moment_II.to(device)
    variance_I = second_moment_II.diagonal() / statistics.num_tokens
    largest_input_I, largest_weight_I = statistics.abs_max_I.to(device), weight_OI.abs().amax(0)
    sample_OI = sample_rows(weight_OI)

    def scales_of(exponent: float) -> Tensor:
        return share(smooth_scales(largest_input_I, largest_weight_I, exponent))

    def loss_of(exponent: float) -> float:
        scale_I = scales_of(exponent)
        scaled_OI = sample_OI * scale_I
        grid = round_rows(scaled_OI, torch.ones_like(scale_I), scheme, search=False)
        losses_O = row_losses(dequantize(*grid, scheme).div_(scale_I).sub_(sample_OI), second_moment_II)
        by_weights = float(losses_O.sum()) / statistics.num_tokens
        return by_weights + input_rounding_loss(scaled_OI, variance_I / scale_I.square())

    exponent, loss = search_exponent(loss_of)
    return FoundScales(scales_of(exponent), exponent, loss_of(0.0), loss)


def smooth_scales(largest_input_I: Tensor, largest_weight_I: Tensor, exponent: float) -> Tensor:
    """Return float32 [I]: max|x|^a / max|W|^(1 - a), centred so that the largest and smallest are reciprocal.

    The exponent 0, an input and weights that were never alive give exact ones.

    Args:
        largest_input_I: float32 [I], the largest |x| of each channel.
        largest_weight_I: float32 [I], the largest |W| of each column.
        exponent: a, from 0 to 1.
    """
    inputs_I, weights_I = largest_input_I.to(torch.float64), largest_weight_I.to(torch.float64)
    if exponent == 0.0 or not (inputs_I.max() > 0 and weights_I.max() > 0):
        return torch.ones_like(largest_input_I)
    inputs_I, weights_I = (values_I.clamp_min(LEAST_SHARE * values_I.max()) for values_I in (inputs_I, weights_I))
    scale_I = inputs_I.pow(exponent) / weights_I.pow(1 - exponent)
    scale_I /= (scale_I.amin() * scale_I.amax()).sqrt()
    return scale_I.clamp(1 / MAX_SCALE_RATIO, MAX_SCALE_RATIO).to(torch.float32)
