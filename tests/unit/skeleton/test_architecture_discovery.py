"""What is found in each architecture without a list of architectures: blocks, linear groups, producers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.graph.outline import Source
from pipeline.skeleton import tables
from pipeline.skeleton.groups import LinearRef, linear_groups, sequential_steps
from pipeline.skeleton.model import dense_logits
from pipeline.skeleton.smoothing import Fold, Producer, find_producers
from pipeline.spec import ExpertStatistics
from tests.architectures import DENSE, MORE_THAN_HIDDEN_STATES

NUM_EXPERTS = 4
"""Of the tiny Mixtral."""

SourceOf = Callable[[str], Source]

BLOCKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "mistral": "model.layers",
    "gemma3": "model.layers",
    "phi3": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
}

# Local names of the members; rows of each; columns; producer as (name, fold, first row, rows).
Expected = list[tuple[tuple[str, ...], tuple[int, ...], int, tuple[str, Fold, int, int] | None]]


def split_projections(value_rows: int, query_rows: int, norms: tuple[str, str], fold: Fold) -> Expected:
    """Return what Llama and those like it consist of."""
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return [
        (attention, (query_rows, value_rows, value_rows), 128, (norms[0], fold, 0, 128)),
        (("self_attn.o_proj",), (128,), query_rows, ("self_attn.v_proj", Fold.ROWS, 0, value_rows)),
        (("mlp.gate_proj", "mlp.up_proj"), (256, 256), 128, (norms[1], fold, 0, 128)),
        (("mlp.down_proj",), (128,), 256, ("mlp.up_proj", Fold.ROWS, 0, 256)),
    ]


LLAMA = split_projections(64, 128, ("input_layernorm", "post_attention_layernorm"), Fold.SCALE)
GROUPS: dict[str, Expected] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": split_projections(128, 256, ("input_layernorm", "post_attention_layernorm"), Fold.SCALE),
    "mistral": LLAMA,
    "gemma3": split_projections(64, 128, ("input_layernorm", "pre_feedforward_layernorm"), Fold.SCALE_PLUS_ONE),
    "phi3": [
        (("self_attn.qkv_proj",), (256,), 128, ("input_layernorm", Fold.SCALE, 0, 128)),
        (("self_attn.o_proj",), (128,), 128, ("self_attn.qkv_proj", Fold.ROWS, 192, 64)),
        (("mlp.gate_up_proj",), (512,), 128, ("post_attention_layernorm", Fold.SCALE, 0, 128)),
        (("mlp.down_proj",), (128,), 256, ("mlp.gate_up_proj", Fold.ROWS, 256, 256)),
    ],
    # The fused projection is interleaved head by head, and GELU is not homogeneous: nothing to fold into.
    "gpt_neox": [
        (("attention.query_key_value",), (384,), 128, ("input_layernorm", Fold.SCALE, 0, 128)),
        (("attention.dense",), (128,), 128, None),
        (("mlp.dense_h_to_4h",), (256,), 128, ("post_attention_layernorm", Fold.SCALE, 0, 128)),
        (("mlp.dense_4h_to_h",), (128,), 256, None),
    ],
    # ReLU passes positive factors through, so fc1 takes up fc2's scales.
    "opt": [
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            (128, 128, 128),
            128,
            ("self_attn_layer_norm", Fold.SCALE, 0, 128),
        ),
        (("self_attn.out_proj",), (128,), 128, ("self_attn.v_proj", Fold.ROWS, 0, 128)),
        (("fc1",), (256,), 128, ("final_layer_norm", Fold.SCALE, 0, 128)),
        (("fc2",), (128,), 256, ("fc1", Fold.ROWS, 0, 256)),
    ],
    "gpt2": [
        (("attn.c_attn",), (384,), 128, ("ln_1", Fold.SCALE, 0, 128)),
        (("attn.c_proj",), (128,), 128, ("attn.c_attn", Fold.ROWS, 256, 128)),
        (("mlp.c_fc",), (256,), 128, ("ln_2", Fold.SCALE, 0, 128)),
        (("mlp.c_proj",), (128,), 256, None),
    ],
}


@pytest.mark.parametrize("name", DENSE)
def test_blocks_are_the_decoder_layers_in_order(name: str, source_of: SourceOf) -> None:
    skeleton = source_of(name).outline.skeleton
    assert skeleton.block_names == (f"{BLOCKS[name]}.0", f"{BLOCKS[name]}.1")


@pytest.mark.parametrize("name", DENSE)
def test_every_checkpoint_tensor_is_in_a_block_or_outside_never_both(name: str, source_of: SourceOf) -> None:
    outline = source_of(name).outline
    skeleton = outline.skeleton
    inside = [tensor for block in (0, 1) for tensor in skeleton.block_tensors(block).values()]
    outside = [*skeleton.outer_tensors().values(), *skeleton.extra_names]
    assert sorted(inside + outside) == sorted(outline.index.entries)


@pytest.mark.parametrize("name", DENSE)
def test_linears_on_one_input_form_a_group_in_calling_order(name: str, source_of: SourceOf) -> None:
    outline = source_of(name).outline
    for block, groups in enumerate(outline.groups):
        found = [
            (tuple(li.local_name for li in g.linears), tuple(li.out_features for li in g.linears), g.in_features)
            for g in groups
        ]
        assert found == [expected[:3] for expected in GROUPS[name]]
        for linear in (linear for group in groups for linear in group.linears):
            assert linear.is_transposed == (name == "gpt2")
            stored = outline.index.entries[linear.name + ".weight"][1].shape
            rows_first = (linear.out_features, linear.in_features)
            assert stored == (rows_first[::-1] if linear.is_transposed else rows_first)
            assert outline.skeleton.block_tensors(block)[linear.local_name + ".weight"] == linear.name + ".weight"


@pytest.mark.parametrize("name", DENSE)
def test_producers_are_those_that_a_change_of_basis_passes_through(name: str, source_of: SourceOf) -> None:
    source = source_of(name)
    skeleton, groups = source.outline.skeleton, source.outline.groups[1]
    with skeleton.attached(1, source.block(1)):
        producers = find_producers(skeleton, groups)
    assert [p and (p.local_name, p.fold, p.first_row, p.num_rows) for p in producers] == [e[3] for e in GROUPS[name]]


def test_grouped_query_heads_share_the_value_rows_of_their_head(source_of: SourceOf) -> None:
    source = source_of("llama")
    skeleton, groups = source.outline.skeleton, source.outline.groups[0]
    with skeleton.attached(0, source.block(0)):
        (producer,) = find_producers(skeleton, [groups[1]])
    # 4 query heads of 32 dimensions on 2 key-value heads: heads 0 and 1 read rows 0..31, heads 2 and 3 rows 32..63.
    first, second = tuple(range(32)), tuple(range(32, 64))
    assert producer == Producer("self_attn.v_proj", Fold.ROWS, 0, first + first + second + second)


@pytest.mark.parametrize("name", [*DENSE, *MORE_THAN_HIDDEN_STATES])
def test_one_block_in_memory_at_a_time_computes_what_transformers_computes(name: str, source_of: SourceOf) -> None:
    from transformers import AutoModelForCausalLM

    source = source_of(name)
    skeleton = source.outline.skeleton
    tokens = torch.randint(4, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    skeleton.attach_outer(source.outer())
    (found,) = dense_logits(skeleton, [tokens], source.block)
    skeleton.detach_outer()
    net = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = net(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert all(p.is_meta for index in (0, 1) for p in skeleton.block(index).parameters())


@pytest.mark.parametrize("name", [*DENSE, "gemma4"])
def test_large_tables_compute_by_parts_what_they_compute_as_a_whole(
    name: str, source_of: SourceOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(name)
    skeleton, outer = source.outline.skeleton, source.outer()
    tokens = torch.randint(4, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    skeleton.attach_outer(outer)
    hidden = skeleton.embed(tokens)
    whole = skeleton.logits(hidden)
    monkeypatch.setattr(tables, "TABLE_ELEMENTS", 1000)
    monkeypatch.setattr(tables, "HEAD_PART_ELEMENTS", 1000 * hidden.shape[-1])
    skeleton.attach_outer(outer)
    assert torch.equal(skeleton.embed(tokens), hidden)
    torch.testing.assert_close(skeleton.logits(hidden), whole)
    # Nothing as large as a table was made in float32.
    stored = [t for t in skeleton.net.state_dict().values() if not t.is_meta and t.dim() == 2 and t.shape[0] == 4096]
    assert stored
    assert all(table.untyped_storage().nbytes() == 4 for table in stored)
    skeleton.detach_outer()
    assert not skeleton.logits(hidden).any()


@pytest.mark.parametrize("limit", [tables.TABLE_ELEMENTS, 1000])
def test_tied_tables_are_in_memory_once(limit: int, source_of: SourceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TABLE_ELEMENTS", limit)
    source = source_of("gemma3")
    skeleton = source.outline.skeleton
    outer = {name: tensor.bfloat16() for name, tensor in source.outer().items()}
    assert "lm_head.weight" not in outer
    with skeleton.outer_attached(outer):
        state, held = skeleton.net.state_dict(), skeleton.tables.held
        places = [held.get(n, state[n]).data_ptr() for n in ("model.embed_tokens.weight", "lm_head.weight")]
        assert places[0] == places[1]
        assert bool(held) == (limit == 1000)


def test_nothing_stays_attached_after_a_failure(source_of: SourceOf) -> None:
    source = source_of("llama")
    skeleton = source.outline.skeleton
    with pytest.raises(MemoryError), skeleton.outer_attached(source.outer()):
        raise MemoryError
    assert not skeleton.net.state_dict()["model.embed_tokens.weight"].any()


def test_weights_are_used_up_as_they_are_converted(source_of: SourceOf) -> None:
    source = source_of("llama")
    stored = source.block(0)
    expected = {name: tensor.float() for name, tensor in stored.items()}
    dense = source.outline.skeleton.dense(0, stored)
    assert stored == {}
    assert all(torch.equal(dense[name], tensor) for name, tensor in expected.items())


def test_a_linear_turned_to_rows_and_back_is_what_is_stored() -> None:
    stored = torch.arange(6.0).view(2, 3)
    transposed = LinearRef("c_fc", "h.0.c_fc", 3, 2, is_transposed=True)
    assert torch.equal(transposed.to_rows(stored), stored.T)
    assert torch.equal(transposed.to_rows(transposed.to_rows(stored)), stored)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        # Gate and up of all experts read one input and are one group; then every expert's down.
        (ExpertStatistics.ALL, [1, 1, 1, NUM_EXPERTS]),
        (ExpertStatistics.ROUTED, [1, 1, NUM_EXPERTS, NUM_EXPERTS]),
    ],
)
def test_experts_are_solved_at_once_what_they_call_in_turn(
    source_of: SourceOf, experts: ExpertStatistics, expected: list[int]
) -> None:
    groups = linear_groups(source_of("mixtral").outline.skeleton, 0, experts)
    steps = sequential_steps(groups)
    assert [len(step) for step in steps] == expected
    assert sorted(position for step in steps for position in step) == list(range(len(groups)))
    assert {groups[position].label.rpartition(".")[2] for position in steps[-1]} == {"down_proj"}


def test_finding_groups_leaves_the_skeleton_as_it_was(source_of: SourceOf) -> None:
    skeleton = source_of("gemma3").outline.skeleton
    hooks: list[Any] = [dict(module._forward_pre_hooks) for module in skeleton.net.modules()]
    linear_groups(skeleton, 0)
    assert [dict(module._forward_pre_hooks) for module in skeleton.net.modules()] == hooks
