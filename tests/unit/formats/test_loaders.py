"""What is known of the loaders, against the loaders' own code where this environment has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import nn
from transformers import initialization
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from pipeline.formats.loaders import (
    FUSED_EXPERTS,
    INITIALIZED,
    LOADED_BY_VLLM,
    OWN_LINEARS,
    REORDERED_BY_VLLM,
    SCALED_ACTIVATIONS,
    TRANSPOSED,
    Contents,
    Limit,
    Loader,
    limits,
)
from pipeline.spec import PER_CHANNEL, Format, VariantSpec, parse_variant
from tests.architectures import DENSE
from tests.factories import make_facts, make_module

CONFIGS: dict[str, Any] = {
    "BloomForCausalLM": lambda: t.BloomConfig(n_layer=1),
    "FalconForCausalLM": lambda: t.FalconConfig(num_hidden_layers=1),
    "GPT2LMHeadModel": lambda: t.GPT2Config(n_layer=1),
    "GPTBigCodeForCausalLM": lambda: t.GPTBigCodeConfig(n_layer=1),
    "GPTJForCausalLM": lambda: t.GPTJConfig(n_layer=1),
    "GPTNeoXForCausalLM": lambda: t.GPTNeoXConfig(num_hidden_layers=1),
    "Gemma3ForCausalLM": lambda: t.Gemma3TextConfig(num_hidden_layers=1, layer_types=["full_attention"]),
    "LlamaForCausalLM": lambda: t.LlamaConfig(num_hidden_layers=1),
    "MistralForCausalLM": lambda: t.MistralConfig(num_hidden_layers=1),
    "ModernBertDecoderForCausalLM": lambda: t.ModernBertDecoderConfig(num_hidden_layers=1),
    "MptForCausalLM": lambda: t.MptConfig(n_layers=1),
    "NanoChatForCausalLM": lambda: t.NanoChatConfig(num_hidden_layers=1),
    "OPTForCausalLM": lambda: t.OPTConfig(num_hidden_layers=1),
    "Phi3ForCausalLM": lambda: t.Phi3Config(num_hidden_layers=1),
    "Qwen2ForCausalLM": lambda: t.Qwen2Config(num_hidden_layers=1),
    "Qwen3ForCausalLM": lambda: t.Qwen3Config(num_hidden_layers=1),
    "Starcoder2ForCausalLM": lambda: t.Starcoder2Config(num_hidden_layers=1),
}
"""One block each, on the meta device: what the project says it converts and what the tables name."""


class Packed(nn.Module):
    """A packed linear as the model's class sees it: it has no weight."""

    bias = None


def model(architecture: str) -> Any:
    with torch.device("meta"):
        net = t.AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    assert type(net).__name__ == architecture
    return net


def block_linears(net: Any) -> dict[str, nn.Module]:
    """Return the linears inside the decoder blocks by full name."""
    numbered = {name: module for name, module in net.named_modules() if any(part == "0" for part in name.split("."))}
    return {name: module for name, module in numbered.items() if isinstance(module, nn.Linear | Conv1D)}


def initializes_packed_linears(net: Any) -> bool:
    with torch.no_grad(), initialization.guard_torch_init_functions():
        for module in net.modules():
            try:
                net._init_weights(module)
            except AttributeError as error:
                if "'Packed' object has no attribute 'weight'" not in str(error):
                    raise
                return True
    return False


def leaves_asked_for_weights(net: Any) -> set[str]:
    """Return the last name parts of linears whose weight the class wants to initialize when they have none."""
    linears, asked = block_linears(net), set()
    for leaf in {name.rpartition(".")[2] for name in linears}:
        chosen = {name: module for name, module in linears.items() if name.endswith(f".{leaf}")}
        for name in chosen:
            net.set_submodule(name, Packed())
        if initializes_packed_linears(net):
            asked.add(leaf)
        for name, module in chosen.items():
            net.set_submodule(name, module)
    return asked


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_the_table_names_what_classes_of_transformers_ask_for_weights(architecture: str) -> None:
    assert leaves_asked_for_weights(model(architecture)) == INITIALIZED.get(architecture, frozenset())


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_the_tables_name_the_architectures_with_other_linears(architecture: str) -> None:
    kinds = {type(module) for module in block_linears(model(architecture)).values()}
    assert (not kinds <= {nn.Linear, Conv1D}) == (architecture in OWN_LINEARS)
    assert (Conv1D in kinds) == (architecture in TRANSPOSED)


