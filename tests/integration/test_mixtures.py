"""Mixtures of experts: convert, read the published folder back, compare with the source.

As for dense architectures, the published tensors are unpacked by the project's reader, but run by a plain transformers
model, which merges the experts in its own way.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import PlanError
from pipeline.graph.build import make_variant_plan
from pipeline.graph.outline import open_folder
from pipeline.spec import Format, parse_variant
from pipeline.tensors.local import read_folder_index
from pipeline.tensors.reader import read_tensors
from tests.architectures import MIXTURES, dense_net, fuse_experts, make_model, net_of, source_net
from tests.integration.test_architectures import (
    ERROR_FACTOR,
    Converted,
    change_basis,
    convert_folder,
    logits_of,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = ("rtn-w8-g64", "gptq-w4-g64", "awq-w4-g64", "gptq-w4-g64-ct", "gptq-w4-g64-ct-trueseq")


@pytest.fixture(scope="module", params=MIXTURES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """One conversion of each mixture to all variants."""
    root = tmp_path_factory.mktemp(request.param)
    return convert_folder(make_model(request.param, root / request.param), root / "out", VARIANTS)


Routing = list[tuple[Tensor, ...]]


@contextmanager
def routed_as(net: Any, routing: Routing) -> Iterator[None]:
    """Within the context, routers of ``net`` say what ``routing`` says, in calling order; what they say is appended
    where that is empty."""
    is_recording, told = not routing, iter(list(routing))

    def hook(module: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if is_recording:
            routing.append(output)
        return output if is_recording else next(told)

    routers = [module for module in net.modules() if type(module).__name__.endswith(("TopKRouter", "TopkRouter"))]
    handles = [module.register_forward_hook(hook) for module in routers]
    assert handles
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_published_experts_compute_what_the_report_states(converted: Converted, tmp_path: Path) -> None:
    """Tokens go where the source sends them: one that is sent elsewhere for a near tie differs by more than what is
    rounded, and no report says how many there are."""
    net, routing, errors = source_net(converted.source), list[tuple[Tensor, ...]](), {}
    with routed_as(net, routing):
        expected = logits_of(net)
    for variant, outcome in converted.outcomes.items():
        facts = outcome.facts
        assert {module.bits for module in facts.modules} == {facts.variant.bits}
        net = dense_net(converted.folder(variant), converted.source, tmp_path / variant)
        with routed_as(net, routing):
            errors[variant] = relative_error(logits_of(net), expected)
        # On their own most tokens are sent where the source sends them.
        errors_T = (logits_of(net) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(errors_T.median()) < 2 * errors[variant]
        stated = math.sqrt(sum(module.relative_error**2 for module in facts.modules))
        assert 0 < errors[variant] < ERROR_FACTOR * stated, variant
    w8, *w4 = errors
    for variant in w4:
        assert errors[w8] < errors[variant] / 5


def test_all_experts_are_scaled_with_router_and_shared_experts(converted: Converted) -> None:
    facts = converted.outcomes["awq-w4-g64"].facts
    entering = [m for m in facts.modules if "experts" in m.name and not m.name.endswith(("down_proj", "w2"))]
    assert entering
    assert all(module.awq_exponent for module in entering)
    assert all(module.awq_exponent is not None for module in facts.modules if "expert" in module.name)
    routers = {name: reason for name, reason in facts.kept.items() if reason.startswith("router")}
    assert any(reason.endswith("follows activation-aware scales") for reason in routers.values())
    before = load_file(converted.source / "model.safetensors")
    folder = converted.folder("awq-w4-g64")
    after = read_tensors(folder, read_folder_index(folder), routers)
    changed = {name for name in routers if not torch.equal(before[name], after[name])}
    assert changed == {name for name, reason in routers.items() if reason.endswith("scales")}
    assert all(after[name].dtype == before[name].dtype for name in routers)


def test_every_expert_says_how_many_tokens_the_router_sent_to_it(converted: Converted) -> None:
    tokens_of_text, per_token = 16 * 64, 2
    for outcome in converted.outcomes.values():
        modules = outcome.facts.modules
        experts = [module for module in modules if ".experts." in module.name]
        assert all((module.expert_tokens is not None) == (module in experts) for module in modules)
        for block in {module.block for module in experts}:
            for leaf in {module.name.rpartition(".")[2] for module in experts}:
                own = [m.expert_tokens for m in experts if m.block == block and m.name.endswith(leaf)]
                assert sum(own) == tokens_of_text * per_token
        assert outcome.facts.calibration.experts == "all"
        assert not any(module.degradations for module in modules)


def test_compressed_tensors_release_loads_in_plain_transformers(converted: Converted, tmp_path: Path) -> None:
    """Which unpacks experts in the dtype of the scales, here bfloat16, whatever it is asked for."""
    from transformers import AutoModelForCausalLM

    for variant, outcome in converted.outcomes.items():
        if outcome.facts.variant.format is Format.COMPRESSED_TENSORS:
            folder = converted.folder(variant)
            net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            loaded = logits_of(torch.nn.Module.float(net))
            dense = logits_of(dense_net(folder, converted.source, tmp_path / variant, torch.bfloat16))
            assert relative_error(loaded, dense) < 1e-5, variant


def test_it_makes_no_difference_whether_the_source_holds_experts_in_one_tensor(tmp_path: Path) -> None:
    apart = make_model("qwen3_moe", tmp_path / "apart")
    fused = fuse_experts(Path(shutil.copytree(apart, tmp_path / "fused")))
    variant = "awq-w4-g64"
    made = [convert_folder(source, tmp_path / f"{source.name}-out", [variant]) for source in (apart, fused)]
    expected, found = (_tensors(own.folder(variant)) for own in made)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("experts", ["all", "routed", "shrinkage"])
def test_it_makes_no_difference_what_experts_are_solved_together(experts: str, tmp_path: Path) -> None:
    """As many as there are workers share a block's experts."""
    source, variants = make_model("qwen3_moe", tmp_path / "qwen3_moe"), ["awq-gptq-w4-g64", "gptq-w3-g64"]
    asked = {"experts": experts, "min_expert_tokens": 1}
    made = []
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        made.append(convert_folder(source, tmp_path / str(workers) / "out", variants, asked, workers=workers))
    for variant in variants:
        expected, found = (_tensors(own.folder(variant)) for own in made)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        one, other = (own.outcomes[variant].facts.modules for own in made)
        assert one == other


