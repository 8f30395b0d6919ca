"""One entry to every solver: rows of linears that share an input go in, codes and grids come out.

Dimension suffixes: O = rows of the stack, I = in_features, G = groups of a row, R = rows of a tile.

Rows are independent once the statistics are prepared (factored, cut into blocks), so linears that share an input are
solved as one stack, and a stack in any number of parts. That must not show in the bytes: what becomes of a row is
bit-identical whatever it is solved with. Matrix products round by their shape (libraries pick kernels by it), so all of
them see one shape only: rows are worked on in tiles of a fixed number of rows, the last one filled up with zero rows.
The tile also bounds memory: a few times R x I floats, whatever the stack.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import QuantizationError
from pipeline.quantize.checks import require_solvable
from pipeline.quantize.gptq import Factor, damping_ladder, factor, solve_columns
from pipeline.quantize.grid import block_importance, channel_importance, clipping
from pipeline.quantize.loss import row_losses
from pipeline.quantize.refine import FoundRows, refine_rows
from pipeline.quantize.rtn import round_rows
from pipeline.quantize.shrinkage import unshrunk_losses
from pipeline.quantize.types import QuantizedLinear, Scheme, SolveReport, Statistics, dequantize
from pipeline.spec import Method

TILE_ROWS = {"cpu": 192}
"""Rows worked on at once. On a CPU core what belongs to so many rows stays in cache."""

TILE_ROWS_DEVICE = 8192
"""The same on accelerators, where a step is bound by launches."""


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
        """Return the rows of all parts in order."""
        return cls(*(torch.cat(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class _SolvedTile:
    """What was found for the rows of a tile, and which of them stayed finite (bool [R])."""

    found: FoundRows
    is_finite_R: Tensor


_TileSolver = Callable[[Tensor], _SolvedTile]
"""Solves a tile of the weight [R, I]."""


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


def solve_rows(
    method: Method,
    weight_OI: Tensor,
    statistics: Statistics,
    scheme: Scheme,
    options: SolveOptions,
    factored: Factor | None = None,
) -> SolvedRows:
    """Return rows of one or more linears quantized; each row is bit-identical to solving it alone.

    Works on the weight's device. Products accumulate in float32, sums of losses and the factorization in float64.

    Args:
        method: How codes are found. With activation-aware scales, weight and statistics are those after scaling.
        weight_OI: float32 [O, I].
        statistics: Statistics of the input they share.
        scheme: Their grid; its group size divides I.
        options: How to go about it.
        factored: GPTQ: what ``prepare_factor`` gave for these statistics and options; computed when it is None.

    Raises:
        QuantizationError: naming what is not finite or does not fit together, or that no damping gave finite codes.
    """
    require_solvable(weight_OI, statistics, scheme)
    with torch.no_grad():
        weight_OI = weight_OI.detach()
        second_moment_II = statistics.second_moment_II.to(weight_OI.device)
        pending = torch.arange(weight_OI.shape[0], device=weight_OI.device)
        parts: list[SolvedRows] = []
        order: list[Tensor] = []
        for tile_solver, damping in _attempts(method, second_moment_II, scheme, options, factored):
            rows, is_finite = _solve_in_tiles(
                weight_OI[pending], second_moment_II, statistics.shrinkage, tile_solver, scheme, options, damping
            )
            parts.append(SolvedRows(*(tensor[is_finite] for tensor in vars(rows).values())))
            order.append(pending[is_finite])
            pending = pending[~is_finite]
            if not pending.numel():
                solved = parts[0] if len(parts) == 1 else _in_order(SolvedRows.join(parts), torch.cat(order))
                _require_finite(solved)
                return solved
    raise _not_factorable()


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
        method: As for ``solve_rows``.
        weight_OI: float32 [O, I], the rows of all linears in order.
        row_sizes: Rows of each linear; they add up to O.
        statistics: As for ``solve_rows``.
        scheme: As for ``solve_rows``.
        options: As for ``solve_rows``.

    Raises:
        QuantizationError: as ``solve_rows``.
    """
    if not row_sizes or min(row_sizes) <= 0 or sum(row_sizes) != weight_OI.shape[0]:
        raise QuantizationError(f"rows {list(row_sizes)} do not make up a weight of {weight_OI.shape[0]} rows")
    rows = solve_rows(method, weight_OI, statistics, scheme, options)
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


