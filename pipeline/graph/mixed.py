"""Mixed precision: which width each linear of a variant gets.

Every part of the model, that is every set of linears that engines load as one, is solved at every width that the
variant may choose from. What that damages is appraised (``stages/sensitivity.py``), and a knapsack buys the least
damage that the budget allows (``quantize/allocate.py``). Then the variant is made like any other: what was solved for
the widths that were chosen is found in the work store.

Before anything has run, a plan assumes that all weights are equally sensitive, with an error that is quartered by every
bit. What it says of sizes and times holds approximately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import PlanError, QuantizationError
from pipeline.formats.codec import codec_for
from pipeline.graph.schemes import MatrixPlan, loaded_together, plan_matrices
from pipeline.graph.shape import ModelShape
from pipeline.quantize.allocate import Choice, allocate
from pipeline.skeleton.groups import LinearRef
from pipeline.skeleton.limits import kv_cache
from pipeline.skeleton.model import Skeleton
from pipeline.spec import VariantSpec
from pipeline.units import format_bytes, parse_bytes

SENSED_SEQUENCES = 2
"""Sequences that one unit measures sensitivity on: what enters every block is kept for all of them."""

RUNTIME_BYTES = 1_500_000_000
"""What an inference engine takes besides weights and KV cache: code, activations, graphs. A rule of thumb."""

Candidates = Mapping[int, Mapping[str, MatrixPlan]]
"""What a variant would do with every linear if all had one width, by that width."""

Damages = Mapping[int, Mapping[str, float]]
"""What the error of each linear adds to the divergence, by width and name."""


def candidates(variant: VariantSpec, outline: ModelShape) -> Candidates:
    """Return the plans of all widths that a variant chooses from; nothing for one that does not choose.

    Raises:
        PlanError: when it could not quantize anything at any of them.
    """
    found: dict[int, Mapping[str, MatrixPlan]] = {}
    reason = None
    for bits in variant.choices:
        uniform = variant.model_copy(update={"bits": bits, "mix": None})
        try:
            found[bits] = plan_matrices(uniform, outline.groups)
        except PlanError as error:
            reason = error
    if reason is not None and not found:
        raise reason
    return found


def allocated_widths(
    variant: VariantSpec, outline: ModelShape, plans: Candidates, damages: Damages | None = None
) -> dict[str, int]:
    """Return the width of every linear by name; those that no width quantizes have the smallest.

    Args:
        variant: What is asked for.
        outline: The source.
        plans: What ``candidates`` gives.
        damages: What was appraised; None to assume that all weights are equally sensitive.

    Raises:
        PlanError: when the budget is too small for the smallest widths.
    """
    parts = [part for names in _parts(outline) if (part := _part(variant, outline, plans, names, damages)).choices]
    budget = _budget(variant, outline, parts)
    try:
        picked = allocate([part.choices for part in parts], budget.num_bytes)
    except QuantizationError as error:
        if error.code != "quantize.budget":
            raise
        least = budget.kept_bytes + sum(min(choice.num_bytes for choice in part.choices) for part in parts)
        raise PlanError(
            f"variant {variant.name}: {budget.words} is too little: with {min(plans)} bits throughout it takes "
            f"{budget.amount(least)}",
            code="plan.budget",
            hint="raise the budget in mix, allow smaller widths in mix.choices, or ignore fewer linears",
        ) from error
    widths = dict.fromkeys(next(iter(plans.values())), min(plans))
    for part, position in zip(parts, picked, strict=True):
        widths |= dict.fromkeys(part.names, part.choices[position].bits)
    return widths


@dataclass(frozen=True)
class _Part:
    """Linears that get one width.

    Attributes:
        names: Of those that are quantized.
        num_weights: Of all of them.
        source_bytes: What they take in the source.
        choices: What they can have.
    """

    names: tuple[str, ...]
    num_weights: int
    source_bytes: int
    choices: tuple[Choice, ...]


def _parts(outline: ModelShape) -> list[tuple[str, ...]]:
    return loaded_together(group for block in outline.groups for group in block)


def _part(
    variant: VariantSpec, outline: ModelShape, plans: Candidates, names: Sequence[str], damages: Damages | None
) -> _Part:
    """Return what a part can have. Widths at which a linear stays unquantized that others quantize are none: what is
    left unquantized is decided by the spec and by shapes, not by a budget."""
    quantized = {bits: [n for n in names if plan[n].scheme is not None] for bits, plan in plans.items()}
    most = max(quantized.values(), key=len)
    weights = {name: outline.tensor_elements(f"{name}.weight") for name in most}
    choices = []
    for bits, held in quantized.items():
        if not held or held != most:
            continue
        if damages is None:
            damage = sum(weights.values()) * 4.0**-bits
        else:
            damage = sum(damages[bits][name] for name in held)
        if variant.mix is not None and variant.mix.average_bits is not None:
            size = sum(weights.values()) * bits
        else:
            size = sum(packed_bytes(variant, plans[bits][name], outline) for name in held)
        choices.append(Choice(bits, size, damage))
    return _Part(
        tuple(most), sum(weights.values()), sum(outline.tensor_bytes(f"{n}.weight") for n in most), tuple(choices)
    )


def packed_bytes(variant: VariantSpec, plan: MatrixPlan, outline: ModelShape) -> int:
    """Return what a linear takes in a release's files; as much as in the source's where it stays unquantized."""
    linear: LinearRef = plan.linear
    stored = outline.tensor_bytes(f"{linear.name}.weight")
    if plan.scheme is None:
        return stored
    # compressed-tensors stores scales in the source's own dtype where that has 16 bits, else in float16.
    scale_bytes = min(stored // (linear.out_features * linear.in_features), 2)
    return codec_for(variant.format).num_bytes(linear.out_features, linear.in_features, plan.scheme, scale_bytes)


@dataclass(frozen=True)
class _Budget:
    """What the parts may take together.

    Attributes:
        num_bytes: The budget, in what the parts' choices are counted in.
        kept_bytes: What the rest takes of what was asked for.
        num_weights: Weights that an average is of; 0 where bytes were asked for.
        words: What was asked for.
    """

    num_bytes: int
    kept_bytes: int
    num_weights: int
    words: str

    def amount(self, num_bytes: int) -> str:
        """Return so much in the words of the budget."""
        return f"{num_bytes / self.num_weights:.2f}" if self.num_weights else format_bytes(num_bytes)


def _budget(variant: VariantSpec, outline: ModelShape, parts: Sequence[_Part]) -> _Budget:
    mix = variant.mix
    assert mix is not None, "only a variant with mix has a budget"
    if mix.average_bits is not None:
        # Choices are counted in bits here.
        weights = sum(part.num_weights for part in parts)
        return _Budget(int(mix.average_bits * weights), 0, weights, f"mix.average_bits {mix.average_bits:g}")
    kept = outline.index.total_bytes - sum(part.source_bytes for part in parts)
    if mix.weights:
        return _Budget(parse_bytes(mix.weights) - kept, kept, 0, f"mix.weights {mix.weights}")
    if not isinstance(outline.skeleton, Skeleton):
        raise PlanError(
            f"variant {variant.name}: mix.memory needs a source: nothing is known of this model's KV cache",
            code="plan.budget",
            hint="give mix.average_bits or mix.weights with --shape",
        )
    tokens, cache_bytes = kv_cache(outline.skeleton, mix.context)
    kept += cache_bytes + RUNTIME_BYTES
    words = f"mix.memory {mix.memory} with a KV cache of {tokens} tokens"
    return _Budget(parse_bytes(mix.memory) - kept, kept, 0, words)
