"""Gradients block by block are those of the whole model, and say what small errors cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.calibrate.sensitivity import output_sensitivity
from pipeline.errors import CalibrationError
from pipeline.graph.outline import Source, open_folder
from pipeline.precision import Precision
from tests.architectures import make_model, source_net

LENGTH = 24


def open_model(kind: str, folder: Path) -> Source:
    return open_folder(make_model(kind, folder / kind), "cpu", {})


def local_names(source: Source) -> list[list[str]]:
    return [[linear.local_name for group in block for linear in group.linears] for block in source.outline.groups]


def tokens_of(source: Source, sequences: int) -> Tensor:
    drawn = torch.Generator().manual_seed(3)
    return torch.randint(0, source.outline.vocabulary_size, (sequences, LENGTH), generator=drawn)


def sensitivity(source: Source, tokens_NL: Tensor, seed: int = 0) -> dict[tuple[int, str], Tensor]:
    skeleton = source.outline.skeleton
    size = source.outline.vocabulary_size
    with skeleton.outer_attached(source.outer()):
        return output_sensitivity(skeleton, tokens_NL, source.block, local_names(source), size, Precision.FLOAT32, seed)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mixtral", "opt"])
def test_they_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """The oracle differentiates transformers' own model at once, for the same drawn tokens."""
    source = open_model(kind, tmp_path)
    tokens_NL = tokens_of(source, 2)
    found = sensitivity(source, tokens_NL)
    net = source_net(tmp_path / kind)
    outputs: dict[str, Tensor] = {}
    prefix = source.outline.skeleton.block_names
    for index, name in found:
        path = f"{prefix[index]}.{name}"
        try:
            module = net.get_submodule(path)
        except AttributeError:
            continue  # an expert: transformers' own model holds them in one tensor
        module.register_forward_hook(lambda m, a, output, path=path: outputs.__setitem__(path, output))
    assert len(found) >= 8
    drawn = torch.Generator().manual_seed(0)
    expected: dict[str, Tensor] = {}
    for parameter in net.parameters():
        parameter.requires_grad_()
    for row in tokens_NL:
        logits_LV = net(input_ids=row[None], use_cache=False).logits[0].float()
        p_LV = torch.softmax(logits_LV.detach(), dim=-1)
        token_L = torch.multinomial(p_LV, 1, generator=drawn)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits_LV, token_L, reduction="sum")
        for path, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            total_O = gradient.flatten(0, -2).square().sum(0)
            expected[path] = expected.get(path, torch.zeros_like(total_O)) + total_O
    compared = {path: found[index, name] for index, name in found if (path := f"{prefix[index]}.{name}") in expected}
    assert len(compared) >= 4
    for path, total_O in compared.items():
        assert torch.allclose(total_O, expected[path], rtol=2e-3, atol=1e-6 * float(total_O.max())), path


def test_small_errors_cost_what_they_say(tmp_path: Path) -> None:
    """Noise on one linear's output: the divergence is half its squared size, weighed by the mean squared gradient."""
    source = open_model("llama", tmp_path)
    tokens_NL = tokens_of(source, 24)
    found = sensitivity(source, tokens_NL)
    net, drawn, size = source_net(tmp_path / "llama"), torch.Generator().manual_seed(1), 0.02
    with torch.no_grad():
        before = torch.log_softmax(net(input_ids=tokens_NL).logits.float(), dim=-1)
        for index, name in [(0, "self_attn.v_proj"), (0, "mlp.down_proj"), (1, "mlp.up_proj"), (1, "self_attn.o_proj")]:
            module = net.get_submodule(f"{source.outline.skeleton.block_names[index]}.{name}")
            handle = module.register_forward_hook(
                lambda m, a, output: output + size * torch.randn(output.shape, generator=drawn)
            )
            after = torch.log_softmax(net(input_ids=tokens_NL).logits.float(), dim=-1)
            handle.remove()
            kl = float((before.exp() * (before - after)).sum(-1).mean())
            predicted = 0.5 * size**2 * float(found[index, name].sum()) / tokens_NL.numel()
            assert kl == pytest.approx(predicted, rel=0.25), name


def test_they_repeat_for_a_seed(tmp_path: Path) -> None:
    source = open_model("llama", tmp_path)
    tokens_NL = tokens_of(source, 1)
    first, again, other = (sensitivity(source, tokens_NL, seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_block_without_gradients_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model("llama", tmp_path)
    kind = type(source.outline.skeleton.block(1))
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: plain(*args, **kwargs).detach())
    with pytest.raises(CalibrationError, match="block 1 of LlamaForCausalLM gives no gradients") as caught:
        sensitivity(source, tokens_of(source, 1))
    assert caught.value.code == "calibration.no_gradient"
