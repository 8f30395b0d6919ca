"""Releases of the shipped model in unmodified transformers, in an environment of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline.facts import Check
from pipeline.graph.convert import RunOptions, convert
from pipeline.graph.verify import verify
from pipeline.settings import load_settings
from pipeline.spec import build_spec
from tests.acceptance.conftest import DEMO_MODEL
from tests.architectures import drop_prefix, make_model

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3000)]
VARIANTS = ["gptq-w4-g128", "awq-w4-g128", "rtn-w8-g128"]


class NoSink:
    def emit(self, event: object) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    (folder / "out").mkdir()
    spec = {
        "source": str(DEMO_MODEL),
        "variants": VARIANTS,
        "targets": [str(folder / "out")],
        "calibration": {"samples": 16, "length": 256},
        "gates": {"heldout_samples": 2},
    }
    return run(spec, folder)


def run(spec: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Convert and return the published folders by variant."""
    settings = dataclasses.replace(load_settings(), cache_dir=folder / "cache")
    outcomes = convert(
        build_spec(spec, "test"), settings, RunOptions(folder / "work", workers=1, inline=True), NoSink()
    )
    return {outcome.facts.variant.name: Path(outcome.locations[0]) for outcome in outcomes}


ARCHITECTURES = {
    "qwen2": ["gptq-w4-g64", "awq-w4-g64"],
    "gemma3": ["gptq-w4-g64", "awq-w4-g64"],
    "phi3": ["gptq-w4-g64", "awq-w4-g64"],
    "gpt_neox": ["gptq-w4-g64", "awq-w4-g64"],
    "opt": ["gptq-w4-g64", "awq-w4-g64"],
    "gpt2": ["gptq-w4-g64", "awq-w4-g64-gptq", "rtn-w8-g64-gptq"],
}
"""Tiny random models: biases, fused projections, GPT-2's transposed linears."""


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_engine_computes_what_the_reference_computes_for_other_architectures(name: str, tmp_path: Path) -> None:
    check_tiny(make_model(name, tmp_path / name), ARCHITECTURES[name], tmp_path)


def test_engine_leaves_ignored_linears_dense_whatever_the_checkpoint_calls_them(tmp_path: Path) -> None:
    folder = drop_prefix(make_model("llama", tmp_path / "llama", tie_word_embeddings=True), "model.")
    common = {"bits": 4, "group_size": 64, "ignore": ["re:down_proj$"]}
    variants = [
        {"name": "gptq", "method": "gptq", "format": "gptq", **common},
        {"name": "awq", "method": "awq", "format": "awq", "symmetric": False, **common},
    ]
    check_tiny(folder, variants, tmp_path)


def check_tiny(source: Path, variants: Sequence[str | dict[str, Any]], folder: Path) -> None:
    """Convert a tiny random model and have the engine check every release."""
    (folder / "out").mkdir()
    gates = {"max_kl": None, "max_perplexity_ratio": None, "heldout_samples": 1, "heldout_length": 64}
    found = run(
        {
            "source": str(source),
            "variants": list(variants),
            "targets": [str(folder / "out")],
            "calibration": {"samples": 8, "length": 64},
            "gates": {**gates, "max_relative_error": None, "generated_tokens": 8},
        },
        folder,
    )
    for release in found.values():
        check = engine_check(release)
        print(source.name, check.detail)
        assert check.passed, check.detail


def engine_check(folder: Path) -> Check:
    return verify(str(folder), "transformers", load_settings(), print).checks[-1]


@pytest.mark.parametrize("name", VARIANTS)
def test_engine_computes_what_the_reference_computes(name: str, releases: dict[str, Path]) -> None:
    check = engine_check(releases[name])
    print(check.detail)
    assert check.name == "engine"
    assert check.passed, check.detail
    assert check.figures["tokens_total"] == 96


def test_engine_that_reads_other_weights_is_caught(releases: dict[str, Path], tmp_path: Path) -> None:
    from pipeline.validate.engines.environment import check_engine
    from pipeline.validate.release import ReleaseModel

    damaged = tmp_path / "damaged"
    shutil.copytree(releases["gptq-w4-g128"], damaged)
    file = damaged / "model-00003-of-00007.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.qweight"))
    tensors[name] ^= 0x77777777
    save_file(tensors, file, {"format": "pt"})
    model = ReleaseModel(releases["gptq-w4-g128"])
    model.attach()
    prompts = [("The people", model.tokenizer.encode("The people", with_special=True))]
    check = check_engine("transformers", damaged, model.logits, prompts, 8, load_settings().cache_dir, print)
    assert not check.passed
