"""What to make: the conversion spec, its calibration, its gates; its variants come from ``variants.py``.

A spec is closed (unknown keys are refused), frozen and complete: together with the source's digests it determines
every byte of the releases. All of its vocabulary can be imported from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.errors import SpecError
from pipeline.precision import Precision
from pipeline.strict import Strict, problems, regular_expression
from pipeline.variants import (
    ENGINE_GROUP_SIZES,
    FORMAT_BITS,
    PER_CHANNEL,
    Activations,
    Format,
    GroupFallback,
    Method,
    MixSpec,
    NumberType,
    Propagate,
    VariantSpec,
    parse_variant,
)

__all__ = [
    "BUDGETS_BY_BITS",
    "ENGINE_GROUP_SIZES",
    "FORMAT_BITS",
    "PER_CHANNEL",
    "Activations",
    "Budgets",
    "CalibrationSpec",
    "ClusterSpec",
    "ConversionSpec",
    "Engine",
    "ExpertStatistics",
    "Format",
    "GateSpec",
    "GroupFallback",
    "Method",
    "MixSpec",
    "NumberType",
    "PriceSpec",
    "PromptSpec",
    "Propagate",
    "Strict",
    "VariantSpec",
    "average_width",
    "build_spec",
    "load_spec",
    "parse_variant",
    "resolve_budgets",
]


class ExpertStatistics(StrEnum):
    """Which tokens the statistics of an expert's linears are of."""

    ALL = "all"
    """All tokens, whatever the router says."""
    ROUTED = "routed"
    """The tokens that the router sent to the expert, each counted once."""
    SHRINKAGE = "shrinkage"
    """Those of the routed tokens, drawn towards those of all tokens."""


