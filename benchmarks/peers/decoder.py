"""Reads quantized checkpoints of any tool into dense float32 weights.

A referee: written from the descriptions of the formats, it shares no code with ``pipeline.formats`` nor with the
libraries of the tools that it judges. All widths are read as one stream of bits, little-endian, which is slow and has
no special cases.

    format              codes                                      zero point            weight
    gptq                qweight [I*b/32, O], stream along I        qzeros + 1            scale * (code - zero)
    gptq_v2             the same                                   qzeros                the same
    awq (gemm)          qweight [I, O/8], along O, interleaved     qzeros, interleaved   the same
    pack-quantized      weight_packed [O, I*b/32], along I         the middle code, or   the same
                                                                   weight_zero_point

Widths come from the tensors' shapes where they tell, else from config.json, which also says what tensors cannot: how
GPTQ's zero points are stored. A GPTQ checkpoint that calls itself symmetric and has other zero points than the middle
code is refused, since its label is wrong then.

Dimension suffixes: O = out_features, I = in_features, G = groups of a row, N = values, W = words of 32 bits, R = rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

WORD_BITS = 32
AWQ_BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word of AWQ's GEMM layout holds column ``8 * word + AWQ_ORDER[i]``."""

SUFFIXES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    ),
}
FIRST_SUFFIX = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}


class UnreadableCheckpointError(Exception):
    """A checkpoint is of a kind that this decoder does not know, or contradicts itself."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as dense weights.

    Attributes:
        weights: float32 tensors under the names that an unquantized checkpoint has.
        label: What config.json calls the format.
        linears: Bits of every quantized linear, by its name without ``.weight``.
        weight_bytes: Size of all .safetensors files.
    """

    weights: dict[str, Tensor]
    label: str
    linears: dict[str, int]
    weight_bytes: int


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder, quantized or not.

    Raises:
        UnreadableCheckpointError: naming what is not known, missing, or contradicts something else.
    """
    config = _quantization(folder)
    tensors = dict(_tensors(folder))
    weight_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if config is None:
        return Checkpoint({name: tensor.float() for name, tensor in tensors.items()}, "none", {}, weight_bytes)
    method = _method(config)
    first = f".{FIRST_SUFFIX[method]}"
    weights, linears = {}, {}
    for name in sorted(name.removesuffix(first) for name in tensors if name.endswith(first)):
        parts = {
            suffix: tensors.pop(f"{name}.{suffix}") for suffix in SUFFIXES[method] if f"{name}.{suffix}" in tensors
        }
        weights[f"{name}.weight"], linears[name] = _dense(method, name, parts, config)
    if not linears:
        raise UnreadableCheckpointError(f"{folder}: config.json says {method}, but no tensor is quantized")
    twice = sorted(weights.keys() & tensors.keys())
    if twice:
        raise UnreadableCheckpointError(f"{folder}: {twice[0]} is there quantized and dense")
    weights |= {name: tensor.float() for name, tensor in tensors.items()}
    return Checkpoint(weights, _label(config), linears, weight_bytes)


def _dense(method: str, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Return a linear's float32 weight [O, I] and its bits."""
    try:
        match method:
            case "gptq":
                return dequantize_gptq(parts, config, is_v2=_label(config) == "gptq_v2")
            case "awq":
                return dequantize_awq(parts), AWQ_BITS
            case _:
                return dequantize_packed(parts, _group_bits(config))
    except KeyError as error:
        raise UnreadableCheckpointError(f"{name} has no {error.args[0]}") from error
    except ValueError as error:
        raise UnreadableCheckpointError(f"{name}: {error}") from error


def dequantize_gptq(parts: Mapping[str, Tensor], config: Mapping[str, Any], *, is_v2: bool) -> tuple[Tensor, int]:
    """Return a linear in one of GPTQ's layouts as float32 [O, I], and its bits.

    Args:
        parts: ``qweight`` int32 [I*b/32, O], ``qzeros`` int32 [G, O*b/32], ``scales`` [G, O], ``g_idx`` int32 [I].
        config: Its ``sym`` is compared with the zero points.
        is_v2: Zero points are stored as they are, not one less.

    Raises:
        ValueError: when the shapes fit no width, or the zero points contradict the config.
    """
    qweight_WO, scale_GO, group_I = parts["qweight"], parts["scales"].float(), parts["g_idx"].long()
    num_inputs, num_outputs = group_I.numel(), qweight_WO.shape[1]
    found, rest = divmod(qweight_WO.shape[0] * WORD_BITS, num_inputs)
    if rest or parts["qzeros"].shape[1] * WORD_BITS != num_outputs * found:
        raise ValueError(f"{list(qweight_WO.shape)} words for {num_inputs} inputs fit no width")
    codes_IO = unpack_stream(qweight_WO.T, found, num_inputs).T
    zero_GO = unpack_stream(parts["qzeros"], found, num_outputs) + (0 if is_v2 else 1)
    if config.get("sym") and bool((zero_GO != 1 << (found - 1)).any()):
        raise ValueError(f"config.json says symmetric, but zero points are not all {1 << (found - 1)}")
    return (scale_GO[group_I] * (codes_IO - zero_GO[group_I])).T.contiguous(), found


