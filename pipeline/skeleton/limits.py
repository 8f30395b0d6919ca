"""How long a model's sequences may be, and what their key-value cache takes: from the config of its text part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.skeleton.model import Skeleton

CACHE_BYTES = 2
"""Bytes of one cached number: engines keep the cache at 16 bit."""


@dataclass(frozen=True)
class PositionLimit:
    """The longest sequence that a model is configured for.

    Attributes:
        key: The key of config.json that says so, for example ``max_position_embeddings``.
        tokens: Its value. Models with learned positions have no more of them; rotary ones compute beyond it, but were
            not trained there.
    """

    key: str
    tokens: int


def position_limit(skeleton: Skeleton) -> PositionLimit | None:
    """Return the longest sequence that the model is configured for; None when nothing limits it (ALiBi, Mamba)."""
    config = text_config(skeleton)
    name = "max_position_embeddings"
    tokens = getattr(config, name, None)
    return PositionLimit(config.attribute_map.get(name, name), tokens) if tokens and tokens > 0 else None


def kv_cache(skeleton: Skeleton, max_tokens: int) -> tuple[int, int]:
    """Return tokens and bytes of the KV cache of one sequence of ``max_tokens``, or of the model's limit if lower."""
    config = text_config(skeleton)
    limit = position_limit(skeleton)
    tokens = min(max_tokens, limit.tokens) if limit else max_tokens
    # Gemma 4's global layers have other heads than its local ones.
    width = sum(_cache_width(layer) for layer in config.per_layer_config)
    return tokens, 2 * CACHE_BYTES * width * tokens


def vocabulary_size(skeleton: Skeleton) -> int:
    """Return the number of logits of one position."""
    size: int = text_config(skeleton).vocab_size
    return size


def text_config(skeleton: Skeleton) -> Any:
    """Return the config of the language model, which vision models nest in theirs."""
    return skeleton.net.config.get_text_config()


def _cache_width(config: Any) -> int:
    """Return the numbers that one layer's keys of one token are, from the layer's config."""
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width: int = _num_kv_heads(config, heads) * head_dim
    return width


def _num_kv_heads(config: Any, heads: int) -> int:
    # Falcon's own keys: one head for all, unless the newer architecture says how many.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    named = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return named or heads
