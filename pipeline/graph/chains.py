"""Hidden states on their way through the blocks, as units.

A *chain* is what a text's hidden states are after so many blocks; its identity covers the tokens, how they are sliced,
and the weights passed so far. The chain is cut into *spans* of slices, one unit a span and block; how it is cut depends
on the workers and is in no key of anything stored. Every few blocks the hidden states are saved slice by
slice, so that a job that was stopped, or lost a worker, goes on from there with any number of workers.

Chains are the longest paths of a job, so their units come before others (their ranks are below 0): what they leave to
do keeps workers busy afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from pipeline.calibrate.collections import plan_collections
from pipeline.calibrate.tokens import TokenBatch
from pipeline.fingerprint import fingerprint
from pipeline.graph.cost import CostModel, GroupShape, sum_bytes
from pipeline.graph.dag import Kind, Stored, WorkUnit
from pipeline.graph.identity import Keyring
from pipeline.graph.shape import active_elements, state_size
from pipeline.graph.stages import ALGORITHM_VERSIONS
from pipeline.skeleton.groups import LinearGroup
from pipeline.spec import CalibrationSpec, ExpertStatistics

SAVE_EVERY = 1
"""Blocks between two places at which hidden states are saved, at least: a killed job does again what it had not
saved."""

SAVE_SHARE = 0.05
"""Most of the time of a chain that saving may take; where it would take more, hidden states are saved less often."""

MIN_HELD_BLOCKS = 2
"""Blocks whose outputs a span may have outstanding at least, before it waits for their sums to be added up."""

ADDED_SPANS = 8
"""Spans whose sums one unit adds up: as many as a node of a cluster has workers, as a rule. A power of two, so that
what they add up to is a node of the tree."""

SOLVED_AFTER = 0.5
"""How much later than a block's sums are to be added up what is made of its statistics is wanted, as a rank."""

HELDOUT_SLICE_SEQUENCES = 2
"""Held-out sequences in a slice; their sums add up exactly, so only speed depends on it."""

HALVES = 2
"""Spans of a text that statistics are of, at least."""

