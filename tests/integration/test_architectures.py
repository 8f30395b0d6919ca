"""Every architecture: convert, read the published folder back, compare with the source.

The published tensors are unpacked by the project's reader, but run by a plain transformers model, so a mistake in how
blocks are run cannot hide one in what was written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.graph.convert import RunOptions, VariantOutcome, convert
from pipeline.graph.folds import ScaleResult, fold_block, search_group_scales
from pipeline.graph.outline import Source, open_folder
from pipeline.quantize.solve import SolveOptions
from pipeline.quantize.types import Scheme, Statistics
from pipeline.settings import Settings
from pipeline.skeleton.groups import LinearGroup
from pipeline.spec import build_spec
from pipeline.tensors.local import read_folder_index
from pipeline.tensors.reader import read_tensors
from pipeline.validate.dense import DenseReader
from tests.architectures import DENSE, make_model

W8, W4 = "rtn-w8-g128", ("gptq-w4-g64", "awq-w4-g64")
LLAMA_ONLY = ("gptq-w4-g64-ct", "awq-w4-g64-ct-asym")

ERROR_FACTOR = 2.0
"""Logit error that is allowed over the root of the sum of squares of the linears' stated relative errors. The stated
errors are relative to each linear's own output on the calibration text. If they were independent and each block added
as much as the residual stream holds, the factor would be 1; other tokens and nonlinearities give up to 1.3 here."""

OPEN_GATES = {
    "max_relative_error": 0.9,
    "max_kl": 20.0,
    "max_perplexity_ratio": 1e6,
    "max_degradations": 0,
    "heldout_samples": 2,
    "heldout_length": 32,
    "generated_tokens": 4,
    "prompts": [{"prompt": "It was a cold morning"}],
}


class NoSink:
    def emit(self, event: object) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Converted:
    source: Path
    outcomes: dict[str, VariantOutcome]

    def folder(self, variant: str) -> Path:
        (location,) = self.outcomes[variant].locations
        return Path(location)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=DENSE)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """One conversion of each architecture to all variants."""
    name: str = request.param
    root = tmp_path_factory.mktemp(name)
    variants = [*W4, W8, *(LLAMA_ONLY if name == "llama" else ())]
    return convert_folder(make_model(name, root / name), root / "out", variants)


def convert_folder(source: Path, target: Path, variants: list[str]) -> Converted:
    target.mkdir()
    spec = build_spec(
        {
            "source": str(source),
            "variants": variants,
            "targets": [str(target)],
            "gates": OPEN_GATES,
            "calibration": {"samples": 4, "length": 64},
        },
        "test",
    )
    settings = Settings("http://127.0.0.1:9", None, target.parent / "cache", s3_endpoint=None, ray_address=None)
    options = RunOptions(target.parent / "work", workers=1, inline=True)
    outcomes = convert(spec, settings, options, NoSink())
    return Converted(source, {outcome.facts.variant.name: outcome for outcome in outcomes})


def tokens() -> Tensor:
    return torch.randint(4, 4096, (2, 48), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(net: Any) -> Tensor:
    logits: Tensor = net.eval()(input_ids=tokens()).logits
    return logits.float()


def source_net(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def published_net(folder: Path, source: Path) -> Any:
    """Return transformers' own model with the published tensors, unpacked."""
    config = json.loads((folder / "config.json").read_text())
    index = read_folder_index(folder)
    tensors = read_tensors(folder, index, index.entries)
    outline = open_folder(source).outline
    linears = [linear for block in outline.groups for group in block for linear in group.linears]
    reader = DenseReader(config["quantization_config"], linears)
    net = source_net(source)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()  # nothing of the source may be left where a published tensor is not loaded
    names = outline.skeleton.names
    net.load_state_dict(reader.dense(names, tensors), strict=False)
    net.tie_weights()
    return net


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_published_weights_compute_what_the_report_states(converted: Converted) -> None:
    expected = logits_of(source_net(converted.source))
    errors = {}
    for variant, outcome in converted.outcomes.items():
        facts = outcome.facts
        assert {module.bits for module in facts.modules} == {facts.variant.bits}
        found = logits_of(published_net(converted.folder(variant), converted.source))
        errors[variant] = relative_error(found, expected)
        stated = math.sqrt(sum(module.relative_error**2 for module in facts.modules))
        print("RATIO", converted.source.name, variant, round(errors[variant], 4), round(errors[variant] / stated, 3))
        assert 0 < errors[variant] < ERROR_FACTOR * stated, variant
    for variant in W4:
        assert errors[W8] < errors[variant] / 5


def test_compressed_tensors_release_loads_in_plain_transformers(converted: Converted) -> None:
    from transformers import AutoModelForCausalLM

    if converted.source.name not in ("llama", "qwen3"):
        return
    for variant in (W8, *(name for name in LLAMA_ONLY if name in converted.outcomes)):
        folder = converted.folder(variant)
        loaded = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        dense = logits_of(published_net(folder, converted.source))
        print("CT", variant, relative_error(loaded, dense))
        assert relative_error(loaded, dense) < 1e-3, variant
