"""A small Llama on disk, and everything that a conversion of it depends on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.fingerprint import digest_file
from pipeline.graph import worker
from pipeline.graph.build import Inputs
from pipeline.graph.convert import gather_inputs, load_texts
from pipeline.graph.dag import Kind
from pipeline.graph.stages.call import Call
from pipeline.hub.fetch import FetchedSource, fetch
from pipeline.hub.source import pin_source
from pipeline.settings import Settings
from pipeline.spec import ConversionSpec, build_spec
from tests.architectures import make_model
from tests.unit.graph.toys import run_toy

SENTENCES = [f"In the year {year} the ship left the harbour with {year % 97} men.\n" for year in range(1500, 1800)]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama; tests copy it before they change it."""
    return make_model("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("http://127.0.0.1:9", None, tmp_path / "cache", s3_endpoint=None, ray_address=None)


@pytest.fixture
def make_spec(llama: Path, tmp_path: Path) -> Callable[..., ConversionSpec]:
    """Return ``make_spec(**changes)``: a spec with short texts, one level of its keys merged."""
    texts = {"calibration": SENTENCES[:200], "heldout": SENTENCES[200:]}
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("".join(lines))

    def make(**changes: Any) -> ConversionSpec:
        base: dict[str, Any] = {
            "source": str(llama),
            "variants": ["gptq-w4-g64", "awq-w4-g64"],
            "targets": [str(tmp_path / "out")],
            "calibration": {
                "text": str(tmp_path / "calibration.txt"),
                "samples": 6,
                "length": 32,
                "slice_sequences": 4,
            },
            "gates": {"heldout": str(tmp_path / "heldout.txt"), "heldout_samples": 2, "heldout_length": 32},
        }
        for key, value in changes.items():
            base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
        return build_spec(base, "test")

    return make


@pytest.fixture
def gather(settings: Settings) -> Callable[..., Inputs]:
    """Return ``gather(spec, device)``: the inputs of a conversion."""

    def inputs(spec: ConversionSpec, device: str = "cpu") -> Inputs:
        return gather_inputs(spec, fetched(spec, settings), load_texts(spec, settings), device)

    return inputs


def fetched(spec: ConversionSpec, settings: Settings) -> FetchedSource:
    found = fetch(pin_source(spec.source, settings), settings)
    assert found.digests["config.json"] == digest_file(found.folder / "config.json")
    return found


@pytest.fixture
def toy_stages(monkeypatch: pytest.MonkeyPatch) -> dict[Kind, Callable[[Call], dict[str, Any]]]:
    """The stage functions: toys, which a test may replace. Nothing waits for disks: power cuts are not tried here."""
    source = SimpleNamespace(expect_block=lambda index: None)
    found: dict[Kind, Callable[[Call], dict[str, Any]]] = dict.fromkeys(Kind, run_toy)
    monkeypatch.setattr(worker, "open_source", lambda *arguments: source)
    monkeypatch.setattr(worker, "STAGES", found)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return found
