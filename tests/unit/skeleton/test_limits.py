"""What configs say of sequences: nested ones, other keys, and no limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as t

from pipeline.skeleton.limits import PositionLimit, kv_cache, position_limit, vocabulary_size
from pipeline.skeleton.model import Skeleton
from tests.architectures import tiny_config

COMMON = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}


def skeleton(config: Any, folder: Path) -> Skeleton:
    config.save_pretrained(folder)
    return Skeleton(folder)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("llama", PositionLimit("max_position_embeddings", 2048)),
        ("gpt2", PositionLimit("n_positions", 1024)),
        ("gemma3_vlm", PositionLimit("max_position_embeddings", 131072)),
    ],
)
def test_the_limit_is_named_as_config_json_names_it(name: str, limit: PositionLimit, tmp_path: Path) -> None:
    assert position_limit(skeleton(tiny_config(name), tmp_path)) == limit


def test_without_positions_nothing_limits_a_sequence(tmp_path: Path) -> None:
    bloom = skeleton(t.BloomConfig(hidden_size=128, n_layer=2, n_head=4, vocab_size=512), tmp_path)
    assert position_limit(bloom) is None
    assert kv_cache(bloom, 100) == (100, 2 * 2 * 2 * 128 * 100)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (tiny_config("llama"), 2 * 32),
        (tiny_config("qwen3"), 2 * 64),
        (tiny_config("gpt2"), 4 * 32),
        (tiny_config("gemma3_vlm"), 2 * 32),
        (t.FalconConfig(**COMMON, multi_query=True), 32),
        (t.FalconConfig(**COMMON, multi_query=False, alibi=False), 4 * 32),
        (t.FalconConfig(**COMMON, new_decoder_architecture=True, num_kv_heads=2), 2 * 32),
        (t.GPTBigCodeConfig(n_embd=128, n_layer=2, n_head=4, vocab_size=512, multi_query=True), 32),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, t.PreTrainedConfig) else str(value),
)
def test_the_cache_holds_keys_and_values_of_every_layer(config: Any, width: int, tmp_path: Path) -> None:
    found = skeleton(config, tmp_path)
    assert kv_cache(found, 100) == (100, 2 * 2 * 2 * width * 100)
    limit = position_limit(found)
    assert limit is not None
    assert kv_cache(found, 10**9)[0] == limit.tokens


def test_the_vocabulary_of_a_vision_model_is_its_text_part_s(tmp_path: Path) -> None:
    assert vocabulary_size(skeleton(tiny_config("gemma3_vlm"), tmp_path)) == 4096
