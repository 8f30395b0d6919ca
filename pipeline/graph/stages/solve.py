"""From statistics and weights to codes: factors, activation-aware scales, and the solves of row ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.calibrate.collections import CROSS
from pipeline.graph.dag import Kind
from pipeline.graph.folds import ScaleResult, fold_block, scope_of, search_group_scales
from pipeline.graph.stages.calibrate import statistics_of
from pipeline.graph.stages.call import Call
from pipeline.graph.stages.solved import members_of, options_of, scheme_of
from pipeline.quantize.compensation import compensated, compensation
from pipeline.quantize.gptq import Factor
from pipeline.quantize.solve import count_dead_inputs, prepare_factor, solve_rows
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
            statistics_of(call),
            scheme_of(call.params),
            options_of(call.params),
            lambda weight_OI: _compensated(call, weight_OI),
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


def _compensated(call: Call, weight_OI: Tensor) -> Tensor:
    """Return rows of the unit's linear group as they are to be quantized."""
    changes = call.needs(Kind.COMPENSATE)
    return compensated(weight_OI, call.get(changes[0])["change"]) if changes else weight_OI


def factor_group(call: Call) -> dict[str, Any]:
    """Make the factor of one linear group's second moment, which all row ranges share, and all GPTQ variants whose
    weights are not scaled."""
    statistics = _scaled_statistics(call, scale_results(call))
    factored = prepare_factor(statistics.second_moment_II, options_of(call.params))
    call.put(factored.tensors())
    return {}


def solve_range(call: Call) -> dict[str, Any]:
    """Write codes, grids and losses of a range of rows of one linear group, whose members are rows of one matrix."""
    results, position = scale_results(call), call.params["group"]
    statistics, weight_OI = _scaled_statistics(call, results), _compensated(call, _stack(call, results))
    if position in results:
        weight_OI = weight_OI * results[position].scale_I
    factors = call.needs(Kind.FACTOR)
    factored = Factor.of(call.get(factors[0])) if factors else None
    method, scheme, options = Method(call.params["method"]), scheme_of(call.params), options_of(call.params)
    rows = solve_rows(method, weight_OI.contiguous(), statistics, scheme, options, factored)
    call.put(rows.tensors())
    loss, energy = float(rows.loss_O.sum()), float(rows.energy_O.sum())
    routed = call.summary(call.need(Kind.MERGE)).get("expert_tokens")
    return {
        **({"expert_tokens": routed} if routed else {}),
        "num_tokens": statistics.num_tokens,
        "num_dead_inputs": count_dead_inputs(statistics),
        "shrinkage": statistics.shrinkage,
        "loss": loss / statistics.num_tokens,
        "relative_error": (loss / energy) ** 0.5 if energy > 0 else 0.0,
    }


def _scaled_statistics(call: Call, results: Mapping[int, ScaleResult]) -> Statistics:
    """Return the statistics of the unit's linear group, whose input is divided by the group's scale if it has one."""
    statistics, result = statistics_of(call), results.get(call.params["group"])
    return statistics if result is None else rescale(statistics, result.scale_I)


def _stack(call: Call, results: Mapping[int, ScaleResult]) -> Tensor:
    """Return the unit's rows [rows, in_features] of its members, which lie one below the other, with every scale of the
    block that concerns them taken up. Only the members that have such rows are read."""
    first, last = call.params["rows"]
    wanted: dict[str, tuple[LinearRef, int, int]] = {}
    above = 0
    for linear in members_of(call, call.unit):
        low, high = max(first - above, 0), min(last - above, linear.out_features)
        if low < high:
            wanted[linear.local_name + ".weight"] = linear, low, high
        above += linear.out_features
    weights = call.source.block(call.unit.block, wanted)
    folded = fold_block({name: tensor.to(call.context.device) for name, tensor in weights.items()}, results.values())
    return torch.cat([linear.to_rows(folded[name])[low:high].float() for name, (linear, low, high) in wanted.items()])
