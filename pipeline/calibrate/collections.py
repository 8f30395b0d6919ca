"""What is added up while tokens pass a block: of which linear's input, over which tokens.

A *collection* is one set of sums. Without experts there is one for each linear group. In a mixture of experts

- ``all``: every expert sees all tokens. Gate and up of all experts share one input, hence one collection; every
  expert's down has one of its own, over all tokens.
- ``routed``: every expert sees the tokens that the router sent to it, each counted once, whatever its weight: the error
  of an expert's output is what is to be small, and its weight is the router's business. A collection for each expert's
  gate and up, and one for its down.
- ``shrinkage``: both. The statistics of a group are, per token, (own + lambda * shared) / (1 + lambda): own over the
  tokens of its expert, shared over all tokens. An expert that no token was sent to has the shared ones alone.

For each group with experts, the tokens that the router sent to each of them are counted, whatever the collection is of.

Sums stay sums over slices, so they add up in any fixed tree; blending and shrinking is done once, on the totals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.quantize.shrinkage import estimate_shrinkage, shrink, shrink_moment
from pipeline.quantize.statistics import accumulate, add, empty, from_tensors, merge, to_tensors
from pipeline.quantize.types import Statistics
from pipeline.skeleton.experts import Experts
from pipeline.skeleton.groups import LinearGroup
from pipeline.spec import ExpertStatistics

COUNTS = "expert_tokens"
"""Name of the counts among a collection's tensors."""

CROSS = "cross_moment"
"""Name of the products with the source's inputs among a collection's tensors."""


@dataclass(frozen=True)
class Sums:
    """What is known of one collection.

    Attributes:
        statistics: Sums over its tokens.
        routed_E: int64 [E], for each expert of the group the tokens that the router sent to it; empty without experts.
        cross_II: float32 [I, I], where inputs are compared: the sum of x x'^T, x' being those that the statistics are
            of, and x the same tokens' in the source.
    """

    statistics: Statistics
    routed_E: Tensor
    cross_II: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums as named tensors; ``of_tensors`` is the exact inverse."""
        counts = {COUNTS: self.routed_E} if self.routed_E.numel() else {}
        cross = {CROSS: self.cross_II} if self.cross_II is not None else {}
        return to_tensors(self.statistics) | counts | cross

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Sums:
        """Return the sums stored by ``tensors``."""
        routed_E = tensors.get(COUNTS, torch.zeros(0, dtype=torch.int64))
        return cls(from_tensors(tensors), routed_E, tensors.get(CROSS))

    def add(self, part: Sums) -> Sums:
        """Return the sums over the tokens of both, in the memory of the first: use the result, forget the first."""
        cross_II = None if self.cross_II is None else self.cross_II.add_(part.crossed)
        return Sums(add(self.statistics, part.statistics), self.routed_E + part.routed_E, cross_II)

    def plus(self, part: Sums) -> Sums:
        """Return the sums over the tokens of both; they stay as they are."""
        cross_II = None if self.cross_II is None else self.cross_II + part.crossed
        return Sums(merge([self.statistics, part.statistics]), self.routed_E + part.routed_E, cross_II)

    @property
    def crossed(self) -> Tensor:
        """The products with the source's inputs, of sums that have them."""
        assert self.cross_II is not None, "these inputs were not compared"
        return self.cross_II


@dataclass(frozen=True)
class Collection:
    """One set of sums.

    Attributes:
        linear: Local name of the linear whose input is summed.
        in_features: Channels of the input.
        experts: Local name of the experts module that the linear belongs to; empty for others.
        counted: Numbers of the experts whose tokens are counted.
        of: Number of the expert whose own tokens alone are summed; None for all that the linear sees.
    """

    linear: str
    in_features: int
    experts: str = ""
    counted: tuple[int, ...] = ()
    of: int | None = None


@dataclass(frozen=True)
class Collections:
    """What is added up at one block.

    Attributes:
        items: For each linear group its own collection, in order, and after them those that several share.
        shared: For each linear group the position of the collection that its own is drawn towards, or None.
        sees_all: Whether every expert is run on all tokens.
    """

    items: tuple[Collection, ...] = ()
    shared: tuple[int | None, ...] = ()
    sees_all: bool = False

    @property
    def widths(self) -> list[int]:
        """Channels of each collection."""
        return [item.in_features for item in self.items]

    def read_by(self, groups: Iterable[int] | None) -> list[int]:
        """Return the positions of the collections that statistics of some linear groups are made of, given by theirs;
        of all for None."""
        if groups is None:
            return list(range(len(self.items)))
        found = [place for group in groups for place in (group, self.shared[group]) if place is not None]
        return sorted(set(found))

    def only(self, positions: Sequence[int]) -> Collections:
        """Return the collections at some positions, in this order, which groups are not told apart any more."""
        return Collections(tuple(self.items[position] for position in positions), sees_all=self.sees_all)


