"""Shapes of well-known models: as large as published, and the same names and groups as a real skeleton has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import PlanError
from pipeline.graph.build import make_variant_plan
from pipeline.graph.outline import open_folder
from pipeline.graph.shapes import CONFIGS, ShapeOutline, block_linears, named_shape
from pipeline.spec import parse_variant
from tests.architectures import make_model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        # Published as 671 B without the block that predicts further tokens.
        ("deepseek-v3", 671_026_419_200),
    ],
)
def test_shapes_have_as_many_parameters_as_published(name: str, parameters: int) -> None:
    shape = named_shape(name)
    assert shape.index.num_parameters == parameters
    assert shape.index.total_bytes == 2 * parameters


def test_every_tensor_belongs_to_a_block_or_is_outside() -> None:
    shape = named_shape("deepseek-v3")
    skeleton = shape.skeleton
    owned = [name for block in range(skeleton.num_blocks) for name in skeleton.block_tensors(block).values()]
    owned += skeleton.outer_tensors().values()
    assert sorted(owned) == list(shape.index.entries)


def test_a_shape_is_what_a_skeleton_of_its_config_finds(tmp_path: Path) -> None:
    real = open_folder(make_model("llama", tmp_path / "llama")).outline
    config = real.skeleton.net.config
    shape = ShapeOutline("llama", {key: getattr(config, key) for key in CONFIGS["llama-3.1-8b"]})
    assert shape.groups == real.groups
    assert shape.skeleton.architecture == real.skeleton.architecture
    assert tuple(shape.skeleton.block_names) == tuple(real.skeleton.block_names)
    for block in range(real.skeleton.num_blocks):
        assert dict(shape.skeleton.block_tensors(block)) == real.skeleton.block_tensors(block)
    assert dict(shape.skeleton.embedding_tensors()) == real.skeleton.embedding_tensors()
    sizes = {name: entry.shape for name, (_, entry) in real.index.entries.items()}
    expected = {name: entry.shape for name, (_, entry) in shape.index.entries.items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert sizes == expected
    assert shape.vocabulary_size == real.vocabulary_size


def test_experts_share_the_input_of_gate_and_up_and_have_their_own_for_down() -> None:
    config = CONFIGS["deepseek-v3"]
    dense, sparse = block_linears(config, 2), block_linears(config, 3)
    assert [len(group) for group in dense] == [2, 1, 1, 1, 2, 1]
    assert [len(group) for group in sparse[:5]] == [2, 1, 1, 1, 2 * 257]
    assert [len(group) for group in sparse[5:]] == [1] * 257
    assert {columns for _, _, columns in sparse[4]} == {7168}


def test_variants_are_planned_from_a_shape() -> None:
    plan = make_variant_plan(parse_variant("gptq-w4-g128"), named_shape("llama-3.1-8b"))
    assert len(plan.matrices) == 32 * 7
    assert all(matrix.scheme is not None and not matrix.note for matrix in plan.matrices.values())


def test_an_unknown_shape_names_those_there_are() -> None:
    with pytest.raises(PlanError, match="no shape called 'llama-9'") as caught:
        named_shape("llama-9")
    assert "llama-3.1-405b" in caught.value.hint
