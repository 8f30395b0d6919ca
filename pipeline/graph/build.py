"""The work units of a conversion and their keys.

A key is the fingerprint of the stage's kind and version, what computes it (package versions, device kind), its own
inputs from the source (tensor places and file digests, the config but for labels), its arguments, and the identities of
what it reads. Paths, workers and times are in no key, nor is how the job is cut: spans of slices and ranges of rows are
cuts of one thing that has an identity of its own (the *chain* up to a block, the solve of a group), and only what lies
in such a piece is keyed by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from pipeline.calibrate.tokens import TokenBatch, coverage_cautions
from pipeline.formats.config import quantization_config
from pipeline.formats.loaders import Contents
from pipeline.graph.chains import (
    HELDOUT_SLICE_SEQUENCES,
    SOLVED_AFTER,
    Chain,
    ChainBuilder,
    Propagation,
    Step,
    Sums,
    Tokens,
    shape_of,
)
from pipeline.graph.continuations import ContinuationBuilder, expected_passes
from pipeline.graph.cost import CostModel, GroupShape, cost_model, solve_bytes
from pipeline.graph.dag import Kind, Stored, WorkUnit
from pipeline.graph.folds import MAX_SEARCHED_ROWS, scope_of
from pipeline.graph.identity import Keyring
from pipeline.graph.mixed import SENSED_SEQUENCES, Candidates, Damages, allocated_widths, candidates
from pipeline.graph.outline import Outline
from pipeline.graph.schemes import (
    MatrixPlan,
    plan_matrices,
    quantized_part,
    require_all_quantized,
    require_known_names,
    require_whole_groups,
)
from pipeline.graph.shape import ModelShape
from pipeline.graph.tuning import Tuning
from pipeline.hub.selection import CARD_FILE
from pipeline.quantize.types import Scheme
from pipeline.skeleton.groups import LinearGroup, sequential_steps
from pipeline.spec import PER_CHANNEL, CalibrationSpec, ConversionSpec, Method, Propagate, VariantSpec
from pipeline.weights import INDEX_FILE

UNREAD_FILES = (CARD_FILE, INDEX_FILE)
"""Companions that say nothing to whoever continues a prompt; where tensors are is in keys already."""

Statistics = Mapping[int, WorkUnit]
"""By position of a block's linear group, the unit that has its statistics."""

Quantized = tuple[int, LinearGroup, dict[str, Any]]
"""Position of a linear group, the part of it that is quantized, and the grid of that, as JSON."""

PACKED_EXTRA = 0.02
"""Bytes of a packed weight besides its code: scales and zero points of groups of 128."""


@dataclass(frozen=True)
class VariantPlan:
    """One variant with everything decided.

    Attributes:
        spec: The variant.
        matrices: What happens with each linear, by name.
        quantization_config: What config.json will say.
        candidates: With mixed precision, the same at each width that linears can get.
        damages: With mixed precision, what the error of each linear adds to the divergence, by width and name; nothing
            before it was appraised.
    """

    spec: VariantSpec
    matrices: Mapping[str, MatrixPlan]
    quantization_config: dict[str, Any]
    candidates: Candidates
    damages: Damages

    def predicted_kl_of(self, name: str) -> float | None:
        """Return what the error of a linear alone adds to the divergence; None where that was not appraised."""
        scheme = self.matrices[name].scheme
        return None if scheme is None else self.damages.get(scheme.bits, {}).get(name)

    @property
    def predicted_kl(self) -> float:
        """The same of all linears together."""
        return sum(self.predicted_kl_of(name) or 0.0 for name in self.matrices)

    def contents(self, architecture: str) -> Contents:
        """Return what loaders make a difference by; ``architecture`` is the class named in config.json."""
        spec = self.spec
        schemes = {name: matrix.scheme for name, matrix in self.matrices.items() if matrix.scheme is not None}
        whole_rows = spec.group_size == PER_CHANNEL
        grids = {(scheme.bits, PER_CHANNEL if whole_rows else scheme.group_size) for scheme in schemes.values()}
        grid = (spec.format, spec.symmetric, frozenset(grids), tuple(schemes), spec.activations, spec.type)
        return Contents(architecture, *grid)

    def cautions(self, calibration: CalibrationSpec) -> tuple[str, ...]:
        """Return what weakens this variant's result without being a fault."""
        widths = [plan.linear.in_features for plan in self.matrices.values() if plan.scheme is not None]
        return coverage_cautions(calibration.samples * calibration.length, widths)

    @property
    def solver_options(self) -> dict[str, Any]:
        """What the solver is asked for, as JSON."""
        spec = self.spec
        return {"damping": spec.damping, "act_order": spec.act_order, "clip_search": spec.clip_search}

    @property
    def codes_options(self) -> dict[str, Any]:
        """What the solver of codes is asked for, as JSON: what scales are searched with, and what comes after."""
        refined = {"refinement": self.spec.refinement} if self.spec.refinement else {}
        return {**self.solver_options, **refined}


