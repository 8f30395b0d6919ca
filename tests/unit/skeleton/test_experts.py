"""Experts as linears of their own: the same model, under the checkpoint's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.errors import UnsupportedArchitectureError
from pipeline.graph.outline import Source, open_folder
from pipeline.graph.shapes import CONFIGS, ShapeOutline
from pipeline.skeleton.experts import all_tokens, find_routers
from pipeline.skeleton.groups import linear_inputs
from pipeline.skeleton.model import dense_logits
from pipeline.spec import ExpertStatistics
from tests.architectures import MIXTURES, fuse_experts, make_model

SourceOf = Callable[[str], Source]

TOKENS_BL = torch.arange(48).view(2, 24) * 37 % 4096

EXPERTS = {"mixtral": 4, "qwen3_moe": 8, "deepseek_v3": 8, "qwen2_moe": 4}
ATTENTION = {
    "mixtral": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
    "qwen3_moe": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
    "qwen2_moe": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
    "deepseek_v3": [["q_a_proj", "kv_a_proj_with_mqa"], ["q_b_proj"], ["kv_b_proj"], ["o_proj"]],
}
SHARED = {"deepseek_v3": "mlp.shared_experts", "qwen2_moe": "mlp.shared_expert"}
ROUTERS = {"qwen2_moe": ("mlp.gate", "mlp.shared_expert_gate")}


def computed(source: Source) -> Tensor:
    skeleton = source.outline.skeleton
    with skeleton.outer_attached(source.outer()):
        (found,) = dense_logits(skeleton, [TOKENS_BL], source.block)
        return found


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_split_experts_compute_what_transformers_computes(name: str, source_of: SourceOf) -> None:
    source = source_of(name)
    net = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    expected = net(input_ids=TOKENS_BL).logits
    found = computed(source)
    assert (found - expected).norm() / expected.norm() < 1e-6
    # That an expert counts for the logits at all.
    down = net.get_submodule(f"{source.outline.skeleton.block_names[-1]}.mlp.experts").down_proj
    down[int(source.outline.skeleton.experts.popitem()[1].rows[0].numel() == 0)] *= 2
    assert (net(input_ids=TOKENS_BL).logits - expected).norm() / expected.norm() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_a_block_gives_the_same_when_every_expert_sees_all_tokens(name: str, source_of: SourceOf) -> None:
    source = source_of(name)
    skeleton = source.outline.skeleton
    index = skeleton.num_blocks - 1
    hidden_BLH = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(0))
    with skeleton.attached(index, skeleton.dense(index, source.block(index))) as block:
        routed = skeleton.run_block(index, hidden_BLH)
        seen = {name: 0 for name, _ in block.named_modules() if name.endswith("down_proj")}
        for linear in seen:
            block.get_submodule(linear).register_forward_pre_hook(
                lambda module, args, linear=linear: seen.update({linear: args[0].numel() // args[0].shape[-1]})
            )
        with all_tokens(block):
            everything = skeleton.run_block(index, hidden_BLH)
        assert set(seen.values()) == {48}
    assert (everything - routed).norm() / routed.norm() < 1e-6


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_has_the_names_of_the_checkpoint(name: str, source_of: SourceOf) -> None:
    source = source_of(name)
    stored = load_file(source.folder / "model.safetensors")
    skeleton = source.outline.skeleton
    names = [n for block in range(skeleton.num_blocks) for n in skeleton.block_tensors(block).values()]
    assert sorted([*names, *skeleton.outer_tensors().values()]) == sorted(stored)
    assert not skeleton.extra_names
    linears = {linear.name: linear for block in source.outline.groups for group in block for linear in group.linears}
    experts = [linear for linear in linears.values() if linear.expert]
    first = skeleton.num_blocks - 2
    assert len(experts) == 2 * 3 * EXPERTS[name]
    for linear in experts:
        assert tuple(stored[f"{linear.name}.weight"].shape) == (linear.out_features, linear.in_features)
    if name == "mixtral":
        local = skeleton.block_tensors(first)
        of_expert = "model.layers.0.block_sparse_moe.experts.3"
        assert local["mlp.experts.3.gate_proj.weight"] == f"{of_expert}.w1.weight"
        assert local["mlp.experts.3.up_proj.weight"] == f"{of_expert}.w3.weight"
        assert local["mlp.experts.3.down_proj.weight"] == f"{of_expert}.w2.weight"


@pytest.mark.parametrize("name", MIXTURES)
def test_gate_and_up_of_all_experts_are_one_group_where_they_see_all_tokens(name: str, source_of: SourceOf) -> None:
    groups = source_of(name).outline.groups[-1]
    leaves = [[linear.local_name.rpartition(".")[2] for linear in group.linears] for group in groups]
    num_attention = len(ATTENTION[name])
    assert leaves[:num_attention] == ATTENTION[name]
    together, *downs = groups[num_attention:]
    owners = [f"mlp.experts.{number}" for number in range(EXPERTS[name])]
    owners = [*owners, SHARED[name]] if name in SHARED else owners
    # Qwen 2 asks its shared expert first.
    owners = owners[-1:] + owners[:-1] if name == "qwen2_moe" else owners
    assert [linear.local_name for linear in together.linears] == [
        f"{owner}.{part}" for owner in owners for part in ("gate_proj", "up_proj")
    ]
    assert [[linear.local_name for linear in group.linears] for group in downs] == [
        [f"{owner}.down_proj"] for owner in owners
    ]
    assert together.expert == ""
    assert {group.expert for group in downs} == {o if ".experts." in o else "" for o in owners}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("mode", [ExpertStatistics.ROUTED, ExpertStatistics.SHRINKAGE])
def test_each_expert_has_groups_of_its_own_where_it_sees_its_own_tokens(
    name: str, mode: ExpertStatistics, source_of: SourceOf
) -> None:
    groups = open_folder(source_of(name).folder, experts=mode).outline.groups[-1]
    own = [group for group in groups if group.linears[0].expert]
    assert [[linear.local_name for linear in group.linears] for group in own] == [
        [f"mlp.experts.{number}.{part}" for part in parts]
        for number in range(EXPERTS[name])
        for parts in (("gate_proj", "up_proj"), ("down_proj",))
    ]
    assert all(group.expert for group in own)
    assert own[0].label == "experts.0.gate_proj+experts.0.up_proj"


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_no_linears_to_quantize(name: str, source_of: SourceOf) -> None:
    outline = source_of(name).outline
    skeleton = outline.skeleton
    routers = ROUTERS.get(name, ("mlp.gate",))
    assert set(find_routers(skeleton.block(skeleton.num_blocks - 1))) == set(routers)
    last = skeleton.block_names[-1]
    stored = [skeleton.names[f"{last}.{router}.weight"].removesuffix(".weight") for router in routers]
    assert not outline.linear_names & set(stored)
    assert {f"{last}.{router}" for router in routers} | set(stored) < set(outline.other_linears)


@pytest.mark.parametrize("mode", list(ExpertStatistics))
def test_a_shape_is_what_a_skeleton_of_its_config_finds(mode: ExpertStatistics, source_of: SourceOf) -> None:
    real = open_folder(source_of("deepseek_v3").folder, experts=mode).outline
    config = real.skeleton.net.config
    shape = ShapeOutline("tiny", {key: getattr(config, key) for key in CONFIGS["deepseek-v3"]}, mode)
    assert shape.groups == real.groups
    assert set(shape.other_linears) == set(real.other_linears)
    for block in range(real.skeleton.num_blocks):
        assert dict(shape.skeleton.block_tensors(block)) == real.skeleton.block_tensors(block)
    sizes = {name: entry.shape for name, (_, entry) in real.index.entries.items()}
    assert sizes == {name: entry.shape for name, (_, entry) in shape.index.entries.items()}


def test_experts_of_another_layout_are_refused_with_what_differs(tmp_path: Path) -> None:
    folder = make_model("gpt_oss", tmp_path / "gpt_oss")
    with pytest.raises(UnsupportedArchitectureError, match=r"not a plain gate, up and down.*has_bias"):
        open_folder(folder)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_one_tensor_are_read_as_tensors_of_their_own(name: str, tmp_path: Path) -> None:
    """Under the names that checkpoints with a tensor for each have, so that whatever loads those loads what is made."""
    apart = open_folder(make_model(name, tmp_path / "apart"))
    fused = open_folder(fuse_experts(make_model(name, tmp_path / "fused")))
    stored = load_file(fused.folder / "model.safetensors")
    assert sum(name.endswith(("gate_up_proj", "down_proj")) for name in stored) > 1
    assert not fused.outline.index.parts & stored.keys()
    assert fused.outline.skeleton.names.keys() == apart.outline.skeleton.names.keys()
    for block in range(apart.outline.skeleton.num_blocks):
        found, expected = fused.block(block), apart.block(block)
        assert all(torch.equal(found[local], expected[local]) for local in expected)
        names = zip(fused.outline.groups[block], apart.outline.groups[block], strict=True)
        for ours, theirs in names:
            moved = [linear.name.replace("block_sparse_moe", "mlp") for linear in theirs.linears]  # Mixtral's renaming
            assert [linear.name for linear in ours.linears] == moved


def test_experts_in_one_tensor_of_a_model_that_has_no_others(tmp_path: Path) -> None:
    """transformers renames GraniteMoE's tensors to the fused ones, and knows of none for each expert."""
    folder = make_model("granitemoe", tmp_path / "granitemoe")
    source = open_folder(folder)
    whole = load_file(folder / "model.safetensors")["model.layers.0.block_sparse_moe.input_linear.weight"]
    gate, up = (
        source.read({"": f"model.layers.0.block_sparse_moe.experts.2.{part}.weight"})[""]
        for part in ("gate_proj", "up_proj")
    )
    assert torch.equal(torch.cat([gate, up]), whole[2])
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = net(input_ids=TOKENS_BL).logits
    assert (computed(source) - expected).norm() / expected.norm() < 1e-6


