"""What solves were asked for, and what they gave: the row ranges of linear groups joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.stages.call import Call
from pipeline.quantize.solve import SolvedRows, SolveOptions, as_linear
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.skeleton.groups import LinearRef


def scheme_of(params: Mapping[str, Any]) -> Scheme:
    """Return the grid that a unit's arguments describe."""
    return Scheme.of(params["scheme"])


def options_of(params: Mapping[str, Any]) -> SolveOptions:
    """Return the solver's options that a unit's arguments describe."""
    return SolveOptions(**params["options"])


def groups_of(call: Call, solve: WorkUnit) -> list[list[LinearRef]]:
    """Return the linears that a solve is of, by linear group, in the order of their rows."""
    groups, names = call.source.outline.groups[call.unit.block], solve.params["members"]
    return [
        [linear for linear in groups[position].linears if linear.local_name in names]
        for position in solve.params["groups"]
    ]


def solved_stacks(call: Call) -> list[list[WorkUnit]]:
    """Return the solves that the unit reads, those of one stack of rows together and in order, by the position of the
    first linear group."""
    stacks: dict[tuple[int, ...], list[WorkUnit]] = {}
    for need in call.needs(Kind.SOLVE):
        stacks.setdefault(tuple(need.params["groups"]), []).append(need)
    return [sorted(stacks[positions], key=lambda part: part.params["rows"][0]) for positions in sorted(stacks)]


@dataclass(frozen=True)
class SolvedLinear:
    """A linear as it was solved.

    Attributes:
        linear: Which.
        position: Of its linear group.
        quantized: Codes, grids and report.
        expert_tokens: Tokens that the router sent to its expert; None where it is part of none.
    """

    linear: LinearRef
    position: int
    quantized: QuantizedLinear
    expert_tokens: int | None


def solved_linears(call: Call, parts: Sequence[WorkUnit]) -> list[SolvedLinear]:
    """Return the linears of a stack from the ranges of rows that it was solved in, in order."""
    rows = SolvedRows.join([SolvedRows(**call.get(part)) for part in parts])
    params, inputs = parts[0].params, call.summary(parts[0])["inputs"]
    groups = groups_of(call, parts[0])
    scheme, options = scheme_of(params), options_of(params)
    split = iter(rows.split([linear.out_features for members in groups for linear in members]))
    return [
        SolvedLinear(
            linear,
            position,
            as_linear(next(split), scheme, options, facts["num_tokens"], facts["num_dead_inputs"], facts["shrinkage"]),
            facts["expert_tokens"][linear.expert] if linear.expert and "expert_tokens" in facts else None,
        )
        for position, members, facts in zip(params["groups"], groups, inputs, strict=True)
        for linear in members
    ]


def solved_weights(call: Call) -> dict[str, Tensor]:
    """Return what the linears that the unit reads the solves of multiply by when they are quantized: float32, by local
    name of the weight, in the layout of the checkpoint."""
    return {
        f"{solved.linear.local_name}.weight": solved.linear.to_rows(solved.quantized.dequantize())
        for parts in solved_stacks(call)
        for solved in solved_linears(call, parts)
    }