SUMMED = {Kind.CALIBRATE: 1, Kind.COMPARE: 2}
"""How many moments of each input a unit of a kind adds up."""

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""The configuration of what is not quantized."""

Span = tuple[int, int]
"""First slice, and the slice after the last."""


def cut(num_slices: int, wanted: int) -> list[Span]:
    """Return the slices cut into at most ``wanted`` spans, each a node of the tree that statistics add up in.

    The length of a span is a power of two, or it reaches the end.
    """
    size = 1
    while -(-num_slices // size) > wanted:
        size *= 2
    return [(low, min(low + size, num_slices)) for low in range(0, num_slices, size)]


def cut_to_sum(num_slices: int, wanted: int) -> list[Span]:
    """Return the slices of a text that statistics are of cut likewise, but into ``HALVES`` at least, if there are
    several: what statistics are shrunk by is seen from how these differ."""
    return cut(num_slices, max(wanted, HALVES))


@dataclass(frozen=True)
class Tokens:
    """A text's tokens in slices.

    Attributes:
        name: What the text is for; homes of the chain are called after it.
        slices: The token ids of each slice, [sequences][length].
        digest: SHA-256 of all ids.
    """

    name: str
    slices: tuple[list[list[int]], ...]
    digest: str

    @classmethod
    def of(cls, name: str, batch: TokenBatch, slice_sequences: int) -> Tokens:
        """Return the sequences of a batch in slices of ``slice_sequences``."""
        return cls(name, tuple(part.tolist() for part in torch.split(batch.tokens_NL, slice_sequences)), batch.digest)

    def count(self, span: Span) -> int:
        """Return the number of tokens in a span."""
        return sum(len(row) for part in self.slices[span[0] : span[1]] for row in part)


@dataclass(frozen=True)
class Chain:
    """Units that take a text's hidden states through all blocks.

    Attributes:
        tokens: The text.
        spans: How the slices are cut.
        start: Identity of the chain before the first block.
        embeds: One unit a span.
        blocks: For each block, one unit a span.
        identities: Identity of the chain after each block.
        lead: Blocks by which a span may be ahead of the last one whose sums are added up to statistics.
        saves: Places at which hidden states are saved on the way, the end not included.
    """

    tokens: Tokens
    spans: tuple[Span, ...]
    start: str
    embeds: tuple[WorkUnit, ...]
    blocks: tuple[tuple[WorkUnit, ...], ...]
    identities: tuple[str, ...]
    lead: int
    saves: tuple[Stored, ...]

    def merge_rank(self, block: int) -> float:
        """Return the rank of what adds up the sums at a block.

        Chains go first, and sums wait as long as they may: 64 simulated GPUs are through in 43 s so, and in 57 s when
        sums are added up before the next block. Where they may wait for two blocks only, nothing is gained by waiting:
        sums are added up first, as a kill would lose them, and solved while the next block is passed, as statistics
        would pile up.
        """
        is_short = self.lead <= MIN_HELD_BLOCKS
        return self.blocks[block][0].rank + 0.75 if is_short else block - SOLVED_AFTER


@dataclass(frozen=True)
class Sums:
    """The sums over all tokens of a text at one block.

    Attributes:
        identity: Of the chain that they were made on, after the block.
        units: What has them between them.
        block: The block.
        rank: Of what makes statistics of them.
        groups: Positions of the linear groups that they are for.
        is_compared: Whether there are sums of products with the source's inputs among them.
    """

    identity: str
    units: tuple[WorkUnit, ...]
    block: int
    rank: float
    groups: tuple[int, ...]
    is_compared: bool = False


@dataclass(frozen=True)
class Step:
    """Linear groups of a block that are solved at the same time, when others of the block are already.

    Attributes:
        groups: Their positions.
        behind: What has solved the others, whose linears are quantized for these.
    """

    groups: tuple[int, ...]
    behind: tuple[WorkUnit, ...] = ()


@dataclass(frozen=True)
class _Walk:
    """What the units that take a text through the blocks have in common.

    Attributes:
        tokens: The text.
        spans: How its slices are cut.
        kind: Of the units.
        variant: Whose blocks they are; empty for the source's.
        config: How the variant's are read.
        save_every: Blocks between two places at which hidden states are saved.
        held_blocks: Blocks whose outputs a span may have outstanding.
        lead: As of ``Chain``.
    """

    tokens: Tokens
    spans: tuple[Span, ...]
    kind: Kind
    variant: str
    config: Mapping[str, Any]
    save_every: int
    held_blocks: int
    lead: int

    @property
    def is_kept(self) -> bool:
        """Whether the end is saved for good: every variant, and every later one, is compared with the source's."""
        return self.kind is Kind.FORWARD and not self.variant

    def home(self, span: Span) -> str:
        """Return the home of a span's units. Text that a variant is calibrated on is a chain of its own: its spans
        spread over the workers, wherever those of others are."""
        name = self.tokens.name if self.kind is not Kind.PROPAGATE else f"{self.tokens.name} of {self.variant}"
        return f"{name}:{self.variant}:{span[0]}"


@dataclass(frozen=True)
class Propagation:
    """Calibration text on its way through a variant's own blocks, as these come to be.

    Attributes:
        walk: What its units have in common.
        source: The text's way through the source.
        identities: Of the text's hidden states before the first block, and after each block that was passed.
        row: The units that took it so far, one a span.
        source_row: Where it is compared, those that have the source's hidden states that enter the next block.
        compared: Identities of the source's hidden states on the way beside it, after each block but the first.
        saves: Places at which hidden states are saved on the way.
    """

    walk: _Walk
    source: Chain
    identities: tuple[str, ...]
    row: tuple[WorkUnit, ...]
    source_row: tuple[WorkUnit, ...]
    compared: tuple[str, ...] = ()
    saves: tuple[Stored, ...] = ()