def test_the_table_names_the_architectures_whose_activations_transformers_scales() -> None:
    # RefinedWebModel is Falcon under its older name, which only remote code knows.
    known = [name for name in AWQ_SCALES_MAPPINGS if name != "RefinedWebModel"]
    assert {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in known} == SCALED_ACTIVATIONS


def test_every_table_is_tested_with_every_architecture_it_names() -> None:
    named = {*INITIALIZED, *OWN_LINEARS, *SCALED_ACTIVATIONS, *TRANSPOSED, *REORDERED_BY_VLLM}
    assert set(CONFIGS) >= named >= LOADED_BY_VLLM
    assert len(CONFIGS) >= len(DENSE)


def contents(
    variant: str, architecture: str = "LlamaForCausalLM", *, sizes: frozenset[int] = frozenset({64}), names: str = ""
) -> Contents:
    spec: VariantSpec = parse_variant(variant)
    quantized = tuple(names.split()) or ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
    grids = frozenset((spec.bits, size) for size in sizes)
    return Contents(architecture, spec.format, spec.symmetric, grids, quantized)


def known(found: Contents, loader: Loader) -> tuple[Limit, ...]:
    return tuple(limit for limit in limits(found) if limit.loader is loader)


@pytest.mark.parametrize("variant", ["gptq-w4-g64", "awq-w4-g64", "rtn-w4-g64", "awq-w4-g64-ct", "rtn-w4-channel"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "OPTForCausalLM"])
def test_nothing_limits_ordinary_releases(variant: str, architecture: str) -> None:
    assert limits(contents(variant, architecture)) == ()


@pytest.mark.parametrize(
    ("variant", "architecture", "sizes", "names", "reason"),
    [
        ("gptq-w4-g64", "GPT2LMHeadModel", {64}, "transformer.h.0.attn.c_proj", "asks c_proj for weights"),
        ("rtn-w4-g64", "NanoChatForCausalLM", {64}, "model.layers.0.self_attn.o_proj", "asks o_proj for weights"),
        ("awq-w4-g64", "GPTNeoXForCausalLM", {64}, "gpt_neox.layers.0.attention.dense", "act.scales"),
        ("gptq-w4-g64", "FalconForCausalLM", {64}, "transformer.h.0.mlp.dense_h_to_4h", "random weights"),
        ("rtn-w4-g64", "FalconForCausalLM", {64}, "transformer.h.0.mlp.dense_h_to_4h", "asks its linears"),
        ("gptq-w4-g64", "LlamaForCausalLM", {64, 32}, "", "another group size"),
        ("gptq-w4-g64", "MptForCausalLM", {64}, "transformer.blocks.0.attn.Wqkv", "under `transformer.blocks`"),
    ],
)
def test_what_transformers_does_not_load_is_said_with_the_reason(
    variant: str, architecture: str, sizes: set[int], names: str, reason: str
) -> None:
    (limit,) = known(contents(variant, architecture, sizes=frozenset(sizes), names=names), Loader.TRANSFORMERS)
    assert not limit.loads
    assert limit.text.startswith("transformers 5.23.0 does not load these files: ")
    assert reason in limit.text
    assert limit.text.endswith(".")