def quantized_groups(groups: Sequence[LinearGroup], matrices: Mapping[str, MatrixPlan]) -> list[Quantized]:
    """Return what of a block's groups is quantized, in order."""
    found = []
    for position, group in enumerate(groups):
        part = quantized_part(group, matrices)
        scheme = matrices[part.linears[0].name].scheme if part is not None else None
        if part is not None and scheme is not None:
            found.append((position, part, scheme.params))
    return found


def make_variant_plan(spec: VariantSpec, outline: ModelShape, damages: Damages | None = None) -> VariantPlan:
    """Return the variant with everything decided for a source.

    Args:
        spec: The variant.
        outline: The source.
        damages: With mixed precision, what was appraised; None as long as nothing was, and widths are provisional.

    Raises:
        PlanError: when nothing could be quantized, an ignore names nothing, the variant refuses a fallback that is
            needed, or a budget is too small.
    """
    tried = candidates(spec, outline)
    allocated = allocated_widths(spec, outline, tried, damages) if tried else None
    matrices = plan_matrices(spec, outline.groups, allocated)
    require_all_quantized(spec, matrices, outline.index.parts)
    require_known_names(spec, [*matrices, *outline.other_linears])
    require_whole_groups(spec, (group for block in outline.groups for group in block), matrices)
    schemes = schemes_by_every_name(outline, {name: plan.scheme for name, plan in matrices.items()})
    config = quantization_config(spec.format, schemes, spec, version("bitmill"))
    return VariantPlan(spec, matrices, config, tried, damages or {})


def schemes_by_every_name(outline: ModelShape, schemes: Mapping[str, Scheme | None]) -> dict[str, Scheme | None]:
    """Return the grids of all linears by every name that loaders ask for.

    These take every linear for quantized that is not named, so the output head and the like are named too. They look
    for the model's names, which transformers may have made from other ones in the checkpoint.

    Args:
        outline: The model.
        schemes: The grid of each linear of the blocks by its name in the checkpoint, None for unquantized.
    """
    found: dict[str, Scheme | None] = dict.fromkeys(outline.other_linears)
    for block, groups in zip(outline.skeleton.block_names, outline.groups, strict=True):
        for linear in (linear for group in groups for linear in group.linears):
            found |= dict.fromkeys((f"{block}.{linear.local_name}", linear.name), schemes[linear.name])
    return found


@dataclass(frozen=True)
class UnitInputs:
    """Everything that a conversion's units follow from.

    Attributes:
        outline: The source as far as its names and sizes go.
        digests: SHA-256 of each needed source file by path.
        spec: What to make.
        variants: The variants, decided.
        calibration: Tokens for statistics.
        heldout: Tokens for the divergence gate.
        device: ``cpu`` or ``cuda``.
    """

    outline: ModelShape
    digests: Mapping[str, str]
    spec: ConversionSpec
    variants: Sequence[VariantPlan]
    calibration: TokenBatch
    heldout: TokenBatch
    device: str


@dataclass(frozen=True)
class Inputs(UnitInputs):
    """Everything that a conversion's bytes depend on: what its units follow from, with the source's modules."""

    outline: Outline


