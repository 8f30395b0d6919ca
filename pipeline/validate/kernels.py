"""The comparison of two models' logits as one compiled loop over the vocabulary.

Dimension suffixes: L = positions, V = vocabulary.

``exp`` is computed here, for 16 numbers at once where the C library would take one: x = n ln 2 + r with |r| at most
half of ln 2 (ln 2 in two parts, so that n ln 2 loses nothing), e^r from its series up to r^7 (the rest is below 6e-9),
and 2^n by its bit pattern. Arguments are logits less their largest, hence at most 0. Sums run in float64, in ``LANES``
partial sums whose order is fixed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import LANES, PUSH, compiled

Floats = NDArray[np.float32]

_PUSH = np.float32(PUSH)
_PER_LN2 = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693145751953125)
_LN2_LOW = np.float32(1.42860677e-06)
_LEAST = np.float32(-87.0)
_SERIES = tuple(np.float32(1.0 / k) for k in (5040, 720, 120, 24, 6, 2, 1, 1))


@compiled
def _exponentials(x_L: Floats, power_L: Floats, bits_L: NDArray[np.int32]) -> None:
    """Replace each of ``x_L`` (at most 0) by its exponential; ``bits_L`` is a view of ``power_L``, which is scratch."""
    for lane in range(LANES):
        x = max(x_L[lane], _LEAST)
        shifted = x * _PER_LN2 + _PUSH
        whole = shifted - _PUSH
        power_L[lane] = shifted
        r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
        value = _SERIES[0]
        value = value * r + _SERIES[1]
        value = value * r + _SERIES[2]
        value = value * r + _SERIES[3]
        value = value * r + _SERIES[4]
        value = value * r + _SERIES[5]
        value = value * r + _SERIES[6]
        x_L[lane] = value * r + _SERIES[7]
    for lane in range(LANES):
        # The low bits of a pushed number are the whole number it stands for; they become the exponent of a power of 2.
        bits_L[lane] = (bits_L[lane] + np.int32(127)) << np.int32(23)
    for lane in range(LANES):
        x_L[lane] *= power_L[lane]


@compiled
def _first(value_V: Floats, wanted: np.float32) -> int:
    """Return the place of the first value like ``wanted``; past the end when there is none (NaN)."""
    place = 0
    while place < value_V.shape[0] and value_V[place] != wanted:
        place += 1
    return place


@compiled
def compare_logits(
    source_LV: Floats, variant_LV: Floats, target_L: NDArray[np.int64], out_L4: NDArray[np.float64]
) -> None:
    """Fill, for each position, -log p(target) under the source and under the variant, KL(source || variant) in nats,
    and 1 where both have the same most likely token (the first of equal ones).

    Args:
        source_LV: Logits [L, V].
        variant_LV: Logits [L, V].
        target_L: Token ids [L].
        out_L4: float64 [L, 4], to fill; NaN where logits are not finite.
    """
    num_tokens = source_LV.shape[1]
    whole = num_tokens - num_tokens % LANES
    x_L, y_L, difference_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    power_L = np.empty(LANES, np.float32)
    bits_L = power_L.view(np.int32)
    highest_L, other_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    total_L, other_total_L, moment_L = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    for position in range(source_LV.shape[0]):
        source_V, variant_V = source_LV[position], variant_LV[position]
        for lane in range(LANES):
            highest_L[lane] = other_L[lane] = np.float32(-np.inf)
        for start in range(0, whole, LANES):
            for lane in range(LANES):
                highest_L[lane] = max(highest_L[lane], source_V[start + lane])
                other_L[lane] = max(other_L[lane], variant_V[start + lane])
        top, other_top = highest_L.max(), other_L.max()
        for token in range(whole, num_tokens):
            top, other_top = max(top, source_V[token]), max(other_top, variant_V[token])
        for lane in range(LANES):
            total_L[lane] = other_total_L[lane] = moment_L[lane] = 0.0
        for start in range(0, num_tokens, LANES):
            count = min(LANES, num_tokens - start)
            for lane in range(LANES):
                if lane < count:
                    x_L[lane], y_L[lane] = source_V[start + lane], variant_V[start + lane]
                else:
                    x_L[lane] = y_L[lane] = np.float32(-np.inf)
            for lane in range(LANES):
                # A token that the source rules out (-inf) adds nothing, whatever the variant says of it.
                is_possible = lane < count and x_L[lane] != np.float32(-np.inf)
                difference_L[lane] = x_L[lane] - y_L[lane] if is_possible else np.float32(0.0)
                x_L[lane] -= top
                y_L[lane] -= other_top
            _exponentials(x_L, power_L, bits_L)
            _exponentials(y_L, power_L, bits_L)
            for lane in range(LANES):
                x = x_L[lane] if lane < count else np.float32(0.0)
                total_L[lane] += x
                other_total_L[lane] += y_L[lane] if lane < count else np.float32(0.0)
                moment_L[lane] += x * difference_L[lane]
        total, other_total, moment = total_L.sum(), other_total_L.sum(), moment_L.sum()
        log_total, other_log_total = np.log(total) + top, np.log(other_total) + other_top
        divergence = moment / total - log_total + other_log_total
        is_sound = np.isfinite(divergence)  # NaN or inf among the logits makes it so
        out_L4[position, 0] = log_total - source_V[target_L[position]] if is_sound else np.nan
        out_L4[position, 1] = other_log_total - variant_V[target_L[position]] if is_sound else np.nan
        out_L4[position, 2] = divergence if is_sound else np.nan
        out_L4[position, 3] = 1.0 if _first(source_V, top) == _first(variant_V, other_top) else 0.0


def load() -> None:
    """Have the loop compiled, or loaded where it was compiled before."""
    logits_LV = np.ones((1, 1), np.float32)
    compare_logits(logits_LV, logits_LV, np.zeros(1, np.int64), np.empty((1, 4)))
