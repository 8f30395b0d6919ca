"""The ``quantization_config`` of ``config.json``: written from the linears' schemes, and read back.

What loaders make of it, and what follows:

- GPTQ: one base grid; linears that differ are named in ``dynamic`` (regular expressions matched from the start of the
  name, ``+:`` overrides, ``-:`` leaves unquantized), which vLLM and gptqmodel read. transformers ignores ``dynamic``
  and quantizes every linear of the blocks unless ``modules_in_block_to_quantize`` says otherwise, so that is written
  too when a linear inside a block stays unquantized. It has no word for a second group size.
- AWQ: one grid; ``modules_to_not_convert`` names the rest. vLLM looks for these as substrings, so a name that occurs
  in a quantized linear's name is refused here.
- compressed-tensors: one config group per grid, built with the owning package's own models. With one grid it targets
  the class ``Linear``; with several, names, because engines try classes before the parts of fused linears. ``ignore``
  always lists full names. ``dequantize`` is for transformers (``loaders.py``).

transformers asks under the names of its own modules, which need not be the checkpoint's (``layers.0.mlp.up_proj`` may
be loaded as ``model.layers.0.mlp.up_proj``); vLLM maps either to its own. So every linear is written under both. What
no configuration can help is in ``loaders.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import FormatError
from pipeline.formats.layouts import Layout, layout_of
from pipeline.formats.loaders import must_unpack_while_loading
from pipeline.formats.names import ModuleSchemes, Rule, cover, in_block_names, is_in_block, with_fused
from pipeline.quantize import float8
from pipeline.quantize.types import Scheme
from pipeline.spec import FORMAT_BITS, PER_CHANNEL, Activations, Format, NumberType, VariantSpec

OUTPUT_HEAD = "lm_head"
"""Loaders never quantize a linear of this name unless told to."""


def quantization_config(
    format_: Format, schemes: Mapping[str, Scheme | None], variant: VariantSpec, version: str
) -> dict[str, Any]:
    """Return the JSON-ready configuration of a release.

    Args:
        format_: Format of all quantized linears.
        schemes: Every linear of the model by checkpoint name and, where it differs, by the model's name too; also
            those left unquantized (None), above all the output head: what is not listed here, loaders would take for
            quantized.
        variant: What was asked for; says whether groups are whole rows and what goes into ``meta``.
        version: Version of Bitmill.

    Raises:
        FormatError: when nothing is quantized, or the format's configuration cannot express the schemes.
    """
    if not any(schemes.values()):
        raise FormatError(f"no linear is quantized, so format {format_} has no configuration")
    match format_:
        case Format.GPTQ | Format.GPTQ_V2:
            return _gptq_config(format_, schemes, variant, version)
        case Format.AWQ:
            return _awq_config(schemes, variant, version)
        case Format.COMPRESSED_TENSORS:
            return _compressed_config(schemes, variant)


def read_quantization_config(config: Mapping[str, Any]) -> ModuleSchemes:
    """Return which linears a release has quantized, and how.

    Raises:
        FormatError: when the configuration is of an unknown kind, contradicts itself, or describes a layout that
            is not read here.
    """
    readers: dict[Any, Callable[[Mapping[str, Any]], ModuleSchemes]] = {
        "gptq": _read_gptq,
        "awq": _read_awq,
        "compressed-tensors": _read_compressed,
    }
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in readers:
        raise FormatError(f"quantization_config: quant_method {method!r} is none of {', '.join(readers)}")
    return readers[method](config)


def _by_grid(schemes: Mapping[str, Scheme | None], variant: VariantSpec) -> dict[Scheme, list[str]]:
    """Return the quantized linears by their grid, the most frequent first; its group size is -1 where the variant's
    groups are whole rows."""
    own = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    whole_rows = variant.group_size == PER_CHANNEL
    grids = {name: replace(grid, group_size=PER_CHANNEL) if whole_rows else grid for name, grid in own.items()}
    return {grid: [name for name in grids if grids[name] == grid] for grid, _ in Counter(grids.values()).most_common()}


def _meta(variant: VariantSpec, version: str) -> dict[str, Any]:
    return {"quantizer": [f"bitmill:{version}"], "variant": variant.name}


def _gptq_config(
    format_: Format, schemes: Mapping[str, Scheme | None], variant: VariantSpec, version: str
) -> dict[str, Any]:
    by_grid = _by_grid(schemes, variant)
    first, *others = by_grid
    if format_ is Format.GPTQ and not all(grid.symmetric for grid in by_grid):
        raise FormatError("format gptq holds symmetric grids only")
    kept = [name for name, scheme in schemes.items() if scheme is None and name != OUTPUT_HEAD]
    dynamic: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in with_fused(cover(kept, schemes))}
    for grid in others:
        for pattern in with_fused(cover(by_grid[grid], schemes)):
            dynamic[f"+:{pattern}"] = {"bits": grid.bits, "group_size": grid.group_size}
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": format_.value,
        "bits": first.bits,
        "group_size": first.group_size,
        "sym": first.symmetric,
        "desc_act": False,
        "lm_head": schemes.get(OUTPUT_HEAD) is not None,
        "pack_dtype": "int32",
        "true_sequential": False,
        "damp_percent": variant.damping,
        "meta": _meta(variant, version) | {"act_order": variant.act_order, "static_groups": True},
    }
    if dynamic:
        config["dynamic"] = dynamic
    if any(is_in_block(name) for name in kept):
        quantized = [name for names in by_grid.values() for name in names]
        config["modules_in_block_to_quantize"] = [in_block_names(quantized, kept)]
    return config


def _awq_config(schemes: Mapping[str, Scheme | None], variant: VariantSpec, version: str) -> dict[str, Any]:
    by_grid = _by_grid(schemes, variant)
    if len(by_grid) > 1:
        sizes = ", ".join(f"{grid.bits} bits in groups of {grid.group_size}" for grid in by_grid)
        raise FormatError(
            f"format awq has one grid for all linears, not {sizes}",
            hint="choose a group size that divides every matrix, or group_fallback: skip, or format compressed-tensors",
            code="format.mixed_grids",
        )
    grid = next(iter(by_grid))
    if grid.symmetric or grid.bits not in FORMAT_BITS[Format.AWQ]:
        raise FormatError(f"format awq holds asymmetric 4 bit grids, not {grid.bits} bit, symmetric: {grid.symmetric}")
    kept = [name for name, scheme in schemes.items() if scheme is None]
    for name in kept:
        inside = next((other for other, scheme in schemes.items() if scheme is not None and name in other), None)
        if inside is not None:
            raise FormatError(f"format awq: leaving {name} unquantized would make engines skip {inside} too")
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": True,
        "modules_to_not_convert": kept,
        "meta": _meta(variant, version),
    }


def _compressed_config(schemes: Mapping[str, Scheme | None], variant: VariantSpec) -> dict[str, Any]:
    from compressed_tensors import __version__ as package_version
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    by_grid = _by_grid(schemes, variant)
    groups = {}
    for index, (grid, names) in enumerate(by_grid.items()):
        whole_row = grid.group_size == PER_CHANNEL
        weights = QuantizationArgs(
            num_bits=grid.bits,
            type=grid.type.value,
            symmetric=grid.symmetric,
            strategy="channel" if whole_row else "group",
            group_size=None if whole_row else grid.group_size,
        )
        targets = ["Linear"] if len(by_grid) == 1 else [f"re:{pattern}" for pattern in cover(names, schemes)]
        groups[f"group_{index}"] = QuantizationScheme(
            targets=targets, weights=weights, input_activations=_input_arguments(grid), format=layout_of(grid).value
        )
    config = QuantizationConfig(
        config_groups=groups,
        format=layout_of(next(iter(by_grid))).value,
        quantization_status="compressed",
        ignore=[name for name, scheme in schemes.items() if scheme is None],
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    dumped["version"] = package_version
    if must_unpack_while_loading(variant.symmetric, len(by_grid)):
        dumped["dequantize"] = True
    return dumped


def _input_arguments(grid: Scheme) -> Any:
    """Return the owning package's arguments for the rounding of inputs; None where these are not rounded."""
    from compressed_tensors.quantization import QuantizationArgs

    match grid.activations:
        case Activations.NONE:
            return None
        case Activations.DYNAMIC:
            return QuantizationArgs(
                num_bits=grid.bits, type=grid.type.value, symmetric=True, strategy="token", dynamic=True
            )


