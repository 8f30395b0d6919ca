"""Numbers and lists derived from ``ReleaseFacts``, shared by the card, the plots and the report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.facts import UNQUANTIZED_BITS, ModuleFacts, ReleaseFacts, weights_by_width
from pipeline.spec import (
    PER_CHANNEL,
    Activations,
    ExpertStatistics,
    Format,
    Method,
    NumberType,
    Propagate,
    VariantSpec,
    average_width,
)

_SCALE_BITS = 16
_METHOD_NAMES = {
    Method.RTN: "round to nearest",
    Method.GPTQ: "GPTQ",
    Method.AWQ: "AWQ",
    Method.AWQ_GPTQ: "AWQ and GPTQ",
    Method.SMOOTHQUANT: "SmoothQuant",
    Method.SMOOTHQUANT_GPTQ: "SmoothQuant and GPTQ",
}
_TYPE_NAMES = {NumberType.INT: "", NumberType.FLOAT: " floating-point"}
_INPUTS = {
    Activations.NONE: "",
    Activations.DYNAMIC: ", inputs rounded alike with a scale for each token",
}


@dataclass(frozen=True)
class Judged:
    """A figure against its budget.

    Attributes:
        name: What was measured.
        value: The figure as text.
        budget: The most that is accepted, as text; ``not judged`` where there is no budget.
        kept: Whether the figure is within the budget; None where there is no budget.
    """

    name: str
    value: str
    budget: str
    kept: bool | None


@dataclass(frozen=True)
class Folded:
    """Names that differ in numbers only.

    Attributes:
        pattern: The name, with ``*`` for the numbers when there are several.
        count: How many names it stands for.
        text: What is said of all of them.
    """

    pattern: str
    count: int
    text: str


@dataclass(frozen=True)
class WidthRow:
    """The blocks, as ranges, in which the linears of some names have one width."""

    kinds: tuple[str, ...]
    bits: int
    blocks: str


@dataclass(frozen=True)
class FamilyMember:
    """One variant of a conversion, published if it ``passed``; ``is_this`` marks the release that the facts are of."""

    variant: str
    passed: bool
    size_bytes: int
    kl: float
    perplexity: float
    is_this: bool


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one block: their common name, and the calibration tokens that the router sent to each."""

    block: int
    name: str
    tokens: tuple[int, ...]

    @property
    def median(self) -> float:
        """The median of the tokens."""
        return median(self.tokens)


def family(facts: ReleaseFacts) -> tuple[FamilyMember, ...]:
    """Return this variant and its siblings, smallest first."""
    quality = facts.quality
    own = FamilyMember(
        facts.variant.name, facts.verdict.passed, facts.size_bytes, quality.kl, quality.perplexity, is_this=True
    )
    others = [
        FamilyMember(item.variant, item.passed, item.size_bytes, item.kl, item.perplexity, is_this=False)
        for item in facts.siblings
    ]
    return tuple(sorted([own, *others], key=lambda member: (member.size_bytes, member.variant)))


def quantized_modules(facts: ReleaseFacts) -> tuple[ModuleFacts, ...]:
    """Return the linears that were quantized, in the order of the facts."""
    return tuple(module for module in facts.modules if module.bits < UNQUANTIZED_BITS)


def worst_modules(facts: ReleaseFacts, limit: int) -> tuple[ModuleFacts, ...]:
    """Return the quantized linears with the largest relative error, worst first; equal ones in order of name."""
    return tuple(sorted(quantized_modules(facts), key=lambda module: (-module.relative_error, module.name))[:limit])


def expert_layers(facts: ReleaseFacts) -> tuple[ExpertLayer, ...]:
    """Return for each block with quantized experts how many tokens each of these was calibrated on, in order."""
    tokens: dict[tuple[int, str], dict[str, int]] = {}
    for module in facts.modules:
        if module.expert_tokens is not None:
            expert = module.name.rpartition(".")[0]
            key = module.block, expert.rpartition(".")[0]
            tokens.setdefault(key, {})[expert] = module.expert_tokens
    return tuple(ExpertLayer(block, name, tuple(by.values())) for (block, name), by in tokens.items())


