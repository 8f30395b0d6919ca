"""How far a variant's predictions are from its source's on the same tokens.

For each position t of a sequence but the last, both models predict token t + 1. Reported: the negative log likelihood
of the true token under each, KL(source || variant), and whether both agree on the most likely token. All are sums, so
slices add up in any grouping; accumulated in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25
"""Logits handled at once (float32, 128 MB)."""


@dataclass(frozen=True)
class Divergence:
    """Sums over predicted tokens.

    Attributes:
        num_tokens: Predictions that were scored.
        source_nll: Sum of -log p(token) under the source, nats.
        variant_nll: The same under the variant.
        kl: Sum of KL(source || variant), nats.
        num_agreeing: Predictions where both have the same most likely token.
    """

    num_tokens: int
    source_nll: float
    variant_nll: float
    kl: float
    num_agreeing: int

    def as_dict(self) -> dict[str, float]:
        """Return the sums by name."""
        return asdict(self)

    @property
    def source_perplexity(self) -> float:
        """exp of the source's mean negative log likelihood."""
        return _perplexity(self.source_nll, self.num_tokens)

    @property
    def perplexity(self) -> float:
        """exp of the variant's mean negative log likelihood."""
        return _perplexity(self.variant_nll, self.num_tokens)

    @property
    def mean_kl(self) -> float:
        """Mean KL(source || variant), nats per token."""
        return self.kl / self.num_tokens

    @property
    def top1_agreement(self) -> float:
        """Share of predictions with the same most likely token."""
        return self.num_agreeing / self.num_tokens


def _perplexity(nll: float, num_tokens: int) -> float:
    mean = nll / num_tokens
    return math.exp(mean) if mean < 700 else math.inf


def add_up(parts: Iterable[Divergence]) -> Divergence:
    """Return the sum of slices, in the given order."""
    total = Divergence(0, 0.0, 0.0, 0.0, 0)
    for part in parts:
        total = Divergence(
            total.num_tokens + part.num_tokens,
            total.source_nll + part.source_nll,
            total.variant_nll + part.variant_nll,
            total.kl + part.kl,
            total.num_agreeing + part.num_agreeing,
        )
    return total


@torch.no_grad()
def compare_logits(source_LV: Tensor, variant_LV: Tensor, tokens_L: Tensor) -> Divergence:
    """Return the divergence over one sequence.

    Args:
        source_LV: float32 logits of the source [length, vocabulary].
        variant_LV: float32 logits of the variant, the same shape.
        tokens_L: int64 token ids [length].
    """
    rows = max(1, CHUNK_ELEMENTS // source_LV.shape[1])
    last = source_LV.shape[0] - 1
    return add_up(
        _compare(
            source_LV[start : min(start + rows, last)],
            variant_LV[start : min(start + rows, last)],
            tokens_L[start + 1 : min(start + rows, last) + 1],
        )
        for start in range(0, last, rows)
    )


def _compare(source_LV: Tensor, variant_LV: Tensor, targets_L: Tensor) -> Divergence:
    source_log = torch.log_softmax(source_LV, dim=-1)
    variant_log = torch.log_softmax(variant_LV, dim=-1)
    kl_L = (source_log.exp() * (source_log - variant_log)).sum(-1)
    picked = targets_L[:, None]
    return Divergence(
        num_tokens=targets_L.numel(),
        source_nll=-float(source_log.gather(1, picked).double().sum()),
        variant_nll=-float(variant_log.gather(1, picked).double().sum()),
        kl=float(kl_L.double().sum()),
        num_agreeing=int((source_LV.argmax(-1) == variant_LV.argmax(-1)).sum()),
    )