@dataclass(frozen=True)
class _Wanted:
    """What there is to solve of a linear group.

    Attributes:
        position: Of the group in its block.
        group: The group, as far as it is quantized.
        scheme: Its grid, as JSON.
        identity: Names the solve of all its rows, however it is cut and whatever is solved with it.
        needs: What is read for it, its statistics first.
    """

    position: int
    group: LinearGroup
    scheme: dict[str, Any]
    identity: str
    needs: tuple[WorkUnit, ...]

    @property
    def likeness(self) -> tuple[Any, ...]:
        """What groups that can be solved together have in common; of all but experts' the position."""
        if not self.group.expert:
            return (self.position,)
        sizes = tuple(linear.out_features for linear in self.group.linears)
        return (self.group.linears[0].experts, self.group.in_features, sizes, *self.scheme.values())


@dataclass(frozen=True)
class VariantUnits:
    """The units that give one variant: its packed blocks, its comparison with the source, its continuations; with mixed
    precision, by width, what appraises each linear group at it."""

    packs: tuple[WorkUnit, ...]
    scores: tuple[WorkUnit, ...]
    generation: WorkUnit
    appraisals: Mapping[int, tuple[WorkUnit, ...]]


@dataclass(frozen=True)
class JobUnits:
    """All units of a conversion.

    Attributes:
        variants: By variant name.
        outer: Copies what lies outside the blocks.
        source_generation: Continues the smoke prompts with the source.
        leftovers: Places of the work store that are of no use once everything has run.
    """

    variants: Mapping[str, VariantUnits]
    outer: WorkUnit
    source_generation: WorkUnit
    leftovers: tuple[Stored, ...]

    @property
    def goals(self) -> list[WorkUnit]:
        """The units whose outputs are wanted: packs block by block, then what judges them. What widths are chosen by
        comes first, and is there already when they have been."""
        per_block = zip(*(units.packs for units in self.variants.values()), strict=True)
        packs = [pack for block in per_block for pack in block]
        judged = [unit for v in self.variants.values() for unit in (*v.scores, v.generation)]
        return [self.outer, *self.appraisals, *packs, self.source_generation, *judged]

    @property
    def appraisals(self) -> list[WorkUnit]:
        """The units that say what widths cost; nothing without mixed precision."""
        return [unit for v in self.variants.values() for units in v.appraisals.values() for unit in units]


