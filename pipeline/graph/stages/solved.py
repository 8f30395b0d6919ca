"""What solves were asked for, and what they gave: the row ranges of linear groups joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.stages.call import Call
from pipeline.quantize.solve import SolvedRows, SolveOptions, as_linear
from pipeline.quantize.types import QuantizedLinear, Scheme
from pipeline.skeleton.groups import LinearRef


def scheme_of(params: Mapping[str, Any]) -> Scheme:
    """Return the grid that a unit's arguments describe."""
    return Scheme(**params["scheme"])


def options_of(params: Mapping[str, Any]) -> SolveOptions:
    """Return the solver's options that a unit's arguments describe."""
    return SolveOptions(**params["options"])


def members_of(call: Call, unit: WorkUnit) -> list[LinearRef]:
    """Return the linears of its group that a unit solves."""
    group = call.source.outline.groups[call.unit.block][unit.params["group"]]
    return [linear for linear in group.linears if linear.local_name in unit.params["members"]]


def expert_tokens(call: Call, part: WorkUnit) -> dict[str, int]:
    """Return for the members of a solved linear group that are parts of experts, by name, how many tokens the router
    sent to the expert."""
    routed = call.summary(part).get("expert_tokens", {})
    return {linear.name: routed[linear.expert] for linear in members_of(call, part) if linear.expert}


def solved_group(call: Call, parts: Sequence[WorkUnit]) -> dict[str, QuantizedLinear]:
    """Return a linear group's quantized members by name from the row ranges that they were solved in, in order."""
    members = members_of(call, parts[0])
    rows = SolvedRows.join([SolvedRows(**call.get(part)) for part in parts])
    facts = call.summary(parts[0])
    sizes = [linear.out_features for linear in members]
    scheme, options = scheme_of(parts[0].params), options_of(parts[0].params)
    return {
        linear.name: as_linear(part, scheme, options, facts["num_tokens"], facts["num_dead_inputs"], facts["shrinkage"])
        for linear, part in zip(members, rows.split(sizes), strict=True)
    }


def solved_groups(call: Call) -> dict[int, tuple[WorkUnit, ...]]:
    """Return the solves that the unit reads by the position of their linear group, each group's in the order of its
    rows."""
    by_group: dict[int, list[WorkUnit]] = {}
    for need in call.needs(Kind.SOLVE):
        by_group.setdefault(need.params["group"], []).append(need)
    return {
        position: tuple(sorted(parts, key=lambda part: part.params["rows"][0])) for position, parts in by_group.items()
    }


def solved_weights(call: Call) -> dict[str, Tensor]:
    """Return what the linears that the unit reads the solves of multiply by when they are quantized: float32, by local
    name of the weight, in the layout of the checkpoint."""
    weights = {}
    for parts in solved_groups(call).values():
        solved = solved_group(call, parts)
        for linear in members_of(call, parts[0]):
            weights[f"{linear.local_name}.weight"] = linear.to_rows(solved[linear.name].dequantize())
    return weights
