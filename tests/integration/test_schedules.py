"""Statistics behind blocks that are quantized already: what is stated of a linear is what its inputs there give."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.calibrate.tokens import Text, take_tokens
from pipeline.errors import SpecError
from pipeline.publish.card import render_card
from pipeline.publish.reproduce import reproduce_spec
from pipeline.skeleton.tokenizer import TextTokenizer
from pipeline.spec import build_spec, parse_variant
from tests.architectures import TOKENIZER_FOLDER, make_model, published_net, source_net
from tests.integration.test_architectures import Converted, convert_folder

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("gptq-w3-g64-ct", "rtn-w3-g64-ct")
SCALED = ("awq-w4-g64", "awq-gptq-w4-g64")
SAMPLES, LENGTH = 16, 64
STEPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a block in the order of their calls, those together that read the same."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("schedules")
    plain = [
        {**parse_variant(f"{method}-{suffix}").model_dump(), "name": f"{method}-{suffix}-plain", "compensation": 0}
        for method in METHODS
        for suffix in ("seq", "twopass", "trueseq")
    ]
    behind = [f"{method}-{suffix}" for method in (*METHODS, *SCALED) for suffix in ("seq", "twopass")]
    behind += [f"{method}-trueseq" for method in METHODS]
    refined = [
        {**parse_variant(method).model_dump(), "name": f"{method}-refined", "refinement": 4}
        for method in (*METHODS, *SCALED)
    ]
    variants: list[str | dict[str, Any]] = [*METHODS, *SCALED, *behind, *plain, *refined]
    # With two blocks the second one would read the same behind the first one's first and only form.
    source = make_model("llama", root / "llama", num_hidden_layers=3)
    return convert_folder(source, root / "out", variants, precision="float32")


def calibration_tokens(converted: Converted) -> Tensor:
    text = (converted.source.parent / "text.txt").read_text()
    return take_tokens(Text(text, "text"), TextTokenizer(TOKENIZER_FOLDER).encode, SAMPLES, LENGTH).tokens_NL


def inputs_of(net: Any, linears: Mapping[str, torch.nn.Module], tokens_NL: Tensor) -> dict[str, Tensor]:
    """Return what linears read [tokens, in_features], by name, while a model is given tokens."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: inputs.update({name: args[0].flatten(0, 1)})

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in linears.items()]
    net(input_ids=tokens_NL)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def errors_of(folder: Path, source: Path, tokens_NL: Tensor, behind: Path) -> dict[str, float]:
    """Return the mean squared output error of every linear of a release by what transformers makes of the tokens, on
    what it reads behind the earlier blocks of another model."""
    published, net = published_net(folder, source), source_net(source)
    before = source_net(source) if behind == source else published_net(behind, source)
    errors = {}
    for block, layer in enumerate(net.model.layers):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        inputs = inputs_of(net, linears, tokens_NL)
        for name, module in linears.items():
            delta_OI = published.model.layers[block].get_submodule(name).weight - module.weight
            errors[f"model.layers.{block}.{name}"] = float((inputs[name] @ delta_OI.T).square().sum(-1).mean())
        layer.load_state_dict(before.model.layers[block].state_dict())
    return errors


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_of_what_linears_read_behind_their_own_blocks(converted: Converted, method: str) -> None:
    tokens_NL, source = calibration_tokens(converted), converted.source
    behind = {method: source}
    for suffix, before in (("seq", f"{method}-seq-plain"), ("twopass", method)):
        behind[f"{method}-{suffix}-plain"] = converted.folder(before)
    for name, folder in behind.items():
        stated = {module.name: module.loss for module in converted.outcomes[name].facts.modules}
        assert stated == pytest.approx(errors_of(converted.folder(name), source, tokens_NL, folder), rel=1e-3)
        others = [errors_of(converted.folder(name), source, tokens_NL, other) for other in behind.values()]
        # Else nothing would have been told apart.
        assert sum(stated != pytest.approx(other, rel=1e-2) for other in others) == len(set(behind.values())) - 1


@pytest.mark.parametrize("method", [*METHODS, *SCALED])
def test_refinement_lowers_the_error_of_what_a_method_found(converted: Converted, method: str) -> None:
    plain, refined = (converted.outcomes[f"{method}{suffix}"].facts for suffix in ("", "-refined"))
    before, after = ({module.name: module.loss for module in facts.modules} for facts in (plain, refined))
    assert all(after[name] <= before[name] for name in before)
    assert sum(after.values()) < 0.98 * sum(before.values())
    assert all(1 <= module.refinement_rounds <= 4 for module in refined.modules)
    assert not any(module.refinement_rounds for module in plain.modules)
    num_tokens = calibration_tokens(converted).numel()
    for module in (*plain.modules, *refined.modules):
        assert (module.tokens, module.dead_inputs) == (num_tokens, 0)
        assert module.clip is not None
        assert 0.5 < module.clip < 1.05
    assert "and refinement" in render_card(refined)
    if method in METHODS:
        tokens_NL, source = calibration_tokens(converted), converted.source
        assert after == pytest.approx(
            errors_of(converted.folder(f"{method}-refined"), source, tokens_NL, source), rel=1e-3
        )