def describe_experts(facts: ReleaseFacts, layers: Sequence[ExpertLayer]) -> str:
    """Return for example ``8 in each of 27 blocks; statistics of all tokens; the router sent 120 to 9011 tokens``."""
    sizes = sorted({len(layer.tokens) for layer in layers})
    counts = [count for layer in layers for count in layer.tokens]
    lowest, highest, unseen = min(counts), max(counts), counts.count(0)
    told = f", and none to {unseen} of {len(counts)}" if unseen else ""
    calibration = facts.calibration
    match calibration.experts:
        case ExpertStatistics.ROUTED:
            of = "the tokens that the router sent to each"
        case ExpertStatistics.SHRINKAGE:
            of = f"the tokens sent to each, drawn towards all with weight {calibration.expert_shrinkage:g}"
        case ExpertStatistics.ALL | None:
            of = "all tokens"
    return (
        f"{' or '.join(map(str, sizes))} in each of {len(layers)} blocks, statistics of {of}; the router sent "
        f"{lowest} to {highest} calibration tokens to an expert{told}"
    )


def kind_of(module_name: str) -> str:
    """Return what a linear is called in every block: ``q_proj`` for ``model.layers.0.self_attn.q_proj``, with
    ``experts.`` before it when it is one of several experts."""
    parts = module_name.split(".")
    return f"experts.{parts[-1]}" if "experts" in parts[:-1] else parts[-1]


_SCHEDULES = {
    Propagate.FLOAT: "",
    Propagate.QUANTIZED: " behind this release's own earlier blocks",
    Propagate.TWO_PASS: " behind blocks that were quantized on the source's inputs at first",
    Propagate.TRUE_SEQUENTIAL: " behind all linears that this release has quantized before",
}


def describe_schedule(variant: VariantSpec) -> str:
    """Return behind what a variant's linears read the inputs that statistics are of, to follow a noun; nothing for
    those of the source."""
    return _SCHEDULES[variant.propagate]


def describe_shrinkage(facts: ReleaseFacts) -> str:
    """Return for example ``0.04 to 0.41, median 0.15``: the share of the correlations between inputs that was taken off
    the linears' statistics; nothing where none was."""
    shares = [module.shrinkage for module in quantized_modules(facts)]
    lowest, highest = min(shares, default=0.0), max(shares, default=0.0)
    if not highest:
        return ""
    if lowest == highest:
        return f"{lowest:.2g}"
    return f"{lowest:.2g} to {highest:.2g}, median {median(shares):.2g}"


def describe_scheme(variant: VariantSpec, modules: Iterable[ModuleFacts]) -> str:
    """Return for example ``4-bit GPTQ, symmetric, groups of 128``: what the linears have, and what was asked for where
    none has it. Of several widths the average is said too, and what becomes of inputs where these are rounded."""
    modules = tuple(modules)
    sizes = sorted({module.group_size for module in modules if module.bits < UNQUANTIZED_BITS}, reverse=True)
    group = f"groups of {' and '.join(map(str, sizes or [variant.group_size]))}"
    if variant.group_size == PER_CHANNEL:
        group = "one scale per row"
    elif sizes and variant.group_size not in sizes:
        group += f" ({variant.group_size} asked)"
    symmetry = "symmetric" if variant.symmetric else "asymmetric"
    widths = weights_by_width(modules) or {variant.bits: 1}
    *others, last = map(str, widths)
    bits = f"{', '.join(f'{width}-' for width in others)}{' and ' if others else ''}{last}-bit"
    if others:
        bits += f" ({average_width(widths):.2f} on average)"
    refined = " and refinement" if variant.refinement else ""
    method, inputs = f"{_METHOD_NAMES[variant.method]}{refined}", _INPUTS[variant.activations]
    return f"{bits}{_TYPE_NAMES[variant.type]} {method}, {symmetry}, {group}{inputs}"


def width_rows(facts: ReleaseFacts) -> tuple[WidthRow, ...]:
    """Return which blocks hold which linears at which width, in the order of the facts; nothing where all have one.
    Linears that have the same widths in the same blocks, as those have that engines load as one, share rows."""
    blocks: dict[str, dict[int, set[int]]] = {}
    for module in quantized_modules(facts):
        blocks.setdefault(kind_of(module.name), {}).setdefault(module.bits, set()).add(module.block)
    if len({bits for own in blocks.values() for bits in own}) < 2:
        return ()
    alike: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for kind, own in blocks.items():
        alike.setdefault(tuple((bits, _ranges(sorted(own[bits]))) for bits in sorted(own)), []).append(kind)
    return tuple(WidthRow(tuple(kinds), bits, ranges) for rows, kinds in alike.items() for bits, ranges in rows)


