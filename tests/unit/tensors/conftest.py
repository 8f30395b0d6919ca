"""Builders of safetensors bytes, honest and not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BuildFile = Callable[..., bytes]


@pytest.fixture
def build_file() -> BuildFile:
    """Return ``build(header, data, length=...)``: header a dict or raw JSON bytes, length what the file claims."""

    def build(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    return build


@pytest.fixture
def tensor() -> Callable[..., dict[str, Any]]:
    """Return ``tensor(start, end, dtype, shape)``: one header entry."""

    def entry(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
        return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}

    return entry


@pytest.fixture
def folder_reader(tmp_path: Path) -> Callable[[str, int, int], bytes]:
    """Return a range reader over ``tmp_path``."""

    def read(path: str, start: int, end: int) -> bytes:
        return (tmp_path / path).read_bytes()[start:end]

    return read