class CalibrationSpec(Strict):
    """The tokens that statistics are collected on."""

    text: str = "builtin"
    """`builtin`, a text file (.txt, or .jsonl / .parquet with a `text` column), or a file of a dataset repository on
    the hub: `hub:org/name[@revision]:path`."""
    samples: Annotated[int, Field(ge=1)] = 128
    """Number of sequences."""
    length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a sequence."""
    seed: int = 0
    """Order in which the documents of a .jsonl or .parquet file are drawn; plain text is taken from its start."""
    slice_sequences: Annotated[int, Field(ge=1)] = 8
    """Sequences in a token slice, the unit of work and of summation: part of the result, not of the machine. There are
    two slices at least where there are two sequences."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """Share of the correlations between inputs that is put down to chance and taken off. `auto` finds it for each input
    from how much the halves of the text differ (Ledoit-Wolf); with a single sequence it is 0."""
    experts: ExpertStatistics = ExpertStatistics.ALL
    """Mixtures of experts, the tokens that an expert's statistics are of: `all`, `routed` (those that the router sent
    to it, each counted once), or `shrinkage` (the mean over its own plus `expert_shrinkage` times that over all)."""
    expert_shrinkage: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """For `shrinkage`: the weight of all tokens, that of an expert's own being 1."""
    min_expert_tokens: Annotated[int, Field(ge=1)] = 128
    """For `routed` and `shrinkage`: the linears of an expert that the router sent fewer tokens to count as degraded
    (see `gates.max_degradations`). With fewer tokens than a group has columns, not even these are told apart."""

    @property
    def sequences_in_slice(self) -> int:
        """Sequences in a token slice of this text: no more than leaves two slices."""
        return min(self.slice_sequences, -(-self.samples // 2))


class Engine(StrEnum):
    """What can be asked, unmodified and in an environment of its own, whether it computes what a release promises."""

    TRANSFORMERS = "transformers"


def _each_once(engines: tuple[Engine, ...]) -> tuple[Engine, ...]:
    if len(set(engines)) < len(engines):
        raise ValueError(f"an engine is named twice: {', '.join(engines)}")
    return engines


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a blank prompt leaves nothing to continue")
    return text


class PromptSpec(Strict):
    """A smoke prompt and what its continuation must look like."""

    prompt: Annotated[str, AfterValidator(_not_blank)]
    """Text that generation starts from."""
    expect: Annotated[str, AfterValidator(regular_expression)] = ""
    """A regular expression that the continuation must match somewhere; empty accepts any text not degenerate."""


class GateSpec(Strict):
    """The budgets that a variant must keep to be published. A budget of null means: reported, not judged."""

    max_relative_error: float | Literal["auto"] | None = "auto"
    """Per module, sqrt of tr(dW H dW^T) / tr(W H W^T); `auto` depends on the bits."""
    max_kl: float | Literal["auto"] | None = "auto"
    """Mean KL divergence (nats per token) from the source's next-token distribution on held-out text."""
    max_perplexity_ratio: float | Literal["auto"] | None = "auto"
    """Perplexity on held-out text over the source's."""
    max_degradations: Annotated[int, Field(ge=0)] | None = 0
    """Fallbacks inside solvers that are accepted, each on the card: a linear whose damping had to be raised, a linear
    with groups whose scale is too small or too large to be stored."""
    heldout: str = "builtin"
    """Held-out text: `builtin`, a file, or a file of a dataset repository, as for calibration."""
    heldout_samples: Annotated[int, Field(ge=1)] = 16
    """Number of held-out sequences."""
    heldout_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a held-out sequence."""
    prompts: Annotated[tuple[PromptSpec, ...], Field(min_length=1)] = (
        PromptSpec(prompt="The people of the United States"),
        PromptSpec(prompt="In the beginning of the year"),
        PromptSpec(prompt="It was a cold morning, and the ship"),
    )
    """Smoke prompts, continued greedily."""
    generated_tokens: Annotated[int, Field(ge=8)] = 32
    """Tokens to generate for each prompt; with fewer than 8, degenerate text could not be told from other text."""
    engines: Annotated[tuple[Engine, ...], AfterValidator(_each_once)] = ()
    """Engines (`transformers`) without which nothing is published: each loads the variant's files, unmodified and in an
    environment of its own, which is installed on first use (gigabytes), on the machine that the command runs on. It
    continues the smoke prompts, and its tokens and logits are compared with the reference's. A variant of which it is
    known that an engine does not load it is refused beforehand."""


BUDGETS_BY_BITS: dict[int, dict[str, float]] = {
    2: {"max_relative_error": 0.5, "max_kl": 1.25, "max_perplexity_ratio": 2.5},
    3: {"max_relative_error": 0.5, "max_kl": 1.25, "max_perplexity_ratio": 2.5},
    4: {"max_relative_error": 0.35, "max_kl": 0.75, "max_perplexity_ratio": 1.75},
    5: {"max_relative_error": 0.2, "max_kl": 0.25, "max_perplexity_ratio": 1.3},
    6: {"max_relative_error": 0.1, "max_kl": 0.1, "max_perplexity_ratio": 1.15},
    8: {"max_relative_error": 0.05, "max_kl": 0.05, "max_perplexity_ratio": 1.10},
}
"""What `auto` means. Wide enough for small models, whose weights are harder to quantize; a job for a known model
should set its own.

At 3 bits the 135 M parameter SmolLM2 stays below relative error 0.27, KL 0.89 and perplexity ratio 2.2 with every
method (groups of 64, WikiText-2, CPU, 2026-11-25: docs/benchmarks.md). Those of 2 bits are the same, since what goes
beyond is of no use at any width: plain 2-bit rounding of such small models does (KL 13), and is not published."""


Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PriceSpec(Strict):
    """What things cost, in any one currency."""

    gpu_hour: Price | None = None
    """One GPU, with its share of the machine, for an hour."""
    cpu_hour: Price | None = None
    """One processor for an hour, where workers have no GPU."""
    weights_gb: Price = 0.0
    """A gigabyte of the source's weights taken in from where it is."""
    read_gb: Price = 0.0
    """A gigabyte read from the work store."""
    written_gb: Price = 0.0
    """A gigabyte written to the work store."""
    network_gb: Price = 0.0
    """A gigabyte between two machines."""


class ClusterSpec(Strict):
    """What is known of the workers; it affects plans only, no byte of a release."""

    prices: PriceSpec = PriceSpec()
    """The price table: `bitmill plan --simulate` says what a conversion would cost."""


class ConversionSpec(Strict):
    """A whole conversion: one source, its variants, one calibration, the gates, the targets."""

    source: str
    """A local Hugging Face folder, `org/name[@revision]` on the hub, or `s3://bucket/prefix`."""
    variants: Annotated[tuple[VariantSpec, ...], Field(min_length=1)]
    """What to make; each entry is a short name or a mapping."""
    calibration: CalibrationSpec = CalibrationSpec()
    """Tokens for the statistics."""
    gates: GateSpec = GateSpec()
    """Budgets and smoke prompts."""
    cluster: ClusterSpec = ClusterSpec()
    """Prices, for plans."""
    precision: Precision = Precision.BFLOAT16
    """What factors of matrix products in decoder blocks are rounded to while calibration and held-out text pass:
    `bfloat16`, as engines compute and processors multiply fastest, or `float32`. Sums, norms, hidden states between
    blocks and the smoke prompts are float32 either way, and so is the output head but on CPUs with AMX."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Directories or `s3://bucket/prefix` addresses that releases are published to."""
    release: str = ""
    """`namespace/name` prefix of the releases; made from the source when empty. The variant's name is appended."""

    @model_validator(mode="after")
    def _comparable_experts(self) -> ConversionSpec:
        compared = [variant.name for variant in self.variants if variant.is_compensated]
        if compared and self.calibration.experts is not ExpertStatistics.ALL:
            raise ValueError(
                f"{compared[0]} compares what linears read with what they read in the source, so every expert has to "
                f"see all tokens: set calibration.experts to all (not {self.calibration.experts}), or the variant's "
                "compensation to 0"
            )
        return self

    @model_validator(mode="after")
    def _distinct_variants(self) -> ConversionSpec:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two variants are called {', '.join(twice)}")
        return self


def load_spec(path: Path, overrides: dict[str, Any]) -> ConversionSpec:
    """Return the spec in a YAML file, with top-level and nested ``overrides`` (from flags) laid over it.

    Raises:
        SpecError: naming the file, the key and the legal keys or values.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"spec {path}: {error.strerror}", hint="check the path given to --spec") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"spec {path} is not YAML: {error}", hint="see docs/reference/spec.md") from error
    if not isinstance(data, dict):
        raise SpecError(f"spec {path} is not a mapping of keys", hint="see docs/reference/spec.md")
    return build_spec(_merge(data, overrides), where=f"spec {path}")


def build_spec(data: dict[str, Any], where: str) -> ConversionSpec:
    """Return the validated spec.

    Raises:
        SpecError: with one line for every problem, each naming its key; ``where`` names the file or flags.
    """
    try:
        return ConversionSpec.model_validate(data)
    except ValidationError as error:
        lines = "\n  ".join(problems(error, ConversionSpec))
        hint = "docs/reference/spec.md lists every key"
        raise SpecError(f"{where}:\n  {lines}", hint=hint) from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


class Budgets(Strict):
    """The budgets of one variant with ``auto`` resolved."""

    max_relative_error: float | None
    max_kl: float | None
    max_perplexity_ratio: float | None
    max_degradations: int | None


def average_width(weights: Mapping[int, int]) -> float:
    """Return the mean width of codes, from the number of weights by width."""
    return sum(bits * number for bits, number in weights.items()) / sum(weights.values())


def resolve_budgets(gates: GateSpec, variant: VariantSpec, widths: Mapping[int, int] | None = None) -> Budgets:
    """Return the budgets of a variant: the spec's own, or ``BUDGETS_BY_BITS`` where it says ``auto``.

    Args:
        gates: The spec's.
        variant: The variant.
        widths: Number of its weights by width. Where there are several widths, a linear's error is held to the budget
            of the least one, and the whole model to that of their average, rounded down.
    """
    widths = widths or {variant.bits: 1}
    auto = BUDGETS_BY_BITS[max(bits for bits in BUDGETS_BY_BITS if bits <= average_width(widths))]
    auto = auto | {"max_relative_error": BUDGETS_BY_BITS[min(widths)]["max_relative_error"]}
    given = {key: getattr(gates, key) for key in auto}
    resolved = {key: auto[key] if value == "auto" else value for key, value in given.items()}
    return Budgets(max_degradations=gates.max_degradations, **resolved)