def plan_collections(groups: Sequence[LinearGroup], experts: ExpertStatistics) -> Collections:
    """Return what is added up at a block with these linear groups, which were made for the same ``experts``."""
    items = [_collection(group, is_own=experts is not ExpertStatistics.ALL) for group in groups]
    shared: list[int | None] = [None] * len(groups)
    if experts is ExpertStatistics.SHRINKAGE:
        places: dict[str, int] = {}
        for position, group in enumerate(groups):
            if group.expert:
                # What gate and up of one expert read is what those of all others read; for down there is no other.
                reads = group.linears[0].local_name
                is_common = reads.rpartition(".")[2] != "down_proj"
                key = group.linears[0].experts if is_common else reads
                if key not in places:
                    places[key] = len(items)
                    items.append(Collection(reads, group.in_features, group.linears[0].experts))
                shared[position] = places[key]
    return Collections(tuple(items), tuple(shared), sees_all=experts is not ExpertStatistics.ROUTED)


def _collection(group: LinearGroup, *, is_own: bool) -> Collection:
    members = [linear for linear in group.linears if linear.expert]
    if not members:
        return Collection(group.linears[0].local_name, group.in_features)
    # Of an expert's linear, whatever else reads the same input: when it is called, the router has chosen.
    counted = tuple(dict.fromkeys(int(linear.expert.rpartition(".")[2]) for linear in members))
    of = counted[0] if is_own else None
    return Collection(members[0].local_name, group.in_features, members[0].experts, counted, of)


@contextmanager
def collecting(block: nn.Module, collections: Collections, device: str) -> Iterator[list[Sums]]:
    """Within the context, what the block's linears read is added to the sums given, one for each collection."""
    sums = [
        Sums(empty(item.in_features, device), torch.zeros(len(item.counted), dtype=torch.int64))
        for item in collections.items
    ]

    def hook(position: int, item: Collection) -> Any:
        experts = block.get_submodule(item.experts) if item.experts else None

        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TI, before = args[0].flatten(0, -2), sums[position]
            if isinstance(experts, Experts):
                before = replace(before, routed_E=before.routed_E + _routed(experts, item))
                if item.of is not None and experts.sees_all:
                    x_TI = x_TI[experts.rows[item.of]]
            x_TI = _as_multiplied(module, x_TI)
            sums[position] = replace(before, statistics=accumulate(before.statistics, x_TI))

        return take

    with _hooked(block, collections, hook):
        yield sums


class Comparison:
    """Adds up what a block's linears read, once it was told what they read in the source. See ``comparing``.

    Attributes:
        sums: Of each collection.
        is_source: Whether what passes the block now is the source's.
    """

    def __init__(self, collections: Collections, device: str) -> None:
        self.is_source = True
        self.sums = [
            Sums(
                empty(item.in_features, device),
                torch.zeros(len(item.counted), dtype=torch.int64),
                torch.zeros(item.in_features, item.in_features, device=device),
            )
            for item in collections.items
        ]
        self._source: dict[int, Tensor] = {}

    def take(self, position: int, x_TI: Tensor, routed_E: Tensor) -> None:
        """Take in what the linear of a collection reads."""
        x_TI = x_TI.to(torch.float32)
        if self.is_source:
            self._source[position] = x_TI
            return
        before = self.sums[position]
        self.sums[position] = Sums(
            accumulate(before.statistics, x_TI),
            before.routed_E + routed_E,
            before.crossed.addmm_(self._source.pop(position).t(), x_TI),
        )


@contextmanager
def comparing(block: nn.Module, collections: Collections, device: str) -> Iterator[Comparison]:
    """Within the context, what the block's linears read is compared: first of some tokens in the source, then of the
    same tokens behind quantized blocks. Every linear has to see all tokens both times."""
    assert all(item.of is None for item in collections.items), "experts that see some tokens cannot be compared"
    comparison = Comparison(collections, device)

    def hook(position: int, item: Collection) -> Any:
        experts = block.get_submodule(item.experts) if item.experts else None

        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            comparison.take(position, args[0].flatten(0, -2), _routed(experts, item))

        return take

    with _hooked(block, collections, hook):
        yield comparison


