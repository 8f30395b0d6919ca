"""One quantized form of a source: what is asked for, and the short names that mean it.

``gptq-w4-g128`` is one way to write a ``VariantSpec``; a mapping in a spec file is the other.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.errors import SpecError
from pipeline.fingerprint import fingerprint
from pipeline.strict import Strict, problems, regular_expression

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
    Format.GPTQ: (2, 3, 4, 8),
    Format.AWQ: (4,),
    Format.COMPRESSED_TENSORS: (2, 3, 4, 5, 6, 8),
}
"""The bit widths that each format can hold here."""


class GroupFallback(StrEnum):
    """What to do with a matrix whose in_features the group size does not divide."""

    DIVISOR = "divisor"
    SKIP = "skip"
    REFUSE = "refuse"


EXPRESSION_MARK = "re:"
"""What a regular expression in ``ignore`` starts with."""


def _pattern(text: str) -> str:
    if text.startswith(EXPRESSION_MARK):
        regular_expression(text.removeprefix(EXPRESSION_MARK))
    return text


class VariantSpec(Strict):
    """One quantized form of the source."""

    name: str = ""
    """Name of the variant in paths and on the card; made from the other fields when empty: the short name, and a digest
    of what that does not say."""
    method: Method
    """How codes are found: `rtn`, `gptq` or `awq`."""
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    """Width of a code; format `awq` holds 4 bits only, and `gptq` no 5 and 6."""
    group_size: int = 128
    """Consecutive input channels that share one scale; -1 means one scale per output channel."""
    symmetric: bool = True
    """Symmetric grids have no zero point; asymmetric ones store one per group."""
    format: Format = Format.COMPRESSED_TENSORS
    """Checkpoint format: `gptq`, `awq` or `compressed-tensors`."""
    ignore: tuple[Annotated[str, AfterValidator(_pattern)], ...] = ()
    """Linears left unquantized: checkpoint names, or regular expressions after `re:`; one that names no linear is an
    error. The output head is never quantized."""
    group_fallback: GroupFallback = GroupFallback.DIVISOR
    """For in_features that the group size does not divide: `divisor` takes the largest of 128, 64, 32 that does
    (compressed-tensors for each matrix, the other formats for the whole file) and leaves unquantized what none divides;
    `skip` leaves the matrix unquantized, `refuse` is an error."""
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
            others = ", ".join(other for other, held in FORMAT_BITS.items() if self.bits in held)
            raise ValueError(f"format {self.format} holds {legal} bits, not {self.bits} (formats that do: {others})")
        if self.group_size != PER_CHANNEL and (self.group_size < 16 or self.group_size % 8):
            raise ValueError(
                f"group_size {self.group_size} is neither -1 (per channel) nor a multiple of 8 of at least 16"
            )
        if self.format is Format.AWQ and self.symmetric:
            raise ValueError("format awq stores zero points: symmetric must be false")
        if self.format is Format.GPTQ and not self.symmetric:
            raise ValueError("format gptq holds symmetric grids only: a zero point of 0 cannot be stored in its layout")
        if not self.name:
            object.__setattr__(self, "name", self._own_name())
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name {self.name!r} must be letters, digits, '.', '_' and '-'")
        return self

    def _own_name(self) -> str:
        """Return the short name, with a digest of what it does not say, if anything: another variant must not be
        published under the name of the plain one."""
        unsaid = ("ignore", "group_fallback", "damping", "act_order", "clip_search")
        rest = {key: getattr(self, key) for key in unsaid if getattr(self, key) != type(self).model_fields[key].default}
        return f"{self.short_name()}-x{fingerprint(rest)[:6]}" if rest else self.short_name()

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
        return any(is_named_by(pattern, linear_name) for pattern in self.ignore)


def is_named_by(pattern: str, linear_name: str) -> bool:
    """Return whether an entry of ``ignore`` names this linear."""
    if pattern.startswith(EXPRESSION_MARK):
        return re.search(pattern.removeprefix(EXPRESSION_MARK), linear_name) is not None
    return pattern == linear_name


_OWN_FORMATS = {Method.GPTQ: (Format.GPTQ,), Method.AWQ: (Format.AWQ,), Method.RTN: ()}

_VARIANT_NAME = re.compile(
    r"(?P<method>rtn|gptq|awq)-w(?P<bits>\d+)-(?P<group>g\d+|channel)"
    r"(?:-(?P<format>gptq|awq|ct))?(?:-(?P<symmetry>sym|asym))?"
)


def _default_format(method: Method, bits: int) -> Format:
    """Return the format that a short name means when it does not say: that of 2 and 3 bits which most loaders compute
    with as they are, else the first of the method's own that holds the bits, else the one that holds all."""
    preferred = _OWN_FORMATS[method] if bits > 3 else (Format.GPTQ,)
    return next((format_ for format_ in preferred if bits in FORMAT_BITS[format_]), Format.COMPRESSED_TENSORS)


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
    hint = (
        "try gptq-w4-g128, gptq-w3-g64, awq-w4-g128, rtn-w8-g128, gptq-w4-g64-ct; or describe it in a file with --spec"
    )
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
        reason = "; ".join(problems(error, VariantSpec))
        raise SpecError(f"variant {name!r}: {reason}", code="spec.variant", hint=hint) from error
