"""Which tensor-parallel sizes a release loads at, from the shapes of its linears alone.

Under tensor parallelism over N ranks an engine splits a linear along its outputs (q/k/v, gate/up: column-parallel) or
along its inputs (o, down: row-parallel). On every rank vLLM then demands

- of all packed formats: whole groups along the inputs, and outputs that fill the 32-bit words in which zero points
  are packed (out per rank % (32 / bits) = 0, % 32 of 3-bit codes, 32 of which fill 3 words);
- of the fast Marlin kernel besides: out per rank % 64 = 0, in per rank % 128 = 0, and a group size among 32, 64, 128
  or one scale per row.

Where only the first holds, symmetric checkpoints and the AWQ format still run on a slower kernel, which computes in
float16 only. Whether a linear is split by outputs or inputs is read off its name; an unknown name must satisfy both.
An unquantized linear only has to divide. The rules are taken matrix by matrix, which is stricter than an engine that
fuses q/k/v first or repeats key/value heads; that the number of attention heads divides is not checked here.

Zero points in format gptq_v2 are for the slower kernel alone (exllama; read from the code of 0.32.0, not tried).

Where inputs are rounded too, codes lie one to a byte and are multiplied as they are: linears only have to divide.
vLLM's fast kernel (CUTLASS) takes in and out per rank in multiples of 16, and its general one (Triton) takes the others
(read from the code of 0.32.0, not tried).

Whatever the shapes, Marlin, and with it vLLM's GPTQ loader, takes codes of 4 and 8 bits only: releases at other widths
count as refused. In compressed-tensors the Humming kernel takes them, a package that vLLM does not install. Marlin
takes zero points with 4-bit codes only (vLLM's ``query_marlin_supported_quant_types``), and nothing but Machete, a
kernel for Hopper GPUs alone, takes them with 8-bit ones: such releases count as refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from pipeline.facts import UNQUANTIZED_BITS, ModuleFacts
from pipeline.formats.loaders import VLLM_BITS
from pipeline.spec import PER_CHANNEL, Activations, Format, VariantSpec

TP_SIZES = (1, 2, 4, 8)
"""The tensor-parallel sizes that the card answers for."""

WORD_BITS = 32
MARLIN_OUT = 64
MARLIN_IN = 128
MARLIN_GROUPS = (32, 64, 128)
CUTLASS_SIZES = 16

_COLUMN = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "query", "key", "value", "Wqkv"}
    | {"gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "dense_h_to_4h", "fc_in"}
    | {"q_b_proj", "kv_b_proj"}
)
_ROW = frozenset({"o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "c_proj", "wo", "w2", "fc_out"})
_REPLICATED = frozenset({"gate", "router", "q_a_proj", "kv_a_proj_with_mqa"})


class Loading(StrEnum):
    """How a release loads at a tensor-parallel size."""

    FAST = "fast kernel"
    GENERAL = "general kernel"
    REFUSED = "does not load"


@dataclass(frozen=True)
class TpAnswer:
    """The answer for one tensor-parallel size.

    Attributes:
        size: Number of ranks.
        loading: How it loads.
        module: Name of the first linear that keeps it from loading, or from the fast kernel; empty when none does, or
            all do.
        reason: The rule that is broken; empty when none is.
    """

    size: int
    loading: Loading
    module: str = ""
    reason: str = ""


def tp_answers(
    modules: Iterable[ModuleFacts], variant: VariantSpec, sizes: tuple[int, ...] = TP_SIZES
) -> tuple[TpAnswer, ...]:
    """Return how vLLM loads these linears at each tensor-parallel size."""
    modules = tuple(modules)
    return tuple(_answer(modules, variant, size) for size in sizes)


def kernel_refusal(variant: VariantSpec, widths: Iterable[int]) -> str:
    """Return why vLLM has no kernel for codes of one of these widths, whatever the shapes; empty when it has."""
    widths = set(widths)
    if variant.activations is not Activations.NONE:
        return ""
    if unusual := sorted(widths - VLLM_BITS):
        marlin = f"vLLM's Marlin kernel takes codes of 4 and 8 bits only, not of {' and '.join(map(str, unusual))}"
        is_other = variant.format is Format.COMPRESSED_TENSORS
        return f"{marlin} (its Humming kernel does, a package of its own, on NVIDIA GPUs)" if is_other else marlin
    if 8 in widths and not variant.symmetric and variant.format is not Format.GPTQ_V2:
        return (
            "vLLM's Marlin kernel takes zero points with 4-bit codes only, not with 8-bit ones "
            "(its Machete kernel does, on Hopper GPUs)"
        )
    return ""


def _answer(modules: tuple[ModuleFacts, ...], variant: VariantSpec, size: int) -> TpAnswer:
    if reason := kernel_refusal(variant, (module.bits for module in modules if module.bits < UNQUANTIZED_BITS)):
        return TpAnswer(size, Loading.REFUSED, reason=reason)
    slow: TpAnswer | None = None
    # Without a zero point, and in the formats of AWQ and GPTQ, vLLM has a second kernel to fall back to.
    has_fallback = variant.symmetric or variant.format in (Format.AWQ, Format.GPTQ_V2)
    fallback = Loading.GENERAL if has_fallback else Loading.REFUSED
    for module in modules:
        refusal = _refusal(module, variant, size)
        if refusal:
            return TpAnswer(size, Loading.REFUSED, module.name, refusal)
        obstacle = _obstacle(module, variant, size)
        if obstacle and slow is None:
            slow = TpAnswer(size, fallback, module.name, obstacle)
    return slow or TpAnswer(size, Loading.FAST)


def _splits(module: ModuleFacts, size: int) -> tuple[int, int]:
    """Return into how many parts the outputs and the inputs are cut."""
    leaf = module.name.rsplit(".", 1)[-1]
    if leaf in _COLUMN:
        return size, 1
    if leaf in _ROW:
        return 1, size
    # An unknown unquantized linear is the engine's own affair: it loads as it does in the source.
    is_whole = leaf in _REPLICATED or module.bits >= UNQUANTIZED_BITS
    return (1, 1) if is_whole else (size, size)


def _refusal(module: ModuleFacts, variant: VariantSpec, size: int) -> str:
    """Return why the linear cannot be cut; empty when it can."""
    out_parts, in_parts = _splits(module, size)
    if module.out_features % out_parts:
        return f"{module.out_features} outputs do not divide over {size} ranks"
    if module.in_features % in_parts:
        return f"{module.in_features} inputs do not divide over {size} ranks"
    if module.bits >= UNQUANTIZED_BITS:
        return ""
    if variant.activations is not Activations.NONE:
        return ""
    out_rank, in_rank = module.out_features // out_parts, module.in_features // in_parts
    if not _is_per_row(module, variant) and in_rank % module.group_size:
        return f"{in_rank} inputs per rank are not whole groups of {module.group_size}"
    packed = WORD_BITS // math.gcd(WORD_BITS, module.bits)
    if out_rank % packed:
        return f"{out_rank} outputs per rank do not fill words of {packed}"
    return ""


def _obstacle(module: ModuleFacts, variant: VariantSpec, size: int) -> str:
    """Return which rule of the fast kernel the cut linear breaks; empty when none."""
    if module.bits >= UNQUANTIZED_BITS:
        return ""
    out_parts, in_parts = _splits(module, size)
    out_rank, in_rank = module.out_features // out_parts, module.in_features // in_parts
    if variant.activations is not Activations.NONE:
        uneven = [size for size in (out_rank, in_rank) if size % CUTLASS_SIZES]
        return f"{uneven[0]} per rank is no multiple of {CUTLASS_SIZES}" if uneven else ""
    if variant.format is Format.GPTQ_V2 and not variant.symmetric:
        return "vLLM's Marlin kernel takes no zero points of format gptq_v2"
    if out_rank % MARLIN_OUT:
        return f"{out_rank} outputs per rank are no multiple of {MARLIN_OUT}"
    if in_rank % MARLIN_IN:
        return f"{in_rank} inputs per rank are no multiple of {MARLIN_IN}"
    if not _is_per_row(module, variant) and module.group_size not in MARLIN_GROUPS:
        return f"group size {module.group_size} is none of {', '.join(map(str, MARLIN_GROUPS))}"
    return ""


def _is_per_row(module: ModuleFacts, variant: VariantSpec) -> bool:
    """Return whether the row has one scale: every rank then keeps all scales, and no group can be cut."""
    is_whole_row = module.group_size == module.in_features
    return module.group_size == PER_CHANNEL or (variant.group_size == PER_CHANNEL and is_whole_row)