class ChainBuilder:
    """Makes the chains of one source."""

    def __init__(self, keys: Keyring, costs: CostModel, calibration: CalibrationSpec) -> None:
        self.keys, self.costs, self._calibration = keys, costs, calibration
        self._experts = keys.outline.experts
        self._collections = [plan_collections(groups, self._experts) for groups in keys.outline.groups]
        self.num_blocks = keys.outline.skeleton.num_blocks
        self._hidden = state_size(keys.outline)

    def calibration(self, tokens: Tokens, num_spans: int) -> Chain:
        """Return the chain that collects statistics on the way, in as many spans as ``cut_to_sum`` makes."""
        return self._chain(tokens, cut_to_sum(len(tokens.slices), num_spans), Kind.CALIBRATE)

    def heldout(self, tokens: Tokens, num_spans: int) -> Chain:
        """Return the chain of held-out text through the source; its end is saved for every variant to come."""
        return self._chain(tokens, cut(len(tokens.slices), num_spans), Kind.FORWARD)

    def sums(self, chain: Chain, block: int) -> Sums:
        """Return the sums over all tokens of the chain at one block."""
        identity = chain.identities[block]
        units = self._added(identity, chain.blocks[block], Kind.CALIBRATE)
        return Sums(identity, units, block, chain.merge_rank(block), self._all_groups(block))

    def _all_groups(self, block: int) -> tuple[int, ...]:
        return tuple(range(len(self.keys.outline.groups[block])))

    def _added(self, identity: str, parts: tuple[WorkUnit, ...], kind: Kind) -> tuple[WorkUnit, ...]:
        """Return units that have between them what ``parts``, of a kind, have summed, no more than ``ADDED_SPANS``:
        these, or what adds up neighbouring ones of them, level by level."""
        while len(parts) > ADDED_SPANS:
            rows = [parts[first : first + ADDED_SPANS] for first in range(0, len(parts), ADDED_SPANS)]
            parts = tuple(self._add(identity, row, kind) for row in rows)
        return parts

    def _add(self, identity: str, parts: Sequence[WorkUnit], kind: Kind) -> WorkUnit:
        if len(parts) == 1:
            return parts[0]
        span, block = (parts[0].params["low"], parts[-1].params["high"]), parts[0].block
        some = {"groups": parts[0].params["groups"]} if "groups" in parts[0].params else {}
        shapes = self._summed(block, kind, some.get("groups"))
        return WorkUnit(
            Kind.ADD,
            self._add_key(identity, span),
            {"low": span[0], "high": span[1], **some},
            tuple(parts),
            is_durable=False,
            # At one of the workers that have the parts, and at another one for the next block.
            home=parts[block % len(parts)].home,
            rank=parts[0].rank,
            cost=self.costs.add_s(shapes, len(parts)),
            out_bytes=sum_bytes(shapes),
            block=block,
        )

    def _add_key(self, identity: str, span: Span) -> str:
        return self.keys.key(Kind.ADD, {"chain": identity, "span": span})

    def merge_key(self, identity: str, group: LinearGroup) -> str:
        """Return the key of a group's statistics over all tokens, where the chain is ``identity`` after the block."""
        names = [linear.name for linear in group.linears]
        return self.keys.key(Kind.MERGE, {"chain": identity, "names": names, **self.concluded(group)})

    def concluded(self, group: LinearGroup) -> dict[str, float | None]:
        """Return what a group's statistics depend on besides the sums: how much is taken off their correlations (None:
        as the halves of the text say), and how much they are drawn towards shared ones."""
        asked = self._calibration.shrinkage
        is_blended = self._experts is ExpertStatistics.SHRINKAGE and group.expert
        return {
            "shrinkage": None if asked == "auto" else asked,
            **({"expert_shrinkage": self._calibration.expert_shrinkage} if is_blended else {}),
        }

    def _after(self, walk: _Walk, number: int, identities: Sequence[str]) -> tuple[str, ...]:
        """Return the keys of the units that have to have run before a span may pass the last block that ``identities``
        are of: those that read its sums ``held_blocks`` before, and those that make statistics of them ``lead`` blocks
        before."""
        keys: list[str] = []
        block, spans = len(identities) - 1, walk.spans
        added, merged = block - walk.held_blocks, block - walk.lead
        if len(spans) > ADDED_SPANS and added >= 0:
            row = spans[number - number % ADDED_SPANS :][:ADDED_SPANS]
            keys += [self._add_key(identities[added], (row[0][0], row[-1][1]))] if len(row) > 1 else []
        if merged >= 0:
            keys += [self.merge_key(identities[merged], group) for group in self.keys.outline.groups[merged]]
        return tuple(keys)

    def _save_every(self, tokens: Tokens, span: Span, kind: Kind) -> int:
        count, blocks = tokens.count(span), range(self.num_blocks)
        block_s = sum(self._cost(count, block, kind) for block in blocks) / self.num_blocks
        saved_s = self.costs.copy_s(4.0 * count * self._hidden)
        return max(SAVE_EVERY, math.ceil(saved_s / (SAVE_SHARE * block_s)))

    def _chain(self, tokens: Tokens, spans: Sequence[Span], kind: Kind) -> Chain:
        spans = tuple(spans)
        begin = {
            "tokens": tokens.digest,
            "slices": [len(part) for part in tokens.slices],
            "weights": self.keys.places(self.keys.embedding.values()),
        }
        start = identity = self.keys.key(Kind.EMBED, begin)
        identities = []
        for block in range(self.num_blocks):
            identity = self._past_source(identity, block, kind)
            identities.append(identity)
        embeds = tuple(self._embed(tokens, span, start) for span in spans)
        return self._through(self._walk(tokens, spans, kind), start, embeds, identities)

    def _past_source(self, identity: str, block: int, kind: Kind) -> str:
        """Return the identity of a chain after a block of the source, from that before it."""
        weights = self.keys.places(self.keys.block_names(block))
        # What experts are run on rounds what they give another way, and decides what is added up.
        has_experts = any(linear.expert for group in self.keys.outline.groups[block] for linear in group.linears)
        seen = [self._experts] if has_experts and kind is Kind.CALIBRATE else []
        return fingerprint([identity, kind, ALGORITHM_VERSIONS[kind], weights, self.keys.precision, *seen])

    def _past_pack(self, identity: str, kind: Kind, pack: WorkUnit) -> str:
        """Return the identity of a chain after a variant's packed block, from that before it."""
        return fingerprint([identity, ALGORITHM_VERSIONS[kind], pack.key, self.keys.precision])

    def variant(self, source: Chain, variant: str, config: dict[str, Any], packs: Sequence[WorkUnit]) -> Chain:
        """Return the chain of held-out text through a variant's packed blocks, read as its configuration says."""
        identity = fingerprint([source.start, config])
        identities = []
        for pack in packs:
            identity = self._past_pack(identity, Kind.FORWARD, pack)
            identities.append(identity)
        walk = self._walk(source.tokens, source.spans, Kind.FORWARD, variant, config)
        return self._through(walk, source.start, source.embeds, identities, packs)

    def propagation(self, source: Chain, variant: str, config: Mapping[str, Any], *, is_compared: bool) -> Propagation:
        """Return a calibration text past the first block, of which nothing is quantized before it, about to pass a
        variant's blocks, read as its configuration says.

        Args:
            source: The text's way through the source.
            variant: The variant's name.
            config: How its packed blocks are read.
            is_compared: Whether what linears read is compared with what they read in the source.
        """
        walk = self._walk(source.tokens, source.spans, Kind.PROPAGATE, variant, config)
        begin = fingerprint([source.start, config])
        return Propagation(walk, source, (begin,), source.embeds, source.blocks[0] if is_compared else ())

    def propagated(self, before: Propagation, pack: WorkUnit) -> Propagation:
        """Return the text past one more block, which ``pack`` packs."""
        identities = (*before.identities, self._past_pack(before.identities[-1], Kind.PROPAGATE, pack))
        row = self._row(before.walk, identities[1:], before.row, pack)
        saves = tuple(place for unit in row for place in unit.saves)
        return replace(before, identities=identities, row=row, saves=before.saves + saves)

    def at_first_block(self, before: Propagation) -> Propagation:
        """Return a text that is about to pass a variant's blocks as it is compared at the first one."""
        return replace(before, source_row=before.source.embeds if before.source_row else ())

    def propagated_sums(self, before: Propagation, step: Step | None = None) -> tuple[Propagation, Sums]:
        """Return the sums at the next block, of what its linears read where the source's block stands behind those of
        the variant that the text has passed; and the text again, where it is compared with the source's hidden states
        behind that block too.

        Args:
            before: The text.
            step: Linear groups that alone are wanted, with those of the block that are quantized already; None for all,
                behind none. Behind some the source's hidden states are not there, and the text is the same again.
        """
        walk, block = before.walk, len(before.identities) - 1
        kind = Kind.COMPARE if before.source_row else Kind.CALIBRATE
        identity = self._past_source(before.identities[-1], block, Kind.CALIBRATE)
        if before.source_row:
            identity = fingerprint([identity, kind, ALGORITHM_VERSIONS[kind], before.source.identities[block]])
        groups, behind = (self._all_groups(block), ()) if step is None else (step.groups, step.behind)
        some = {} if step is None else {"groups": list(groups)}
        if step is not None:
            # How a solve is cut into ranges of rows is in no key.
            solved = sorted({identity for unit in behind for identity in unit.params["identities"]})
            identity = fingerprint([identity, "step", groups, solved])
        is_passed = bool(before.source_row) and not behind
        is_end, old = block == self.num_blocks - 1, block - 2 * walk.save_every
        is_saved = is_passed and not is_end and _is_save(block, walk.save_every)
        is_obsolete = is_saved and old >= 1 and _is_save(old, walk.save_every)
        ends = {} if is_passed else {"is_end": True}
        units = []
        for place, (span, own) in enumerate(zip(walk.spans, before.row, strict=True)):
            walks = tuple(dict.fromkeys((*before.source_row[place : place + 1], own)))
            count, numbers = walk.tokens.count(span), range(*span)
            units.append(
                WorkUnit(
                    kind,
                    self.keys.key(kind, {"chain": identity, "span": span}),
                    {"low": span[0], "high": span[1], "precision": self.keys.precision, **some, **ends},
                    (*walks, *behind),
                    stand_ins={need.key: need.saves for need in walks if need.saves},
                    saves=tuple(self.keys.saved(identity, number) for number in numbers) if is_saved else (),
                    obsoletes=tuple(self.keys.saved(before.compared[old - 1], number) for number in numbers)
                    if is_obsolete
                    else (),
                    is_durable=False,
                    home=walk.home(span),
                    rank=self._rank(kind, block),
                    cost=self._cost(count, block, kind, groups),
                    out_bytes=self._out_bytes(count, block, kind, groups),
                    block=block,
                    variant=walk.variant,
                )
            )
        row = tuple(units)
        saves = tuple(place for unit in row for place in unit.saves)
        after = before
        if is_passed:
            after = replace(before, source_row=row, compared=(*before.compared, identity), saves=before.saves + saves)
        added = self._added(identity, row, kind)
        return after, Sums(identity, added, block, row[0].rank + 0.1, groups, bool(before.source_row))

    def _embed(self, tokens: Tokens, span: Span, start: str) -> WorkUnit:
        low, high = span
        count = tokens.count(span)
        return WorkUnit(
            Kind.EMBED,
            self.keys.key(Kind.EMBED, {"chain": start, "span": span}),
            {
                "low": low,
                "high": high,
                "tokens": list(tokens.slices[low:high]),
                "weights": dict(self.keys.embedding),
            },
            is_durable=False,
            home=f"{tokens.name}::{low}",
            rank=-self.num_blocks - 1,
            cost=self.costs.embed_s(sum(map(self.keys.outline.tensor_bytes, self.keys.embedding.values()))),
            out_bytes=4.0 * count * self._hidden,
        )

    def _walk(
        self,
        tokens: Tokens,
        spans: tuple[Span, ...],
        kind: Kind,
        variant: str = "",
        config: Mapping[str, Any] = NOTHING,
    ) -> _Walk:
        # Of all slices, whatever the spans: a run with other workers must look where this one saves.
        every = self._save_every(tokens, (0, len(tokens.slices)), kind)
        largest = max(self._out_bytes(tokens.count(spans[0]), block, kind) for block in range(self.num_blocks))
        held_blocks = max(MIN_HELD_BLOCKS, int(self.costs.rates.held_bytes / largest))
        # One worker of each row has what the row adds up to.
        lead = held_blocks * (ADDED_SPANS // 2 if len(spans) > ADDED_SPANS else 1)
        return _Walk(tokens, spans, kind, variant, config, every, held_blocks, lead)

    def _through(
        self,
        walk: _Walk,
        start: str,
        embeds: tuple[WorkUnit, ...],
        identities: Sequence[str],
        packs: Sequence[WorkUnit] = (),
    ) -> Chain:
        """Return the chain that walks through all blocks, those of ``packs`` where there are some."""
        blocks: list[tuple[WorkUnit, ...]] = []
        before = embeds
        for block in range(self.num_blocks):
            before = self._row(walk, identities[: block + 1], before, packs[block] if packs else None)
            blocks.append(before)
        passing = blocks[:-1] if walk.is_kept else blocks
        saves = tuple(place for row in passing for unit in row for place in unit.saves)
        return Chain(walk.tokens, walk.spans, start, embeds, tuple(blocks), tuple(identities), walk.lead, saves)

    def _row(
        self, walk: _Walk, identities: Sequence[str], before: Sequence[WorkUnit], pack: WorkUnit | None
    ) -> tuple[WorkUnit, ...]:
        """Return the units that take every span through the last block that ``identities`` are of."""
        block, identity, kind = len(identities) - 1, identities[-1], walk.kind
        is_end, old = block == self.num_blocks - 1, block - 2 * walk.save_every
        is_saved = walk.is_kept if is_end else _is_save(block, walk.save_every)
        params = {"quantization_config": dict(walk.config), "precision": self.keys.precision}
        row = []
        for place, (span, previous) in enumerate(zip(walk.spans, before, strict=True)):
            numbers, count = range(*span), walk.tokens.count(span)
            places = tuple(self.keys.saved(identity, number) for number in numbers) if is_saved else ()
            is_after = kind is Kind.CALIBRATE
            row.append(
                WorkUnit(
                    kind,
                    self.keys.key(kind, {"chain": identity, "span": span}),
                    {"low": span[0], "high": span[1], **params},
                    (previous,) if pack is None else (previous, pack),
                    after=self._after(walk, place, identities) if is_after else (),
                    stand_ins={previous.key: previous.saves} if previous.saves else {},
                    saves=places,
                    obsoletes=tuple(self.keys.saved(identities[old], number) for number in numbers)
                    if is_saved and old >= 0 and _is_save(old, walk.save_every)
                    else (),
                    is_durable=False,
                    home=walk.home(span),
                    rank=self._rank(kind, block),
                    cost=self._cost(count, block, kind) + self._saving_s(count, places),
                    out_bytes=self._out_bytes(count, block, kind),
                    block=block,
                    variant=walk.variant,
                )
            )
        return tuple(row)

    def _rank(self, kind: Kind, block: int) -> float:
        match kind:
            case Kind.CALIBRATE | Kind.COMPARE:
                return block - self.num_blocks
            case Kind.PROPAGATE:
                # After the solves of the block, before anything of the next one.
                return block - self.num_blocks + 0.9
            case _:
                # What judges a variant waits for what all of them wait for.
                return -0.5

    def _saving_s(self, count: int, places: Sequence[Stored]) -> float:
        return 4.0 * count * self._hidden / self.costs.rates.touched_bytes if places else 0.0

    def _cost(self, count: int, block: int, kind: Kind, groups: Sequence[int] | None = None) -> float:
        sees_all = kind in SUMMED and self._experts is not ExpertStatistics.ROUTED
        outline = self.keys.outline
        parameters = self.keys.block_parameters(block) if sees_all else active_elements(outline, block)
        passes = 2 if kind is Kind.COMPARE else 1
        return self.costs.forward_s(passes * parameters, count, self._summed(block, kind, groups))

    def _out_bytes(self, count: int, block: int, kind: Kind, groups: Sequence[int] | None = None) -> float:
        return 4.0 * count * self._hidden + sum_bytes(self._summed(block, kind, groups))

    def _summed(self, block: int, kind: Kind, groups: Sequence[int] | None = None) -> list[GroupShape]:
        """Return the inputs whose moments are added up at a block, for all linear groups or those at some positions; of
        rows, which cost nothing here, none."""
        collections = self._collections[block]
        widths = collections.only(collections.read_by(groups)).widths
        return [GroupShape(0, width) for width in widths] * SUMMED.get(kind, 0)


def _is_save(block: int, every: int) -> bool:
    return block % every == every - 1


def shape_of(group: LinearGroup) -> GroupShape:
    """Return a linear group as far as it costs anything."""
    return GroupShape(sum(linear.out_features for linear in group.linears), group.in_features)
