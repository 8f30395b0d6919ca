"""Releases of the shipped model and of tiny random ones in unmodified transformers, in an environment of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.facts import Check
from pipeline.formats.loaders import Contents, Loader, limits
from pipeline.graph.convert import RunOptions, convert
from pipeline.graph.verify import verify
from pipeline.settings import load_settings
from pipeline.spec import build_spec
from pipeline.validate.engines.environment import check_engine
from pipeline.validate.release import ReleaseModel, read_facts
from tests.acceptance.conftest import DEMO_MODEL
from tests.architectures import make_model

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3000)]
VARIANTS = [
    *("gptq-w4-g128", "awq-w4-g128", "rtn-w8-g128", "gptq-w3-g64", "gptq-w2-g64", "awq-w3-g64"),
    *("gptq-w3-g64-ct", "gptq-w5-g64", "awq-w6-g64", "rtn-w2-g64-ct-asym"),
    # Several widths in one release; scales and compensated weights under GPTQ's codes.
    *(
        "gptq-w4.5-g64",
        "gptq-w4.5-g64-gptq",
        "awq-gptq-w4-g64",
        "gptq-w4-g64-ct-asym-seq",
        "gptq-w3-g64-ct-asym-trueseq",
    ),
    # Inputs are rounded too.
    *("w8a8-int8", "fp8-dynamic"),
    *("gptq-w4-g64-gptq_v2", "gptq-w4-g64-gptq_v2-asym", "gptq-w3-g64-gptq_v2-asym"),
]
COMPRESSED = ["rtn-w4-g64", "rtn-w8-g64", "awq-w4-g64-ct"]
ROUNDED = ["rtn-w8a8", "fp8-dynamic"]
NO_CPROJ = {"method": "gptq", "format": "gptq", "group_size": 64, "ignore": ["re:c_proj$"], "name": "gptq-no-c_proj"}

ARCHITECTURES: dict[str, list[Any]] = {
    "gemma3": ["gptq-w4-g64", "awq-w4-g64"],
    "gpt2": ["gptq-w4-g64", NO_CPROJ],
    "gpt_neox": ["gptq-w4-g64", "awq-w4-g64"],
    "llama": [
        *("gptq-w4-g64", "awq-w4-g64", "rtn-w8-g64-gptq", "gptq-w3-g64", "gptq-w4.5-g64-gptq"),
        "gptq-w4-g64-gptq_v2-asym",
        *(*COMPRESSED, "rtn-w8-channel-asym", *ROUNDED),
    ],
    "mistral": ["gptq-w4-g64", "awq-w4-g64"],
    "opt": ["gptq-w4-g64", "awq-w4-g64"],
    "phi3": ["gptq-w4-g64", "awq-w4-g64"],
    "qwen2": ["gptq-w4-g64", "awq-w4-g64", *COMPRESSED, *ROUNDED],
    "qwen3": ["gptq-w4-g64", "awq-w4-g64", *ROUNDED],
    "several group sizes": ["gptq-w4-g64", "gptq-w4-g64-ct", "awq-w4-g64-ct"],
}
"""Tiny random models and their variants: biases, fused projections, transposed linears, kept linears, every format."""

CASES = [
    (name, variant if isinstance(variant, str) else variant["name"])
    for name, variants in ARCHITECTURES.items()
    for variant in variants
]
PENALIZED = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6, "no_repeat_ngram_size": 2}
"""Generation settings as instruct models have them; the source of one architecture says them."""


class NoSink:
    def emit(self, event: object) -> None:
        pass

    def close(self) -> None:
        pass


def run(spec: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Convert and return the published folders by variant."""
    settings = dataclasses.replace(load_settings(), cache_dir=folder / "cache")
    outcomes = convert(
        build_spec(spec, "test"), settings, RunOptions(folder / "work", workers=1, inline=True), NoSink()
    )
    return {outcome.facts.variant.name: Path(outcome.locations[0]) for outcome in outcomes}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    (folder / "out").mkdir()
    spec = {
        "source": str(DEMO_MODEL),
        "variants": VARIANTS,
        "targets": [str(folder / "out")],
        "calibration": {"samples": 16, "length": 256},
        # Less calibration than a release should have: two bits need not keep their budgets here.
        "gates": {"heldout_samples": 2, "max_relative_error": None, "max_kl": None, "max_perplexity_ratio": None},
    }
    return run(spec, folder)


