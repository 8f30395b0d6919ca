"""Which grid each linear gets in a variant, and why some get another one or none.

Rules, in order: the spec's ignore patterns; what engines can load of the format; the group size, where it does not
divide in_features, by the variant's fallback; the format's own limits; and engines load q/k/v or gate/up as one matrix,
so linears of one module that share an input share one scheme or stay unquantized together. So do all experts of a
block, with gate, up and down, which engines load as one. Nothing is decided while saving.

Widths are the variant's, its overrides for some linears, or with mixed precision what was allocated to each
(``mixed.py``); what has one scheme has one width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from pipeline.errors import PlanError
from pipeline.formats.codec import codec_for
from pipeline.formats.loaders import LOADED_TRANSPOSED
from pipeline.quantize.types import Scheme
from pipeline.skeleton.groups import LinearGroup, LinearRef
from pipeline.spec import ENGINE_GROUP_SIZES, PER_CHANNEL, Format, GroupFallback, VariantSpec
from pipeline.variants import EXPRESSION_MARK, is_named_by

IGNORED = "left unquantized: the spec ignores it"
"""Note of a linear that ``ignore`` names."""

NUM_CLOSE = 3
"""Linears that an error names of many: for a name that is none, or that cannot stay unquantized alone."""


@dataclass(frozen=True)
class MatrixPlan:
    """What a variant does with one linear.

    Attributes:
        linear: The linear.
        block: Index of its decoder block.
        scheme: Its grid, or None when it stays unquantized.
        note: Why this differs from the variant's scheme; empty when it does not.
    """

    linear: LinearRef
    block: int
    scheme: Scheme | None
    note: str


def plan_matrices(
    variant: VariantSpec, blocks: Sequence[Sequence[LinearGroup]], allocated: Mapping[str, int] | None = None
) -> dict[str, MatrixPlan]:
    """Return the plan of every linear by name, in the order of the model.

    Args:
        variant: What is asked for.
        blocks: The linear groups of each block.
        allocated: The width of each linear by name, with mixed precision.

    Raises:
        PlanError: when nothing could be quantized, when the variant refuses a fallback that is needed, or when linears
            that engines load as one would get several widths.
    """
    groups = [group for block in blocks for group in block]
    size = _checkpoint_group_size(variant, groups)
    names = [linear.name for group in groups for linear in group.linears]
    widths = allocated or {name: variant.bits_of(name) for name in names}
    plans = {plan.linear.name: plan for group in groups for plan in _plan_group(variant, group, size, widths)}
    plans |= _alike(variant, plans)
    for together in loaded_together(groups):
        _require_one_width(variant, [plans[name] for name in together])
    _refuse_useless(variant, plans)
    return plans


def loaded_together(groups: Iterable[LinearGroup]) -> list[tuple[str, ...]]:
    """Return the names of linears that can only have one width, in the order of the model: those that share an input,
    and all experts of a block."""
    found: dict[tuple[int, str], list[str]] = {}
    for group in groups:
        experts = {linear.experts for linear in group.linears if linear.expert}
        # What shares its input with an expert, as a shared expert does, goes with the experts.
        key = min(experts) if experts else group.linears[0].local_name
        found.setdefault((group.block, key), []).extend(linear.name for linear in group.linears)
    return [tuple(names) for names in found.values()]


def _require_one_width(variant: VariantSpec, plans: Sequence[MatrixPlan]) -> None:
    quantized = [plan for plan in plans if plan.scheme is not None]
    for plan in quantized[1:]:
        first = quantized[0]
        if first.scheme and plan.scheme and first.scheme.bits != plan.scheme.bits:
            raise PlanError(
                f"variant {variant.name}: widths gives {first.linear.name} {first.scheme.bits} bits and "
                f"{plan.linear.name} {plan.scheme.bits}, which engines load as one",
                code="plan.widths",
                hint="name both, or all experts of a block, with one entry: for example 're:(gate|up)_proj$'",
            )


def quantized_part(group: LinearGroup, plans: Mapping[str, MatrixPlan]) -> LinearGroup | None:
    """Return the group with the members that are quantized, which share one scheme; None when there are none."""
    members = tuple(linear for linear in group.linears if plans[linear.name].scheme is not None)
    return replace(group, linears=members) if members else None


def require_whole_groups(variant: VariantSpec, groups: Iterable[LinearGroup], plans: Mapping[str, MatrixPlan]) -> None:
    """Return when activation-aware scaling, which changes a group's input, meets no group that is quantized in part.

    Raises:
        PlanError: naming the members of the first group that is quantized in part.
    """
    if not variant.method.has_scales:
        return
    for group in groups:
        part = quantized_part(group, plans)
        if part is not None and part != group:
            names = [linear.name for linear in group.linears if linear not in part.linears]
            more = f" and {len(names) - NUM_CLOSE} more" if len(names) > NUM_CLOSE else ""
            kept = ", ".join(names[:NUM_CLOSE]) + more
            raise PlanError(
                f"variant {variant.name}: {kept} cannot stay unquantized alone: {part.label} reads the same input, "
                "which activation-aware scaling changes",
                code="plan.group",
                hint="ignore all of them, or none, or choose method gptq or rtn",
            )


def require_all_quantized(variant: VariantSpec, plans: Mapping[str, MatrixPlan], parts: Collection[str]) -> None:
    """Return when all experts are quantized that the source has no tensors of their own for: the rest of such a tensor
    could be published under no name that is loaded.

    Args:
        variant: The variant.
        plans: What is decided for each linear by name.
        parts: Names of tensors that the source holds as parts of others.

    Raises:
        PlanError: naming the first that is not.
    """
    for name, plan in plans.items():
        if plan.scheme is None and f"{name}.weight" in parts:
            raise PlanError(
                f"variant {variant.name}: {name} cannot stay unquantized, as the source holds all experts of its block "
                f"in one tensor{f' ({plan.note})' if plan.note else ''}",
                code="plan.group",
                hint="take experts out of ignore, or choose a group size that divides their in_features",
            )


def require_known_names(variant: VariantSpec, names: Iterable[str]) -> None:
    """Return when every entry of the variant's ``ignore`` and ``widths`` names a linear.

    Args:
        variant: The variant.
        names: All linears of the model, those that are never quantized too.

    Raises:
        PlanError: naming the first entry that does not, with the closest names.
    """
    names = list(names)
    entries = [("ignore", pattern) for pattern in variant.ignore] + [("widths", pattern) for pattern in variant.widths]
    for key, pattern in entries:
        if not any(is_named_by(pattern, name) for name in names):
            raise PlanError(
                f"variant {variant.name}: {key} {pattern!r} names no linear of the model",
                code="plan.ignore",
                hint=f"there are, for example, {', '.join(_near(pattern, names))}; bitmill plan --matrices lists all",
            )


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Return names like an entry of ``ignore``: whole ones, and for an expression the last two parts of some."""
    if not pattern.startswith(EXPRESSION_MARK):
        return get_close_matches(pattern, names, NUM_CLOSE) or list(names[:NUM_CLOSE])
    endings = sorted({".".join(name.split(".")[-2:]) for name in names})
    by_leaf = {ending.rpartition(".")[2]: ending for ending in endings}
    words = re.findall(r"[a-z]\w+", pattern.removeprefix(EXPRESSION_MARK))
    close = [leaf for word in words for leaf in get_close_matches(word, list(by_leaf), NUM_CLOSE)]
    return [by_leaf[leaf] for leaf in close] or endings[: 2 * NUM_CLOSE]


