"""One quantized form of a source: what is asked for, and the short names that mean it.

``gptq-w4-g128`` is one way to write a ``VariantSpec``; a mapping in a spec file is the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.errors import SpecError
from pipeline.fingerprint import fingerprint
from pipeline.strict import Strict, problems, regular_expression
from pipeline.units import parse_bytes

PER_CHANNEL = -1
"""The group size that means one scale for a whole row."""

ENGINE_GROUP_SIZES = (128, 64, 32)
"""Group sizes that the common GPU kernels accept, in the order in which a fallback tries them."""


class Method(StrEnum):
    """How codes are found."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"
    AWQ_GPTQ = "awq-gptq"
    SMOOTHQUANT = "smoothquant"
    SMOOTHQUANT_GPTQ = "smoothquant-gptq"

    @property
    def is_smooth(self) -> bool:
        """Whether scales are searched that make inputs easier to round, at the price of weights."""
        return self in (Method.SMOOTHQUANT, Method.SMOOTHQUANT_GPTQ)

    @property
    def has_scales(self) -> bool:
        """Whether scales of input channels are searched first."""
        return self.is_smooth or self in (Method.AWQ, Method.AWQ_GPTQ)

    @property
    def codes(self) -> Method:
        """How codes are found once weights are scaled: ``gptq`` feeds errors back, ``rtn`` and ``awq`` round to nearest
        on grids of their own."""
        match self:
            case Method.AWQ_GPTQ | Method.SMOOTHQUANT_GPTQ:
                return Method.GPTQ
            case Method.SMOOTHQUANT:
                return Method.RTN
            case Method.RTN | Method.GPTQ | Method.AWQ:
                return self


class NumberType(StrEnum):
    """What codes are."""

    INT = "int"
    """Whole numbers."""
    FLOAT = "float"
    """Floating-point numbers of 8 bits (E4M3)."""


class Activations(StrEnum):
    """How engines round the inputs of quantized linears."""

    NONE = "none"
    """Not at all: they compute in 16 bit with what codes stand for."""
    DYNAMIC = "dynamic"
    """To codes of the weights' type and width, with a scale for each token that its largest input sets."""


class Propagate(StrEnum):
    """Of which inputs the statistics of a linear are."""

    FLOAT = "float"
    """Those that it has in the source."""
    QUANTIZED = "quantized"
    """Those that it has behind the blocks that are quantized already."""
    TWO_PASS = "two-pass"
    """Those that it has behind blocks that were quantized on the source's, all of them at first."""
    TRUE_SEQUENTIAL = "true-sequential"
    """Those that it has behind all that is quantized already: earlier blocks, and earlier linears of its own block."""


class Format(StrEnum):
    """How codes are stored."""

    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"


FORMAT_BITS: dict[Format, tuple[int, ...]] = {
    Format.GPTQ: (2, 3, 4, 8),
    Format.GPTQ_V2: (2, 3, 4, 8),
    Format.AWQ: (4,),
    Format.COMPRESSED_TENSORS: (2, 3, 4, 5, 6, 8),
}
"""The bit widths that each format can hold here."""


class GroupFallback(StrEnum):
    """What to do with a matrix whose in_features the group size does not divide."""

    DIVISOR = "divisor"
    SKIP = "skip"
    REFUSE = "refuse"


COMPENSATION = {Propagate.QUANTIZED: 0.3, Propagate.TWO_PASS: 0.0, Propagate.TRUE_SEQUENTIAL: 0.3}
"""What ``compensation: auto`` means (docs/benchmarks.md)."""

SCHEDULE_SUFFIXES = {Propagate.QUANTIZED: "seq", Propagate.TWO_PASS: "twopass", Propagate.TRUE_SEQUENTIAL: "trueseq"}
"""What a short name ends with for statistics that are not of the source's inputs."""

