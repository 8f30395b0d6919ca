"""The Cholesky factor by tiles is the one that LAPACK finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.quantize.cholesky import TILE_SIZE, LowerTiles


def positive(size: int) -> Tensor:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return x.T @ x / size


def factored(matrix: Tensor) -> LowerTiles | None:
    return LowerTiles.factor(matrix.shape[0], lambda first, last: matrix[first:last, :last].clone())


@pytest.mark.parametrize("size", [1, 7, TILE_SIZE - 1, TILE_SIZE, TILE_SIZE + 1, 3 * TILE_SIZE + 5])
def test_it_is_lapack_s_factor_at_every_size(size: int) -> None:
    matrix = positive(size)
    lower = factored(matrix)
    assert lower is not None
    expected = torch.linalg.cholesky(matrix)
    torch.testing.assert_close(lower.diagonal(), expected.diagonal())
    found = torch.zeros_like(matrix)
    for rows, columns, tile in lower.take():
        found[rows, columns] = tile
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert lower.tiles == {}


def test_what_is_above_the_diagonal_is_not_looked_at() -> None:
    matrix = positive(TILE_SIZE + 40)
    with_noise = matrix.tril() + torch.full_like(matrix, float("nan")).triu(1)
    lower, expected = factored(with_noise), factored(matrix)
    assert lower is not None
    assert expected is not None
    for (_, _, tile), (_, _, other) in zip(lower.take(), expected.take(), strict=True):
        assert torch.equal(tile, other)


@pytest.mark.parametrize("place", [3, TILE_SIZE + 3])
def test_a_matrix_that_is_not_positive_definite_has_none(place: int) -> None:
    matrix = positive(TILE_SIZE + 40)
    matrix[place, place] = -1.0
    assert factored(matrix) is None


def test_half_of_the_matrix_is_in_memory() -> None:
    size = 4 * TILE_SIZE
    lower = factored(positive(size))
    assert lower is not None
    stored = sum(tile.untyped_storage().nbytes() for tile in lower.tiles.values())
    assert stored == (10 / 16) * size**2 * 8