def test_linears_left_in_16_bit_are_not_asked_for_packed_weights() -> None:
    names = "transformer.h.0.attn.c_attn transformer.h.0.mlp.c_fc"
    assert known(contents("gptq-w4-g64", "GPT2LMHeadModel", names=names), Loader.TRANSFORMERS) == ()
    names += " transformer.h.0.attn.c_proj"
    (limit,) = known(contents("gptq-w4-g64", "GPT2LMHeadModel", names=names), Loader.TRANSFORMERS)
    assert "`ignore: ['re:c_proj$']`" in limit.text


def test_another_way_is_named_where_one_is_known() -> None:
    gpt2 = contents("gptq-w4-g64", "GPT2LMHeadModel", names="transformer.h.0.mlp.c_proj")
    neox = contents("awq-w4-g64", "GPTNeoXForCausalLM", names="gpt_neox.layers.0.attention.dense")
    bloom = contents("awq-w4-g64", "BloomForCausalLM", names="transformer.h.0.mlp.dense_4h_to_h")
    for found, vllm, unpacked in ((gpt2, True, False), (neox, True, True), (bloom, False, True)):
        (limit,) = limits(found)
        assert ("vLLM loads the files as they are" in limit.text) is vllm
        assert ("awq-w4-g64-ct" in limit.text) is unpacked


def test_packed_rows_that_vllm_reorders_are_a_limit_of_vllm() -> None:
    (limit,) = limits(contents("rtn-w4-g64", "BloomForCausalLM", names="transformer.h.0.attn.query_key_value"))
    assert (limit.loader, limit.loads) == (Loader.VLLM, False)
    assert "`ignore: ['re:query_key_value$']`" in limit.text


@pytest.mark.parametrize("architecture", [*INITIALIZED, *OWN_LINEARS])
def test_files_unpacked_while_loading_have_no_limit_of_the_class(architecture: str) -> None:
    leaf = next(iter(INITIALIZED.get(architecture, {"dense"})))
    one = contents("awq-w4-g64-ct", architecture, names=f"model.layers.0.{leaf}")
    assert known(one, Loader.TRANSFORMERS) == ()


def test_asymmetric_files_with_several_group_sizes_need_an_older_package() -> None:
    several = frozenset({64, 32})
    (limit,) = limits(contents("awq-w4-g64-ct", sizes=several))
    assert (limit.loader, limit.loads) == (Loader.TRANSFORMERS, True)
    assert "compressed-tensors 0.17.0 it loads" in limit.text
    assert limits(contents("rtn-w4-g64", sizes=several)) == ()


@pytest.mark.parametrize("variant", ["rtn-w8-g64", "rtn-w8-g64-gptq", "rtn-w8-g64-asym"])
def test_eight_bits_need_a_gpu_in_vllm(variant: str) -> None:
    found = known(contents(variant), Loader.VLLM)
    assert "needs a GPU" in found[0].text
    assert len(found) == (2 if variant.endswith("asym") else 1)


@pytest.mark.parametrize("variant", ["gptq-w3-g64", "gptq-w2-g64", "awq-w3-g64", "rtn-w2-channel"])
def test_vllm_refuses_two_and_three_bits_and_transformers_does_not(variant: str) -> None:
    (limit,) = limits(contents(variant))
    assert (limit.loader, limit.loads) == (Loader.VLLM, False)
    assert f"refuses {parse_variant(variant).bits}-bit codes" in limit.text
    assert "not tried" in limit.text


def test_what_vllm_does_not_load_is_not_named_as_a_way() -> None:
    gpt2 = {"names": "transformer.h.0.mlp.c_proj", "architecture": "GPT2LMHeadModel"}
    for variant, is_way in (("gptq-w4-g64", True), ("gptq-w3-g64", False)):
        (one,) = known(contents(variant, **gpt2), Loader.TRANSFORMERS)
        (several,) = known(contents(variant, sizes=frozenset({64, 32})), Loader.TRANSFORMERS)
        assert ("vLLM loads" in one.text, "vLLM reads" in several.text) == (is_way, is_way)


