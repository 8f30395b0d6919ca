"""Every architecture: convert, read the published folder back, compare with the source.

The published tensors are unpacked by the project's reader, but run by a plain transformers model, so a mistake in how
blocks are run cannot hide one in what was written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.calibrate.tokens import BUILTIN_FILES, load_text
from pipeline.graph import assemble
from pipeline.graph.convert import RunOptions, VariantOutcome, convert
from pipeline.graph.folds import ScaleResult, fold_block, search_group_scales
from pipeline.graph.outline import Source, open_folder
from pipeline.quantize.solve import SolveOptions
from pipeline.quantize.types import Scheme, Statistics
from pipeline.settings import Settings
from pipeline.skeleton.groups import LinearGroup
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.spec import Format, build_spec
from tests.architectures import DENSE, TOKENIZER_FOLDER, drop_prefix, make_model, published_net, source_net
from tests.factories import OPEN_GATES

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = ("rtn-w8-g128", "gptq-w4-g64", "awq-w4-g64")
TRANSPOSED_VARIANTS = ("rtn-w8-g128-gptq", "gptq-w4-g64", "awq-w4-g64-gptq")
"""GPT-2's linears are stored transposed, which only format gptq has loaders for."""
LLAMA_ONLY = ("gptq-w4-g64-ct", "awq-w4-g64-ct-sym", "awq-gptq-w4-g64")

ERROR_FACTOR = 2.0
"""Logit error that is allowed over the root of the sum of squares of the linears' stated relative errors. The stated
errors are relative to each linear's own output on the calibration text. If they were independent and each block added
as much as the residual stream holds, the factor would be 1. Text that was not calibrated on, and fused projections,
which count once for two or three, give up to 1.5 here."""

