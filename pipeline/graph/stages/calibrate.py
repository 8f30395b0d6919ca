"""Hidden states on their way through the source's blocks, and the sums over their tokens.

A *token slice* is a few sequences, fixed by the spec; a unit handles a span of slices, one after the other, while a
block's weights are in place. Statistics add up in a binary tree over the slices: whoever handles a span that is a node
of the tree adds inside it, ``add_spans`` adds neighbouring spans up to a node above them, and ``merge_spans`` the rest.
So the sums are the same bits for any number of workers, a worker sends one sum, not one for each slice, and nobody
takes in the sums of all workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.calibrate.collections import CROSS, Collections, Sums, conclude, plan_collections
from pipeline.calibrate.forward import compare_block, forward_block
from pipeline.graph.dag import WALKS, Kind, WorkUnit
from pipeline.graph.stages.call import Call
from pipeline.graph.stages.solved import solved_weights
from pipeline.graph.stages.variant import VariantReader
from pipeline.precision import Precision
from pipeline.quantize.statistics import from_tensors, to_tensors
from pipeline.quantize.types import Statistics

Node = TypeVar("Node")

HIDDEN_PREFIX = "hidden."
"""What the names of hidden states start with among a unit's tensors."""


def split_node(low: int, high: int) -> int:
    """Return where the tree splits the slices ``low`` to ``high``: after the largest power of two below their number.

    Every span that starts at a multiple of a power of two, and is as long or reaches the end, is a node then.
    """
    return low + (1 << (high - low - 1).bit_length() - 1)


def add_up(low: int, high: int, leaf: Callable[[int, int], Node | None], add_to: Callable[[Node, Node], Node]) -> Node:
    """Return the sum of the tree over the slices ``low`` to ``high``.

    Args:
        low: First slice.
        high: The slice after the last.
        leaf: Gives the sum of a node that is known as a whole, None of one that has to be added up from its parts.
        add_to: Adds the second node to the first, which it may overwrite.
    """
    known = leaf(low, high)
    if known is not None:
        return known
    middle = split_node(low, high)
    first = add_up(low, middle, leaf, add_to)
    return add_to(first, add_up(middle, high, leaf, add_to))


def embed(call: Call) -> dict[str, Any]:
    """Make the hidden states that enter block 0 for a span of token slices, from nothing but the weights that are named
    in its key."""
    skeleton = call.skeleton
    low: int = call.params["low"]
    with skeleton.embedding_attached(call.source.read(call.params["weights"])):
        for number, tokens in enumerate(call.params["tokens"], low):
            tokens_NL = torch.tensor(tokens, dtype=torch.int64, device=call.context.device)
            call.put({hidden_name(number): torch.cat([skeleton.embed(row[None]) for row in tokens_NL])})
    return {}


def calibrate(call: Call) -> dict[str, Any]:
    """Make one block's output hidden states for a span of slices, and the sums over all its tokens; the sums alone
    where nobody reads the hidden states, as those that the source's block makes of a variant's own. Linears that the
    unit reads the solves of are quantized."""
    skeleton, index, collections = call.skeleton, call.unit.block, _summed(call)
    hidden = hidden_states(call)
    weights = call.source.block_to_pass(index) | solved_weights(call)
    with _attached(call, weights):
        _pass_and_sum(call, lambda number: forward_block(skeleton, index, hidden.pop(number), collections))
    return {}


def compare(call: Call) -> dict[str, Any]:
    """Make the source's hidden states behind one block for a span of slices, and the sums over what the block's linears
    read behind the variant's own blocks, alone and with what they read in the source. Linears that the unit reads the
    solves of are the variant's own too."""
    skeleton, index, collections = call.skeleton, call.unit.block, _summed(call)
    hidden, own = hidden_states(call), hidden_states(call, is_last=True)
    own_weights = skeleton.dense(index, solved_weights(call), Precision(call.params["precision"]))
    with _attached(call, call.source.block_to_pass(index)):
        _pass_and_sum(
            call,
            lambda number: compare_block(
                skeleton, index, hidden.pop(number), own.pop(number), collections, own_weights
            ),
        )
    return {}


def _pass_and_sum(call: Call, pass_slice: Callable[[int], tuple[Tensor, list[Sums]]]) -> None:
    """Put out what slices are behind the unit's block, where somebody reads it, and the sums over all of them.

    Args:
        call: The unit.
        pass_slice: Gives both of a slice by its number.
    """
    low, high = call.params["low"], call.params["high"]
    is_end = call.params.get("is_end", False) or call.unit.block == call.skeleton.num_blocks - 1

    def slice_sums(start: int, end: int) -> list[Sums] | None:
        if end - start > 1:
            return None
        output, sums = pass_slice(start)
        if not is_end:
            call.put({hidden_name(start): output})
        return sums

    sums = add_up(low, high, slice_sums, _add_all)
    save_hidden(call)
    for position, total in zip(_summed_positions(call), sums, strict=True):
        call.put(_named(position, total))


def collections_of(call: Call) -> Collections:
    """Return what is added up at the unit's block."""
    outline = call.source.outline
    return plan_collections(outline.groups[call.unit.block], outline.experts)


def _summed_positions(call: Call) -> list[int]:
    """Return the positions of the collections that the unit adds up: all, or those of some linear groups."""
    return collections_of(call).read_by(call.params.get("groups"))


def _summed(call: Call) -> Collections:
    """Return those collections."""
    return collections_of(call).only(_summed_positions(call))


def _named(position: int, sums: Sums) -> dict[str, Tensor]:
    """Return a collection's sums by their names among a unit's tensors."""
    return {f"{sums_prefix(position)}{name}": tensor for name, tensor in sums.tensors().items()}


