"""Sources of every architecture, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.graph.outline import Source, open_folder
from tests.architectures import make_model


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """Return ``source_of(architecture)``."""
    made: dict[str, Source] = {}

    def source(name: str) -> Source:
        if name not in made:
            made[name] = open_folder(make_model(name, tmp_path_factory.mktemp(name)))
        return made[name]

    return source


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A small Llama that a test may damage."""
    return make_model("llama", tmp_path / "llama")
