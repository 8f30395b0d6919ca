"""A hub of this test's own, with a small model on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.settings import Settings
from tests.loopback_hub import LoopbackHub

CARD = b"---\nlicense: apache-2.0\nbase_model: org/parent\n---\n# Model\n"


@pytest.fixture
def model_files() -> dict[str, bytes]:
    """Files of a repository: what a conversion needs, and what it must leave alone."""
    weight_map = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer.model": b"sentencepiece",
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE.txt": b"Licence text",
        "README.md": CARD,
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "model-00001-of-00002.safetensors": bytes(range(256)) * 1000,
        "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 500,
        "consolidated.safetensors": b"second copy",
        "pytorch_model.bin": b"pickle",
        "optimizer.pt": b"pickle",
        "original/consolidated.00.pth": b"pickle",
        "model-Q4.gguf": b"GGUF",
        "onnx/model.onnx": b"onnx",
        "picture.png": b"png",
        "modeling_custom.py": b"import os",
    }


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """Return a running hub without token or CDN."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def settings(hub: LoopbackHub, tmp_path: Path) -> Settings:
    """Return settings that lead to ``hub`` and an empty cache."""
    return Settings(
        hub_endpoint=hub.url, hub_token=None, cache_dir=tmp_path / "cache", s3_endpoint=None, ray_address=None
    )
