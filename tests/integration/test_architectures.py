"""Every architecture: convert, reload, logits within the error that the report states."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.graph.convert import RunOptions, VariantOutcome, convert
from pipeline.settings import Settings
from pipeline.spec import build_spec
from pipeline.validate.release import ReleaseModel
from tests.architectures import DENSE, make_model

VARIANTS = ["gptq-w4-g64", "awq-w4-g64", "rtn-w8-g64"]
OPEN_GATES = {
    "max_relative_error": None, "max_kl": None, "max_perplexity_ratio": None,
    "heldout_samples": 2, "heldout_length": 64, "generated_tokens": 8,
}


class NoSink:
    def emit(self, event: object) -> None:
        pass

    def close(self) -> None:
        pass


def settings_in(folder: Path) -> Settings:
    return Settings(hub_endpoint="http://127.0.0.1:9", hub_token=None, cache_dir=folder / "cache", s3_endpoint=None,
                    ray_address=None)


def convert_folder(source: Path, target: Path, variants: list[str]) -> tuple[VariantOutcome, ...]:
    target.mkdir()
    spec = build_spec({
        "source": str(source), "variants": variants, "targets": [str(target)], "gates": OPEN_GATES,
        "calibration": {"samples": 8, "length": 64},
    }, "test")
    options = RunOptions(target.parent / "work", workers=1, inline=True)
    return convert(spec, settings_in(target.parent), options, NoSink())


def tokens() -> Tensor:
    return torch.randint(4, 4096, (1, 48), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def source_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return net(input_ids=tokens()).logits[0]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", DENSE)
def test_release_computes_what_its_report_states(name: str, tmp_path: Path) -> None:
    source = make_model(name, tmp_path / name)
    outcomes = convert_folder(source, tmp_path / "out", VARIANTS)
    expected = source_logits(source)
    errors = {}
    for outcome in outcomes:
        facts = outcome.facts
        (location,) = outcome.locations
        model = ReleaseModel(Path(location))
        model.attach()
        errors[facts.variant.name] = relative_error(model.logits(tokens()[0].tolist()), expected)
        # Errors of the linears add up through the blocks at worst like independent ones, amplified by nonlinearities.
        stated = math.sqrt(sum(module.relative_error**2 for module in facts.modules))
        assert 0 < errors[facts.variant.name] < 3 * stated, facts.variant.name
        assert all(module.bits == facts.variant.bits for module in facts.modules)
    assert errors["rtn-w8-g64"] < errors["gptq-w4-g64"] / 4
    assert errors["rtn-w8-g64"] < errors["awq-w4-g64"] / 4


def test_compressed_tensors_release_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (outcome,) = convert_folder(make_model("llama", tmp_path / "llama"), tmp_path / "out", ["gptq-w4-g64-ct"])
    (location,) = outcome.locations
    model = ReleaseModel(Path(location))
    model.attach()
    net = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = net(input_ids=tokens()).logits[0].float()
    assert relative_error(logits, model.logits(tokens()[0].tolist())) < 1e-2
