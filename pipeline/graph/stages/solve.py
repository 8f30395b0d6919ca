"""From statistics and weights to codes: factors, activation-aware scales, and the solves of row ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pipeline.calibrate.collections import CROSS
from pipeline.graph.dag import Kind
from pipeline.graph.folds import ScaleResult, fold_block, scope_of, search_group_scales
from pipeline.graph.stages.calibrate import merged_of, statistics_of
from pipeline.graph.stages.call import Call
from pipeline.graph.stages.solved import groups_of, options_of, scheme_of
from pipeline.quantize.compensation import compensated, compensation
from pipeline.quantize.gptq import Factor
from pipeline.quantize.solve import SolvedRows, Stack, count_dead_inputs, prepare_factor, solve_stacks
from pipeline.quantize.statistics import rescale
from pipeline.quantize.types import Statistics
from pipeline.skeleton.groups import LinearRef
from pipeline.spec import Method


def scales(call: Call) -> dict[str, Any]:
    """Write the activation-aware scale of one linear group and the layer that takes up its inverse."""
    skeleton, index = call.skeleton, call.unit.block
    weights = call.source.block(index, scope_of(call.group, skeleton.block_tensors(index)))
    with skeleton.attached(index, weights):
        result = search_group_scales(
            skeleton,
            call.group,
            weights,
            statistics_of(call, call.params["group"]),
            scheme_of(call.params),
            options_of(call.params),
            lambda weight_OI: _compensated(call, call.params["group"], weight_OI),
            is_smooth=call.params["is_smooth"],
        )
    call.put(result.tensors)
    return result.summary


def scale_results(call: Call) -> dict[int, ScaleResult]:
    """Return the scales of the block's groups that have some, by group position."""
    results = {}
    for need in call.needs(Kind.SCALES):
        result = ScaleResult.load(call.get(need), call.summary(need))
        if result.producer is not None:
            results[need.params["group"]] = result
    return results


def compensate(call: Call) -> dict[str, Any]:
    """Make what the weights of one linear group are changed by for what the blocks before it do to its input."""
    found = call.get(call.need(Kind.MERGE))
    call.put({"change": compensation(found["second_moment"], found[CROSS], call.params["share"])})
    return {}


def _compensated(call: Call, position: int, weight_OI: Tensor) -> Tensor:
    """Return rows of the linear group at a position as they are to be quantized."""
    change = call.need_of(Kind.COMPENSATE, position)
    return weight_OI if change is None else compensated(weight_OI, call.get(change)["change"])


def factor_group(call: Call) -> dict[str, Any]:
    """Make the factor of one linear group's second moment, which all row ranges share, and all GPTQ variants whose
    weights are not scaled."""
    statistics = _scaled_statistics(call, scale_results(call), call.params["group"])
    factored = prepare_factor(statistics.second_moment_II, options_of(call.params))
    call.put(factored.tensors())
    return {}


def solve_range(call: Call) -> dict[str, Any]:
    """Write codes, grids and losses of a range of rows of one linear group, whose members are rows of one matrix; or of
    all rows of several groups, one below the other."""
    results, positions = scale_results(call), call.params["groups"]
    method, scheme, options = Method(call.params["method"]), scheme_of(call.params), options_of(call.params)
    stacks, groups = [], call.source.outline.groups[call.unit.block]
    for position, weight_OI in zip(positions, _split(call, _rows_to_solve(call, results)), strict=True):
        statistics, factor = _scaled_statistics(call, results, position), call.need_of(Kind.FACTOR, position)
        own_OI = _compensated(call, position, weight_OI)
        if position in results:
            own_OI = own_OI * results[position].scale_I
        factored = None if factor is None else Factor.of(call.get(factor))
        # Of one group the unit's title says which it is.
        name = groups[position].label if len(positions) > 1 else ""
        stacks.append(Stack(own_OI.contiguous(), statistics, factored, name))
    solved = solve_stacks(method, stacks, scheme, options)
    call.put(SolvedRows.join(solved).tensors())
    losses = [
        float(rows.loss_O.sum()) / stack.statistics.num_tokens for rows, stack in zip(solved, stacks, strict=True)
    ]
    loss, energy = (sum(float(vars(rows)[name].sum()) for rows in solved) for name in ("loss_O", "energy_O"))
    return {
        "inputs": [_input_facts(call, *own) for own in zip(positions, stacks, strict=True)],
        "loss": sum(losses),
        "relative_error": (loss / energy) ** 0.5 if energy > 0 else 0.0,
    }


def _split(call: Call, weight_OI: Tensor) -> Sequence[Tensor]:
    """Return the unit's rows by linear group: where it solves a range of rows, all are of one."""
    if len(call.params["groups"]) == 1:
        return [weight_OI]
    sizes = [sum(linear.out_features for linear in members) for members in groups_of(call, call.unit)]
    return torch.split(weight_OI, sizes)


def _input_facts(call: Call, position: int, stack: Stack) -> dict[str, Any]:
    """Return what is known of the input of a solved linear group, for ``solved_linears``."""
    routed = call.summary(merged_of(call, position)).get("expert_tokens")
    return {
        **({"expert_tokens": routed} if routed else {}),
        "num_tokens": stack.statistics.num_tokens,
        "num_dead_inputs": count_dead_inputs(stack.statistics),
        "shrinkage": stack.statistics.shrinkage,
    }


def _scaled_statistics(call: Call, results: Mapping[int, ScaleResult], position: int) -> Statistics:
    """Return the statistics of a linear group, whose input is divided by the group's scale if it has one."""
    statistics, result = statistics_of(call, position), results.get(position)
    return statistics if result is None else rescale(statistics, result.scale_I)


def _rows_to_solve(call: Call, results: Mapping[int, ScaleResult]) -> Tensor:
    """Return the unit's rows [rows, in_features] of its members, which lie one below the other, with every scale of the
    block that concerns them taken up. Only the members that have such rows are read."""
    first, last = call.params["rows"]
    wanted: dict[str, tuple[LinearRef, int, int]] = {}
    above = 0
    for linear in chain.from_iterable(groups_of(call, call.unit)):
        low, high = max(first - above, 0), min(last - above, linear.out_features)
        if low < high:
            wanted[linear.local_name + ".weight"] = linear, low, high
        above += linear.out_features
    weights = call.source.block(call.unit.block, wanted)
    folded = fold_block({name: tensor.to(call.context.device) for name, tensor in weights.items()}, results.values())
    return torch.cat([linear.to_rows(folded[name])[low:high].float() for name, (linear, low, high) in wanted.items()])
