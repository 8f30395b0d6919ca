"""Statistics behind blocks that are quantized already: what is stated of a linear is what its inputs there give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.calibrate.tokens import Text, take_tokens
from pipeline.skeleton.tokenizer import TextTokenizer
from tests.architectures import TOKENIZER_FOLDER, make_model, published_net, source_net
from tests.integration.test_architectures import Converted, convert_folder

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("gptq-w3-g64-ct", "rtn-w3-g64-ct")
SAMPLES, LENGTH = 16, 64


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("schedules")
    variants = [*METHODS, *(f"{method}-seq" for method in METHODS), "awq-w4-g64", "awq-w4-g64-seq"]
    return convert_folder(make_model("llama", root / "llama"), root / "out", variants, precision="float32")


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
def errors_of(folder: Path, source: Path, tokens_NL: Tensor, *, is_behind_own: bool) -> dict[str, float]:
    """Return the mean squared output error of every linear by what transformers makes of the tokens: on what it reads
    in the source, or behind the published blocks."""
    published, net = published_net(folder, source), source_net(source)
    errors = {}
    for block, layer in enumerate(net.model.layers):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        inputs = inputs_of(net, linears, tokens_NL)
        for name, module in linears.items():
            delta_OI = published.model.layers[block].get_submodule(name).weight - module.weight
            errors[f"model.layers.{block}.{name}"] = float((inputs[name] @ delta_OI.T).square().sum(-1).mean())
        if is_behind_own:
            layer.load_state_dict(published.model.layers[block].state_dict())
    return errors


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_of_what_linears_read_behind_their_own_blocks(converted: Converted, method: str) -> None:
    tokens_NL, differences = calibration_tokens(converted), []
    for name, is_behind_own in ((method, False), (f"{method}-seq", True)):
        stated = {module.name: module.loss for module in converted.outcomes[name].facts.modules}
        folder = converted.folder(name)
        found = errors_of(folder, converted.source, tokens_NL, is_behind_own=is_behind_own)
        assert stated == pytest.approx(found, rel=1e-3)
        other = errors_of(folder, converted.source, tokens_NL, is_behind_own=not is_behind_own)
        differences += [abs(stated[linear] / other[linear] - 1) for linear in stated if ".layers.0." not in linear]
    # Else nothing would have been told apart.
    assert max(differences) > 0.01


def test_the_first_block_is_the_same_and_the_others_are_not(converted: Converted) -> None:
    for method in (*METHODS, "awq-w4-g64"):
        errors = [
            {module.name: module.loss for module in converted.outcomes[name].facts.modules}
            for name in (method, f"{method}-seq")
        ]
        same = {name for name, loss in errors[0].items() if errors[1][name] == loss}
        assert same == {name for name in errors[0] if ".layers.0." in name}


def test_every_variant_says_what_it_was_calibrated_behind(converted: Converted) -> None:
    for name, outcome in converted.outcomes.items():
        assert outcome.facts.verdict.passed, name
        assert outcome.facts.variant.propagate == ("quantized" if name.endswith("-seq") else "float")