def _ranges(numbers: Sequence[int]) -> str:
    """Return for example ``0-3, 7`` for ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def predicted_kl(facts: ReleaseFacts) -> float | None:
    """Return the sum of what each linear's error alone is predicted to add to the divergence; None where nobody
    measured it."""
    values = [module.predicted_kl for module in facts.modules if module.predicted_kl is not None]
    return sum(values) if values else None


def size_ratio(facts: ReleaseFacts) -> float:
    """Return how many times smaller the release's weights are than the source's."""
    return facts.source.size_bytes / facts.size_bytes


def bits_per_parameter(facts: ReleaseFacts) -> float:
    """Return the bits that the release stores per parameter of the source, everything included."""
    return 8 * facts.size_bytes / facts.source.num_parameters


def bits_per_quantized_weight(facts: ReleaseFacts) -> float | None:
    """Return the mean bits that a quantized weight costs with its share of scales and zero points; None without any.

    A group stores a 16-bit scale, and a zero point as wide as a code unless the format leaves out symmetric ones.
    """
    stores_zero = not facts.variant.symmetric or facts.variant.format in (Format.GPTQ, Format.GPTQ_V2)
    total_bits, total_weights = 0.0, 0
    for module in quantized_modules(facts):
        group_bits = _SCALE_BITS + (module.bits if stores_zero else 0)
        weights = module.out_features * module.in_features
        total_bits += weights * (module.bits + group_bits / channels_per_group(module))
        total_weights += weights
    return total_bits / total_weights if total_weights else None


def channels_per_group(module: ModuleFacts) -> int:
    """Return how many input channels share a scale: the group size, or all where there is one scale per row."""
    return module.in_features if module.group_size == PER_CHANNEL else module.group_size


def group_word(module: ModuleFacts) -> str:
    """Return the group size as a word: a number, ``row`` for one scale per row, ``-`` where nothing was quantized."""
    if module.bits >= UNQUANTIZED_BITS:
        return "-"
    return "row" if module.group_size in (PER_CHANNEL, module.in_features) else str(module.group_size)


def quantized_share(facts: ReleaseFacts) -> float:
    """Return the share of the source's parameters that are quantized, between 0 and 1."""
    weights = sum(module.out_features * module.in_features for module in quantized_modules(facts))
    return weights / facts.source.num_parameters


def perplexity_ratio(facts: ReleaseFacts) -> float:
    """Return the release's perplexity over the source's on the same held-out text."""
    return facts.quality.perplexity / facts.quality.source_perplexity


def list_degradations(facts: ReleaseFacts) -> tuple[tuple[str, str], ...]:
    """Return (module, what was done otherwise than asked) for every degradation."""
    return tuple((module.name, text) for module in facts.modules for text in module.degradations)


def judge(facts: ReleaseFacts) -> tuple[Judged, ...]:
    """Return the four figures that budgets exist for. A figure that is not a number keeps no budget."""
    budgets = facts.verdict.budgets
    worst = worst_modules(facts, 1)
    error = worst[0].relative_error if worst else 0.0
    num_degradations = len(list_degradations(facts))
    return (
        _judge("largest relative error of a module", error, budgets.max_relative_error),
        _judge("KL divergence (nats per token)", facts.quality.kl, budgets.max_kl),
        _judge("perplexity, times the source's", perplexity_ratio(facts), budgets.max_perplexity_ratio),
        _judge("degradations", num_degradations, budgets.max_degradations),
    )


def _judge(name: str, value: float, budget: float | None) -> Judged:
    if budget is None:
        return Judged(name, f"{value:.4g}", "not judged", None)
    return Judged(name, f"{value:.4g}", f"{budget:.4g}", value <= budget)


def fold_names(entries: Iterable[tuple[str, str]]) -> tuple[Folded, ...]:
    """Return (name, text) entries with names that differ in numbers only, and share the text, made one.

    The order is that of the first name of each.
    """
    entries = tuple(entries)
    pattern = {name: re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name, _ in entries}
    counts = Counter((pattern[name], text) for name, text in entries)
    folded: dict[tuple[str, str], Folded] = {}
    for name, text in entries:
        key = (pattern[name], text)
        shown = pattern[name] if counts[key] > 1 else name
        folded.setdefault(key, Folded(shown, counts[key], text))
    return tuple(folded.values())


def list_exceptions(facts: ReleaseFacts) -> tuple[Folded, ...]:
    """Return the linears that differ from the variant's scheme, with how and why."""
    return fold_names((module.name, _exception(module)) for module in facts.modules if module.note)


def _exception(module: ModuleFacts) -> str:
    if module.bits >= UNQUANTIZED_BITS:
        return module.note
    group = "one scale per row" if module.group_size == PER_CHANNEL else f"groups of {module.group_size}"
    return f"{module.bits} bit, {group}: {module.note}"