@contextmanager
def _hooked(block: nn.Module, collections: Collections, make_hook: Callable[[int, Collection], Any]) -> Iterator[None]:
    """Within the context, a hook is called before the linear of each collection, made from its position and itself."""
    handles = [
        block.get_submodule(item.linear).register_forward_pre_hook(make_hook(position, item))
        for position, item in enumerate(collections.items)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_multiplied(module: nn.Module, x_TI: Tensor) -> Tensor:
    """Return what a linear reads as it multiplies it. On a GPU that is what bfloat16 sums are fast of; on the CPU its
    products are told what to round (``skeleton/products.py``)."""
    weight = getattr(module, "weight", None)
    if x_TI.device.type == "cpu" or not isinstance(weight, Tensor) or weight.dtype is not torch.bfloat16:
        return x_TI
    return x_TI.to(torch.bfloat16)


def _routed(experts: nn.Module | None, item: Collection) -> Tensor:
    """Return how many of the tokens that pass now the router has sent to each counted expert."""
    if not isinstance(experts, Experts):
        return torch.zeros(len(item.counted), dtype=torch.int64)
    return torch.tensor([experts.rows[number].numel() for number in item.counted], dtype=torch.int64)


def conclude(own: Sequence[Sums], shared: Sequence[Sums] | None, weight: float, shrinkage: float | None = None) -> Sums:
    """Return what a linear group is solved with: sums over all its tokens, drawn towards shared ones, then shrunk.

    Args:
        own: Sums over the group's own tokens, of the two halves of the text, or of the whole; they stay as they are.
        shared: The same over the tokens that these are drawn towards; None where there is nothing.
        weight: Of the shared ones, that of the own being 1.
        shrinkage: Share of the off-diagonal entries of moments to take off. None finds it from how the halves differ;
            of a whole it takes off nothing.
    """
    total = _total(own)
    statistics = blend(total.statistics, None if shared is None else _total(shared).statistics, weight)
    if shrinkage is None:
        halves = [part.statistics for part in own]
        if shared is not None:
            halves = [blend(half, other.statistics, weight) for half, other in zip(halves, shared, strict=True)]
        shrinkage = estimate_shrinkage(*halves) if len(halves) > 1 else 0.0
    cross_II = None if total.cross_II is None else shrink_moment(total.cross_II, shrinkage)
    return replace(total, statistics=shrink(statistics, shrinkage), cross_II=cross_II)


def _total(parts: Sequence[Sums]) -> Sums:
    """Return the sum of one part or two, in memory of its own."""
    first, *rest = parts
    if rest:
        return first.plus(*rest)
    return replace(
        first,
        statistics=merge([first.statistics]),
        cross_II=None if first.cross_II is None else first.cross_II.clone(),
    )


def blend(own: Statistics, shared: Statistics | None, shrinkage: float) -> Statistics:
    """Return the statistics that a group is solved with.

    With ``shared``: (own / n + shrinkage * shared / m) / (1 + shrinkage) for each sum, n and m the tokens of either,
    times m, so that they stand for as many tokens as there are; ``shared`` alone where n is 0. Maxima are of both.

    Without, ``own``; where no token was seen, those of uncorrelated inputs of one size, with which every solver rounds
    to nearest: whoever reports the group says so.

    Args:
        own: Sums over the group's own tokens.
        shared: Sums over the tokens that it is drawn towards, of which there are some; None where there is nothing.
        shrinkage: Weight of the shared ones, that of the own being 1.
    """
    if shared is None:
        return own if own.num_tokens else _uncorrelated(own)
    if not own.num_tokens:
        return shared
    own_weight = shared.num_tokens / own.num_tokens / (1 + shrinkage)
    shared_weight = shrinkage / (1 + shrinkage)
    return Statistics(
        second_moment_II=own.second_moment_II * own_weight + shared.second_moment_II * shared_weight,
        abs_sum_I=own.abs_sum_I * own_weight + shared.abs_sum_I * shared_weight,
        abs_max_I=torch.maximum(own.abs_max_I, shared.abs_max_I),
        num_tokens=shared.num_tokens,
    )


def _uncorrelated(like: Statistics) -> Statistics:
    ones_I = torch.ones_like(like.abs_sum_I)
    return Statistics(torch.diag(ones_I), ones_I, ones_I.clone(), 1)