def dequantize_awq(parts: Mapping[str, Tensor]) -> Tensor:
    """Return a linear in AWQ's GEMM layout as float32 [O, I].

    Args:
        parts: ``qweight`` int32 [I, O/8], ``qzeros`` int32 [G, O/8], ``scales`` [G, O].

    Raises:
        ValueError: when groups do not divide the inputs.
    """
    codes_IO, scale_GO = _unpack_awq(parts["qweight"]), parts["scales"].float()
    zero_GO = _unpack_awq(parts["qzeros"])
    size, rest = divmod(codes_IO.shape[0], scale_GO.shape[0])
    if rest or zero_GO.shape != scale_GO.shape or scale_GO.shape[1] != codes_IO.shape[1]:
        raise ValueError(f"scales {list(scale_GO.shape)} do not fit {list(codes_IO.shape)} codes")
    group_I = torch.arange(codes_IO.shape[0]) // size
    return (scale_GO[group_I] * (codes_IO - zero_GO[group_I])).T.contiguous()


def dequantize_packed(parts: Mapping[str, Tensor], bits: int) -> tuple[Tensor, int]:
    """Return a linear of format pack-quantized as float32 [O, I], and its bits.

    Words hold values one after the other across their borders, or, as written before 2026, ``32 // bits`` whole values
    each; the number of words tells which.

    Args:
        parts: ``weight_packed`` int32 [O, W], ``weight_shape`` [2], ``weight_scale`` [O, G] and, if asymmetric,
            ``weight_zero_point``: int32 [O*b/32, G], a stream along O; ``weight_g_idx`` if groups are no ranges.
        bits: Width of a code.

    Raises:
        ValueError: when the number of words fits neither layout.
    """
    num_outputs, num_inputs = (int(size) for size in parts["weight_shape"])
    codes_OI = _unpack_words(parts["weight_packed"], bits, num_inputs)
    scale_OG = parts["weight_scale"].float()
    size, rest = divmod(num_inputs, scale_OG.shape[1])
    if codes_OI.shape[0] != num_outputs or rest:
        raise ValueError(f"{list(scale_OG.shape)} scales do not fit {num_outputs} x {num_inputs}")
    group_I = parts["weight_g_idx"].long() if "weight_g_idx" in parts else torch.arange(num_inputs) // size
    zero_OG = torch.full_like(scale_OG, 1 << (bits - 1))
    if "weight_zero_point" in parts:
        stored = parts["weight_zero_point"]
        if stored.dtype != torch.int32:
            raise ValueError(f"zero points are {stored.dtype}, not packed")
        zero_OG = _unpack_words(stored.T, bits, num_outputs).T
    return scale_OG[:, group_I] * (codes_OI - zero_OG[:, group_I]), bits


def unpack_stream(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` values of each row of words, int32 [R, N]: value i is at bits i*b and up.

    Args:
        words_RW: int32; bit 0 is the lowest of the first word.
        bits: Width of a value.
        count: Values of a row.

    Raises:
        ValueError: when a row has fewer bits, or words to spare.
    """
    rows, num_words = words_RW.shape
    if num_words != -(-count * bits // WORD_BITS):
        raise ValueError(f"{num_words} words are no row of {count} values of {bits} bits")
    octets = words_RW.contiguous().numpy().astype("<i4").view(np.uint8).reshape(rows, -1)
    single = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits].reshape(rows, count, bits)
    places = 1 << np.arange(bits, dtype=np.int32)
    return torch.from_numpy((single * places).sum(-1, dtype=np.int32))


def _unpack_words(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """Return values int32 [R, N] from a stream, or from words of ``32 // bits`` values each and some bits to spare."""
    per_word = WORD_BITS // bits
    rows, num_words = words_RW.shape
    dense_words, loose_words = -(-count * bits // WORD_BITS), -(-count // per_word)
    if num_words == dense_words:
        if num_words == loose_words and WORD_BITS % bits and num_words > 1:
            raise ValueError(f"{num_words} words of {count} values of {bits} bits may be of two layouts")
        return unpack_stream(words_RW, bits, count)
    if num_words != loose_words:
        raise ValueError(f"{num_words} words hold no {count} values of {bits} bits")
    values_RW = unpack_stream(words_RW.reshape(-1, 1), bits, per_word)
    return values_RW.reshape(rows, num_words * per_word)[:, :count]


def _unpack_awq(words_RW: Tensor) -> Tensor:
    """Return values int32 [R, 8*W] from AWQ's words."""
    rows, num_words = words_RW.shape
    stored = unpack_stream(words_RW, AWQ_BITS, num_words * 8).reshape(rows, num_words, 8)
    values = torch.empty_like(stored)
    values[:, :, list(AWQ_ORDER)] = stored
    return values.reshape(rows, num_words * 8)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnreadableCheckpointError(f"{folder} has no .safetensors file")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                yield name, handle.get_tensor(name)


def _quantization(folder: Path) -> dict[str, Any] | None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] | None = config.get("quantization_config")
    return found


def _method(config: Mapping[str, Any]) -> str:
    """Return whose tensors these are, after refusing what this decoder does not read."""
    method = config["quant_method"]
    label = _label(config)
    known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",), "compressed-tensors": ("pack-quantized",)}
    if method not in known or label not in known[method]:
        raise UnreadableCheckpointError(f"cannot read {method} of format {label}")
    return str(method)


def _label(config: Mapping[str, Any]) -> str:
    """Return what a config calls its format."""
    match config["quant_method"]:
        case "gptq":
            # Two names of one key; tools that knew one layout only wrote neither.
            return str(config.get("checkpoint_format") or config.get("format") or "gptq")
        case "awq":
            return str(config.get("version") or config.get("format") or "gemm").lower()
        case _:
            return str(config.get("format"))


def _group_bits(config: Mapping[str, Any]) -> int:
    """Return the width of a compressed-tensors checkpoint, which all groups must share."""
    widths = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
    if len(widths) != 1:
        raise UnreadableCheckpointError(f"config groups of several widths: {sorted(widths)}")
    return int(widths.pop())