def test_the_contents_of_a_release_are_those_of_its_quantized_linears() -> None:
    modules = (
        make_module("model.layers.0.a", group_size=64),
        make_module("model.layers.0.b", group_size=32),
        make_module("model.layers.0.c", group_size=0, bits=16),
    )
    names = ("model.layers.0.a", "model.layers.0.b")
    assert Contents.of_release(make_facts("gptq-w4-g64", modules=modules)) == Contents(
        "LlamaForCausalLM", Format.GPTQ, True, frozenset({(4, 64), (4, 32)}), names
    )
    rows = Contents.of_release(make_facts("rtn-w4-channel", modules=modules))
    assert rows.grids == frozenset({(4, PER_CHANNEL)})


EXPERTS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj")


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("gptq-w4-g64", {(Loader.TRANSFORMERS, "its GPTQ loader passes over experts")}),
        ("awq-w4-g64", {(Loader.TRANSFORMERS, "its AWQ loader passes over experts")}),
        (
            "awq-w4-g64-ct",
            {(Loader.TRANSFORMERS, "experts without their zero points"), (Loader.VLLM, "no zero points of experts")},
        ),
        ("gptq-w4-g64-ct", set()),
    ],
)
def test_experts_are_loaded_by_transformers_from_symmetric_compressed_tensors_alone(
    variant: str, said: set[tuple[Loader, str]]
) -> None:
    spec = parse_variant(variant)
    found = limits(Contents("MixtralForCausalLM", spec.format, spec.symmetric, frozenset({(4, 64)}), EXPERTS))
    assert {limit.loader for limit in found if not limit.loads} == {loader for loader, _ in said}
    for loader, text in said:
        assert any(limit.loader is loader and text in limit.text for limit in found)
    dense = Contents("MixtralForCausalLM", spec.format, spec.symmetric, frozenset({(4, 64)}), EXPERTS[:1])
    assert limits(dense) == ()


@pytest.mark.parametrize(
    ("variant", "loads", "said"),
    [
        ("w8a8-int8", False, "merges experts of which the codes are whole numbers in a byte each"),
        ("fp8-dynamic", True, "computes experts with inputs that are not rounded"),
    ],
)
def test_experts_whose_inputs_are_rounded_are_not_loaded_by_transformers_as_engines_compute_them(
    variant: str, loads: bool, said: str
) -> None:
    spec = parse_variant(variant)
    grid = (spec.format, spec.symmetric, frozenset({(8, PER_CHANNEL)}))
    found = limits(Contents("MixtralForCausalLM", *grid, EXPERTS, spec.activations, spec.type))
    (limit,) = (limit for limit in found if limit.loader is Loader.TRANSFORMERS)
    assert limit.loads is loads
    assert said in limit.text
    dense = limits(Contents("MixtralForCausalLM", *grid, EXPERTS[:1], spec.activations, spec.type))
    assert [limit.loader for limit in dense] == ([Loader.VLLM] if variant == "fp8-dynamic" else [])
    assert all(limit.loads and "Ada and Hopper" in limit.text for limit in dense)


def test_experts_that_transformers_knows_in_one_tensor_only_are_not_loaded_by_it() -> None:
    found = limits(Contents("GraniteMoeForCausalLM", Format.COMPRESSED_TENSORS, True, frozenset({(4, 64)}), EXPERTS))
    (limit,) = (limit for limit in found if limit.loader is Loader.TRANSFORMERS)
    assert not limit.loads
    assert "GraniteMoeForCausalLM with all experts of a block in one tensor only" in limit.text


def test_what_is_said_to_have_experts_in_one_tensor_only_has_no_conversion_that_merges_some() -> None:
    """Those it merges from tensors for each expert say so in its table of conversions."""
    found = set()
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        steps = [
            step
            for own in get_checkpoint_conversion_mapping(model_type) or []
            for step in getattr(own, "operations", [])
        ]
        if any(isinstance(step, MergeModulelist) for step in steps):
            found.add(class_name)
    assert not FUSED_EXPERTS & found
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) >= FUSED_EXPERTS
    assert {"MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "NemotronHForCausalLM"} <= found