PRESETS: dict[str, dict[str, Any]] = {
    "w8a8-int8": {"method": Method.SMOOTHQUANT_GPTQ, "type": NumberType.INT, "activations": Activations.DYNAMIC},
    "fp8-dynamic": {"method": Method.RTN, "type": NumberType.FLOAT, "activations": Activations.DYNAMIC},
}
"""Variants that have a name of their own, as engines' users know them."""

ROUNDED_INPUTS = {NumberType.INT: "w8a8", NumberType.FLOAT: "fp8"}
"""What a short name says, after the method, of variants whose inputs are rounded."""

EXPRESSION_MARK = "re:"
"""What a regular expression in ``ignore`` starts with."""


def _pattern(text: str) -> str:
    if text.startswith(EXPRESSION_MARK):
        regular_expression(text.removeprefix(EXPRESSION_MARK))
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]
"""Names linears: a checkpoint name, or a regular expression after ``re:``, which is searched for in names."""

Bits = Literal[2, 3, 4, 5, 6, 8]
"""Widths of codes that some format holds."""


def _size(text: str) -> str:
    try:
        if text:
            parse_bytes(text)
    except SpecError as error:
        raise ValueError(f"{error.message}: {error.hint}") from error
    return text


class MixSpec(Strict):
    """Mixed precision: each linear gets the width that serves the whole best within one budget.

    Exactly one of `average_bits`, `weights` and `memory` is given. What is bought with the bits is measured: the output
    error of every linear at every width, times how much the model's predictions change with that linear's outputs.
    Linears that engines load as one get one width.
    """

    average_bits: Annotated[float, Field(ge=2, le=8)] | None = None
    """Most bits of a code, on average over all quantized weights. Scales and zero points come on top, as they do
    with one width for all."""
    weights: Annotated[str, AfterValidator(_size)] = ""
    """Most bytes of all weight files together, for example `4.5GB`; what is left unquantized counts."""
    memory: Annotated[str, AfterValidator(_size)] = ""
    """Memory of the device that the release has to fit, for example `24GiB`: weights, the KV cache of one sequence
    of `context` tokens, and 1.5 GB for the engine."""
    context: Annotated[int, Field(ge=1)] = 8192
    """With `memory`: tokens that the KV cache has room for; no more than the model's own limit."""
    choices: tuple[Bits, ...] = ()
    """Widths to choose from; made from the others when empty: of those that the format holds the two next to the
    average from below and the two from above, or for `weights` and `memory` all. 2 bits are among them only for an
    average below 3, as what they damage is more than can be predicted."""
    samples: Annotated[int, Field(ge=1)] = 8
    """Calibration sequences that it is measured on how much predictions change."""

    @model_validator(mode="after")
    def _one_budget(self) -> MixSpec:
        given = [key for key in ("average_bits", "weights", "memory") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"give one of average_bits, weights and memory, not {' and '.join(given) or 'none'}")
        return self