def sums_prefix(position: int) -> str:
    """Return what the names of a collection's sums start with among a unit's tensors."""
    return f"sums.{position}."


def _add_all(totals: list[Sums], parts: list[Sums]) -> list[Sums]:
    return [total.add(part) for total, part in zip(totals, parts, strict=True)]


def add_spans(call: Call) -> dict[str, Any]:
    """Make the sums of every collection over neighbouring spans that are together a node of the tree."""
    for position in _summed_positions(call):
        call.put(_named(position, _sum_of_needs(call, position, call.params["low"], call.params["high"])))
    return {}


def merge_spans(call: Call) -> dict[str, Any]:
    """Write the statistics of one linear group: the spans' sums, added as the tree over all slices says, drawn towards
    those over all tokens where that is asked for, and shrunk."""
    position, end = call.params["group"], max(need.params["high"] for need in call.unit.needs)
    middle = split_node(0, end) if end > 1 else end
    spans = [span for span in ((0, middle), (middle, end)) if span[0] < span[1]]
    collections = collections_of(call)

    def parts(place: int) -> list[Sums]:
        return [_sum_of_needs(call, place, *span) for span in spans]

    place, weight = collections.shared[position], call.params.get("expert_shrinkage", 0.0)
    found = conclude(parts(position), None if place is None else parts(place), weight, call.params["shrinkage"])
    call.put(to_tensors(found.statistics))
    if found.cross_II is not None:
        call.put({CROSS: found.cross_II})
    counted = zip(collections.items[position].counted, found.routed_E.tolist(), strict=True)
    routed = {f"{collections.items[position].experts}.{number}": count for number, count in counted}
    return {"expert_tokens": routed} if routed else {}


def _sum_of_needs(call: Call, position: int, low: int, high: int) -> Sums:
    """Return a collection's sums over slices, added up from the spans that the unit's needs are of."""
    prefix = sums_prefix(position)
    spans = {(need.params["low"], need.params["high"]): need for need in call.unit.needs}

    def span_sum(start: int, end: int) -> Sums | None:
        need = spans.get((start, end))
        if need is None:
            return None
        found = call.get(need, prefix)
        return Sums.of_tensors({name.removeprefix(prefix): tensor for name, tensor in found.items()})

    # Parts may lie on a shelf and be read again, so they are not added to in place.
    return add_up(low, high, span_sum, Sums.plus)


def forward(call: Call) -> dict[str, Any]:
    """Make one block's output hidden states for a span of slices, with the source's weights or a variant's."""
    skeleton, index = call.skeleton, call.unit.block
    hidden = hidden_states(call)
    # What a variant makes of held-out text is judged by a gate; nobody can calibrate on what is not finite.
    is_judged = call.unit.kind is Kind.FORWARD and bool(call.unit.variant)
    read = VariantReader(call)
    with read.rounding_inputs(), _attached(call, read(index)):
        for number in list(hidden):
            output, _ = forward_block(skeleton, index, hidden.pop(number), Collections(), must_be_finite=not is_judged)
            call.put({hidden_name(number): output})
    save_hidden(call)
    return {}


def _attached(call: Call, weights: dict[str, Tensor]) -> AbstractContextManager[Any]:
    """Within the context, the unit's block computes with ``weights``, which are used up, in the unit's precision."""
    skeleton, index, precision = call.skeleton, call.unit.block, Precision(call.params["precision"])
    return skeleton.attached(index, skeleton.dense(index, weights, precision), precision)


def hidden_name(number: int) -> str:
    """Return the name of a slice's hidden states among a unit's tensors; none starts with another's."""
    return f"{HIDDEN_PREFIX}{number:09d}"


def hidden_states(call: Call, *, is_last: bool = False) -> dict[int, Tensor]:
    """Return the hidden states that enter the unit's block, by slice: those of the first unit that it reads some of, or
    of the last."""
    walks = [need for need in call.unit.needs if need.kind in WALKS]
    return slice_states(call, walks[-1 if is_last else 0], range(call.params["low"], call.params["high"]))


def slice_states(call: Call, need: WorkUnit, numbers: Sequence[int]) -> dict[int, Tensor]:
    """Return slices' hidden states by slice: as a unit left them on a shelf, or from where they were saved.

    Args:
        call: The unit that reads them; its stand-ins for ``need`` are one place for each of ``numbers``.
        need: The unit that made them.
        numbers: The slices that are wanted.
    """
    places = call.unit.stand_ins.get(need.key, ())
    if places and call.shelf.get(need.key) is None and all(call.work.lookup(*place) for place in places):
        return {number: call.read(place)["hidden"] for number, place in zip(numbers, places, strict=True)}
    found = call.get(need, HIDDEN_PREFIX if len(numbers) > 1 else hidden_name(numbers[0]))
    return {number: found[hidden_name(number)] for number in numbers}


def save_hidden(call: Call) -> None:
    """Save the slices' hidden states where the unit says that it does."""
    for number, place in zip(range(call.params["low"], call.params["high"]), call.unit.saves):
        call.save(place, {"hidden": call.outputs[hidden_name(number)]})


def merged_of(call: Call, position: int) -> WorkUnit:
    """Return the unit that gives the statistics of the linear group at a position."""
    merged = call.need_of(Kind.MERGE, position)
    assert merged is not None, "statistics are read by whoever works on them"
    return merged


def statistics_of(call: Call, position: int) -> Statistics:
    """Return the statistics of the linear group at a position."""
    return from_tensors(call.get(merged_of(call, position)))
