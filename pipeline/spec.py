"""What to make: the conversion spec, its variants, its calibration, its gates.

A spec is closed (unknown keys are refused), frozen and complete: together with the source's digests it determines
every byte of the releases. Short variant names (``gptq-w4-g128``) are one way to write a ``VariantSpec``; a YAML file
is the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import SpecError

PER_CHANNEL = -1
"""The group size that means one scale for a whole row."""

ENGINE_GROUP_SIZES = (128, 64, 32)
"""Group sizes that the common GPU kernels accept, in the order in which a fallback tries them."""


class Method(StrEnum):
    """How codes are found."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"


class Format(StrEnum):
    """How codes are stored."""

    GPTQ = "gptq"
    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"


FORMAT_BITS: dict[Format, tuple[int, ...]] = {
    Format.GPTQ: (4, 8),
    Format.AWQ: (4,),
    Format.COMPRESSED_TENSORS: (4, 8),
}
"""The bit widths that each format can hold here."""


class GroupFallback(StrEnum):
    """What to do with a matrix whose in_features the group size does not divide."""

    DIVISOR = "divisor"
    SKIP = "skip"
    REFUSE = "refuse"


class Strict(BaseModel):
    """Base of every spec: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True)


class VariantSpec(Strict):
    """One quantized form of the source."""

    name: str = ""
    """Name of the variant in paths and on the card; made from the other fields when empty."""
    method: Method
    """How codes are found: `rtn`, `gptq` or `awq`."""
    bits: Literal[4, 8] = 4
    """Width of a code."""
    group_size: int = 128
    """Consecutive input channels that share one scale; -1 means one scale per output channel."""
    symmetric: bool = True
    """Symmetric grids have no zero point; asymmetric ones store one per group."""
    format: Format = Format.COMPRESSED_TENSORS
    """Checkpoint format: `gptq`, `awq` or `compressed-tensors`."""
    ignore: tuple[str, ...] = ()
    """Linears left in 16 bit: names, or regular expressions after `re:`. The output head is never quantized."""
    group_fallback: GroupFallback = GroupFallback.DIVISOR
    """For in_features that the group size does not divide: `divisor` takes the largest of 128, 64, 32 that does (and
    16 bit where none does), `skip` leaves the matrix in 16 bit, `refuse` is an error."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """GPTQ: first rung of the damping ladder, as a fraction of the mean diagonal of the second moment."""
    act_order: bool = True
    """GPTQ: solve columns in falling order of their second moment (groups stay static: no `desc_act` needed)."""
    clip_search: bool = True
    """Search each group's range for the least output error (AWQ: with the group's second moment; others: diagonal)."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_name(cls, value: Any) -> Any:
        return parse_variant(value).model_dump() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> VariantSpec:
        if self.bits not in FORMAT_BITS[self.format]:
            legal = ", ".join(map(str, FORMAT_BITS[self.format]))
            raise ValueError(f"format {self.format} holds {legal} bits, not {self.bits}")
        if self.group_size != PER_CHANNEL and (self.group_size < 16 or self.group_size % 8):
            raise ValueError(
                f"group_size {self.group_size} is neither -1 (per channel) nor a multiple of 8 of at least 16"
            )
        if self.format is Format.AWQ and self.symmetric:
            raise ValueError("format awq stores zero points: symmetric must be false")
        if self.format is Format.GPTQ and not self.symmetric:
            raise ValueError("format gptq holds symmetric grids only: a zero point of 0 cannot be stored in its layout")
        if not self.name:
            object.__setattr__(self, "name", self.short_name())
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name {self.name!r} must be letters, digits, '.', '_' and '-'")
        return self

    def short_name(self) -> str:
        """Return the shortest name that ``parse_variant`` reads back as these method, bits, group, symmetry, format."""
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        parts = [self.method.value, f"w{self.bits}", group]
        if self.format is not _default_format(self.method, self.bits):
            parts.append("ct" if self.format is Format.COMPRESSED_TENSORS else self.format.value)
        if self.symmetric != _default_symmetry(self.method, self.format):
            parts.append("sym" if self.symmetric else "asym")
        return "-".join(parts)

    def ignores(self, linear_name: str) -> bool:
        """Return whether ``ignore`` names this linear."""
        return any(
            re.search(pattern[3:], linear_name) is not None if pattern.startswith("re:") else pattern == linear_name
            for pattern in self.ignore
        )


_VARIANT_NAME = re.compile(
    r"(?P<method>rtn|gptq|awq)-w(?P<bits>\d+)-(?P<group>g\d+|channel)"
    r"(?:-(?P<format>gptq|awq|ct))?(?:-(?P<symmetry>sym|asym))?"
)


def _default_format(method: Method, bits: int) -> Format:
    """Return the format that a short name means when it does not say."""
    match method:
        case Method.GPTQ:
            return Format.GPTQ
        case Method.AWQ:
            return Format.AWQ if bits in FORMAT_BITS[Format.AWQ] else Format.COMPRESSED_TENSORS
        case Method.RTN:
            return Format.COMPRESSED_TENSORS


def _default_symmetry(method: Method, format_: Format) -> bool:
    """Return the symmetry that a short name means when it does not say: the only one of the format, else the one that
    the method is known for."""
    match format_:
        case Format.GPTQ:
            return True
        case Format.AWQ:
            return False
        case Format.COMPRESSED_TENSORS:
            return method is not Method.AWQ


