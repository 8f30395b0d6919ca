"""What units move: weights, stored outputs, and what one worker hands to another. Bytes, for the simulator."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.shape import ModelShape


class Route(StrEnum):
    """How bytes went."""

    WEIGHTS = "weights"
    READ = "store, read"
    WRITTEN = "store, written"
    PEER = "within a node"
    NETWORK = "between nodes"


class Read(NamedTuple):
    """Something that a unit reads through the link of its node.

    Attributes:
        name: What it is; a node reads it once.
        num_bytes: Its size.
        route: Whether it is the source's, or of the work store.
        whole: Name of what it is a part of; a node that has that need not read the part.
    """

    name: str
    num_bytes: float
    route: Route
    whole: str = ""


class Traffic:
    """Bytes that the units of one source move."""

    def __init__(self, outline: ModelShape) -> None:
        self._outline = outline
        self.block_bytes = cache(self._block_bytes)

    def reads(self, unit: WorkUnit, held: Collection[str] = ()) -> Iterator[Read]:
        """Yield what a unit reads of the source's weights and of the work store, where workers hold ``held``."""
        for need in unit.needs:
            if need.is_durable and need.key not in held:
                yield Read(need.key, need.out_bytes, Route.READ)
        match unit.kind:
            case Kind.EMBED | Kind.OUTER:
                yield Read("outer", self._outer_bytes, Route.WEIGHTS)
            case Kind.CALIBRATE | Kind.COMPARE | Kind.SCALES | Kind.PACK:
                yield self._block(unit.block)
            case Kind.SOLVE:
                yield from (self._group(unit.block, position) for position in unit.params["groups"])
            case Kind.FORWARD:
                if not unit.variant:
                    yield self._block(unit.block)
            case Kind.SENSE:
                yield Read("outer", self._outer_bytes, Route.WEIGHTS)
                yield from map(self._block, range(self._outline.skeleton.num_blocks))
            case Kind.GENERATE | Kind.CONTINUE:
                if not unit.variant:
                    yield Read("outer", self._outer_bytes, Route.WEIGHTS)
                    yield from map(self._block, self._continued_blocks(unit))
            case Kind.VERIFY:
                yield Read(unit.label, unit.params["size_bytes"], Route.WEIGHTS)
            case Kind.PROPAGATE | Kind.ADD | Kind.MERGE | Kind.COMPENSATE | Kind.FACTOR | Kind.APPRAISE | Kind.SCORE:
                pass

    def ahead(self, unit: WorkUnit) -> Iterator[Read]:
        """Yield what is read ahead while a unit runs: the source's next block, where the next unit needs it."""
        is_walk = unit.kind in (Kind.EMBED, Kind.CALIBRATE, Kind.COMPARE, Kind.PROPAGATE) or (
            unit.kind is Kind.FORWARD and not unit.variant
        )
        if is_walk and unit.block + 1 < self._outline.skeleton.num_blocks:
            yield self._block(unit.block + 1)

    def written_bytes(self, unit: WorkUnit) -> float:
        """Return what a unit writes to the work store: its output, or the hidden states that it saves on the way."""
        if unit.is_durable:
            return unit.out_bytes
        return unit.out_bytes - self._sum_bytes(unit) if unit.saves else 0.0

    def fetched_bytes(self, unit: WorkUnit, need: WorkUnit) -> float:
        """Return what a unit takes of another's passing output."""
        if unit.kind in (Kind.ADD, Kind.MERGE):
            return unit.out_bytes  # sums are as large as what becomes of them
        if unit.kind is Kind.SCORE:
            num_slices: int = need.params["high"] - need.params["low"]
            return need.out_bytes / num_slices
        return need.out_bytes - self._sum_bytes(need)

    def resident(self, unit: WorkUnit) -> tuple[str, float]:
        """Return what weights a unit passes by again and again, and how many they are; nothing for most."""
        if unit.kind is not Kind.CONTINUE or unit.params["is_idle"]:
            return "", 0.0
        blocks = map(self._outline.skeleton.block_tensors, self._continued_blocks(unit))
        num_weights = sum(self._outline.tensor_elements(name) for block in blocks for name in block.values())
        return unit.home, float(num_weights)

    def _continued_blocks(self, unit: WorkUnit) -> range:
        if unit.kind is Kind.CONTINUE:
            return range(unit.params["first"], unit.params["last"])
        return range(0 if "is_split" in unit.params else self._outline.skeleton.num_blocks)

    def _sum_bytes(self, unit: WorkUnit) -> float:
        if unit.kind not in (Kind.CALIBRATE, Kind.COMPARE):
            return 0.0
        # Of what is compared, the products of the one with the other are added up too.
        moments, groups = 2 if unit.kind is Kind.COMPARE else 1, self._outline.groups[unit.block]
        summed: Iterable[int] = unit.params.get("groups", range(len(groups)))
        return moments * sum(4.0 * groups[position].in_features ** 2 for position in summed)

    def _block(self, block: int) -> Read:
        return Read(f"block {block}", self.block_bytes(block), Route.WEIGHTS)

    def _group(self, block: int, position: int) -> Read:
        members = self._outline.groups[block][position].linears
        size = sum(self._outline.tensor_bytes(linear.name + ".weight") for linear in members)
        return Read(f"block {block}, group {position}", size, Route.WEIGHTS, whole=f"block {block}")

    def _block_bytes(self, block: int) -> float:
        return sum(map(self._outline.tensor_bytes, self._outline.skeleton.block_tensors(block).values()))

    @property
    def _outer_bytes(self) -> float:
        return sum(map(self._outline.tensor_bytes, self._outline.skeleton.outer_tensors().values()))