Converted = Callable[[str], dict[str, Path]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The published folders of an architecture by variant, made once."""
    made: dict[str, dict[str, Path]] = {}

    def of(name: str) -> dict[str, Path]:
        if name not in made:
            made[name] = convert_architecture(name, tmp_path_factory.mktemp(name.replace(" ", "_")))
        return made[name]

    return of


def make_source(name: str, folder: Path) -> Path:
    # With bfloat16, rounding moves the logits of random Qwen3 models as far as another token needs at some positions.
    if name == "several group sizes":
        # 64 divides the hidden size only, 32 what o_proj reads, and nothing what down_proj reads.
        sizes = {"head_dim": 32, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 272}
        return make_model("qwen3", folder, torch.float16, **sizes)
    # A random Gemma 3 whose head is its embedding says the last token over and over, which no gate lets pass.
    changes = {"tie_word_embeddings": False} if name == "gemma3" else {}
    make_model(name, folder, torch.float16 if name == "qwen3" else torch.bfloat16, **changes)
    if name == "llama":
        file = folder / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | PENALIZED))
    return folder


def convert_architecture(name: str, folder: Path) -> dict[str, Path]:
    source = make_source(name, folder / "source")
    (folder / "out").mkdir()
    gates = {"max_kl": None, "max_perplexity_ratio": None, "heldout_samples": 1, "heldout_length": 64}
    return run(
        {
            "source": str(source),
            "variants": ARCHITECTURES[name],
            "targets": [str(folder / "out")],
            "calibration": {"samples": 8, "length": 64},
            "gates": {**gates, "max_relative_error": None, "generated_tokens": 8},
        },
        folder,
    )


@cache
def engine_check(folder: Path) -> Check:
    return verify(str(folder), "transformers", load_settings(), print).checks[-1]


def direct_check(folder: Path, model: ReleaseModel, texts: Sequence[str]) -> Check:
    """Return the engine's check of a folder that is no whole release."""
    prompts = [(text, model.tokenizer.encode(text, with_special=True)) for text in texts]
    return check_engine("transformers", folder, model.logits, prompts, 8, load_settings().cache_dir, print)


@pytest.mark.parametrize("name", VARIANTS)
def test_engine_computes_what_the_reference_computes(name: str, releases: dict[str, Path]) -> None:
    check = engine_check(releases[name])
    print(check.detail)
    assert check.name == "engine"
    assert check.passed, check.detail
    assert check.figures["tokens_total"] == 96


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_engine_computes_what_the_reference_computes_unless_a_limit_is_known(
    name: str, variant: str, converted: Converted
) -> None:
    release = converted(name)[variant]
    known = [limit for limit in limits(Contents.of_release(read_facts(release))) if limit.loader is Loader.TRANSFORMERS]
    check = engine_check(release)
    print(name, variant, check.passed, check.detail)
    # A limit that is gone in the engine must go here too.
    assert check.passed is (not known), check.detail
    if known:
        assert check.detail.startswith("transformers")
        assert check.detail.endswith(" ".join(limit.text for limit in known))
        assert "Traceback" not in check.detail


KNOWN_LIMITS = {("gpt2", "gptq-w4-g64"), ("gpt_neox", "awq-w4-g64"), ("llama", "gptq-w4.5-g64-gptq")}


def test_exactly_these_have_limits(converted: Converted) -> None:
    found = {
        (name, variant)
        for name, variant in CASES
        for limit in limits(Contents.of_release(read_facts(converted(name)[variant])))
        if limit.loader is Loader.TRANSFORMERS
    }
    assert found == KNOWN_LIMITS


def test_the_release_s_own_generation_settings_do_not_count(converted: Converted) -> None:
    release = converted("llama")["gptq-w4-g64"]
    stated = json.loads((release / "generation_config.json").read_text())
    assert {key: stated[key] for key in PENALIZED} == PENALIZED
    check = engine_check(release)
    assert check.passed, check.detail


def test_engine_that_reads_other_weights_is_caught(releases: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(releases["gptq-w4-g128"], damaged)
    file = damaged / "model-00003-of-00007.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.qweight"))
    tensors[name] ^= 0x77777777
    save_file(tensors, file, {"format": "pt"})
    model = ReleaseModel(releases["gptq-w4-g128"])
    model.attach()
    assert not direct_check(damaged, model, ["The people"]).passed