def _checkpoint_group_size(variant: VariantSpec, groups: Iterable[LinearGroup]) -> int:
    """Return the group size to start from, lowered for all linears or for none.

    AWQ files hold one size, and of GPTQ and asymmetric compressed-tensors files with several not every loader reads
    them all, so these get the largest that serves every linear that any size serves (the most linears, where no size
    serves all). Symmetric compressed-tensors files hold several.
    """
    wanted = variant.group_size
    holds_several = variant.format is Format.COMPRESSED_TENSORS and variant.symmetric
    if holds_several or wanted == PER_CHANNEL or variant.group_fallback is not GroupFallback.DIVISOR:
        return wanted
    linears = (linear for group in groups for linear in group.linears)
    widths = Counter(linear.in_features for linear in linears if not _kept_reason(variant, linear))
    tried = (wanted, *(size for size in ENGINE_GROUP_SIZES if size < wanted))
    return max(tried, key=lambda size: (sum(n for width, n in widths.items() if width % size == 0), size))


def _plan_group(variant: VariantSpec, group: LinearGroup, size: int, widths: Mapping[str, int]) -> list[MatrixPlan]:
    decided = [
        MatrixPlan(linear, group.block, *_plan_linear(variant, linear, size, widths[linear.name]))
        for linear in group.linears
    ]
    kept: dict[str, MatrixPlan] = {}
    for plan in decided:
        if plan.scheme is None:
            kept.setdefault(_module(plan.linear), plan)
    return [_kept_with(kept.get(_module(plan.linear)), plan) for plan in decided]


def _kept_with(kept: MatrixPlan | None, plan: MatrixPlan) -> MatrixPlan:
    """Return the plan of a linear of which engines want that it is left unquantized with another, if there is one."""
    if kept is None or plan.scheme is None:
        return plan
    why = f"left unquantized with {kept.linear.local_name}, which engines fuse it with ({kept.note})"
    return replace(plan, scheme=None, note=why)


