"""The work units of a conversion and their keys.

A key is the fingerprint of the stage's kind and version, what computes it (torch and transformers versions, device
kind), its own inputs from the source (tensor places and file digests, config), its arguments, and the keys of the
units that it reads. Paths, workers and times are in no key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch

from pipeline.calibrate.tokens import TokenBatch, coverage_cautions
from pipeline.fingerprint import fingerprint
from pipeline.formats.config import quantization_config
from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.outline import Outline
from pipeline.graph.schemes import MatrixPlan, plan_matrices, require_known_ignores, require_whole_groups
from pipeline.graph.stages import ALGORITHM_VERSIONS
from pipeline.quantize.types import Scheme
from pipeline.skeleton.groups import LinearGroup
from pipeline.spec import CalibrationSpec, ConversionSpec, GateSpec, Method, VariantSpec

HELDOUT_SLICE_SEQUENCES = 8
"""Held-out sequences in one work unit of evaluation; their sums add up exactly, so only speed depends on it."""

COMPUTE_PACKAGES = ("torch", "transformers", "compressed-tensors")
"""Packages whose version can change bytes; with Bitmill's own they are named on the card."""


@dataclass(frozen=True)
class VariantPlan:
    """One variant with everything decided.

    Attributes:
        spec: The variant.
        matrices: What happens with each linear, by name.
        quantization_config: What config.json will say.
    """

    spec: VariantSpec
    matrices: Mapping[str, MatrixPlan]
    quantization_config: dict[str, Any]

    def cautions(self, calibration: CalibrationSpec) -> tuple[str, ...]:
        """Return what weakens this variant's result without being a fault."""
        widths = [plan.linear.in_features for plan in self.matrices.values() if plan.scheme is not None]
        return coverage_cautions(calibration.samples * calibration.length, widths)

    def scheme_params(self, group: LinearGroup) -> dict[str, Any] | None:
        """Return the grid that the group's members share, as JSON; None when they stay in 16 bit."""
        scheme = self.matrices[group.linears[0].name].scheme
        return (
            None
            if scheme is None
            else {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
        )


def make_variant_plan(spec: VariantSpec, outline: Outline) -> VariantPlan:
    """Return the variant with everything decided for a source.

    Raises:
        PlanError: when nothing could be quantized, an ignore names nothing, or the variant refuses a fallback that is
            needed.
    """
    matrices = plan_matrices(spec, outline.groups)
    require_known_ignores(spec, [*matrices, *outline.other_linears])
    require_whole_groups(spec, (group for block in outline.groups for group in block), matrices)
    # Loaders take every linear for quantized that is not named, so the output head and the like are named too. They
    # look for the model's names, which transformers may have made from other ones in the checkpoint.
    schemes: dict[str, Scheme | None] = dict.fromkeys(outline.other_linears)
    for stored, plan in matrices.items():
        model_name = f"{outline.skeleton.block_names[plan.block]}.{plan.linear.local_name}"
        schemes |= {model_name: plan.scheme, stored: plan.scheme}
    return VariantPlan(spec, matrices, quantization_config(spec.format, schemes, spec, version("bitmill")))


@dataclass(frozen=True)
class Inputs:
    """Everything that a conversion's bytes depend on.

    Attributes:
        outline: The source without weights.
        digests: SHA-256 of each needed source file by path.
        spec: What to make.
        variants: The variants, decided.
        calibration: Tokens for statistics.
        heldout: Tokens for the divergence gate.
        device: ``cpu`` or ``cuda``.
    """

    outline: Outline
    digests: Mapping[str, str]
    spec: ConversionSpec
    variants: Sequence[VariantPlan]
    calibration: TokenBatch
    heldout: TokenBatch
    device: str


@dataclass(frozen=True)
class VariantUnits:
    """The units that give one variant: its packed blocks, its comparison with the source, its continuations."""

    packs: tuple[WorkUnit, ...]
    solves: tuple[WorkUnit, ...]
    evaluations: tuple[WorkUnit, ...]
    generation: WorkUnit


@dataclass(frozen=True)
class JobUnits:
    """All units of a conversion.

    Attributes:
        variants: By variant name.
        outer: Copies what lies outside the blocks.
        source_generation: Continues the smoke prompts with the source.
        hidden: The source's hidden states on their way through the blocks, in order of use; large, of use once.
    """

    variants: Mapping[str, VariantUnits]
    outer: WorkUnit
    source_generation: WorkUnit
    hidden: tuple[WorkUnit, ...]

    @property
    def goals(self) -> list[WorkUnit]:
        """The units whose outputs are wanted: packs block by block, then what judges them."""
        per_block = zip(*(units.packs for units in self.variants.values()), strict=True)
        packs = [pack for block in per_block for pack in block]
        solves = [solve for units in self.variants.values() for solve in units.solves]
        judged = [unit for v in self.variants.values() for unit in (*v.evaluations, v.generation)]
        return [self.outer, *packs, *solves, self.source_generation, *judged]


class UnitBuilder:
    """Makes the units of one conversion; see ``build_units``."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.outline = inputs.outline
        self.num_blocks = inputs.outline.skeleton.num_blocks

    @cached_property
    def compute(self) -> dict[str, Any]:
        """What computes: versions, device kind, the model's class and config."""
        return {
            "packages": {name: version(name) for name in COMPUTE_PACKAGES},
            "device": self.inputs.device,
            "config": self.inputs.digests["config.json"],
        }

    def unit(
        self, kind: Kind, identity: Mapping[str, Any], params: dict[str, Any], needs: Sequence[WorkUnit], **labels: Any
    ) -> WorkUnit:
        """Return a unit whose key covers all that is given but the labels."""
        key = fingerprint(
            {
                "kind": kind,
                "version": ALGORITHM_VERSIONS[kind],
                "compute": self.compute,
                "identity": dict(identity),
                "params": params,
                "needs": [need.key for need in needs],
            }
        )
        return WorkUnit(kind, key, params, tuple(needs), **labels)

    def places(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what identifies tensors: the digest of their file and where they lie in it."""
        found = {}
        for name in sorted(names):
            file, entry = self.outline.index.entries[name]
            found[name] = [self.inputs.digests[file], entry.start_bytes, entry.end_bytes]
        return found

    @cached_property
    def outer_names(self) -> list[str]:
        """Checkpoint tensors outside the blocks, extras included."""
        return [*self.outline.skeleton.outer_tensors().values(), *self.outline.skeleton.extra_names]

    def block_names(self, block: int) -> list[str]:
        """Checkpoint tensors of one block."""
        return list(self.outline.skeleton.block_tensors(block).values())

    def block_parameters(self, block: int) -> int:
        """Elements of one block's tensors."""
        return sum(self.outline.tensor_elements(name) for name in self.block_names(block))

    def chain(self, batch: TokenBatch, slice_sequences: int, collect: bool) -> list[list[WorkUnit]]:
        """Return for each token slice the units that give its hidden states: embedding, then every block."""
        chains = []
        for rows in torch.split(batch.tokens_NL, slice_sequences):
            tokens = {"tokens": rows.tolist()}
            flops = 2.0 * rows.numel()
            # Looking embeddings up costs no FLOPs but takes about as long as a block; 0 would spoil the estimate.
            cost = flops * self.block_parameters(0)
            units = [self.unit(Kind.EMBED, {"weights": self.places(self.outer_names)}, tokens, (), cost=cost)]
            for block in range(self.num_blocks):
                identity = {"weights": self.places(self.block_names(block)), "block": block}
                cost = flops * self.block_parameters(block) + (
                    self._moment_flops(block, rows.numel()) if collect else 0
                )
                params = {"collect": collect}
                units.append(self.unit(Kind.CALIBRATE, identity, params, (units[-1],), block=block, cost=cost))
            chains.append(units)
        return chains

    def _moment_flops(self, block: int, num_tokens: int) -> float:
        return sum(2.0 * num_tokens * group.in_features**2 for group in self.outline.groups[block])

    def merged(self, chains: list[list[WorkUnit]]) -> list[WorkUnit]:
        """Return for each block the unit that adds up its statistics."""
        units = []
        for block in range(self.num_blocks):
            needs = [chain[block + 1] for chain in chains]
            cost = float(sum(group.in_features**2 for group in self.outline.groups[block]) * len(needs))
            units.append(self.unit(Kind.MERGE, {}, {}, needs, block=block, cost=cost))
        return units

    def variant(self, plan: VariantPlan, merged: list[WorkUnit], finals: list[WorkUnit]) -> VariantUnits:
        """Return the units of one variant."""
        packs, solves = [], []
        for block in range(self.num_blocks):
            pack, solved = self._block(plan, block, merged[block])
            packs.append(pack)
            solves.extend(solved)
        evaluations = self._evaluations(plan, packs, finals)
        generation = self.generation(self.inputs.spec.gates, plan.quantization_config, packs, plan.spec.name)
        return VariantUnits(tuple(packs), tuple(solves), tuple(evaluations), generation)

    def _block(self, plan: VariantPlan, block: int, merged: WorkUnit) -> tuple[WorkUnit, list[WorkUnit]]:
        spec = plan.spec
        options = {"damping": spec.damping, "act_order": spec.act_order, "clip_search": spec.clip_search}
        weights = {"weights": self.places(self.block_names(block))}
        labels: dict[str, Any] = {"block": block, "variant": spec.name}
        quantized = [
            (position, group, params)
            for position, group in enumerate(self.outline.groups[block])
            if (params := plan.scheme_params(group)) is not None
        ]
        scales = [
            self.unit(
                Kind.SCALES,
                {**weights, "names": _names(group)},
                {"group": position, "scheme": scheme, "options": options},
                (merged,),
                label=group.label,
                cost=_scale_flops(group),
                **labels,
            )
            for position, group, scheme in quantized
            if spec.method is Method.AWQ
        ]
        solves = [
            self.unit(
                Kind.SOLVE,
                {**weights, "names": _names(group)},
                {"group": position, "scheme": scheme, "options": options, "method": spec.method.value},
                (merged, *scales),
                label=group.label,
                cost=_solve_flops(group),
                **labels,
            )
            for position, group, scheme in quantized
        ]
        pack = self.unit(
            Kind.PACK,
            weights,
            {"format": spec.format.value},
            (*scales, *solves),
            cost=float(self.block_parameters(block)),
            **labels,
        )
        return pack, solves

    def _evaluations(self, plan: VariantPlan, packs: list[WorkUnit], finals: list[WorkUnit]) -> list[WorkUnit]:
        identity = {"weights": self.places(self.outer_names)}
        slices = torch.split(self.inputs.heldout.tokens_NL, HELDOUT_SLICE_SEQUENCES)
        per_token = 2.0 * sum(self.block_parameters(block) for block in range(self.num_blocks))
        head = 4.0 * max(self.outline.tensor_elements(name) for name in self.outer_names)
        return [
            self.unit(
                Kind.EVALUATE,
                identity,
                {"tokens": rows.tolist(), "quantization_config": plan.quantization_config},
                (final, *packs),
                variant=plan.spec.name,
                cost=rows.numel() * (per_token + head),
            )
            for rows, final in zip(slices, finals, strict=True)
        ]

    def generation(self, gates: GateSpec, config: dict[str, Any], packs: Sequence[WorkUnit], variant: str) -> WorkUnit:
        """Return the unit that continues the smoke prompts; without packs, with the source."""
        files = {path: digest for path, digest in self.inputs.digests.items() if not path.endswith(".safetensors")}
        identity: dict[str, Any] = {"companions": files, "weights": self.places(self.outer_names)}
        if not packs:
            identity["blocks"] = [self.places(self.block_names(block)) for block in range(self.num_blocks)]
        prompts = [prompt.prompt for prompt in gates.prompts]
        params = {"prompts": prompts, "max_tokens": gates.generated_tokens, "quantization_config": config}
        per_token = 2.0 * sum(self.block_parameters(block) for block in range(self.num_blocks))
        cost = per_token * len(prompts) * gates.generated_tokens
        return self.unit(Kind.GENERATE, identity, params, packs, variant=variant, cost=cost)


def build_units(inputs: Inputs) -> JobUnits:
    """Return every unit of a conversion. Nothing is read but the outline."""
    builder = UnitBuilder(inputs)
    spec = inputs.spec
    calibration = builder.chain(inputs.calibration, spec.calibration.slice_sequences, collect=True)
    heldout = builder.chain(inputs.heldout, HELDOUT_SLICE_SEQUENCES, collect=False)
    merged, finals = builder.merged(calibration), [chain[-1] for chain in heldout]
    size = float(sum(builder.outline.tensor_elements(name) for name in builder.outer_names))
    outer = builder.unit(Kind.OUTER, {"weights": builder.places(builder.outer_names)}, {}, (), cost=size)
    variants = {plan.spec.name: builder.variant(plan, merged, finals) for plan in inputs.variants}
    source_generation = builder.generation(spec.gates, {}, (), "")
    # The held-out slices' last hidden states stay: another variant of the same source is compared with them later.
    hidden = [unit for chain in calibration for unit in chain] + [unit for chain in heldout for unit in chain[:-1]]
    return JobUnits(variants, outer, source_generation, tuple(hidden))


def _names(group: LinearGroup) -> list[str]:
    return [linear.name for linear in group.linears]


def _rows(group: LinearGroup) -> int:
    return sum(linear.out_features for linear in group.linears)


def _solve_flops(group: LinearGroup) -> float:
    """Column updates r * n**2 and a factorization of 4/3 * n**3."""
    return _rows(group) * group.in_features**2 + 4 / 3 * group.in_features**3


def _scale_flops(group: LinearGroup) -> float:
    """A dozen losses of 2 * r * n**2 over the grid of exponents, on a sample of the rows."""
    return 12 * 2.0 * min(_rows(group), 512) * group.in_features**2 + 4.0 * _rows(group) * group.in_features**2
