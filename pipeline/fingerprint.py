"""Identity from content: canonical JSON, its SHA-256, and file digests.

A fingerprint covers everything that affects the bytes of a result and nothing else: never a path, a worker or a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

DIGEST_CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, plain ASCII.

    Accepts None, bool, int, finite float, str, enums with such values, pydantic models, and lists, tuples and string-
    keyed mappings of these.

    Raises:
        TypeError: for anything else, so that nothing enters an identity by its repr.
    """
    return json.dumps(_plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value, where)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value}, which has no canonical JSON")
        return value
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(), where)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, which is no string")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}, which has no canonical JSON")


def fingerprint(value: Any) -> str:
    """Return the SHA-256 (64 hex digits) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 (64 hex digits) of ``data``."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 (64 hex digits) of a file, read in chunks."""
    hasher = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(DIGEST_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()