class VariantSpec(Strict):
    """One quantized form of the source."""

    name: str = ""
    """Name of the variant in paths and on the card; made from the other fields when empty: the short name, and a digest
    of what that does not say."""
    method: Method
    """How codes are found: `rtn`, `gptq`, `awq`, or `awq-gptq`, which finds GPTQ's codes after AWQ's scales. Where
    inputs are rounded too, `smoothquant` and `smoothquant-gptq` search scales that make inputs easier to round."""
    bits: Bits = 4
    """Width of a code; format `awq` holds 4 bits only, and `gptq` no 5 and 6. With `mix` it is of no effect. Where
    inputs are rounded it is 8."""
    type: NumberType = NumberType.INT
    """What codes are: `int`, or `float`, numbers of 8 bits (E4M3), which is for method `rtn` and rounded inputs."""
    activations: Activations = Activations.NONE
    """How engines round the inputs of quantized linears: `none`, or `dynamic`, to 8 bits of the weights' type with a
    scale for each token. Weights then have one scale per output channel, are symmetric, and stored as
    compressed-tensors; the statistics are those of `propagate: float`. KL divergence, perplexity and the smoke prompts
    are measured with rounded inputs; errors of single linears are of their weights alone."""
    group_size: int = 128
    """Consecutive input channels that share one scale; -1 means one scale per output channel, which it is where inputs
    are rounded."""
    symmetric: bool = True
    """Symmetric grids have no zero point; asymmetric ones store one per group."""
    format: Format = Format.COMPRESSED_TENSORS
    """Checkpoint format: `gptq`, `gptq_v2` (the same layout with true zero points, which asymmetric grids need), `awq`
    or `compressed-tensors`."""
    widths: dict[Pattern, Bits] = Field(default_factory=dict)
    """Bits of linears that get others than `bits`: by checkpoint name, or regular expression after `re:`; the first
    that names a linear counts, and one that names none is an error. Not with `mix`."""
    mix: MixSpec | None = None
    """Mixed precision under a budget instead of one width."""
    ignore: tuple[Pattern, ...] = ()
    """Linears left unquantized: checkpoint names, or regular expressions after `re:`; one that names no linear is an
    error. The output head is never quantized."""
    group_fallback: GroupFallback = GroupFallback.DIVISOR
    """For in_features that the group size does not divide: `divisor` takes the largest of 128, 64, 32 that does
    (compressed-tensors for each matrix, the other formats for the whole file) and leaves unquantized what none divides;
    `skip` leaves the matrix unquantized, `refuse` is an error."""
    propagate: Propagate = Propagate.FLOAT
    """Inputs that statistics are of: `float`, those of the source, so that all blocks are solved side by side and all
    variants share them; `quantized`, those behind the variant's own blocks, one block after the other, at the price of
    three passes over the calibration text for each such variant (two without `compensation`); `two-pass`: all blocks
    are solved as with `float`, text passes them, and all are solved again on what they read then, side by side; or
    `true-sequential`: as `quantized`, and inside a block linears are solved in the order in which they are called too,
    each behind those before it, at the price of two more passes for each input but a block's first (one without
    `compensation`). What either gives was not measured against the other. Methods
    with activation-aware scales cannot have that: scales change linears that were called, hence solved, before."""
    compensation: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """Where `propagate` is not `float`: how far weights go, before they are quantized, towards those that
    give the source's outputs on the inputs behind quantized blocks. 0 is not at all; 1 fits the calibration text and
    fails on others. `auto` is 0.3, but 0 with `two-pass`, where it does harm."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """GPTQ: first rung of the damping ladder, as a fraction of the mean diagonal of the second moment."""
    act_order: bool = True
    """GPTQ: solve columns in falling order of their second moment (groups stay static: no `desc_act` needed)."""
    refinement: Annotated[int, Field(ge=0, le=20)] = 0
    """Most rounds in which what the method found is made better: each group's scale and zero point are fitted again to
    its codes, and codes changed one after another, as long as the output error falls by a thousandth a round. A round
    takes as long as GPTQ, or longer (docs/benchmarks.md)."""
    clip_search: bool = True
    """Search each group's range for the least output error (AWQ: with the group's second moment; others: diagonal)."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_variant(value).model_dump()
        if isinstance(value, dict) and value.get("activations", Activations.NONE) != Activations.NONE:
            return {"bits": 8, "group_size": PER_CHANNEL, **value}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> VariantSpec:
        for bits in (self.bits, *self.widths.values(), *(self.mix.choices if self.mix else ())):
            if bits not in FORMAT_BITS[self.format]:
                legal = ", ".join(map(str, FORMAT_BITS[self.format]))
                others = ", ".join(other for other, held in FORMAT_BITS.items() if bits in held)
                raise ValueError(f"format {self.format} holds {legal} bits, not {bits} (formats that do: {others})")
        if (self.mix or self.widths) and self.format is Format.AWQ:
            raise ValueError("format awq has one width for all linears: choose compressed-tensors or gptq")
        if self.mix and len(self.choices) < 2:
            held = " and ".join(map(str, self.choices)) or "no width"
            raise ValueError(f"mix has nothing to choose from: format {self.format} holds {held} of what it may take")
        if self.mix and self.widths:
            raise ValueError("mix chooses every width itself: leave out widths, or mix")
        if self.group_size != PER_CHANNEL and (self.group_size < 16 or self.group_size % 8):
            raise ValueError(
                f"group_size {self.group_size} is neither -1 (per channel) nor a multiple of 8 of at least 16"
            )
        if self.format is Format.AWQ and self.symmetric:
            raise ValueError("format awq stores zero points: symmetric must be false")
        if self.format is Format.GPTQ and not self.symmetric:
            raise ValueError(
                "format gptq holds symmetric grids only: a zero point of 0 cannot be stored in its layout; gptq_v2 can"
            )
        if self.propagate is Propagate.TRUE_SEQUENTIAL and self.method.has_scales:
            raise ValueError(
                f"propagate true-sequential is not for {self.method}, whose scales change linears that were solved "
                "before: choose quantized, or method gptq or rtn"
            )
        self._require_roundable_inputs()
        if not self.name:
            object.__setattr__(self, "name", self._own_name())
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name {self.name!r} must be letters, digits, '.', '_' and '-'")
        return self

    def _require_roundable_inputs(self) -> None:
        """Return when what is asked for goes together with how inputs are rounded.

        Raises:
            ValueError: naming the key that does not.
        """
        if self.activations is Activations.NONE:
            if self.type is NumberType.FLOAT:
                raise ValueError("type float is for rounded inputs: set activations to dynamic")
            if self.method.is_smooth:
                raise ValueError(
                    f"method {self.method} makes inputs easier to round, and activations none leaves them: choose awq "
                    "or awq-gptq, or activations dynamic"
                )
            return
        wanted: dict[str, tuple[Any, ...]] = {
            "bits": (8,),
            "group_size": (PER_CHANNEL,),
            "symmetric": (True,),
            "format": (Format.COMPRESSED_TENSORS,),
            "propagate": (Propagate.FLOAT,),
            "widths": ({},),
            "mix": (None,),
            "method": (Method.RTN, Method.GPTQ, Method.SMOOTHQUANT, Method.SMOOTHQUANT_GPTQ),
        }
        what = f"activations {self.activations}"
        if self.type is NumberType.FLOAT:
            wanted |= {"method": (Method.RTN,), "refinement": (0,)}
            what = "type float"
        for key, legal in wanted.items():
            if getattr(self, key) not in legal:
                choices = " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in legal)
                said = f"is for {key} {choices}" if legal not in (({},), (None,)) else f"has no {key}"
                raise ValueError(f"{what} {said}, not {getattr(self, key)}")

    def _own_name(self) -> str:
        """Return the short name, with a digest of what it does not say, if anything: another variant must not be
        published under the name of the plain one."""
        unsaid = ("ignore", "group_fallback", "compensation", "damping", "act_order", "clip_search", "refinement")
        rest = {key: getattr(self, key) for key in unsaid if getattr(self, key) != type(self).model_fields[key].default}
        if self.widths:
            rest["widths"] = self.widths
        if self.mix and self.mix != MixSpec(average_bits=self.mix.average_bits or self.bits):
            rest["mix"] = self.mix
        return f"{self.short_name()}-x{fingerprint(rest)[:6]}" if rest else self.short_name()

    def short_name(self) -> str:
        """Return the shortest name that ``parse_variant`` reads back as these method, bits, group, symmetry, format and
        schedule."""
        if self.activations is not Activations.NONE:
            preset = next((name for name, keys in PRESETS.items() if self._has(keys)), None)
            return preset or f"{self.method}-{ROUNDED_INPUTS[self.type]}"
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        parts = [self.method.value, self._width(), group]
        if self.format is not _default_format(self.method, self.bits, is_mixed=self.mix is not None):
            parts.append("ct" if self.format is Format.COMPRESSED_TENSORS else self.format.value)
        if self.symmetric != _default_symmetry(self.method, self.format):
            parts.append("sym" if self.symmetric else "asym")
        if self.propagate in SCHEDULE_SUFFIXES:
            parts.append(SCHEDULE_SUFFIXES[self.propagate])
        return "-".join(parts)

    def _has(self, keys: Mapping[str, Any]) -> bool:
        """Return whether these are the variant's."""
        return all(getattr(self, key) == value for key, value in keys.items())

    def _width(self) -> str:
        """Return the width as a short name has it: an average has a decimal point, other budgets have no number."""
        if self.mix is None:
            return f"w{self.bits}"
        average = self.mix.average_bits
        return "mix" if average is None else f"w{float(average)}"

    @property
    def is_compensated(self) -> bool:
        """Whether weights are changed before they are quantized, for what blocks before them do."""
        return self.compensated_share > 0

    @property
    def compensated_share(self) -> float:
        """How far weights go before they are quantized: ``compensation``, with ``auto`` resolved."""
        if self.propagate is Propagate.FLOAT:
            return 0.0
        return COMPENSATION[self.propagate] if self.compensation == "auto" else self.compensation

    @property
    def choices(self) -> tuple[Bits, ...]:
        """Widths that linears can get: with ``mix`` those to choose from, in order; else none but what is given."""
        if self.mix is None:
            return ()
        held = [bits for bits in get_args(Bits) if bits in FORMAT_BITS[self.format]]
        if self.mix.choices:
            return tuple(bits for bits in held if bits in self.mix.choices)
        average = self.mix.average_bits
        held = [bits for bits in held if bits > 2 or (average is not None and average < 3)]
        if average is None:
            return tuple(held)
        below = max((place for place, bits in enumerate(held) if bits <= average), default=0)
        return tuple(held[max(0, below - 1) : below + 3])

    def bits_of(self, linear_name: str) -> Bits:
        """Return the width of a linear as far as it is given: that of the first entry of ``widths`` that names it, or
        that of all."""
        named = (bits for pattern, bits in self.widths.items() if is_named_by(pattern, linear_name))
        return next(named, self.bits)

    def ignores(self, linear_name: str) -> bool:
        """Return whether ``ignore`` names this linear."""
        return any(is_named_by(pattern, linear_name) for pattern in self.ignore)