def _grid(where: str, bits: Any, group_size: Any, symmetric: Any, format_: Format) -> Scheme:
    """Return a grid that ``format_`` can have.

    Raises:
        FormatError: naming the value that cannot be.
    """
    legal = FORMAT_BITS[format_]
    if type(bits) is not int or bits not in legal:
        raise FormatError(f"{where}: bits {bits!r} is none of {', '.join(map(str, legal))}")
    if type(group_size) is not int or (group_size != PER_CHANNEL and group_size < 1):
        raise FormatError(f"{where}: group_size {group_size!r} is neither positive nor -1")
    if type(symmetric) is not bool:
        raise FormatError(f"{where}: symmetry {symmetric!r} is neither true nor false")
    return Scheme(bits, group_size, symmetric)


def _matcher(where: str, pattern: str) -> Callable[[str], bool]:
    """Return whether a regular expression matches from the start of a name, as the loaders ask.

    Raises:
        FormatError: when it is none.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise FormatError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    return lambda name: compiled.match(name) is not None


def _names(where: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"{where} is no list of names: {value!r:.80}")
    return value


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] == OUTPUT_HEAD


def _read_gptq(config: Mapping[str, Any]) -> ModuleSchemes:
    where = "quantization_config (gptq)"
    labels = {config[key] for key in ("checkpoint_format", "format") if isinstance(config.get(key), str)}
    if unknown := labels - {Format.GPTQ, Format.GPTQ_V2}:
        found = ", ".join(sorted(unknown))
        known = "only versions 1 (gptq) and 2 (gptq_v2)"
        raise FormatError(f"{where}: layout {found} is not read, {known}", code="format.unknown_layout")
    if len(labels) > 1:
        raise FormatError(f"{where}: it says version 1 (gptq) and version 2 (gptq_v2)", code="format.unknown_layout")
    format_ = Format(labels.pop()) if labels else Format.GPTQ
    symmetric = config.get("sym")
    if symmetric is not True and format_ is Format.GPTQ:
        raise FormatError(f"{where}: sym is {symmetric!r}, asymmetric grids are not read in this layout")
    base = _grid(where, config.get("bits"), config.get("group_size"), symmetric, format_)
    rules = [] if config.get("lm_head") else [Rule(_is_head, None)]
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise FormatError(f"{where}: dynamic is no mapping")
    for key, over in dynamic.items():
        meant = _matcher(f"{where}: dynamic", re.sub(r"^[+-]:", "", key))
        if key.startswith("-:"):
            rules.append(Rule(meant, None))
            continue
        if not isinstance(over, dict) or over.get("sym", symmetric) is not symmetric:
            raise FormatError(f"{where}: dynamic {key!r} has no readable override: {over!r:.80}")
        bits, group_size = over.get("bits", base.bits), over.get("group_size", base.group_size)
        rules.append(Rule(meant, _grid(f"{where}: dynamic {key!r}", bits, group_size, base.symmetric, format_)))
    listed = config.get("modules_in_block_to_quantize") or []
    if not isinstance(listed, list):
        raise FormatError(f"{where}: modules_in_block_to_quantize is no list")
    nested = [item for items in listed for item in (items if isinstance(items, list) else [items])]
    if endings := tuple(_names(f"{where}: modules_in_block_to_quantize", nested)):
        rules.append(Rule(lambda name: not name.endswith(endings), None))
    return ModuleSchemes(format_, (*rules, Rule(lambda name: True, base)))


def _read_awq(config: Mapping[str, Any]) -> ModuleSchemes:
    where = "quantization_config (awq)"
    version = config.get("version", config.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise FormatError(f"{where}: layout {version!r} is not read, only gemm", code="format.unknown_layout")
    if config.get("zero_point") is not True:
        raise FormatError(f"{where}: zero_point is {config.get('zero_point')!r}, only true is read")
    base = _grid(where, config.get("bits"), config.get("group_size"), False, Format.AWQ)
    kept = _names(f"{where}: modules_to_not_convert", config.get("modules_to_not_convert"))
    patterns = [re.compile(rf"(?:^|\.){re.escape(name)}(?:\.|$)") for name in kept]
    rules = (
        Rule(_is_head, None),
        Rule(lambda name: any(pattern.search(name) for pattern in patterns), None),
        Rule(lambda name: True, base),
    )
    return ModuleSchemes(Format.AWQ, rules)


def _read_compressed(config: Mapping[str, Any]) -> ModuleSchemes:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    where = "quantization_config (compressed-tensors)"
    try:
        parsed = QuantizationConfig.model_validate(dict(config))
    except (ValidationError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise FormatError(f"{where} is not valid: {error}") from error
    legal = ", ".join(Layout)
    if parsed.format not in list(Layout) or parsed.quantization_status.value != "compressed":
        found = f"{parsed.format}, {parsed.quantization_status.value}"
        raise FormatError(f"{where}: {found} is not read, only {legal}, and compressed")
    if parsed.kv_cache_scheme is not None:
        raise FormatError(f"{where}: a quantized KV cache is not read")
    rules = [Rule(_target(where, target), None) for target in parsed.ignore or []]
    for group_name, group in parsed.config_groups.items():
        here, weights = f"{where}: {group_name}", group.weights
        if weights is None or group.output_activations or weights.dynamic:
            raise FormatError(f"{here}: only static weight quantization is read")
        if weights.type not in list(NumberType) or weights.strategy not in ("group", "channel"):
            raise FormatError(f"{here}: {weights.type} by {weights.strategy} is not read")
        group_size = PER_CHANNEL if weights.strategy == "channel" else weights.group_size
        grid = _grid(here, weights.num_bits, group_size, weights.symmetric, Format.COMPRESSED_TENSORS)
        activations = _read_activations(here, weights, group.input_activations)
        grid = replace(grid, type=NumberType(weights.type), activations=activations)
        # One file has one layout here: that of every group is said of all.
        for format_ in (parsed.format, group.format or parsed.format):
            if format_ != layout_of(grid):
                raise FormatError(f"{here}: these are weights in {layout_of(grid)}, not in format {format_}")
        rules.extend(Rule(_target(here, target), grid) for target in group.targets)
    return ModuleSchemes(Format.COMPRESSED_TENSORS, tuple(rules))


def _read_activations(where: str, weights: Any, inputs: Any) -> Activations:
    """Return how inputs are rounded, from the owning package's arguments for weights and for them.

    Raises:
        FormatError: when that is no way that is read.
    """
    if inputs is None:
        if weights.type == NumberType.FLOAT:
            raise FormatError(f"{where}: floating-point weights whose inputs are not rounded are not read")
        return Activations.NONE
    is_alike = inputs.type == weights.type and inputs.num_bits == weights.num_bits == float8.BITS
    if not (is_alike and inputs.dynamic is True and inputs.strategy == "token" and inputs.symmetric):
        raise FormatError(
            f"{where}: inputs as {inputs.type} of {inputs.num_bits} bits by {inputs.strategy}, dynamic: "
            f"{inputs.dynamic}, are not read, only dynamic ones of 8 bits by token, of the weights' type"
        )
    if weights.strategy != "channel" or not weights.symmetric:
        raise FormatError(f"{where}: with rounded inputs only symmetric weights by channel are read")
    return Activations.DYNAMIC


def _target(where: str, target: str) -> Callable[[str], bool]:
    """Return what a target means: a class (every linear here is a ``Linear``), ``re:`` and an expression, or a name."""
    if target == "Linear":
        return lambda name: True
    return _matcher(where, target[3:]) if target.startswith("re:") else lambda name: name == target