def _tensors(folder: Path) -> dict[str, Tensor]:
    index = read_folder_index(folder)
    return read_tensors(folder, index, index.entries)


def test_experts_in_one_tensor_are_quantized_all_or_the_variant_is_refused(tmp_path: Path) -> None:
    outline = open_folder(make_model("granitemoe", tmp_path / "granitemoe")).outline
    spec = parse_variant("gptq-w4-g64-ct").model_copy(update={"ignore": (r"re:experts\.1\.down_proj$",)})
    with pytest.raises(PlanError, match=r"cannot stay unquantized, .*all experts of its block.*experts\.1\.down_proj"):
        make_variant_plan(spec, outline)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("name", MIXTURES)
def test_activation_aware_scales_cancel(name: str, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    """In bfloat16 the router's weights are rounded once more, which sends some token elsewhere."""
    folder = make_model(name, tmp_path / name, dtype)
    source = open_folder(folder)
    expected = logits_of(source_net(folder))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    for index in range(source.outline.skeleton.num_blocks):
        folded, results = change_basis(source, index)
        experts = [r for r, g in zip(results, source.outline.groups[index], strict=True) if g.linears[0].expert]
        assert all(result.exponent for result in experts)
        stored = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
        follows = [f"{f}.weight" for r in results if r.producer for f in r.producer.followers]
        local = source.outline.skeleton.block_tensors(index)
        for follower in follows:
            folded[local[follower]] = folded[local[follower]].to(stored[local[follower]])
        tensors |= {name: tensor.float() for name, tensor in folded.items()}
    (tmp_path / "changed").mkdir()
    net = net_of(tensors, folder, tmp_path / "changed")
    errors_T = (logits_of(net) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors_T.max() if dtype is torch.float32 else errors_T.median()) < bound


UNSEEN = (2, 3)
"""The experts, a whole group, that the routers of `with_unseen_expert` send no token to."""


@pytest.fixture(scope="module")
def with_unseen_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model("deepseek_v3", tmp_path_factory.mktemp("unseen") / "unseen")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[list(UNSEEN)] = -100.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def is_unseen(module_name: str) -> bool:
    return any(f".experts.{number}." in module_name for number in UNSEEN)


def published_codes(found: Converted, variant: str, expert: int) -> dict[str, Tensor]:
    folder = found.folder(variant)
    index = read_folder_index(folder)
    names = [name for name in index.entries if f".experts.{expert}." in name and name.endswith("qweight")]
    return read_tensors(folder, index, names)


def test_an_expert_that_saw_no_token_is_rounded_and_counted_never_silently(
    with_unseen_expert: Path, tmp_path: Path
) -> None:
    (tmp_path / "strict").mkdir()
    asked = {"experts": "routed", "min_expert_tokens": 16}
    strict = convert_folder(with_unseen_expert, tmp_path / "strict" / "out", ["gptq-w4-g64"], asked)
    (refused,) = strict.outcomes.values()
    assert refused.locations == ()
    assert [check.name for check in refused.facts.verdict.failures] == ["degradations"]
    open_gates = {"max_degradations": None}
    variants = ["gptq-w4-g64", "rtn-w4-g64-gptq"]
    found = convert_folder(with_unseen_expert, tmp_path / "out", variants, asked, open_gates)
    facts = found.outcomes["gptq-w4-g64"].facts
    assert facts.calibration.experts == "routed"
    assert facts.calibration.min_expert_tokens == 16
    for module in facts.modules:
        assert (module.expert_tokens == 0) == is_unseen(module.name)
        few = module.expert_tokens is not None and module.expert_tokens < 16
        assert bool(module.degradations) == few, module
        assert any("rounded to nearest" in text for text in module.degradations) == is_unseen(module.name)
    # What the report says is what was done: the codes are those of plain rounding, and only there.
    gptq, rtn = (published_codes(found, variant, UNSEEN[0]) for variant in variants)
    assert len(gptq) == 6
    assert all(torch.equal(codes, rtn[name]) for name, codes in gptq.items())
    gptq, rtn = (published_codes(found, variant, UNSEEN[0] - 1) for variant in variants)
    assert not any(torch.equal(codes, rtn[name]) for name, codes in gptq.items())
    card = (found.folder("gptq-w4-g64") / "README.md").read_text()
    assert "the router sent no calibration token to this expert: it was rounded to nearest" in card


@pytest.mark.parametrize("mode", ["all", "shrinkage"])
def test_an_unseen_expert_has_statistics_of_all_tokens_in_the_other_modes(
    mode: str, with_unseen_expert: Path, tmp_path: Path
) -> None:
    variants = ["gptq-w4-g64", "rtn-w4-g64-gptq"]
    asked = {"experts": mode, "min_expert_tokens": 1}
    found = convert_folder(with_unseen_expert, tmp_path / "out", variants, asked, {"max_degradations": None})
    facts = found.outcomes["gptq-w4-g64"].facts
    assert [m.name for m in facts.modules if m.expert_tokens == 0] == [
        m.name for m in facts.modules if is_unseen(m.name)
    ]
    texts = {text for module in facts.modules for text in module.degradations}
    said = {"the router sent no calibration token to this expert: its statistics are those of all tokens"}
    assert texts == (said if mode == "shrinkage" else set())
    gptq, rtn = (published_codes(found, variant, UNSEEN[0]) for variant in variants)
    assert not any(torch.equal(codes, rtn[name]) for name, codes in gptq.items())


@pytest.mark.parametrize("mode", ["routed", "shrinkage"])
def test_experts_with_statistics_of_their_own_compute_what_the_report_states(mode: str, tmp_path: Path) -> None:
    source = make_model("qwen3_moe", tmp_path / "qwen3_moe")
    asked = {"experts": mode, "min_expert_tokens": 16}
    found = convert_folder(source, tmp_path / "out", ["gptq-w4-g64", "awq-w4-g64"], asked)
    net, routing = source_net(source), list[tuple[Tensor, ...]]()
    with routed_as(net, routing):
        expected = logits_of(net)
    for variant, outcome in found.outcomes.items():
        stated = math.sqrt(sum(module.relative_error**2 for module in outcome.facts.modules))
        net = dense_net(found.folder(variant), source, tmp_path / variant)
        with routed_as(net, routing):
            assert 0 < relative_error(logits_of(net), expected) < ERROR_FACTOR * stated, variant
    # The norm is before all experts and cannot take up a scale of each: said, not hidden.
    facts = found.outcomes["awq-w4-g64"].facts
    unscaled = [m for m in facts.modules if m.awq_exponent is None]
    assert {m.name.rpartition(".")[2] for m in unscaled} == {"gate_proj", "up_proj"}
    assert any(
        caution.startswith(f"{len(unscaled)} of {len(facts.modules)} linears have no") for caution in facts.cautions
    )