def _alike(variant: VariantSpec, plans: Mapping[str, MatrixPlan]) -> dict[str, MatrixPlan]:
    """Return the plans of experts, those of one block alike: the least group size of any, or none quantized."""
    layers: dict[tuple[int, str], list[MatrixPlan]] = {}
    for plan in plans.values():
        if plan.linear.expert:
            layers.setdefault((plan.block, plan.linear.experts), []).append(plan)
    found = {}
    for members in layers.values():
        # The one that was left on its own account, not with another: the shortest reason.
        left = [plan for plan in members if plan.scheme is None]
        kept = min(left, key=lambda plan: len(plan.note)) if left else None
        sizes = [plan.scheme.group_size for plan in members if plan.scheme is not None]
        for plan in members:
            alike = _kept_with(kept, plan)
            if alike.scheme is not None and variant.group_size != PER_CHANNEL and min(sizes) < alike.scheme.group_size:
                # Sizes are halved where they do not divide, so the least one divides what the others do.
                why = f"group size {min(sizes)}: engines load all experts of a block with one"
                alike = replace(alike, scheme=replace(alike.scheme, group_size=min(sizes)), note=why)
            found[plan.linear.name] = alike
    return found


def _module(linear: LinearRef) -> str:
    """Return the module that holds the linear: what engines fuse are members of one."""
    return linear.local_name.rpartition(".")[0]


def _kept_reason(variant: VariantSpec, linear: LinearRef) -> str:
    """Return why the linear stays unquantized whatever its shape; empty when it does not."""
    if variant.ignores(linear.name):
        return IGNORED
    if linear.is_transposed and variant.format not in LOADED_TRANSPOSED:
        return f"left unquantized: it is stored transposed (Conv1D), which loaders of {variant.format} do not replace"
    return ""


def _plan_linear(variant: VariantSpec, linear: LinearRef, checkpoint_size: int, bits: int) -> tuple[Scheme | None, str]:
    if reason := _kept_reason(variant, linear):
        return None, reason
    size, note = _group_size(variant, linear, checkpoint_size)
    if size is None:
        return None, note
    scheme = Scheme(bits, size, variant.symmetric, variant.type, variant.activations)
    unholdable = codec_for(variant.format).check(linear.name, linear.out_features, linear.in_features, scheme)
    return (None, f"left unquantized: {unholdable}") if unholdable else (scheme, note)


def _group_size(variant: VariantSpec, linear: LinearRef, checkpoint_size: int) -> tuple[int | None, str]:
    width = linear.in_features
    if checkpoint_size == PER_CHANNEL:
        return width, ""
    if width % checkpoint_size == 0:
        lowered = checkpoint_size != variant.group_size
        why = f"group size {checkpoint_size}: {variant.group_size} does not divide every in_features"
        return checkpoint_size, why if lowered else ""
    fits = [size for size in ENGINE_GROUP_SIZES if size < checkpoint_size and width % size == 0]
    can_lower = variant.group_fallback is GroupFallback.DIVISOR and variant.format is Format.COMPRESSED_TENSORS
    if fits and can_lower:
        return fits[0], f"group size {fits[0]}: {checkpoint_size} does not divide in_features {width}"
    return None, f"left unquantized: group size {checkpoint_size} does not divide in_features {width}"


def _refuse_useless(variant: VariantSpec, plans: Mapping[str, MatrixPlan]) -> None:
    changed = [plan for plan in plans.values() if plan.note and IGNORED not in plan.note]
    if variant.group_fallback is GroupFallback.REFUSE and changed:
        raise PlanError(
            f"variant {variant.name}: {len(changed)} of {len(plans)} matrices would deviate, first "
            f"{changed[0].linear.name} ({changed[0].note})",
            code="plan.group_size",
            hint="choose a group size that divides every in_features, or set group_fallback to divisor or skip",
        )
    if any(plan.scheme for plan in plans.values()):
        return
    if not changed:
        raise PlanError(
            f"variant {variant.name} would quantize nothing: the spec ignores every linear",
            code="plan.ignore",
            hint="take entries out of ignore; bitmill plan --matrices lists the linears",
        )
    widths = sorted({plan.linear.in_features for plan in plans.values()})
    sizes = f"the model's in_features are {', '.join(map(str, widths))}: choose a group size that divides them"
    is_layout = variant.format not in LOADED_TRANSPOSED and all(plan.linear.is_transposed for plan in plans.values())
    raise PlanError(
        f"variant {variant.name} would quantize nothing: {changed[0].linear.name} is {changed[0].note}",
        code="plan.layout" if is_layout else "plan.group_size",
        hint="use format gptq, for example --variant gptq-w4-g64 or rtn-w8-g64-gptq" if is_layout else sizes,
    )
