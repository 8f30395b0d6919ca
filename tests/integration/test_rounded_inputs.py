"""Variants whose inputs are rounded too: what is published, what is measured, and what compares it with engines.

The rounding is checked against compressed-tensors' own: transformers loads the published folder with it, and rounds
inputs in its linears.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import SpecError
from pipeline.spec import Activations, NumberType, build_spec
from pipeline.validate.release import ReleaseModel, check_release, read_facts
from tests.architectures import dense_net, make_model, published_net, source_net
from tests.integration.test_architectures import Converted, convert_folder, logits_of, relative_error, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = ("fp8-dynamic", "w8a8-int8", "rtn-w8a8", "rtn-w8-channel")
DENSE = ("llama", "gpt_neox")
MIXTURES = ("qwen3_moe",)


@pytest.fixture(scope="module", params=[*DENSE, *MIXTURES])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp(request.param)
    return convert_folder(make_model(request.param, root / request.param), root / "out", VARIANTS)


def release_logits(folder: Path) -> Tensor:
    """Return the logits of what engines are compared with."""
    model = ReleaseModel(folder)
    model.attach()
    return torch.stack([model.logits(ids) for ids in tokens().tolist()])


def weights_alone(folder: Path, converted: Converted, root: Path) -> Tensor:
    """Return the logits of plain transformers with the published weights and inputs that are not rounded."""
    if converted.source.name in DENSE:
        return logits_of(published_net(folder, converted.source))
    return logits_of(dense_net(folder, converted.source, root))


def test_every_linear_is_quantized_as_asked_and_the_release_checks_itself(converted: Converted) -> None:
    for variant, outcome in converted.outcomes.items():
        facts = outcome.facts
        assert {module.bits for module in facts.modules} == {8}
        assert facts.verdict.passed
        is_float = variant == "fp8-dynamic"
        assert (facts.variant.type is NumberType.FLOAT) == is_float
        worst = max(module.relative_error for module in facts.modules)
        assert 0 < worst < (0.05 if is_float else 0.02)
        checks = check_release(converted.folder(variant), facts, facts.generated_tokens)
        assert all(check.passed for check in checks), (variant, checks)


def test_what_engines_are_compared_with_rounds_inputs(converted: Converted, tmp_path: Path) -> None:
    for variant in VARIANTS:
        folder = converted.folder(variant)
        found, plain = release_logits(folder), weights_alone(folder, converted, tmp_path / variant)
        is_rounded = read_facts(folder).variant.activations is Activations.DYNAMIC
        difference = relative_error(found, plain)
        assert (difference > 1e-3) if is_rounded else (difference < 1e-4), variant


@pytest.mark.parametrize("converted", DENSE, indirect=True)
def test_plain_transformers_computes_the_same_with_its_own_rounding(converted: Converted, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for variant in ("fp8-dynamic", "rtn-w8a8"):
        folder = converted.folder(variant)
        theirs = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        ours, plain = release_logits(folder), weights_alone(folder, converted, tmp_path / variant)
        # Its scale for whole numbers reaches over 127.5 steps and ours, as vLLM's, over 127: other rounding errors.
        apart = 0.3 if variant == "fp8-dynamic" else 1.6
        assert relative_error(ours, theirs) < apart * relative_error(plain, theirs), variant
        expected = logits_of(source_net(converted.source))
        assert relative_error(ours, expected) == pytest.approx(relative_error(theirs, expected), rel=0.15)


@pytest.mark.parametrize("converted", DENSE, indirect=True)
def test_the_stated_divergence_is_that_of_rounded_inputs(converted: Converted) -> None:
    """Weights alone of rtn-w8-channel and rtn-w8a8 are the same. In a random mixture, tokens that are sent to other
    experts for a near tie decide."""
    outcomes = converted.outcomes
    same = ("rtn-w8-channel", "rtn-w8a8")
    (plain, rounded) = (outcomes[variant].facts for variant in same)
    assert [module.loss for module in plain.modules] == [module.loss for module in rounded.modules]
    assert plain.quality.kl < rounded.quality.kl


def test_scales_are_taken_up_and_stated(converted: Converted) -> None:
    for variant, outcome in converted.outcomes.items():
        has_scales = any(module.awq_exponent is not None for module in outcome.facts.modules)
        assert has_scales == (variant == "w8a8-int8"), variant


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"method": "rtn", "type": "float"}, "type float is for rounded inputs: set activations to dynamic"),
        ({"method": "gptq", "type": "float", "activations": "dynamic"}, "type float is for method rtn, not gptq"),
        ({"method": "rtn", "activations": "dynamic", "group_size": 64}, "activations dynamic is for group_size -1"),
        ({"method": "rtn", "activations": "dynamic", "bits": 4}, "activations dynamic is for bits 8, not 4"),
        ({"method": "rtn", "activations": "dynamic", "widths": {"re:down": 4}}, "activations dynamic has no widths"),
        ({"method": "rtn", "activations": "dynamic", "propagate": "quantized"}, "is for propagate float"),
        ({"method": "smoothquant", "bits": 8}, "method smoothquant makes inputs easier to round"),
        ("gptq-fp8", "type float is for method rtn, not gptq"),
        ("awq-w8a8", "is for method rtn or gptq or smoothquant or smoothquant-gptq, not awq"),
        ("w8a8", "none of w8a8-int8, fp8-dynamic"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(variant: Any, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        build_spec({"source": "x", "variants": [variant], "targets": ["out"]}, "test")