def _in_order(rows: SolvedRows, positions: Tensor) -> SolvedRows:
    order = torch.argsort(positions)
    return SolvedRows(*(tensor[order] for tensor in vars(rows).values()))


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
) -> Iterator[tuple[_TileSolver, float]]:
    """Yield tile solvers from the one asked for to the most damped, each with its damping (0: nothing factored)."""

    def rounding(importance: Tensor) -> _TileSolver:
        return lambda weight_RI: _round_tile(weight_RI, importance, second_moment_II, scheme, options)

    match method.codes:
        case Method.RTN:
            yield rounding(channel_importance(second_moment_II.diagonal())), 0.0
        case Method.AWQ:
            yield rounding(block_importance(second_moment_II, scheme.group_size)), 0.0
        case Method.GPTQ:
            first = factored or prepare_factor(second_moment_II, options)
            yield _gptq_solver(second_moment_II, first, scheme, options), first.damping
            for damping in (rung for rung in damping_ladder(options.damping) if rung > first.damping):
                more = factor(second_moment_II, damping, options.act_order)
                if more is not None:
                    yield _gptq_solver(second_moment_II, more, scheme, options), damping


def _gptq_solver(second_moment_II: Tensor, factored: Factor, scheme: Scheme, options: SolveOptions) -> _TileSolver:
    importance_I = channel_importance(second_moment_II.diagonal())

    def solve_tile(weight_RI: Tensor) -> _SolvedTile:
        nearest = _round_tile(weight_RI, importance_I, second_moment_II, scheme, options).found
        solved = solve_columns(weight_RI, nearest.scale_OG, nearest.zero_OG, scheme, factored)
        is_worse_R = solved.loss_O > nearest.loss_O
        found = replace(
            nearest,
            codes_OI=torch.where(is_worse_R[:, None], nearest.codes_OI, solved.codes_OI),
            loss_O=torch.where(is_worse_R, nearest.loss_O, solved.loss_O),
            error_norm_O=torch.where(is_worse_R, nearest.error_norm_O, solved.error_norm_O),
        )
        return _SolvedTile(found, solved.is_finite_O)

    return solve_tile


def _round_tile(
    weight_RI: Tensor, importance: Tensor, second_moment_II: Tensor, scheme: Scheme, options: SolveOptions
) -> _SolvedTile:
    codes_RI, scale_RG, zero_RG = round_rows(weight_RI, importance, scheme, options.clip_search)
    delta_RI = dequantize(codes_RI, scale_RG, zero_RG, scheme.group_size).sub_(weight_RI)
    loss_R = row_losses(delta_RI, second_moment_II)
    error_norm_R = delta_RI.square_().sum(-1, dtype=torch.float64)
    found = FoundRows(codes_RI, scale_RG, zero_RG, loss_R, error_norm_R, torch.zeros_like(loss_R, dtype=torch.int64))
    return _SolvedTile(found, torch.ones_like(loss_R, dtype=torch.bool))


def _solve_in_tiles(
    weight_OI: Tensor,
    second_moment_II: Tensor,
    shrinkage: float,
    tile_solver: _TileSolver,
    scheme: Scheme,
    options: SolveOptions,
    damping: float,
) -> tuple[SolvedRows, Tensor]:
    """Return the solved rows, and which of them stayed finite (bool [O])."""
    diagonal_I = second_moment_II.diagonal()
    tile_rows = TILE_ROWS.get(weight_OI.device.type, TILE_ROWS_DEVICE)
    tiles: list[SolvedRows] = []
    finite: list[Tensor] = []
    for weight_RI in torch.split(weight_OI, tile_rows):
        num_rows = weight_RI.shape[0]
        padded_RI = torch.nn.functional.pad(weight_RI, (0, 0, 0, tile_rows - num_rows))
        tile = tile_solver(padded_RI)
        found = refine_rows(padded_RI, tile.found, second_moment_II, scheme, options.damping, options.refinement)
        ranges = clipping(padded_RI, found.scale_OG, scheme)
        delta_RI = dequantize(found.codes_OI, found.scale_OG, found.zero_OG, scheme.group_size).sub_(padded_RI)
        solved = SolvedRows(
            codes_OI=found.codes_OI,
            scale_OG=found.scale_OG,
            zero_OG=found.zero_OG,
            loss_O=unshrunk_losses(found.loss_O, delta_RI, diagonal_I, shrinkage),
            energy_O=unshrunk_losses(row_losses(padded_RI, second_moment_II), padded_RI, diagonal_I, shrinkage),
            error_norm_O=found.error_norm_O,
            norm_O=padded_RI.square().sum(-1, dtype=torch.float64),
            damping_O=torch.full_like(found.loss_O, damping),
            **vars(ranges),
            num_rounds_O=found.rounds_O,
        )
        tiles.append(SolvedRows(*(tensor[:num_rows] for tensor in vars(solved).values())))
        finite.append(tile.is_finite_R[:num_rows])
    return SolvedRows.join(tiles), torch.cat(finite)
