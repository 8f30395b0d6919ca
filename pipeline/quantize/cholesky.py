"""The Cholesky factor of a large matrix in half its memory: tiles on and below the diagonal, factored in place.

Dimension suffixes: I = rows and columns of the matrix, B = rows or columns of a tile.

Right-looking, tile by tile: factor the tile on the diagonal, solve the tiles below it, subtract their products from
what is right of them. Nearly all of it is matrix products, so on one CPU core it takes half of the time of LAPACK
through ``torch.linalg.cholesky_ex``, which needs the whole matrix more than once (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_SIZE = 512
"""Rows and columns of a tile: three of them in float64 fit the cache of a core. Part of the order of summation."""


@dataclass
class LowerTiles:
    """A lower triangular matrix, by tiles.

    Attributes:
        cuts: First row of each row of tiles, and the number of rows at last.
        tiles: By row and column of tiles; those above the diagonal are not there.
    """

    cuts: list[int]
    tiles: dict[tuple[int, int], Tensor]

    @classmethod
    def factor(cls, num_rows: int, rows: Callable[[int, int], Tensor]) -> LowerTiles | None:
        """Return L with L L^T = A, or None when A is not positive definite.

        Args:
            num_rows: Rows and columns of A.
            rows: ``rows(first, last)`` gives these rows of A up to column ``last``, [last - first, last]. It becomes
                L's memory; what is above A's diagonal is not looked at.
        """
        cuts = [*range(0, num_rows, TILE_SIZE), num_rows]
        found = cls(cuts, {})
        for i, (first, last) in enumerate(found._spans()):
            for j, tile in enumerate(torch.split(rows(first, last), TILE_SIZE, dim=1)):
                found.tiles[i, j] = tile.contiguous()
        return found if found._factor_in_place() else None

    def take(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and contents of every tile, and drop it: whoever makes something of the same size from
        them needs no memory for both."""
        spans = [slice(first, last) for first, last in self._spans()]
        for i, j in list(self.tiles):
            yield spans[i], spans[j], self.tiles.pop((i, j))

    def diagonal(self) -> Tensor:
        """Return the diagonal, [I]."""
        return torch.cat([self.tiles[i, i].diagonal() for i in range(len(self.cuts) - 1)])

    def _spans(self) -> Iterator[tuple[int, int]]:
        return zip(self.cuts[:-1], self.cuts[1:], strict=True)

    def _factor_in_place(self) -> bool:
        tiles, count = self.tiles, len(self.cuts) - 1
        for j in range(count):
            tiles[j, j], info = torch.linalg.cholesky_ex(tiles[j, j])
            if int(info.item()) != 0:
                return False
            upper = tiles[j, j].mT
            for i in range(j + 1, count):
                tiles[i, j] = torch.linalg.solve_triangular(upper, tiles[i, j], upper=True, left=False)
            for k in range(j + 1, count):
                for i in range(k, count):
                    tiles[i, k].addmm_(tiles[i, j], tiles[k, j].mT, alpha=-1)
        return True