def test_experts_in_one_tensor_in_another_order_of_axes_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_model("granitemoe", tmp_path / "granitemoe")
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match=r"input_linear\.weight .*another order of its axes"):
        open_folder(folder)


def test_experts_of_a_block_that_the_model_has_no_use_for_are_extra(tmp_path: Path) -> None:
    """DeepSeek V3 and GLM upload a block more, which predicts further tokens."""
    folder = make_model("qwen3_moe", tmp_path / "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    further = {n.replace(".1.", ".2.", 1): t.clone() for n, t in tensors.items() if n.startswith("model.layers.1.")}
    save_file({**tensors, **further}, folder / "model.safetensors", {"format": "pt"})
    skeleton = open_folder(folder).outline.skeleton
    assert set(skeleton.extra_names) == set(further)
    assert skeleton.num_blocks == 2


def test_an_input_that_was_written_to_between_two_linears_is_not_one_input() -> None:
    class Changing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.same, self.after = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> None:
            self.before(x)
            self.same(x.view(-1, 4))
            self.after(x.add_(1))

    block = Changing()
    with torch.no_grad(), linear_inputs(block) as inputs:
        block(torch.zeros(1, 2, 4))
    (_, _, first), (_, _, second), (_, _, third) = inputs
    assert first == second < third