class UnitBuilder:
    """Makes the units of one conversion; see ``build_units``."""

    def __init__(self, inputs: UnitInputs, tuning: Tuning, costs: CostModel) -> None:
        self.inputs, self.tuning, self.costs = inputs, tuning, costs
        self.outline = inputs.outline
        self.keys = Keyring(inputs.outline, inputs.digests, inputs.device, inputs.spec.precision)
        self.chains = ChainBuilder(self.keys, costs, inputs.spec.calibration)
        self.continuations = ContinuationBuilder(self.keys, costs, tuning.workers)
        self.num_blocks = inputs.outline.skeleton.num_blocks
        shapes = [shape_of(group) for block in inputs.outline.groups for group in block]
        self._largest_bytes = max(map(solve_bytes, shapes))
        self._parameters = sum(self.keys.block_parameters(block) for block in range(self.num_blocks))
        calibration = Tokens.of("calibration", inputs.calibration, inputs.spec.calibration.sequences_in_slice)
        self.calibration = self.chains.calibration(calibration, tuning.spans)

    def build(self) -> JobUnits:
        """Return every unit."""
        text = Tokens.of("held-out", self.inputs.heldout, HELDOUT_SLICE_SEQUENCES)
        calibration, heldout = self.calibration, self.chains.heldout(text, self.tuning.heldout_spans)
        merged = [self._merges(self.chains.sums(calibration, block)) for block in range(self.num_blocks)]
        outer, source_generation = self._outer(), self._generation({}, (), (), (), "")
        built = {
            plan.spec.name: self._variant(plan, merged, heldout, outer, source_generation)
            for plan in self.inputs.variants
        }
        variants = {name: units for name, (units, _) in built.items()}
        leftovers = [*calibration.saves, *heldout.saves, *(place for _, saves in built.values() for place in saves)]
        return JobUnits(variants, outer, source_generation, tuple(leftovers))

    def _merges(self, sums: Sums) -> Statistics:
        """Return for each linear group that there are sums for the unit that adds up its statistics."""
        units, moments = {}, 2 if sums.is_compared else 1
        for position in sums.groups:
            group = self.outline.groups[sums.block][position]
            units[position] = WorkUnit(
                Kind.MERGE,
                self.chains.merge_key(sums.identity, group),
                {"group": position, "is_compared": sums.is_compared, **self.chains.concluded(group)},
                sums.units,
                rank=sums.rank,
                cost=moments * self.costs.merge_s(shape_of(group), len(sums.units)),
                out_bytes=moments * 4.0 * group.in_features**2,
                block=sums.block,
                label=group.label,
            )
        return units

    def _outer(self) -> WorkUnit:
        size = sum(self.outline.tensor_bytes(name) for name in self.keys.outer_names)
        key = self.keys.key(Kind.OUTER, {"weights": self.keys.places(self.keys.outer_names)})
        return WorkUnit(Kind.OUTER, key, {}, cost=self.costs.copy_s(size), out_bytes=size)

    def _variant(
        self,
        plan: VariantPlan,
        merged: Sequence[Statistics],
        heldout: Chain,
        outer: WorkUnit,
        source_generation: WorkUnit,
    ) -> tuple[VariantUnits, tuple[Stored, ...]]:
        """Return a variant's units, and the places at which hidden states are saved for them."""
        packs, saves = self._packs(plan, merged)
        chain = self.chains.variant(heldout, plan.spec.name, plan.quantization_config, packs)
        scores = self._scores(plan, heldout, chain, outer)
        generation = self._generation(plan.quantization_config, packs, (outer,), (source_generation,), plan.spec.name)
        sensed = self._sensed(plan)
        appraisals = {
            bits: tuple(
                unit
                for block in range(self.num_blocks)
                for unit in self._appraisals(plan, matrices, block, merged[block], sensed)
            )
            for bits, matrices in plan.candidates.items()
        }
        return VariantUnits(tuple(packs), tuple(scores), generation, appraisals), (*saves, *chain.saves)

    def _packs(self, plan: VariantPlan, merged: Sequence[Statistics]) -> tuple[list[WorkUnit], tuple[Stored, ...]]:
        """Return the units that pack a variant's blocks, from statistics of the source's inputs or of its own, and the
        places at which hidden states are saved for them."""
        schedule = plan.spec.propagate
        if schedule is Propagate.FLOAT:
            return [self._block(plan, *block) for block in enumerate(merged)], ()
        first = [self._block(plan, *block) for block in enumerate(merged)] if schedule is Propagate.TWO_PASS else []
        text = self.chains.propagation(
            self.calibration, plan.spec.name, plan.quantization_config, is_compared=plan.spec.is_compensated
        )
        if schedule is Propagate.TRUE_SEQUENTIAL:
            return self._true_sequential_packs(plan, merged[0], text)
        # Nothing is quantized before the first block.
        packs = [self._block(plan, 0, merged[0])]
        for _ in range(1, self.num_blocks):
            passed = first[len(packs) - 1] if first else packs[-1]
            text, sums = self.chains.propagated_sums(self.chains.propagated(text, passed))
            packs.append(self._block(plan, sums.block, self._merges(sums)))
        return packs, text.saves

    def _true_sequential_packs(
        self, plan: VariantPlan, merged: Statistics, text: Propagation
    ) -> tuple[list[WorkUnit], tuple[Stored, ...]]:
        """Return the same where every linear group is solved on what it reads behind all those before it, of which
        nothing is quantized but for what ``merged`` has the statistics of: the first of the first block."""
        packs: list[WorkUnit] = []
        for block, groups in enumerate(self.outline.groups):
            entering = self.chains.propagated(text, packs[-1]) if packs else self.chains.at_first_block(text)
            quantized = {part[0]: part for part in quantized_groups(groups, plan.matrices)}
            steps = [tuple(filter(quantized.__contains__, step)) for step in sequential_steps(groups)]
            # Where nothing is quantized, the source's hidden states have to pass all the same.
            steps = [step for step in steps if step] or [()]
            solved: list[list[WorkUnit]] = []
            for step in steps:
                behind = tuple(dict.fromkeys(unit for parts in solved for unit in parts))
                statistics = merged
                if packs or behind:
                    passed, sums = self.chains.propagated_sums(entering, Step(step, behind))
                    statistics = self._merges(sums)
                    text = text if behind else passed
                solved += self._solved(plan, [quantized[position] for position in step], block, statistics)[1]
            packs.append(self._packed(plan, block, list(quantized.values()), [], solved))
        return packs, text.saves

    def _sensed(self, plan: VariantPlan) -> tuple[WorkUnit, ...]:
        """Return the units that measure how much predictions change with linears' outputs."""
        spec = self.inputs.spec
        if plan.spec.mix is None:
            return ()
        tokens_NL = self.inputs.calibration.tokens_NL[: plan.spec.mix.samples]
        places = self.keys.places(self.outline.index.entries)
        outputs = sum(shape_of(group).rows for block in self.outline.groups for group in block)
        units = []
        for number, part in enumerate(torch.split(tokens_NL, SENSED_SEQUENCES)):
            params = {
                "tokens": part.tolist(),
                "precision": spec.precision.value,
                "seed": spec.calibration.seed + number,
            }
            units.append(
                WorkUnit(
                    Kind.SENSE,
                    self.keys.key(Kind.SENSE, {"weights": places, **params}),
                    params,
                    cost=self.costs.sense_s(self._parameters, part.numel()),
                    out_bytes=4.0 * outputs,
                )
            )
        return tuple(units)

    def _appraisals(
        self,
        plan: VariantPlan,
        matrices: Mapping[str, MatrixPlan],
        block: int,
        merged: Statistics,
        sensed: tuple[WorkUnit, ...],
    ) -> Iterator[WorkUnit]:
        """Yield the units that appraise a block's linear groups as one plan has them."""
        quantized = quantized_groups(self.outline.groups[block], matrices)
        _, solved = self._solved(plan, quantized, block, merged)
        for (position, group, _), parts in zip(quantized, solved, strict=True):
            # How a solve is cut into ranges of rows, and what is solved with it, is in no key.
            params = parts[0].params
            own = params["identities"][params["groups"].index(position)]
            identity = {"solve": own, "sensed": [unit.key for unit in sensed]}
            yield WorkUnit(
                Kind.APPRAISE,
                self.keys.key(Kind.APPRAISE, {**identity, "members": _names(group)}),
                {"group": position},
                (*sensed, *parts),
                rank=merged[position].rank + SOLVED_AFTER,
                cost=self.costs.appraise_s(shape_of(group)),
                block=block,
                variant=plan.spec.name,
                label=group.label,
            )

    def _solved(
        self,
        plan: VariantPlan,
        quantized: Sequence[Quantized],
        block: int,
        merged: Statistics,
    ) -> tuple[list[WorkUnit], list[list[WorkUnit]]]:
        """Return the units that search a block's scales, and for each of its quantized groups those that solve it."""
        groups, inputs = self.outline.groups[block], {}
        for position, group, _ in quantized:
            is_compared = merged[position].params["is_compared"]
            changes = (self._compensation(plan, group, position, merged[position]),) if is_compared else ()
            inputs[position] = (merged[position], *changes)
        scales = [
            self._scales(plan, group, position, scheme, inputs[position])
            for position, group, scheme in quantized
            if plan.spec.method.has_scales
        ]
        wanted = [
            self._wanted(
                plan, group, position, scheme, inputs[position], [s for s in scales if _concerns(s, groups, group)]
            )
            for position, group, scheme in quantized
        ]
        solves: dict[int, list[WorkUnit]] = {}
        for some in self._together(plan, wanted):
            solves |= dict.fromkeys([one.position for one in some], self._solves(plan, some))
        return scales, [solves[one.position] for one in wanted]

    def _block(self, plan: VariantPlan, block: int, merged: Statistics) -> WorkUnit:
        """Return the unit that packs a block, from the statistics of its groups."""
        quantized = quantized_groups(self.outline.groups[block], plan.matrices)
        return self._packed(plan, block, quantized, *self._solved(plan, quantized, block, merged))

    def _packed(
        self,
        plan: VariantPlan,
        block: int,
        quantized: Sequence[Quantized],
        scales: Sequence[WorkUnit],
        solved: Sequence[Sequence[WorkUnit]],
    ) -> WorkUnit:
        spec, solves = plan.spec, list(dict.fromkeys(unit for parts in solved for unit in parts))
        weights = [(shape_of(group).rows * shape_of(group).width, scheme["bits"]) for _, group, scheme in quantized]
        kept = self.keys.block_parameters(block) - sum(number for number, _ in weights)
        codes_bytes = sum(number * bits / 8 for number, bits in weights)
        identity = {
            "weights": self.keys.places(self.keys.block_names(block)),
            "format": spec.format,
            "scales": [unit.key for unit in scales],
            "solves": sorted({identity for unit in solves for identity in unit.params["identities"]}),
        }
        return WorkUnit(
            Kind.PACK,
            self.keys.key(Kind.PACK, identity),
            {"format": spec.format.value},
            (*scales, *solves),
            rank=max((unit.rank for unit in solves), default=float(block)),
            cost=self.costs.pack_s(self.keys.block_parameters(block)),
            out_bytes=codes_bytes + 2 * kept + self.keys.block_parameters(block) * PACKED_EXTRA,
            block=block,
            variant=spec.name,
        )

    def _scales(
        self,
        plan: VariantPlan,
        group: LinearGroup,
        position: int,
        scheme: dict[str, Any],
        inputs: Sequence[WorkUnit],
    ) -> WorkUnit:
        """Return the unit that searches a group's activation-aware scale; ``inputs`` as of ``_wanted``."""
        (merged, *changes), options = inputs, plan.solver_options
        local = self.outline.skeleton.block_tensors(group.block)
        weights = self.keys.places(local[name] for name in scope_of(group, local))
        params = {"scheme": scheme, "options": options, "is_smooth": plan.spec.method.is_smooth}
        identity = {"weights": weights, "names": _names(group), **params}
        return WorkUnit(
            Kind.SCALES,
            self.keys.key(Kind.SCALES, {**identity, "statistics": merged.key, **_changed(changes)}),
            {"group": position, **params},
            (merged, *changes),
            rank=merged.rank + SOLVED_AFTER,
            cost=self.costs.scales_s(_searched(group)),
            out_bytes=4.0 * group.in_features,
            block=group.block,
            variant=plan.spec.name,
            label=group.label,
        )

    def _wanted(
        self,
        plan: VariantPlan,
        group: LinearGroup,
        position: int,
        scheme: dict[str, Any],
        inputs: Sequence[WorkUnit],
        scales: Sequence[WorkUnit],
    ) -> _Wanted:
        """Return what there is to solve of one linear group.

        Args:
            plan: The variant.
            group: The group, as far as it is quantized.
            position: Of the group in its block.
            scheme: Its grid, as JSON.
            inputs: What gives its statistics, and what its weights are changed by before, if they are.
            scales: The block's activation-aware scales that concern its weights.
        """
        merged, *changes = inputs
        own_scales = [unit for unit in scales if unit.params["group"] == position]
        is_gptq = plan.spec.method.codes is Method.GPTQ
        factors = (self._factor(plan, group, position, merged, own_scales),) if is_gptq else ()
        options = self._codes_params(plan, scheme)
        identity = self.keys.key(
            Kind.SOLVE,
            {
                **options,
                "weights": self.keys.places(f"{linear.name}.weight" for linear in group.linears),
                "statistics": merged.key,
                "factors": [unit.key for unit in factors],
                "scales": [unit.key for unit in scales],
                **_changed(changes),
            },
        )
        return _Wanted(position, group, scheme, identity, (merged, *changes, *factors, *scales))

    def _codes_params(self, plan: VariantPlan, scheme: dict[str, Any]) -> dict[str, Any]:
        return {"scheme": scheme, "options": plan.codes_options, "method": plan.spec.method.codes.value}

    def _together(self, plan: VariantPlan, wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
        """Yield what is solved by the same units: groups of experts that are alike, as many as there is time and memory
        for and leave every worker some; every other group alone. It changes no row."""
        alike: dict[tuple[Any, ...], list[_Wanted]] = {}
        for one in wanted:
            alike.setdefault(one.likeness, []).append(one)
        for some in alike.values():
            refinement, is_gptq = plan.spec.refinement, plan.spec.method.codes is Method.GPTQ
            most = self.costs.groups_together(
                shape_of(some[0].group), is_gptq, self.tuning.solve_s, refinement, self._largest_bytes
            )
            most = min(most, -(-len(some) // self.tuning.workers))
            for start in range(0, len(some), most):
                yield some[start : start + most]

    def _solves(self, plan: VariantPlan, some: Sequence[_Wanted]) -> list[WorkUnit]:
        """Return the units that solve one linear group, a range of rows each, or the one that solves several."""
        spec, first, refinement = plan.spec, some[0], plan.spec.refinement
        is_gptq, shape = spec.method.codes is Method.GPTQ, shape_of(first.group)
        identities = [one.identity for one in some]
        params = {
            "groups": [one.position for one in some],
            "members": [linear.local_name for one in some for linear in one.group.linears],
            "identities": identities,
            **self._codes_params(plan, first.scheme),
        }
        if len(some) == 1:
            ranges = self.costs.row_ranges(shape, is_gptq, self.tuning.solve_s, refinement)
            label = first.group.label
        else:
            shape = replace(shape, rows=len(some) * shape.rows)
            ranges, label = [(0, shape.rows)], f"{first.group.label} and {len(some) - 1} like it"
        parts = [GroupShape(high - low, shape.width) for low, high in ranges]
        needs = tuple(dict.fromkeys(need for one in some for need in one.needs))
        return [
            WorkUnit(
                Kind.SOLVE,
                self.keys.key(Kind.SOLVE, {"solves": identities, "rows": rows}),
                {**params, "rows": rows},
                needs,
                rank=max(one.needs[0].rank for one in some) + SOLVED_AFTER,
                cost=self.costs.solve_s(part, is_gptq, refinement),
                out_bytes=float(part.rows * part.width),
                block=first.group.block,
                variant=spec.name,
                label=label,
            )
            for rows, part in zip(ranges, parts, strict=True)
        ]

    def _compensation(self, plan: VariantPlan, group: LinearGroup, position: int, merged: WorkUnit) -> WorkUnit:
        """Return the unit that finds what a group's weights are changed by for what blocks before them do."""
        share = {"share": plan.spec.compensated_share}
        return WorkUnit(
            Kind.COMPENSATE,
            self.keys.key(Kind.COMPENSATE, {"statistics": merged.key, **share}),
            {"group": position, **share},
            (merged,),
            is_durable=False,
            rank=merged.rank + SOLVED_AFTER,
            # A factorization, and two triangular solves of as many columns.
            cost=7 * self.costs.factor_s(shape_of(group)),
            out_bytes=4.0 * group.in_features**2,
            block=group.block,
            variant=plan.spec.name,
            label=group.label,
        )

    def _factor(
        self, plan: VariantPlan, group: LinearGroup, position: int, merged: WorkUnit, scales: Sequence[WorkUnit]
    ) -> WorkUnit:
        """Return the unit that factors a group's second moment, after the group's own scales where it has some."""
        options = plan.solver_options
        used = {"damping": options["damping"], "act_order": options["act_order"]}
        scaled = {"scales": [unit.key for unit in scales]} if scales else {}
        return WorkUnit(
            Kind.FACTOR,
            self.keys.key(Kind.FACTOR, {"statistics": merged.key, **used, **scaled}),
            {"group": position, "options": used},
            (merged, *scales),
            is_durable=False,
            rank=merged.rank + SOLVED_AFTER,
            cost=self.costs.factor_s(shape_of(group)),
            out_bytes=4.0 * group.in_features**2,
            block=group.block,
            variant=plan.spec.name if scales else "",
            label=group.label,
        )

    def _scores(self, plan: VariantPlan, source: Chain, chain: Chain, outer: WorkUnit) -> list[WorkUnit]:
        """Return for each held-out slice the unit that compares the variant's predictions with the source's."""
        ends = zip(source.spans, source.blocks[-1], chain.blocks[-1], strict=True)
        head = max(self.outline.tensor_elements(name) for name in self.keys.outer_names)
        units = []
        for (low, high), before, after in ends:
            for number in range(low, high):
                rows = source.tokens.slices[number]
                identity = {"source": source.identities[-1], "variant": chain.identities[-1], "outer": outer.key}
                units.append(
                    WorkUnit(
                        Kind.SCORE,
                        self.keys.key(Kind.SCORE, {**identity, "slice": number}),
                        {"slice": number, "tokens": rows, "precision": self.keys.precision},
                        (before, after, outer),
                        stand_ins={before.key: (self.keys.saved(source.identities[-1], number),)},
                        rank=self.num_blocks,
                        cost=self.costs.score_s(head, sum(map(len, rows))),
                        variant=plan.spec.name,
                    )
                )
        return units

    def _generation(
        self,
        config: dict[str, Any],
        packs: Sequence[WorkUnit],
        outer: Sequence[WorkUnit],
        source: Sequence[WorkUnit],
        variant: str,
    ) -> WorkUnit:
        """Return the unit that continues the smoke prompts; without a variant's units, with the source. What the source
        makes of them is tried as the variant's own."""
        gates = self.inputs.spec.gates
        files = {
            path: digest
            for path, digest in self.inputs.digests.items()
            if not path.endswith(".safetensors") and path not in UNREAD_FILES
        }
        needs = (*packs, *outer, *source)
        identity: dict[str, Any] = {
            "companions": files,
            "needs": [need.key for need in needs],
            "weights": {} if needs else self.keys.places(self.outline.index.entries),
        }
        prompts = [prompt.prompt for prompt in gates.prompts]
        params = {"prompts": prompts, "max_tokens": gates.generated_tokens, "quantization_config": config}
        unit = WorkUnit(
            Kind.GENERATE,
            self.keys.key(Kind.GENERATE, {**identity, **params}),
            params,
            needs,
            rank=self.num_blocks + 1,
            cost=self.costs.generate_s(
                self._parameters, len(prompts), expected_passes(gates.generated_tokens, is_guided=bool(source))
            ),
            variant=variant,
        )
        return self.continuations.split(unit, packs, outer, source) if self.continuations.is_split else unit


def build_units(inputs: UnitInputs, tuning: Tuning, costs: CostModel | None = None) -> JobUnits:
    """Return every unit of a conversion, cut as ``tuning`` says, at ``costs`` (default: those of the job's device).
    Nothing is read but the outline."""
    return UnitBuilder(inputs, tuning, costs or cost_model(inputs.device, inputs.spec.precision)).build()


def _concerns(scales: WorkUnit, groups: Sequence[LinearGroup], group: LinearGroup) -> bool:
    """Return whether a group's weights may be changed by scales: those inside an expert stay there, and of others it is
    not known before they are searched."""
    expert = groups[scales.params["group"]].expert
    return not expert or any(linear.expert == expert for linear in group.linears)


def _searched(group: LinearGroup) -> GroupShape:
    """Return a group as far as the search for its scales costs anything."""
    shape = shape_of(group)
    return GroupShape(min(shape.rows, MAX_SEARCHED_ROWS), shape.width)


def _changed(changes: Sequence[WorkUnit]) -> dict[str, Any]:
    """Return what identifies that weights are changed; nothing where they are not."""
    return {"changes": [unit.key for unit in changes]} if changes else {}


def _names(group: LinearGroup) -> list[str]:
    return [linear.name for linear in group.linears]
