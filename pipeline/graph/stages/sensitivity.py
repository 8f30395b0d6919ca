"""What mixed precision is decided by: how much predictions change with each linear's outputs, and what each width costs
then."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.calibrate.sensitivity import output_sensitivity
from pipeline.graph.dag import Kind
from pipeline.graph.stages.call import Call
from pipeline.graph.stages.solved import groups_of
from pipeline.precision import Precision


def sense(call: Call) -> dict[str, Any]:
    """Write for each linear, by checkpoint name, the sums over a few sequences that ``output_sensitivity`` gives."""
    skeleton, tokens_NL = call.skeleton, call.tokens()
    linears = [[linear for group in block for linear in group.linears] for block in call.source.outline.groups]
    with skeleton.outer_attached(call.source.outer()):
        found = output_sensitivity(
            skeleton,
            tokens_NL,
            call.source.block,
            [[linear.local_name for linear in block] for block in linears],
            call.source.outline.vocabulary_size,
            Precision(call.params["precision"]),
            call.params["seed"],
        )
    names = {(index, linear.local_name): linear.name for index, block in enumerate(linears) for linear in block}
    call.put({names[place]: total_O for place, total_O in found.items()})
    return {"num_tokens": tokens_NL.numel()}


def appraise(call: Call) -> dict[str, Any]:
    """Weigh the losses of a solved linear group's rows by how much predictions change with them: nats per token that
    each member adds to the divergence, by name."""
    sensed, parts = call.needs(Kind.SENSE), call.needs(Kind.SOLVE)
    num_sensed = sum(call.summary(need)["num_tokens"] for need in sensed)
    loss_O = torch.cat([call.get(part, "loss_O")["loss_O"] for part in parts])
    groups, own = groups_of(call, parts[0]), parts[0].params["groups"].index(call.params["group"])
    num_tokens = call.summary(parts[0])["inputs"][own]["num_tokens"]
    split = iter(torch.split(loss_O / num_tokens, [linear.out_features for members in groups for linear in members]))
    rows = {linear.name: next(split) for members in groups for linear in members}
    damages = {}
    for linear in groups[own]:
        found = [call.get(need, linear.name).get(linear.name) for need in sensed]
        # An expert that none of these few sequences came to has no sums: it counts as if nothing depended on it.
        total_O = sum(sums.double() for sums in found if sums is not None)
        damages[linear.name] = float((rows[linear.name] * total_O).sum() / (2 * num_sensed))
    return {"damages": damages}