@torch.no_grad()
def errors_in_turn(folder: Path, source: Path, tokens_NL: Tensor) -> dict[str, float]:
    """Return the mean squared output error of every linear of a release on what it reads behind all those of it
    that are called before."""
    published, net = published_net(folder, source), source_net(source)
    errors = {}
    for block, layer in enumerate(net.model.layers):
        for step in STEPS:
            linears = {name: layer.get_submodule(name) for name in step}
            inputs = inputs_of(net, linears, tokens_NL)
            for name, module in linears.items():
                quantized_OI = published.model.layers[block].get_submodule(name).weight
                error_NO = inputs[name] @ (quantized_OI - module.weight).T
                errors[f"model.layers.{block}.{name}"] = float(error_NO.square().sum(-1).mean())
                module.weight.copy_(quantized_OI)
    return errors


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_of_what_linears_read_behind_all_before_them(converted: Converted, method: str) -> None:
    tokens_NL, source = calibration_tokens(converted), converted.source
    stated, blockwise = (
        {module.name: module.loss for module in converted.outcomes[f"{method}-{suffix}-plain"].facts.modules}
        for suffix in ("trueseq", "seq")
    )
    found = errors_in_turn(converted.folder(f"{method}-trueseq-plain"), source, tokens_NL)
    assert stated == pytest.approx(found, rel=1e-3)
    own = errors_of(converted.folder(f"{method}-trueseq-plain"), source, tokens_NL, source)
    # Else nothing would have been told apart: what reads behind nothing quantized is the same, all others are not.
    first = {f"model.layers.0.{name}" for name in STEPS[0]}
    assert {name for name in stated if stated[name] == pytest.approx(own[name], rel=1e-4)} == first
    assert {name for name in stated if stated[name] == blockwise[name]} == first


@torch.no_grad()
def distance_from_source(folder: Path, source: Path, tokens_NL: Tensor) -> dict[str, float]:
    """Return the mean squared difference of what every linear gives in the source and in the published model."""
    nets = source_net(source), published_net(folder, source)
    named = [
        {name: module for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)} for net in nets
    ]
    inputs = [inputs_of(net, own, tokens_NL) for net, own in zip(nets, named, strict=True)]
    outputs = [{name: read[name] @ own[name].weight.T for name in own} for own, read in zip(named, inputs, strict=True)]
    return {name: float((outputs[1][name] - outputs[0][name]).square().sum(-1).mean()) for name in named[0]}


@pytest.mark.parametrize("schedule", ["seq", "trueseq"])
@pytest.mark.parametrize("method", METHODS)
def test_compensation_brings_outputs_nearer_to_the_source_s(converted: Converted, method: str, schedule: str) -> None:
    tokens_NL = calibration_tokens(converted)
    plain, compensated = (
        distance_from_source(converted.folder(f"{method}-{suffix}"), converted.source, tokens_NL)
        for suffix in (f"{schedule}-plain", schedule)
    )
    behind = [name for name in plain if ".layers.1." in name]
    assert len(behind) == 7
    assert sum(compensated[name] for name in behind) < 0.97 * sum(plain[name] for name in behind)


def test_the_first_block_is_the_same_and_the_others_are_not(converted: Converted) -> None:
    for method, suffix in itertools.product((*METHODS, *SCALED), ("seq", "twopass")):
        errors = [
            {module.name: module.loss for module in converted.outcomes[name].facts.modules}
            for name in (method, f"{method}-{suffix}")
        ]
        same = {name for name, loss in errors[0].items() if errors[1][name] == loss}
        assert same == {name for name in errors[0] if ".layers.0." in name}


def test_every_variant_passes_and_says_what_it_was_calibrated_behind(converted: Converted) -> None:
    for name, outcome in converted.outcomes.items():
        assert outcome.facts.verdict.passed, name
        schedule = {"seq": "quantized", "twopass": "two-pass", "trueseq": "true-sequential"}.get(
            name.removesuffix("-plain").rpartition("-")[2], "float"
        )
        assert outcome.facts.variant.propagate == schedule
        card = render_card(outcome.facts)
        assert ("of the way to those that give the source's outputs" in card) is name.endswith(("-seq", "-trueseq"))


def test_experts_that_see_some_tokens_only_are_refused() -> None:
    spec = {"source": "x", "targets": ["y"], "variants": ["gptq-w4-g64-seq"], "calibration": {"experts": "routed"}}
    with pytest.raises(SpecError, match=r"gptq-w4-g64-seq compares .* set calibration.experts to all"):
        build_spec(spec, "test")
    plain = {"name": "plain", "method": "gptq", "propagate": "quantized", "compensation": 0}
    assert build_spec({**spec, "variants": [plain]}, "test").variants[0].name == "plain"


def test_a_share_of_correlations_that_was_asked_for_is_taken_and_said(converted: Converted, tmp_path: Path) -> None:
    method, tokens_NL = METHODS[0], calibration_tokens(converted)
    found = converted.outcomes[method].facts
    shares = {module.name.removeprefix("model.layers."): module.shrinkage for module in found.modules}
    assert all(0 < share < 1 for share in shares.values())
    # Found for each input: what reads the same one has the same.
    assert shares["0.self_attn.q_proj"] == shares["0.self_attn.v_proj"] != shares["0.self_attn.o_proj"]
    assert found.calibration.shrinkage == "auto"
    assert "put down to chance" in render_card(found)
    totals = [sum(module.loss for module in found.modules)]
    for share in (0.0, 0.25):
        again = convert_folder(
            converted.source, tmp_path / str(share), [method], precision="float32", calibration={"shrinkage": share}
        )
        facts = again.outcomes[method].facts
        assert {module.shrinkage for module in facts.modules} == {share}
        assert ("put down to chance" in render_card(facts)) == (share > 0)
        assert f"shrinkage: {share}" in (reproduce_spec(facts) or "")
        stated = {module.name: module.loss for module in facts.modules}
        source = converted.source
        assert stated == pytest.approx(errors_of(again.folder(method), source, tokens_NL, source), rel=1e-3)
        totals.append(sum(stated.values()))
    # These tokens themselves lose least when codes are fitted to all that they show.
    assert totals[1] < min(totals[0], totals[2])
