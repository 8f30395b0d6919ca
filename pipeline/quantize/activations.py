"""The inputs of linears as engines round them: what a variant whose inputs are quantized computes with.

Dimension suffixes: T = tokens, I = in_features, O = out_features (rows of the whole stack).

Dynamic rounding gives each token a scale of its own, its largest input over the largest code, so nothing is clipped:
round(x / s) * s, on whole numbers from -127 to 127 or on E4M3 (``float8.py``). The law is that of compressed-tensors
and vLLM (dynamic per-token quantization); the scale is float32 there and here.

What that costs is foreseen from statistics. On whole numbers the error of an input is even over a step s, so of
variance s^2 / 12 whatever the input, and an output's error is that times ||w||^2. The mean of s^2 is that of a token's
largest squared input: were inputs normal and independent, with the variances that calibration saw, it would be the
integral over t of 1 - prod_i P(x_i^2 < t). One channel far above the others gives its variance, many alike give their
extreme: so the estimate knows that there is nothing more to gain once channels are alike, which the largest variance
alone does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantize import float8
from pipeline.quantize.types import Scheme
from pipeline.spec import Activations

MAX_INPUT_CODE = 127
"""The largest integer code of an input; the least is its negative."""

MIN_INPUT_SCALE = 2.0**-126
"""The scale of a token of zeros: the smallest normal float32."""

LEVELS = 128
"""Points at which the distribution of a token's largest input is looked at."""

HIGHEST_LEVEL = 6.5
"""The last of them, in standard deviations of the loudest channel: P(|x| > 6.5) is 8e-11 for one, and below 1e-4 for
any of 2**18."""


def round_inputs(x: Tensor, scheme: Scheme) -> Tensor:
    """Return inputs as the linear sees them, in their own dtype and shape [..., I]: rounded as the scheme says, each
    token (all but the last dimension) on its own."""
    match scheme.activations:
        case Activations.NONE:
            return x
        case Activations.DYNAMIC:
            largest = float8.MAX_NUMBER if scheme.is_float else MAX_INPUT_CODE
            wide = x.to(torch.float32)
            scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(MIN_INPUT_SCALE)
            steps = wide / scale
            rounded = float8.round_(steps) if scheme.is_float else steps.round_().clamp_(-largest, largest)
            return rounded.mul_(scale).to(x.dtype)


def input_rounding_loss(weight_OI: Tensor, variance_I: Tensor) -> float:
    """Return the expected squared output error of one token, summed over outputs, when its inputs are rounded to whole
    numbers of 8 bits and the weight is not.

    Args:
        weight_OI: float32 [O, I].
        variance_I: float32 [I], mean squared input of each channel.
    """
    step_squared = expected_largest_square(variance_I) / MAX_INPUT_CODE**2
    return step_squared / 12 * float(weight_OI.square().sum(dtype=torch.float64))


def expected_largest_square(variance_I: Tensor) -> float:
    """Return the expected largest square among independent normal numbers with these variances (float32 [I])."""
    highest = float(variance_I.max())
    if not highest > 0:
        return 0.0
    # What is far below the largest never is the largest, and would only be logarithms of 1.
    relative_I = (variance_I[variance_I > highest * 1e-4] / highest).to(torch.float64)
    # Over |x| = sqrt(t), as of which P is smooth at 0 too.
    levels_L = torch.linspace(0, HIGHEST_LEVEL, LEVELS + 1, dtype=torch.float64, device=variance_I.device)
    limits_I = (2 * relative_I).sqrt()
    below_L = torch.stack([torch.erf(level / limits_I).log().sum() for level in levels_L[1:]]).exp()
    above_L = torch.cat([torch.ones_like(below_L[:1]), 1 - below_L])
    return highest * float(torch.trapezoid(2 * levels_L * above_L, levels_L))