def is_named_by(pattern: str, linear_name: str) -> bool:
    """Return whether an entry of ``ignore`` or ``widths`` names this linear."""
    if pattern.startswith(EXPRESSION_MARK):
        return re.search(pattern.removeprefix(EXPRESSION_MARK), linear_name) is not None
    return pattern == linear_name


_OWN_FORMATS = {
    Method.GPTQ: (Format.GPTQ,),
    Method.AWQ: (Format.AWQ,),
    Method.AWQ_GPTQ: (Format.AWQ,),
}

_METHODS = "|".join(sorted(Method, key=len, reverse=True))

_ROUNDED_NAME = re.compile(rf"(?P<method>{_METHODS})-(?P<inputs>{'|'.join(ROUNDED_INPUTS.values())})")

_VARIANT_NAME = re.compile(
    rf"(?P<method>{_METHODS})-w(?P<bits>\d+(?:\.\d+)?)-(?P<group>g\d+|channel)"
    r"(?:-(?P<format>gptq_v2|gptq|awq|ct))?(?:-(?P<symmetry>sym|asym))?"
    rf"(?:-(?P<schedule>{'|'.join(SCHEDULE_SUFFIXES.values())}))?"
)


def _default_format(method: Method, bits: int, *, is_mixed: bool = False) -> Format:
    """Return the format that a short name means when it does not say: that of 2 and 3 bits which most loaders compute
    with as they are, else the first of the method's own that holds the bits, else the one that holds all; for several
    widths the one whose widths every loader reads."""
    if is_mixed:
        return Format.COMPRESSED_TENSORS
    preferred = _OWN_FORMATS.get(method, ()) if bits > 3 else (Format.GPTQ,)
    return next((format_ for format_ in preferred if bits in FORMAT_BITS[format_]), Format.COMPRESSED_TENSORS)


