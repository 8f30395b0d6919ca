"""One entry to every solver: rows of linears that share an input go in, codes and grids come out.

Dimension suffixes: O = rows of the stack, I = in_features, G = groups of a row, R = rows of a tile.

Rows are independent once the statistics are prepared (factored, cut into blocks), so linears that share an input are
solved as one stack, and a stack in any number of parts. That must not show in the bytes: what becomes of a row is
bit-identical whatever it is solved with. Matrix products round by their shape (libraries pick kernels by it), so all of
them see one shape only: rows are worked on in tiles of a fixed number of rows, the last one filled up with zero rows.
The tile also bounds memory: a few times R x I floats, whatever the stack. On a GPU the columns of several tiles are
solved in one launch, those of other stacks too, as experts of a mixture are: each has statistics of its own, and too
few rows to fill the device.

GPTQ's codes of a row are replaced by rounding to nearest on the same grid where that has the lower loss (it can, as
clipping is not undone), so GPTQ is never worse than rounding, row by row. What either found may be refined
(``refine.py``), which lowers a row's loss or leaves it. All of this is by the second moment that is given; what is
reported is of the calibration tokens as they were, before it was shrunk (``shrinkage.py``).

A factorization that fails climbs a ladder of damping, and rows that did not stay finite are solved again with more of
it. What was used is reported, and every rung above the first is a degradation; at the end of the ladder stands an
error, never quiet rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from pipeline.errors import QuantizationError
from pipeline.quantize.checks import require_solvable
from pipeline.quantize.gptq import Factor, SolvedColumns, Target, damping_ladder, factor, solve_columns
from pipeline.quantize.grid import block_importance, channel_importance, clipping
from pipeline.quantize.loss import row_losses
from pipeline.quantize.refine import FoundRows, refine_rows
from pipeline.quantize.rtn import round_rows
from pipeline.quantize.shrinkage import unshrunk_losses
from pipeline.quantize.types import QuantizedLinear, Scheme, SolveReport, Statistics, dequantize
from pipeline.spec import Method

TILE_ROWS = {"cpu": 192}
"""Rows worked on at once. On a CPU core what belongs to so many rows stays in cache."""

TILE_ROWS_DEVICE = 2048
"""The same on accelerators, where a step is bound by launches. An expert of a mixture is hardly smaller."""

TILES_TOGETHER = {"cpu": 1}
"""Tiles whose columns are solved at once. A CPU core does one row after the other anyway."""

TILES_TOGETHER_DEVICE = 8
"""The same on accelerators: with tiles of 2048 rows and 32 rows for each program, 512 programs."""


@dataclass(frozen=True)
class SolveOptions:
    """How a solver goes about it.

    Attributes:
        damping: GPTQ: first rung of the damping ladder, a fraction of the mean diagonal of the second moment.
        act_order: GPTQ: solve columns in falling order of the second moment's diagonal.
        clip_search: Search each group's range for the least error instead of spanning it.
        refinement: Most rounds in which scales, zero points and codes are made better in turn, whatever found them; 0
            for none. They are damped as GPTQ is.
    """

    damping: float = 0.01
    act_order: bool = True
    clip_search: bool = True
    refinement: int = 0


@dataclass(frozen=True)
class SolvedRows:
    """Solved rows of a stack, in order; what is said of a row follows from that row alone.

    Attributes:
        codes_OI: uint8 [O, I].
        scale_OG: float32 [O, G].
        zero_OG: uint8 [O, G].
        loss_O: float64 [O], dw H dw^T, summed over tokens; H as it was before it was shrunk.
        energy_O: float64 [O], w H w^T, likewise.
        error_norm_O: float64 [O], squared norm of the row's error.
        norm_O: float64 [O], squared norm of the row.
        damping_O: float64 [O], damping that the row was solved with; 0 where nothing was factored.
        num_below_O: int64 [O], groups that need a scale below half of what can be stored.
        num_above_O: int64 [O], groups that need a scale above what can be stored.
        kept_O: float64 [O], the sum over groups of the scale over the one that clips nothing.
        num_rounds_O: int64 [O], rounds of refinement that lowered the row's loss.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    loss_O: Tensor
    energy_O: Tensor
    error_norm_O: Tensor
    norm_O: Tensor
    damping_O: Tensor
    num_below_O: Tensor
    num_above_O: Tensor
    kept_O: Tensor
    num_rounds_O: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name, for storage; ``SolvedRows(**tensors)`` is the inverse."""
        return dict(vars(self))

    def split(self, sizes: Sequence[int]) -> list[SolvedRows]:
        """Return consecutive parts of these numbers of rows."""
        parts = zip(*(torch.split(tensor, list(sizes)) for tensor in vars(self).values()), strict=True)
        return [SolvedRows(*part) for part in parts]

    @classmethod
    def join(cls, parts: Sequence[SolvedRows]) -> SolvedRows:
        """Return the rows of all parts in order; of one part, that."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Stack:
    """Rows of one or more linears that share an input.

    Attributes:
        weight_OI: float32 [O, I]. With activation-aware scales, weight and statistics are those after scaling.
        statistics: Statistics of the input.
        factored: GPTQ: what ``prepare_factor`` gave for these statistics; computed when it is None.
        name: What messages call it, of one that is solved with others.
    """

    weight_OI: Tensor
    statistics: Statistics
    factored: Factor | None = None
    name: str = ""

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Within the context, errors say which stack they are of."""
        try:
            yield
        except QuantizationError as error:
            if not self.name:
                raise
            message = f"{self.name}: {error.message}"
            raise QuantizationError(message, code=error.code, hint=error.hint, context=error.context) from error


@dataclass(frozen=True)
class _Attempt:
    """How a stack's rows are tried.

    Attributes:
        second_moment_II: Of the stack's input.
        importance: What a grid's errors are weighed by.
        factored: GPTQ's factor; None where columns are rounded one by one.
    """

    second_moment_II: Tensor
    importance: Tensor
    factored: Factor | None = None

    @property
    def damping(self) -> float:
        """Damping of the factor; 0 where there is none."""
        return 0.0 if self.factored is None else self.factored.damping


@dataclass(frozen=True)
class _Tile:
    """Rows of a stack [R, I], filled up with zero rows after the first ``num_rows``, and how they are tried."""

    stack: _OpenStack
    attempt: _Attempt
    weight_RI: Tensor
    num_rows: int


class _OpenStack:
    """A stack of which some rows are not solved yet.

    Attributes:
        pending: int64, positions of these rows.
        shrinkage: Of the statistics.
    """

    def __init__(self, method: Method, stack: Stack, scheme: Scheme, options: SolveOptions) -> None:
        with stack.naming():
            require_solvable(stack.weight_OI, stack.statistics, scheme)
        self._naming = stack.naming
        self._weight_OI = stack.weight_OI.detach()
        device = self._weight_OI.device
        self.shrinkage = stack.statistics.shrinkage
        self.pending = torch.arange(self._weight_OI.shape[0], device=device)
        moment_II = stack.statistics.second_moment_II.to(device)
        self._attempts = _attempts(method, moment_II, scheme, options, stack.factored)
        self._tiles: list[tuple[SolvedRows, Tensor]] = []
        self._solved: list[SolvedRows] = []
        self._order: list[Tensor] = []

    def next_tiles(self) -> Iterator[_Tile]:
        """Yield the pending rows for the next attempt.

        Raises:
            QuantizationError: when there is none.
        """
        with self._naming():
            attempt = next(self._attempts, None)
            if attempt is None:
                raise _not_factorable()
        tile_rows = TILE_ROWS.get(self._weight_OI.device.type, TILE_ROWS_DEVICE)
        for weight_RI in torch.split(self._weight_OI[self.pending], tile_rows):
            num_rows = weight_RI.shape[0]
            yield _Tile(self, attempt, torch.nn.functional.pad(weight_RI, (0, 0, 0, tile_rows - num_rows)), num_rows)

    def take(self, rows: SolvedRows, is_finite_R: Tensor) -> None:
        """Take in the rows of the next tile, and which of them stayed finite (bool)."""
        self._tiles.append((rows, is_finite_R))

    def close_attempt(self) -> None:
        """Keep what stayed finite; the other rows stay pending."""
        rows = SolvedRows.join([rows for rows, _ in self._tiles])
        is_finite = torch.cat([is_finite_R for _, is_finite_R in self._tiles])
        self._tiles = []
        self._solved.append(SolvedRows(*(tensor[is_finite] for tensor in vars(rows).values())))
        self._order.append(self.pending[is_finite])
        self.pending = self.pending[~is_finite]

    def rows(self) -> SolvedRows:
        """Return all rows in order, once none is pending.

        Raises:
            QuantizationError: when a loss overflows.
        """
        solved = self._solved[0]
        if len(self._solved) > 1:
            order = torch.argsort(torch.cat(self._order))
            solved = SolvedRows(*(tensor[order] for tensor in vars(SolvedRows.join(self._solved)).values()))
        with self._naming():
            _require_finite(solved)
        return solved


def prepare_factor(second_moment_II: Tensor, options: SolveOptions) -> Factor:
    """Return the factor of the second moment with the least damping of the ladder that allows one.

    Raises:
        QuantizationError: when no damping up to 1.0 does.
    """
    for damping in damping_ladder(options.damping):
        factored = factor(second_moment_II, damping, options.act_order)
        if factored is not None:
            return factored
    raise _not_factorable()


def solve_stacks(method: Method, stacks: Sequence[Stack], scheme: Scheme, options: SolveOptions) -> list[SolvedRows]:
    """Return the rows of every stack quantized; each row is bit-identical to solving it alone.

    Works on the weights' device. Products accumulate in float32, sums of losses and the factorization in float64.

    Args:
        method: How codes are found.
        stacks: At least one; all of one width, on one device.
        scheme: Their grid; its group size divides I.
        options: How to go about it.

    Raises:
        QuantizationError: naming what is not finite or does not fit together, or that no damping gave finite codes.
    """
    with torch.no_grad():
        found = [_OpenStack(method, stack, scheme, options) for stack in stacks]
        together = TILES_TOGETHER.get(stacks[0].weight_OI.device.type, TILES_TOGETHER_DEVICE)
        while pending := [stack for stack in found if stack.pending.numel()]:
            tiles = (tile for stack in pending for tile in stack.next_tiles())
            while some := list(islice(tiles, together)):
                for tile, (solved, is_finite_R) in zip(some, _solve_tiles(some, scheme, options), strict=True):
                    tile.stack.take(solved, is_finite_R)
            for stack in pending:
                stack.close_attempt()
        return [stack.rows() for stack in found]


def solve(
    method: Method,
    weight_OI: Tensor,
    row_sizes: Sequence[int],
    statistics: Statistics,
    scheme: Scheme,
    options: SolveOptions,
) -> tuple[QuantizedLinear, ...]:
    """Return the linears of a stack quantized, in order; each is bit-identical to solving it alone.

    Args:
        method: As for ``solve_stacks``.
        weight_OI: float32 [O, I], the rows of all linears in order.
        row_sizes: Rows of each linear; they add up to O.
        statistics: Statistics of the input they share.
        scheme: As for ``solve_stacks``.
        options: As for ``solve_stacks``.

    Raises:
        QuantizationError: as ``solve_stacks``.
    """
    if not row_sizes or min(row_sizes) <= 0 or sum(row_sizes) != weight_OI.shape[0]:
        raise QuantizationError(f"rows {list(row_sizes)} do not make up a weight of {weight_OI.shape[0]} rows")
    (rows,) = solve_stacks(method, [Stack(weight_OI, statistics)], scheme, options)
    num_dead = count_dead_inputs(statistics)
    return tuple(
        as_linear(part, scheme, options, statistics.num_tokens, num_dead, statistics.shrinkage)
        for part in rows.split(row_sizes)
    )


def count_dead_inputs(statistics: Statistics) -> int:
    """Return the number of input channels that were zero on every token."""
    return int((statistics.second_moment_II.diagonal() == 0).sum())


def as_linear(
    rows: SolvedRows, scheme: Scheme, options: SolveOptions, num_tokens: int, num_dead_inputs: int, shrinkage: float
) -> QuantizedLinear:
    """Return one linear from all its rows, with its report.

    Args:
        rows: All rows of the linear in order.
        scheme: Their grid.
        options: What was asked of the solver.
        num_tokens: Tokens of the statistics.
        num_dead_inputs: Input channels that were zero on every token.
        shrinkage: Of the statistics.
    """
    loss, energy = float(rows.loss_O.sum()), float(rows.energy_O.sum())
    error_norm, norm = float(rows.error_norm_O.sum()), float(rows.norm_O.sum())
    damping = float(rows.damping_O.max())
    report = SolveReport(
        loss=loss / num_tokens,
        relative_error=(loss / energy) ** 0.5 if energy > 0 else 0.0,
        weight_error=(error_norm / norm) ** 0.5 if norm > 0 else 0.0,
        damping=damping,
        shrinkage=shrinkage,
        clip=float(rows.kept_O.sum()) / rows.scale_OG.numel(),
        num_tokens=num_tokens,
        num_dead_inputs=num_dead_inputs,
        num_rounds=int(rows.num_rounds_O.max()),
        degradations=tuple(_degradations(rows, damping, options)),
    )
    # Own memory: a view would keep (and a serializer would write) the whole stack.
    return QuantizedLinear(scheme, rows.codes_OI.clone(), rows.scale_OG.clone(), rows.zero_OG.clone(), report)


def _degradations(rows: SolvedRows, damping: float, options: SolveOptions) -> Iterator[str]:
    if damping > options.damping:
        raised = int((rows.damping_O > options.damping).sum())
        yield (
            f"damping raised from {options.damping:g} to {damping:g} for {raised} of {rows.damping_O.numel()} rows: "
            "with less, H could not be factored or codes overflowed"
        )
    total = rows.scale_OG.numel()
    if below := int(rows.num_below_O.sum()):
        yield f"{below} of {total} groups need a scale below half the smallest normal float16"
    if above := int(rows.num_above_O.sum()):
        yield f"{above} of {total} groups need a scale above the largest that can be stored"


def _require_finite(rows: SolvedRows) -> None:
    sums = (rows.loss_O.sum(), rows.energy_O.sum(), rows.error_norm_O.sum(), rows.norm_O.sum())
    if not all(math.isfinite(float(total)) for total in sums):
        norm = float(rows.norm_O.sum()) ** 0.5
        raise QuantizationError(f"the loss overflows: weights as large as these ({norm:.3g}) cannot be stored")


def _not_factorable() -> QuantizationError:
    return QuantizationError(
        "the second moment could not be factored, or gave codes that are not finite, at any damping up to 1.0",
        hint="its statistics are damaged: calibrate again",
        code="quantize.not_factorable",
    )


def _attempts(
    method: Method, second_moment_II: Tensor, scheme: Scheme, options: SolveOptions, factored: Factor | None
) -> Iterator[_Attempt]:
    """Yield the ways to try a stack from the one asked for to the most damped."""
    importance_I = channel_importance(second_moment_II.diagonal())
    match method.codes:
        case Method.RTN:
            yield _Attempt(second_moment_II, importance_I)
        case Method.AWQ:
            yield _Attempt(second_moment_II, block_importance(second_moment_II, scheme.group_size))
        case Method.GPTQ:
            first = factored or prepare_factor(second_moment_II, options)
            yield _Attempt(second_moment_II, importance_I, first)
            for damping in (rung for rung in damping_ladder(options.damping) if rung > first.damping):
                more = factor(second_moment_II, damping, options.act_order)
                if more is not None:
                    yield _Attempt(second_moment_II, importance_I, more)


def _solve_tiles(tiles: Sequence[_Tile], scheme: Scheme, options: SolveOptions) -> list[tuple[SolvedRows, Tensor]]:
    """Return the rows of each tile solved, without those that fill it up, and which of them stayed finite (bool)."""
    nearest = [_round_tile(tile, scheme, options) for tile in tiles]
    targets = [
        Target(tile.weight_RI, found.scale_OG, found.zero_OG, tile.attempt.factored)
        for tile, found in zip(tiles, nearest, strict=True)
        if tile.attempt.factored is not None
    ]
    if not targets:
        everything = torch.ones_like(nearest[0].loss_O, dtype=torch.bool)
        return [_finish(tile, found, everything, scheme, options) for tile, found in zip(tiles, nearest, strict=True)]
    return [
        _finish(tile, _better(found, solved), solved.is_finite_O, scheme, options)
        for tile, found, solved in zip(tiles, nearest, solve_columns(targets, scheme), strict=True)
    ]


def _better(nearest: FoundRows, solved: SolvedColumns) -> FoundRows:
    """Return of each row what GPTQ found, or what is nearest where that has the lower loss."""
    is_worse_R = solved.loss_O > nearest.loss_O
    return replace(
        nearest,
        codes_OI=torch.where(is_worse_R[:, None], nearest.codes_OI, solved.codes_OI),
        loss_O=torch.where(is_worse_R, nearest.loss_O, solved.loss_O),
        error_norm_O=torch.where(is_worse_R, nearest.error_norm_O, solved.error_norm_O),
    )


def _round_tile(tile: _Tile, scheme: Scheme, options: SolveOptions) -> FoundRows:
    """Return the tile's rows rounded to nearest, on the grids that weigh errors as its attempt says."""
    codes_RI, scale_RG, zero_RG = round_rows(tile.weight_RI, tile.attempt.importance, scheme, options.clip_search)
    delta_RI = dequantize(codes_RI, scale_RG, zero_RG, scheme).sub_(tile.weight_RI)
    loss_R = row_losses(delta_RI, tile.attempt.second_moment_II)
    error_norm_R = delta_RI.square_().sum(-1, dtype=torch.float64)
    return FoundRows(codes_RI, scale_RG, zero_RG, loss_R, error_norm_R, torch.zeros_like(loss_R, dtype=torch.int64))