def parse_variant(name: str) -> VariantSpec:
    """Return the variant that a short name means: ``method-wBITS-gGROUP|channel[-gptq|-awq|-ct][-sym|-asym]``.

    Raises:
        SpecError: when the name cannot be read or means a combination that no format holds.
    """
    hint = "try gptq-w4-g128, awq-w4-g128, rtn-w8-g128, gptq-w4-g64-ct; or describe it in a file with --spec"
    match = _VARIANT_NAME.fullmatch(name)
    if match is None:
        raise SpecError(f"variant {name!r} is not of the form method-wBITS-gGROUP", code="spec.variant", hint=hint)
    method, bits = Method(match["method"]), int(match["bits"])
    format_ = _default_format(method, bits)
    if match["format"]:
        format_ = Format.COMPRESSED_TENSORS if match["format"] == "ct" else Format(match["format"])
    symmetric = match["symmetry"] == "sym" if match["symmetry"] else _default_symmetry(method, format_)
    group = PER_CHANNEL if match["group"] == "channel" else int(match["group"][1:])
    try:
        return VariantSpec.model_validate(
            {"method": method, "bits": bits, "group_size": group, "symmetric": symmetric, "format": format_}
        )
    except ValidationError as error:
        reason = "; ".join(_problems(error))
        raise SpecError(f"variant {name!r}: {reason}", code="spec.variant", hint=hint) from error


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
    """Sequences in a token slice, the unit of work and of summation: part of the result, not of the machine."""


class PromptSpec(Strict):
    """A smoke prompt and what its continuation must look like."""

    prompt: str
    """Text that generation starts from."""
    expect: str = ""
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
    """Fallbacks inside solvers (for example a damping rung above the first) that are accepted; each is on the card."""
    heldout: str = "builtin"
    """Held-out text: `builtin`, a file, or a file of a dataset repository, as for calibration."""
    heldout_samples: Annotated[int, Field(ge=1)] = 16
    """Number of held-out sequences."""
    heldout_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a held-out sequence."""
    prompts: tuple[PromptSpec, ...] = (
        PromptSpec(prompt="The people of the United States"),
        PromptSpec(prompt="In the beginning of the year"),
        PromptSpec(prompt="It was a cold morning, and the ship"),
    )
    """Smoke prompts, continued greedily."""
    generated_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens to generate for each prompt."""


BUDGETS_BY_BITS: dict[int, dict[str, float]] = {
    4: {"max_relative_error": 0.35, "max_kl": 0.75, "max_perplexity_ratio": 1.75},
    8: {"max_relative_error": 0.05, "max_kl": 0.05, "max_perplexity_ratio": 1.10},
}
"""What `auto` means. Wide enough for small models, whose weights are harder to quantize; a job for a known model
should set its own."""


class ConversionSpec(Strict):
    """A whole conversion: one source, its variants, one calibration, the gates, the targets."""

    source: str
    """A local Hugging Face folder, or `org/name[@revision]` on the hub."""
    variants: Annotated[tuple[VariantSpec, ...], Field(min_length=1)]
    """What to make; each entry is a short name or a mapping."""
    calibration: CalibrationSpec = CalibrationSpec()
    """Tokens for the statistics."""
    gates: GateSpec = GateSpec()
    """Budgets and smoke prompts."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Directories or `s3://bucket/prefix` addresses that releases are published to."""
    release: str = ""
    """`namespace/name` prefix of the releases; made from the source when empty. The variant's name is appended."""

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
        lines = "\n  ".join(_problems(error))
        hint = "docs/reference/spec.md lists every key"
        raise SpecError(f"{where}:\n  {lines}", hint=hint) from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _problems(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            yield f"{where}: unknown key; legal here: {', '.join(_legal_keys(item['loc'][:-1]))}"
        elif item["type"] == "missing":
            yield f"{where}: missing"
        else:
            reason = item["msg"].removeprefix("Value error, ")
            # Of a whole mapping that contradicts itself, the reason names the keys.
            got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r:.80})"
            yield f"{where}: {reason}{got}" if where else f"{reason}{got}"


def _legal_keys(location: tuple[int | str, ...]) -> list[str]:
    named: dict[str, type[Strict]] = {
        "variants": VariantSpec,
        "calibration": CalibrationSpec,
        "gates": GateSpec,
        "prompts": PromptSpec,
    }
    owners = [named[part] for part in location if isinstance(part, str) and part in named]
    return sorted((owners[-1] if owners else ConversionSpec).model_fields)


class Budgets(Strict):
    """The budgets of one variant with ``auto`` resolved."""

    max_relative_error: float | None
    max_kl: float | None
    max_perplexity_ratio: float | None
    max_degradations: int | None


def resolve_budgets(gates: GateSpec, variant: VariantSpec) -> Budgets:
    """Return the budgets of a variant: the spec's own, or ``BUDGETS_BY_BITS`` where it says ``auto``."""
    auto = BUDGETS_BY_BITS[variant.bits]
    given = {key: getattr(gates, key) for key in auto}
    resolved = {key: auto[key] if value == "auto" else value for key, value in given.items()}
    return Budgets(max_degradations=gates.max_degradations, **resolved)