def _default_symmetry(method: Method, format_: Format) -> bool:
    """Return the symmetry that a short name means when it does not say: the only one of the format, else the one that
    the method is known for."""
    match format_:
        case Format.GPTQ:
            return True
        case Format.AWQ:
            return False
        case Format.GPTQ_V2 | Format.COMPRESSED_TENSORS:
            return not method.has_scales


def parse_variant(name: str) -> VariantSpec:
    """Return the variant that a short name means: ``method-wBITS-gGROUP|channel``, then ``-gptq``, ``-gptq_v2``,
    ``-awq`` or ``-ct``, ``-sym`` or ``-asym``, and ``-seq``, ``-trueseq`` or ``-twopass`` for a schedule other than
    ``float``, each of them only where it is not what is usual. Bits with a decimal point, as in
    ``gptq-w4.5-g64``, are an average: mixed precision. Where inputs are rounded too it is one of ``PRESETS``, or
    ``method-w8a8`` or ``method-fp8``.

    Raises:
        SpecError: when the name cannot be read or means a combination that no format holds.
    """
    if name in PRESETS:
        return _named_variant(name, PRESETS[name])
    if (match := _ROUNDED_NAME.fullmatch(name)) is not None:
        types = {word: type_ for type_, word in ROUNDED_INPUTS.items()}
        keys = {"method": match["method"], "type": types[match["inputs"]], "activations": Activations.DYNAMIC}
        return _named_variant(name, keys)
    match = _VARIANT_NAME.fullmatch(name)
    if match is None:
        message = f"variant {name!r} is not of the form method-wBITS-gGROUP, and none of {', '.join(PRESETS)}"
        raise SpecError(message, code="spec.variant", hint=_VARIANT_HINT)
    method, is_mixed = Method(match["method"]), "." in match["bits"]
    bits = int(float(match["bits"]))
    format_ = _default_format(method, bits, is_mixed=is_mixed)
    if match["format"]:
        format_ = Format.COMPRESSED_TENSORS if match["format"] == "ct" else Format(match["format"])
    symmetric = match["symmetry"] == "sym" if match["symmetry"] else _default_symmetry(method, format_)
    schedules = {suffix: schedule for schedule, suffix in SCHEDULE_SUFFIXES.items()}
    propagate = schedules.get(match["schedule"], Propagate.FLOAT)
    group = PER_CHANNEL if match["group"] == "channel" else int(match["group"][1:])
    width = {"mix": {"average_bits": float(match["bits"])}} if is_mixed else {"bits": bits}
    return _named_variant(
        name,
        {
            "method": method,
            **width,
            "group_size": group,
            "symmetric": symmetric,
            "format": format_,
            "propagate": propagate,
        },
    )


_VARIANT_HINT = (
    "try gptq-w4-g128, gptq-w3-g64, awq-w4-g128, rtn-w8-g128, gptq-w4-g64-ct, w8a8-int8, fp8-dynamic; or describe it "
    "in a file with --spec"
)


def _named_variant(name: str, keys: Mapping[str, Any]) -> VariantSpec:
    """Return the variant that a short name stands for.

    Raises:
        SpecError: when its keys do not go together.
    """
    try:
        return VariantSpec.model_validate(dict(keys))
    except ValidationError as error:
        reason = "; ".join(problems(error, VariantSpec))
        raise SpecError(f"variant {name!r}: {reason}", code="spec.variant", hint=_VARIANT_HINT) from error