GATES = {
    **OPEN_GATES,
    "max_degradations": 0,
    "heldout_samples": 2,
    "heldout_length": 32,
    "generated_tokens": 8,
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


@pytest.fixture(scope="module", params=DENSE)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """One conversion of each architecture to all variants."""
    name: str = request.param
    root = tmp_path_factory.mktemp(name)
    variants = [*(TRANSPOSED_VARIANTS if name == "gpt2" else VARIANTS), *(LLAMA_ONLY if name == "llama" else ())]
    return convert_folder(make_model(name, root / name), root / "out", variants)


def convert_folder(
    source: Path,
    target: Path,
    variants: Sequence[str | dict[str, Any]],
    calibration: dict[str, Any] | None = None,
    gates: dict[str, Any] | None = None,
    *,
    workers: int = 1,
    **more: Any,
) -> Converted:
    target.mkdir()
    settings = Settings("http://127.0.0.1:9", None, target.parent / "cache", s3_endpoint=None, ray_address=None)
    text = target.parent / "text.txt"
    text.write_text(load_text("builtin", "calibration", 0, settings).content[:40_000])
    spec = build_spec(
        {
            "source": str(source),
            "variants": list(variants),
            "targets": [str(target)],
            "gates": {**GATES, "heldout": str(text), **(gates or {})},
            "calibration": {"text": str(text), "samples": 16, "length": 64, **(calibration or {})},
            **more,
        },
        "test",
    )
    options = RunOptions(target.parent / "work", workers=workers, inline=True)
    with pytest.MonkeyPatch.context() as patch:
        # Drawing takes longer than converting a model of this size, and has tests of its own.
        patch.setattr(assemble, "plot_layer_error", lambda facts: b"")
        patch.setattr(assemble, "plot_size_quality", lambda facts: b"")
        outcomes = convert(spec, settings, options, NoSink())
    return Converted(source, {outcome.facts.variant.name: outcome for outcome in outcomes})


@cache
def tokens() -> Tensor:
    """Return tokens [2, 48] of a text that calibration has not seen."""
    text = resources.files("pipeline.calibrate") / "data" / BUILTIN_FILES["heldout"]
    ids = TextTokenizer(TOKENIZER_FOLDER).encode(text.read_text(encoding="utf-8")[:2000])
    return torch.tensor(ids[:96]).view(2, 48)


@torch.no_grad()
def logits_of(net: Any) -> Tensor:
    logits: Tensor = net.eval()(input_ids=tokens()).logits
    return logits.float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_published_weights_compute_what_the_report_states(converted: Converted) -> None:
    expected = logits_of(source_net(converted.source))
    errors = {}
    for variant, outcome in converted.outcomes.items():
        facts = outcome.facts
        assert {module.bits for module in facts.modules} == {facts.variant.bits}
        assert any(module.awq_exponent for module in facts.modules) == variant.startswith("awq"), "nothing was scaled"
        found = logits_of(published_net(converted.folder(variant), converted.source))
        errors[variant] = relative_error(found, expected)
        stated = math.sqrt(sum(module.relative_error**2 for module in facts.modules))
        assert 0 < errors[variant] < ERROR_FACTOR * stated, variant
    w8, *w4 = list(errors)[:3]
    for variant in w4:
        assert errors[w8] < errors[variant] / 5


def test_compressed_tensors_release_loads_in_plain_transformers(converted: Converted) -> None:
    from transformers import AutoModelForCausalLM

    # Asymmetric ones are not tried: compressed-tensors 0.20 packs zero points but prepares unpacked ones for loading.
    variants = [
        name
        for name, outcome in converted.outcomes.items()
        if outcome.facts.variant.format is Format.COMPRESSED_TENSORS and outcome.facts.variant.symmetric
    ]
    assert bool(variants) == (converted.source.name != "gpt2")
    for variant in variants:
        folder = converted.folder(variant)
        loaded = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        dense = logits_of(published_net(folder, converted.source))
        assert relative_error(loaded, dense) < 1e-5, variant


@pytest.mark.parametrize(("name", "prefix"), [("llama", "model."), ("gemma3_vlm", "")])
def test_ignored_linears_stay_dense_in_plain_transformers_whatever_the_checkpoint_calls_them(
    name: str, prefix: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = drop_prefix(make_model(name, tmp_path / name, tie_word_embeddings=True), prefix)
    names = open_folder(source).outline.skeleton.names
    assert not [model for model, stored in names.items() if "layers.0" in model and model == stored], "not renamed"
    variants = [
        {"name": "one-grid", "method": "rtn", "bits": 8, "group_size": 64, "ignore": ["re:down_proj$"]},
        {"name": "two-grids", "method": "rtn", "bits": 8, "group_size": 256, "ignore": ["re:o_proj$"]},
    ]
    found = convert_folder(source, tmp_path / "out", variants)
    for variant, outcome in found.outcomes.items():
        kept = [module.name for module in outcome.facts.modules if module.note and not module.group_size]
        assert len(kept) == 2, variant
        folder = found.folder(variant)
        loaded = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        dense = logits_of(published_net(folder, source))
        assert relative_error(loaded, dense) < 1e-5, variant


def uneven_statistics(group: LinearGroup, seed: int) -> Statistics:
    """Return statistics of inputs whose channels differ by orders of magnitude, so that scaling pays."""
    size_I = torch.exp(1.5 * torch.randn(group.in_features, generator=torch.Generator().manual_seed(seed)))
    return Statistics(torch.diag(size_I.square()) * 1000, size_I * 1000, size_I * 4, 1000)


def change_basis(source: Source, index: int) -> tuple[dict[str, Tensor], list[ScaleResult]]:
    """Return a block's tensors (by checkpoint name) after activation-aware scaling, with nothing rounded to codes."""
    skeleton, groups, weights = source.outline.skeleton, source.outline.groups[index], source.block(index)
    scheme, options = Scheme(4, 64, symmetric=False), SolveOptions(clip_search=False)
    with skeleton.attached(index, weights):
        results = [
            search_group_scales(skeleton, group, weights, uneven_statistics(group, position), scheme, options)
            for position, group in enumerate(groups)
        ]
    folded = fold_block(weights, results)
    for group, result in zip(groups, results, strict=True):
        for linear in group.linears:
            name = linear.local_name + ".weight"
            folded[name] = linear.to_rows((linear.to_rows(folded[name].float()) * result.scale_I).contiguous())
    names = skeleton.block_tensors(index)
    return {names[local]: tensor for local, tensor in folded.items()}, results


# Scales are derived from the rounded norm weight, so only norm biases (OPT, GPT-NeoX, GPT-2) are rounded in bfloat16.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("name", DENSE)
def test_activation_aware_scales_cancel_exactly(name: str, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    folder = make_model(name, tmp_path / name, dtype)
    source = open_folder(folder)
    net = source_net(folder)
    expected = logits_of(net)
    model_names = {stored: model for model, stored in source.outline.skeleton.names.items()}
    scaled = 0
    for index in range(source.outline.skeleton.num_blocks):
        tensors, results = change_basis(source, index)
        scaled += sum(bool(result.exponent) and not torch.equal(result.scale_I, torch.ones(())) for result in results)
        net.load_state_dict({model_names[stored]: tensor.float() for stored, tensor in tensors.items()}, strict=False)
    changed = logits_of(net)
    assert scaled >= 4
    assert relative_error(changed, expected) < bound