def _finish(
    tile: _Tile, found: FoundRows, is_finite_R: Tensor, scheme: Scheme, options: SolveOptions
) -> tuple[SolvedRows, Tensor]:
    """Refine what was found for a tile, and say what is to be said of its rows."""
    weight_RI, moment_II, shrinkage = tile.weight_RI, tile.attempt.second_moment_II, tile.stack.shrinkage
    found = refine_rows(weight_RI, found, moment_II, scheme, options.damping, options.refinement)
    delta_RI = dequantize(found.codes_OI, found.scale_OG, found.zero_OG, scheme).sub_(weight_RI)
    diagonal_I = moment_II.diagonal()
    solved = SolvedRows(
        codes_OI=found.codes_OI,
        scale_OG=found.scale_OG,
        zero_OG=found.zero_OG,
        loss_O=unshrunk_losses(found.loss_O, delta_RI, diagonal_I, shrinkage),
        energy_O=unshrunk_losses(row_losses(weight_RI, moment_II), weight_RI, diagonal_I, shrinkage),
        error_norm_O=found.error_norm_O,
        norm_O=weight_RI.square().sum(-1, dtype=torch.float64),
        damping_O=torch.full_like(found.loss_O, tile.attempt.damping),
        **vars(clipping(weight_RI, found.scale_OG, scheme)),
        num_rounds_O=found.rounds_O,
    )
    return SolvedRows(*(tensor[: tile.num_rows] for tensor in vars(solved).values())), is_finite_R[: tile.num_rows]
