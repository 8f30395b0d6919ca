"""Which grid each linear gets in a variant, and why some get another one or none.

Rules, in order: the spec's ignore patterns; what engines can load of the format; the group size, where it does not
divide in_features, by the variant's fallback; the format's own limits; and engines load q/k/v or gate/up as one matrix,
so linears that share an input share one scheme or stay in 16 bit together. Nothing is decided while saving.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import PlanError
from pipeline.formats.codec import codec_for
from pipeline.formats.loaders import LOADED_TRANSPOSED
from pipeline.quantize.types import Scheme
from pipeline.skeleton.groups import LinearGroup, LinearRef
from pipeline.spec import ENGINE_GROUP_SIZES, PER_CHANNEL, Format, GroupFallback, VariantSpec


@dataclass(frozen=True)
class MatrixPlan:
    """What a variant does with one linear.

    Attributes:
        linear: The linear.
        block: Index of its decoder block.
        scheme: Its grid, or None when it stays in 16 bit.
        note: Why this differs from the variant's scheme; empty when it does not.
    """

    linear: LinearRef
    block: int
    scheme: Scheme | None
    note: str


def plan_matrices(variant: VariantSpec, blocks: Sequence[Sequence[LinearGroup]]) -> dict[str, MatrixPlan]:
    """Return the plan of every linear by name, in the order of the model.

    Raises:
        PlanError: when nothing could be quantized, or when the variant refuses a fallback that is needed.
    """
    groups = [group for block in blocks for group in block]
    size = _checkpoint_group_size(variant, groups)
    plans = {plan.linear.name: plan for group in groups for plan in _plan_group(variant, group, size)}
    _refuse_useless(variant, plans)
    return plans


def _checkpoint_group_size(variant: VariantSpec, groups: Iterable[LinearGroup]) -> int:
    """Return the group size to start from, lowered for all linears or for none.

    AWQ files hold one size, and of GPTQ and asymmetric compressed-tensors files with several not every loader reads
    them all, so one that divides every in_features is preferred. Symmetric compressed-tensors files hold several.
    """
    widths = {group.in_features for group in groups}
    wanted = variant.group_size
    holds_several = variant.format is Format.COMPRESSED_TENSORS and variant.symmetric
    if holds_several or wanted == PER_CHANNEL or variant.group_fallback is not GroupFallback.DIVISOR:
        return wanted
    tried = (wanted, *(size for size in ENGINE_GROUP_SIZES if size < wanted))
    return next((size for size in tried if all(width % size == 0 for width in widths)), wanted)


def _plan_group(variant: VariantSpec, group: LinearGroup, size: int) -> list[MatrixPlan]:
    decided = [_plan_linear(variant, linear, size) for linear in group.linears]
    kept = [(linear, note) for linear, (scheme, note) in zip(group.linears, decided, strict=True) if scheme is None]
    if kept and len(kept) < len(decided):
        partner, why = kept[0]
        note = f"left in 16 bit with {partner.local_name}, which engines fuse it with ({why})"
        decided = [(None, own if scheme is None else note) for scheme, own in decided]
    return [
        MatrixPlan(linear, group.block, scheme, note)
        for linear, (scheme, note) in zip(group.linears, decided, strict=True)
    ]


def _plan_linear(variant: VariantSpec, linear: LinearRef, checkpoint_size: int) -> tuple[Scheme | None, str]:
    if variant.ignores(linear.name):
        return None, "left in 16 bit: the spec ignores it"
    if linear.is_transposed and variant.format not in LOADED_TRANSPOSED:
        return (
            None,
            f"left in 16 bit: it is stored transposed (Conv1D), which loaders of {variant.format} do not replace",
        )
    size, note = _group_size(variant, linear, checkpoint_size)
    if size is None:
        return None, note
    scheme = Scheme(variant.bits, size, variant.symmetric)
    reason = codec_for(variant.format).check(linear.name, linear.out_features, linear.in_features, scheme)
    return (None, f"left in 16 bit: {reason}") if reason else (scheme, note)


def _group_size(variant: VariantSpec, linear: LinearRef, checkpoint_size: int) -> tuple[int | None, str]:
    width = linear.in_features
    if checkpoint_size == PER_CHANNEL:
        return width, ""
    if width % checkpoint_size == 0:
        lowered = checkpoint_size != variant.group_size
        why = f"group size {checkpoint_size}: {variant.group_size} does not divide every in_features"
        return checkpoint_size, why if lowered else ""
    fits = [size for size in ENGINE_GROUP_SIZES if size < checkpoint_size and width % size == 0]
    can_lower = variant.group_fallback is GroupFallback.DIVISOR and variant.format is not Format.AWQ
    if fits and can_lower:
        return fits[0], f"group size {fits[0]}: {checkpoint_size} does not divide in_features {width}"
    return None, f"left in 16 bit: group size {checkpoint_size} does not divide in_features {width}"


def _refuse_useless(variant: VariantSpec, plans: Mapping[str, MatrixPlan]) -> None:
    changed = [plan for plan in plans.values() if plan.note and "the spec ignores it" not in plan.note]
    if variant.group_fallback is GroupFallback.REFUSE and changed:
        raise PlanError(
            f"variant {variant.name}: {len(changed)} of {len(plans)} matrices would deviate, first "
            f"{changed[0].linear.name} ({changed[0].note})",
            code="plan.group_size",
            hint="choose a group size that divides every in_features, or set group_fallback to divisor or skip",
        )
    if not any(plan.scheme for plan in plans.values()):
        first = next(iter(plans.values()))
        widths = sorted({plan.linear.in_features for plan in plans.values()})
        sizes = f"the model's in_features are {', '.join(map(str, widths))}: choose a group size that divides them"
        is_layout = all(plan.linear.is_transposed for plan in plans.values()) and (
            variant.format not in LOADED_TRANSPOSED
        )
        raise PlanError(
            f"variant {variant.name} would quantize nothing: {first.linear.name} is {first.note}",
            code="plan.layout" if is_layout else "plan.group_size",
            hint="use format gptq, for example --variant gptq-w4-g64 or rtn-w8-g64-gptq" if is_layout else sizes,
        )


def quantized_group(group: LinearGroup, plans: Mapping[str, MatrixPlan]) -> tuple[LinearRef, ...]:
    """Return the members of a group that are quantized: all or none, by construction."""
    return tuple(linear for linear in group.linears if plans[linear.name].scheme is not None)
