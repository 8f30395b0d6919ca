"""How far a variant's predictions are from its source's on the same tokens.

For each position t of a sequence but the last, both models predict token t + 1. Reported: the negative log likelihood
of the true token under each, KL(source || variant), and whether both agree on the most likely token. All are sums, so
slices add up in any grouping; accumulated in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.validate import kernels

CHUNK_ELEMENTS = 1 << 23
"""Logits of one model handled at once (float32, 32 MB); seven times as much is in memory. Part of the order of
summation: products round by their shape."""


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
def compare_predictions(
    logits: Callable[[Tensor], Tensor], source_LH: Tensor, variant_LH: Tensor, tokens_L: Tensor, vocabulary_size: int
) -> Divergence:
    """Return the divergence over one sequence; logits are made and compared for some positions at a time.

    Args:
        logits: Gives float32 logits [positions, vocabulary] of final hidden states [positions, H].
        source_LH: Final hidden states of the source.
        variant_LH: Final hidden states of the variant.
        tokens_L: int64 token ids [length].
        vocabulary_size: Number of logits of one position.
    """
    rows = max(1, CHUNK_ELEMENTS // vocabulary_size)
    predicting, targets_L = slice(0, tokens_L.shape[0] - 1), tokens_L[1:]
    chunks = (torch.split(tensor, rows) for tensor in (source_LH[predicting], variant_LH[predicting], targets_L))
    return add_up(
        _compare(logits(source), logits(variant), targets) for source, variant, targets in zip(*chunks, strict=True)
    )


def _compare(source_LV: Tensor, variant_LV: Tensor, targets_L: Tensor) -> Divergence:
    if source_LV.device.type == "cpu":
        by_position = np.empty((targets_L.shape[0], 4))
        source, variant = (tensor.to(torch.float32).contiguous().numpy() for tensor in (source_LV, variant_LV))
        kernels.compare_logits(source, variant, targets_L.numpy(), by_position)
        source_nll, variant_nll, kl, agreeing = by_position.sum(0).tolist()
        return Divergence(targets_L.numel(), source_nll, variant_nll, kl, int(agreeing))
    return _compare_anywhere(source_LV, variant_LV, targets_L)


def _compare_anywhere(source_LV: Tensor, variant_LV: Tensor, targets_L: Tensor) -> Divergence:
    """Return on any device what ``kernels.compare_logits`` gives on the CPU."""
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
