"""What is handed over in parts is the same bits, and no part is larger than it may be."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.graph.parts import Part, cut_rows, join_parts, make_part, take_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]

shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2 if dtype is torch.bool else 200, shape, generator=generator)
    return values.to(dtype)


def parts_of(tensors: Mapping[str, Tensor], max_bytes: int) -> list[Part]:
    outlines = {name: tensor.to("meta") for name, tensor in tensors.items()}
    cuts = cut_rows(outlines, max_bytes)
    return [
        make_part(outlines, {name: take_rows(tensors[name], rows) for name, rows in cut.items()}, cut, len(cuts))
        for cut in cuts
    ]


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=5), st.integers(1, 200))
def test_parts_join_to_what_was_cut(kinds: list[tuple[tuple[int, ...], torch.dtype]], max_bytes: int) -> None:
    tensors = {str(number): random_tensor(*kind, number) for number, kind in enumerate(kinds)}
    parts = parts_of(tensors, max_bytes)
    asked = []

    def ask(number: int) -> Part:
        asked.append(number)
        return parts[number]

    joined = join_parts(ask)
    assert asked == list(range(len(parts)))
    assert joined.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (joined[name].dtype, joined[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(joined[name], tensor)
    for part in parts:
        num_rows = sum(rows.rows[1] - rows.rows[0] for rows in part.rows if rows.data.size)
        assert num_rows <= 1 or sum(rows.data.nbytes for rows in part.rows) <= max_bytes


def test_small_tensors_share_a_part_and_large_ones_are_cut() -> None:
    small = {name: torch.ones(2, 2) for name in "ab"}
    assert cut_rows(small, 100) == [{"a": (0, 2), "b": (0, 2)}]
    assert cut_rows({"a": torch.ones(5, 2), "n": torch.tensor(3)}, 24) == [{"a": (0, 3)}, {"a": (3, 5), "n": (0, 1)}]
    assert cut_rows({}, 24) == [{}]
    assert cut_rows({"a": torch.ones(1, 8), "b": torch.ones(3)}, 24) == [{"a": (0, 1)}, {"b": (0, 3)}]


def test_what_was_joined_is_a_copy() -> None:
    tensors = {"a": torch.zeros(3)}
    (part,) = parts_of(tensors, 100)
    joined = join_parts(lambda number: part)
    tensors["a"].fill_(1)
    assert torch.equal(joined["a"], torch.zeros(3))


def test_a_part_that_is_lost_on_the_way_loses_the_output() -> None:
    parts = parts_of({"a": torch.zeros(3)}, 4)

    def ask(number: int) -> Part:
        if number == 2:
            raise KeyError("gone")
        return parts[number]

    with pytest.raises(KeyError, match="gone"):
        join_parts(ask)
